"""Checkpoints: last.ckpt is the last, and a run resumed from it is the uninterrupted run, wherever it was stopped."""

from __future__ import annotations

import csv
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from training.cli import run
from training.module import SelectorModule

pytestmark = [pytest.mark.usefixtures("quiet"), pytest.mark.slow]

EPOCHS, STEPS = 6, 3  # steps an epoch


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def fit(root, tiny_model, run_arguments):
    """``fit(*more, name=...)`` -> arguments of a run that is best early, since its learning rate is far too high."""
    if not (root / "llava").exists():
        for part in tiny_model():
            part.save_pretrained(root / "llava")
    own = [
        "--model.learning_rate=3.0",
        "--model.warmup_steps=9",
        "--model.width=16",
        "--model.layers=1",
        f"--data.generated_train={2 * STEPS}",
        "--data.generated_val=2",
        "--data.cache_features=true",
        f"--trainer.max_epochs={EPOCHS}",
    ]

    def arguments(*more: str, name: str) -> list[str]:
        return run_arguments("LlavaNextEncoder", root / "llava", root, name, *own, *more)

    return arguments


@pytest.fixture(scope="module")
def finished():
    return {}


@pytest.fixture
def whole(fit, finished):
    """The uninterrupted run, made once."""
    if not finished:
        finished["whole"] = run(fit(name="whole"))
    return finished["whole"]


def folder(root: Path, name: str) -> Path:
    return root / name / "version_0"


def checkpoint(root: Path, name: str, which: str = "last") -> Path:
    return folder(root, name) / "checkpoints" / f"{which}.ckpt"


def logged(root: Path, *names: str) -> list[tuple[int, str, str]]:
    """(step, name, value) of all that the runs logged, except speed, in order of steps; where two did, the later."""
    rows: list[dict[str, str]] = []
    for name in names:
        with (folder(root, name) / "metrics.csv").open() as file:
            found = list(csv.DictReader(file))
        start = min(int(row["step"]) for row in found)
        rows = [row for row in rows if int(row["step"]) < start] + found
    return [
        (int(row["step"]), key, value)
        for row in sorted(rows, key=lambda row: int(row["step"]))
        for key, value in sorted(row.items())
        if value and key not in ("step", "train/tokens_per_s")
    ]


def run_until(step: int, how: signal.Signals | None, arguments: list[str]) -> None:
    """Interrupts a run by a signal while it takes that step (counted from 0), or kills it outright (None)."""
    taken, sent = SelectorModule.training_step, []

    def training_step(self, batch, batch_idx):
        if self.global_step == step and not sent:
            sent.append(step)
            if how is None:
                raise SystemExit(9)  # nothing that a callback reacts to
            os.kill(os.getpid(), how)
        return taken(self, batch, batch_idx)

    # Python ignores Ctrl-C where the shell that started the tests in the background does.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SelectorModule, "training_step", training_step)
            with pytest.raises(SystemExit):
                run(arguments)
    finally:
        signal.signal(signal.SIGINT, before)


def assert_equal_runs(root: Path, whole, resumed, *parts: str, name: str = "whole") -> None:
    assert resumed.trainer.global_step == whole.trainer.global_step
    expected = whole.model.state_dict()
    for key, tensor in resumed.model.state_dict().items():
        if key.startswith(("selector.", "reconstructor.")):
            torch.testing.assert_close(tensor, expected[key], rtol=0, atol=0, msg=key)
    for ours, theirs in zip(resumed.trainer.optimizers, whole.trainer.optimizers, strict=True):
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    assert logged(root, *parts) == logged(root, name)
    ours, theirs = (torch.load(checkpoint(root, run, "best"), weights_only=True) for run in (parts[-1], name))
    assert ours["global_step"] == theirs["global_step"]
    for key, tensor in ours["state_dict"].items():
        torch.testing.assert_close(tensor, theirs["state_dict"][key], rtol=0, atol=0, msg=key)


def test_the_last_checkpoint_is_the_last_and_the_best_the_best(root, whole):
    scores = [float(value) for _, name, value in logged(root, "whole") if name == "val/rec_learned"]
    assert scores.index(min(scores)) == 0, scores  # a long plateau: otherwise the tests below would show nothing
    last, best = (torch.load(checkpoint(root, "whole", which), weights_only=True) for which in ("last", "best"))
    assert (last["epoch"], last["global_step"]) == (EPOCHS - 1, EPOCHS * STEPS)
    assert (best["epoch"], best["global_step"]) == (0, STEPS)
    assert last["selector"]["validation"]["rec_learned"] == pytest.approx(scores[-1])
    assert sorted(path.name for path in checkpoint(root, "whole").parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    torch.testing.assert_close(
        last["state_dict"]["selector.head.weight"], whole.model.selector.head.weight, rtol=0, atol=0
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
@pytest.mark.parametrize("step", [0, 7, 11])
def test_a_run_interrupted_anywhere_goes_on_as_if_it_had_not_been(root, fit, whole, how, step):
    """Step 0 is before any validation, 7 in the middle of an epoch, 11 its last: the validation comes first."""
    half, resumed = f"half-{how}-{step}", f"resumed-{how}-{step}"
    run_until(step, how, fit(name=half))
    assert torch.load(checkpoint(root, half), weights_only=True)["global_step"] == step + 1
    ran = run(fit(f"--ckpt_path={checkpoint(root, half)}", name=resumed))
    assert_equal_runs(root, whole, ran, half, resumed)


def test_a_run_killed_outright_goes_on_from_its_last_validation(root, fit, whole):
    run_until(4 * STEPS + 1, None, fit(name="killed"))
    assert torch.load(checkpoint(root, "killed"), weights_only=True)["global_step"] == 4 * STEPS
    assert torch.load(checkpoint(root, "killed", "best"), weights_only=True)["global_step"] == STEPS
    ran = run(fit(f"--ckpt_path={checkpoint(root, 'killed')}", name="after-kill"))
    assert_equal_runs(root, whole, ran, "killed", "after-kill")


@pytest.mark.parametrize(
    ("setting", "step", "saved"),
    [
        ("--trainer.check_val_every_n_epoch=2", 8, 9),  # the last step of an epoch without validation
        ("--trainer.val_check_interval=0.5", 7, 8),
        ("--trainer.val_check_interval=2", 8, 9),  # the last step of an epoch, its validation one step earlier
        ("--trainer.accumulate_grad_batches=2", 6, 7),
        ("--data.workers=1", 7, 8),
    ],
)
def test_other_rhythms_resume_too(root, fit, setting, step, saved):
    name = setting.rpartition(".")[2]
    more = [setting, "--data.cache_features=false"]
    uninterrupted = run(fit(*more, name=f"whole-{name}"))
    run_until(step, signal.SIGINT, fit(*more, name=f"half-{name}"))
    assert torch.load(checkpoint(root, f"half-{name}"), weights_only=True)["global_step"] == saved
    ran = run(fit(*more, f"--ckpt_path={checkpoint(root, f'half-{name}')}", name=f"resumed-{name}"))
    assert_equal_runs(root, uninterrupted, ran, f"half-{name}", f"resumed-{name}", name=f"whole-{name}")


def test_without_the_earlier_best_a_resumed_run_says_that_it_starts_over(root, fit, whole):
    lost = root / "lost"
    shutil.copytree(checkpoint(root, "whole").parent, lost)
    state = torch.load(lost / "last.ckpt", weights_only=True)
    for callback in state["callbacks"].values():
        if callback.get("monitor"):
            callback["best_model_path"] = str(lost / "best.ckpt")
    torch.save(state, lost / "last.ckpt")
    (lost / "best.ckpt").unlink()
    with pytest.warns(UserWarning, match=r"best checkpoint so far is no longer at .*lost/best\.ckpt: .* starts over"):
        run(fit(f"--ckpt_path={lost / 'last.ckpt'}", f"--trainer.max_epochs={EPOCHS + 1}", name="lost-best"))
    best = torch.load(checkpoint(root, "lost-best", "best"), weights_only=True)
    assert best["global_step"] == (EPOCHS + 1) * STEPS


def test_a_checkpoint_within_an_epoch_keeps_the_figures_of_the_last_validation(root, fit, whole):
    run_until(3 * STEPS, signal.SIGINT, fit(name="figures"))
    first = torch.load(checkpoint(root, "figures"), weights_only=True)["selector"]["validation"]
    again = [f"--ckpt_path={checkpoint(root, 'figures')}"]
    run_until(3 * STEPS + 1, signal.SIGINT, fit(*again, name="figures-again"))
    second = torch.load(checkpoint(root, "figures-again"), weights_only=True)["selector"]["validation"]
    assert first == second != {}


def test_a_run_that_ended_within_an_epoch_can_be_made_longer(root, fit):
    run(fit("--trainer.max_steps=4", name="short"))
    assert torch.load(checkpoint(root, "short"), weights_only=True)["global_step"] == 4
    ran = run(fit(f"--ckpt_path={checkpoint(root, 'short')}", "--trainer.max_steps=11", name="longer"))
    assert ran.trainer.global_step == 11
    steps = [step for step, name, _ in logged(root, "short", "longer") if name == "train/loss"]
    assert steps == list(range(11))
