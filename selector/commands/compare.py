"""`selector compare`: runs a comparison behind a progress bar, and prints its tables (also when interrupted)."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selector.base import TokenSelector
from selector.commands import loading
from selector.commands.common import (
    SMALL,
    choose,
    find_tasks,
    load_all,
    name_unreadable,
    positive,
    sample_limit,
    whole,
)
from selector.commands.large import place_of
from selector.commands.printing import print_report
from selector.commands.ranks import RankLost, Ranks
from selector.errors import UsageError
from selector.files import check_output
from selector.measure.batches import refusal
from selector.measure.protocol import Protocol
from selector.measure.run import Step, check_part, compare, sample_count, shard_range
from selector.records import WHOLE, Shard, add_time
from selector.tasks import PLACEHOLDER, Task

BATCH = 32
"""Prompts answered at once by a model of fewer than `SMALL` parameters; for a larger one memory and times decide."""


def run(settings: dict[str, Any]) -> int:
    """Runs a comparison, or what is left of it, and prints the tables of what is done.

    Under torchrun every process takes its part, and that of rank 0 prints and writes the report when all are done.

    Args:
        settings: by the names of ``DEFAULTS["compare"]`` in `selector.cli`; ``given`` lists those not left to the
            defaults, and ``shard`` and ``fresh`` may be among them.

    Returns:
        The exit code: 0, or 130 where the user interrupted the run.

    Raises:
        UsageError: a setting out of its range, a sample that cannot be measured, or another rank that is lost.
    """
    # Mistakes in the settings are errors before a model is loaded.
    samples = sample_limit(settings["samples"])
    budgets = loading.parse_budgets(settings["keep"], settings["scope"], settings["newlines"])
    shard = _shard(settings.get("shard"))
    # A shard that a flag asks for waits for nobody: its others may run tomorrow.
    team = shard if settings.get("shard") is None else WHOLE
    tasks = find_tasks("compare", settings["tasks"], settings["skip_unreadable"], quiet=team[0] > 0)
    tasks = _asked(settings, tasks)
    protocol = _protocol(settings)
    check_part(tasks, samples, shard, settings.get("fresh", False))
    if not settings["out"]:
        raise UsageError("out must be the name of a folder, got ''")
    out = Path(settings["out"])
    check_output(out)
    selectors = choose(settings)
    baseline = _baseline(settings, selectors)

    with Ranks(out, team, _timeout(settings["rank_timeout"])) as ranks:
        # A stray RANK in the environment would otherwise make a partial run in silence.
        if team != WHOLE and ranks.leads:
            _announce(shard)

        # Batches of a small model are worth the threads that single prompts are not: those that torch would use itself.
        threads = torch.get_num_threads() if settings["threads"] is None else None
        model, processor, selectors = load_all(settings, selectors)
        protocol = _batched(protocol, model, settings["batch_size"], quiet=not ranks.leads)

        # Lazy: nothing is measured until the steps are taken one by one.
        steps = compare(
            model,
            processor,
            selectors,
            budgets,
            tasks,
            out,
            protocol=protocol,
            samples=samples,
            shard=shard,
            baseline=baseline,
            fresh=settings.get("fresh", False),
            model_name=str(settings["model"]),
            workers=_workers(settings["workers"]),
            batch_threads=threads if protocol.batch_size > 1 else None,
        )

        # A record per sample and row; the unpruned model and, with answers, the blind one are rows too. Rank 0 shows
        # how far all ranks are.
        rows = len(selectors) * len(budgets) + 1 + int(settings["answers"])
        shown = shard if team == WHOLE else WHOLE
        sizes = {task.name: len(range(*shard_range(shown, sample_count(task, samples)))) * rows for task in tasks}
        return _report(out, shard, ranks, lambda: _watch(steps, tasks, sizes, ranks))


def _report(out: Path, shard: Shard, ranks: Ranks, watch: Callable[[], bool]) -> int:
    """Drives the run, and prints the tables of what is done whatever became of the other ranks; the exit code."""
    lost: RankLost | None = None
    interrupted = False
    try:
        interrupted = watch()
    except RankLost as error:
        lost = error

    if ranks.leads:
        start = time.perf_counter()
        print_report([out])
        add_time(out, shard, {"report": time.perf_counter() - start})
    if lost is not None:
        raise UsageError(f"{lost}; the same command goes on from what is done") from lost
    if interrupted and ranks.leads:
        print("interrupted: the table shows what is done; the same command goes on from here", file=sys.stderr)
    return 130 if interrupted else 0


def _protocol(settings: dict[str, Any]) -> Protocol:
    """How each sample is measured, every setting within its range."""
    layer = whole("layer", settings["layer"])
    if layer < 0:
        raise UsageError(f"layer must be >= 0, got {layer}")
    return Protocol(
        seed=whole("seed", settings["seed"]),
        answers=settings["answers"],
        max_new_tokens=positive("max_new_tokens", settings["max_new_tokens"]),
        positions=loading.check_positions(settings["positions"]),
        layer=layer,
        repeats=positive("repeats", settings["repeats"]),
    )


def _batched(protocol: Protocol, model: Any, size: int | None, quiet: bool) -> Protocol:
    """The protocol with a batch size: that of the command line, or one by the model's size; 1 where it must be."""
    if size is None:
        size = BATCH if sum(weight.numel() for weight in model.parameters()) < SMALL else 1
    reason = refusal(model) if size > 1 else None
    if reason is not None and not quiet:
        print(f"selector compare: one prompt at a time instead of {size} at once, since {reason}", file=sys.stderr)
    return replace(protocol, batch_size=size if reason is None else 1)


def _workers(value: Any) -> int:
    if whole("workers", value) < 0:
        raise UsageError(f"workers must be >= 0, got {value}")
    return value


def _timeout(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise UsageError(f"rank_timeout must be a number of seconds above 0, got {value!r}")
    return float(value)


def _asked(settings: dict[str, Any], tasks: list[Task]) -> list[Task]:
    """The tasks with the suffix and the system turn of the command line in place of their own, where it gives any."""
    wording = {name: settings[name] for name in ("suffix", "system") if settings[name] is not None}
    for name, text in wording.items():
        if PLACEHOLDER in text:
            raise UsageError(f"{name} must not hold {PLACEHOLDER}, which stands for the image, got {text!r}")
    return [replace(task, **wording) for task in tasks]


def _baseline(settings: dict[str, Any], selectors: Mapping[str, TokenSelector]) -> str | None:
    """The label of the baseline; None where the default one is not among the selectors, which is no mistake."""
    baseline = settings["baseline"]
    if baseline in selectors:
        return baseline
    # Only a baseline that the user named must be there.
    if "baseline" in settings["given"] and baseline is not None:
        raise UsageError(f"baseline must be one of the selectors {', '.join(selectors)}, got {baseline!r}")
    return None


def _announce(shard: Shard) -> None:
    """Names the environment variables that made this process take a part, since no flag asked for one."""
    print(
        f"selector compare: RANK={shard[0]} and WORLD_SIZE={shard[1]} in the environment: this process takes shard "
        f"{shard[0]}/{shard[1]} of the samples and waits for the other ranks; --shard 0/1 takes them all",
        file=sys.stderr,
    )


def _watch(steps: Iterator[Step], tasks: list[Task], sizes: dict[str, int], ranks: Ranks) -> bool:
    """Drives the run behind progress bars, one per task, until all ranks are done; True if the user interrupted it."""
    text = TextColumn("{task.description:<12} {task.fields[seen]}", markup=False)
    clock = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(compact=True, elapsed_when_finished=True))

    # Of the task at work: whether answers were right, unpruned and pruned, and the shares of tokens that stayed.
    right: dict[str, list[float]] = {"full": [], "pruned": []}
    shares: list[float] = []

    with Progress(text, *clock, console=Console(stderr=True), disable=not ranks.leads) as progress:
        bars = {name: progress.add_task(name, total=size, seen="") for name, size in sizes.items()}
        current = None
        try:
            for step in steps:
                # Tasks run one after the other; each has figures of its own.
                if step.task != current:
                    right, shares, current = {"full": [], "pruned": []}, [], step.task

                record = step.record
                # The blind reference has no tokens, and its accuracy is no measure of the model's.
                if step.row.label != "blind":
                    if "correct" in record:
                        score = float(record.get("score", record["correct"]))
                        right["pruned" if step.row.selector else "full"].append(score)
                    if step.row.selector and "tokens" in record:
                        shares.append(record["tokens"] / max(1, record["full_tokens"]))

                progress.update(bars[step.task], completed=ranks.advance(step.task), seen=_so_far(right, shares))

            def others() -> None:
                for name, bar in bars.items():
                    progress.update(bar, completed=ranks.steps(name))

            ranks.wait(others)
            others()
        # Every finished record is on disk: an interrupted run is reported like a finished one.
        except KeyboardInterrupt:
            ranks.stop("interrupted")
            return True

    if ranks.leads:
        name_unreadable(tasks)
    return False


def _so_far(right: dict[str, list[float]], shares: list[float]) -> str:
    """The figures so far, next to a bar: "full 81% · pruned 74% · kept 25%"."""
    parts = [f"{name} {100 * sum(hits) / len(hits):.0f}%" for name, hits in right.items() if hits]
    if shares:
        parts.append(f"kept {100 * sum(shares) / len(shares):.0f}%")
    return " · ".join(parts)


def _shard(value: Any) -> Shard:
    """A shard such as "1/4" as numbers; without one, the rank that torchrun or accelerate gave this process, if any."""
    if value is None:
        rank, number = place_of("RANK", 0), place_of("WORLD_SIZE", 1)
        if rank >= number:
            raise UsageError(
                f"the environment variable RANK must be below WORLD_SIZE, got RANK={rank} and WORLD_SIZE={number}; "
                "unset them"
            )
        return rank, number

    # ASCII digits only: int takes those of other scripts, too.
    match = re.fullmatch(r"(\d+)/(\d+)", str(value), re.ASCII)
    if not match or int(match[1]) >= int(match[2]):
        raise UsageError(f"shard must be i/n with 0 <= i < n, such as 0/2 and 1/2, got {value!r}")
    return int(match[1]), int(match[2])
