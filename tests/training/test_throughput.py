"""Tokens per second: every part counts what it has seen in the training's own steps, and nothing else."""

from __future__ import annotations

import logging

import pytest
import torch
from pytorch_lightning.profilers import SimpleProfiler
from torch import nn

from training import module as training_module
from training.cli import run
from training.module import SelectorModule
from training.throughput import BATCH, LOADER, PREFIX, Throughput, timed_by


@pytest.fixture
def fit(tmp_path, llava_folder, run_arguments):
    """``fit(*more)`` -> arguments of a small run: 6 images in batches of 2, two epochs."""

    def arguments(*more: str, encoder: str = "LlavaNextEncoder") -> list[str]:
        return run_arguments(encoder, llava_folder, tmp_path / "runs", "run", "--data.generated_val=2", *more)

    return arguments


@pytest.fixture
def batches(monkeypatch):
    """The number of patches of every batch that was trained on."""
    sizes, plain = [], SelectorModule.training_step

    def recorded(self, batch, batch_idx):
        sizes.append(self._patches(batch))
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(SelectorModule, "training_step", recorded)
    return sizes


def test_the_table_counts_training_steps_alone_and_is_printed_at_the_end(fit, batches, caplog):
    with caplog.at_level(logging.INFO):
        ran = run(fit())
    assert len(batches) == 6
    counted = sum(batches[2:])  # behind the warm-up; neither statistics nor validations
    rows = {row.part: row for row in ran.trainer.profiler.rows()}
    assert {name: row.tokens for name, row in rows.items()} == dict.fromkeys(
        ["loader", "encoder", "selector", "reconstructor", "backward", "rest", "whole"], counted
    )
    assert all(row.seconds > 0 for row in rows.values())
    whole = rows.pop("whole")
    assert sum(row.seconds for row in rows.values()) == pytest.approx(whole.seconds)
    assert sum(row.share for row in rows.values()) == pytest.approx(1)

    tables = [record.message for record in caplog.records if record.message.startswith("tokens per second in")]
    assert tables == [ran.trainer.profiler.summary()]
    assert tables[0].startswith("tokens per second in 4 steps of this process (the first 2 do not count)")
    assert [line.split()[0] for line in tables[0].splitlines()[2:]] == [*rows, "whole"]


@pytest.mark.slow
def test_learning_from_answers_shows_the_language_model(fit, batches):
    answers = ["--model.objectives+=training.answers.Answers", "--model.answer_tokens=3"]
    ran = run(fit(*answers, "--data.generated=documents", encoder="LlavaNextModel"))
    tokens = {row.part: row.tokens for row in ran.trainer.profiler.rows()}
    counted = sum(batches[2:])
    parts = ["loader", "encoder", "teacher", "selector", "student", "backward", "rest", "whole"]
    assert tokens == dict.fromkeys(parts, counted)


@pytest.mark.slow
def test_another_profiler_shows_the_same_parts(fit):
    ran = run(fit("--trainer.profiler=simple", "--trainer.max_epochs=1"))
    assert isinstance(ran.trainer.profiler, SimpleProfiler)
    actions = ran.trainer.profiler.recorded_durations
    assert len(actions[f"{PREFIX}reconstructor"]) == 3
    assert len(actions[f"{PREFIX}encoder"]) > 3  # statistics and validations too: that table has all actions


def step(profiler: Throughput, tokens: int) -> None:
    with profiler.profile(LOADER):
        pass
    with profiler.profile(BATCH):
        profiler.batch(tokens)
        with timed_by(profiler)("selector", tokens), profiler.profile("[Strategy]Any.backward"):
            pass


@pytest.mark.parametrize(("warmup", "every", "timed"), [(0, 1, 127), (2, 1, 124), (0, 3, 73), (1, 2, 42), (7, 1, 0)])
def test_steps_that_are_not_timed_count_nowhere(warmup, every, timed):
    """Step i holds 2^i tokens, so that their sum tells which steps were counted."""
    profiler = Throughput(warmup, every)
    for number in range(7):
        step(profiler, 2**number)
        with profiler.part("selector", 1000):  # outside of a step
            pass
    assert {row.tokens for row in profiler.rows()} == ({timed} if timed else set())
    assert profiler.steps == bin(timed).count("1")
    assert bool(profiler.summary()) == bool(timed)


def test_the_clock_of_a_step_runs_from_the_step_before_and_not_through_validations(monkeypatch):
    now, logged = [0.0], []
    monkeypatch.setattr(training_module.time, "monotonic", lambda: now[0])

    class Stub:
        _patches, _trained = staticmethod(lambda batch: 120), (0, 0.0)

        def log(self, name, value, **_):
            logged.append((name, value))

    stub = Stub()
    SelectorModule.on_train_epoch_start(stub)
    for loading, computing, validating in ((3, 1, 0), (1, 1, 50), (2, 4, 0)):
        now[0] += loading + computing
        SelectorModule.on_train_batch_end(stub, None, torch.zeros(1), 0)
        now[0] += validating
        if validating:
            SelectorModule.on_validation_end(stub)
    assert logged == [("train/tokens_per_s", rate) for rate in (30.0, 60.0, 20.0)]
    assert stub._trained == (360, 12.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at it
@pytest.mark.parametrize("architecture", ["gumbel", "image-transformer"])
def test_compiled_layers_compute_the_same_under_the_same_names(fit, monkeypatch, architecture):
    losses, compiled, plain = {}, [], nn.Module.compile
    # The compiler's own back end takes minutes; what is tested is that the right layers go through it.
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self)) or plain(self, backend="eager"))
    settings = ["--trainer.max_epochs=1", f"--model.architecture={architecture}", "--model.width=32", "--model.heads=2"]
    for flag in ("false", "true"):
        torch._dynamo.reset()
        ran = run(fit(*settings, f"--model.compile={flag}"))
        losses[flag] = ran.model.state_dict(), float(ran.trainer.callback_metrics["train/loss"])
    assert len(compiled) == 6  # three layers each
    assert [name for name in {each.__name__ for each in compiled} if "Layer" not in name and "Block" not in name] == []
    assert list(losses["true"][0]) == list(losses["false"][0])
    assert losses["true"][1] == pytest.approx(losses["false"][1], rel=1e-4)
