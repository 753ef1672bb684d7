"""Data of the explorer: chosen samples with their image, and what every row kept of it and answered.

The page draws kept patches itself, from the image and the mask: one picture serves every selector and budget. Samples
that tell selectors apart come first; as many are taken as the page has room for.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selector.errors import UsageError
from selector.record import Record
from selector.records import IMAGES, image_name, seeing_question
from selector.report.columns import marked
from selector.report.tables import plain

Key = tuple[str, str, str | None]
SHOWN, ROOM = 16, 3_200_000
"""Samples a task at most, and characters that all runs may take together."""


def explorer(
    runs: Mapping[str, tuple[Path, Mapping[str, Any], Mapping[Key, Sequence[Record]]]], room: int = ROOM
) -> dict[str, Any]:
    """{"images": {name: {...}}, "samples": [...]} of the runs by name; every run and task gets the same room."""
    images: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    groups = [(name, task) for name, (_, settings, _) in runs.items() for task in settings["tasks"]]
    for name, task in groups:
        folder, settings, tables = runs[name]
        left = room // max(1, len(groups))
        seeing = seeing_question(settings)
        rows = {
            (marked(label, label in seeing), keep): {r["id"]: r for r in found}
            for (of, label, keep), found in tables.items()
            if of == task
        }
        taken = 0
        for sample in _telling(rows):
            shown = _sample(name, task, sample, rows)
            if shown is None:
                continue
            picture = image_name(settings["tasks"][task]["fingerprint"], settings["seed"], sample)
            stored = images.get(picture) or _image(folder, picture)
            size = len(json.dumps(shown)) + (0 if picture in images else len(json.dumps(stored)))
            if size > left:
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
    """The first samples of every task as a Markdown table: question, right answer, and who said what instead."""
    groups: dict[str, list[str]] = {}
    for sample in shown["samples"]:
        lines = groups.setdefault(f"{sample['task']} ({sample['run']})", [])
        others: dict[str, list[str]] = {}
        for row in sample["rows"]:
            if row["keep"] and row.get("flip", "same") != "same":
                others.setdefault(row["answer"], []).append(f"{row['selector']} {row['keep']}")
        if others and len(lines) < most:
            said = "; ".join(f"“{answer}” {', '.join(names)}" for answer, names in others.items())
            cells = (sample["question"], sample.get("target") or "–", sample["answer"], said)
            lines.append("| " + " | ".join(plain(str(cell)) for cell in cells) + " |")
    head = "| question | right answer | unpruned | pruned, where other |\n|---|---|---|---|\n"
    tables = {plain(f"## Changed answers: {name}"): lines for name, lines in groups.items() if lines}
    return "\n".join(f"{title}\n\n{head}" + "\n".join(lines) + "\n" for title, lines in tables.items())


def _telling(rows: Mapping[tuple[str, str | None], Mapping[str, Record]]) -> list[str]:
    """Samples in the order of how much they tell: on how many answers selectors differ in being right (where that is
    known), then in being the unpruned model's, then how many are not."""
    order = list(dict.fromkeys(sample for found in rows.values() for sample in found))

    def told(sample: str) -> tuple[int, int, int]:
        right, same = (_split(rows, sample, name) for name in ("correct", "agrees"))
        changed = sum(len(group) - sum(group) for group in _by_budget(rows, sample, "agrees").values())
        return -sum(right.values()), -sum(same.values()), -changed

    return sorted(order, key=told)


def _tells_at(rows: Mapping[tuple[str, str | None], Mapping[str, Record]], sample: str) -> str | None:
    """The budget at which selectors differ most on a sample; None where they differ at none."""
    for name in ("correct", "agrees"):
        split = _split(rows, sample, name)
        if any(split.values()):
            return max(split, key=lambda keep: split[keep])
    return None


def _split(rows: Mapping[tuple[str, str | None], Mapping[str, Record]], sample: str, name: str) -> dict[str, int]:
    """By budget, how many selectors are in the minority: 0 where all are right, or all wrong."""
    return {keep: min(sum(group), len(group) - sum(group)) for keep, group in _by_budget(rows, sample, name).items()}


def _by_budget(
    rows: Mapping[tuple[str, str | None], Mapping[str, Record]], sample: str, name: str
) -> dict[str, list[bool]]:
    """What every selector's record of a sample says, by budget."""
    groups: dict[str, list[bool]] = {}
    for (_, keep), found in rows.items():
        if keep and name in found.get(sample, {}):
            groups.setdefault(keep, []).append(found[sample][name])
    return groups


def _sample(
    run: str, task: str, sample: str, rows: Mapping[tuple[str, str | None], Mapping[str, Record]]
) -> dict[str, Any] | None:
    full = next(
        (
            found[sample]
            for (label, keep), found in rows.items()
            if keep is None and label == "full" and sample in found
        ),
        None,
    )
    if full is None:
        return None
    answers = []
    for (label, keep), found in sorted(rows.items(), key=lambda item: item[0][1] is None):  # blind comes last
        record = found.get(sample)
        if record is None or (keep is None and label == "full"):
            continue
        names = ("answer", "correct", "flip", "anls", "tokens", "kept", "evidence")
        answers.append({"selector": label, "keep": keep} | {n: record[n] for n in names if record.get(n) is not None})
    head = {"run": run, "task": task, "id": sample, "full_tokens": full["full_tokens"]}
    head |= {"tells_at": _tells_at(rows, sample)}
    return (
        head
        | {n: full[n] for n in ("question", "target", "answer", "correct", "kept") if n in full}
        | {"rows": answers}
    )


def _image(run: Path, name: str) -> dict[str, Any] | None:
    """The stored copy of an image as a data address, with its lines; None where the run kept none."""
    path = run / IMAGES / f"{name}.json"
    if not path.is_file():
        return None
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))
        data = base64.b64encode(path.with_suffix(".jpg").read_bytes()).decode()
    except (ValueError, OSError) as error:
        raise UsageError(f"image {path} cannot be read ({error}); delete it, the report does without") from error
    return lines | {"data": f"data:image/jpeg;base64,{data}"}
