"""Standings: every selector against every other at equal measured tokens, from a run or from its distilled data.

    python -m selector.report.standings runs/standings --out configs/compare/standings.json
    python -m selector.report.standings configs/compare/standings.json
    python -m selector.report.standings runs/one runs/two --out both.json

The first line distils a run (what each row got right, sample by sample) into one small file, the second prints the
table in Markdown, the third joins runs of different selectors on the same questions. Two selectors meet once per task
and budget, on the same questions: the better one wins where an exact McNemar test over those questions gives p < 0.05,
else they tie. Selectors that see the question have a table of their own and meet only each other, since a choice that
knows what is asked is another kind of choice. So have those whose budget counts the tokens behind their last layer
(``count=after``), which see more of them on average. A row that some image could not meet is left out.

Equal tokens on average are not equal work, since attention is quadratic. Where the prefill's operations are known
and rows differ in them at equal budgets, a second ranking has everybody meet everybody at equal operations, see
`flops_standings`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from selector.errors import UsageError
from selector.files import output, write_json
from selector.record import Record
from selector.records import seeing_question
from selector.report.columns import LEGEND, marked
from selector.report.statistics import mcnemar
from selector.report.summary import read_run

Data = dict[str, Any]
COSTS = ("prefill_flops", "selector_flops", "decode_flops", "kv_bytes", "last_tokens")
"""Fields of a record whose means are distilled."""
AVERAGE = (
    " A budget counts visual tokens averaged over the layers of the language model: a selector that acts inside it "
    "keeps fewer behind its layer than one that acts before it."
)
AFTER = (
    "keep counts the visual tokens behind the last layer where they leave (`count=after`); in brackets, what that is "
    "on average over the layers. These selectors meet each other only."
)
EQUAL = (
    "At equal FLOPs of the prefill (by formula, without the selector's own): a row meets, of every rival, the row with "
    "the fewest FLOPs that are not fewer than its own. won: better with no more work; lost: a rival's row was better "
    "with no more work; tied: neither, also where the costlier of two rows is better. All selectors meet here."
)


def distil(run: Path) -> Data:
    """The little of a run that standings need.

    Args:
        run: a folder that `selector compare` wrote.

    Returns:
        Model, seed and rows; in each, ``right`` and ``same`` have a 1 or 0 per sample, by its index, and costs
        (`COSTS`, ``tokens_per_layer``) are means. ``unmet`` lists the budgets that some image could not meet.

    Raises:
        UsageError: no run there, or a row without answers.
    """
    settings, tables = read_run(run)
    seeing = seeing_question(settings)
    after = {row["label"] for row in settings["rows"] if row.get("count") == "after"}
    rows = []
    for (task, label, keep), records in tables.items():
        # By index, so that entry i of any two rows is the same question.
        answered = sorted((r for r in records if "correct" in r), key=lambda r: r["index"])
        if not answered:
            raise UsageError(f"standings need answers, {label} on {task} has none")
        rows.append(
            {
                "task": task,
                "selector": label,
                "keep": keep,
                "sees_question": label in seeing,
                "tokens": sum(r["tokens"] for r in answered) / len(answered),
                "anls": round(sum(r["anls"] for r in answered) / len(answered), 4),
                "right": "".join(str(int(r["correct"])) for r in answered),
                "same": "".join(str(int(r["agrees"])) for r in answered),
                **({"count": "after"} if label in after else {}),
                **_costs(answered),
            }
        )
    unmet = {"unmet": settings["unmet"]} if settings["unmet"] else {}
    return {"model": settings["model"], "seed": settings["seed"], "rows": rows} | unmet


def _costs(records: Sequence[Record]) -> dict[str, Any]:
    """Means of what a row costs, in whole numbers: of the figures that all of its records have."""
    costs: dict[str, Any] = {}
    for name in COSTS:
        values = [record[name] for record in records if record.get(name) is not None]
        if len(values) == len(records):
            costs[name] = round(sum(values) / len(values))
    layers = [record["tokens_per_layer"] for record in records if "tokens_per_layer" in record]
    if layers:
        costs["tokens_per_layer"] = [round(sum(own) / len(own), 1) for own in zip(*layers, strict=True)]
    return costs


def joined(parts: Sequence[Data]) -> Data:
    """Several runs as one: other selectors on the same questions of the same model.

    Raises:
        UsageError: another model or seed, unpruned answers that differ, or a row that is in two of the runs.
    """
    first = parts[0]
    rows = {(row["task"], row["selector"], row["keep"]): row for row in first["rows"]}
    for part in parts[1:]:
        for name in ("model", "seed"):
            if part[name] != first[name]:
                raise UsageError(f"runs to join must have one {name}, got {first[name]!r} and {part[name]!r}")
        for row in part["rows"]:
            # A row in two runs would be counted twice.
            key = row["task"], row["selector"], row["keep"]
            shared = row["keep"] is None  # unpruned and blind are in every run, and must agree there
            if key in rows and not (shared and rows[key]["right"] == row["right"]):
                fault = "was answered otherwise in another" if shared else "is in two of the runs"
                raise UsageError(f"runs to join must not clash: {row['selector']} on {row['task']} {fault}")
            rows.setdefault(key, row)
    unmet = [each for part in parts for each in part.get("unmet", [])]
    return {**first, "rows": list(rows.values())} | ({"unmet": unmet} if unmet else {})


def standings(data: Data, sees_question: bool = False, after: bool = False) -> list[dict[str, Any]]:
    """The table of standings, one row per selector, the best first.

    Args:
        data: as `distil` or `joined` returns it.
        sees_question: rank the selectors that see the question, or those that do not; they meet their own kind alone.
            Data distilled before this was recorded holds none that do.
        after: rank those whose budget counts the tokens behind their last layer.

    Returns:
        By selector, its accuracy at every budget as a share of the unpruned one (both means over tasks; None where it
        has no row on some task), the share of answers that stayed the same (where it was recorded), and the meetings
        won, tied and lost.

    Raises:
        UsageError: selectors with different numbers of samples.
    """
    right = {(row["task"], row["keep"], row["selector"]): row["right"] for row in data["rows"]}
    tasks = list(dict.fromkeys(task for task, _, _ in right))
    keeps = list(dict.fromkeys(keep for _, keep, _ in right if keep))
    kind = [
        row
        for row in data["rows"]
        if row["keep"] and row.get("sees_question", False) == sees_question and (row.get("count") == "after") == after
    ]
    names = list(dict.fromkeys(row["selector"] for row in kind))
    table = {name: {"selector": name, "won": 0, "tied": 0, "lost": 0} for name in names}

    # Every two selectors meet once per task and budget.
    for task in tasks:
        for keep in keeps:
            here = [name for name in names if (task, keep, name) in right]
            for a, b in combinations(here, 2):
                _count(table[a], table[b], _better(a, b, right[task, keep, a], right[task, keep, b]))

    # The mean over tasks, not over questions: a task with more questions does not count more.
    for name in names:
        for keep in keeps:
            full = sum(_share(right[task, None, "full"]) for task in tasks)
            own = [_share(right[task, keep, name]) for task in tasks if (task, keep, name) in right]
            table[name][keep] = sum(own) / full if len(own) == len(tasks) else None
        same = [_share(row["same"]) for row in kind if row["selector"] == name and "same" in row]
        if same:
            table[name]["same"] = sum(same) / len(same)
    return sorted(table.values(), key=lambda row: (row["lost"] - row["won"], row["selector"]))


def flops_standings(data: Data) -> list[dict[str, Any]]:
    """The ranking at equal operations of the prefill, the best first.

    Selectors meet task by task. A row meets, of every rival, the row with the fewest operations that are not fewer than
    its own, and wins where it is better: with as much work or less. That the costlier of two rows is better says
    nothing: such a meeting is tied, and so is one that chance may explain. A rival without such a row is not met.
    Whether a selector sees the question, and what its budget counts, is no matter here.

    Returns:
        By selector: ``sees_question``, and the meetings won, tied and lost (to a rival's row with no more operations);
        empty where operations are unknown, or are the same for all rows of a budget.

    Raises:
        UsageError: selectors with different numbers of samples.
    """
    rows = [row for row in data["rows"] if row["keep"]]
    each = {(row["task"], row["keep"]): set() for row in rows}
    for row in rows:
        each[row["task"], row["keep"]].add(row.get("prefill_flops"))
    if any(None in flops for flops in each.values()) or all(len(flops) == 1 for flops in each.values()):
        return []

    table = {
        row["selector"]: {
            **{"selector": row["selector"], "sees_question": row.get("sees_question", False)},
            **{"won": 0, "tied": 0, "lost": 0},
        }
        for row in rows
    }
    for task in dict.fromkeys(row["task"] for row in rows):
        curves: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["task"] == task:
                curves.setdefault(row["selector"], []).append(row)
        for a, b in combinations(curves, 2):
            for ours, theirs in _pairs(curves[a], curves[b]):
                better = _better(a, b, ours["right"], theirs["right"])
                ahead = ours["prefill_flops"] - theirs["prefill_flops"]
                # Better by more work is no win.
                _count(table[a], table[b], 0 if better * ahead > 0 else better)
    return sorted(table.values(), key=lambda row: (row["lost"] - row["won"], row["selector"]))


def _pairs(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows of two selectors that meet: each with the other's nearest in operations not below it; a pair once."""
    pairs = []
    for rows, rivals, swapped in ((ours, theirs, False), (theirs, ours, True)):
        for row in rows:
            above = [rival for rival in rivals if rival["prefill_flops"] >= row["prefill_flops"]]
            if above:
                rival = min(above, key=lambda rival: rival["prefill_flops"])
                pair = (rival, row) if swapped else (row, rival)
                pairs += [] if pair in pairs else [pair]
    return pairs


def _better(name: str, other: str, a: str, b: str) -> int:
    """Who is better: 1 the first, -1 the second, 0 where chance may explain it.

    Args:
        name, other: of the two, for errors.
        a, b: their right answers, 1 or 0 per question.
    """
    if len(a) != len(b):
        raise UsageError(f"standings need equal samples, {name} has {len(a)}, {other} {len(b)}")

    # Questions that both or neither got right say nothing about who is better.
    pairs = list(zip(a, b, strict=True))
    only_a, only_b = pairs.count(("1", "0")), pairs.count(("0", "1"))
    # Not adjusted for the number of meetings: standings describe a run, they do not claim a single pair.
    if mcnemar(only_a, only_b) >= 0.05:
        return 0
    return 1 if only_a > only_b else -1


def _count(ours: dict[str, Any], theirs: dict[str, Any], better: int) -> None:
    """Counts one meeting in the rows of both."""
    if better == 0:
        ours["tied"] += 1
        theirs["tied"] += 1
        return
    winner, loser = (ours, theirs) if better > 0 else (theirs, ours)
    winner["won"] += 1
    loser["lost"] += 1


def _share(right: str) -> float:
    return right.count("1") / len(right)


def markdown(data: Data) -> str:
    """The standings as Markdown, below a line on what they were measured on.

    A table of the selectors that do not see the question, where there are any one of those that do, the same of those
    whose budget counts what is left behind their last stage, and the ranking at equal operations.
    """
    unseeing, seeing = standings(data), standings(data, sees_question=True)
    after, after_seeing = standings(data, after=True), standings(data, sees_question=True, after=True)
    inside = any("tokens_per_layer" in row for row in data["rows"])
    equal = flops_standings(data)
    full = [f"{r['task']} {100 * _share(r['right']):.0f}" for r in data["rows"] if r["selector"] == "full"]
    samples = len(data["rows"][0]["right"])
    same = " same: answers that stayed the same, %, over all tasks and budgets;" if "same" in data["rows"][0] else ""
    within = ", between selectors of one table only" if seeing or after or after_seeing else ""

    lines = [
        f"{Path(data['model']).name}, {samples} questions per task; unpruned, right %: {', '.join(full)}. At each "
        f"budget mean accuracy over the tasks, as % of the unpruned model's;{same} meetings over tasks "
        f"and budgets{within}.{AVERAGE if inside else ''}",
    ]

    if unseeing:
        lines += ["", *_table(unseeing, False)]
    if seeing:
        lines += ["", LEGEND, "", *_table(seeing, True)]
    tokens = _mean_tokens(data)
    if after or after_seeing:
        lines += ["", AFTER, *([f"\n{LEGEND}"] if after_seeing and not seeing else [])]
        lines += [
            line
            for own, sees in ((after, False), (after_seeing, True))
            if own
            for line in ("", *_table(own, sees, tokens))
        ]
    if equal:
        lines += ["", EQUAL, "", "| selector | won | tied | lost |", "|---|---|---|---|"]
        lines += [
            f"| {marked(row['selector'], row['sees_question'])} | {row['won']} | {row['tied']} | {row['lost']} |"
            for row in equal
        ]
    lines += [""] if data.get("unmet") else []
    lines += [_unmet(*each) for each in _unmet_rows(data)]
    return "\n".join(lines)


def _mean_tokens(data: Data) -> dict[tuple[str, str], float]:
    """Visual tokens averaged over layers, questions and tasks, by selector and budget."""
    tokens: dict[tuple[str, str], list[float]] = {}
    for row in (row for row in data["rows"] if row["keep"]):
        tokens.setdefault((row["selector"], row["keep"]), []).append(row["tokens"])
    return {key: sum(own) / len(own) for key, own in tokens.items()}


def _unmet_rows(data: Data) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(selector, budget, what is known of it per task) of the budgets that some image could not meet."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in data.get("unmet", []):
        rows.setdefault((each["selector"], each["keep"]), []).append(each)
    return [(selector, keep, about) for (selector, keep), about in rows.items()]


def _unmet(selector: str, keep: str, about: Sequence[dict[str, Any]]) -> str:
    where = ", ".join(f"{each['task']} ({each['images']} of {each['samples']} images)" for each in about)
    least = max(each["least"] for each in about)
    return f"- {selector} cannot meet keep={keep} on {where}: {least} tokens on average is the least that all could."


def _table(
    rows: Sequence[dict[str, Any]], sees_question: bool, tokens: Mapping[tuple[str, str], float] | None = None
) -> list[str]:
    """A table; with `tokens`, the average over the layers is beside each share."""
    # What is left are the budgets, in the order of the run, and the share of equal answers.
    keeps = [name for name in rows[0] if name not in ("selector", "won", "tied", "lost")]
    lines = ["| selector | " + " | ".join(keeps) + " | won | tied | lost |", "|---|" + "---|" * (len(keeps) + 3)]

    def cell(row: dict[str, Any], keep: str) -> str:
        if row[keep] is None:
            return "–"
        mean = None if tokens is None else tokens.get((row["selector"], keep))
        return f"{100 * row[keep]:.0f}" + ("" if mean is None else f" ({mean:.0f})")

    for row in rows:
        shares = " | ".join(cell(row, keep) for keep in keeps)
        name = marked(row["selector"], sees_question)
        lines.append(f"| {name} | {shares} | {row['won']} | {row['tied']} | {row['lost']} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command of this module.

    Returns:
        The exit code: 0, or 2 with one line of error.
    """
    parser = argparse.ArgumentParser(prog="python -m selector.report.standings", description=__doc__)
    parser.add_argument(
        "source", type=Path, nargs="+", help="folders that `selector compare` wrote, or distilled data (.json)"
    )
    parser.add_argument("--out", type=Path, help="write the distilled data here instead of printing the table")
    options = parser.parse_args(argv)

    try:
        parts = [distil(each) if each.is_dir() else json.loads(each.read_text()) for each in options.source]
        data = joined(parts)
    except (UsageError, OSError, json.JSONDecodeError) as error:
        print(f"standings: error: {error}", file=sys.stderr)
        return 2

    if options.out:
        with output(options.out):
            write_json(options.out, data)
    else:
        print(markdown(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
