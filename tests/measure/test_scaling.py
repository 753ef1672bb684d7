"""`selector bench --geometry` counts, skips and refuses by name; the times themselves are the machine's business."""

from __future__ import annotations

import json

import pytest
import torch

from selector import SVDPrune, available_selectors
from selector.errors import UsageError
from selector.measure import geometry
from selector.measure.flops import cache_bytes, tower_flops
from selector.measure.geometry import Geometry, build, find_geometry, natural_picture, pixels
from selector.measure.scaling import LEARNED, first_tiles, known_selectors, measure
from selector.models import encode
from selector.tokens import NEWLINE

TINY = "llava-next-tiny"
TOKENS = {1: 144, 2: 144 + 12 * 13, 3: 144 + 12 * 25, 4: 144 + 12 * 38, 5: 144 + 24 * 25}


@pytest.fixture(scope="module")
def whole():
    """Every selector, at one budget and two numbers of tiles; two layers of the language model."""
    return measure(TINY, keeps=[16], tiles=[2], layers=2, repeats=1)


def test_every_selector_is_there(whole):
    names = [row["selector"].partition(":")[0] for row in whole["selectors"]]
    inside = {name for name, cls in available_selectors().items() if cls.acts != "before"}
    assert {row["selector"] for row in whole["skipped"]} == inside

    # `merge` is made of another, and has its name.
    assert "svd-prune:merge=nearest" in [row["selector"] for row in whole["selectors"]]
    assert {*names, "merge"} == {*available_selectors(), *LEARNED} - inside
    assert [row["selector"] for row in whole["selectors"] if row["weights"] == "random"] == list(LEARNED)
    assert all((row["parameters"] > 0) == (row["selector"] in LEARNED) for row in whole["selectors"])


def test_every_figure_is_there(whole):
    places = [(cell["selector"], cell["tiles"], cell["keep"]) for cell in whole["cells"]]
    assert sorted(places) == sorted((row["selector"], n, 16) for row in whole["selectors"] for n in (5, 2))
    for cell in whole["cells"]:
        assert cell["kept"] == 16, cell
        assert cell["ms"] > 0
        assert cell["peak_bytes"] > 0
        assert isinstance(cell["flops"], int)
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole


def test_what_stands_beside_the_figures(whole):
    assert whole["tokens"] == {"2": TOKENS[2], "5": TOKENS[5]}
    assert whole["encoder"]["flops"] == tower_flops(find_geometry(TINY).config(), 5)
    assert whole["machine"]["threads"] == torch.get_num_threads()
    assert whole["machine"]["clock"] == "CPU time of the process"
    for name, directions in (("features", 160), ("projected", 192)):
        energy = whole["spectrum"][name]
        assert 1 <= energy["half"] < energy["most"] < energy["directions"] == directions


def test_the_cache_that_is_allocated_is_the_one_of_the_formula_and_shorter_when_pruned(whole):
    full, pruned = whole["prefill"]["rows"]
    assert (full["tokens"], pruned["tokens"]) == (TOKENS[5] + 32, 16 + 32)
    for row in (full, pruned):
        assert row["kv_bytes_built"] == row["kv_bytes_formula_built"] == row["kv_bytes_formula"] // 2
        assert row["kv_bytes_formula"] == cache_bytes(find_geometry(TINY).config(), row["tokens"], 4)
        assert row["ms"] > 0
    assert pruned["kv_bytes_built"] < full["kv_bytes_built"]


def test_without_layers_the_prefill_has_operations_alone():
    result = measure(TINY, ["uniform"], [16], [1], repeats=1)
    assert result["prefill"]["layers_built"] == 0
    for row in result["prefill"]["rows"]:
        assert "ms" not in row
        assert row["flops"] > 0


@pytest.fixture(scope="module")
def encoded():
    sizes = find_geometry(TINY)
    model = build(sizes)
    image = natural_picture(*sizes.size)
    return encode(model, pixels(sizes, image, model.device, torch.float32), {"features", "projected", "keys", "keys@0"})


@pytest.mark.parametrize("count", TOKENS)
def test_fewer_tiles_are_the_first_ones_with_the_newlines_of_their_rows(encoded, count):
    view, tokens = first_tiles(encoded, count), encoded.tokens
    short = view.tokens
    assert int(short.lengths) == len(view.packed[0]) == TOKENS[count]
    assert bool(short.valid.all())
    for name in ("features", "projected", "keys"):
        assert torch.equal(getattr(short, name), getattr(tokens, name)[:count])
    assert torch.equal(short.layers["keys@0"], tokens.layers["keys@0"][:count])

    # Each packed token is still the projected one that its slot names.
    patch = short.slots[0] != NEWLINE
    assert torch.equal(view.packed[0][patch], short.projected.flatten(0, 1)[short.slots[0][patch]])
    assert short.features.untyped_storage().nbytes() <= tokens.features[:count].nbytes or count == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"geometry": "tiny"}, "geometry must be one of llava-next-tiny, "),
        ({"tiles": [6]}, r"tiles must be in 1\.\.5 for llava-next-tiny, got 6"),
        ({"tiles": [0, 2]}, r"tiles must be in 1\.\.5 for llava-next-tiny, got 0"),
        ({"repeats": 0}, "repeats must be >= 1, got 0"),
        ({"keeps": [745]}, r"keep must be in 1\.\.744, the visual tokens of 5 tiles, got 745"),
        ({"keeps": [145, 300], "tiles": [1]}, r"keep must be in 1\.\.144, the visual tokens of 1 tiles, got 145"),
        ({"layers": 5}, r"prefill-layers must be in 0\.\.4"),
        ({"selectors": ["nobody"]}, "selectors must be among .*svd-prune.*, got 'nobody'"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(UsageError, match=message):
        measure(**{"geometry": TINY, "selectors": ["uniform"], "keeps": [16], "tiles": [1], "repeats": 1} | change)


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
}


def onevision():
    """A tower without a CLS token."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    tower |= {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, "vision_use_head": False}
    settings = {"vision_config": tower, "text_config": TEXT | {"model_type": "qwen2"}, "vision_feature_layer": -1}
    settings |= {"vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
    return Geometry("llava_onevision", settings | {"image_grid_pinpoints": [[64, 64]]}, (64, 64), 5)


def qwen():
    """A tower that merges patches, and has queries and keys in one projection."""
    tower = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 8}
    tower |= {"window_size": 32, "fullatt_block_indexes": [1], "out_hidden_size": 32}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    settings = {"vision_config": tower, "text_config": TEXT | rope | {"model_type": "qwen2_5_vl_text"}}
    return Geometry("qwen2_5_vl", settings, (128, 128), 1)


@pytest.fixture
def other(monkeypatch):
    monkeypatch.setitem(geometry.GEOMETRIES, "onevision", onevision())
    monkeypatch.setitem(geometry.GEOMETRIES, "qwen", qwen())


def test_a_tower_without_cls_gives_the_attention_that_is_received(other):
    result = measure("onevision", keeps=[9], tiles=[1], layers=1, repeats=1)
    labels = [row["selector"] for row in result["selectors"]]
    assert {"vispruner:attention=received", "cls-attention:attention=received", "hired:attention=received"} <= {*labels}
    assert "vispruner" not in labels

    # SCOPE weighs by the attention from CLS and takes no other; and no language model is there to act inside of.
    reasons = {row["selector"]: row["reason"] for row in result["skipped"]}
    assert "cls_attention" in reasons.pop("scope", "cls_attention")
    assert "fastv" in reasons
    assert all("acts inside the language model" in reason for reason in reasons.values()), reasons
    assert len(labels) + len(result["skipped"]) == len(known_selectors())


def test_what_a_model_cannot_serve_is_left_out_by_name(other):
    result = measure("qwen", ["uniform", "vispruner", "gumbel", "tome"], [9], layers=1, repeats=1)
    assert [row["selector"] for row in result["selectors"]] == ["uniform", "gumbel"]
    assert [row["selector"] for row in result["skipped"]] == ["vispruner", "tome"]
    assert "gives no" in result["skipped"][0]["reason"]
    assert "keys" in result["skipped"][1]["reason"]
    assert {cell["selector"] for cell in result["cells"]} == {"uniform", "gumbel"}
    assert result["encoder"]["projector_ms"] is None
    assert result["prefill"]["rows"][0]["kv_bytes_built"] == result["prefill"]["rows"][0]["kv_bytes_formula_built"]


def test_a_selector_without_an_answer_is_left_out_and_the_others_go_on():
    wide = available_selectors()["gumbel"](dim=8, num_patches=144).eval()
    result = measure(TINY, {"wide": wide, "svd": SVDPrune(rank=2)}, [16], [1], repeats=1)
    assert [row["selector"] for row in result["selectors"]] == ["svd"]
    assert result["skipped"] == [
        {"selector": "wide", "reason": "the selector reads features of width 8, got width 160"}
    ]
    assert {cell["selector"] for cell in result["cells"]} == {"svd"}


def test_nothing_left_to_measure_is_an_error(other):
    with pytest.raises(UsageError, match=r"selectors must hold one that this geometry can serve: .*received_attention"):
        measure("qwen", ["vispruner"], [9], repeats=1)
