"""`selector stability`: whether a selector keeps the same places of a changed image, and whether trainings agree."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from selector.base import TokenSelector
from selector.budget import Budget
from selector.commands import loading
from selector.commands.common import choose, find_tasks, load_all, name_unreadable, sample_limit, whole
from selector.errors import UsageError
from selector.files import check_output, output, write_json
from selector.measure.answering import encode_image
from selector.measure.evidence import model_canvas
from selector.measure.identity import fingerprint, identity
from selector.measure.run import check_part, sample_count
from selector.measure.settings import environment, written
from selector.measure.stability import Change, Overlap, Pairs, changes, overlap_of, pairs
from selector.records import WHOLE
from selector.registry import load_selector
from selector.report.statistics import bootstrap_mean
from selector.tasks.sample import Sample
from selector.tokens import VisualTokens

SEEDS = "other seed"
"""The "change" of a comparison of trainings: the image is the same, the seed is not."""
Overlaps = dict[tuple[str, str, str], list[tuple[Overlap | None, Overlap | None]]]
"""By selector, budget and change: per image the overlap, and that of random choices of as many tokens."""


def run(settings: dict[str, Any]) -> int:
    """Prints how far selectors keep the same places of changed images, and how far trainings of one recipe agree.

    Args:
        settings: by the names of ``DEFAULTS["stability"]`` in `selector.cli`.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: a setting out of its range, or a sample on which a selector cannot choose.
    """
    # Mistakes in the settings are errors before a model is loaded.
    budgets = loading.parse_budgets(settings["keep"], settings["scope"], settings["newlines"])
    samples, seed = sample_limit(settings["samples"]), whole("seed", settings["seed"])
    tasks = find_tasks("stability", settings["tasks"], settings["skip_unreadable"])
    out = _target(settings["out"])
    check_part(tasks, samples, WHOLE, fresh=False)
    selectors = choose(settings)
    seeds = _seeds(settings)
    _check_calibrated(selectors | seeds, budgets)

    model, processor, selectors = load_all(settings, selectors)
    # `load_all` moved the other selectors.
    seeds = {label: selector.to(model.device) for label, selector in seeds.items()}

    # What the figures depend on is written with them.
    result: dict[str, Any] = {
        "model": str(settings["model"]),
        "fingerprint": fingerprint(model),
        "environment": environment(model),
        "samples": samples,
        "seed": seed,
        "selectors": {label: identity(selector) for label, selector in (selectors | seeds).items()},
        "rows": [],
    }

    with Progress(console=Console(stderr=True)) as progress:
        for task in tasks:
            count = sample_count(task, samples)
            stream = progress.track(task.samples(count, seed), count, description=task.name)
            overlaps = measure(model, processor, selectors, seeds, budgets, stream)
            result["rows"] += [{"task": task.name} | row for row in summarize(overlaps)]
    name_unreadable(tasks)

    print(markdown(result))
    if out is not None:
        with output(out):
            write_json(out, result)
        print(f"\nFigures: {out}")
    return 0


def _target(name: str | None) -> Path | None:
    """The file to write the figures to; None where they are only printed."""
    if name is None:
        return None
    out = Path(name)
    if out.suffix.lower() != ".json":
        raise UsageError(f"out must be the name of a JSON file, got {name!r}")
    check_output(out.parent)  # hours of work must not end at a folder that cannot be written to
    return out


def _check_calibrated(selectors: Mapping[str, TokenSelector], budgets: Sequence[Budget]) -> None:
    """Refuses a budget that a selector's calibration does not know, now and not at the first sample."""
    for label, selector in selectors.items():
        for budget in budgets:
            try:
                selector.resolved(budget)
            except ValueError as error:
                raise UsageError(f"{label}: {error}") from error


def measure(
    model: Any,
    processor: Any,
    selectors: Mapping[str, TokenSelector],
    seeds: Mapping[str, TokenSelector],
    budgets: Sequence[Budget],
    samples: Iterable[Sample],
) -> Overlaps:
    """The overlaps per image, for every selector, budget and change; for `seeds`, the mean over all pairs of them.

    Args:
        selectors, seeds: by label, on the model's device; `seeds`, trainings of one recipe, may be empty.
        budgets: each for every selector.
        samples: whose images are changed.

    Returns:
        By selector, budget and change, see `Overlaps`; `seeds` are one selector, and `SEEDS` is their change.

    Raises:
        UsageError: a selector cannot choose on a sample, which is named.
    """
    everyone = [*selectors.values(), *seeds.values()]
    needs = frozenset({"features"}).union(*(selector.needs for selector in everyone))
    # Two seeds: one random selector would agree with itself.
    chance = [load_selector(f"random:seed={number}").to(model.device) for number in (0, 1)]

    overlaps: Overlaps = {}
    for sample in samples:
        try:
            before = encode_image(model, processor, sample.image, sample.question, needs)[1].tokens
            canvas = model_canvas(model.config, (sample.image.height, sample.image.width), before.grid)
            places = canvas.rectangles()

            # Every selector against itself, on the image and on the changed one.
            for change in changes(sample.image, canvas):
                after = encode_image(model, processor, change.image, sample.question, needs)[1].tokens
                at = pairs(places, before.valid, change)
                for budget, named in itertools.product(budgets, selectors.items()):
                    each = _compared((named, named), (before, after), budget, at, chance)
                    overlaps.setdefault((named[0], str(written(budget)), change.name), []).append(each)

            # Every training against every other, on the same image.
            at = pairs(places, before.valid, Change(SEEDS, sample.image))
            for budget in budgets if seeds else ():
                couples = itertools.combinations(seeds.items(), 2)
                agreed = [_compared(couple, (before, before), budget, at, chance) for couple in couples]
                key = (", ".join(seeds), str(written(budget)), SEEDS)
                overlaps.setdefault(key, []).append((_mean([x for x, _ in agreed]), _mean([x for _, x in agreed])))
        except ValueError as error:
            raise UsageError(f"on sample {sample.id!r}: {error}") from error
    return overlaps


def _compared(
    named: tuple[tuple[str, TokenSelector], tuple[str, TokenSelector]],
    images: tuple[VisualTokens, VisualTokens],
    budget: Budget,
    at: Pairs,
    chance: Sequence[TokenSelector],
) -> tuple[Overlap | None, Overlap | None]:
    """(overlap of what the first selector keeps of the first image and the second of the second, that of chance)."""
    kept, drawn = [], []
    for (label, selector), random, tokens in zip(named, chance, images, strict=True):
        try:
            keep = _kept(selector, tokens, budget)
        except ValueError as error:
            raise ValueError(f"{label} at keep={written(budget)}: {error}") from error
        kept.append(tokens.tiles_of(keep))
        # As many tokens as this choice has: with an adaptive budget, chance depends on the image.
        as_many = Budget(int(keep.sum()), budget.scope, budget.newlines)
        drawn.append(tokens.tiles_of(_kept(random, tokens, as_many)))
    return overlap_of(kept[0], kept[1], at), overlap_of(drawn[0], drawn[1], at)


def _kept(selector: TokenSelector, tokens: VisualTokens, budget: Budget) -> Bool[Tensor, "I L"]:
    with torch.no_grad():
        return selector(tokens, budget)


def _mean(overlaps: Sequence[Overlap | None]) -> Overlap | None:
    some = [each for each in overlaps if each is not None]
    return Overlap(*(sum(part) / len(some) for part in zip(*some, strict=True))) if some else None


def summarize(overlaps: Overlaps) -> list[dict[str, Any]]:
    """Means and bootstrap intervals over images; images of which no paired patch is kept do not count.

    Args:
        overlaps: as `measure` returns them.

    Returns:
        One row per selector, budget and change: number of images, figures and intervals, and the same for chance.
    """
    rows = []
    for (label, keep, change), each in overlaps.items():
        row: dict[str, Any] = {"selector": label, "keep": keep, "change": change}
        for name, part in (("", 0), ("chance_", 1)):
            some = [pair[part] for pair in each if pair[part] is not None]
            row[f"{name}images"] = len(some)  # of chance its own: a random choice may miss all pairs

            # One interval per figure, over the same images.
            for field in Overlap._fields:
                values = [getattr(one, field) for one in some]
                mean, low, high = bootstrap_mean(values) if values else (None, None, None)
                row |= {f"{name}{field}": mean, f"{name}{field}_interval": None if mean is None else [low, high]}
        rows.append(row)
    return rows


def markdown(result: Mapping[str, Any]) -> str:
    """The figures that `run` collects as Markdown, one table per task."""
    headers = ("selector", "keep", "change", "n", "Jaccard [95%]", "chance", "in common [95%]", "chance")
    lines = [f"# Stability of what is kept: {result['model']}"]
    for task in dict.fromkeys(row["task"] for row in result["rows"]):
        lines += ["", f"## {task}", "", "| " + " | ".join(headers) + " |", "|---" * len(headers) + "|"]
        for row in (row for row in result["rows"] if row["task"] == task):
            cells = [row["selector"], row["keep"], row["change"], str(row["images"])]
            for field in Overlap._fields:
                cells += [_written(row, field), _number(row[f"chance_{field}"])]
            lines.append("| " + " | ".join(cells) + " |")

    note = (
        "Kept patches of an image against those of the changed image (or of another training), where they lie in the "
        "image; 1 is the same. Jaccard: kept by both, of those kept by either; in common: share of the kept patches "
        "that the other keeps too; chance: two random choices of as many tokens. n: images; intervals: bootstrap over "
        "the images."
    )
    return "\n".join([*lines, "", note])


def _written(row: Mapping[str, Any], field: str) -> str:
    if row[field] is None:
        return "–"
    low, high = row[f"{field}_interval"]
    return f"{row[field]:.2f} [{low:.2f}, {high:.2f}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _seeds(settings: Mapping[str, Any]) -> dict[str, TokenSelector]:
    """The trainings of one recipe; none where none are named."""
    if not settings["seeds"]:
        return {}
    seeds = loading.load_selectors(settings["seeds"], loading.find_device(settings["device"]), settings["allow"])
    # Of one class at least: whether they share a recipe cannot be seen from here.
    kinds = dict.fromkeys(type(selector).__name__ for selector in seeds.values())
    if len(seeds) < 2 or len(kinds) > 1:
        raise UsageError(
            f"seeds must name at least two selectors of one class, got {', '.join(seeds)}: {', '.join(kinds)}"
        )
    return seeds
