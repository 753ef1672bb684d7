"""Encoders: the features a selector is trained on are those it will read inside the model, and they stay frozen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from selector.models import encode
from training.encoders import LlavaNextEncoder, TimmEncoder, TransformersEncoder


@pytest.mark.parametrize(("vision", "text"), [("clip", "llama"), ("siglip", "qwen2"), ("clip", "mistral")])
def test_llava_features_are_those_of_the_whole_model(tmp_path, tiny_model, make_image, vision, text):
    model, processor = tiny_model(vision, text)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = LlavaNextEncoder(str(tmp_path))
    for size in ((40, 90), (70, 30), (16, 16)):
        image = make_image(*size)
        inputs = processor(images=[image], text="USER: <image>\nwhat?", return_tensors="pt")
        expected = encode(model, inputs).tokens
        pixels = encoder.preprocess(image)
        torch.testing.assert_close(pixels, inputs["pixel_values"][0], rtol=0, atol=0)
        torch.testing.assert_close(encoder(pixels), expected.features, rtol=0, atol=0)
        assert encoder.grid == expected.grid
    assert encoder.dim == 32
    assert encoder.num_patches == 16


def test_a_vision_tower_of_its_own(tmp_path, tiny_model, make_image):
    model, processor = tiny_model()
    model.model.vision_tower.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    encoder = TransformersEncoder(str(tmp_path), layer=-2)
    pixels = encoder.preprocess(make_image(40, 90))
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(encoder(pixels), hidden[:, 1:], rtol=0, atol=0)
    assert encoder.grid == (4, 4)


def test_timm_features_are_the_tokens_without_prefix(make_image):
    encoder = TimmEncoder("test_vit", pretrained=False)
    pixels = encoder.preprocess(make_image(40, 90))
    tokens = encoder.model.forward_features(pixels)
    assert encoder.grid == (10, 10)
    torch.testing.assert_close(encoder(pixels), tokens[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 120), (120, 40), (64, 64)])
def test_timm_sees_the_whole_image(make_image, size):
    """A classifier's centre crop would hide the border from the selector."""
    encoder = TimmEncoder("test_vit", pretrained=False, image_size=32)
    plain, framed = make_image(*size), make_image(*size)
    width, height = framed.size
    for corner in ((0, 0), (width - 6, height - 6)):
        framed.paste((0, 0, 0), (*corner, corner[0] + 6, corner[1] + 6))
    changed = (encoder.preprocess(plain) != encoder.preprocess(framed))[0].any(0)
    assert changed.shape == (32, 32)
    assert bool(changed[0, 0])
    assert bool(changed[-1, -1])


def test_timm_convolutional_models_have_a_grid_too(make_image):
    encoder = TimmEncoder("test_convnext", pretrained=False)
    pixels = encoder.preprocess(make_image(40, 90))
    assert encoder(pixels).shape == (1, encoder.num_patches, encoder.dim)


@pytest.mark.parametrize("size", [(40, 90), (90, 40), (60, 60)])
def test_timm_keeps_one_square_tile(make_image, size):
    encoder = TimmEncoder("test_vit", pretrained=False)
    assert encoder.preprocess(make_image(*size)).shape == (1, 3, 160, 160)


def test_an_encoder_is_frozen_and_in_no_checkpoint():
    encoder = TimmEncoder("test_vit", pretrained=False)
    owner = nn.ModuleDict({"encoder": encoder, "other": nn.Linear(2, 2)})
    owner.train()
    assert not encoder.training
    assert not any(module.training for module in encoder.modules())
    assert not any(weight.requires_grad for weight in encoder.parameters())
    assert not encoder(torch.randn(1, 3, 160, 160)).requires_grad
    assert list(owner.state_dict()) == ["other.weight", "other.bias"]


def test_the_fingerprint_tells_weights_apart():
    torch.manual_seed(0)
    first = TimmEncoder("test_vit", pretrained=False)
    before = first.fingerprint()
    with torch.no_grad():
        next(first.parameters()).add_(1e-3)
    assert first.fingerprint() != before


def test_bad_names_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must be a model folder, got .*nowhere"):
        LlavaNextEncoder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="name must be a timm model, got 'vit_of_nobody'"):
        TimmEncoder("vit_of_nobody", pretrained=False)


def test_a_model_of_another_type_is_named(tmp_path, tiny_model):
    model, _ = tiny_model()
    model.model.vision_tower.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"path must hold a LLaVA-NeXT, got .* of type 'clip_vision_model'"):
        LlavaNextEncoder(str(tmp_path))


TYPES = ("float32", "bfloat16")


def encoder_of(kind, tmp_path, tiny_model, dtype):
    """One of each family, with the same weights whenever it is built."""
    if kind == "timm":
        torch.manual_seed(0)
        return TimmEncoder("test_vit", pretrained=False, dtype=dtype)
    model, processor = tiny_model()
    whole = kind == "llava"
    (model if whole else model.model.vision_tower).save_pretrained(tmp_path)
    (processor if whole else processor.image_processor).save_pretrained(tmp_path)
    return LlavaNextEncoder(str(tmp_path), dtype=dtype) if whole else TransformersEncoder(str(tmp_path), dtype=dtype)


@pytest.mark.parametrize("kind", ["llava", "transformers", "timm"])
def test_a_lower_precision_changes_the_features_by_its_rounding_alone(tmp_path, tiny_model, make_image, kind):
    full, low = (encoder_of(kind, tmp_path, tiny_model, dtype) for dtype in TYPES)
    pixels = full.preprocess(make_image(40, 90))
    expected, features = full(pixels), low(pixels)
    assert {weight.dtype for weight in low.parameters()} == {torch.bfloat16}
    assert features.dtype == torch.float32
    error = float((features - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.02  # bfloat16 has 8 bits, and it was really used
    assert low.fingerprint() != full.fingerprint()


@pytest.mark.parametrize("dtype", TYPES)
def test_the_precision_of_the_trainer_does_not_reach_the_encoder(tmp_path, tiny_model, make_image, dtype):
    encoder = encoder_of("llava", tmp_path, tiny_model, dtype)
    pixels = encoder.preprocess(make_image(40, 90))
    features, projected = encoder(pixels), encoder.project(encoder(pixels))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(encoder(pixels), features, rtol=0, atol=0)
        torch.testing.assert_close(encoder.project(features), projected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_what_reads_the_features_is_trained_although_they_come_from_inference_mode(
    tmp_path, tiny_model, make_image, dtype
):
    encoder = encoder_of("llava", tmp_path, tiny_model, dtype)
    modes, plain = [], encoder.encode
    encoder.encode = lambda pixels: modes.append(torch.is_inference_mode_enabled()) or plain(pixels)
    features = encoder(encoder.preprocess(make_image(40, 90)))
    projected = encoder.project(features)
    assert modes == [True]
    for read in (features, projected):
        assert not read.is_inference()
        reader = nn.Linear(read.shape[-1], 1)
        reader(read).sum().backward()  # its gradient is the input that it keeps
        torch.testing.assert_close(reader.weight.grad[0], read.sum((0, 1)), rtol=1e-4, atol=1e-4)
