"""Standings: every selector against every other at equal measured tokens, from a run or from its distilled data.

    python -m selector.report.standings runs/standings --out configs/compare/standings.json
    python -m selector.report.standings configs/compare/standings.json
    python -m selector.report.standings runs/one runs/two --out both.json

The first line distils a run (what each row got right, sample by sample) into one small file, the second prints the
table in Markdown, the third joins runs of different selectors on the same questions. Two selectors meet once per task
and budget, on the same questions: the better one wins where an exact McNemar test over those questions gives p < 0.05,
else they tie. Selectors that see the question have a table of their own and meet only each other, since a choice that
knows what is asked is another kind of choice.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from selector.errors import UsageError
from selector.files import output, write_json
from selector.records import seeing_question
from selector.report.columns import LEGEND, marked
from selector.report.statistics import mcnemar
from selector.report.summary import read_run

Data = dict[str, Any]


def distil(run: Path) -> Data:
    """The little of a run that standings need.

    Args:
        run: a folder that `selector compare` wrote.

    Returns:
        Model, seed and rows; in each, ``right`` and ``same`` have a 1 or 0 per sample, by its index.

    Raises:
        UsageError: no run there, or a row without answers.
    """
    settings, tables = read_run(run)
    seeing = seeing_question(settings)
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
            }
        )
    return {"model": settings["model"], "seed": settings["seed"], "rows": rows}


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
    return {**first, "rows": list(rows.values())}


def standings(data: Data, sees_question: bool = False) -> list[dict[str, Any]]:
    """The table of standings, one row per selector, the best first.

    Args:
        data: as `distil` or `joined` returns it.
        sees_question: rank the selectors that see the question, or those that do not; they meet their own kind alone.
            Data distilled before this was recorded holds none that do.

    Returns:
        By selector, its accuracy at every budget as a share of the unpruned one (both means over tasks), the share of
        answers that stayed the same (where it was recorded), and the meetings won, tied and lost.

    Raises:
        UsageError: selectors with different numbers of samples.
    """
    right = {(row["task"], row["keep"], row["selector"]): row["right"] for row in data["rows"]}
    tasks = list(dict.fromkeys(task for task, _, _ in right))
    keeps = list(dict.fromkeys(keep for _, keep, _ in right if keep))
    kind = [row for row in data["rows"] if row["keep"] and row.get("sees_question", False) == sees_question]
    names = list(dict.fromkeys(row["selector"] for row in kind))
    table = {name: {"selector": name, "won": 0, "tied": 0, "lost": 0} for name in names}

    # Every two selectors meet once per task and budget.
    for task in tasks:
        for keep in keeps:
            for a, b in combinations(names, 2):
                _meet(table[a], table[b], right[task, keep, a], right[task, keep, b])

    # The mean over tasks, not over questions: a task with more questions does not count more.
    for name in names:
        for keep in keeps:
            full = sum(_share(right[task, None, "full"]) for task in tasks)
            table[name][keep] = sum(_share(right[task, keep, name]) for task in tasks) / full
        same = [_share(row["same"]) for row in kind if row["selector"] == name and "same" in row]
        if same:
            table[name]["same"] = sum(same) / len(same)
    return sorted(table.values(), key=lambda row: (row["lost"] - row["won"], row["selector"]))


def _meet(ours: dict[str, Any], theirs: dict[str, Any], a: str, b: str) -> None:
    """Counts one meeting in the rows of both; `a` and `b` are their right answers, 1 or 0 per question."""
    if len(a) != len(b):
        raise UsageError(
            f"standings need equal samples, {ours['selector']} has {len(a)}, {theirs['selector']} {len(b)}"
        )

    # Questions that both or neither got right say nothing about who is better.
    pairs = list(zip(a, b, strict=True))
    only_a, only_b = pairs.count(("1", "0")), pairs.count(("0", "1"))
    # Not adjusted for the number of meetings: standings describe a run, they do not claim a single pair.
    if mcnemar(only_a, only_b) >= 0.05:
        ours["tied"] += 1
        theirs["tied"] += 1
        return

    winner, loser = (ours, theirs) if only_a > only_b else (theirs, ours)
    winner["won"] += 1
    loser["lost"] += 1


def _share(right: str) -> float:
    return right.count("1") / len(right)


def markdown(data: Data) -> str:
    """The standings as Markdown, below a line on what they were measured on.

    Selectors that see the question, where there are any, have a table of their own behind that of the others.
    """
    unseeing, seeing = standings(data), standings(data, sees_question=True)
    full = [f"{r['task']} {100 * _share(r['right']):.0f}" for r in data["rows"] if r["selector"] == "full"]
    samples = len(data["rows"][0]["right"])
    same = " same: answers that stayed the same, %, over all tasks and budgets;" if "same" in data["rows"][0] else ""
    within = ", between selectors of one table only" if seeing else ""

    lines = [
        f"{Path(data['model']).name}, {samples} questions per task; unpruned, right %: {', '.join(full)}. At each "
        f"budget mean accuracy over the tasks, as % of the unpruned model's;{same} meetings over tasks "
        f"and budgets{within}.",
    ]

    if unseeing:
        lines += ["", *_table(unseeing, False)]
    if seeing:
        lines += ["", LEGEND, "", *_table(seeing, True)]
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]], sees_question: bool) -> list[str]:
    # What is left are the budgets, in the order of the run, and the share of equal answers.
    keeps = [name for name in rows[0] if name not in ("selector", "won", "tied", "lost")]
    lines = ["| selector | " + " | ".join(keeps) + " | won | tied | lost |", "|---|" + "---|" * (len(keeps) + 3)]
    for row in rows:
        shares = " | ".join(f"{100 * row[keep]:.0f}" for keep in keeps)
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
