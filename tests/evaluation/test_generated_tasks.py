"""The generated tasks: deterministic, held-out streams apart, evidence boxes where the answer stands, no easy
blind guess."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest

from selector.evaluation.tasks import documents, scenes

TASKS = {"documents": documents, "scenes": scenes}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_pages_are_deterministic(task):
    first, second = task.page("test", 3, 5), task.page("test", 3, 5)
    assert first.turns == second.turns
    assert first.marks == second.marks
    np.testing.assert_array_equal(np.asarray(first.image), np.asarray(second.image))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_splits_and_seeds_do_not_share_pages(task):
    streams = [("train", 0), ("test", 0), ("test", 1)]
    pages = [task.page(split, seed, i).image.tobytes() for split, seed in streams for i in range(20)]
    assert len(set(pages)) == 60


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_unknown_split_is_refused(task):
    with pytest.raises(ValueError, match="split must be"):
        task.page("valid", 0, 0)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_boxes_lie_inside_the_image(task):
    for index in range(60):
        page = task.page("train", 1, index)
        assert page.image.size in task.SIZES
        for x0, y0, x1, y1 in [box for turn in page.turns for box in turn.boxes] + [box for _, box in page.marks]:
            assert 0 <= x0 < x1 <= page.image.width
            assert 0 <= y0 < y1 <= page.image.height


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_samples_are_questions_of_held_out_pages(task):
    found = list(task.samples(25, 4))
    assert len({sample.id for sample in found}) == 25
    for index, sample in enumerate(found):
        page = task.page("test", 4, index)
        assert (sample.question, sample.answer, sample.boxes) in [(t.question, t.answer, t.boxes) for t in page.turns]
        assert sample.image.tobytes() == page.image.tobytes()
    assert [sample.id for sample in task.samples(3, 4)] == [sample.id for sample in found[:3]]


def test_the_answer_stands_in_its_box():
    for index in range(40):
        page = documents.page("train", 2, index)
        for turn in page.turns:
            ((x0, y0, x1, y1),) = turn.boxes
            inside = [c for c, (a, b, c1, d) in page.marks if x0 <= (a + c1) / 2 <= x1 and y0 <= (b + d) / 2 <= y1]
            assert "".join(inside) == turn.answer


def test_ink_lies_in_the_marked_cells():
    size = (192, 96)
    lines = documents.layout(Random(0), size, 4)
    page = np.asarray(documents.draw_page(Random(8), size, lines)).astype(int)
    for line in lines:
        x0, y0, x1, y1 = (round(v) for v in line.value_box)
        assert np.ptp(page[y0:y1, x0:x1]) > 60


def test_scene_answers_follow_from_the_objects():
    for index in range(60):
        page = scenes.page("train", 3, index)
        labels = [name.split() for name, _ in page.marks]
        for turn in page.turns:
            words = turn.question.removesuffix("?").split()
            if words[0] == "how":
                name = "cross" if words[2] == "crosses" else words[2].removesuffix("s")
                assert turn.answer == str(sum(shape == name for _, shape in labels))
                assert len(turn.boxes) == int(turn.answer)
            elif words[:2] == ["what", "color"]:
                assert [colour for colour, shape in labels if shape == words[-1]] == [turn.answer]
            elif words[:2] == ["what", "shape"]:
                assert [shape for colour, shape in labels if colour == words[-2]] == [turn.answer]
            else:
                present = any(colour == words[3] for colour, _ in labels)
                assert turn.answer == ("yes" if present else "no")
                assert bool(turn.boxes) == present


def test_objects_do_not_cross_tiles():
    for index in range(30):
        for _, (x0, y0, x1, y1) in scenes.page("train", 4, index).marks:
            assert x0 // 96 == (x1 - 1) // 96
            assert y0 // 96 == (y1 - 1) // 96


def test_the_best_blind_guess_is_poor():
    for task, limit in ((documents, 0.1), (scenes, 0.42)):
        answers: dict[str, Counter] = {}
        for sample in task.samples(400, 9):
            answers.setdefault(sample.question.split()[1], Counter())[sample.answer] += 1
        guessed = sum(counter.most_common(1)[0][1] for counter in answers.values())
        assert guessed / 400 < limit
