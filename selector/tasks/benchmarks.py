"""A public benchmark as a task, read through the library ``datasets`` (the extra ``benchmarks``).

``hf:textvqa`` is one of ``configs/tasks/*.yaml``, each a recipe: where the data is, which columns to read, how to ask,
how to score. ``hf:my.yaml`` reads a recipe of one's own; ``hf:FOLDER`` a local folder of `datasets` (Parquet files, or
what ``save_to_disk`` wrote) with the columns image, question and answers, and ``hf:FOLDER?as=textvqa`` the same with
the recipe of a benchmark. What the cache of `datasets` holds needs no network.

The seed permutes the rows (images, where several questions of one are scored together), so that ``--samples 200`` takes
the same ones on every machine. Every question of an image is a sample of its own.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

from PIL import Image

from selector.errors import UnreadableImage, UsageError
from selector.images import decode_image, open_image
from selector.record import METRICS
from selector.shipped import ROOT
from selector.tasks import Task, check_question
from selector.tasks.sample import Sample

RECIPES = ROOT / "configs" / "tasks"
INSTALL = "pip install 'visual-token-selector[benchmarks]'"
COLUMNS = ("id", "image", "question", "answers", "choices", "hint")
"""What a recipe may say the column of; question it must, and answers unless a server scores (`Recipe.submission`)."""
JOIN = {"subset", "split", "by", "key", "image"}
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Recipe:
    """How a data set becomes a task; the names are those of the YAML.

    Attributes:
        path: a data set of the hub, or a local folder.
        columns: which column holds what, see `COLUMNS`; choices may be a list of columns, one per option.
        about: one line for the table of the documentation.
        subset, split: of the data set; a folder with one split needs none.
        metric, suffix: see `selector.tasks.Task`.
        where, exclude: only, or not, the rows whose column has that value (``except`` in the YAML).
        join: where the images are, if in another subset: ``subset``, ``split``, ``by`` (our column), ``key`` (theirs,
            of the same values) and ``image``.
        group: columns of the category and of the image of questions that are scored together.
        remove: a text that goes out of every question.
        capitalize: the first letter large and the others small.
        answer_is: ``text``, or ``index`` of one of the choices, counted from 0.
        missing: a text that stands for nothing, in hints, answers and a list of columns of choices.
        submission: columns that the submission file of a server repeats beside the prediction, see
            `selector.report.submission`. Without a column of answers, the server alone can score.

    Example:
        >>> recipe = read_recipe(RECIPES / "textvqa.yaml")
        >>> recipe.path, recipe.metric, recipe.texts
        ('lmms-lab-encoder/textvqa', 'vqa', ['question_id', 'question', 'answers'])
    """

    path: str
    columns: Mapping[str, str | Sequence[str]]
    about: str = ""
    subset: str | None = None
    split: str | None = None
    metric: str = "exact"
    suffix: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)
    exclude: Mapping[str, Any] = field(default_factory=dict)
    join: Mapping[str, str] | None = None
    group: Sequence[str] = ()
    remove: str = ""
    capitalize: bool = False
    answer_is: str = "text"
    # Not in the repr, of which fingerprints are made: what these do shows in the samples themselves.
    missing: str = field(default="", repr=False)
    submission: Sequence[str] = field(default=(), repr=False)

    @property
    def texts(self) -> list[str]:
        """The columns that are read of every row; all but the image's."""
        columns = [[name] if isinstance(name, str) else name for kind, name in self.columns.items() if kind != "image"]
        named = [name for several in columns for name in several]
        joined = [self.join["by"]] if self.join else []
        return list(dict.fromkeys([*named, *self.where, *self.exclude, *self.group, *self.submission, *joined]))


def benchmarks() -> list[str]:
    """Names of the benchmarks that ship: what may stand behind ``hf:``."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(path: Path) -> Recipe:
    """The recipe of a YAML file.

    Raises:
        UsageError: not YAML, or a setting that is missing, unknown or of another kind.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold names and values, got {content!r:.80}")
    settings = {"exclude" if name == "except" else str(name): value for name, value in content.items()}
    known = [each.name for each in dataclasses.fields(Recipe)]
    for name in settings.keys() - set(known):
        raise UsageError(f"{path}: unknown setting {name!r}{_hint(name, [*known, 'except'])}")
    for name in ("path", "columns"):
        if name not in settings:
            raise UsageError(f"{path}: {name} is missing")
    _check_kinds(path, settings)
    return Recipe(**settings)


def _check_kinds(path: Path, settings: Mapping[str, Any]) -> None:
    """Every setting of a recipe is of its kind, and names what there is."""

    def refuse(name: str, rule: str) -> UsageError:
        return UsageError(f"{path}: {name} must be {rule}, got {settings[name]!r:.80}")

    for name, value in settings.items():
        if name in ("columns", "where", "exclude", "join"):
            if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
                raise refuse(name, "names and values")
        elif name == "group":
            if not isinstance(value, list) or len(value) != 2 or not all(isinstance(each, str) for each in value):
                raise refuse(name, "two columns, of the category and of the image")
        elif name == "submission":
            if not _is_columns(value):
                raise refuse(name, "a list of columns")
        elif not isinstance(value, bool if name == "capitalize" else str):
            raise refuse(name, "true or false" if name == "capitalize" else "a text")

    columns, join = settings["columns"], settings.get("join")
    plain = [value for kind, value in columns.items() if kind != "choices" or not _is_columns(value)]
    if not set(columns) <= set(COLUMNS) or not all(isinstance(value, str) for value in plain):
        raise refuse("columns", f"names of columns for some of {', '.join(COLUMNS)}")
    needed = {"question"} if "submission" in settings else {"question", "answers"}
    if not needed <= columns.keys() or ("image" in columns) == (join is not None):
        raise refuse("columns", "there for question and answers, and for image unless there is a join")
    if join is not None and (set(join) != JOIN or not all(isinstance(value, str) for value in join.values())):
        raise refuse("join", f"texts for {', '.join(sorted(JOIN))}")
    if settings.get("metric", "exact") not in METRICS:
        raise refuse("metric", f"one of {', '.join(METRICS)}")
    if "metric" in settings and "answers" not in columns:
        raise refuse("metric", "left out where no column holds answers")
    if settings.get("answer_is", "text") not in ("text", "index"):
        raise refuse("answer_is", "text or index")
    if settings.get("answer_is") == "index" and "choices" not in columns:
        raise refuse("answer_is", "text where no column holds choices")


def _is_columns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def find_recipe(spec: str, argument: str) -> Recipe:
    """The recipe that stands behind ``hf:``: of a benchmark, a YAML file, or a folder.

    Raises:
        UsageError: none of them.
    """
    name, _, query = argument.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if query and (set(options) != {"as"} or options["as"] not in benchmarks()):
        raise UsageError(f"task {spec!r}: behind ? stands as=NAME, one of {', '.join(benchmarks())}, got {query!r}")

    if name in benchmarks() and not options:
        return read_recipe(RECIPES / f"{name}.yaml")
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file() and not options:
        recipe = read_recipe(path)
        beside = path.parent / recipe.path
        return dataclasses.replace(recipe, path=str(beside)) if beside.is_dir() else recipe
    if name and path.is_dir():
        if options:
            return dataclasses.replace(read_recipe(RECIPES / f"{options['as']}.yaml"), path=name)
        return Recipe(name, {"image": "image", "question": "question", "answers": "answers"})
    raise UsageError(
        f"unknown task {spec!r}: behind hf: stands one of {', '.join(benchmarks())}, a YAML file or a folder of "
        f"datasets{_hint(name, benchmarks())}"
    )


def load_benchmark(spec: str, argument: str, skip_unreadable: bool) -> Task:
    """The task of ``hf:ARGUMENT``. All but the images is read and checked here; an image is decoded in its turn.

    The fingerprint is of every row's texts, the size of its image's file, and the recipe: the same on every machine.

    Args:
        spec: the task as the user wrote it, for messages and `Task.name`.
        argument: what follows ``hf:``, see `find_recipe`.
        skip_unreadable: leave images out that cannot be decoded (named in `Task.unreadable`) instead of raising.

    Raises:
        UsageError: no such benchmark, the extra is missing, the data cannot be read, or lacks a column.
    """
    recipe = find_recipe(spec, argument)
    library = _library(spec)
    data = _read(library, spec, recipe.path, recipe.subset, recipe.split)
    join = recipe.join
    pictures = data if join is None else _read(library, spec, recipe.path, join["subset"], join["split"])
    _need(spec, data, [*recipe.texts, *([str(recipe.columns["image"])] if join is None else [])])
    _need(spec, pictures, [] if join is None else [join["key"], join["image"]])

    rows = _rows(spec, recipe, data.select_columns(recipe.texts))
    stored_at = [index for index, _ in rows] if join is None else _joined(spec, join, rows, pictures)
    column = str(recipe.columns["image"]) if join is None else join["image"]

    # As Arrow stores it: nothing is decoded but what is asked for, and that by us.
    pictures = pictures.select_columns([column]).with_format("arrow")
    drafts = [_draft(f"task {spec!r} row {index}", recipe, index, row) for index, row in rows]
    blocks = _blocks([draft["group"] for draft in drafts])
    unreadable: list[str] = []

    def samples(count: int, seed: int) -> Iterator[Sample]:
        order = list(blocks)
        Random(f"benchmark/{seed}").shuffle(order)
        for number in [number for block in order for number in block][:count]:
            try:
                stored = pictures[stored_at[number]].column(column)[0].as_py()
                image = _image(f"of task {spec} row {rows[number][0]}", stored)
            except UnreadableImage as error:
                if not skip_unreadable:
                    raise UnreadableImage(f"{error}; --skip-unreadable leaves such images out") from error
                unreadable.append(f"row {rows[number][0]}")
                continue
            yield Sample(image=image, boxes=(), **drafts[number])

    digest = hashlib.sha256(repr([dataclasses.replace(recipe, path="", about=""), drafts]).encode())
    sizes = _sizes(pictures, column)
    digest.update(repr([sizes[position] for position in stored_at]).encode())
    return Task(
        spec, samples, len(rows), digest.hexdigest()[:16], unreadable, metric=recipe.metric, suffix=recipe.suffix
    )


def _library(spec: str) -> ModuleType:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(f"task {spec!r} needs the library datasets, which is not installed: {INSTALL}") from error
    return datasets


def _read(library: ModuleType, spec: str, path: str, subset: str | None, split: str | None) -> Any:
    """One split of a data set: of a local folder, of the cache, or of the hub."""
    from huggingface_hub.errors import HTTPError as ClientError  # pyright: ignore[reportPrivateImportUsage]

    folder = Path(path)
    if subset is not None and (folder / subset).is_dir():
        folder, subset = folder / subset, None
    saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    # A copy of what the hub holds. Left to itself, datasets calls a split as it reads file names: val is validation.
    files = sorted(map(str, folder.rglob(f"{split}*.parquet"))) if split and subset is None and folder.is_dir() else []
    try:
        if saved:
            data = library.load_from_disk(str(folder))
        elif files:
            data = library.load_dataset("parquet", data_files={split: files}, split=split)
        else:
            data = library.load_dataset(str(folder) if folder.is_dir() else path, subset, split=split)
    except (OSError, ValueError, KeyError, RuntimeError, ClientError) as error:
        part = f"subset {subset or 'default'}, split {split or 'the only one'}"
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"task {spec!r}: {path} cannot be read by datasets ({part}): {reason}") from error
    if isinstance(data, dict):  # by split
        chosen = split if split is not None else next(iter(data)) if len(data) == 1 else None
        if chosen not in data:
            raise UsageError(
                f"task {spec!r}: split must be one of {', '.join(data)}, got {chosen!r}; a recipe names it"
            )
        data = data[chosen]
    return data


def _need(spec: str, data: Any, columns: Sequence[str]) -> None:
    for name in columns:
        if name not in data.column_names:
            raise UsageError(
                f"task {spec!r}: the column {name!r} is missing{_hint(name, data.column_names)}; "
                f"there are {', '.join(data.column_names)}"
            )


def _rows(spec: str, recipe: Recipe, data: Any) -> list[tuple[int, dict[str, Any]]]:
    """The rows that the recipe takes, each with its number in the data set."""
    rows = [
        (index, row)
        for index, row in enumerate(data)
        if all(row[name] == value for name, value in recipe.where.items())
        and not any(row[name] == value for name, value in recipe.exclude.items())
    ]
    if not rows:
        raise UsageError(f"task {spec!r}: no row of {len(data)} is left by where {dict(recipe.where)!r} and except")
    return rows


def _joined(
    spec: str, join: Mapping[str, str], rows: Sequence[tuple[int, Mapping[str, Any]]], pictures: Any
) -> list[int]:
    """Where in the subset of images each row's image is."""
    position = {key: index for index, key in enumerate(pictures[join["key"]])}
    lost = next((index for index, row in rows if row[join["by"]] not in position), None)
    if lost is not None:
        raise UsageError(f"task {spec!r}: row {lost} has an image that {join['subset']} lacks")
    return [position[row[join["by"]]] for _, row in rows]


def _draft(source: str, recipe: Recipe, index: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a sample says, without its image: arguments of `Sample`; `source` names the row in errors."""
    columns = recipe.columns
    choices = _choices(source, recipe, row)
    answers = _answers(source, recipe, row, choices) if "answers" in columns else []

    draft = {
        "id": f"{index}-{row[str(columns['id'])]}" if "id" in columns else str(index),
        "question": _question(source, recipe, row, choices),
        "answer": Counter(answers).most_common(1)[0][0] if answers else None,  # of equals the first
        "answers": tuple(answers),
        "choices": choices,
        "group": "/".join(str(row[name]) for name in recipe.group) or None,
    }
    # Only where there is one: drafts are part of the fingerprint, and those of other benchmarks stay as they were.
    if recipe.submission:
        draft["submission"] = {name: _text(recipe, row[name]) or "" for name in recipe.submission}
    return draft


def _choices(source: str, recipe: Recipe, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The words of the options: of one column that lists them, or of a column per option."""
    named = recipe.columns.get("choices", [])
    if isinstance(named, str):
        return tuple(map(str, row[named]))

    words = [_text(recipe, row[name]) for name in named]
    choices = tuple(each for each in words if each is not None)
    # Letters are counted off: behind a gap, they would be those of other options.
    if None in words[: len(choices)]:
        raise UsageError(f"{source}: its options must have no gap, got {dict(zip(named, words, strict=True))!r:.200}")
    return choices


def _answers(source: str, recipe: Recipe, row: Mapping[str, Any], choices: Sequence[str]) -> list[str]:
    """The references: one answer or several, and annotators who gave none are null."""
    given = row[str(recipe.columns["answers"])]
    texts = [_text(recipe, each) for each in (given if isinstance(given, list) else [given])]
    answers = [each for each in texts if each is not None]
    if not answers:
        raise UsageError(f"{source}: it has no answer, in the column {recipe.columns['answers']!r}")
    return [_letter(source, each, choices) for each in answers] if recipe.answer_is == "index" else answers


def _text(recipe: Recipe, value: Any) -> str | None:
    """A value as text; None where there is none, or the text that stands for none."""
    return None if value is None or (recipe.missing and value == recipe.missing) else str(value)


def _question(source: str, recipe: Recipe, row: Mapping[str, Any], choices: Sequence[str]) -> str:
    """The question as it is asked but for the suffix: after its hint, before its options."""
    text = row[str(recipe.columns["question"])]
    if not isinstance(text, str):
        raise UsageError(f"{source}: a question must be a text, got {text!r:.80}")
    text = text.replace(recipe.remove, "").strip() if recipe.remove else text.strip()
    text = text.capitalize() if recipe.capitalize else text
    hint = _text(recipe, row[str(recipe.columns["hint"])]) if "hint" in recipe.columns else None
    lines = [f"Context: {hint}"] if hint else []
    lines += [text, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))]
    try:
        return check_question("\n".join(lines))
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error


def _letter(source: str, index: str, choices: Sequence[str]) -> str:
    if not index.isdecimal() or int(index) >= min(len(choices), len(LETTERS)):
        raise UsageError(f"{source}: the answer must be the number of one of {len(choices)} choices, got {index!r}")
    return LETTERS[int(index)]


def _blocks(groups: Sequence[str | None]) -> list[list[int]]:
    """Numbers of drafts that stay together when the seed permutes them: those of one group; of no group, each alone."""
    blocks: dict[Any, list[int]] = {}
    for number, group in enumerate(groups):
        blocks.setdefault(number if group is None else group, []).append(number)
    return list(blocks.values())


def _sizes(pictures: Any, column: str) -> list[Any]:
    """Of every image the bytes that it has; the name of its file where it lies beside the data. Decodes nothing."""
    sizes: list[Any] = []
    for batch in pictures.iter(batch_size=100):
        for stored in batch.column(column).to_pylist():
            content, path = _content(stored)
            sizes.append(Path(path or "").name if content is None else len(content))
    return sizes


def _content(stored: Any) -> tuple[bytes | None, str | None]:
    """(bytes, path) of an image: a column of images has both, a column of bytes is the bytes."""
    if isinstance(stored, Mapping):
        return stored.get("bytes"), stored.get("path")
    return (stored, None) if isinstance(stored, bytes) else (None, stored)


def _image(name: str, stored: Any) -> Image.Image:
    """The decoded image of a row, as `selector.images` opens every image."""
    content, path = _content(stored)
    if content is not None:
        return decode_image(content, name)
    if not isinstance(path, str) or not path:
        raise UnreadableImage(f"image {name} cannot be read (there is none)")
    return open_image(path)


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def markdown_table() -> str:
    """The table of benchmarks in ``selector/README.md``; ``python -m selector.tasks.benchmarks`` prints it."""
    lines = ["| `--tasks` | benchmark | data set, split | scored by |", "|---|---|---|---|"]
    for name in benchmarks():
        recipe = read_recipe(RECIPES / f"{name}.yaml")
        data = " ".join(f"`{part}`" for part in (recipe.path, recipe.subset) if part)
        note = METRICS[recipe.metric].note if "answers" in recipe.columns else "a server, from a submission file"
        lines.append(f"| `hf:{name}` | {recipe.about.rstrip('.')} | {data}, {recipe.split} | {note} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
