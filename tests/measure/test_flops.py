"""Formulas against torch's own counter, on towers and language models of every kind that they know."""

from __future__ import annotations

import families
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from selector import Budget, GumbelSelector, Random, SVDPrune
from selector.measure.answering import prepare
from selector.measure.flops import cache_bytes, counted_flops, language_flops, tower_flops
from selector.models import encode
from selector.pruning import prune_inputs

MODELS = [("clip", "llama", "sdpa"), ("siglip", "mistral", "eager"), ("clip", "qwen2", "sdpa")]


def counted(work):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = work()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("kind", MODELS)
def test_tower_prefill_and_decoding(tiny_model, make_image, kind):
    model, processor = tiny_model(*kind)
    inputs = prepare(processor, make_image(64, 90), "how many?", model.device)
    pixels = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    tower, _ = counted(lambda: model.base_model.get_image_features(**pixels, return_dict=True))
    tiles = len(encode(model, inputs).tokens.features)
    assert tower_flops(model.config, tiles) == tower
    whole = prune_inputs(model, inputs, None)
    prompt = whole.inputs["input_ids"].shape[1]
    prefill, output = counted(lambda: model(**whole.inputs, use_cache=True, logits_to_keep=1))
    assert language_flops(model.config, prompt, prompt) == prefill
    cache = output.past_key_values
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(model.config, prompt, model.dtype.itemsize) == stored
    token = torch.tensor([[5]])
    decode, _ = counted(lambda: model(input_ids=token, past_key_values=cache, use_cache=True))
    assert language_flops(model.config, 1, prompt + 1) == decode


def test_unknown_kinds_have_no_formula(tiny_model):
    model, _ = tiny_model()
    config = type(model.config).from_dict(model.config.to_dict())
    config.text_config.model_type, config.vision_config.model_type = "mamba", "convnext"
    assert language_flops(config, 1, 1) is None
    assert tower_flops(config, 1) is None


def test_selectors_are_counted_with_their_decompositions(tiny_model, make_image):
    model, processor = tiny_model()
    with torch.no_grad():
        tokens = encode(model, prepare(processor, make_image(64, 64), "?", model.device)).tokens
    assert counted_flops(lambda: Random()(tokens, Budget(9))) == 0
    assert counted_flops(lambda: SVDPrune(rank=2)(tokens, Budget(9))) > 9 * 32**3


def test_decompositions_by_hand():
    square, tall = torch.randn(2, 5, 5), torch.randn(7, 3)
    square = square @ square.mT
    assert counted_flops(lambda: torch.linalg.eigh(square)) == 2 * 9 * 125
    assert counted_flops(lambda: torch.linalg.qr(tall)) == 4 * 7 * 9
    assert counted_flops(lambda: torch.linalg.svd(tall, full_matrices=False)) == 14 * 7 * 9 + 8 * 27


def test_cholesky_by_hand():
    square = torch.eye(6).repeat(2, 1, 1)
    assert counted_flops(lambda: torch.linalg.cholesky(square)) == 2 * 72
    assert counted_flops(lambda: torch.cholesky_inverse(square)) == 2 * 144
    assert counted_flops(lambda: torch.linalg.solve_triangular(square, torch.ones(2, 6, 3), upper=True)) == 2 * 36 * 3


def test_the_fast_path_of_a_transformer_is_counted_as_its_parts_are():
    selector = GumbelSelector(dim=6, num_patches=16, width=12, layers=2, heads=3).eval()
    table = torch.randn(3, 16, 6)
    fast = counted_flops(lambda: selector.logits(table))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert counted_flops(lambda: selector.logits(table)) == fast
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_qwen2_5_has_the_layers_of_qwen2():
    family = next(each for each in families.FAMILIES if each.kind == "qwen2_5_vl")
    inputs = family.batch([[family.picture(0)]])
    whole = prune_inputs(family.model, inputs, None)
    prompt = whole.inputs["input_ids"].shape[1]
    prefill, _ = counted(lambda: family.model(**whole.inputs, use_cache=True, logits_to_keep=1))
    assert language_flops(family.model.config, prompt, prompt) == prefill
