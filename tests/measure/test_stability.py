"""Stability of masks: overlaps against sets, geometry against content that is a function of the place in the image."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from selector import Budget, Random, ScoreSelector, cli
from selector.commands.stability import markdown, measure, summarize
from selector.grid import places
from selector.measure.evidence import canvas_of
from selector.measure.stability import (
    Change,
    Overlap,
    changes,
    compressed,
    cropped,
    overlap,
    overlap_of,
    pairs,
    shifted,
)
from selector.tasks.sample import Sample

TILE, GRID = 32, (4, 4)
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def geometry(height: int, width: int):
    canvas = canvas_of((height, width), PINPOINTS, TILE, GRID)
    rectangles = canvas.rectangles()
    return canvas, rectangles, torch.ones(rectangles.shape[:2], dtype=torch.bool)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_overlap_against_sets(choices):
    ours, theirs = (torch.tensor(part) for part in zip(*choices, strict=True))
    a, b = ({i for i, kept in enumerate(mask.tolist()) if kept} for mask in (ours, theirs))
    found = overlap(ours, theirs)
    if not a | b:
        assert found is None
        return
    assert found == Overlap(len(a & b) / len(a | b), 2 * len(a & b) / (len(a) + len(b)))
    assert overlap(theirs, ours) == found


def test_overlap_of_other_places_is_an_error():
    with pytest.raises(ValueError, match=r"among the same places, got \(3,\) and \(2,\)"):
        overlap(torch.ones(3).bool(), torch.ones(2).bool())
    _, rectangles, _ = geometry(64, 64)
    with pytest.raises(ValueError, match="valid is"):
        pairs(rectangles, torch.ones(2, 16, dtype=torch.bool), Change("same", noise(64, 64)))


@pytest.mark.parametrize(("size", "step"), [((64, 64), (8, 8)), ((128, 128), (16, 16)), ((64, 32), (8, 8))])
def test_a_shift_moves_every_pixel_by_a_patch(size, step):
    image, (dy, dx) = noise(*size), step
    change = shifted(image, geometry(*size)[0])
    before, after = np.asarray(image), np.asarray(change.image)
    assert (change.offset, change.scale, change.image.size) == ((-dx, -dy), (1.0, 1.0), image.size)
    assert (after[dy:, dx:] == before[:-dy, :-dx]).all()
    assert (after[:dy, dx:] == before[:1, :-dx]).all()  # the edge, repeated
    assert (after[dy:, :dx] == before[:-dy, :1]).all()


def test_a_crop_shows_what_it_says_where_it_says():
    """On a gradient, the value of a pixel is its place."""
    x, y = np.meshgrid(np.arange(200) + 0.5, np.arange(120) + 0.5)
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).round().astype(np.uint8))
    change = cropped(image)
    assert change.image.size == image.size
    assert change.offset == (6, 4)
    seen = np.asarray(change.image).astype(float)[5:-5, 5:-5]
    place = np.stack([change.offset[i] + change.scale[i] * (x, y)[i] for i in (0, 1)], -1)[5:-5, 5:-5]
    assert np.abs(seen[..., :2] - place).max() <= 1.5
    assert np.abs(seen[..., :2] - np.stack([x, y], -1)[5:-5, 5:-5]).max() > 3  # it did move


def test_jpeg_changes_pixels_and_not_places():
    image = noise(64, 64)
    change = compressed(image)
    assert (change.offset, change.scale, change.image.size) == ((0.0, 0.0), (1.0, 1.0), image.size)
    assert np.abs(np.asarray(change.image).astype(int) - np.asarray(image)).max() > 10


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(20, 150),
    width=st.integers(20, 150),
    offset=st.tuples(st.floats(-20, 20), st.floats(-20, 20)),
    scale=st.tuples(st.floats(0.8, 1.2), st.floats(0.8, 1.2)),
    seed=st.integers(0, 9),
)
def test_pairs_are_nearest_centres_of_the_same_view(height, width, offset, scale, seed):
    """Patch by patch in plain Python; patches that are unpadded away or lie in the padding are nobody's partner."""
    canvas, rectangles, valid = geometry(height, width)
    valid &= torch.rand(valid.shape, generator=torch.Generator().manual_seed(seed)) > 0.2
    found = pairs(rectangles, valid, Change("any", noise(1, 1), offset, scale))
    partner = dict(zip(found.original.tolist(), found.changed.tolist(), strict=True))
    flat, n = rectangles.flatten(0, 1).tolist(), rectangles.shape[1]
    real = {i for i, (x0, y0, x1, y1) in enumerate(flat) if valid.flatten()[i] and x1 > x0 and y1 > y0}
    centre = {i: ((flat[i][0] + flat[i][2]) / 2, (flat[i][1] + flat[i][3]) / 2) for i in real}
    for i in range(len(flat)):
        there = i in real and tuple((centre[i][k] - offset[k]) / scale[k] for k in (0, 1))
        seen = there and 0 <= there[0] < canvas.image[0] and 0 <= there[1] < canvas.image[1]
        assert (i in partner) == bool(seen)
        if seen:
            distance = {j: math.dist(there, centre[j]) for j in real if (j < n) == (i < n)}
            assert partner[i] in distance
            assert distance[partner[i]] <= min(distance.values()) + 1e-9


def content(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What there is to see at a place of the original image: a disc, and noughts beyond."""
    return ((x - 30) ** 2 + (y - 34) ** 2 < 20**2).double()


def kept_by_content(rectangles: torch.Tensor, change: Change) -> torch.Tensor:
    """The choice of a selector that follows what it sees: patches of whose centre the content is 1."""
    centre = (rectangles[..., :2] + rectangles[..., 2:]) / 2
    seen = [change.offset[i] + change.scale[i] * centre[..., i] for i in (0, 1)]
    return content(*seen) > 0


def test_what_follows_the_content_is_stable_and_what_follows_the_place_is_not():
    """A canvas of the image's size: a shift is a whole patch of the tiles, so that tiles agree exactly."""
    image = noise(64, 64)
    canvas, rectangles, valid = geometry(64, 64)
    valid[0] = False  # tiles alone: in the base view a patch is 16 pixels wide
    same = Change("same", image)
    shift, jpeg, crop = changes(image, canvas)
    before = kept_by_content(rectangles, same)
    assert 10 < int(before[1:].sum()) < 40
    for change in (shift, jpeg):
        assert overlap_of(before, kept_by_content(rectangles, change), pairs(rectangles, valid, change)) == (1, 1)
    # Cropped by 3%, a place moves by less than half a patch: only patches at the rim of the disc may differ.
    paired = pairs(rectangles, valid, crop)
    after = kept_by_content(rectangles, crop)
    differ = (before.flatten()[paired.original] != after.flatten()[paired.changed]).nonzero()[:, 0]
    centre = ((rectangles[..., :2] + rectangles[..., 2:]) / 2).flatten(0, 1)[paired.original[differ]]
    rim = ((centre - torch.tensor([30.0, 34.0])).norm(dim=1) - 20).abs()
    assert bool((rim < 8).all())
    # Every second column of the tiles, whatever is there: one patch further it is always the other columns.
    columns = (torch.arange(16) % 2 == 0).expand(rectangles.shape[:2])
    assert overlap_of(columns, columns, pairs(rectangles, valid, shift)) == (0, 0)
    assert overlap_of(columns, columns, pairs(rectangles, valid, jpeg)) == (1, 1)


class Leftmost(ScoreSelector):
    """Columns from the left, whatever the image."""

    needs = frozenset()

    def score(self, tokens):
        return tokens.unpacked(-places(tokens).x.float())


def scenes(make_image, count: int) -> list[Sample]:
    return [Sample(f"s{i}", make_image(50 + 3 * i, 90 - i, i), "what?", None, ()) for i in range(count)]


@pytest.fixture
def rows(tiny_model, make_image):
    model, processor = tiny_model()
    budget = Budget(0.5, newlines="none")
    selectors = {"random": Random(seed=7), "leftmost": Leftmost()}
    seeds = {f"seed {i}": Random(seed=20 + i) for i in range(3)}
    found = measure(model, processor, selectors, seeds, [budget], scenes(make_image, 16))
    return {(row["selector"], row["change"]): row for row in summarize(found)}


@pytest.mark.slow
def test_measured_with_a_model(rows):
    """What does not look at the image is the same after JPEG; independent choices are at the level of chance."""
    assert set(rows) == {(s, c) for s in ("random", "leftmost") for c in ("shift 1 patch", "JPEG 50", "crop 3%")} | {
        ("seed 0, seed 1, seed 2", "other seed")
    }
    assert (rows["leftmost", "JPEG 50"]["jaccard"], rows["leftmost", "JPEG 50"]["common"]) == (1, 1)
    assert rows["leftmost", "crop 3%"]["common"] > 0.9
    # Half of all tokens, newlines counted and none kept: a little more than half of the patches.
    for row in rows.values():
        assert row["images"] == row["chance_images"] == 16
        assert row["chance_common"] == pytest.approx(0.55, abs=0.07)
        assert row["chance_jaccard"] == pytest.approx(0.55 / 1.45, abs=0.07)
        low, high = row["common_interval"]
        assert low <= row["common"] <= high
    seeds = rows["seed 0, seed 1, seed 2", "other seed"]
    assert seeds["common"] == pytest.approx(0.55, abs=0.05)


def test_an_overlap_that_is_not_there_is_not_counted():
    found = {
        ("a", "1", "shift"): [(None, Overlap(0.5, 0.6)), (Overlap(0.2, 0.4), None)],
        ("b", "1", "x"): [(None, None)],
    }
    one, none = summarize(found)
    assert (one["images"], one["jaccard"], one["common"], one["chance_jaccard"]) == (1, 0.2, 0.4, 0.5)
    assert (none["images"], none["jaccard"], none["jaccard_interval"]) == (0, None, None)
    text = markdown({"model": "m", "rows": [{"task": "t"} | row for row in (one, none)]})
    assert "| a | 1 | shift | 1 | 0.20 [0.20, 0.20] | 0.50 | 0.40 [0.40, 0.40] | 0.60 |" in text
    assert "| b | 1 | x | 0 | – | – | – | – |" in text


@pytest.fixture
def call(capsys, monkeypatch, tmp_path, tiny_model):
    monkeypatch.chdir(tmp_path)
    model, processor = tiny_model()
    model.save_pretrained("tiny")
    processor.save_pretrained("tiny")
    capsys.readouterr()

    def run(*arguments):
        code = cli.main(["stability", "--model", "./tiny", "--tasks", "scenes", "--samples", "2", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_command(call):
    code, out, _ = call(
        *("--selectors", "norm", "svd-prune:rank=2", "--seeds", "random:seed=1", "random:seed=2"),
        *("--keep", "0.25", "9", "--out", "deep/s.json"),
    )
    assert code == 0
    figures = json.loads(Path("deep/s.json").read_text())
    assert len(figures["rows"]) == 2 * 2 * 3 + 2
    assert set(figures["selectors"]) == {"norm", "svd-prune:rank=2", "random:seed=1", "random:seed=2"}
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(figures["rows"])
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "norm"], "seeds must name at least two selectors of one class, got norm: Norm"),
        (["--seeds", "norm", "random"], "of one class, got norm, random: Norm, Random"),
        (["--out", "figures.md"], "out must be the name of a JSON file, got 'figures.md'"),
        (["--keep", "auto:0.5"], "random: keep='auto:0.5' needs a calibrated selector"),
        (["--keep", "1", "--newlines", "all"], "'scenes-0-0': random at keep=1 newlines=all: .* leaves no patch"),
        (["--samples", "all"], "samples must be a number for the task 'scenes'"),
    ],
)
def test_mistakes(call, arguments, message):
    code, out, err = call("--selectors", "random", *arguments)
    assert code == 2
    assert out == ""
    assert err.splitlines()[-1].startswith("selector stability: error: ")
    assert re.search(message, err), err
