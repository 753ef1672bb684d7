"""``selector-train``: fit, validate and test through LightningCLI; export to a selector folder.

Lightning is imported only when it is needed, so that ``--help``, ``export`` and a misspelt command answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from selector.errors import RankingError
from selector.shipped import candidates

if TYPE_CHECKING:
    from pytorch_lightning.cli import LightningCLI

    from training.module import SelectorModule

HELP = """\
Train a visual-token selector on the frozen features of a vision encoder.

commands
  fit        train; writes runs/train/NAME/version_N/ with checkpoints/best.ckpt (the best validation), last.ckpt (the
             last one; Ctrl-C or SIGTERM: the step under way), config.yaml, metrics.csv
  validate   compare the rankings on the validation images: --config ... --ckpt_path best.ckpt of a run
  test       the same on the test images
  export     write a checkpoint as a selector folder: selector-train export CKPT FOLDER
  bench      what caches, precisions, compilation and processes gain on this machine: selector-train bench --help

examples
  selector-train fit --config configs/train/tiny.yaml                          generated pages, no folder needed
  selector-train fit --config configs/train/tiny.yaml --data.images PHOTOS     your images
  selector-train fit --config configs/train/timm.yaml --model.encoder.init_args.name vit_base_patch16_clip_224.openai
  selector-train fit --config configs/train/tiny.yaml --trainer.fast_dev_run true
  selector-train fit --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt         resume a run as if it had
                                                                                never stopped, in a new version_N
  selector-train fit --config configs/train/llava-next.yaml --data.images PHOTOS --data.cache_dir CACHE
  selector-train export runs/train/tiny/version_0/checkpoints/best.ckpt checkpoints/my-selector
  selector-train export runs/train/tiny/version_0/checkpoints/best.ckpt checkpoints/my-selector --results runs/compare

encode once instead of at every step
  --data.cache_features true    features in memory, for small sets
  --data.cache_dir CACHE        features on disk, for large ones; read again by later runs, resumes where it was stopped
  --data.cache_dtype float32    how they are stored there (default: bfloat16, half the room)

flags of Lightning, all of them: --trainer.devices 4 --trainer.strategy ddp --trainer.precision bf16-mixed ...
  selector-train fit --help                            every argument
  selector-train fit --config ... --print_config       every argument with its value

SELECTOR_TRACEBACK=1 shows where an error comes from.
"""
COMMANDS = ("fit", "validate", "test", "export", "bench")


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``selector-train``.

    Args:
        argv: the arguments after the program's name; None takes the process's own.

    Returns:
        The exit status: 0 done, 1 a ranking worse than random choices, 2 a mistake that the user can fix.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if arguments[0] not in COMMANDS:
        print(f"selector-train: command must be one of {', '.join(COMMANDS)}, got {arguments[0]!r}", file=sys.stderr)
        return 2

    try:
        # Not commands of Lightning's: they have no configuration, and no trainer to build.
        if arguments[0] == "export":
            return _export(arguments[1:])
        if arguments[0] == "bench":
            from training import bench

            return bench.main(arguments[1:])
        run(arguments)
    except (ValueError, OSError) as error:  # ours are ValueErrors, and Lightning's about settings too
        if os.environ.get("SELECTOR_TRACEBACK"):
            raise
        print(f"selector-train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RankingError as error:
        print(f"selector-train: error: {error}", file=sys.stderr)
        return 1
    return 0


def _export(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="selector-train export", description="Write a checkpoint as a selector folder."
    )
    parser.add_argument("checkpoint", help="best.ckpt or last.ckpt of a run")
    parser.add_argument("folder", help="where to, such as checkpoints/my-selector")
    parser.add_argument("--command", help="how the run was started, for the card")
    parser.add_argument("--accuracy", help="a Markdown file for the end of the card: results on tasks")
    parser.add_argument(
        "--results", metavar="RUN", help="folder of a `selector compare` with this selector: fills the card's results"
    )
    parser.add_argument("--pictures", nargs="+", default=[], metavar="FILE", help="images to show at the card's end")
    options = parser.parse_args(arguments)

    # Only now: torch takes seconds to import, a wrong flag should not.
    from training.export import export

    written = export(
        options.checkpoint, options.folder, options.command, options.accuracy, options.results, options.pictures
    )
    print(written)
    return 0


def run(arguments: list[str]) -> LightningCLI:
    """Runs one Lightning command.

    Args:
        arguments: ``fit``, ``validate`` or ``test``, and its flags.

    Returns:
        The CLI object when the command has ended, with its `trainer`, `model` and `datamodule`.

    Raises:
        ValueError: settings that break a rule, with the rule.
        RankingError: the trained ranking is worse than random choices.
    """
    import yaml
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

    from training import answers  # noqa: F401 (objectives can be named in YAML once their classes are known)
    from training.checkpoints import BestCheckpoint, LastCheckpoint
    from training.data import ImageModule
    from training.module import SelectorModule
    from training.throughput import Throughput
    from training.tracking import log_config

    class LogConfig(SaveConfigCallback):
        """Lightning's ``config.yaml``, and the same for the loggers."""

        def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
            log_config(trainer.loggers, yaml.safe_load(self.parser.dump(self.config, skip_none=False)))

    class SelectorCLI(LightningCLI):
        """Adds the run's name, the wandb switch, default loggers and checkpoints."""

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument("--name", default="selector", help="the run's folder below --root")
            parser.add_argument("--root", default="runs/train", help="folder of all runs")
            parser.add_argument(
                "--wandb", default="off", choices=["off", "offline", "online"], help="log to Weights & Biases too"
            )

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            settings = self.config_init[str(self.subcommand)]

            # What the user has set for the trainer has precedence over our folders and loggers.
            if settings["trainer"].get("default_root_dir") is None:
                kwargs["default_root_dir"] = settings["root"]
            if settings["trainer"].get("logger") in (None, True):
                kwargs["logger"] = _loggers(settings["root"], settings["name"], settings["wandb"])
            if settings["trainer"].get("profiler") is None:
                kwargs["profiler"] = Throughput()
            if settings["wandb"] != "off":
                kwargs["callbacks"] = _with_pictures(settings["trainer"].get("callbacks"), self.model)
            return super().instantiate_trainer(**kwargs)

    # Warnings about what is done here on purpose.
    warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")  # it is: see main
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")  # the frozen encoder
    warnings.filterwarnings("ignore", ".*dirpath has changed from.*")  # a resumed run writes to a version of its own
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")  # the data module is: see its state

    return SelectorCLI(
        SelectorModule,
        ImageModule,
        args=_with_configs(arguments),
        save_config_callback=LogConfig,
        seed_everything_default=0,
        trainer_defaults={"callbacks": [BestCheckpoint(), LastCheckpoint()], "log_every_n_steps": 10},
        parser_kwargs={"prog": "selector-train"},
        auto_configure_optimizers=False,  # the module configures its own, with the schedule
    )


def _with_configs(arguments: list[str]) -> list[str]:
    """The arguments, with the full path of configs that ship with the package and are not below the current folder."""
    resolved = list(arguments)
    for place, argument in enumerate(arguments):
        flag, sign, name = argument.partition("=")
        if flag not in ("--config", "-c"):
            continue

        # `--config=FILE` is one argument, `--config FILE` two.
        if not sign and place + 1 < len(arguments):
            place, name = place + 1, arguments[place + 1]
        here, shipped = candidates(name)
        if name and not here.is_file() and shipped.is_file():
            resolved[place] = f"{flag}={shipped}" if sign else str(shipped)
    return resolved


def _with_pictures(callbacks: Any, module: SelectorModule) -> list[Any]:
    """The user's callbacks, and pictures of kept tokens where the encoder is a LLaVA-NeXT's and they have none."""
    from training.encoders import LlavaNextEncoder, LlavaNextModel
    from training.pictures import KeptPictures

    own = callbacks if isinstance(callbacks, list) else [each for each in [callbacks] if each is not None]
    drawn = any(isinstance(each, KeptPictures) for each in own)
    return own if drawn or not isinstance(module.encoder, LlavaNextEncoder | LlavaNextModel) else [*own, KeptPictures()]


def _loggers(root: str, name: str, wandb: str) -> list[Any]:
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

    # The CSV logger chooses the free version_N; the other logs of the run go into the same folder.
    table = CSVLogger(root, name)
    loggers: list[Any] = [table, TensorBoardLogger(root, name, version=table.version)]

    if wandb != "off":
        from pytorch_lightning.loggers import WandbLogger

        loggers.append(
            WandbLogger(name=name, save_dir=root, offline=wandb == "offline", project="visual-token-selector")
        )
    return loggers


if __name__ == "__main__":
    sys.exit(main())
