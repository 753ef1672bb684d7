"""Data of the explorer: chosen samples with their image, and what every row kept of it and answered.

The page draws the kept patches itself, from the image and the mask, so that one image serves every selector and budget.
Samples that tell selectors apart come first; the page takes as many as it has room for.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selector.errors import UsageError
from selector.record import METRICS, Record
from selector.records import IMAGES, image_name, seeing_question
from selector.report.columns import marked
from selector.report.tables import plain

Key = tuple[str, str, str | None]
"""Task, label and budget of a row."""
Rows = Mapping[tuple[str, str | None], Mapping[str, Record]]
"""The records of one task, by selector and budget, then by sample."""
SHOWN, ROOM = 16, 3_200_000
"""Most samples per task, and characters that all runs may take together."""


def explorer(
    runs: Mapping[str, tuple[Path, Mapping[str, Any], Mapping[Key, Sequence[Record]]]], room: int = ROOM
) -> dict[str, Any]:
    """What the explorer shows; every run and task gets the same room.

    Args:
        runs: by name, the folder of a run, its plan and its records, see `selector.report.summary.read_run`.
        room: characters of JSON that all samples and images may take.

    Returns:
        ``{"images": {name: {...}}, "samples": [...]}``; a sample names its image, if the run kept one.

    Raises:
        UsageError: an image file of a run cannot be read.
    """
    images: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    groups = [(name, task) for name, (_, settings, _) in runs.items() for task in settings["tasks"]]
    for name, task in groups:
        folder, settings, tables = runs[name]
        # What one task leaves over is not passed on: what a task shows does not depend on the tasks before it.
        left = room // max(1, len(groups))
        seeing = seeing_question(settings)
        rows = {
            (marked(label, label in seeing), keep): {r["id"]: r for r in records}
            for (of, label, keep), records in tables.items()
            if of == task
        }

        taken = 0
        for sample in _by_interest(rows):
            shown = _sample(name, task, sample, rows)
            if shown is None:
                continue

            # Where a task scores by a metric of its own, the page says which instead of right or wrong.
            metric = settings["tasks"][task].get("metric", "exact")
            if metric != "exact":
                shown["scored_by"] = METRICS[metric].header.removesuffix(" %")

            # Samples of several runs may share an image: only the first of them pays for it.
            picture = image_name(settings["tasks"][task]["fingerprint"], settings["seed"], sample)
            stored = images.get(picture) or _image(folder, picture)
            size = len(json.dumps(shown)) + (0 if picture in images else len(json.dumps(stored)))
            if size > left:  # a smaller sample may still fit
                continue

            left -= size
            taken += 1
            if stored is not None:
                images[picture] = stored
                shown["image"] = picture
            samples.append(shown)
            if taken == SHOWN:
                break
    return {"images": images, "samples": samples}


def changed_answers(shown: Mapping[str, Any], most: int = 8) -> str:
    """The first samples of every task as Markdown tables: question, right answer, and which selectors answered what.

    Args:
        shown: as `explorer` returns it.
        most: rows per table.

    Returns:
        One table per task and run; a task in which no answer changed has none.
    """
    groups: dict[str, list[str]] = {}
    for sample in shown["samples"]:
        lines = groups.setdefault(f"{sample['task']} ({sample['run']})", [])

        # Selectors and budgets by the answer that they gave instead of the unpruned model's.
        by_answer: dict[str, list[str]] = {}
        for row in sample["rows"]:
            if row["keep"] and row.get("flip", "same") != "same":
                by_answer.setdefault(row["answer"], []).append(f"{row['selector']} {row['keep']}")
        if by_answer and len(lines) < most:
            changed = "; ".join(f"“{answer}” {', '.join(names)}" for answer, names in by_answer.items())
            cells = (sample["question"], sample.get("target") or "–", sample["answer"], changed)
            lines.append("| " + " | ".join(plain(str(cell)) for cell in cells) + " |")
    head = "| question | right answer | unpruned | pruned, where other |\n|---|---|---|---|\n"
    tables = {plain(f"## Changed answers: {name}"): lines for name, lines in groups.items() if lines}
    return "\n".join(f"{title}\n\n{head}" + "\n".join(lines) + "\n" for title, lines in tables.items())


def _by_interest(rows: Rows) -> list[str]:
    """Samples, the most telling first.

    By how much selectors disagree in being right (where that is known), then in keeping the unpruned model's answer,
    then by how many answers changed.
    """
    order = list(dict.fromkeys(sample for records in rows.values() for sample in records))

    def interest(sample: str) -> tuple[int, int, int]:
        right, same = (_split(rows, sample, name) for name in ("correct", "agrees"))
        changed = sum(len(group) - sum(group) for group in _by_budget(rows, sample, "agrees").values())
        return -sum(right.values()), -sum(same.values()), -changed

    return sorted(order, key=interest)  # stable: equal samples stay in the order of the task


def _tells_at(rows: Rows, sample: str) -> str | None:
    """The budget at which selectors differ most on a sample; None where they differ at none."""
    for name in ("correct", "agrees"):
        split = _split(rows, sample, name)
        if any(split.values()):
            return max(split, key=lambda keep: split[keep])
    return None


def _split(rows: Rows, sample: str, name: str) -> dict[str, int]:
    """By budget, how many selectors are in the minority: 0 where all are right, or all wrong."""
    return {keep: min(sum(group), len(group) - sum(group)) for keep, group in _by_budget(rows, sample, name).items()}


def _by_budget(rows: Rows, sample: str, name: str) -> dict[str, list[bool]]:
    """One field of every selector's record of a sample, by budget."""
    groups: dict[str, list[bool]] = {}
    for (_, keep), records in rows.items():
        if keep and name in records.get(sample, {}):
            groups.setdefault(keep, []).append(records[sample][name])
    return groups


def _sample(run: str, task: str, sample: str, rows: Rows) -> dict[str, Any] | None:
    """What the page needs of a sample: the unpruned record, and the answer and mask of every row; None without full."""
    full = next(
        (
            records[sample]
            for (label, keep), records in rows.items()
            if keep is None and label == "full" and sample in records
        ),
        None,
    )
    if full is None:
        return None

    # Only what the page shows: a record has much more.
    answers = []
    for (label, keep), records in sorted(rows.items(), key=lambda item: item[0][1] is None):  # blind comes last
        record = records.get(sample)
        if record is None or (keep is None and label == "full"):
            continue
        names = ("answer", "correct", "score", "flip", "anls", "tokens", "kept", "evidence")
        answers.append({"selector": label, "keep": keep} | {n: record[n] for n in names if record.get(n) is not None})

    head = {"run": run, "task": task, "id": sample, "full_tokens": full["full_tokens"]}
    head |= {"tells_at": _tells_at(rows, sample)}
    return (
        head
        | {n: full[n] for n in ("question", "target", "answer", "correct", "score", "kept") if n in full}
        | {"rows": answers}
    )


def _image(run: Path, name: str) -> dict[str, Any] | None:
    """The stored copy of an image as a data URL, with the borders of its patches; None where the run kept none."""
    path = run / IMAGES / f"{name}.json"
    if not path.is_file():
        return None  # only the first samples of a task have one

    try:
        lines = json.loads(path.read_text(encoding="utf-8"))
        data = base64.b64encode(path.with_suffix(".jpg").read_bytes()).decode()
    except (ValueError, OSError) as error:
        raise UsageError(f"image {path} cannot be read ({error}); delete it, the report does without") from error
    return lines | {"data": f"data:image/jpeg;base64,{data}"}
