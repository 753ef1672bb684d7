"""Models of published sizes: the sizes are those of the checkpoints, and only what is asked for is built."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from selector.errors import UsageError
from selector.measure.geometry import GEOMETRIES, WORDS, build, find_geometry, natural_picture, pixels, prompt
from selector.models import encode

# Parameters of the published checkpoints, in millions, as their pages on the hub state them.
PUBLISHED = {
    "llava-next-7b": 7060,
    "llava-next-mistral-7b": 7570,
    "llava-next-13b": 13400,
    "llava-1.5-7b": 7060,
    "llava-onevision-7b": 8030,
    "qwen2.5-vl-7b": 8290,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_whole_model_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(find_geometry(name).config())
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    assert millions == pytest.approx(PUBLISHED[name], rel=0.006)


def test_every_geometry_is_checked():
    assert {*PUBLISHED, "llava-next-tiny"} == set(GEOMETRIES)


def test_an_unknown_name_is_an_error_with_the_known_ones():
    with pytest.raises(UsageError, match=r"llava-next-13b.*got 'llava-next-8b'; did you mean llava-next-7b\?"):
        find_geometry("llava-next-8b")


@pytest.mark.parametrize("layers", [0, 2])
def test_only_what_is_asked_for_is_built(layers):
    before = torch.get_rng_state()
    model = build(find_geometry("llava-next-tiny"), layers, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(model.base_model.language_model.layers) == layers
    assert model.get_input_embeddings().weight.shape == (WORDS, 192)
    assert len(model.base_model.vision_tower.encoder.layers) == 4

    # The seed decides, whatever was drawn before.
    torch.rand(3)
    again = build(find_geometry("llava-next-tiny"), layers, seed=5).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("layers", [-1, 5])
def test_layers_that_the_model_does_not_have_are_refused(layers):
    with pytest.raises(UsageError, match=rf"prefill-layers must be in 0\.\.4.*got {layers}"):
        build(find_geometry("llava-next-tiny"), layers)


def test_the_picture_has_the_amplitudes_of_natural_images():
    grey = np.asarray(natural_picture(256, 256, seed=3).convert("L"), dtype=float)
    amplitude = np.abs(np.fft.fft2(grey - grey.mean()))
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256))
    ring = (frequency > 0.02) & (frequency < 0.4)
    exponent, _ = np.polyfit(np.log(frequency[ring]), np.log(amplitude[ring] + 1e-9), 1)
    assert exponent == pytest.approx(-1, abs=0.15)


def test_the_prompt_has_a_placeholder_per_visual_token():
    sizes = find_geometry("llava-next-tiny")
    model = build(sizes)
    inputs = pixels(sizes, natural_picture(50, 70), model.device, torch.float32)
    assert inputs["pixel_values"].shape[:2] == (1, sizes.tiles)
    encoded = encode(model, inputs | prompt(model, 744, 8), {"features", "question"})
    assert [len(feats) for feats in encoded.packed] == [744]
    assert encoded.tokens.question.shape == (1, 4, 192)
