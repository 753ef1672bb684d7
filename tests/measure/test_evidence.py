"""Patches on the image: the oracle is the model's own image processor, shown a picture of the box."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import FAMILIES, TEXT, TOWER
from PIL import Image, ImageDraw
from small_runs import found
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLImageProcessorPil,
)
from transformers.image_processing_utils import get_patch_output_size

from selector import Budget, Random
from selector.errors import UsageError
from selector.measure.evidence import canvas_of, evidence, model_canvas, unplaced
from selector.measure.protocol import Protocol
from selector.measure.run import compare
from selector.models import available_adapters, llava
from selector.report.summary import summarize, write_report
from selector.report.tables import notes

SIZES = [(64, 64), (50, 97), (97, 50), (200, 130), (33, 180), (400, 60)]


def rectangles_of(model, image):
    return model_canvas(model.config, (image.height, image.width), (4, 4)).rectangles()


@pytest.mark.parametrize("size", SIZES)
def test_patches_see_what_the_processor_shows_them(tiny_model, size):
    """White box on black: each patch's share of the light is its share of the box."""
    model, processor = tiny_model()
    height, width = size
    box = (0.22 * width, 0.3 * height, 0.81 * width, 0.66 * height)
    box = tuple(float(round(v)) for v in box)
    image = Image.new("RGB", (width, height))
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(255, 255, 255))
    pixels = processor.image_processor(image, return_tensors="pt", do_normalize=False)["pixel_values"][0]
    light = pixels.mean(1).unfold(1, 8, 8).unfold(2, 8, 8).sum((-2, -1)).flatten(1)  # [T, N]
    rectangles = rectangles_of(model, image)
    assert rectangles.shape[:2] == light.shape
    for tiles in (light[1:], light[:1]):
        tiles /= tiles.sum()
    for t in range(light.shape[0]):
        for n in range(light.shape[1]):
            kept = torch.zeros(light.shape, dtype=torch.bool)
            kept[t, n] = True
            tiles, base = evidence(kept, rectangles, [box])
            assert (base if t == 0 else tiles) == pytest.approx(light[t, n].item(), abs=0.03)


@pytest.mark.parametrize("size", SIZES)
def test_patches_cover_the_image_once(tiny_model, size):
    model, _ = tiny_model()
    rectangles = model_canvas(model.config, size, (4, 4)).rectangles()
    areas = (rectangles[..., 2] - rectangles[..., 0]) * (rectangles[..., 3] - rectangles[..., 1])
    assert (areas >= 0).all()
    assert areas[0].sum().item() == pytest.approx(size[0] * size[1])
    assert areas[1:].sum().item() == pytest.approx(size[0] * size[1])
    assert rectangles[..., 2].max() <= size[1]
    assert rectangles[..., 3].max() <= size[0]


def test_full_size_geometry():
    """336-px tiles, 14-px patches, a 672 x 672 image: one patch of the tiles is 14 x 14 pixels, of the base 28 x 28."""
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    rectangles = canvas_of((672, 672), pinpoints, 336, (24, 24)).rectangles()
    assert rectangles.shape == (5, 576, 4)
    assert rectangles[0, 25].tolist() == [28, 28, 56, 56]
    assert rectangles[2, 24].tolist() == [336, 14, 350, 28]  # second tile: upper right; patch 24: second row
    assert rectangles[3, 0].tolist() == [0, 336, 14, 350]


@pytest.mark.parametrize("canvas", [(64, 64), (32, 64), (64, 32), (96, 32)])
def test_the_image_is_resized_as_the_processor_does(canvas):
    """To the pixel: fractions of one are rounded up, in height as in width."""
    for height, width in [(50, 97), (97, 50), (31, 64), (64, 31), (200, 130), (7, 200), (200, 7), (33, 33)]:
        inner = canvas_of((height, width), [canvas], 32, (4, 4)).inner
        wanted = get_patch_output_size(np.zeros((height, width, 3)), canvas, input_data_format="channels_last")
        assert (inner[3], inner[2]) == wanted, (height, width)


def test_share_of_several_boxes():
    rectangles = canvas_of((64, 64), [[64, 64]], 32, (4, 4)).rectangles()
    kept = torch.zeros(5, 16, dtype=torch.bool)
    kept[1, 0] = True  # pixels 0..8, 0..8
    kept[0, :4] = True  # the upper quarter of the base view
    boxes = [(0.0, 0.0, 8.0, 8.0), (0.0, 32.0, 16.0, 44.0)]  # areas 64 and 192
    assert evidence(kept, rectangles, boxes) == pytest.approx((0.25, 0.25))
    half = [(4.0, 0.0, 12.0, 8.0)]
    assert evidence(kept, rectangles, half) == pytest.approx((0.5, 1.0))


def test_boxes_outside_and_empty_boxes():
    rectangles = canvas_of((64, 64), [[64, 64]], 32, (4, 4)).rectangles()
    everything = torch.ones(5, 16, dtype=torch.bool)
    assert evidence(everything, rectangles, [(-10.0, -10.0, 8.0, 8.0)]) == pytest.approx((1.0, 1.0))
    assert evidence(everything, rectangles, [(70.0, 70.0, 90.0, 90.0)]) is None
    assert evidence(everything, rectangles, [(5.0, 5.0, 5.0, 9.0)]) is None
    assert evidence(everything, rectangles, []) is None


def test_wrong_shape_and_wrong_model():
    rectangles = canvas_of((64, 64), [[64, 64]], 32, (4, 4)).rectangles()
    with pytest.raises(ValueError, match=r"kept is \(2, 16\)"):
        evidence(torch.ones(2, 16, dtype=torch.bool), rectangles, [])
    with pytest.raises(ValueError, match="the adapter of 'object' models does not say"):
        model_canvas(object(), (8, 8), (4, 4))


@pytest.mark.parametrize("size", [(40, 56), (96, 32), (33, 71), (64, 64)])
def test_a_single_view_is_the_whole_image(size):
    """Qwen2-VL's own processor as the oracle: pixels within a rectangle reach that patch's token, and no other."""
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)
    height, width = size
    blank = np.zeros((height, width, 3), np.uint8)

    def patches(array):
        given = processor(Image.fromarray(array), return_tensors="pt")
        return given["pixel_values"], [n // 2 for n in given["image_grid_thw"][0, 1:].tolist()]

    empty, grid = patches(blank)
    config = SimpleNamespace(model_type="qwen2_vl")
    canvas = model_canvas(config, size, tuple(grid), views=1)
    assert canvas.size == (grid[1], grid[0])  # of the shape of the picture
    places = canvas.rectangles()
    assert places.shape == (1, grid[0] * grid[1], 4)
    for index in (0, grid[1] - 1, grid[0] * grid[1] // 2, grid[0] * grid[1] - 1):
        x0, y0, x1, y1 = places[0, index].tolist()
        marked = blank.copy()
        marked[round((y0 + y1) / 2 - 0.5), round((x0 + x1) / 2 - 0.5)] = 255
        change = (patches(marked)[0] - empty).abs().sum(1)
        assert int(change.argmax()) // 4 == index  # four patches make a token

    # All of the image is covered once, and a share of one view has no base view beside it.
    everything = torch.ones(1, len(places[0]), dtype=torch.bool)
    assert evidence(everything, places, [(0.0, 0.0, float(width), float(height))]) == (pytest.approx(1), None)
    first = torch.arange(len(places[0]))[None] == 0
    assert evidence(first, places, [(0.0, 0.0, float(width), float(height))])[0] == pytest.approx(1 / len(places[0]))


def test_families_whose_patches_have_a_known_place():
    known = {name for name in available_adapters() if unplaced(SimpleNamespace(model_type=name)) is None}
    assert known == {"gemma3", "mistral3", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"}
    pinpoints = {"llava_next", "llava_onevision", "llava_next_video"}  # by their configs, not by their names
    assert {family.kind for family in FAMILIES if hasattr(family.model.config, "image_grid_pinpoints")} <= pinpoints
    with pytest.raises(UsageError, match="made 3 of it"):
        model_canvas(SimpleNamespace(model_type="gemma3"), (8, 8), (4, 4), views=3)


@pytest.fixture
def flat_model(tiny_model):
    """A LLaVA-1.5 with its processor: one view per image, squeezed to 32 x 32 pixels, 4 x 4 patches."""
    tokenizer, template = tiny_model()[1].tokenizer, tiny_model()[1].chat_template
    side = {"height": 32, "width": 32}
    pixels = CLIPImageProcessorPil(size=side, do_center_crop=False)
    processor = LlavaProcessor(
        pixels, tokenizer, 8, "default", template, image_token="<image>", num_additional_image_tokens=1
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(projection_dim=16, **TOWER),
        text_config=LlamaConfig(**TEXT | {"vocab_size": len(tokenizer)}),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval(), processor


def compared(flat_model, task, folder):
    protocol = Protocol(answers=False)
    return found(list(compare(*flat_model, {"random": Random()}, [Budget(8)], [task], folder, protocol=protocol)))


def test_a_family_without_known_places_is_compared_without_evidence_and_says_so(flat_model, task, tmp_path):
    records = compared(flat_model, task, tmp_path)
    assert len(records) == 2 * 4
    assert all("kept" in record and "evidence" not in record for record in records.values())
    assert not (tmp_path / "images").exists()
    (line,) = [line for line in notes(summarize(tmp_path)) if line.startswith("No evidence")]
    assert "the adapter of 'llava' models does not say where in the image their patches lie" in line


def test_a_single_view_is_measured_and_drawn(flat_model, task, tmp_path, monkeypatch):
    monkeypatch.setattr(llava, "ADAPTER", dataclasses.replace(llava.ADAPTER, whole=True))
    records = compared(flat_model, task, tmp_path)
    assert {record["evidence"] for (label, *_), record in records.items() if label == "full"} == {1.0}
    shares = [record["evidence"] for (label, *_), record in records.items() if label == "random"]
    assert min(shares) < 1
    assert not any("base_evidence" in record for record in records.values())

    stored = [json.loads(path.read_text()) for path in sorted((tmp_path / "images").glob("*.json"))]
    assert [(each["base"], each["tiles"], len(each["xs"])) for each in stored] == 4 * [(False, [1, 1], 5)]
    assert "No evidence" not in "".join(notes(summarize(tmp_path)))
    write_report([tmp_path], tmp_path / "page.html")
    assert "evidence" in (tmp_path / "page.html").read_text()
