"""Kills and shards with real processes: what is left behind, and that the figures do not know of it."""

from __future__ import annotations

import json
import os
import re
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
    first, second = start(out, "--shard", "0/2"), start(out, "--shard", "1/2")
    for process in (first, second):
        assert process.wait(timeout=300) == 0, process.communicate()[1]
    assert len(list(out.rglob("predictions.0-of-2.jsonl"))) == len(list(out.rglob("predictions.1-of-2.jsonl"))) == 6
    assert content(out) == content(whole)
    assert figures(out) == figures(whole)


@pytest.fixture
def here(model, capsys, monkeypatch):
    """``here(out, *more, RANK=...)`` -> (exit code, stdout, stderr) of a comparison in this process."""
    from selector import cli

    def call(out, *more, **environment):
        capsys.readouterr()
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            code = cli.main([*OPTIONS, "--model", model, "--out", str(out), *more])
        return code, *capsys.readouterr()

    return call


def test_a_shard_may_come_later(here, whole, tmp_path):
    out = tmp_path / "run"
    for shard, missing in (("0/3", "1/3 lacks all 2, shard 2/3 all 2"), ("2/3", "1/3 lacks all 2"), ("1/3", None)):
        code, printed, _ = here(out, "--shard", shard)
        assert code == 0
        assert ("partial" in printed) == (missing is not None)
        assert missing is None or f"Shard {missing}." in printed
    assert content(out) == content(whole)
    assert figures(out) == figures(whole)


def test_under_torchrun_rank_0_alone_prints(model, whole, tmp_path):
    """Two processes: about 15 s, most of which torch and transformers take to start, twice."""
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words = [*launch, "selector.cli", *OPTIONS, "--model", model, "--out", str(out)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    # One table, of the samples of both, and one bar, which counts the records of both.
    assert ended.stdout.count("Report: ") == ended.stdout.count("vs random:") == 1
    assert "partial" not in ended.stdout
    assert ended.stderr.count("in the environment: this process takes shard") == 1
    assert ended.stderr.count("36/36") == 1
    assert "18/18" not in ended.stderr
    assert len(list(out.rglob("predictions.0-of-2.jsonl"))) == len(list(out.rglob("predictions.1-of-2.jsonl"))) == 6
    assert content(out) == content(whole)
    assert figures(out) == figures(whole)


def test_a_rank_that_is_killed_leaves_a_partial_report(start, here, whole, tmp_path):
    """About 15 s: another process, and five for it to be given up."""
    out = tmp_path / "run"
    other = start(out, "--samples", "2000", RANK="1", WORLD_SIZE="2")
    wait_for(out, 1, other)
    other.kill()
    code, printed, errors = here(out, "--rank-timeout", "5", RANK="0", WORLD_SIZE="2")
    assert code == 2
    assert "error: rank 1 of 2 has given no sign of life for 5 s" in errors
    assert "the same command goes on from what is done" in errors
    assert other.wait() == -signal.SIGKILL
    assert re.search(r"partial: \d( to \d)? of 6 samples", printed)
    assert "Shard 1/2 lacks" in printed
    assert (out / "report.html").is_file()

    assert here(out, "--shard", "1/2")[0] == 0
    assert content(out).keys() == content(whole).keys()
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
