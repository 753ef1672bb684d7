"""What the loggers of a run are told: the whole configuration, the revision of the code, and pictures with wandb."""

from __future__ import annotations

import subprocess

import pytest
import yaml
from pytorch_lightning.loggers import WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from training import cli
from training.cli import main, run
from training.pictures import KeptPictures
from training.tracking import flat, revision

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def fit(tmp_path, llava_folder, run_arguments):
    """``fit(*more)`` -> arguments of one epoch on the tiny tower."""

    def arguments(*more: str) -> list[str]:
        own = ["--data.generated_val=2", "--trainer.max_epochs=1", *more]
        return run_arguments("LlavaNextEncoder", llava_folder, tmp_path / "runs", "run", *own)

    return arguments


@pytest.fixture
def committed(tmp_path):
    """A clone with one commit of one file, and its commit."""
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "code.py").write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init"], ["add", "code.py"], [*who, "commit", "-m", "first"]):
        subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
    return folder, head.stdout.strip()


def test_the_revision_is_that_of_the_code_and_says_when_the_code_differs(committed, tmp_path):
    folder, commit = committed
    assert revision(folder) == commit
    (folder / "notes.txt").write_text("not tracked")
    assert revision(folder) == commit
    (folder / "code.py").write_text("2")
    assert revision(folder) == f"{commit}-dirty"


def test_code_outside_of_a_clone_has_no_revision(committed, tmp_path, monkeypatch):
    folder, _ = committed
    installed = folder / "site-packages"
    installed.mkdir()
    (installed / "module.py").write_text("")
    assert revision(installed) is None  # within somebody's clone, but no part of it
    monkeypatch.setenv("PATH", str(tmp_path))
    assert revision(folder) is None  # no git


def test_tensorboard_has_the_whole_configuration(tmp_path, fit, monkeypatch):
    monkeypatch.setattr("training.tracking.revision", lambda folder: "abc-dirty")
    assert main(fit()) == 0
    folder = tmp_path / "runs" / "run" / "version_0"
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"git": "abc-dirty"}

    events = EventAccumulator(str(folder))
    events.Reload()
    (text,) = events.Tensors("config/text_summary")
    assert yaml.safe_load(text.tensor_proto.string_val[0].decode()) == config

    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    logged = {name: value.string_value or value.number_value or value.bool_value for name, value in values.items()}
    wanted = dict(flat(config))
    assert logged.keys() == wanted.keys()
    assert {name: logged[name] for name in wanted if wanted[name]} == {k: v for k, v in wanted.items() if v}
    assert logged["data.batch_size"] == 2
    assert events.Scalars("val/criterion")[0].step > 0  # its value is the validation's alone


class Run:
    """Stands for a run of Weights & Biases: keeps what it is given."""

    def __init__(self):
        self.config, self.logged = Config(), []

    def define_metric(self, *_, **__):
        pass

    def log(self, values, **_):
        self.logged += values


class Config(dict):
    """Its `update` has an argument more than that of a dictionary."""

    def update(self, values, allow_val_change=False):
        super().update(values)


@pytest.fixture
def wandb_run(monkeypatch):
    """What ``--wandb offline`` logs to here."""
    run, plain = Run(), cli._loggers

    def loggers(root, name, wandb):
        made = plain(root, name, "off")
        return made if wandb == "off" else [*made, WandbLogger(name=name, save_dir=root, offline=True, experiment=run)]

    monkeypatch.setattr(cli, "_loggers", loggers)
    return run


@pytest.mark.slow
def test_wandb_has_the_whole_configuration_and_pictures(tmp_path, fit, wandb_run, monkeypatch):
    pictures = []
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, key, images, **_: pictures.append((key, len(images))))
    assert main(fit("--wandb=offline")) == 0
    config = yaml.safe_load((tmp_path / "runs" / "run" / "version_0" / "config.yaml").read_text())
    assert {name: wandb_run.config[name] for name in config} == config
    assert wandb_run.config["git"] == revision(cli_folder())
    assert pictures == [("val/kept/0", 1), ("val/kept/1", 1)]
    assert "train/loss" in wandb_run.logged


def cli_folder():
    from pathlib import Path

    return Path(cli.__file__).parent


def drawing(ran) -> list[KeptPictures]:
    return [each for each in ran.trainer.callbacks if isinstance(each, KeptPictures)]


@pytest.mark.slow
def test_pictures_are_drawn_once_and_only_with_wandb(fit, wandb_run, monkeypatch):
    monkeypatch.setattr(KeptPictures, "on_validation_end", lambda *_: None)
    assert not drawing(run(fit()))
    own = ["--trainer.callbacks+=training.pictures.KeptPictures", "--trainer.callbacks.keep=64"]
    (only,) = drawing(run(fit("--wandb=offline", *own)))
    assert only.keep == 64
    timm = ["--model.encoder=training.encoders.TimmEncoder", "--model.encoder.name=test_vit"]
    arguments = [part for part in fit("--wandb=offline") if "encoder" not in part]
    assert not drawing(run([*arguments, *timm, "--model.encoder.pretrained=false"]))


def test_pictures_need_a_llava_next(capsys, fit):
    timm = ["--model.encoder=training.encoders.TimmEncoder", "--model.encoder.name=test_vit"]
    arguments = [part for part in fit("--trainer.callbacks+=training.pictures.KeptPictures") if "encoder" not in part]
    assert main([*arguments, *timm, "--model.encoder.pretrained=false"]) == 2
    assert "model of KeptPictures must name a LLaVA-NeXT, the encoder is a TimmEncoder" in capsys.readouterr().err
