"""Benchmarks as tasks: recipes, and small Parquet files with the columns of each (they need the extra benchmarks)."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from selector.errors import UnreadableImage, UsageError
from selector.tasks import load_task
from selector.tasks.benchmarks import RECIPES, benchmarks, find_recipe, markdown_table, read_recipe

ROOT = Path(__file__).parent.parent.parent
SHORT = "Answer the question using a single word or phrase."


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    library = pytest.importorskip("datasets", reason="datasets is not installed: the extra benchmarks")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    library.disable_progress_bars()
    return library


def image(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20 + number, 30), (number * 9, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


# Of MMBench, where "nan" stands for nothing.
OPTIONS = {"index": "241", "question": "Which?", "A": "cat", "B": "dog", "C": "nan", "D": None}
# Columns as the hub has them, and what the first row is asked, answered and scored by.
ROWS = {
    "textvqa": (
        [{"question_id": i, "question": "what IS this?", "answers": ["stop"] * 6 + ["a stop"] * 4} for i in range(5)],
        ("What is this?", "stop"),
    ),
    "docvqa": ([{"questionId": "7", "question": "Date?", "answers": ["1 May", "May 1"]}], ("Date?", "1 May")),
    "infovqa": ([{"questionId": "7", "question": "How many?", "answers": ["5"]}], ("How many?", "5")),
    "chartqa-human": (
        [{"type": t, "question": f"{t}?", "answer": "14"} for t in ("augmented_test", "human_test")],
        ("human_test?", "14"),
    ),
    "chartqa-augmented": (
        [{"type": t, "question": f"{t}?", "answer": "14"} for t in ("augmented_test", "human_test")],
        ("augmented_test?", "14"),
    ),
    "pope": ([{"question_id": "1", "question": "Is there a dog?", "answer": "yes"}] * 2, ("Is there a dog?", "yes")),
    "mme": (
        [
            {
                "question_id": f"count/{i // 2}.png",
                "question": f"Is it {i}? Please answer yes or no.",
                "answer": ("Yes", "No")[i % 2],
                "category": "count",
            }
            for i in range(8)
        ],
        ("Is it 0?", "Yes"),
    ),
    "scienceqa": (
        [{"question": "Which?", "choices": ["cat", "dog"], "answer": 1, "hint": "Look."}],
        ("Context: Look.\nWhich?\nA. cat\nB. dog", "B"),
    ),
    "ai2d": ([{"question": "Which?", "options": ["x", "y", "z"], "answer": "2"}], ("Which?\nA. x\nB. y\nC. z", "C")),
    "ocrbench": (
        [{"dataset": d, "question": "Read.", "answer": ["HI", "HI!"]} for d in ("IIIT5K", "HME100k")],
        ("Read.", "HI"),
    ),
    "ocrbench-formulas": (
        [{"dataset": d, "question": d, "answer": ["x ^ 2"]} for d in ("IIIT5K", "HME100k")],
        ("HME100k", "x ^ 2"),
    ),
    "mmstar": ([{"index": 4, "question": "Which?\nA: cat, B: dog", "answer": "B"}], ("Which?\nA: cat, B: dog", "B")),
    "mmbench": (
        [OPTIONS | {"answer": "B", "hint": "Look."}, OPTIONS | {"hint": "nan", "answer": "A"}],
        ("Context: Look.\nWhich?\nA. cat\nB. dog", "B"),
    ),
    "mmbench-test": ([OPTIONS | {"answer": "nan", "hint": "nan"}], ("Which?\nA. cat\nB. dog", None)),
    "vizwiz": (
        [{"question_id": "v", "question": "what?", "answers": ["unanswerable"] * 10}],
        ("What?", "unanswerable"),
    ),
}


def write(datasets, folder: Path, rows: list[dict], split: str = "test", images: bool = True) -> Path:
    """A Parquet file, the images as bytes, as it lies on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    if images:
        rows = [row | {"image": {"bytes": image(i), "path": None}} for i, row in enumerate(rows)]
    save(datasets, rows, folder / f"{split}-00000-of-00001.parquet")
    return folder


def save(datasets, rows: list[dict], path: Path) -> None:
    table = datasets.Dataset.from_list(rows)
    if isinstance(rows[0].get("image"), dict):
        table = table.cast_column("image", datasets.Image())
    table.to_parquet(path)


def folder_of(datasets, tmp_path: Path, name: str) -> Path:
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    folder = tmp_path / "data"
    write(datasets, folder / recipe.subset if recipe.subset else folder, ROWS[name][0], recipe.split)
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_a_benchmark_is_read_by_its_recipe(datasets, tmp_path, name):
    task = load_task(f"hf:{folder_of(datasets, tmp_path, name)}?as={name}")
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    assert (task.metric, task.suffix) == (recipe.metric, recipe.suffix)
    samples = list(task.samples(99, 0))
    assert len(samples) == task.size
    assert len({sample.id for sample in samples}) == len(samples)
    first = min(samples, key=lambda sample: int(sample.id.split("-")[0]))
    assert (first.question, first.answer) == ROWS[name][1]
    assert first.image.mode == "RGB"
    assert first.image.size == (20 + int(first.id.split("-")[0]), 30)
    assert task.prompt(first.question) == first.question + (f"\n{recipe.suffix}" if recipe.suffix else "")


def test_every_benchmark_that_ships_is_tested():
    assert {*ROWS, "gqa"} == set(benchmarks())


def test_gqa_joins_its_questions_with_their_images(datasets, tmp_path):
    questions = [{"id": f"q{i}", "imageId": f"n{i % 2}", "question": f"{i}?", "answer": "yes"} for i in range(4)]
    write(datasets, tmp_path / "gqa" / "testdev_balanced_instructions", questions, "testdev", images=False)
    write(datasets, tmp_path / "gqa" / "testdev_balanced_images", [{"id": "n1"}, {"id": "n0"}], "testdev")
    task = load_task(f"hf:{tmp_path / 'gqa'}?as=gqa")
    widths = {sample.question: sample.image.width for sample in task.samples(99, 0)}
    assert widths == {"0?": 21, "1?": 20, "2?": 21, "3?": 20}  # n1 is the first of the images
    write(datasets, tmp_path / "gqa" / "testdev_balanced_images", [{"id": "n1"}], "testdev")
    with pytest.raises(UsageError, match="row 0 has an image that testdev_balanced_images lacks"):
        load_task(f"hf:{tmp_path / 'gqa'}?as=gqa")


def test_the_seed_takes_the_same_samples_everywhere(datasets, tmp_path):
    folder = write(datasets, tmp_path / "data", [{"question": f"{i}?", "answers": ["x"]} for i in range(40)])
    task = load_task(f"hf:{folder}")
    few, more = ([sample.id for sample in task.samples(count, 3)] for count in (5, 20))
    assert few == ["15", "11", "22", "39", "38"]  # fixed: another order would be another subset
    assert more[:5] == few
    assert [sample.id for sample in task.samples(5, 4)] != few
    assert task.metric == "exact"


def test_options_in_columns_of_their_own(datasets, tmp_path):
    def first(name, row):
        write(datasets, tmp_path / name / "en", [row], "test")
        return next(load_task(f"hf:{tmp_path / name}?as=mmbench-test").samples(1, 0))

    sample = first("two", ROWS["mmbench-test"][0][0])
    assert (sample.choices, sample.references) == (("cat", "dog"), ())
    # What the server is sent, which has no text for what is not there.
    assert sample.submission == {"index": "241", "question": "Which?", "A": "cat", "B": "dog", "C": "", "D": ""}
    assert first("four", OPTIONS | {"hint": None, "C": "owl", "D": "fox"}).choices == ("cat", "dog", "owl", "fox")
    with pytest.raises(UsageError, match=r"options must have no gap, got \{'A': 'cat', 'B': None, 'C': 'owl'"):
        first("gap", OPTIONS | {"hint": None, "B": "nan", "C": "owl"})


def test_a_submission_may_repeat_any_column(datasets, tmp_path):
    write(datasets, tmp_path / "data", [{"q": "Which?", "number": 7, "kind": "colour"}])
    recipe = {"path": "data", "columns": {"image": "image", "question": "q"}, "submission": ["number", "kind"]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    (sample,) = load_task(f"hf:{tmp_path / 'mine.yaml'}").samples(9, 0)
    assert (sample.submission, sample.answer) == ({"number": "7", "kind": "colour"}, None)


def test_an_answer_that_is_missing_is_an_error_where_the_task_scores(datasets, tmp_path):
    write(datasets, tmp_path / "data" / "en", [OPTIONS | {"answer": "nan", "hint": None}], "dev")
    with pytest.raises(UsageError, match="row 0: it has no answer, in the column 'answer'"):
        load_task(f"hf:{tmp_path / 'data'}?as=mmbench")


def test_pairs_of_mme_stay_together(datasets, tmp_path):
    task = load_task(f"hf:{folder_of(datasets, tmp_path, 'mme')}?as=mme")
    for seed in range(4):
        groups = [sample.group for sample in task.samples(4, seed)]
        assert groups[0] == groups[1] != groups[2] == groups[3]
        assert groups[0].startswith("count/")


def test_the_fingerprint_follows_texts_and_images_and_not_the_place(datasets, tmp_path):
    rows = [{"question": "a?", "answers": ["x"]}, {"question": "b?", "answers": ["y"]}]
    prints = {
        name: load_task(f"hf:{write(datasets, tmp_path / name, content)}").fingerprint
        for name, content in (("one", rows), ("two", rows), ("other", [rows[0], rows[1] | {"answers": ["z"]}]))
    }
    assert prints["one"] == prints["two"] != prints["other"]
    (tmp_path / "images").mkdir()
    drawn = [row | {"image": {"bytes": image(9 * i), "path": None}} for i, row in enumerate(rows)]
    save(datasets, drawn, tmp_path / "images" / "test.parquet")
    assert load_task(f"hf:{tmp_path / 'images'}").fingerprint != prints["one"]


def test_a_saved_folder_and_a_recipe_of_ones_own(datasets, tmp_path):
    folder = write(datasets, tmp_path / "data", [{"q": "Which?", "a": "left"}])
    datasets.load_dataset(str(folder), split="test").save_to_disk(tmp_path / "saved")
    columns = {"image": "image", "question": "q", "answers": "a"}
    for path in ("data", "saved"):
        recipe = {"path": path, "columns": columns, "metric": "match", "suffix": "Short."}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
        task = load_task(f"hf:{tmp_path / 'mine.yaml'}")
        (sample,) = task.samples(9, 0)
        assert (sample.question, sample.references, task.metric, task.suffix) == (
            "Which?",
            ("left",),
            "match",
            "Short.",
        )


def test_a_column_of_bytes_is_one_of_images_too(datasets, tmp_path):
    (tmp_path / "data").mkdir()
    rows = [{"question": "a?", "answers": ["x"], "image": image(4)}]
    save(datasets, rows, tmp_path / "data" / "test.parquet")
    (sample,) = load_task(f"hf:{tmp_path / 'data'}").samples(1, 0)
    assert sample.image.getpixel((0, 0)) == (36, 0, 0)


def test_a_missing_column_and_rows_without_an_answer(datasets, tmp_path):
    folder = write(datasets, tmp_path / "data", [{"questions": "a?", "answers": ["x"]}])
    with pytest.raises(UsageError, match=r"'question' is missing; did you mean questions\?; there are"):
        load_task(f"hf:{folder}")
    for content, rule in (
        ({"question": "a?", "answers": []}, "row 0: it has no answer"),
        ({"question": "a?", "answers": None}, "row 0: it has no answer"),
        ({"question": "<image> a?", "answers": ["x"]}, "row 0: a question must not hold <image>"),
    ):
        place = write(datasets, tmp_path / rule[:12].replace(" ", "") / str(content)[-8:-2], [content])
        with pytest.raises(UsageError, match=rule):
            load_task(f"hf:{place}")


def test_a_broken_image_is_named_or_left_out(datasets, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"question": f"{i}?", "answers": ["x"], "image": {"bytes": image(i), "path": None}} for i in range(3)]
    rows[1]["image"]["bytes"] = b"no image"
    save(datasets, rows, folder / "test.parquet")
    with pytest.raises(UnreadableImage, match="row 1 cannot be read"):
        list(load_task(f"hf:{folder}").samples(3, 0))
    task = load_task(f"hf:{folder}", skip_unreadable=True)
    assert len(list(task.samples(3, 0))) == 2
    assert task.unreadable == ["row 1"]


def test_what_cannot_be_read_says_so(datasets, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="cannot be read by datasets"):
        load_task(f"hf:{tmp_path / 'empty'}")
    folder = write(datasets, tmp_path / "data", [{"question": "a?", "answers": ["x"]}])
    write(datasets, folder, [{"question": "a?", "answers": ["x"]}], "train")
    with pytest.raises(UsageError, match=r"split must be one of .*, got None"):
        load_task(f"hf:{folder}")


def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UsageError, match=r"needs the library datasets.*pip install 'visual-token-selector\[benchmarks\]'"
    ):
        load_task("hf:textvqa")


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("hf:textqva", "did you mean textvqa"),
        ("hf:", "unknown task 'hf:'"),
        ("hf:no/such", "behind hf: stands one of ai2d"),
        ("hf:.?as=textqva", "behind . stands as=NAME"),
        ("hf:.?with=textvqa", "behind . stands as=NAME"),
    ],
)
def test_unknown_names_are_refused(spec, rule):
    with pytest.raises(UsageError, match=rule):
        load_task(spec)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"metrics": "vqa"}, "unknown setting 'metrics'; did you mean metric"),
        ({"metric": "bleu"}, "metric must be one of exact"),
        ({"path": None}, "path must be a text"),
        ({"columns": {"image": "image", "question": "q"}}, "columns must be there for question and answers"),
        ({"columns": {"question": "q", "answers": "a"}}, "and for image unless there is a join"),
        ({"columns": {"image": "i", "question": "q", "answers": "a", "box": "b"}}, "columns must be names"),
        ({"answer_is": "index"}, "answer_is must be text where no column holds choices"),
        ({"group": ["category"]}, "group must be two columns"),
        ({"capitalize": "yes"}, "capitalize must be true or false"),
        ({"where": ["a"]}, "where must be names and values"),
        ({"submission": "index"}, "submission must be a list of columns"),
        ({"columns": {"image": "i", "question": ["q"], "answers": "a"}}, "columns must be names"),
        ({"columns": {"image": "i", "question": "q", "answers": "a", "choices": [1]}}, "columns must be names"),
        (
            {"columns": {"image": "i", "question": "q"}, "submission": ["id"], "metric": "letter"},
            "metric must be left out where no column holds answers",
        ),
    ],
)
def test_a_recipe_is_checked(tmp_path, change, rule):
    recipe = {"path": "x/y", "columns": {"image": "image", "question": "q", "answers": "a"}} | change
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UsageError, match=rule):
        find_recipe("hf:x", str(tmp_path / "mine.yaml"))


def test_recipes_that_ship_are_whole():
    for name in benchmarks():
        recipe = read_recipe(RECIPES / f"{name}.yaml")
        assert recipe.about, name
        assert recipe.split, name
        assert recipe == dataclasses.replace(find_recipe("hf:", name)), name
    assert read_recipe(RECIPES / "textvqa.yaml").suffix == SHORT


def test_the_documentation_has_the_table():
    assert markdown_table() in (ROOT / "selector" / "README.md").read_text(), "python -m selector.tasks.benchmarks"
