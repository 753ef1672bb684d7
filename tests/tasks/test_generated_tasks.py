"""The generated tasks: deterministic, held-out streams apart, evidence boxes where the answer stands, no easy
blind guess."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest

from selector.tasks.generated import charts, documents, scenes
from selector.tasks.generated.drawing import held_out

TASKS = {"documents": documents, "scenes": scenes, "charts": charts}


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


def read(page, box) -> str:
    """The marks whose centres lie in the box."""
    x0, y0, x1, y1 = box
    return "".join(c for c, (a, b, c1, d) in page.marks if x0 <= (a + c1) / 2 <= x1 and y0 <= (b + d) / 2 <= y1)


def test_document_answers_follow_from_the_marks_in_their_boxes():
    for index in range(60):
        page = documents.page("train", 2, index)
        for turn in page.turns:
            found = [read(page, box) for box in turn.boxes]
            words = turn.question.removesuffix("?").replace(",", "").split()
            if words[0] == "what":
                assert [f"{words[2]} {value}" for value in found] == [turn.answer]
            elif words[0] == "which":
                values = dict(zip((words[3], words[5]), map(int, found), strict=True))
                larger = max(values, key=lambda key: values[key])
                assert turn.answer == f"{words[3]} {found[0]}, {words[5]} {found[1]}: {larger}"
            elif words[0] == "how":
                assert turn.answer == str(len(found)) == str(sum(c == ":" for c, _ in page.marks))
            else:
                assert turn.answer == ("yes" if found else "no")
                assert found in ([], [words[3] + ":"])


def test_ink_lies_in_the_marked_cells():
    for index in range(30):
        page = documents.page("train", 8, index)
        pixels = np.asarray(page.image).astype(int)
        for name, (x0, y0, x1, y1) in page.marks:
            if name != ":":
                assert np.ptp(pixels[round(y0) : round(y1), round(x0) : round(x1)]) > 60, (index, name)


@pytest.mark.slow
def test_held_out_values_and_layouts_are_never_trained_on():
    seen = {
        split: {line.value for i in range(150) for line in documents.layout(Random(i), (192, 192), 6, split).lines}
        for split in ("train", "test")
    }
    assert min(map(len, seen.values())) > 100
    assert not seen["train"] & seen["test"]
    scenes_seen = {
        split: {scenes.transcript(scenes.page(split, 0, i).marks) for i in range(150)} for split in ("train", "test")
    }
    assert not scenes_seen["train"] & scenes_seen["test"]
    assert 0.2 < sum(held_out(str(i)) for i in range(2000)) / 2000 < 0.3


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
            elif words[:2] == ["what", "is"]:
                boxes = dict(page.marks) if len(dict(page.marks)) == len(page.marks) else {}
                ((_, box),) = [(name, box) for name, box in page.marks if name.split() == words[-2:]]
                if turn.answer in boxes:
                    other = boxes[turn.answer]
                    assert (other[2] < box[0]) if words[2] == "left" else (other[0] > box[2])
                    assert abs(other[1] - box[1]) < 48
            elif words[:2] == ["what", "shape"]:
                assert [shape for colour, shape in labels if colour == words[-2]] == [turn.answer]
            else:
                present = any(colour == words[3] for colour, _ in labels)
                assert turn.answer == ("yes" if present else "no")
                assert bool(turn.boxes) == present


@pytest.mark.slow
def test_relations_are_asked_as_often_as_the_rest():
    kinds = Counter(scenes.kind_of(sample.question) for sample in scenes.samples(300, 5))
    assert min(kinds.values()) > 0.12 * 300


def test_objects_do_not_cross_tiles():
    for index in range(30):
        for _, (x0, y0, x1, y1) in scenes.page("train", 4, index).marks:
            assert x0 // 96 == (x1 - 1) // 96
            assert y0 // 96 == (y1 - 1) // 96


@pytest.mark.slow
def test_the_best_blind_guess_is_poor():
    for task, limit in ((documents, 0.25), (scenes, 0.45), (charts, 0.2)):
        answers: dict[str, Counter] = {}
        for sample in task.samples(400, 9):
            answers.setdefault(sample.question.split()[1], Counter())[sample.answer] += 1
        guessed = sum(counter.most_common(1)[0][1] for counter in answers.values())
        assert guessed / 400 < limit
