"""Patches on the image: the oracle is the model's own image processor, shown a picture of the box."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers.image_processing_utils import get_patch_output_size

from selector.measure.evidence import canvas_of, evidence, model_canvas

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
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        model_canvas(object(), (8, 8), (4, 4))
