"""Kills and shards with real processes: what is left behind, and that the figures do not know of it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from selector import records

pytestmark = pytest.mark.slow

TIMES = {"encode_ms", "selection_ms", "prefill_ms", "decode_ms"}
# One prompt at a time: a batch of others would change the last bits of divergences.
OPTIONS = shlex.split(
    "compare --selectors svd-prune:rank=2 random --keep 0.5 9 --samples 6 --max-new-tokens 3 --tasks scenes "
    "--batch-size 1"
)


def _interruptible() -> None:
    """A test run started in the background ignores Ctrl-C, and its children would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from conftest import build_model

    folder = tmp_path_factory.mktemp("model")
    built, processor = build_model("clip", "llama")
    built.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def start(model):
    """``start(out, *more)`` -> the process of a comparison."""
    running = []

    def call(out, *more, **environment):
        words = [sys.executable, "-m", "selector.cli", *OPTIONS, "--model", model, "--out", str(out), *more]
        running.append(
            subprocess.Popen(
                words,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=_interruptible,
            )
        )
        return running[-1]

    yield call
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The same comparison in one go."""
    from selector import cli

    folder = tmp_path_factory.mktemp("whole")
    assert cli.main([*OPTIONS, "--model", model, "--out", str(folder)]) == 0
    return folder


def lines(run):
    return sum(path.read_bytes().count(b"\n") for path in run.rglob("predictions*.jsonl"))


def wait_for(run, count, process):
    for _ in range(6000):
        if lines(run) >= count:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    raise TimeoutError(f"{lines(run)} records")


def content(run):
    """Every record of every key, without times."""
    return {
        path.name: [{k: v for k, v in r.items() if k not in TIMES} for r in records.read_folder(path)]
        for path in run.iterdir()
        if (path / records.SETTINGS).is_file()
    }


def figures(run):
    rows = json.loads((run / "results.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def test_a_killed_run_goes_on_and_ends_the_same(start, whole, tmp_path):
    out = tmp_path / "run"
    process = start(out)
    wait_for(out, 9, process)  # within the second sample
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = lines(out)
    assert 9 <= before < 36
    torn = next(path for path in sorted(out.rglob("predictions.jsonl")) if path.stat().st_size)
    torn.write_bytes(torn.read_bytes()[:-5])  # a kill in the middle of a write
    process = start(out)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert lines(out) == 36
    assert content(out) == content(whole)
    assert figures(out) == figures(whole)


def test_a_killed_run_in_batches_goes_on_and_says_the_same(start, whole, tmp_path):
    out = tmp_path / "run"
    process = start(out, "--batch-size", "4", "--workers", "1")
    wait_for(out, 9, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 9 <= lines(out) < 36
    process = start(out, "--batch-size", "4")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert lines(out) == 36

    def words(run):
        plan = json.loads((run / "run.json").read_text())
        return {
            (row["label"], row["keep"], r["id"]): (r["answer"], r.get("kept"), r["flip"], r["tokens"])
            for row in plan["rows"]
            for r in records.read_folder(run / row["key"])
        }

    assert words(out) == words(whole)


def test_two_shards_at_once_are_one_run(start, whole, tmp_path):
    out = tmp_path / "run"
    first, second = start(out, "--shard", "0/2"), start(out, RANK="1", WORLD_SIZE="2")
    for process in (first, second):
        assert process.wait(timeout=300) == 0, process.communicate()[1]
    assert len(list(out.rglob("predictions.0-of-2.jsonl"))) == len(list(out.rglob("predictions.1-of-2.jsonl"))) == 6
    assert content(out) == content(whole)
    assert figures(out) == figures(whole)


def test_an_interrupt_prints_the_table_and_says_how_to_go_on(start, tmp_path):
    out = tmp_path / "run"
    process = start(out, "--samples", "2000")
    wait_for(out, 3, process)
    second = start(out, "--samples", "2000")  # the same shard, while the first still writes
    _, refused = second.communicate(timeout=300)
    assert second.returncode == 2
    assert "another process is writing" in refused
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "the same command goes on from here" in errors
    assert "scenes" in printed
    assert "svd-prune:rank=2" in printed
    assert (out / "report.html").is_file()
