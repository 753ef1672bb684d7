"""Pictures while training: drawn from the selector as it is, and written where TensorBoard finds them."""

from __future__ import annotations

import numpy as np
import pytest
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from selector.methods.random import Random
from selector.methods.svd_prune import SVDPrune
from training.pictures import KeptPictures

MODEL = "checkpoints/llava-next-tiny"


@pytest.fixture
def callback(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    return KeptPictures(MODEL, keep=64)


def test_pictures_follow_the_selector(callback):
    first, second = callback.strips(Random())[0], callback.strips(SVDPrune())[0]
    assert first.size == second.size
    assert not np.array_equal(np.asarray(first), np.asarray(second))


class Holder(LightningModule):
    """A module with a selector, as `SelectorModule` has one."""

    def __init__(self) -> None:
        super().__init__()
        self.selector = Random()


@pytest.mark.parametrize("sanity", [False, True])
def test_pictures_reach_tensorboard_but_not_in_the_sanity_check(callback, tmp_path, sanity):
    logger = TensorBoardLogger(tmp_path)
    trainer = Trainer(logger=logger, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)
    trainer.sanity_checking = sanity
    callback.on_validation_end(trainer, Holder())
    logger.log_metrics({"x": 1.0})
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Tags()["images"] == ([] if sanity else ["val/kept/0", "val/kept/1"])
