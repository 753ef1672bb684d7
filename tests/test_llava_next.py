"""Geometry of the LLaVA-NeXT adapter: the index map against the model's own packing, over random image sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selector import Budget, load_selector, prune_inputs
from selector.grid import places
from selector.methods.cdpruner import CDPruner
from selector.models import encode
from selector.tokens import NEWLINE, PAD


def encoded(tiny_model, images, needs=("features", "projected"), **kwargs):
    model, processor = tiny_model(**kwargs)
    text = ["<image>"] * len(images)
    inputs = processor(images=images, text=text, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model, inputs, encode(model, inputs, needs)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(height=st.integers(8, 400), width=st.integers(8, 400))
def test_packed_length_is_the_processors_count(tiny_model, make_image, height, width):
    _, inputs, result = encoded(tiny_model, [make_image(height, width)])
    assert int((inputs["input_ids"] == result.image_token_id).sum()) == int(result.tokens.lengths[0])


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_slots_point_at_the_token_that_landed_there(tiny_model, make_image, vision):
    model, _, result = encoded(tiny_model, [make_image(40, 90, 1), make_image(64, 61, 2)], vision=vision)
    tokens = result.tokens
    with torch.no_grad():
        projected = model.model.multi_modal_projector(tokens.features).flatten(0, 1)
    for slots, packed in zip(tokens.slots, result.packed, strict=True):
        slots = slots[: len(packed)]
        torch.testing.assert_close(packed[slots >= 0], projected[slots[slots >= 0]])
        newline = packed[slots == NEWLINE]
        torch.testing.assert_close(newline, model.model.image_newline.expand_as(newline))
    valid = tokens.valid
    torch.testing.assert_close(tokens.projected[valid], projected.view(*valid.shape, -1)[valid])
    assert not tokens.projected[~valid].any()
    assert tokens.lengths.tolist() == [len(p) for p in result.packed]


def test_rows_end_in_their_newline(tiny_model, make_image):
    _, _, result = encoded(tiny_model, [make_image(64, 64, 1), make_image(20, 90, 2)])
    slots, rows = result.tokens.slots, result.tokens.rows
    patches = result.tokens.features.shape[1]
    assert (rows[:, :patches] == -1).all()  # the base view has no newline
    for slot, row in zip(slots, rows, strict=True):
        for r in range(int(row.max()) + 1):
            members = slot[row == r]
            assert (members == NEWLINE).sum() == 1
            assert members[-1] == NEWLINE
        assert (row[slot == PAD] == -1).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cls_attention_is_that_of_the_feature_layer(tiny_model, make_image, attention):
    """Oracle: the eager tower run by hand with every attention returned; any implementation must agree with it."""
    model, inputs, result = encoded(
        tiny_model, [make_image(64, 64, 1)], needs=("features", "cls_attention"), attention=attention
    )
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = tower(inputs["pixel_values"][0], output_attentions=True)
    want = outputs.attentions[-2][:, :, 0, 1:].mean(1)
    torch.testing.assert_close(result.tokens.cls_attention, want)


@pytest.mark.parametrize(("layer", "made_by"), [(1, 0), (2, 1), (3, 2), (-1, 2), (-3, 0)])
def test_a_feature_layer_counted_from_the_front_is_that_of_the_attention_before_it(
    tiny_model, make_image, layer, made_by
):
    """`hidden_states` begins with the embeddings, so entry 1 is what attention 0 made."""
    model, processor = tiny_model()
    inputs = processor(images=[make_image(64, 64, 1)], text=["<image>"], return_tensors="pt")
    with torch.no_grad():
        tokens = encode(model, {**inputs, "vision_feature_layer": layer}, ("cls_attention", "keys")).tokens
        tower = copy.deepcopy(model.model.vision_tower)
        tower.set_attn_implementation("eager")
        outputs = tower(inputs["pixel_values"][0], output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(tokens.cls_attention, outputs.attentions[made_by][:, :, 0, 1:].mean(1))
    torch.testing.assert_close(tokens.features, outputs.hidden_states[layer][:, 1:])


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_received_attention_is_the_mean_over_heads_and_queries(tiny_model, make_image, vision):
    """Oracle: the eager tower with every attention returned. SigLIP has no CLS token, and needs none."""
    needs = ("received_attention", "received_attention@0", "received_attention@-1")
    model, inputs, result = encoded(tiny_model, [make_image(64, 64, 1)], needs=needs, vision=vision)
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = tower(inputs["pixel_values"][0], output_attentions=True).attentions
    first = 1 if vision == "clip" else 0
    want = [attention.mean((1, 2))[:, first:] for attention in attentions]
    torch.testing.assert_close(result.tokens.received_attention, want[-2])
    torch.testing.assert_close(result.tokens.layers["received_attention@0"], want[0])
    torch.testing.assert_close(result.tokens.layers["received_attention@-1"], want[-1])
    assert set(result.tokens.layers) == {"received_attention@0", "received_attention@-1"}


@pytest.mark.parametrize(
    "spec",
    [
        *("cls-attention", "prumerge", "prumerge-plus", "visionzip", "vispruner", "hired", "holov"),
        *("hiprune:layer=1", "cdpruner:relevance=received_attention"),
    ],
)
def test_a_tower_without_cls_serves_selectors_of_received_attention(tiny_model, make_image, spec):
    model, processor = tiny_model(vision="siglip")
    inputs = processor(images=[make_image(64, 64, 1)], text=["<image>"], return_tensors="pt")
    if ":" not in spec:
        with torch.no_grad(), pytest.raises(ValueError, match=r"no CLS token.* take attention=received"):
            prune_inputs(model, inputs, load_selector(spec), Budget(6))
        spec += ":attention=received"
    with torch.no_grad():
        assert prune_inputs(model, inputs, load_selector(spec), Budget(6)).measured == [6]


def test_joint_heads_are_one_head_of_the_whole_width(tiny_model, make_image):
    """Oracle: the last layer's own projections, as one softmax over the whole width."""
    needs = ("joint_cls_attention@-1", "joint_received_attention@-1", "joint_keys@-1", "cls_attention@0")
    model, inputs, result = encoded(tiny_model, [make_image(64, 64, 1)], needs=needs)
    tower = model.model.vision_tower
    with torch.no_grad():
        hidden = tower(inputs["pixel_values"][0], output_hidden_states=True).hidden_states
        block = tower.get_submodule(next(n for n, _ in tower.named_modules() if n.endswith("encoder.layers")))[-1]
        seen = block.layer_norm1(hidden[-2])
        queries, keys = block.self_attn.q_proj(seen), block.self_attn.k_proj(seen)
    attention = (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(-1)
    got = result.tokens.layers
    torch.testing.assert_close(got["joint_cls_attention@-1"], attention[:, 0, 1:])
    torch.testing.assert_close(got["joint_received_attention@-1"], attention.mean(1)[:, 1:])
    torch.testing.assert_close(got["joint_keys@-1"], keys[:, 1:])
    assert not any(m._forward_hooks for n, m in model.named_modules() if n.endswith(("k_proj", "q_proj")))


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_keys_are_those_of_the_layer_that_made_the_features(tiny_model, make_image, vision):
    """Oracle: the layer's own projection of its normalised input, which is the hidden state before it."""
    model, inputs, result = encoded(tiny_model, [make_image(64, 64, 1)], needs=("keys",), vision=vision)
    tower = model.model.vision_tower
    with torch.no_grad():
        hidden = tower(inputs["pixel_values"][0], output_hidden_states=True).hidden_states
        block = tower.get_submodule(next(n for n, _ in tower.named_modules() if n.endswith("encoder.layers")))[-2]
        keys = block.self_attn.k_proj(block.layer_norm1(hidden[-3]))
    want = keys.unflatten(-1, (4, -1)).mean(2)[:, 1 if vision == "clip" else 0 :]
    torch.testing.assert_close(result.tokens.keys, want)
    assert not any(m._forward_hooks for n, m in model.named_modules() if n.endswith("k_proj"))


def test_relevance_to_the_prompt_comes_from_the_caller(tiny_model, make_image):
    model, processor = tiny_model()
    inputs = processor(images=[make_image(64, 64, 1)], text=["<image> red?"], return_tensors="pt")

    def relevance(tokens, prompt):
        assert prompt["input_ids"] is inputs["input_ids"]
        return tokens.features.mean(-1)

    with torch.no_grad():
        tokens = encode(model, inputs, ("text",), relevance).tokens
        pruned = prune_inputs(model, inputs, CDPruner(), Budget(7), relevance=relevance)
    assert torch.equal(tokens.text, tokens.features.mean(-1))
    assert pruned.measured == [7]
    with pytest.raises(ValueError, match="text: a 'llava_next' model has no text tower"):
        prune_inputs(model, inputs, CDPruner(), Budget(7))


def test_the_question_is_the_text_behind_each_image_without_what_is_to_be_predicted(tiny_model, make_image):
    model, processor = tiny_model()
    texts = ["USER: <image> red? yes", "USER: <image> how many? two"]
    images = [make_image(40, 90, 1), make_image(70, 30, 2)]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    ids = inputs["input_ids"]
    behind = [row[int((row == model.config.image_token_id).nonzero()[-1]) + 1 :] for row in ids]
    embed = model.get_input_embeddings()
    for answer in (0, 2):  # tokens at the end of each row that are to be predicted
        labels = torch.full_like(ids, -100)
        labels[:, ids.shape[1] - answer :] = ids[:, ids.shape[1] - answer :]
        with torch.no_grad():
            tokens = encode(model, {**inputs, "labels": labels}, ("question",)).tokens
            wanted = [embed(words[: len(words) - answer]) for words in behind]
        for i, words in enumerate(wanted):
            assert tokens.question_mask[i].tolist() == [j < len(words) for j in range(tokens.question.shape[1])]
            torch.testing.assert_close(tokens.question[i, : len(words)], words, rtol=0, atol=0)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(height=st.integers(20, 300), width=st.integers(20, 300))
def test_places_are_those_of_the_unpadded_grid(tiny_model, make_image, height, width):
    """Oracle: row-major order, which is that of the base view and of the tiles laid out and unpadded as one grid."""
    _, _, result = encoded(tiny_model, [make_image(height, width), make_image(64, 64)])
    tokens = result.tokens
    side, patches = tokens.grid[0], tokens.features.shape[1]
    view, y, x = places(tokens)
    for i, slots in enumerate(tokens.slots):
        if (tokens.image == i).sum() == 1:
            assert torch.equal(y[i][slots >= 0], torch.arange(patches) // side)
            continue
        assert torch.equal(y[i, :patches] * side + x[i, :patches], torch.arange(patches))  # the base view
        grid = (tokens.slots[i] >= 0) & (torch.arange(slots.shape[0]) >= patches)
        if not grid.any():  # so flat an image that unpadding leaves nothing of its tiles
            continue
        assert view[i][grid].unique().numel() == 1
        assert view[i, 0] != view[i][grid][0]
        rows = y[i][grid].max() + 1
        assert torch.equal(y[i][grid] * (grid.sum() // rows) + x[i][grid], torch.arange(int(grid.sum())))
    tiles = places(tokens, "tile")
    assert torch.equal(tiles.view[tokens.is_patch], tokens.slots[tokens.is_patch] // patches)


def test_what_the_model_cannot_give_is_named(tiny_model, make_image):
    image = [make_image(64, 64, 1)]
    with pytest.raises(ValueError, match="no CLS token"):
        encoded(tiny_model, image, needs=("cls_attention",), vision="siglip")
    with pytest.raises(ValueError, match=r"gives no depth to a selector; it gives .*NAME@L"):  # no word of CLS tokens
        encoded(tiny_model, image, needs=("depth", "keys"))
    for need in ("depth@1", "keys@x", "joint_keys", "text@1"):
        with pytest.raises(ValueError, match=f"gives no {need} to a selector"):
            encoded(tiny_model, image, needs=(need,))
    with pytest.raises(ValueError, match="received_attention@9: the vision tower has attention layers 0 to 2, got 9"):
        encoded(tiny_model, image, needs=("cls_attention", "received_attention@9"))
    tower = tiny_model()[0].model.vision_tower
    assert not any(module._forward_hooks for name, module in tower.named_modules() if name.endswith("_proj"))
    with pytest.raises(ValueError, match=r"gives no joint_cls_attention@-1 .*no CLS token.* take attention=received"):
        encoded(tiny_model, image, needs=("joint_cls_attention@-1",), vision="siglip")
    with pytest.raises(ValueError, match=r"text: .* pass relevance="):
        encoded(tiny_model, image, needs=("text",))
