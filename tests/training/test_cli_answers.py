"""Training on answers, end to end on a tiny random LLaVA-NeXT: fit, resume, two processes, export, swap in."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from selector import TokenSelector, select_tokens
from selector.measure.answering import prepare
from selector.models import encode
from training.cli import main, run

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def fit(tmp_path, llava_folder, run_arguments):
    """``fit(*more)`` -> arguments of a small run."""
    own = [
        "--model.objectives+=training.answers.Answers",
        "--model.architecture=image-transformer",
        "--model.width=16",
        "--model.heads=2",
        "--model.layers=1",
        "--model.questions=2",
        "--model.answer_tokens=3",
        "--model.warmup_steps=2",
        "--data.generated=documents+scenes",
        "--data.generated_val=2",
    ]

    def arguments(*more: str, name: str = "run") -> list[str]:
        return run_arguments("LlavaNextModel", llava_folder, tmp_path / "runs", name, *own, *more)

    return arguments


def version(tmp_path: Path, name: str = "run") -> Path:
    return tmp_path / "runs" / name / "version_0"


@pytest.mark.slow
def test_fit_validates_by_answers_exports_and_swaps_in(tmp_path, fit, tiny_model, make_image):
    answers = tmp_path / "answers"
    assert main(fit("--model.inputs=both", f"--model.answers_dir={answers}")) == 0
    with (version(tmp_path) / "metrics.csv").open() as file:
        logged = {name for row in csv.DictReader(file) for name, value in row.items() if value}
    wanted = {
        f"val/{what}_{ranker}_{at}"
        for what in ("kl", "same")
        for ranker in ("learned", "random", "leverage")
        for at in (50, 25, 10)
    }
    assert wanted | {"val/criterion", "kl", "undecided", "spread", "train/loss"} <= logged
    (file,) = answers.iterdir()
    assert all(len(json.loads(line)["ids"]) <= 3 for line in file.read_text().split("\n") if line)

    out = tmp_path / "out"
    assert main(["export", str(version(tmp_path) / "checkpoints" / "best.ckpt"), str(out)]) == 0
    card = (out / "README.md").read_text()
    assert "answers that stay the same" in card
    assert "| objective | Answers, 6 steps |" in card
    selector = TokenSelector.from_pretrained(out)
    assert selector.needs == {"features", "projected"}
    model, processor = tiny_model()
    inputs = prepare(processor, make_image(40, 70), "what is this?", model.device)
    with select_tokens(model, selector, keep=9) as log:
        model.generate(**inputs, max_new_tokens=2)
    assert log.measured == [9]


@pytest.mark.slow
def test_a_selector_that_reads_the_question_ranks_anew_for_each(tmp_path, fit, tiny_model, make_image):
    settings = [
        "--model.inputs=projected",
        "--model.question=true",
        "--model.objectives+=training.answers.AnswerSaliency",
    ]
    assert main(fit(*settings)) == 0
    out = tmp_path / "out"
    assert main(["export", str(version(tmp_path) / "checkpoints" / "last.ckpt"), str(out)]) == 0
    selector = TokenSelector.from_pretrained(out)
    assert selector.sees_question
    model, processor = tiny_model()
    scores = []
    for question in ("what is this?", "is it a red square?"):
        inputs = prepare(processor, make_image(64, 64), question, model.device)
        with select_tokens(model, selector, keep=12) as log, torch.no_grad():
            model(**inputs)
        assert log.measured == [12]
        with torch.no_grad():
            scores.append(selector.score(encode(model, inputs, selector.needs).tokens))
    assert not torch.allclose(*scores)


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--model.objectives+=training.objectives.SampledBudget"], []])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, fit, more):
    whole = run(fit(*more, name="whole")).model.state_dict()

    from training.module import SelectorModule

    def stop(self):
        self.trainer.should_stop = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelectorModule, "on_train_epoch_end", stop)
        run(fit(*more, name="half"))
    last = version(tmp_path, "half") / "checkpoints" / "last.ckpt"
    resumed = run(fit(*more, f"--ckpt_path={last}", name="resumed"))
    assert resumed.trainer.global_step == 6
    trained = [name for name in whole if name.startswith(("selector.", "reconstructor."))]
    assert trained
    for name in trained:
        torch.testing.assert_close(resumed.model.state_dict()[name], whole[name], rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_two_processes(tmp_path, fit):
    ran = run(fit("--trainer.strategy=ddp_fork", "--trainer.devices=2", "--trainer.max_epochs=1"))
    assert ran.trainer.world_size == 2
    state = torch.load(version(tmp_path) / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in state["state_dict"].values())


@pytest.mark.slow
def test_bfloat16_and_gradient_checkpointing_change_little(fit):
    """A model in bfloat16 trains; checkpointing gives the same loss as keeping everything."""
    half = run(fit("--model.encoder.dtype=bfloat16", "--trainer.max_epochs=1", name="half"))
    assert half.model.selector.head.weight.dtype == torch.float32
    assert bool(half.trainer.callback_metrics["train/loss"].isfinite())

    losses = []
    for again in ("true", "false"):
        setting = f"--model.encoder.gradient_checkpointing={again}"
        ran = run(fit(setting, "--trainer.max_epochs=1", name=f"checkpointing-{again}"))
        assert not ran.model.encoder.model.model.vision_tower.training
        losses.append(ran.trainer.callback_metrics["train/loss"])
    torch.testing.assert_close(*losses)


@pytest.mark.slow
def test_a_folder_with_questions(tmp_path, fit, capsys):
    place = tmp_path / "pages"
    (place / "images").mkdir(parents=True)
    for index in range(6):
        Image.effect_noise((48, 32), 20 + 10 * index).convert("RGB").save(place / "images" / f"{index}.png")
    rows = [
        {"image": f"{index}.png", "qa": [{"q": "what is this?", "a": "noise"}, {"q": "is it red?"}]}
        for index in range(6)
    ]
    (place / "annotations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ran = run(fit(f"--data.images={place}", "--data.val_share=0.4", "--trainer.max_epochs=1"))
    assert ran.trainer.global_step >= 1

    (place / "annotations.jsonl").write_text("\n".join(json.dumps({"image": f"{index}.png"}) for index in range(6)))
    assert main(fit(f"--data.images={place}", "--data.val_share=0.4", name="none")) == 2
    assert "data.images must hold questions to learn from answers" in capsys.readouterr().err
    rows[0]["qa"] = [{"q": 5}]
    (place / "annotations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(fit(f"--data.images={place}", "--data.val_share=0.4", name="five")) == 2
    assert "a question is not a text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.cache_features=true"], "data.cache_features must be false"),
        (["--model.questions=0"], "model.questions must be at least 1, got 0"),
        (["--model.question=true", "--model.inputs=features"], "inputs must hold the projected tokens"),
        (
            ["--model.question=true", "--model.architecture=gumbel"],
            "model.question needs architecture image-transformer",
        ),
        (
            ["--model.question=true", "--model.objectives+=training.objectives.SampledBudget"],
            "model.question needs objectives that ask questions, and none that reconstructs",
        ),
        (["--model.width=10"], "width must be a multiple of 4 * heads, got width 10 and 2 heads"),
    ],
)
def test_bad_inputs_end_with_one_line(fit, capsys, arguments, message):
    assert main(fit(*arguments)) == 2
    assert message in capsys.readouterr().err
