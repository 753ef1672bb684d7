"""`selector calibrate`: finds the thresholds of ``--keep auto:S`` on some tasks, and writes them with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from selector import hub
from selector.base import RankSelector
from selector.budget import Newlines
from selector.calibration import Calibration, calibrate
from selector.commands import loading
from selector.commands.common import choose, find_tasks, load_all, name_unreadable, sample_limit, whole
from selector.commands.printing import console
from selector.errors import UsageError
from selector.files import check_output, output
from selector.measure.answering import encode_image
from selector.measure.identity import fingerprint
from selector.measure.run import check_part, sample_count
from selector.records import WHOLE
from selector.shipped import INSTALLED
from selector.tasks import Task
from selector.tasks.sample import Sample
from selector.tokens import VisualTokens


def run(settings: dict[str, Any]) -> int:
    """Finds the thresholds of a selector on the images of some tasks, and writes it with them as a checkpoint.

    Args:
        settings: by the names of ``DEFAULTS["calibrate"]`` in `selector.cli`, and ``selector``, a spec.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: a setting out of its range, a selector without scores, or a share that no threshold meets.
    """
    # Mistakes in the settings are errors before a model is loaded.
    shares, policies = _shares(settings["shares"]), _policies(settings["newlines"])
    samples, seed = sample_limit(settings["samples"]), whole("seed", settings["seed"])
    tasks = find_tasks("calibrate", settings["tasks"], settings["skip_unreadable"])
    tolerance = _tolerance(settings["tolerance"])
    check_part(tasks, samples, WHOLE, fresh=False)
    spec = settings["selector"]
    source = _source(spec)
    out = _target(settings["out"], spec, source)
    ((label, selector),) = choose(settings | {"selectors": [spec]}).items()
    if not isinstance(selector, RankSelector):  # a threshold needs scores
        raise UsageError(f"{label}: a {type(selector).__name__} has no scores; calibrate what it is made of")

    model, processor, _ = load_all(settings, {label: selector})  # a module moves in place
    # What the thresholds depend on is stored with them: they hold for this model and for such images.
    about = {
        "model": str(settings["model"]),
        "fingerprint": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tasks": {task.name: sample_count(task, samples) for task in tasks},
        "seed": seed,
    }
    try:
        with Progress(console=Console(stderr=True)) as progress:  # ends before an error is printed
            stream = progress.track(
                _samples(tasks, samples, seed), sum(about["tasks"].values()), description="encoding"
            )
            tokens = _encoded(model, processor, selector, stream)
            selector.calibration = calibrate(selector, tokens, shares, policies, tolerance, about)
    except ValueError as error:
        raise UsageError(f"{label}: {error}") from error
    name_unreadable(tasks)

    # The checkpoint stays what it was, except for its thresholds: its card and metadata are written with it.
    metadata, card = hub.about(source) if source else ({}, None)
    with output(out):
        selector.save_pretrained(out, card=card, metadata=metadata)

    _print(selector.calibration, f"{label} · {settings['model']}", out)
    return 0


def _target(out: str | None, spec: str, source: str | None) -> Path:
    """The folder to write to: the one named, else that of the selector itself, which must be the user's own."""
    if out == "":
        raise UsageError("out must be the name of a folder, got ''")
    if out is None and (source is None or not Path(source).is_dir()):
        raise UsageError(f"out must name the folder to write: {spec!r} is no folder that could be calibrated in place")
    # An installed package is not the user's to change; an update would undo it, too.
    if out is None and Path(source or "").resolve().is_relative_to(INSTALLED):
        raise UsageError(f"out must name the folder to write: {spec!r} is part of the installed package")

    folder = Path(out or source or "")
    check_output(folder)
    return folder


def _samples(tasks: Sequence[Task], samples: int | None, seed: int) -> Iterator[Sample]:
    for task in tasks:
        yield from task.samples(sample_count(task, samples), seed)


def _encoded(model: Any, processor: Any, selector: RankSelector, samples: Iterable[Sample]) -> Iterator[VisualTokens]:
    """The visual tokens of every sample's image, one by one."""
    for sample in samples:
        yield encode_image(model, processor, sample.image, sample.question, selector.needs)[1].tokens


def _print(calibration: Calibration, title: str, out: Path) -> None:
    """Prints the thresholds as a table, what their shares refer to, and where the checkpoint is."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for header in ("keep", "newlines", "score above", "measured %"):
        table.add_column(header, justify="left" if header in ("keep", "newlines") else "right")
    for point in calibration.points:
        measured = f"{100 * point.measured:.2f}"
        table.add_row(f"auto:{point.share}", point.newlines, f"{point.threshold:.6g}", measured)

    terminal, about = console(), calibration.about
    terminal.print(table)
    terminal.print(
        f"measured: tokens that stay, newlines and base view included, of the {about['tokens']:,} of "
        f"{about['images']} images, each with at least one patch; within {100 * about['tolerance']:g}% of the share",
        highlight=False,
        soft_wrap=True,
    )
    terminal.print(f"Selector: {out}", highlight=False, markup=False, soft_wrap=True)


def _source(spec: str) -> str | None:
    """The folder (or hub repository) that a spec names and whose metadata and card stay; None for a method's name."""
    # NAME=SPEC or a spec alone.
    named = str(loading.label_of(spec)[1])
    if named.startswith("hf:"):
        return named.removeprefix("hf:")
    # A method's name is not looked up as a folder that ships with the package.
    folder = loading.find_folder(named) if "/" in named or Path(named).is_dir() else None
    return None if folder is None else str(folder)


def _shares(values: Sequence[Any]) -> list[float]:
    """The shares to calibrate for, each in (0, 1) and there once; YAML may give numbers or texts."""
    shares = []
    for value in values:
        try:
            share = float(value)
        except (TypeError, ValueError):
            share = -1.0  # out of range like any other mistake

        # A bool is a number to Python: ``true`` in a YAML would pass for 1.
        if isinstance(value, bool) or not 0 < share < 1:
            raise UsageError(f"shares must lie between 0 and 1, got {value!r}")
        if share in shares:
            raise UsageError(f"shares must be different, {value} is there twice")
        shares.append(share)

    if not shares:
        raise UsageError("shares must hold at least one, got none")
    return shares


def _policies(values: Sequence[str]) -> list[Newlines]:
    """The newline policies to calibrate for, each known and there once."""
    for i, value in enumerate(values):
        if value not in get_args(Newlines) or value in values[:i]:
            raise UsageError(f"newlines must be of {', '.join(get_args(Newlines))}, each once, got {value!r}")
    return list(values)  # type: ignore[arg-type]


def _tolerance(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UsageError(f"tolerance must be in [0, 1), got {value!r}")
    return float(value)
