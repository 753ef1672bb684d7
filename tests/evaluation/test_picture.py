"""The drawing: kept patches are clear where they lie, everything else is veiled."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from selector.evaluation.evidence import patch_rectangles
from selector.evaluation.picture import MARGIN, MARK, PANEL, Panel, draw, stack

TOP = 34


def panel_of(kept, boxes=(), size=(64, 64)):
    image = Image.new("RGB", size, (250, 240, 10))
    rectangles = patch_rectangles((size[1], size[0]), [[64, 64], [32, 64], [64, 32]], 32, (4, 4))
    return np.asarray(draw(image, rectangles, [Panel("name", ("12 of 88 tokens",), kept)], boxes))


def clear(pixels):
    return (np.abs(pixels.astype(int) - [250, 240, 10]).sum(-1) < 6)[TOP : TOP + PANEL, MARGIN : MARGIN + PANEL]


def test_kept_patches_are_clear_where_they_lie():
    kept = torch.zeros(5, 16, dtype=torch.bool)
    kept[2, 0] = True  # upper right tile, its first patch: image pixels x 32..40, y 0..8
    seen = clear(panel_of(kept))
    scale = PANEL / 64
    ys, xs = np.nonzero(seen)
    assert abs(xs.min() - 32 * scale) <= 1
    assert abs(xs.max() + 1 - 40 * scale) <= 1
    assert ys.min() == 0
    assert abs(ys.max() + 1 - 8 * scale) <= 1
    assert seen.sum() == (xs.max() + 1 - xs.min()) * (ys.max() + 1)


def test_everything_and_nothing():
    assert clear(panel_of(torch.ones(5, 16, dtype=torch.bool))).all()
    assert not clear(panel_of(torch.zeros(5, 16, dtype=torch.bool))).any()


def test_the_base_view_is_drawn_apart():
    base_only = torch.zeros(5, 16, dtype=torch.bool)
    base_only[0] = True
    pixels = panel_of(base_only)
    assert not clear(pixels).any()
    below = (np.abs(pixels.astype(int) - [250, 240, 10]).sum(-1) < 6)[TOP + PANEL :]
    assert below.sum() == 96 * 96


def test_boxes_are_outlined():
    pixels = panel_of(torch.zeros(5, 16, dtype=torch.bool), boxes=[(16.0, 16.0, 32.0, 32.0)])
    assert (pixels == MARK).all(-1).sum() > 4 * 80


def test_stack_is_as_wide_as_the_widest():
    page = stack([Image.new("RGB", (30, 10)), Image.new("RGB", (50, 20))], heading="title")
    assert page.size == (50, 34 + 30)
    assert stack([Image.new("RGB", (30, 10))]).size == (30, 10)
