"""Geometry of the LLaVA-NeXT adapter: the index map against the model's own packing, over random image sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


def test_cls_attention_is_that_of_the_feature_layer(tiny_model, make_image):
    """Oracle: the eager tower run by hand with every attention returned."""
    model, inputs, result = encoded(
        tiny_model, [make_image(64, 64, 1)], needs=("features", "cls_attention"), attention="eager"
    )
    with torch.no_grad():
        outputs = model.model.vision_tower(inputs["pixel_values"][0], output_attentions=True)
    want = outputs.attentions[-2][:, :, 0, 1:].mean(1)
    torch.testing.assert_close(result.tokens.cls_attention, want)


def test_what_the_model_cannot_give_is_named(tiny_model, make_image):
    image = [make_image(64, 64, 1)]
    with pytest.raises(ValueError, match="attn_implementation"):
        encoded(tiny_model, image, needs=("cls_attention",))
    with pytest.raises(ValueError, match="no CLS token"):
        encoded(tiny_model, image, needs=("cls_attention",), vision="siglip", attention="eager")
    with pytest.raises(ValueError, match="gives no keys, text"):
        encoded(tiny_model, image, needs=("text", "keys"))
