"""The two checkpoints of a run: ``best.ckpt`` and ``last.ckpt``, and what happens to them when it is interrupted.

``last.ckpt`` is written after every validation, whether or not it was the best. At the first Ctrl-C, or at SIGTERM, it
is written after the current step: between two steps, never inside one, where weights, optimizer and counters would not
match. A process that is killed outright leaves the checkpoint of its last validation.

A run resumed from ``last.ckpt`` takes the steps that the uninterrupted run would have taken, in a folder of its own,
whose ``metrics.csv`` continues at the step where the checkpoint was written. There is one exception: a run that
``max_steps`` ended within an epoch and that is then made longer. Lightning counts that epoch as done, and the next one
is shorter by its batches.
"""

from __future__ import annotations

import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from selector.files import atomic


class BestCheckpoint(ModelCheckpoint):
    """``best.ckpt``: the validation whose deterministic ranking reconstructed best.

    A resumed run writes to another folder than the one before it, and Lightning then forgets the score to beat. Here
    the run copies the earlier ``best.ckpt``, so that its folder holds the best of the whole training.

    >>> best = BestCheckpoint()
    >>> best.monitor, best.mode, best.format_checkpoint_name({})
    ('val/criterion', 'min', 'best.ckpt')
    """

    def __init__(self) -> None:
        super().__init__(monitor="val/criterion", mode="min", filename="best")
        self._before: dict[str, Any] = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the whole state: Lightning's own loading drops the score of another folder."""
        super().load_state_dict(state_dict)
        self._before = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copies the best checkpoint of the run that is resumed, and takes over its score."""
        super().on_train_start(trainer, pl_module)
        before, self._before = self._before, {}
        if self.best_k_models or before.get("best_model_score") is None or self._should_skip_saving_checkpoint(trainer):
            return  # the same folder, a new run, or no validation yet

        # A file that is gone, or that another run has overwritten since, is not the best of this training. All
        # processes have to agree, since a folder may be visible to some of them only.
        earlier, ours = _find_earlier(before["best_model_path"], trainer.ckpt_path), self._path()
        if trainer.strategy.reduce_boolean_decision(_score(earlier) != float(before["best_model_score"]), all=False):
            rank_zero_warn(f"the best checkpoint so far is no longer at {earlier}: best.ckpt starts over with this run")
            self.best_model_path = ""
            return

        # One process copies, and no other goes on before the file is there.
        if trainer.is_global_zero:
            _copy(earlier, ours)
        trainer.strategy.barrier("best.ckpt")

        # The state that Lightning would have if this run had written the file itself.
        score = before["best_model_score"]
        self.best_model_path = self.kth_best_model_path = str(ours)
        self.best_model_score = self.kth_value = score
        self.best_k_models = {str(ours): score}

    def _path(self) -> Path:
        return Path(self.format_checkpoint_name({}))


class LastCheckpoint(ModelCheckpoint):
    """``last.ckpt``: after every validation, and where a run is interrupted.

    It must come after `BestCheckpoint` in the list of callbacks, whose state it saves.

    >>> from pytorch_lightning.demos.boring_classes import BoringModel
    >>> short = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 0, "logger": False}
    >>> quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    >>> trainer = Trainer(accelerator="cpu", callbacks=[LastCheckpoint()], **short, **quiet)
    >>> trainer.fit(BoringModel())
    >>> Path(trainer.checkpoint_callback.best_model_path).name
    'last.ckpt'
    """

    def __init__(self) -> None:
        super().__init__(filename="last", enable_version_counter=False)  # a second one overwrites, no last-v1.ckpt
        self._interrupted = self._stops = False
        self._handler: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over Ctrl-C, unless the program around the training already handles it."""
        super().on_train_start(trainer, pl_module)
        self._interrupted = self._stops = False

        ours = threading.current_thread() is threading.main_thread()  # no other thread may set a handler
        if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._handler = signal.signal(signal.SIGINT, self._on_interrupt)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives Ctrl-C back."""
        self._restore_handler()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives Ctrl-C back: after an error Lightning does not call `teardown`."""
        self._restore_handler()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ends an interrupted run, once its checkpoint is written and its last step is logged."""
        if self._stops:  # not where the checkpoint is written: Lightning logs a step after all hooks of its end
            raise KeyboardInterrupt

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the checkpoint of an interrupted run between two steps."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

        # Where a validation or the end of the epoch comes next, or gradients are still accumulated, it waits for those.
        done = batch_idx + 1
        check = trainer.val_check_batch
        waits = (
            done == trainer.num_training_batches
            or done % trainer.accumulate_grad_batches
            or (check is not None and done % check == 0)
        )

        # Last, since asking the other processes costs a round trip.
        if not waits and self._is_interrupted(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the checkpoint of a run interrupted during a validation within an epoch."""
        super().on_validation_end(trainer, pl_module)

        # Where checkpoints are written at the end of the epoch, `on_train_epoch_end` writes this one too.
        within = not trainer.sanity_checking and not self._should_save_on_train_epoch_end(trainer)
        if within and trainer.state.fn == "fit" and self._is_interrupted(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the checkpoint of a run interrupted during the last step or validation of an epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._is_interrupted(trainer):
            self._save(trainer)

    def _on_interrupt(self, *_: object) -> None:
        self._restore_handler()  # so that a second Ctrl-C stops at once
        self._interrupted = True
        rank_zero_info("\ninterrupted: last.ckpt is written after this step; Ctrl-C again stops at once, without it")

    def _restore_handler(self) -> None:
        if self._handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._handler)
        self._handler = None

    def _is_interrupted(self, trainer: Trainer) -> bool:
        """The same answer in all processes: they write a checkpoint together or not at all."""
        mine = self._interrupted or trainer.received_sigterm
        return mine if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(mine, all=False)

    def _save(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        rank_zero_info(f"stopped after step {trainer.global_step}; go on with --ckpt_path {self.best_model_path}")
        self._stops = True  # unless it was SIGTERM, where Lightning raises an exception of its own


def _find_earlier(recorded: str, resumed: Any) -> Path:
    """The earlier ``best.ckpt``: where it was written, or beside the checkpoint resumed from if the run was moved."""
    beside = Path(resumed or "").parent / Path(recorded).name
    return beside if resumed and beside.is_file() else Path(recorded)


def _score(path: Path) -> float | None:
    """The score that a ``best.ckpt`` says it had; None without one."""
    if not path.is_file():
        return None

    # The state's name is the class followed by its arguments, so only its start is known.
    states = torch.load(path, map_location="cpu", weights_only=True)["callbacks"]
    scores = [state["best_model_score"] for name, state in states.items() if name.startswith("BestCheckpoint")]
    return float(scores[0]) if scores else None


def _copy(source: Path, target: Path) -> None:
    """All of the file or nothing: an interrupted copy leaves no truncated ``best.ckpt``."""
    with atomic(target) as partial:
        shutil.copyfile(source, partial)
