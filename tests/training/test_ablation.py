"""The sweep: settings merged level by level, and a table that adds up seeds."""

from __future__ import annotations

from pathlib import Path

import yaml

from training.ablation import merged, table

SWEEP = Path(__file__).parents[2] / "configs" / "ablation" / "tiny.yaml"


def test_settings_are_replaced_level_by_level_and_objects_whole():
    base = {"model": {"layers": 2, "encoder": {"class_path": "a.A", "init_args": {"path": "x"}}}, "seed": 0}
    change = {"model": {"layers": 3, "encoder": {"class_path": "a.B"}}}
    assert merged(base, change) == {"model": {"layers": 3, "encoder": {"class_path": "a.B"}}, "seed": 0}
    assert base["model"]["layers"] == 2
    assert merged(base, {"model": {"encoder": {"init_args": {"path": "y"}}}})["model"]["encoder"] == {
        "class_path": "a.A",
        "init_args": {"path": "y"},
    }


def test_the_table_adds_up_the_seeds_of_a_variant():
    def row(selector: str, accuracy: float, agreement: float) -> dict:
        shared = {"task": "documents", "keep": "64", "samples": 50}
        return shared | {"selector": selector, "accuracy": accuracy, "agreement": agreement}

    sweep = {"compare": {"keep": [64], "selectors": ["lofi"]}}
    rows = [row("a-0", 0.5, 0.6), row("a-1", 0.7, 0.8), row("lofi", 0.1, 0.2), row("full", 1.0, 1.0)]
    lines = table(sweep, {"a": [Path("x/a-0"), Path("x/a-1")]}, rows).splitlines()
    assert lines[2] == "| a | 64 | 60 [46, 72] / 70 |"  # Wilson of 30 in 50: both seeds answer the same questions
    assert lines[3].startswith("| lofi | 64 | 10 [")


def test_the_shipped_sweep_names_objectives_that_exist():
    import importlib

    sweep = yaml.safe_load(SWEEP.read_text())
    for name, change in sweep["variants"].items():
        for objective in change["model"]["objectives"]:
            module, _, cls = objective["class_path"].rpartition(".")
            made = getattr(importlib.import_module(module), cls)(**objective.get("init_args", {}))
            assert made.weight == 1, name
