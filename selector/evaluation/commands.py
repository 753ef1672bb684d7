"""The commands behind `selector.cli`: they load, run, draw and print; everything measured is measured elsewhere."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from selector.base import ScoreSelector
from selector.evaluation import loading, picture, report, speed
from selector.evaluation.answering import answer, prepare
from selector.evaluation.errors import UsageError
from selector.evaluation.evidence import evidence, model_rectangles
from selector.evaluation.run import Step, compare
from selector.evaluation.tasks import Task, load_task
from selector.evaluation.tasks.folder import open_image
from selector.evaluation.tasks.sample import Sample
from selector.models import encode
from selector.plug import prune_inputs
from selector.registry import available_selectors

WIDTH = 180
"""Columns of a table that goes to a file or a pipe."""


def compare_command(settings: dict[str, Any]) -> int:
    """`selector compare`: runs, watches, prints the table of what is done (also when interrupted)."""
    samples = _samples(settings["samples"])
    budgets = loading.parse_budgets(settings["keep"], settings["scope"], settings["newlines"])
    tasks = [load_task(spec, settings["skip_unreadable"]) for spec in _distinct("tasks", settings["tasks"])]
    seed = _whole("seed", settings["seed"])
    limit = _positive("max_new_tokens", settings["max_new_tokens"])
    model, processor, selectors = _load(settings)
    baseline = settings["baseline"]
    if baseline not in selectors:
        if "baseline" in settings["given"] and baseline is not None:
            raise UsageError(f"baseline must be one of the selectors {', '.join(selectors)}, got {baseline!r}")
        baseline = None
    steps = compare(
        model,
        processor,
        selectors,
        budgets,
        tasks,
        Path(settings["out"]),
        samples=samples,
        seed=seed,
        answers=settings["answers"],
        max_new_tokens=limit,
        baseline=baseline,
        fresh=settings.get("fresh", False),
        model_name=str(settings["model"]),
    )
    rows = len(selectors) * len(budgets) + 1 + int(settings["answers"])
    interrupted = _watch(steps, tasks, samples, rows)
    _print_report(Path(settings["out"]))
    if interrupted:
        print("interrupted: the table shows what is done; the same command goes on from here", file=sys.stderr)
    return 130 if interrupted else 0


def report_command(settings: dict[str, Any]) -> int:
    """`selector report`: the table of a run folder again."""
    _print_report(Path(settings["run"]))
    return 0


def list_command(settings: dict[str, Any]) -> int:
    """`selector list`: the shipped methods, and the checkpoints within reach."""
    table = Table(title="selectors", title_justify="left", title_style="bold")
    for header in ("name", "paper", "trained", "needs", "what it does"):
        table.add_column(header, no_wrap=header == "name")
    for name, cls in available_selectors().items():
        what = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
        kind = "" if issubclass(cls, ScoreSelector) else " (chooses a set)"
        needs = ", ".join(sorted(cls.needs)) or "nothing"
        table.add_row(name, cls.paper, "yes" if cls.learned else "no", needs, what + kind)
    console = _console()
    console.print(table)
    for folder, class_path in _checkpoints():
        console.print(f"checkpoint {folder}: {class_path}", highlight=False)
    return 0


def bench_command(settings: dict[str, Any]) -> int:
    """`selector bench`: one table of times and ratios."""
    budgets = loading.parse_budgets(settings["keep"], settings["scope"], settings["newlines"])
    repeats = _positive("repeats", settings["repeats"])
    image = (
        open_image(Path(settings["image"])) if settings["image"] else _pages(_whole("seed", settings["seed"]))[0].image
    )
    model, processor, selectors = _load(settings)
    console = _console()
    for budget in budgets:
        try:
            result = speed.measure(model, processor, selectors, budget, image, repeats)
        except ValueError as error:
            raise UsageError(f"keep={budget}: {error}") from error
        where = f"{model.device.type}, {torch.get_num_threads()} threads"
        console.print(speed.table(result, f"{settings['model']} · keep {budget} · {where} · median of {repeats}"))
    return 0


def show_command(settings: dict[str, Any]) -> int:
    """`selector show`: a PNG with a row an image and budget, and a panel a selector."""
    budgets = loading.parse_budgets(settings["keep"], settings["scope"], settings["newlines"])
    out = Path(settings["out"])
    if out.suffix.lower() != ".png":
        raise UsageError(f"out must be the name of a PNG file, got {settings['out']!r}")
    question = settings["question"]
    samples = [Sample(name, open_image(Path(name)), question, None, ()) for name in settings.get("images", [])]
    samples = samples or _pages(_whole("seed", settings["seed"]))
    limit = _positive("max_new_tokens", settings["max_new_tokens"])
    model, processor, selectors = _load(settings)
    strips = []
    for sample in samples:
        strips += _strips(model, processor, selectors, budgets, sample, limit)
    page = picture.stack(strips, heading=f"{settings['model']}: what stays of the visual tokens")
    out.parent.mkdir(parents=True, exist_ok=True)
    page.save(out)
    print(f"{out}: {page.width} x {page.height}, {len(strips)} rows of {len(selectors) + 1} panels")
    return 0


def _strips(model: Any, processor: Any, selectors: Any, budgets: Any, sample: Sample, limit: int) -> Iterator[Any]:
    inputs = prepare(processor, sample.image, sample.question, model.device)
    needs = frozenset({"features"}).union(*(s.needs for s in selectors.values()))
    try:
        with torch.no_grad():
            encoded = encode(model, inputs, needs)
    except ValueError as error:
        raise UsageError(f"{sample.id}: {error}") from error
    if encoded is None:
        raise RuntimeError("the processor made no pixels of an image")
    rectangles = model_rectangles(model.config, (sample.image.height, sample.image.width), encoded.tokens.grid)

    def panel(name: str, selector: Any, budget: Any) -> picture.Panel:
        try:
            pruned = prune_inputs(model, inputs, selector, budget, encoded=encoded)
        except ValueError as error:
            raise UsageError(f"{name} at keep={budget} on {sample.id}: {error}") from error
        kept = encoded.tokens.tiles_of(pruned.keep)  # type: ignore[arg-type]
        lines = [f"{pruned.measured[0]} of {pruned.full[0]} tokens"]
        shares = evidence(kept, rectangles, sample.boxes)
        if shares is not None:
            lines.append(f"evidence kept: {100 * shares[0]:.0f}%")
        if sample.question is not None:
            said = answer(model, processor, pruned.inputs, limit).text
            lines += [f"Q: {sample.question}", f"A: {said}" + (f"   (right: {sample.answer})" if sample.answer else "")]
        return picture.Panel(name, tuple(lines), kept)

    whole = panel("every token", None, None)
    for budget in budgets:
        panels = [panel(f"{name}, keep {budget}", selector, budget) for name, selector in selectors.items()]
        yield picture.draw(sample.image, rectangles, [whole, *panels], sample.boxes)


def _pages(seed: int) -> list[Sample]:
    """What is shown where no image is given: one generated page and one scene."""
    return [next(load_task(name).samples(1, seed)) for name in ("documents", "scenes")]


def _load(settings: dict[str, Any]) -> tuple[Any, Any, Any]:
    import transformers

    if settings["threads"] is not None:
        torch.set_num_threads(_positive("threads", settings["threads"]))
    transformers.logging.disable_progress_bar()
    device = loading.find_device(settings["device"])
    selectors = loading.load_selectors(settings["selectors"], device, settings["allow"])
    model, processor = loading.load_model(
        settings["model"], settings["device"], settings["dtype"], settings["device_map"], settings["attention"]
    )
    return model, processor, {label: selector.to(model.device) for label, selector in selectors.items()}


def _watch(steps: Iterator[Step], tasks: list[Task], samples: int | None, rows: int) -> bool:
    """Drives the run behind a progress bar; True when the user interrupted it."""
    sizes = {task.name: min(n for n in (samples, task.size) if n is not None) for task in tasks if samples or task.size}
    text = TextColumn("{task.description:<12} {task.fields[seen]}")
    clock = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(compact=True, elapsed_when_finished=True))
    right: dict[str, list[bool]] = {"full": [], "pruned": []}
    shares: list[float] = []
    with Progress(text, *clock, console=Console(stderr=True)) as progress:
        bars = {name: progress.add_task(name, total=size * rows, seen="") for name, size in sizes.items()}
        shown = None
        try:
            for step in steps:
                if step.task != shown:
                    right, shares, shown = {"full": [], "pruned": []}, [], step.task
                record = step.record
                if record and step.row.label != "blind":
                    if "correct" in record:
                        right["pruned" if step.row.selector else "full"].append(record["correct"])
                    if step.row.selector:
                        shares.append(record["tokens"] / max(1, record["full_tokens"]))
                progress.update(bars[step.task], advance=1, seen=_seen(right, shares))
        except KeyboardInterrupt:
            return True
    for task in tasks:
        if task.unreadable:
            print(f"{task.name}: {len(task.unreadable)} images cannot be read and are left out:", file=sys.stderr)
            print(*(f"  {name}" for name in task.unreadable), sep="\n", file=sys.stderr)
    return False


def _seen(right: dict[str, list[bool]], shares: list[float]) -> str:
    parts = [f"{name} {100 * sum(hits) / len(hits):.0f}%" for name, hits in right.items() if hits]
    if shares:
        parts.append(f"kept {100 * sum(shares) / len(shares):.0f}%")
    return " · ".join(parts)


def _print_report(run: Path) -> None:
    summary = report.write_report(run)
    console = _console()
    tables, left_out = report.fitting_tables(summary, console.width)
    for table in tables:
        console.print(table)
    if left_out:
        console.print(f"Too narrow for {', '.join(left_out)}: see {run / 'table.md'}.", highlight=False)
    console.print(report.footnotes(summary, run), highlight=False, markup=False, soft_wrap=True)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _checkpoints() -> Iterator[tuple[str, str]]:
    root = loading.find_folder("checkpoints")
    for config in sorted(root.glob("*/config.json")) if root else []:
        class_path = json.loads(config.read_text(encoding="utf-8")).get("class_path")
        if class_path:
            yield f"checkpoints/{config.parent.name}", class_path


def _samples(value: Any) -> int | None:
    if value == "all":
        return None
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise UsageError(f"samples must be an int >= 1 or all, got {value!r}")
    return number


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} must be an int >= 1, got {value!r}")
    return value


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} must be an int, got {value!r}")
    return value


def _distinct(name: str, values: list[str]) -> list[str]:
    twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
    if twice is not None or not values:
        raise UsageError(f"{name} must name at least one, each once, got {' '.join(values) or 'none'}")
    return values


COMMANDS: dict[str, Callable[[dict[str, Any]], int]] = {
    "compare": compare_command,
    "show": show_command,
    "bench": bench_command,
    "list": list_command,
    "report": report_command,
}
