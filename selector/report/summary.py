"""The figures of a run: a pure function of its files (``run.json`` and the predictions it names).

Shares have a 95% Wilson interval. Means, and every difference (to the unpruned model, and to the baseline selector at
the same task and budget), have that of a seeded bootstrap over the samples that both have. Changed answers have an
exact McNemar test, with p values also adjusted (Holm) for the number of tests in the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from selector.errors import UsageError
from selector.files import output, write_json, write_text
from selector.record import METRICS, Record, check, summed_by
from selector.records import FLIPS, RUN, read_folder, read_time, seeing_question
from selector.report.columns import POOLED, is_auto, share_of
from selector.report.page import render
from selector.report.page.explorer import changed_answers, explorer
from selector.report.statistics import (
    bootstrap_mean,
    f1,
    holm,
    mcnemar,
    mean,
    median,
    paired_bootstrap,
    paired_score,
    samples_to_see,
    spearman,
    spearman_interval,
    wilson,
)
from selector.report.tables import markdown

Tables = dict[tuple[str, str, str | None], list[Record]]
SHARES = {"accuracy": "correct", "agreement": "agrees"}
"""Name of a share in tables, and the field of a record whose share it is."""
SHIFTS = ("ipr_shift", "rank_shift", "energy_shift")
REPORT_HTML, RESULTS = "report.html", "results.json"


def summarize(run: Path) -> dict[str, Any]:
    """The figures of a run.

    Args:
        run: a folder that `selector compare` wrote.

    Returns:
        The plan of the run, with figures as ``rows`` (one per task, selector and budget), ``pooled``,
        ``correlations`` (of the spectral shifts with agreement), ``spent`` (seconds by phase) and what is
        ``unfinished`` by task. Pooled are the rows over all tasks together, where a budget is a share on average
        (``auto:0.2``), which it keeps over all tasks only.

    Raises:
        UsageError: no run there, one of an older format, or broken records.
    """
    settings, tables = read_run(run)
    baseline, seeing = settings["baseline"], seeing_question(settings)
    metrics = {task: about["metric"] for task, about in settings["tasks"].items() if "metric" in about}
    rows = _rows(tables, baseline, seeing, metrics)

    # A share on average holds over all tasks only, so only then are they pooled.
    averaged = any(is_auto(row) for row in rows) and len(settings["tasks"]) > 1
    return {name: value for name, value in settings.items() if name != "rows"} | {
        "rows": rows,
        "pooled": _rows(_pooled(tables), baseline, seeing, {POOLED: "mixed"} if metrics else {}) if averaged else [],
        "correlations": _correlations(rows),
        "spent": read_time(run),
        "unfinished": {task: lacks for task in settings["tasks"] if (lacks := _unfinished(settings, tables, task))},
    }


def _unfinished(settings: Mapping[str, Any], tables: Tables, task: str) -> dict[str, Any] | None:
    """What a task lacks: samples done and asked for, by shard, and the rows that lack most; None if it is whole."""
    about = settings["tasks"][task]
    rows = {(label, keep): records for (of, label, keep), records in tables.items() if of == task}
    # Runs of an older version do not say how many samples a task has.
    if about.get("samples") is None or not rows:
        return None
    # Images that cannot be read have no records, and not for want of time.
    wanted = range(about["samples"] - len(settings["unreadable"].get(task, [])))
    there = [{record["index"] for record in records} for records in rows.values()]
    missing = set(wanted).difference(set.intersection(*there))
    if not missing:
        return None

    shards = _shards(settings)
    parts = {f"{i}/{shards}": wanted[i::shards] for i in range(shards)}
    counts = {row: len(indices) for row, indices in zip(rows, there, strict=True)}
    return {
        "done": [min(counts.values()), max(counts.values())],
        "of": about["samples"],
        "shards": [[name, len(missing.intersection(part)), len(part)] for name, part in parts.items() if shards > 1],
        "fewest": [[label, keep, n] for (label, keep), n in counts.items() if n == min(counts.values())],
    }


def _shards(settings: Mapping[str, Any]) -> int:
    """How many shards share a run; one of an older version names that which wrote its plan last."""
    older = re.fullmatch(r"\d+/(\d+)", str(settings.get("shard")))
    return int(older[1]) if older else settings.get("shards", 1)


def _rows(
    tables: Tables, baseline: str | None, seeing: frozenset[str], metrics: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The figures of every row; budgets of one share (0.2 and auto:0.2) are next to each other.

    Args:
        metrics: of the tasks that are not scored by exact match.
    """
    rows = []
    for (task, label, keep), records in tables.items():
        # What a row is compared with: the baseline at its budget, and for an average share the same share per image.
        against = tables.get((task, baseline or "", keep)) if label != baseline and keep else None
        fixed = tables.get((task, label, share_of(keep))) if keep and share_of(keep) != keep else None
        versus = {
            "versus_full": _difference(records, _unpruned(records)) if keep else None,
            "versus_baseline": _difference(records, against) if against else None,
            "versus_fixed": _difference(records, fixed) if fixed else None,
        }
        row = {"task": task, "selector": label, "keep": keep, "sees_question": label in seeing}
        scored = _scored(records, metrics[task]) if task in metrics else {}
        rows.append(row | _figures(records) | scored | versus)

    # One family of tests per question asked: each column of differences is adjusted for all of its rows.
    for versus in ("versus_full", "versus_baseline", "versus_fixed"):
        tested = [row[versus] for row in rows if row[versus] is not None]
        for comparison, adjusted in zip(tested, holm([each["p"] for each in tested]), strict=True):
            comparison |= {"p_holm": adjusted, "tests": len(tested)}

    # In the order of the run, but for shares on average, which go where their share is.
    places: dict[tuple[str, str | None], int] = {}
    for row in rows:
        places.setdefault((row["task"], share_of(row["keep"])), len(places))
    return sorted(rows, key=lambda row: places[row["task"], share_of(row["keep"])])


def _pooled(tables: Tables) -> Tables:
    """The records of every selector and budget over all tasks, over which a share on average is an average."""
    pooled: Tables = {}
    for (task, label, keep), records in tables.items():
        # Records are paired by id, and tasks may use the same ones.
        named = [cast(Record, {**record, "id": f"{task}/{record['id']}"}) for record in records]
        pooled.setdefault((POOLED, label, keep), []).extend(named)
    return pooled


def read_run(run: Path) -> tuple[dict[str, Any], Tables]:
    """What a run is, and its records.

    A budget that some image could not meet has no figure that could be compared with others': such rows are left out,
    and listed in the plan as ``unmet``.

    Returns:
        (the plan from ``run.json``, the records by task, label and budget).

    Raises:
        UsageError: no run there, one of an older format, or broken records.
    """
    if not (run / RUN).is_file():
        raise UsageError(f"run must be a folder that `selector compare` wrote, {run / RUN} does not exist")

    settings = _read_settings(run / RUN)
    limit = settings["samples"]
    tables, unmet = {}, []
    for row in settings["rows"]:
        records = [_checked(record, run / row["key"]) for record in read_folder(run / row["key"])]
        # An earlier, longer run may have left more records than this one asked for.
        within = [record for record in records if limit is None or record["index"] < limit]
        least = [record["unmet"] for record in within if "unmet" in record]
        if least:
            about = {"task": row["task"], "selector": row["label"], "keep": row["keep"], "least": max(least)}
            unmet.append(about | {"images": len(least), "samples": len(within)})
        else:
            tables[row["task"], row["label"], row["keep"]] = within
    return settings | {"unmet": unmet}, tables


def _read_settings(path: Path) -> dict[str, Any]:
    """The plan of a run, with all that a report reads from it."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"run must be a folder that `selector compare` wrote, {path} is not JSON ({error})") from error

    if isinstance(settings, dict) and settings and "environment" not in settings:
        raise UsageError(f"run must be of this version, {path} is older: run the same `selector compare` again")

    # Checked here once, so that nothing below needs to doubt it: a run can be edited or half copied.
    kinds: dict[str, type | tuple[type, ...]] = {
        **{"model": str, "seed": int, "layer": int, "positions": str, "environment": dict, "tasks": dict},
        **{"unreadable": dict, "rows": list, "samples": (int, type(None)), "baseline": (str, type(None))},
    }
    if not isinstance(settings, dict):
        raise UsageError(f"run must be a folder that `selector compare` wrote, {path} holds {settings!r:.80}")
    for name, kind in kinds.items():
        if name not in settings or not isinstance(settings[name], kind):
            raise UsageError(f"run must be whole, {path} has {settings.get(name)!r:.80} as {name}")

    if type(settings.get("batch_size", 1)) is not int:
        raise UsageError(f"run must be whole, {path} has {settings['batch_size']!r:.80} as batch_size")

    # The key of a row is the name of a folder: anything but hexadecimal digits could lead out of the run.
    for row in settings["rows"]:
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("task", "label", "key")):
            raise UsageError(f"run must be whole, {path} has {row!r:.80} among its rows")
        if row["task"] not in settings["tasks"] or not re.fullmatch(r"[0-9a-f]+", row["key"]):
            raise UsageError(f"run must be whole, {path} has {row!r:.80} among its rows")
        if not isinstance(row.get("keep"), (str, type(None))):
            raise UsageError(f"run must be whole, {path} has {row!r:.80} among its rows")

    for name, about in settings["tasks"].items():
        if not isinstance(about, dict) or not {"fingerprint", "anls"} <= about.keys():
            raise UsageError(f"run must be whole, {path} has {about!r:.80} as task {name!r}")
        if about.get("metric", "exact") not in METRICS:
            raise UsageError(f"run must be whole, {path} has {about['metric']!r:.80} as metric of task {name!r}")
    missing = {"torch", "transformers", "device", "threads", "dtype"} - settings["environment"].keys()
    if missing or settings["positions"] not in ("contiguous", "original"):
        raise UsageError(f"run must be whole, {path} lacks {', '.join(sorted(missing)) or 'positions'}")
    return settings


def _checked(record: Record, folder: Path) -> Record:
    """The record, if it has all that a report reads of it, each with the type that it was written with."""
    wanted = ["full_tokens"] if "unmet" in record else ["tokens", "full_tokens"]
    # A run without answers has neither.
    if "answer" in record:
        wanted += ["question", "agrees"]
    if "correct" in record:
        wanted += ["full_correct", "flip", "anls", "full_anls"]
    if "score" in record:
        wanted += ["correct", "full_score"]

    try:
        check(record)
        for name in wanted:
            if record.get(name) is None:
                raise ValueError(f"a record must have {name}")
    except ValueError as error:
        raise UsageError(
            f"{folder}: the record of sample {record['id']!r:.80} {str(error).removeprefix('a record ')}; "
            "delete the folder and run the same `selector compare` again"
        ) from error
    return record


def _figures(records: Sequence[Record]) -> dict[str, Any]:
    def values(name: str) -> list[Any]:
        return [record[name] for record in records if record.get(name) is not None]

    # A figure that no record has is None: some samples have no boxes, no answer, or no second token.
    figures: dict[str, Any] = {"samples": len(records), "saturated": sum(values("saturated"))}
    for name, field in SHARES.items():
        hits = values(field)
        figures |= {name: mean(hits), f"{name}_interval": list(wilson(sum(hits), len(hits))) if hits else None}
    for name in summed_by("interval"):
        some = values(name)
        figures |= {name: mean(some), f"{name}_interval": list(bootstrap_mean(some)[1:]) if some else None}

    flips = values("flip")
    peak = values("peak_bytes")  # the highest of any sample: memory must hold that one, too
    return (
        figures
        | {name: mean(values(name)) for name in summed_by("mean")}
        | {name: median(values(name)) for name in summed_by("median")}
        | {"flips": {name: flips.count(name) for name in FLIPS} if flips else None}
        | {"evidence_samples": len(values("evidence")), "peak_bytes": max(peak) if peak else None}
    )


def _scored(records: Sequence[Record], metric: str) -> dict[str, Any]:
    """What a metric that is not exact match says in place of a share: the mean score, and what belongs to it."""
    answered = [record for record in records if "correct" in record]
    values = [_score(record) for record in answered]
    figures: dict[str, Any] = {"metric": metric, "accuracy": mean(values)}
    figures["accuracy_interval"] = list(bootstrap_mean(values)[1:]) if values else None

    if metric == "yes_no" and answered:
        # What is not a no is a yes to POPE, so that a wrong answer says the other word than the reference.
        wanted = [str(record.get("target")).strip().lower() == "yes" for record in answered]
        figures["f1"] = f1([(yes, yes == record["correct"]) for yes, record in zip(wanted, answered, strict=True)])
    if metric == "mme":
        figures["paired"] = paired_score([(r["group"], _score(r)) for r in answered if "group" in r])
    return figures


def _score(record: Record) -> float:
    """How right an answer is: by the task's metric, or 1 and 0 where it is right or wrong."""
    return float(record.get("score", record["correct"]))


def _unpruned(records: Sequence[Record]) -> list[Record]:
    """The unpruned model's records on the same samples, which every pruned record carries."""
    unpruned = []
    for r in records:
        if "correct" in r:
            record = Record(id=r["id"], index=r["index"], correct=r["full_correct"], anls=r["full_anls"])
            if "score" in r:
                record["score"] = r["full_score"]
            unpruned.append(record)
    return unpruned


def _difference(records: Sequence[Record], against: Sequence[Record]) -> dict[str, Any] | None:
    """Ours minus theirs over the samples that both have: accuracy (or score) first, then whatever else both measured.

    McNemar's test is of right and wrong, whatever the metric.
    """
    # Paired by id: one of two rows may be unfinished.
    other = {record["id"]: record for record in against}
    pairs = [(r, other[r["id"]]) for r in records if r["id"] in other]

    answered = [(a["correct"], b["correct"]) for a, b in pairs if "correct" in a and "correct" in b]
    if not answered:
        return None

    # Accuracy or score: the difference, and how many answers changed side for and against.
    ours, theirs = ([_score(pair[i]) for pair in pairs if all("correct" in each for each in pair)] for i in (0, 1))
    gap, low, high = paired_bootstrap(ours, theirs)
    broken = sum(b and not a for a, b in answered)
    fixed = sum(a and not b for a, b in answered)
    result: dict[str, Any] = {"difference": gap, "interval": [low, high], "pairs": len(answered)}
    result |= {"broken": broken, "fixed": fixed, "p": mcnemar(broken, fixed)}
    result["samples_for_a_point"] = samples_to_see([a - b for a, b in zip(ours, theirs, strict=True)])

    # The others have no test: their intervals stand alone.
    for name in ("anls", "agrees", "evidence", "nll_shift"):
        both = [(a[name], b[name]) for a, b in pairs if a.get(name) is not None and b.get(name) is not None]
        if both:
            gap, low, high = paired_bootstrap([a for a, _ in both], [b for _, b in both])
            result[name] = {"difference": gap, "interval": [low, high]}
    return result


def _correlations(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rank correlation of the size of each spectral shift with agreement: over the rows of selectors that act before
    the language model, then per task."""
    results = []
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    # None stands for all tasks together; with a single task both would be the same.
    for task in (None, *(tasks if len(tasks) > 1 else [])):
        for shift in SHIFTS:
            # References select nothing, and are no points; where tokens leave inside, the shift is of another layer.
            points = [
                (abs(r[shift]), r["agreement"])
                for r in rows
                if r["keep"] and task in (None, r["task"]) and None not in (r[shift], r["agreement"])
                if r["last_tokens"] is None
            ]
            rank = spearman([x for x, _ in points], [y for _, y in points])
            interval = None if rank is None else spearman_interval(rank, len(points))
            results.append({"task": task, "shift": shift, "rank": rank, "interval": interval, "points": len(points)})
    return results


def write_report(runs: Sequence[Path], out: Path | None = None) -> tuple[list[dict[str, Any]], Path]:
    """Writes the report of all runs as HTML and Markdown.

    Args:
        runs: folders that `selector compare` wrote.
        out: the HTML file; only it and the Markdown next to it are written, so that a read-only run can be reported.
            None writes ``report.html`` into the first run, and ``results.json`` into every run.

    Returns:
        (the summary of each run, the path of the page).

    Raises:
        UsageError: a folder that is no run or is named twice, or a place that cannot be written to.
    """
    # Everything is read before anything is written.
    names = run_names(runs)
    summaries = [summarize(run) for run in runs]
    for run, summary in zip(runs, summaries, strict=True):
        # `results.json` belongs to its run.
        if out is None:
            with output(run / RESULTS):
                write_json(run / RESULTS, summary)

    target = out or runs[0] / REPORT_HTML
    pages = dict(zip(names, summaries, strict=True))
    shown = explorer({name: (run, *read_run(run)) for name, run in zip(names, runs, strict=True)})
    with output(target):
        write_text(target.with_suffix(".md"), f"{markdown(pages)}\n\n{changed_answers(shown)}")
        write_text(target, render(pages, shown))
    return summaries, target


def run_names(runs: Sequence[Path]) -> list[str]:
    """What a report calls its runs: the names of their folders, or their paths where two have one name.

    Raises:
        UsageError: no run, or one folder twice.

    Example:
        >>> from pathlib import Path
        >>> run_names([Path("runs/first"), Path("runs/second")])
        ['first', 'second']
    """
    if not runs:
        raise UsageError("run must name at least one folder, got none")
    for i, run in enumerate(runs):  # resolved: one folder may be written in two ways
        if run.resolve() in [other.resolve() for other in runs[:i]]:
            raise UsageError(f"run must name each folder once, {run} is there twice")
    names = [run.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run) for run in runs]
