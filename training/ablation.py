"""Trains the variants of a sweep, compares them on the same questions, and prints one table.

    python -m training.ablation --config configs/ablation/tiny.yaml --out runs/ablation

The YAML holds `base` (a configuration of ``selector-train fit``), `variants` (what each changes in it, by name),
`seeds`, and `compare` (settings of ``selector compare``). A variant that is already exported is not trained again, and
questions already answered are not asked again, so an interrupted sweep resumes where it stopped.
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
    """`base` with the entries that `change` names replaced, level by level; lists are replaced whole.

    A mapping with a `class_path` replaces the old one whole too.

    >>> merged({"model": {"width": 64, "heads": 4}, "seed": 0}, {"model": {"width": 128}})
    {'model': {'width': 128, 'heads': 4}, 'seed': 0}
    """
    result = copy.deepcopy(dict(base))
    for name, value in change.items():
        below = result.get(name)

        # Another class takes other arguments: those of the class it replaces must not be left in.
        deeper = isinstance(value, Mapping) and isinstance(below, Mapping) and "class_path" not in value
        result[name] = merged(below, value) if deeper and isinstance(below, Mapping) else copy.deepcopy(value)
    return result


def train(sweep: Mapping[str, Any], out: Path) -> dict[str, list[Path]]:
    """Trains and exports every variant with every seed, except those already exported with the same settings.

    Args:
        sweep: the YAML, see above.
        out: folder of the sweep; configurations land in it, runs and checkpoints below it.

    Returns:
        The selector folders of each variant, in the order of the seeds.
    """
    from training.cli import run  # Lightning takes seconds to import, and --help does not need it

    checkpoints: dict[str, list[Path]] = {}
    for name, change in sweep["variants"].items():
        for seed in sweep["seeds"]:
            label = f"{name}-{seed}"
            folder = out / "checkpoints" / label
            checkpoints.setdefault(name, []).append(folder)

            # One seed for the weights, the data's order and the noise.
            settings = merged(merged(sweep["base"], change or {}), {"model": {"seed": seed}, "seed_everything": seed})
            settings |= {"root": str(out / "runs"), "name": label}

            # Done with exactly these settings: an export writes `config.json` after the weights.
            file = out / f"{label}.yaml"
            text = yaml.safe_dump(settings, sort_keys=False)
            if (folder / "config.json").is_file() and file.is_file() and file.read_text(encoding="utf-8") == text:
                continue

            # An export of other settings must not pass for this one's if the training is interrupted.
            write_text(file, text)
            (folder / "config.json").unlink(missing_ok=True)
            trainer = run(["fit", f"--config={file}"]).trainer
            best: Any = trainer.checkpoint_callback
            export(best.best_model_path, folder, command=f"python -m training.ablation (variant {name}, seed {seed})")
    return checkpoints


def compare(sweep: Mapping[str, Any], checkpoints: Mapping[str, list[Path]], out: Path) -> list[dict[str, Any]]:
    """Answers the same questions with every checkpoint, and with the training-free selectors of the sweep.

    Args:
        sweep: the YAML, see above.
        checkpoints: what `train` returned.
        out: folder of the sweep.

    Returns:
        The rows of ``results.json``: one per selector, budget and task.

    Raises:
        RuntimeError: the comparison failed; it has printed why.
    """
    from selector.cli import main

    settings = dict(sweep["compare"])
    rivals = settings.pop("selectors", [])
    settings |= {
        "out": str(out / "compare"),
        "selectors": [*(str(each) for made in checkpoints.values() for each in made), *rivals],
    }

    # Through the command line, so that a sweep is compared exactly as a user would compare it.
    file = out / "compare.yaml"
    write_text(file, yaml.safe_dump(settings, sort_keys=False))
    if (status := main(["compare", "--config", str(file)])) != 0:
        raise RuntimeError(f"selector compare ended with status {status}")
    return json.loads((out / "compare" / "results.json").read_text(encoding="utf-8"))["rows"]


def table(sweep: Mapping[str, Any], checkpoints: Mapping[str, list[Path]], rows: list[dict[str, Any]]) -> str:
    """Accuracy [95% Wilson interval over the questions] / share of unchanged answers, in %, as means over the seeds.

    Args:
        sweep: the YAML, see above.
        checkpoints: the selector folders of each variant.
        rows: what `compare` returned.

    Returns:
        A Markdown table with one row per variant and budget, and one column per task.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    keeps = [str(keep) for keep in sweep["compare"]["keep"]]
    labels = {name: [folder.name for folder in folders] for name, folders in checkpoints.items()}
    labels |= {name: [name] for name in sweep["compare"].get("selectors", [])}  # training-free: no seeds

    lines = [
        "| variant | keep | " + " | ".join(tasks) + " |",
        "|---|---|" + "---|" * len(tasks),
    ]
    for name, members in labels.items():
        for keep in keeps:
            cells = []
            for task in tasks:
                runs = [r for r in rows if r["selector"] in members and r["keep"] == keep and r["task"] == task]
                asked = sum(row["samples"] for row in runs)
                right = round(sum(row["accuracy"] * row["samples"] for row in runs))
                same = sum(row["agreement"] * row["samples"] for row in runs) / asked

                # All seeds answer the same questions: they steady the mean, but do not add questions.
                low, high = wilson(round(right / len(runs)), asked // len(runs))
                cells.append(f"{100 * right / asked:.0f} [{100 * low:.0f}, {100 * high:.0f}] / {100 * same:.0f}")
            lines.append(f"| {name} | {keep} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Entry point of ``python -m training.ablation``; returns the exit status."""
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
