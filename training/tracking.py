"""What a run's loggers know about it from the start: the whole configuration, and the revision of the code."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger


def log_config(loggers: Sequence[Logger], config: Mapping[str, Any]) -> None:
    """Hands a configuration to loggers, with the git revision of this package as `git`.

    Weights & Biases gets it as the run's config, TensorBoard as a text and as hyperparameters, any other logger as
    hyperparameters. To be called in one process.

    Args:
        loggers: those of a trainer.
        config: plain values, nested by mappings.
    """
    config = {**config, "git": revision(Path(__file__).parent)}
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            # Nested, as its tables and filters show it; a resumed run may differ from what it was begun with.
            logger.experiment.config.update(config, allow_val_change=True)
        elif isinstance(logger, TensorBoardLogger):
            _to_tensorboard(logger.experiment, config)
        else:
            logger.log_hyperparams(dict(flat(config)))


def revision(folder: Path) -> str | None:
    """The git commit of the code in a folder, ``-dirty`` where tracked files differ from it; None outside a clone.

    Args:
        folder: of the code; an installed package that merely lies below somebody's repository is not part of it.
    """
    # The folder has to be tracked: otherwise the repository found is another project's.
    commands = (["ls-files", "--error-unmatch", "."], ["rev-parse", "HEAD"], ["status", "--porcelain", "-uno", "."])
    try:
        _, commit, changes = (
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or no clone
        return None
    return f"{commit}-dirty" if changes else commit


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """The leaves of a configuration by their path; lists and None as text.

    >>> dict(flat({"model": {"width": 64, "shares": [0.5, 0.1]}, "name": None}))
    {'model.width': 64, 'model.shares': '[0.5, 0.1]', 'name': 'None'}
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, bool | int | float | str) else str(value)


def _to_tensorboard(writer: Any, config: Mapping[str, Any]) -> None:
    """The configuration as a text, and as the hyperparameters of this run, beside the criterion of validation."""
    from torch.utils.tensorboard.summary import hparams

    text = yaml.safe_dump(dict(config), sort_keys=False)
    writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))  # Markdown's code block

    # Not `add_hparams`: it writes a run of its own, with a value of the criterion that nobody has measured yet. The
    # value here is not written either, it only names the column.
    for summary in hparams(dict(flat(config)), {"val/criterion": 0.0}):
        writer.file_writer.add_summary(summary)
    writer.flush()
