"""The table of a run: a pure function of its files (``run.json`` and the predictions it names).

Accuracy carries a 95% Wilson interval; the difference to the baseline selector at the same task and budget carries the
95% interval of a seeded paired bootstrap over the samples that both have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from selector.evaluation.errors import UsageError
from selector.evaluation.records import PREDICTIONS, RUN, read_records, write_json, write_text
from selector.evaluation.statistics import mean, median, paired_bootstrap, spearman, wilson
from selector.evaluation.tables import footnotes, markdown

FLIPS = ("right_to_wrong", "wrong_to_right", "wrong_to_wrong", "right_to_right")


def summarize(run: Path) -> dict[str, Any]:
    """Figures of every row: {"model", ..., "rows": [...], "correlations": {...}}.

    Raises:
        UsageError: no run there, or broken records.
    """
    if not (run / RUN).is_file():
        raise UsageError(f"run must be a folder that `selector compare` wrote, {run / RUN} does not exist")
    settings = json.loads((run / RUN).read_text())
    limit = settings["samples"]
    tables: dict[tuple[str, str, str | None], list[dict[str, Any]]] = {}
    for row in settings["rows"]:
        found = {record["id"]: record for record in read_records(run / row["key"] / PREDICTIONS)}
        within = [record for record in found.values() if limit is None or record["index"] < limit]
        tables[row["task"], row["label"], row["keep"]] = within
    rows = []
    for (task, label, keep), found in tables.items():
        against = tables.get((task, settings["baseline"], keep)) if label != settings["baseline"] and keep else None
        rows.append({"task": task, "selector": label, "keep": keep} | _figures(found) | _difference(found, against))
    shifts = [r for r in rows if r["keep"] and r["ipr_shift"] is not None and r["agreement"] is not None]
    rank = spearman([abs(r["ipr_shift"]) for r in shifts], [r["agreement"] for r in shifts])
    return {name: settings[name] for name in ("model", "samples", "seed", "baseline", "positions", "unreadable")} | {
        "rows": rows,
        "correlations": {"ipr_shift_vs_agreement": rank, "points": len(shifts)},
    }


def _figures(found: list[dict[str, Any]]) -> dict[str, Any]:
    def values(name: str) -> list[Any]:
        return [record[name] for record in found if record.get(name) is not None]

    right = values("correct")
    flips = [record["flip"] for record in found if "flip" in record]
    return {
        "samples": len(found),
        "tokens": mean(values("tokens")),
        "full_tokens": mean(values("full_tokens")),
        "saturated": sum(values("saturated")),
        "accuracy": mean(right),
        "accuracy_interval": list(wilson(sum(right), len(right))) if right else None,
        "agreement": mean(values("agrees")),
        "flips": {name: flips.count(name) for name in FLIPS},
        "nll_shift": mean(values("nll_shift")),
        "first_token_kl": mean(values("first_token_kl")),
        "first_token_js": mean(values("first_token_js")),
        "ipr_shift": mean(values("ipr_shift")),
        "evidence": mean(values("evidence")),
        "base_evidence": mean(values("base_evidence")),
        "evidence_samples": len(values("evidence")),
        "encode_ms": median(values("encode_ms")),
        "selection_ms": median(values("selection_ms")),
        "prefill_ms": median(values("prefill_ms")),
    }


def _difference(found: list[dict[str, Any]], against: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Accuracy minus the baseline's, over the samples that both have."""
    other = {record["id"]: record["correct"] for record in against or [] if "correct" in record}
    pairs = [(r["correct"], other[r["id"]]) for r in found if "correct" in r and r["id"] in other]
    if not pairs:
        return {"versus_baseline": None}
    gap, low, high = paired_bootstrap([a for a, _ in pairs], [b for _, b in pairs])
    return {"versus_baseline": {"difference": gap, "interval": [low, high], "pairs": len(pairs)}}


def write_report(run: Path) -> dict[str, Any]:
    """Writes ``table.md`` and ``results.json`` beside the records; returns the summary."""
    summary = summarize(run)
    write_json(run / "results.json", summary)
    write_text(run / "table.md", markdown(summary) + "\n" + footnotes(summary, run) + "\n")
    return summary
