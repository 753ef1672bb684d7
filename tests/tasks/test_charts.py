"""Charts: deterministic, held-out values and layouts, boxes on what they claim, answers that the pixels bear out."""

from __future__ import annotations

from collections import Counter
from functools import cache
from random import Random

import numpy as np
import pytest
from PIL import Image

from selector.tasks.generated import chart_layout, charts
from selector.tasks.generated.drawing import COLOURS
from selector.tasks.sample import Box, Draft

PATCH = 8


@cache
def drafts(split: str) -> list[Draft]:
    return [charts.draft(Random(f"{split} {index}"), split=split) for index in range(150)]


def parts(draft: Draft) -> tuple[charts.Layout, tuple[charts.Category, ...]]:
    _, made, shown = draft.draw.args  # pyright: ignore[reportFunctionMemberAccess]
    return made, shown


def nearest(image: Image.Image) -> np.ndarray:
    """Index into `COLOURS` of every pixel, -1 where none of them is near or the paper is nearer."""
    pixels = np.asarray(image).astype(float)
    paper = np.median(pixels[0], axis=0)
    distance = np.linalg.norm(pixels[:, :, None] - np.array([*COLOURS.values(), paper]), axis=-1)
    found = distance.argmin(-1)
    return np.where((distance.min(-1) < 70) & (found < len(COLOURS)), found, -1)


def cut(grid: np.ndarray, box: Box) -> np.ndarray:
    x0, y0, x1, y1 = (round(v) for v in box)
    return grid[y0:y1, x0:x1]


def centres_inside(box: Box) -> int:
    """How many patch centres of the page lie inside the box."""
    across, down = (sum(low < PATCH * k + PATCH / 2 < high for k in range(24)) for low, high in (box[::2], box[1::2]))
    return across * down


def test_pages_are_deterministic():
    first, second = charts.page("test", 3, 5), charts.page("test", 3, 5)
    assert (first.turns, first.marks) == (second.turns, second.marks)
    assert first.image.tobytes() == second.image.tobytes()
    assert first.image.tobytes() != charts.page("train", 3, 5).image.tobytes()
    draft = drafts("test")[0]
    assert draft.draw().tobytes() == draft.draw().tobytes()


def test_train_and_test_share_no_value_and_no_layout():
    seen = {}
    for split in ("train", "test"):
        found = [parts(draft) for draft in drafts(split)]
        seen[split] = {one.value for _, shown in found for one in shown}, {made for made, _ in found}
    for train, test in zip(*seen.values(), strict=True):
        assert not train & test
    assert len(seen["train"][0]) > 250
    assert len(seen["test"][0]) > 80
    assert {made.kind for made in seen["test"][1]} == set(chart_layout.KINDS)


def test_boxes_lie_inside_and_no_two_glyphs_share_a_patch():
    for draft in drafts("train") + drafts("test"):
        boxes = [box for turn in draft.turns for box in turn.boxes] + [box for _, box in draft.marks]
        for x0, y0, x1, y1 in boxes:
            assert 0 <= x0 < x1 <= draft.size[0]
            assert 0 <= y0 < y1 <= draft.size[1]
        glyphs = Counter(
            ((a + c) // 2 // PATCH, (b + d) // 2 // PATCH) for n, (a, b, c, d) in draft.marks if len(n) == 1
        )
        assert set(glyphs.values()) == {1}
        assert all(centres_inside(box) >= 1 for name, box in draft.marks if name.endswith("bar"))


def test_a_bar_stands_right_above_or_behind_its_name():
    for draft in drafts("train"):
        made, shown = parts(draft)
        for one, (column, row) in zip(shown, made.names, strict=True):
            neighbour = {"columns": (column + 2, row - 1), "bars": (column + 3, row), "pie": (column - 2, row)}
            if made.kind in neighbour:
                x, y = (PATCH * k + PATCH / 2 for k in neighbour[made.kind])
                ((x0, y0, x1, y1),) = one.swatch or one.areas
                assert x0 < x < x1
                assert y0 < y < y1
            if made.kind in ("columns", "line"):
                assert one.value_at == (one.name_at[0], one.name_at[1] + 2 * PATCH)


def test_everything_is_read_in_the_order_of_the_page():
    for draft in drafts("train"):
        prompt, told = draft.everything
        assert prompt == "read the page."
        middles = [((b + d) / 2, a, n) for n, (a, b, _, d) in draft.marks if n.isupper()]
        assert "".join(n for *_, n in sorted(middles)) == "".join(c for c in told if c.isupper())


@pytest.mark.slow
def test_boxes_show_what_they_claim():
    names = list(COLOURS)
    for draft in drafts("test"):
        image = draft.draw()
        grey, hues = np.asarray(image.convert("L")).astype(int), nearest(image)
        painted: dict[str, list[np.ndarray]] = {}
        for name, box in draft.marks:
            if len(name) == 1:
                assert np.ptp(cut(grey, box)) > 50
            else:
                painted.setdefault(name.removesuffix(" bar"), []).append(cut(hues, box).ravel())
        for colour, pixels in painted.items():
            assert (np.concatenate(pixels) == names.index(colour)).mean() > 0.5  # the rest are outlines


def test_the_answer_stands_in_its_boxes():
    for draft in drafts("test"):
        _, shown = parts(draft)
        pairs = {one.name: one for one in shown}
        for turn in draft.turns:
            inside = "".join(
                n
                for n, (a, b, c, d) in draft.marks
                if len(n) == 1 and any(x0 < (a + c) / 2 < x1 and y0 < (b + d) / 2 < y1 for x0, y0, x1, y1 in turn.boxes)
            )
            subject = turn.question.removesuffix("?").split()[-1]
            kind = charts.kind_of(turn.question)
            if kind == "value":
                assert inside == turn.answer.replace(" ", "")
                assert turn.answer == f"{subject} {pairs[subject].value}"
            elif kind == "color":
                assert inside == subject
                assert turn.answer == f"{subject} {pairs[subject].colour}"
                assert sum(one.colour == pairs[subject].colour for one in shown) == 1
            else:
                told, named = turn.answer.split(": ")
                assert told == charts.transcript(shown)
                assert named in pairs
                assert sorted(inside) == sorted(told.replace(", ", "").replace(" ", ""))


def extent(made: charts.Layout, shown: tuple[charts.Category, ...], hues: np.ndarray) -> list[float]:
    """How large each category is, in pixels that have its colour: a bar's length, a marker's height, a slice's area."""
    found = []
    for one in shown:
        same = hues == list(COLOURS).index(one.colour)
        ((x0, y0, x1, y1), *_) = (tuple(max(0, round(v)) for v in box) for box in one.areas)
        if made.kind == "pie":
            a, b, c, d = made.plot
            found.append(same[b:d, a:c].sum())
        elif made.kind == "bars":
            found.append((same[y0:y1, made.plot[0] :].mean(0) > 0.5).sum())
        elif made.kind == "columns":
            found.append((same[: made.plot[3], x0:x1].mean(1) > 0.5).sum())
        else:
            found.append(made.plot[3] - np.flatnonzero(same[: made.plot[3], x0:x1].mean(1) > 0.5).mean())
    return found


@pytest.mark.slow
def test_the_largest_really_is_the_largest():
    for draft in drafts("test"):
        made, shown = parts(draft)
        sizes = extent(made, shown, nearest(draft.draw()))
        answers = {turn.question: turn.answer.split(": ")[-1] for turn in draft.turns}
        assert shown[int(np.argmax(sizes))].name == answers["which is largest?"]
        assert max(shown, key=lambda one: one.value).name == answers["which is largest?"]
        # as long as the value says
        shares, claimed = np.array(sizes) / sum(sizes), np.array([one.value for one in shown])
        np.testing.assert_allclose(shares, claimed / claimed.sum(), atol=0.06)


@pytest.mark.slow
def test_held_out_questions_are_mixed_and_hard_to_guess():
    kinds, answers = Counter(), {kind: Counter() for kind in charts.QUESTIONS}
    for sample in charts.samples(240, 9):
        assert sample.question is not None
        kind = charts.kind_of(sample.question)
        kinds[kind] += 1
        answers[kind][sample.answer] += 1
    assert min(kinds.values()) > 0.2 * 240
    assert max(kinds.values()) < 0.45 * 240
    assert sum(max(counter.values()) for counter in answers.values()) < 0.2 * 240


def test_samples_are_questions_of_held_out_pages():
    for index, sample in enumerate(charts.samples(6, 4)):
        page = charts.page("test", 4, index)
        assert (sample.question, sample.answer, sample.boxes) in [(t.question, t.answer, t.boxes) for t in page.turns]
        assert sample.image.tobytes() == page.image.tobytes()


@pytest.mark.parametrize("size", list(charts.SIZES))
def test_size_and_count_are_kept(size):
    for count in range(2, 6):
        draft = charts.draft(Random(count), size, (count, count))
        assert draft.size == draft.draw().size == size
        assert len(parts(draft)[1]) == count


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="split must be"):
        charts.page("valid", 0, 0)
    with pytest.raises(ValueError, match="count must be"):
        charts.draft(Random(0), (192, 192), (7, 7))
    with pytest.raises(ValueError, match="count must be"):
        charts.draft(Random(0), (192, 192), (1, 1))
