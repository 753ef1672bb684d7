"""Trains the variants of a sweep, compares them on the same questions, and prints one table.

    python -m training.ablation --config configs/ablation/tiny.yaml --out runs/ablation

The YAML holds `base` (a configuration of ``selector-train fit``), `variants` (what each changes in it, by name),
`seeds`, and `compare` (settings of ``selector compare``). A variant that is already exported is not trained again, and
questions already answered are not asked again, so an interrupted sweep goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from selector.files import write_text
from selector.report.statistics import wilson
from training.export import export


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with what `change` names replaced, level by level; lists are replaced whole."""
    found = copy.deepcopy(dict(base))
    for name, value in change.items():
        below = found.get(name)
        deeper = isinstance(value, Mapping) and isinstance(below, Mapping) and "class_path" not in value
        found[name] = merged(below, value) if deeper and isinstance(below, Mapping) else copy.deepcopy(value)
    return found


def train(sweep: Mapping[str, Any], out: Path) -> dict[str, list[Path]]:
    """Trains and exports every variant with every seed; returns the checkpoints of each variant."""
    from training.cli import run

    checkpoints: dict[str, list[Path]] = {}
    for name, change in sweep["variants"].items():
        for seed in sweep["seeds"]:
            label = f"{name}-{seed}"
            folder = out / "checkpoints" / label
            checkpoints.setdefault(name, []).append(folder)
            settings = merged(merged(sweep["base"], change or {}), {"model": {"seed": seed}, "seed_everything": seed})
            settings |= {"root": str(out / "runs"), "name": label}
            file = out / f"{label}.yaml"
            text = yaml.safe_dump(settings, sort_keys=False)
            if (folder / "config.json").is_file() and file.is_file() and file.read_text(encoding="utf-8") == text:
                continue
            write_text(file, text)
            (folder / "config.json").unlink(missing_ok=True)  # of other settings: not to be taken for this one's
            trainer = run(["fit", f"--config={file}"]).trainer
            best: Any = trainer.checkpoint_callback
            export(best.best_model_path, folder, command=f"python -m training.ablation (variant {name}, seed {seed})")
    return checkpoints


def compare(sweep: Mapping[str, Any], checkpoints: Mapping[str, list[Path]], out: Path) -> list[dict[str, Any]]:
    """Answers the same questions with every checkpoint; returns the rows of the comparison."""
    from selector.cli import main

    settings = dict(sweep["compare"])
    rivals = settings.pop("selectors", [])
    settings |= {
        "out": str(out / "compare"),
        "selectors": [*(str(each) for made in checkpoints.values() for each in made), *rivals],
    }
    file = out / "compare.yaml"
    write_text(file, yaml.safe_dump(settings, sort_keys=False))
    if (status := main(["compare", "--config", str(file)])) != 0:
        raise RuntimeError(f"selector compare ended with status {status}")
    return json.loads((out / "compare" / "results.json").read_text(encoding="utf-8"))["rows"]


def table(sweep: Mapping[str, Any], checkpoints: Mapping[str, list[Path]], rows: list[dict[str, Any]]) -> str:
    """Markdown: right answers [95% Wilson over the questions] / answers that stayed the same, in %, mean over seeds."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    keeps = [str(keep) for keep in sweep["compare"]["keep"]]
    labels = {name: [folder.name for folder in folders] for name, folders in checkpoints.items()}
    labels |= {name: [name] for name in sweep["compare"].get("selectors", [])}
    lines = [
        "| variant | keep | " + " | ".join(tasks) + " |",
        "|---|---|" + "---|" * len(tasks),
    ]
    for name, members in labels.items():
        for keep in keeps:
            cells = []
            for task in tasks:
                found = [r for r in rows if r["selector"] in members and r["keep"] == keep and r["task"] == task]
                asked = sum(row["samples"] for row in found)
                right = round(sum(row["accuracy"] * row["samples"] for row in found))
                same = sum(row["agreement"] * row["samples"] for row in found) / asked
                # Seeds answer the same questions: they make the mean steadier, not the questions more.
                low, high = wilson(round(right / len(found)), asked // len(found))
                cells.append(f"{100 * right / asked:.0f} [{100 * low:.0f}, {100 * high:.0f}] / {100 * same:.0f}")
            lines.append(f"| {name} | {keep} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Entry point of ``python -m training.ablation``."""
    parser = argparse.ArgumentParser(prog="python -m training.ablation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", required=True, type=Path, help="the sweep")
    parser.add_argument("--out", default=Path("runs/ablation"), type=Path, help="where runs, checkpoints and table go")
    options = parser.parse_args()
    sweep = yaml.safe_load(options.config.read_text(encoding="utf-8"))
    if missing := [name for name in ("base", "variants", "seeds", "compare") if name not in sweep]:
        print(f"training.ablation: {options.config} must have {', '.join(missing)}", file=sys.stderr)
        return 2
    checkpoints = train(sweep, options.out)
    text = table(sweep, checkpoints, compare(sweep, checkpoints, options.out))
    write_text(options.out / "table.md", text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
