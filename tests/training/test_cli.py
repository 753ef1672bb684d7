"""The commands, end to end on a tiny random LLaVA-NeXT and generated pages: fit, resume, validate, export, errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from selector.base import TokenSelector
from selector.budget import Budget
from selector.tokens import VisualTokens
from training.cli import main, run
from training.comparison import RANKERS
from training.encoders import LlavaNextEncoder

pytestmark = pytest.mark.usefixtures("quiet")

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "train").glob("*.yaml"))


@pytest.fixture
def fit(tmp_path, llava_folder, run_arguments):
    """``fit(*more)`` -> arguments of a small run on the tiny tower."""

    def arguments(*more: str, command: str = "fit", name: str = "run") -> list[str]:
        own = ["--data.generated_val=3", *more]
        return run_arguments("LlavaNextEncoder", llava_folder, tmp_path / "runs", name, *own, command=command)

    return arguments


def checkpoint(tmp_path: Path, which: str = "last", name: str = "run", version: int = 0) -> Path:
    return tmp_path / "runs" / name / f"version_{version}" / "checkpoints" / f"{which}.ckpt"


def test_fit_logs_compares_the_rankings_and_exports(tmp_path, fit, capsys):
    assert main(fit("--data.cache_features=true")) == 0
    folder = tmp_path / "runs" / "run" / "version_0"
    with (folder / "metrics.csv").open() as file:
        logged = {name for row in csv.DictReader(file) for name, value in row.items() if value}
    wanted = {f"val/rec_{ranker}_{share}" for ranker in RANKERS for share in (50, 25, 10)}
    assert wanted | {"val/rec_learned", "val/cos_learned_25", "val/agreement_25", "val/keep_drawn"} <= logged
    assert {"train/loss", "rec", "rank", "keep"} <= logged
    assert list(folder.glob("events.out.tfevents.*"))
    state = torch.load(checkpoint(tmp_path, "best"), weights_only=True)
    assert not [name for name in state["state_dict"] if name.startswith("encoder.")]

    out = tmp_path / "out"
    assert main(["export", str(checkpoint(tmp_path, "best")), str(out), "--command", "selector-train fit ..."]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "training.yaml",
    ]
    selector = TokenSelector.from_pretrained(out)
    for name, tensor in selector.state_dict().items():
        torch.testing.assert_close(tensor, state["state_dict"][f"selector.{name}"], rtol=0, atol=0)
    assert bool((selector.feature_std != 1).all())  # statistics came along
    config = json.loads((out / "config.json").read_text())
    assert config["init_args"]["dim"] == 32
    seen = state["selector"]["validation"]
    card = (out / "README.md").read_text()
    assert f"{seen['rec_learned_25']:.3f}" in card
    assert "selector-train fit ..." in card
    assert yaml.safe_load((out / "training.yaml").read_text())["data"]["generated_train"] == 6
    tokens = VisualTokens.from_features(torch.randn(2, 16, 32))
    assert selector(tokens, Budget(5, newlines="none")).sum(1).tolist() == [5, 5]


@pytest.mark.slow
def test_a_checkpoint_with_a_missing_tensor_or_another_width_is_refused(tmp_path, fit):
    assert main(fit("--trainer.max_epochs=1")) == 0
    out = tmp_path / "out"
    main(["export", str(checkpoint(tmp_path)), str(out)])
    weights = load_file(out / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if name != "head.bias"}, out / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)does not fit GumbelSelector.*head\.bias"):
        TokenSelector.from_pretrained(out)
    save_file(weights, out / "model.safetensors")
    with pytest.raises(ValueError, match="reads features of width 32, got width 40"):
        TokenSelector.from_pretrained(out).score(VisualTokens.from_features(torch.randn(1, 16, 40)))
    with pytest.raises(ValueError, match="reads 16 patches per tile, got 9"):
        TokenSelector.from_pretrained(out).score(VisualTokens.from_features(torch.randn(1, 9, 32)))

    state = torch.load(checkpoint(tmp_path), weights_only=True)
    del state["state_dict"]["selector.head.bias"]
    torch.save(state, tmp_path / "cut.ckpt")
    from training.export import export

    with pytest.raises(ValueError, match=r"(?s)does not fit a GumbelSelector.*head\.bias"):
        export(tmp_path / "cut.ckpt", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["SampledBudget", "StraightThrough", "Paper"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, fit, objective):
    settings = [f"--model.objectives+=training.objectives.{objective}", "--model.warmup_steps=2"]
    whole = run(fit(*settings, name="whole")).model.state_dict()

    from training.module import SelectorModule

    def stop(self):
        self.trainer.should_stop = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelectorModule, "on_train_epoch_end", stop)
        half = run(fit(*settings, name="half"))
    assert half.trainer.global_step == 3
    resumed = run(fit(*settings, f"--ckpt_path={checkpoint(tmp_path, name='half')}", name="resumed"))
    assert resumed.trainer.global_step == 6
    for name, tensor in resumed.model.state_dict().items():
        if name.startswith(("selector.", "reconstructor.")):
            torch.testing.assert_close(tensor, whole[name], rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_resuming_with_another_encoder_is_refused(tmp_path, fit, tiny_model, capsys):
    assert main(fit("--trainer.max_epochs=1")) == 0
    other = tiny_model()[0]
    changed = tmp_path / "changed"
    state = {name: tensor + 0.01 for name, tensor in other.state_dict().items()}
    other.save_pretrained(changed, state_dict=state)
    tiny_model()[1].save_pretrained(changed)
    arguments = [part for part in fit() if "encoder.path" not in part]
    assert main([*arguments, f"--model.encoder.path={changed}", f"--ckpt_path={checkpoint(tmp_path)}"]) == 2
    assert "ckpt_path was trained on another encoder" in capsys.readouterr().err


@pytest.mark.slow
def test_fast_dev_run_validate_and_test(tmp_path, fit):
    assert main(fit("--trainer.fast_dev_run=true")) == 0
    assert not (tmp_path / "runs" / "run" / "version_0" / "checkpoints").exists()
    assert main(fit("--trainer.max_epochs=1")) == 0
    for command in ("validate", "test"):
        ran = run([*(part for part in fit(command=command)), f"--ckpt_path={checkpoint(tmp_path, 'best')}"])
        stage = "val" if command == "validate" else "test"
        assert f"{stage}/rec_learned_25" in ran.trainer.callback_metrics


@pytest.mark.slow
def test_bfloat16(fit):
    ran = run(fit("--trainer.precision=bf16-mixed", "--trainer.max_epochs=1"))
    assert ran.trainer.global_step == 3
    assert ran.model.selector.head.weight.dtype == torch.float32
    assert bool(ran.trainer.callback_metrics["train/loss"].isfinite())


@pytest.mark.slow
def test_gradients_are_clipped_to_the_norm_asked_for(fit, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def recorded(self, closure):
        def measured():
            loss = closure()  # gradients, clipped
            squares = [p.grad.square().sum() for group in self.param_groups for p in group["params"]]
            norms.append(float(torch.stack(squares).sum().sqrt()))
            return loss

        return step(self, measured)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    for norm in ("1e-3", "0"):  # 0 does not clip
        run(fit(f"--model.clip_norm={norm}", "--trainer.max_epochs=1", name=f"clip-{norm}"))
    assert norms[:3] == pytest.approx([1e-3] * 3, rel=1e-3)
    assert min(norms[3:]) > 0.1


@pytest.mark.slow
def test_two_processes_share_the_work_and_agree(tmp_path, fit):
    """Simulated DDP over gloo, forked: 6 images in batches of 2 are two steps for two processes (three for one)."""
    ran = run(
        fit(
            "--trainer.strategy=ddp_fork",
            "--trainer.devices=2",
            "--trainer.max_epochs=1",
        )
    )
    assert ran.trainer.world_size == 2
    state = torch.load(checkpoint(tmp_path), weights_only=True)
    assert state["global_step"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in state["state_dict"].values())


@pytest.mark.slow
def test_timm_on_a_folder_of_images(tmp_path, fit):
    images = tmp_path / "images"
    images.mkdir()
    for index in range(6):
        Image.effect_noise((48, 32), 20 + 10 * index).convert("RGB").save(images / f"{index}.png")
    rows = [json.dumps({"image": f"{index}.png", "source": "Noise", "licence": "CC0"}) for index in range(6)]
    (images / "annotations.jsonl").write_text("\n".join(rows))
    arguments = [part for part in fit() if "--model.encoder" not in part]
    timm = ["--model.encoder=training.encoders.TimmEncoder", "--model.encoder.name=test_vit"]
    more = ["--model.encoder.pretrained=false", "--model.encoder.image_size=64", f"--data.images={images}"]
    ran = run([*arguments, *timm, *more, "--trainer.max_epochs=1", "--data.val_share=0.4"])
    assert ran.model.selector.num_patches == 16
    assert ran.trainer.global_step == 2
    assert main(["export", str(checkpoint(tmp_path)), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| trained on | {ran.datamodule.describe()} |" in card
    assert f"| Noise | CC0 | {len(ran.datamodule._split('train'))} |" in card


@pytest.mark.slow
def test_a_ranking_that_loses_to_random_is_an_error(tmp_path, fit, capsys, monkeypatch):
    from training.module import SelectorModule

    turned = SelectorModule._compare

    def upside_down(self, batch, batch_idx, stage):
        score = self.selector.score
        self.selector.score = lambda tokens: -_distance(self, tokens)
        try:
            turned(self, batch, batch_idx, stage)
        finally:
            self.selector.score = score

    monkeypatch.setattr(SelectorModule, "_compare", upside_down)
    arguments = [part for part in fit() if "allow_worse_than_random" not in part]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "the deterministic ranking is worse than random tokens at" in error
    assert checkpoint(tmp_path).is_file()  # the run is kept, to look at


def _distance(module, tokens):
    """From the mean token: an untrained reconstructor misses these most, so keeping the nearest is upside down."""
    target = module.selector.table(tokens)
    return target.pow(2).mean(-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.images=EMPTY"], "data.images must hold images"),
        (["--data.images=NOWHERE"], "data.images must be a folder of images"),
        (["--data.generated=pages"], "data.generated must be 'mixed' or one or more of"),
        (["--model.question=true"], "model.question needs architecture image-transformer"),
        (["--model.match_rank=4"], "model.match_rank needs model.question, got 4 without it"),
        (
            ["--model.architecture=image-transformer", "--model.objectives+=training.objectives.Paper"],
            "Paper needs architecture gumbel",
        ),
        (["--model.objectives+=training.answers.Answers"], "model.encoder must be a LlavaNextModel for Answers"),
        (["--model.kept_shares=[0.5,1.0]"], "model.kept_shares must be shares in (0, 1)"),
        (["--model.heads=5"], "must be a multiple of heads, got 5"),
        (["--trainer.max_epochs=-1"], "trainer.max_epochs or trainer.max_steps must be positive"),
    ],
)
def test_bad_inputs_end_with_one_line(tmp_path, fit, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    names = {"EMPTY": str(tmp_path / "empty"), "NOWHERE": str(tmp_path / "nowhere")}
    for short, path in names.items():
        arguments = [part.replace(short, path) for part in arguments]
    assert main(fit(*arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert [line for line in error.splitlines() if "error" in line] == [error.splitlines()[-1]]


def test_a_config_of_the_repository_is_found_from_anywhere(tmp_path, monkeypatch):
    """As `selector compare --config` finds its own; a file of that name here wins."""
    from training.cli import _with_configs

    monkeypatch.chdir(tmp_path)
    name, root = "configs/train/tiny.yaml", Path(__file__).resolve().parent.parent.parent
    assert _with_configs(["fit", "--config", name]) == ["fit", "--config", str(root / name)]
    assert _with_configs(["fit", f"--config={name}", "--name", "x"]) == [
        "fit",
        f"--config={root / name}",
        "--name",
        "x",
    ]
    assert _with_configs(["fit", "--config", "none.yaml", "--config"]) == ["fit", "--config", "none.yaml", "--config"]
    (tmp_path / "configs/train").mkdir(parents=True)
    (tmp_path / name).write_text("{}")
    assert _with_configs(["fit", "--config", name]) == ["fit", "--config", name]


def test_export_names_what_is_no_checkpoint(tmp_path, capsys):
    assert main(["export", str(tmp_path / "none.ckpt"), str(tmp_path / "out")]) == 2
    assert "checkpoint must be a .ckpt file of a training run" in capsys.readouterr().err
    torch.save({"model": 1}, tmp_path / "foreign.ckpt")
    assert main(["export", str(tmp_path / "foreign.ckpt"), str(tmp_path / "out")]) == 2
    assert "was not written by selector-train" in capsys.readouterr().err
    torch.save({"selector": {"encoder": {}, "data": ""}, "state_dict": {}}, tmp_path / "older.ckpt")
    assert main(["export", str(tmp_path / "older.ckpt"), str(tmp_path / "out")]) == 2
    assert "it lacks ['class', 'objective', 'steps', 'tokens_per_s', 'validation']" in capsys.readouterr().err
    torch.save({"selector": Path("a")}, tmp_path / "pickled.ckpt")
    assert main(["export", str(tmp_path / "pickled.ckpt"), str(tmp_path / "out")]) == 2
    assert "cannot be read safely" in capsys.readouterr().err


def test_help_and_unknown_commands(capsys):
    assert main(["--help"]) == 0
    assert "selector-train export" in capsys.readouterr().out
    assert main(["train"]) == 2
    assert "command must be one of fit, validate, test, export, bench, got 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_parses(config, capsys):
    with pytest.raises(SystemExit) as stop:
        run(["fit", f"--config={config}", "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["encoder"]["class_path"].startswith("training.encoders.")


@pytest.mark.parametrize("flag", ["--config=", "--config ", "-c "])
def test_shipped_configs_and_models_are_found_from_any_folder(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(["fit", *f"{flag}configs/train/tiny.yaml".split(), "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["name"] == "tiny"
    assert LlavaNextEncoder("checkpoints/llava-next-tiny").num_patches == 144

    (tmp_path / "configs" / "train").mkdir(parents=True)  # the folder where one is comes first
    (tmp_path / "configs" / "train" / "tiny.yaml").write_text("name: mine")
    with pytest.raises(SystemExit):
        run(["fit", *f"{flag}configs/train/tiny.yaml".split(), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["name"] == "mine"


@pytest.mark.slow
def test_a_cache_on_disk_trains_as_the_one_in_memory(tmp_path, fit, capsys):
    memory = run(fit("--data.cache_features=true", name="memory")).model.state_dict()
    cache = [f"--data.cache_dir={tmp_path / 'cache'}", "--data.cache_dtype=float32"]
    for name in ("first", "second"):
        for key, tensor in run(fit(*cache, "--data.workers=1", name=name)).model.state_dict().items():
            torch.testing.assert_close(tensor, memory[key], rtol=0, atol=0, msg=key)
    assert len(list((tmp_path / "cache").glob("*/index.json"))) == 2  # training and validation, the second run none
    for shard in (tmp_path / "cache").glob("*/*.safetensors"):
        shard.write_bytes(b"cut")
    assert main(fit(*cache, name="third")) == 2
    assert "is damaged (3 of " in capsys.readouterr().err


@pytest.mark.slow
def test_wandb_by_one_flag_needs_no_account(tmp_path, fit, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    ran = run(fit("--wandb=offline", "--trainer.max_epochs=1"))
    import wandb

    wandb.finish()
    assert [type(logger).__name__ for logger in ran.trainer.loggers] == [
        "CSVLogger",
        "TensorBoardLogger",
        "WandbLogger",
    ]
    assert list((tmp_path / "runs" / "wandb").glob("offline-run-*/*.wandb"))
