"""What the configs of large models say they need: computed anew, and the formulas held against what really happens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from selector.errors import UsageError
from selector.measure import requirements
from selector.measure.flops import cache_bytes, qwen_tower_flops
from selector.measure.geometry import GEOMETRIES, Geometry
from selector.measure.requirements import (
    CARDS,
    MODELS,
    activation_bytes,
    described,
    hours,
    main,
    memory,
    operations,
    parameters,
    prompts,
)

ROOT = Path(__file__).parents[2]
CONFIGS = [ROOT / f"configs/compare/{name}.yaml" for name in ("llava-next-7b", "llava-next-13b", "onevision-7b")]
CONFIGS.append(ROOT / "configs/compare/qwen2.5-vl-7b.yaml")
SETTINGS = {
    "model": next(iter(MODELS)),
    "selectors": ["norm"],
    "keep": [0.5, 64],
    "tasks": ["documents"],
    "samples": 10,
}
SETTINGS |= {"max_new_tokens": 8, "batch_size": 4}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_head_of_a_config_is_what_the_formulas_give(path, capsys):
    assert main([str(path)]) == 0
    assert capsys.readouterr().out in path.read_text()
    settings = yaml.safe_load(path.read_text())
    assert f"selector compare --config configs/compare/{path.name}\n" in path.read_text()
    assert settings["out"] == f"runs/{path.stem}"


@pytest.mark.parametrize(
    ("name", "published"),
    # As the hub shows them: "7.57B params" and so on; LLaVA-NeXT's newline vector is in none of its layers.
    [("llava-next-mistral-7b", 7.57), ("llava-next-13b", 13.4), ("llava-onevision-7b", 8.03), ("qwen2.5-vl-7b", 8.29)],
)
def test_parameters_are_those_of_the_published_models(name, published):
    assert parameters(GEOMETRIES[name]) / 1e9 == pytest.approx(published, abs=0.05 if published > 10 else 0.006)


def test_the_cache_by_hand():
    """Mistral: 32 layers, 8 heads of width 128 for keys and for values, 2 bytes."""
    needed = memory(GEOMETRIES["llava-next-mistral-7b"], batch=4)
    assert needed.cache == 2 * 32 * 8 * 128 * 2 * (2928 + 64) * 4 * 2
    assert memory(GEOMETRIES["llava-next-mistral-7b"], batch=1).cache == needed.cache / 8  # no copy without batches
    assert memory(GEOMETRIES["llava-next-mistral-7b"], 4, weight_bytes=1).weights == needed.weights / 2


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "length"), [(1, 512), (3, 256)])
def test_a_prefill_takes_the_activations_of_the_formula(tmp_path, batch, length):
    """The highest memory of a real prefill, above what it starts with, by torch's profiler: cache and activations."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=896, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(3, 60, (batch, length))
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, logits_to_keep=1)  # a first pass sets up more
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
    seen.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]

    whole = Geometry("llava", {"text_config": config}, (0, 0), 1).config()
    cache = cache_bytes(whole, length * batch, 4)
    assert max(totals) - totals[0] == pytest.approx(cache + activation_bytes(config, length * batch, 4), rel=0.15)


@pytest.mark.parametrize("side", [8, 16])
def test_the_tower_of_qwen(side):
    """Against torch's counter, on an image of whole windows of 4 x 4 patches."""
    vision = {
        "depth": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "patch_size": 4, "window_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "fullatt_block_indexes": [1], "out_hidden_size": 24,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(vision_config=vision)
    tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(config.vision_config).eval()
    pixels = torch.randn(side * side, 3 * 2 * 4 * 4)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(pixels, grid_thw=torch.tensor([[1, side, side]]))
    assert qwen_tower_flops(config, side * side // 4) == counter.get_total_flops()
    assert qwen_tower_flops(GEOMETRIES["llava-next-7b"].config(), 9) is None


def test_prompts_and_time_by_hand(monkeypatch):
    assert prompts(SETTINGS) == [2992, 64, 1464 + 64, 64 + 64]
    geometry = GEOMETRIES["llava-next-mistral-7b"]

    # Rows whose answers change are read twice without batches; unpruned and blind ones are not.
    single = SETTINGS | {"batch_size": 1}
    monkeypatch.setattr(requirements, "tower_flops", lambda *_: 5)
    monkeypatch.setattr(requirements, "language_flops", lambda config, tokens, context: tokens)
    assert operations(geometry, SETTINGS) == 5 + 2992 + 64 + 1528 + 128
    assert operations(geometry, single) == 5 + 2992 + 64 + 2 * (1528 + 128)

    # Four rows of 8 tokens, each of which reads all weights, shared by 4 prompts; then operations; 10 questions.
    one = CARDS[0]
    reading = 4 * 8 * memory(geometry, 4).weights / 4 / (one.bandwidth * 0.5)
    assert hours(geometry, SETTINGS, one) == pytest.approx(
        10 * (reading + operations(geometry, SETTINGS) / (one.flops * 0.4)) / 3600
    )


def test_more_cards_take_less_time():
    geometry, eight = GEOMETRIES["qwen2.5-vl-7b"], CARDS[1]
    alone = requirements.Card("one", eight.flops, eight.bandwidth)
    assert hours(geometry, SETTINGS, alone) == pytest.approx(8 * hours(geometry, SETTINGS, eight))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "owner/name"}, "model must be one of .*, got 'owner/name'"),
        ({"keep": ["energy:0.9"]}, "keep must be counts and shares here, got 'energy:0.9'"),
        ({"samples": None}, "config must say samples"),
    ],
)
def test_what_cannot_be_computed_is_named(changed, message):
    settings = {name: value for name, value in (SETTINGS | changed).items() if value is not None}
    with pytest.raises(UsageError, match=message):
        described(settings)
