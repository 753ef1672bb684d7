"""The command line: ``selector compare | show | demo | bench | calibrate | stability | list | report``.

Only the parser lives here, so that ``selector --help`` answers at once; the commands are in `selector.commands` and are
imported when one runs. Settings come from three places, of which the later wins: the defaults below, a YAML file
(``--config``, same names as the flags), the flags.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from selector.errors import UsageError
from selector.measure.protocol import Protocol
from selector.shipped import candidates

# Defaults by the names of the flags. Flags themselves have none in the parser, so that what was given can be told from
# what was not.
MODEL = "checkpoints/llava-next-tiny"
SELECTORS = [
    "checkpoints/selector-llava-next-tiny",
    "checkpoints/selector-llava-next-tiny-question",
    "checkpoints/selector-llava-next-tiny-reconstruction",
    "ridge-leverage",
    "svd-prune",
    "lofi",
    "random",
]
MACHINE: dict[str, Any] = {
    "model": MODEL,
    "allow": [],
    "device": "auto",
    "dtype": "auto",
    "device_map": None,
    "attention": None,
    "quantization": None,
    "threads": None,
}
COMMON: dict[str, Any] = MACHINE | {
    "selectors": SELECTORS,
    "scope": "image",
    "newlines": "kept_rows",
    "positions": Protocol.positions,
    "seed": Protocol.seed,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "compare": COMMON
    | {
        "keep": [0.5, 0.25, 64, 32, 16],
        "tasks": ["documents", "scenes"],
        "samples": 60,
        "out": "runs/compare",
        "baseline": "random",
        "skip_unreadable": False,
        "suffix": None,
        "system": None,
        "workers": 0,
        "rank_timeout": 120,
        **asdict(Protocol()),
        "batch_size": None,  # depends on the size of the model
    },
    "show": COMMON
    | {
        "keep": [0.25],
        "out": "selector.png",
        "question": None,
        "max_new_tokens": Protocol.max_new_tokens,
        "scores": False,
    },
    "demo": COMMON | {"keep": [0.25], "port": 7860, "share": False, "max_new_tokens": Protocol.max_new_tokens},
    "bench": COMMON
    | {
        "keep": [0.25],
        "image": None,
        "repeats": 20,
        "geometry": None,
        "tiles": [],
        "prefill_layers": 0,
        "out": None,
    },
    "stability": MACHINE
    | {
        "selectors": SELECTORS,
        "seeds": [],
        "keep": [0.25, 64],
        "scope": "image",
        "newlines": "kept_rows",
        "tasks": ["documents", "scenes"],
        "samples": 30,
        "seed": 0,
        "out": None,
        "skip_unreadable": False,
    },
    "calibrate": MACHINE
    | {
        "tasks": ["documents", "charts", "scenes"],
        "samples": 100,
        "shares": [0.5, 0.25, 0.1],
        "newlines": ["kept_rows"],
        "tolerance": 0.01,
        "seed": 1,
        "out": None,
        "skip_unreadable": False,
    },
}
GEOMETRY: dict[str, Any] = {"keep": [64, 160, 320, 640], "repeats": 5, "selectors": [], "threads": 1}
"""Defaults of ``bench --geometry`` where they are others than those of ``bench``; no selectors named: all there are."""
KINDS: dict[str, type | tuple[type, ...]] = {
    "selectors": (str, dict),
    "seeds": (str, dict),
    "keep": (int, float, str),
    "shares": (int, float, str),
    "tolerance": (int, float),
    "rank_timeout": (int, float),
    "device_map": (str, dict),
    "samples": object,  # an int or "all", which is checked where it is read
    **dict.fromkeys(("seed", "threads", "max_new_tokens", "layer", "repeats", "batch_size", "workers", "port"), int),
    **dict.fromkeys(("tiles", "prefill_layers"), int),
    **dict.fromkeys(("answers", "skip_unreadable", "scores", "share"), bool),
}
"""Types that a value of a YAML file (of a list: each of its items) may have; a text where nothing is stated. Flags
follow them, see `_Parser.setting`."""

EXAMPLES = """\
examples:
  selector compare                                   the shipped model, selector and tasks, offline, a few minutes
  selector compare --selectors svd-prune lofi random --keep 0.5 64 16 --samples 50
  selector compare --selectors checkpoints/my-selector svd-prune random --tasks folder:DATA --no-answers
  selector compare --config configs/compare/llava-next-7b.yaml
  selector show photo.jpg --selectors svd-prune lofi --keep 0.25 --out picture.png
  selector demo --selectors checkpoints/selector-llava-next-tiny lofi random
  selector list

A selector is a name (selector list), a name with arguments (svd-prune:energy=0.5,center=false), a checkpoint folder,
or hf:owner/name; NAME=SPEC gives it another name in the tables (mine=checkpoints/my-selector). A budget (--keep) is
what stays: 64 is a count of visual tokens per image, newline tokens and base view included; 0.25 is a share of them;
energy:0.9 and threshold:0 are adaptive; auto:0.25 is a quarter on average over images, for a selector that
`selector calibrate` has prepared.
"""
STABILITY = """\
Every image is shifted by one patch (the edge repeated), compressed to JPEG quality 50, and cropped by 3% from each side
(resized back). The kept patches are compared where they lie in the original image, each with the nearest patch of the
changed one. --seeds compares several trainings of one recipe with each other, on the unchanged images. Beside each
figure stands that of random choices of as many tokens. The table is Markdown.

examples:
  selector stability --selectors checkpoints/my-selector svd-prune lofi --tasks documents --keep 0.25 64 --samples 50
  selector stability --selectors lofi --seeds runs/seed-0 runs/seed-1 runs/seed-2 --out runs/stability.json
"""
BENCH = """\
With --geometry nothing is loaded: vision tower and projector are built with random weights at the sizes of a published
model, and every selector is timed on the tokens that they make of one picture, against the vision tower and against the
prefill of the language model, whose layers are not built unless --prefill-layers asks for some. Times are CPU time of
the process, on a GPU wall time. --out writes the result as JSON, a page (Markdown) and a picture (SVG).

examples:
  selector bench --keep 0.25 64
  selector bench --geometry llava-next-tiny --selectors svd-prune divprune gumbel
  selector bench --geometry llava-next-7b --prefill-layers 1 --out runs/bench
"""
CALIBRATE = """\
With --keep auto:0.2 a threshold on the selector's scores decides, so that an image full of text keeps more than a flat
one, and the average over images is 20%. Which threshold does that depends on selector, model and images: this command
finds it on the images of some tasks, for every share asked for, and writes a checkpoint that has the table in its
config.json. The average is of measured tokens, newline tokens and base view included, as `selector compare` prints it;
every image keeps at least one patch. An earlier calibration is replaced. Shares in between are not interpolated.

examples:
  selector calibrate checkpoints/my-selector --tasks documents charts --samples 100 --shares 0.5 0.25 0.1
  selector calibrate lofi --shares 0.2 --out runs/lofi-calibrated
  selector compare --selectors runs/lofi-calibrated --keep auto:0.2 0.2

The samples are others than those of `selector compare`, whose seed is 0: a threshold should not be judged on the images
that it was found on. A folder of images is the same under every seed but for its order: give held-out images there.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: arguments without the program's name; by default those of this process.

    Returns:
        The exit code: 0 done, 2 an error that the user can fix, 130 interrupted.
    """
    arguments = vars(_parser().parse_args(argv))
    command, debug = arguments.pop("command"), arguments.pop("debug", False)
    try:
        settings = _settings(command, arguments)
        return importlib.import_module(f"selector.commands.{command}").run(settings)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except UsageError as error:
        if debug:
            raise
        # One line, whatever a file's name or an answer of the hub holds.
        print(f"selector {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _settings(command: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Defaults, then the YAML file, then the flags; ``given`` names what was not left to the defaults."""
    if command not in DEFAULTS:
        return arguments
    config = arguments.pop("config", None)
    chosen = (_read_config(config, command) if config is not None else {}) | arguments
    return DEFAULTS[command] | chosen | {"given": sorted(chosen)}


def _read_config(name: str, command: str) -> dict[str, Any]:
    """The settings of a YAML file, by the names of the flags: each known to the command, and of its type.

    A name that is no file here is looked for in the repository, so that shipped configs are found from anywhere.
    """
    import yaml  # here, since most calls read none

    path = next((path for path in candidates(name) if path.is_file()), None)
    if path is None:
        raise UsageError(f"config must be a YAML file, there is no {name!r}")

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:  # ValueError: a date of month 13
        raise UsageError(f"config {name!r} is not YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UsageError(f"config {name!r} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise UsageError(f"config {name!r} must hold names and values, got {type(content).__name__}")

    known = [*DEFAULTS[command]]
    for key, value in content.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise UsageError(
                f"config {name!r}: unknown setting {key!r}" + (f"; did you mean {close[0]}?" if close else "")
            )

        # A list is written as one even if it has a single item: "keep: [64]", not "keep: 64".
        listed = isinstance(DEFAULTS[command][key], list)
        if listed != isinstance(value, list):
            raise UsageError(f"config {name!r}: {key} must be {'a list' if listed else 'one value'}, got {value!r}")
        _check_kind(name, key, value, DEFAULTS[command][key])
    return content


def _check_kind(config: str, key: str, value: Any, default: Any) -> None:
    """Refuses a value of another type than the flag would give; null only where it is the default."""
    kind = KINDS.get(key, str)
    if kind is object:
        return
    kinds = kind if isinstance(kind, tuple) else (kind,)
    for item in value if isinstance(value, list) else [value]:
        if item is None and default is None:
            continue

        # A bool is an int to Python: "seed: yes" must not count as 1.
        if not isinstance(item, kinds) or (isinstance(item, bool) and bool not in kinds):
            names = {str: "a text", dict: "a mapping", int: "an int", float: "a float", bool: "true or false"}
            wanted = " or ".join(names[each] for each in kinds)
            raise UsageError(f"config {config!r}: {key} must be {wanted}, got {item!r}")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as every other error of this program, and whose flags follow from `DEFAULTS`.

    Attributes:
        defaults: the settings of its command.
    """

    defaults: Mapping[str, Any] = {}

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def setting(self, name: str, text: str, metavar: str | None = None) -> None:
        """Adds the flag of a setting, which takes what a YAML file may hold: a list, a number, yes or no, or a text.

        Args:
            name: in `DEFAULTS`.
            text: its help, behind which the default is written; an empty default is for the text to say in words.
            metavar: what stands for the value; by default the flag's name.
        """
        default, kind = self.defaults[name], KINDS.get(name, str)
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            self.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
            return

        # Whatever need not be a number stays a text here, and is read by its command.
        convert = {int: int, (int, float): float}.get(kind, str)
        values = default if isinstance(default, list) else [default]
        words = "" if values in ([], [None]) else f" (default: {' '.join(map(str, values))})"
        nargs = "+" if isinstance(default, list) else None
        self.add_argument(flag, nargs=nargs, type=convert, metavar=metavar, help=text + words)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="selector",
        description="Visual-token selection for vision-language models: compare selectors, look at them, time them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    # SUPPRESS: a flag that is not given leaves no name behind, and the file or the defaults decide.
    def add(name: str, text: str, epilog: str = "") -> _Parser:
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
        )
        command.defaults = DEFAULTS.get(name, {})
        return command

    # In the order of --help: what runs a model, then what only reads.
    _compare(
        add("compare", "accuracy, consistency, evidence, tokens and time of every selector at every budget", EXAMPLES)
    )
    _show(add("show", "a PNG of what each selector keeps of an image"))
    _demo(add("demo", "a page to drop an image on: what each selector keeps and answers (needs gradio)"))
    _bench(add("bench", "selection time against the model's, on a checkpoint or at a published model's sizes", BENCH))
    _calibrate(add("calibrate", "find the thresholds of --keep auto:SHARE, stored in a checkpoint", CALIBRATE))
    _stability(add("stability", "whether a changed image, or another training, keeps the same places", STABILITY))

    listing = add("list", "the selectors: name, paper, whether trained, what they need, what they rank")
    listing.add_argument(
        "--markdown", action="store_true", help="the table of selector/methods/README.md, without checkpoints"
    )

    report = add("report", "the table and the page (HTML, Markdown) of one or several runs, from their records alone")
    report.add_argument("runs", nargs="+", metavar="RUN", help="folders that `selector compare` wrote: runs/compare")
    report.add_argument(
        "--out", metavar="HTML", help="the page (default: RUN/report.html; report.html here for several runs)"
    )
    report.add_argument(
        "--submission",
        metavar="FOLDER",
        help="also write what a benchmark's server scores (hf:mmbench-test), one file per row (default: none)",
    )

    for command in (listing, report):
        command.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    return parser


def _compare(parser: _Parser) -> None:
    _shared(parser)

    # On what, against what, and where to.
    parser.setting(
        "tasks",
        "documents, scenes, charts (generated), receipts (real scans, see SELECTOR_DATA), folder:PATH, hf:NAME (a "
        "public benchmark such as hf:textvqa or hf:pope, with its prompt and score; needs datasets)",
        "TASK",
    )
    parser.setting("samples", "samples of each task, or all", "N")
    parser.setting("out", "folder of the records", "RUN")
    parser.setting("baseline", "selector that the others are compared with in pairs", "LABEL")

    # How each sample is measured.
    parser.setting(
        "suffix",
        'asked below every question, as in "Answer the question using a single word or phrase." (default: the '
        "task's own; a benchmark has one)",
        "TEXT",
    )
    parser.setting("system", "what the system turn says (default: there is none)", "TEXT")
    parser.setting(
        "answers",
        "ask the questions; without, only tokens, time and evidence are measured, which is fast "
        f"(default: {'ask' if parser.defaults['answers'] else 'do not ask'})",
    )
    parser.setting("max_new_tokens", "tokens of an answer at most", "N")
    parser.setting("skip_unreadable", "leave images out that cannot be decoded, and name them (default: an error)")
    parser.setting(
        "layer",
        "spectra (ΔIPR) of the visual tokens that leave block K of the language model; 0: that enter it",
        "K",
    )
    parser.setting("repeats", "of every timed piece of work", "N")

    # How fast.
    parser.setting(
        "batch_size",
        "prompts that are answered at once (default: 32 for a model of fewer than 100 million parameters, else 1). "
        "Answers are the same but where two tokens tie, which in bfloat16 is not rare; times are those of a batch "
        "divided by its rows, and marked so. 1 times every sample by itself",
        "N",
    )
    parser.setting("workers", "threads that open and prepare images ahead; 0: each image when its turn comes", "N")

    # Which part of the run this process takes, and what of an earlier one counts.
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="take every N-th sample, from the I-th (0/2 and 1/2 share a run; under torchrun: its rank)",
    )
    parser.setting(
        "rank_timeout", "seconds without a sign of life after which another rank of torchrun counts as dead", "S"
    )
    parser.add_argument("--fresh", action="store_true", help="forget the records of this comparison and start over")


def _show(parser: _Parser) -> None:
    _shared(parser)
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help="image files (default: a generated page and a scene)"
    )
    parser.setting("out", "the picture", "PNG")
    parser.setting("scores", "below, the scores of each selector as a heat map")
    parser.setting("question", "also ask this of every image, and show the answers", "TEXT")
    parser.setting("max_new_tokens", "tokens of an answer at most", "N")


def _demo(parser: _Parser) -> None:
    _shared(parser)
    parser.setting("port", "of the page, 0 for one that is free", "PORT")
    parser.setting("share", "open the page to the internet too, through a tunnel of gradio's (default: no)")
    parser.setting("max_new_tokens", "tokens of an answer at most", "N")


def _bench(parser: _Parser) -> None:
    _shared(parser)
    parser.setting("image", "the image to encode (default: a generated page; 1/f noise with --geometry)", "IMAGE")
    parser.setting("repeats", "timed calls of each piece of work", "N")

    # At the sizes of a published model.
    keep = " ".join(map(str, GEOMETRY["keep"]))
    parser.setting(
        "geometry",
        "llava-next-7b, llava-next-tiny, ...: random weights at these sizes, no --model; then the defaults are "
        f"--keep {keep} (counts alone), --repeats {GEOMETRY['repeats']}, --threads {GEOMETRY['threads']}, and all "
        "selectors, the learned ones with random weights",
        "NAME",
    )
    parser.setting(
        "tiles", "of the picture, for the growth at the smallest budget (default: each number from 1 to all)", "N"
    )
    parser.setting(
        "prefill_layers",
        "decoder layers to build and time; 0: the prefill counts by its operations alone",
        "N",
    )
    parser.setting("out", "where a --geometry writes NAME.json, .md, .svg (default: none)", "FOLDER")


def _calibrate(parser: _Parser) -> None:
    parser.add_argument("selector", metavar="SELECTOR", help="a checkpoint folder, a name, or hf:owner/name")
    _machine(parser)

    # The calibration set.
    parser.setting("tasks", "whose images", "TASK")
    parser.setting("samples", "samples of each task, or all", "N")

    # What is calibrated, and how exactly.
    parser.setting("shares", "of all visual tokens, between 0 and 1", "SHARE")
    parser.setting("newlines", "kept_rows, all, none: thresholds for each", "POLICY")
    parser.setting("tolerance", "by how much of a share the measured one may miss it", "T")
    parser.setting("seed", "of the samples")
    parser.setting("out", "the calibrated checkpoint (default: SELECTOR itself, where it is a folder)", "FOLDER")
    parser.setting("skip_unreadable", "leave images out that cannot be decoded (default: an error)")


def _stability(parser: _Parser) -> None:
    _shared(parser)
    parser.setting("seeds", "two or more trainings of one recipe (default: none are compared)", "SPEC")
    parser.setting("tasks", "whose images", "TASK")
    parser.setting("samples", "samples of each task, or all", "N")
    parser.setting("out", "the figures as a file (default: none)", "JSON")
    parser.setting("skip_unreadable", "leave images out that cannot be decoded, and name them (default: an error)")


def _shared(parser: _Parser) -> None:
    """What every command that prunes asks for: machine, selectors, budgets and samples."""
    _machine(parser)
    parser.setting("selectors", "selectors to compare", "SPEC")

    # The budget: how much, of what, and what becomes of the rows' ends.
    parser.setting("keep", "what stays of the visual tokens", "BUDGET")
    parser.setting("scope", "image: all patches of an image compete; tile: each tile gets its share")
    parser.setting("newlines", "newline tokens: kept_rows (those of rows with a kept patch), all, none")

    # Only of weight where the language model runs on what is kept.
    if "positions" in parser.defaults:
        parser.setting("positions", "position ids: original (gaps where tokens were dropped) or contiguous (no gaps)")

    parser.setting("seed", "of the samples")


def _machine(parser: _Parser) -> None:
    """What runs, and on what."""
    parser.add_argument("--config", metavar="YAML", help="settings by the names of the flags; flags win")
    parser.setting("model", "checkpoint folder or hub name of a LLaVA-NeXT", "NAME")
    parser.setting("device", "cpu, cuda, ...")
    parser.setting("dtype", "auto (as stored), float32, bfloat16, float16")
    parser.setting("device_map", "spread a large model: auto, or modules and devices as JSON", "MAP")
    parser.setting("quantization", "int8, int4 or nf4 weights, packed as they are loaded", "NAME")
    parser.setting("attention", "attn_implementation of the model, e.g. eager", "NAME")
    parser.setting("threads", "CPU threads of torch (default: 1 for a small model; for its batches, torch's own)", "N")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


if __name__ == "__main__":
    sys.exit(main())
