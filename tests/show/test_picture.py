"""The drawing: kept patches are clear where they lie, everything else is veiled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from selector import SVDPrune, TokenSelector
from selector.measure.evidence import Canvas, canvas_of
from selector.show.gallery import kept_picture
from selector.show.picture import MARGIN, MARK, PANEL, Panel, draw, painted, stack

TOP = 34


def panel_of(kept, boxes=(), size=(64, 64), **more):
    image = Image.new("RGB", size, (250, 240, 10))
    canvas = canvas_of((size[1], size[0]), [[64, 64], [32, 64], [64, 32]], 32, (4, 4))
    return np.asarray(draw(image, canvas, [Panel("name", ("12 of 88 tokens",), kept, **more)], boxes))


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
    assert seen[:, xs.min() + 1 :].sum() == (xs.max() - xs.min()) * (ys.max() + 1)  # the border of the tile is dashed


@pytest.mark.parametrize("colour", [(18, 24, 60), (60, 70, 90), (128, 128, 128), (250, 240, 10), (255, 255, 255)])
def test_what_is_kept_and_what_is_dropped_look_different_on_any_page(colour):
    kept = torch.zeros(5, 16, dtype=torch.bool)
    kept[1] = True  # the upper left tile
    canvas = canvas_of((64, 64), [[64, 64]], 32, (4, 4))
    pixels = np.asarray(draw(Image.new("RGB", (64, 64), colour), canvas, [Panel("name", (), kept)])).astype(float)
    half = PANEL // 2
    here, there = pixels[TOP + half // 2, MARGIN + half // 2], pixels[TOP + 3 * half // 2, MARGIN + 3 * half // 2]
    assert here.tolist() == list(colour)
    assert abs(here.mean() - there.mean()) > 45


def test_a_single_view_has_no_base_view_below():
    canvas = Canvas((4, 4), (0, 0, 4, 4), (64, 64), (1, 1), (4, 4), base=False)
    kept = torch.zeros(1, 16, dtype=torch.bool)
    kept[0, 1] = True
    image = Image.new("RGB", (64, 64), (250, 240, 10))
    main, base = painted(image, canvas, Panel("", (), kept))
    assert base is None
    assert main.getpixel((PANEL * 3 // 8, PANEL // 8)) == (250, 240, 10)
    assert main.getpixel((PANEL // 8, PANEL // 8)) != (250, 240, 10)

    # Of the panel below the picture, only the words are left.
    below = np.asarray(draw(image, canvas, [Panel("name", (), kept)]))[TOP + PANEL :]
    assert (below == 255).all()


def test_everything_and_nothing():
    seen = clear(panel_of(torch.ones(5, 16, dtype=torch.bool)))
    middle = PANEL // 2  # borders of tiles are dashed
    assert np.delete(np.delete(seen, middle, 0), middle, 1).all()
    assert not seen[middle].all()
    assert not seen[:, middle].all()
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


def test_a_large_image_is_resized_once_for_all_panels(monkeypatch):
    resized = []
    resize = Image.Image.resize

    def counted(image, *args, **more):
        resized.append(image.size)
        return resize(image, *args, **more)

    monkeypatch.setattr(Image.Image, "resize", counted)
    panels = [Panel("name", (), torch.ones(5, 16, dtype=torch.bool))] * 6
    canvas = canvas_of((900, 900), [[64, 64]], 32, (4, 4))
    assert draw(Image.new("RGB", (900, 900)), canvas, panels).width == 6 * (PANEL + 2 * MARGIN)
    assert resized == [(900, 900)] * 2  # the panels' image and the base view


def test_stack_is_as_wide_as_the_widest():
    page = stack([Image.new("RGB", (30, 10)), Image.new("RGB", (50, 20))], heading="title")
    assert page.size == (50, 34 + 30)
    assert stack([Image.new("RGB", (30, 10))]).size == (30, 10)


def test_padding_is_hatched_and_the_image_lies_inside_it():
    """60 x 20 pixels on a canvas of 64 x 32: the processor makes it 64 x 22, five rows of padding on both sides."""
    pixels = panel_of(torch.ones(3, 16, dtype=torch.bool), size=(60, 20))
    seen = clear(pixels)[: PANEL // 2]
    rows = np.flatnonzero(seen[:, 10])
    assert abs(rows[0] / (PANEL / 64) - (32 - 22) // 2) <= 0.2
    assert len(rows) / (PANEL / 64) == pytest.approx(22, abs=0.2)
    above = pixels[TOP : TOP + rows[0] - 1, MARGIN : MARGIN + PANEL // 2 - 1]  # left of the border of the tiles
    assert set(np.unique(above)) == {205, 244}


def test_patches_that_unpadding_took_are_crossed_out():
    everything = torch.ones(5, 16, dtype=torch.bool)
    valid = everything.clone()
    valid[1, 0] = False
    crossed = ~clear(panel_of(everything, valid=valid))
    corner = round(8 * PANEL / 64) - 1
    assert 0.15 < crossed[:corner, :corner].mean() < 0.4
    assert not crossed[corner + 2 : 2 * corner, :corner].any()


def test_scores_are_a_heat_map_of_ranks():
    """The brightest patch is the best one, however far ahead the best is."""
    scores = torch.arange(80.0).view(5, 16)
    scores[4, 15] = 1e9
    kept = torch.ones(5, 16, dtype=torch.bool)
    pixels = panel_of(kept, scores=scores)[TOP : TOP + PANEL, MARGIN : MARGIN + PANEL].astype(int).sum(-1)
    cell = PANEL // 8
    cells = pixels[: 8 * cell, : 8 * cell].reshape(8, cell, 8, cell)[:, 5:-5, :, 5:-5].mean((1, 3))
    assert cells.argmax() == 63  # lower right: the last patch of the last tile
    assert cells.argmin() == 0
    assert cells[7, 7] - cells[7, 6] < 30


def test_picture_of_any_image_under_any_selector(tiny_model, make_image):
    model, processor = tiny_model()

    class Chooses(TokenSelector):
        needs = frozenset()

        def forward(self, tokens, budget):
            return budget.select(torch.zeros(tokens.features.shape[:2]), tokens)

    selectors = {"svd": SVDPrune(rank=2), "chooses": Chooses()}
    one = kept_picture(model, processor, make_image(50, 97), selectors, keep=9)
    assert one.mode == "RGB"
    assert one.width == 3 * (PANEL + 2 * MARGIN)
    two = kept_picture(model, processor, make_image(50, 97).convert("L"), selectors, keep=0.5, scores=True)
    assert two.height == 2 * one.height
