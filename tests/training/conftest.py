"""Fixtures shared by the tests of training."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(scope="module")
def quiet():
    """Lightning's remarks on the machine would bury what a failing test prints."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.fixture
def llava_folder(tmp_path, tiny_model):
    """A tiny random LLaVA-NeXT on disk, with its processor."""
    for part in tiny_model():
        part.save_pretrained(tmp_path / "llava")
    return str(tmp_path / "llava")


@pytest.fixture(scope="session")
def run_arguments():
    """``run_arguments(encoder, folder, root, name, *more, command="fit")`` -> those that every small run shares."""

    def arguments(encoder: str, folder: object, root: object, name: str, *more: str, command: str = "fit") -> list[str]:
        return [
            command,
            f"--model.encoder=training.encoders.{encoder}",
            f"--model.encoder.path={folder}",
            "--model.allow_worse_than_random=true",
            "--data.generated_train=6",
            "--data.batch_size=2",
            "--trainer.accelerator=cpu",
            "--trainer.max_epochs=2",
            "--trainer.log_every_n_steps=1",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            f"--root={root}",
            f"--name={name}",
            *more,
        ]

    return arguments
