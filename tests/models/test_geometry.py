"""Where visual tokens lie and what stands for them, family by family: oracles written out by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from families import END, FAMILIES, IMAGE, START, Family, tiles_of

from selector import Budget, Random, load_selector, prune_inputs, select_tokens
from selector.grid import places
from selector.models import Adapter, adapter_of, available_adapters, encode, llava, register_adapter
from selector.models._layout import Canvas, Runs, Tiles
from selector.tokens import NEWLINE

NAMED = {family.name: family for family in FAMILIES}
M_ROPE = ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"]
TILED = ["InternVL", "Idefics3", "SmolVLM"]


def encoded(family: Family, rows, needs=("features", "projected")):
    inputs = family.batch(rows)
    with torch.no_grad():
        return inputs, encode(family.model, inputs, needs)


def projected(family: Family, features: torch.Tensor) -> torch.Tensor:
    """The model's projector applied to features by hand."""
    base = family.model.base_model
    if family.name in ("Idefics3", "SmolVLM"):
        return base.connector.modality_projection(features)
    projector = base.multi_modal_projector
    if family.name == "Gemma 3":
        return projector.mm_soft_emb_norm(features) @ projector.mm_input_projection_weight
    if family.name == "Mistral 3":
        parts = features.unflatten(-1, (-1, 4)).mT  # the four patches of a token
        joined = projector.norm(parts).mT.flatten(2)
        merged = projector.patch_merger.merging_layer(joined)
        return projector.linear_2(projector.act(projector.linear_1(merged)))
    return projector(features)


@pytest.mark.parametrize("name", [f.name for f in FAMILIES if f.name not in (*M_ROPE, "LLaVA-OneVision")])
def test_features_are_what_the_projector_reads(name):
    family = NAMED[name]
    _, found = encoded(family, [[family.picture(0)], [family.picture(1), family.picture(2)]])
    tokens = found.tokens
    with torch.no_grad():
        want = projected(family, tokens.features)
    torch.testing.assert_close(tokens.projected[tokens.valid], want[tokens.valid])


@pytest.mark.parametrize("name", [*M_ROPE, "Mistral 3", "Pixtral"])
def test_images_of_any_size_lie_in_the_upper_left_corner(name):
    family = NAMED[name]
    _, found = encoded(family, [[family.picture(0)], [family.picture(1), family.picture(2)]])
    for i in range(3):
        rows, columns = (side // 8 for side in family.picture(i)[:2])
        valid = found.tokens.valid[i].view(found.tokens.grid)
        assert bool(valid[:rows, :columns].all())
        assert int(valid.sum()) == rows * columns == len(found.packed[i])
        table = found.tokens.projected[i].unflatten(0, found.tokens.grid)[:rows, :columns]
        assert torch.equal(table.flatten(0, 1), found.packed[i])


@pytest.mark.parametrize("name", M_ROPE)
def test_rotary_positions_are_the_places_of_the_kept_tokens(name):
    """Oracle: row and column of the grid, from the first position behind the text; the text before it counts on."""
    family = NAMED[name]
    inputs = family.batch([[family.picture(0)]])
    pruned = prune_inputs(family.model, inputs, Random(), Budget(7))
    count, time, row, column = pruned.inputs["position_ids"][:, 0]
    assert torch.equal(count, torch.arange(len(count)))
    visual = pruned.inputs["input_ids"][0] == IMAGE
    start = int(visual.nonzero()[0])
    _, y, x = places(pruned.tokens)
    kept = pruned.keep[0]
    assert torch.equal(time[visual], torch.full((7,), start))
    assert torch.equal(row[visual], start + y[0][kept])
    assert torch.equal(column[visual], start + x[0][kept])
    words = row[~visual]
    assert torch.equal(words[:start], torch.arange(start))
    longest = max(family.picture(0)[:2]) // 8
    assert torch.equal(words[start:], start + longest + torch.arange(len(words) - start))
    assert torch.equal(row[~visual], column[~visual])


@pytest.mark.parametrize("name", M_ROPE)
def test_positions_of_m_rope_are_neither_closed_up_nor_guessed(name):
    family = NAMED[name]
    model, inputs = family.model, family.batch([[family.picture(0)]])
    with pytest.raises(ValueError, match="positions='contiguous' has no meaning for a 'qwen"):
        prune_inputs(model, inputs, Random(), Budget(4), positions="contiguous")
    without = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    with pytest.raises(ValueError, match="mm_token_type_ids must be given"):
        prune_inputs(model, without, Random(), Budget(4))
    with torch.no_grad(), select_tokens(model, Random(), keep=4):
        asked = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE]}
        cached, fresh = model.generate(**inputs, **asked), model.generate(**inputs, **asked, use_cache=False)
    assert torch.equal(cached, fresh)  # no gaps that would be read as packed sequences
    given = model.base_model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )[0]
    ours = prune_inputs(model, inputs, Random(), Budget(4)).inputs["position_ids"]
    theirs = prune_inputs(model, {**inputs, "position_ids": given}, Random(), Budget(4)).inputs["position_ids"]
    assert torch.equal(theirs, ours[1:])


@pytest.mark.parametrize("name", TILED)
def test_tiles_belong_to_the_image_whose_placeholders_they_fill(name):
    family = NAMED[name]
    rows = [[family.picture(0)], [], [family.picture(1), family.picture(2)]]
    inputs, found = encoded(family, rows)
    tokens = found.tokens
    assert torch.bincount(tokens.image).tolist() == [tiles_of(family.picture(i)) for i in range(3)]
    for i in range(3):
        several = tiles_of(family.picture(i)) > 1
        base = tokens.base[i].nonzero().flatten().tolist()
        length = int(tokens.lengths[i])
        assert base == (list(range(length - 4, length)) if several else [])  # the whole image is packed last
    alone = encode(family.model, {**inputs, "input_ids": None}, ("features",)).tokens
    assert alone.num_images == len(tokens.image)  # without a prompt every tile is an image
    broken = inputs["input_ids"].clone()
    broken[0, int((broken[0] == IMAGE).nonzero()[0]) + 1] = 5
    with pytest.raises(ValueError, match=r"input_ids must hold 4 image placeholders .* got runs of \[1, "):
        encode(family.model, {**inputs, "input_ids": broken}, ("features",))


@pytest.mark.parametrize("name", [*TILED, "Gemma 3", "LLaVA-NeXT-Video (videos)"])
def test_blocks_of_patches_are_squares_of_the_tile(name):
    """Oracle: keys of the patches, averaged over 2 x 2 squares of the tile."""
    family = NAMED[name]
    tower = family.model.base_model.vision_model if "text" in family.language else family.model.base_model.vision_tower
    heard = []
    attention = [part for part in tower.modules() if hasattr(part, "k_proj")][-2 if "Video" in name else -1]
    handle = attention.k_proj.register_forward_hook(lambda _, __, out: heard.append(out))
    _, found = encoded(family, [[family.picture(0)]], ("keys",))
    handle.remove()
    keys = heard[0].unflatten(-1, (4, -1)).mean(2)
    keys = keys[:, keys.shape[1] - 16 :].mT.unflatten(-1, (4, 4))
    want = torch.nn.functional.avg_pool2d(keys, 2).flatten(2).mT
    order = torch.arange(len(want))
    if name in TILED:
        order = order.roll(1)  # the whole image comes first in the table
    torch.testing.assert_close(found.tokens.keys, want[order])


@pytest.mark.parametrize(("name", "layer"), [("LLaVA-1.5 (CLIP)", -2), ("InternVL", -1)])
def test_cls_attention_is_that_of_the_feature_layer(name, layer):
    """Oracle: the eager tower run by hand with every attention returned."""
    family = NAMED[name]
    inputs, found = encoded(family, [[family.picture(0)]], ("cls_attention",))
    tower = copy.deepcopy(family.model.base_model.vision_tower)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        want = tower(inputs["pixel_values"], output_attentions=True).attentions[layer][:, :, 0, 1:].mean(1)
    if name == "InternVL":  # summed over the four patches of a token, the whole image first
        want = 4 * torch.nn.functional.avg_pool2d(want.view(-1, 1, 4, 4), 2).flatten(1).roll(1, 0)
    torch.testing.assert_close(found.tokens.cls_attention, want)


def test_normalised_queries_and_keys_are_not_overheard():
    family = NAMED["InternVL"]
    config = copy.deepcopy(family.model.config)
    config.vision_config.use_qk_norm = True
    model = type(family.model)(config).eval()
    with pytest.raises(ValueError, match="cls_attention: this vision tower normalises its queries and keys"):
        encode(model, family.batch([[family.picture(0)]]), ("cls_attention",))


def test_a_shrunk_grid_is_traced_to_the_nearest_token():
    """90 x 80 pixels on 3 x 3 tiles: 12 x 10 tokens are left of 12 x 12; shrunk to 4 tiles' worth, 8 x 7."""
    family = NAMED["LLaVA-OneVision"]
    _, found = encoded(family, [[(90, 80, 0)]])
    tokens = found.tokens
    assert found.approximate
    assert tokens.slots.shape == (1, 16 + 8 * (7 + 1))
    assert torch.equal(tokens.slots[0, :16], torch.arange(16))
    grid = tokens.slots[0, 16:].view(8, 8)
    assert (grid[:, -1] == NEWLINE).all()
    for i in range(8):
        for j in range(7):
            y, x = round((i + 0.5) * 12 / 8 - 0.5), round(1 + (j + 0.5) * 10 / 7 - 0.5)
            tile = 1 + y // 4 * 3 + x // 4
            assert int(grid[i, j]) == tile * 16 + y % 4 * 4 + x % 4
    assert prune_inputs(family.model, family.batch([[(90, 80, 0)]]), Random(), Budget(5)).approximate


def test_an_unshrunk_grid_is_exact():
    family = NAMED["LLaVA-OneVision"]
    for rows in ([[(40, 60, 1)]], [[(90, 80, 0), (20, 30, 1)]]):  # 2 x 2 tiles; and two images, one tile each
        _, found = encoded(family, rows)
        tokens = found.tokens
        assert not found.approximate
        with torch.no_grad():
            want = projected(family, tokens.features).flatten(0, 1)
        for slots, packed in zip(tokens.slots, found.packed, strict=True):
            slots = slots[: len(packed)]
            torch.testing.assert_close(packed[slots >= 0], want[slots[slots >= 0]])
            newline = family.model.base_model.image_newline
            torch.testing.assert_close(packed[slots == NEWLINE], newline.expand_as(packed[slots == NEWLINE]))
        assert torch.bincount(tokens.image).tolist() == ([5] if len(rows[0]) == 1 else [1, 1])


def test_videos_where_a_family_takes_none_are_refused_by_name():
    for name in ("Qwen2.5-VL", "LLaVA-OneVision", "LLaVA-1.5 (CLIP)"):
        family = NAMED[name]
        inputs = family.batch([[]]) | {"pixel_values_videos": torch.zeros(1, 2, 3, 32, 32)}
        refused = pytest.raises(ValueError, match="pixel_values_videos: no tokens are selected in videos")
        with select_tokens(family.model, Random(), keep=4), refused:
            family.model(**inputs)
    video, image = NAMED["LLaVA-NeXT-Video (videos)"], NAMED["LLaVA-NeXT-Video (images)"]
    both = video.batch([[video.picture(0)]]) | image.pixels([[image.picture(0)]])
    with pytest.raises(ValueError, match="pixel_values and pixel_values_videos must not be in one batch"):
        encode(video.model, both)


def test_frames_are_tiles():
    family = NAMED["LLaVA-NeXT-Video (videos)"]
    _, found = encoded(family, [[family.picture(0)], [family.picture(1)]])
    assert found.tokens.image.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.tokens.grid == (2, 2)
    pruned = prune_inputs(
        family.model, family.batch([[family.picture(0)]]), Random(), Budget(6, scope="tile"), encoded=None
    )
    assert pruned.tokens.tiles_of(pruned.keep).sum(1).tolist() == [2, 2, 2]


def test_deepstack_features_are_cut_and_merged_as_their_tokens():
    family = NAMED["Qwen3-VL"]
    model, inputs = family.model, family.batch([[family.picture(0), family.picture(1)]])
    selector = load_selector("norm:merge=nearest")
    with torch.no_grad():
        found = encode(model, inputs, selector.needs)
        pruned = prune_inputs(model, inputs, selector, Budget(5), encoded=found)
        flow = selector.select(found.tokens, Budget(5)).flow
    sent = pruned.inputs["mm_encoder_outputs"]["image"].deepstack_features
    assert len(sent) == len(found.deepstack) == 2
    for layer, whole in zip(sent, found.deepstack, strict=True):
        for own, merged, plain, keep in zip(layer, flow.apply(whole), whole, pruned.keep, strict=True):
            assert torch.equal(own, merged[keep[: len(merged)]])
            assert not torch.equal(own, plain[keep[: len(plain)]])


def test_layouts_by_hand():
    canvas = Canvas.of([(1, 2), (2, 1)], torch.device("cpu"))
    assert canvas.grid == (2, 2)
    assert canvas.slots.tolist() == [[0, 1], [4, 6]]
    spread = canvas.spread([torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])])
    assert spread.flatten().tolist() == [1, 2, 0, 0, 3, 0, 4, 0]
    tiles = Tiles.base_last([3, 1], 2, torch.device("cpu"))
    assert tiles.order.tolist() == [2, 0, 1, 3]
    assert tiles.slots.tolist() == [[2, 3, 4, 5, 0, 1], [6, 7, -2, -2, -2, -2]]
    runs = Runs.of(torch.tensor([[IMAGE, IMAGE, 5, IMAGE], [START, IMAGE, END, 5]]), IMAGE)
    assert runs.length.tolist() == [2, 1, 1]
    assert runs.row.tolist() == [0, 0, 1]
    assert runs.before.tolist() == [-1, 5, START]


@pytest.fixture
def fresh_registry(monkeypatch):
    monkeypatch.setattr("selector.models._REGISTERED", {})


def test_adapters_can_be_registered(fresh_registry, monkeypatch):
    family = NAMED["LLaVA-1.5 (CLIP)"]
    model, inputs = copy.deepcopy(family.model), family.batch([[family.picture(0)]])
    monkeypatch.setattr(type(model.config), "model_type", "my_llava")
    with pytest.raises(ValueError, match="no adapter for models of type 'my_llava'; there is one for gemma3, "):
        encode(model, inputs)
    register_adapter("my_llava", llava.ADAPTER)
    assert "my_llava" in available_adapters()
    assert prune_inputs(model, inputs, Random(), Budget(4)).measured == [4]
    with pytest.raises(ValueError, match="model_type must be new, 'llava' has its adapter in"):
        register_adapter("llava", llava.ADAPTER)
    with pytest.raises(TypeError, match="adapter"):
        register_adapter("other", llava.encode)


def test_adapters_come_from_entry_points_too(fresh_registry, monkeypatch):
    class Point:
        name, value = "their_llava", "package:ADAPTER"

        def load(self):
            return self.adapter

    def points(group, name=Point.name):
        return [point] if group == "visual_token_selector.adapters" and name == Point.name else []

    point = Point()
    point.adapter = Adapter(llava.encode)
    monkeypatch.setattr("selector.models.entry_points", points)
    model = type("Model", (), {"config": type("Config", (), {"model_type": "their_llava"})()})()
    assert adapter_of(model) is point.adapter
    assert "their_llava" in available_adapters()
    point.adapter = "no adapter"
    with pytest.raises(TypeError, match=r"entry point package:ADAPTER .* must be an Adapter"):
        adapter_of(model)
