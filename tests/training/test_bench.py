"""The benchmark of trainings: every variant is a valid one, and what is printed follows from what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from training import bench
from training.cli import main, run

STEPS = {"on the fly": 1, "from disk": 2}


@pytest.mark.slow
@pytest.mark.parametrize("variant", bench.VARIANTS)
def test_every_variant_is_a_configuration(variant, capsys):
    with pytest.raises(SystemExit) as stop:
        run([*bench.flags_of(variant, "test_vit", Path("room"), STEPS), "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["data"]["cache_dir"] == ("room/cache" if variant.startswith("from disk") else None)
    assert config["trainer"]["max_steps"] == bench.WARMUP + (2 if variant.startswith("from disk") else 1)


@pytest.mark.slow
def test_two_processes_are_measured_together(tmp_path):
    row = bench.measure("from disk, two processes", "test_vit", tmp_path, STEPS)
    assert (row["steps"], row["processes"]) == (2, 2)
    tokens = 2 * 4 * 100  # of one process: 2 steps of 4 images of 10 x 10 patches
    assert row["parts"]["whole"]["tokens"] == tokens
    assert bench.seconds_per_token(row) * 2 * tokens == pytest.approx(row["parts"]["whole"]["seconds"])


def test_a_failed_variant_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)the variant 'on the fly' failed.*name must be a timm model"):
        bench.measure("on the fly", "vit_of_nobody", tmp_path, STEPS)


def test_a_benchmark_that_fails_ends_without_figures(tmp_path, monkeypatch, capsys):
    def failing(*_):
        raise RuntimeError("the variant 'on the fly' failed: why")

    monkeypatch.setattr(bench, "measure", failing)
    assert main(["bench", "--out", str(tmp_path / "training.json")]) == 1
    assert "failed: why" in capsys.readouterr().err
    assert not (tmp_path / "training.json").exists()


def made_up(variant: str, seconds: float, processes: int = 1) -> dict:
    parts = {name: {"seconds": seconds / 4, "tokens": 10} for name in ("loader", "encoder", "backward")}
    parts["whole"] = {"seconds": seconds, "tokens": 10}
    return {"variant": variant, "load": 0.5, "steps": 1, "processes": processes, "cpu_seconds": 2.0, "parts": parts}


def test_the_fastest_run_counts_and_ratios_are_of_time_per_token(tmp_path, monkeypatch, capsys):
    times = {"on the fly": [8.0, 6.0], "from disk": [1.0, 3.0], "from disk, two processes": [1.25, 5.0]}

    def measured(variant, *_):
        return made_up(variant, times[variant].pop(0), 2 if variant.endswith("processes") else 1)

    monkeypatch.setattr(bench, "measure", measured)
    out = tmp_path / "training.json"
    assert main(["bench", "--variants", *times, "--repeats", "2", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert [row["parts"]["whole"]["seconds"] for row in results["rows"]] == [6.0, 1.0, 1.25]
    assert results["ratios"] == {
        "features from disk / on the fly": {"wall": 6.0},
        "training from disk / on the fly": {"wall": 6.0, "cpu": 1.0},
        "two processes / one, from disk": {"wall": 1.6, "cpu": 2.0},
    }
    printed = capsys.readouterr().out
    assert "| from disk, two processes | 0.5 | 16 | 200.00 | 25% | 25% | 25% |" in printed
    assert "| two processes / one, from disk | 1.60 | 2.00 |" in printed


@pytest.mark.parametrize("arguments", [["--steps", "0", "1"], ["--repeats", "0"]])
def test_nothing_to_measure_is_refused(arguments, capsys):
    assert main(["bench", *arguments]) == 2
    assert "--steps and --repeats must be at least 1" in capsys.readouterr().err
