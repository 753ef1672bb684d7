"""The command line: ``selector compare | show | bench | calibrate | stability | list | report``.

Only the parser lives here, so that ``selector --help`` answers at once; the commands are in `selector.commands` and are
imported when one runs. Settings come from three places, of which the later wins: the defaults below, a YAML file
(``--config``, same names as the flags), the flags.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from selector.errors import UsageError
from selector.measure.protocol import Protocol
from selector.shipped import places

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
        **asdict(Protocol()),
    },
    "show": COMMON
    | {
        "keep": [0.25],
        "out": "selector.png",
        "question": None,
        "max_new_tokens": Protocol.max_new_tokens,
        "scores": False,
    },
    "bench": COMMON | {"keep": [0.25], "image": None, "repeats": 20},
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
KINDS: dict[str, type | tuple[type, ...]] = {
    "selectors": (str, dict),
    "seeds": (str, dict),
    "keep": (int, float, str),
    "shares": (int, float, str),
    "tolerance": (int, float),
    "device_map": (str, dict),
    "samples": object,  # an int or "all", which is checked where it is read
    **dict.fromkeys(("seed", "threads", "max_new_tokens", "layer", "repeats"), int),
    **dict.fromkeys(("answers", "skip_unreadable", "scores"), bool),
}
"""Types that a value of a YAML file (of a list: each of its items) may have; a text where nothing is stated."""

EXAMPLES = """\
examples:
  selector compare                                   the shipped model, selector and tasks, offline, a few minutes
  selector compare --selectors svd-prune lofi random --keep 0.5 64 16 --samples 50
  selector compare --selectors checkpoints/my-selector svd-prune random --tasks folder:DATA --no-answers
  selector compare --config configs/compare/llava-next-7b.yaml
  selector show photo.jpg --selectors svd-prune lofi --keep 0.25 --out picture.png
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

    path = next((place for place in places(name) if place.is_file()), None)
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
    """A parser whose errors are one line, as every other error of this program."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="selector",
        description="Visual-token selection for vision-language models: compare selectors, look at them, time them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    # SUPPRESS: a flag that is not given leaves no name behind, and the file or the defaults decide.
    def add(name: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
        )

    # In the order of --help: what runs a model, then what only reads.
    _compare(
        add("compare", "accuracy, consistency, evidence, tokens and time of every selector at every budget", EXAMPLES)
    )
    _show(add("show", "a PNG of what each selector keeps of an image"))
    _bench(add("bench", "selection time against the prefill and against a full SVD, measured in one run"))
    _calibrate(add("calibrate", "find the thresholds of --keep auto:SHARE, stored in a checkpoint", CALIBRATE))
    _stability(add("stability", "whether a changed image, or another training, keeps the same places", STABILITY))

    listing = add("list", "the selectors: name, paper, whether trained, what they need, what they rank")
    listing.add_argument(
        "--markdown", action="store_true", help="the table of selector/methods/README.md, without checkpoints"
    )
    listing.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)

    report = add("report", "the table and the page (HTML, Markdown) of one or several runs, from their records alone")
    report.add_argument("runs", nargs="+", metavar="RUN", help="folders that `selector compare` wrote: runs/compare")
    report.add_argument(
        "--out", metavar="HTML", help="the page (default: RUN/report.html; report.html here for several runs)"
    )
    report.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)

    return parser


def _compare(parser: argparse.ArgumentParser) -> None:
    defaults = DEFAULTS["compare"]
    _shared(parser, "compare")

    # On what, against what, and where to.
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="documents, scenes, charts (generated), receipts (real scans, see SELECTOR_DATA), folder:PATH, hf:NAME (a "
        "public benchmark such as hf:textvqa or hf:pope, with its prompt and score; needs datasets) "
        f"(default: {' '.join(defaults['tasks'])})",
    )
    parser.add_argument("--samples", metavar="N", help=f"samples of each task, or all (default: {defaults['samples']})")
    parser.add_argument("--out", metavar="RUN", help=f"folder of the records (default: {defaults['out']})")
    parser.add_argument(
        "--baseline",
        metavar="LABEL",
        help=f"selector that the others are compared with in pairs (default: {defaults['baseline']})",
    )

    # How each sample is measured.
    parser.add_argument(
        "--suffix",
        metavar="TEXT",
        help='asked below every question, as in "Answer the question using a single word or phrase." (default: the '
        "task's own; a benchmark has one)",
    )
    parser.add_argument("--system", metavar="TEXT", help="what the system turn says (default: there is none)")
    parser.add_argument(
        "--answers",
        action=argparse.BooleanOptionalAction,
        help="ask the questions; without, only tokens, time and evidence are measured, which is fast "
        f"(default: {'ask' if defaults['answers'] else 'do not ask'})",
    )
    _length(parser, "compare")

    parser.add_argument(
        "--skip-unreadable",
        action=argparse.BooleanOptionalAction,
        help="leave images out that cannot be decoded, and name them (default: an error)",
    )

    parser.add_argument(
        "--layer",
        type=int,
        metavar="K",
        help="spectra (ΔIPR) of the visual tokens that leave block K of the language model; 0: that enter it "
        f"(default: {defaults['layer']})",
    )
    parser.add_argument(
        "--repeats", type=int, metavar="N", help=f"of every timed piece of work (default: {defaults['repeats']})"
    )

    # Which part of the run this process takes, and what of an earlier one counts.
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="take every N-th sample, from the I-th (0/2 and 1/2 share a run; under torchrun: its rank)",
    )
    parser.add_argument("--fresh", action="store_true", help="forget the records of this comparison and start over")


def _show(parser: argparse.ArgumentParser) -> None:
    _shared(parser, "show")
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help="image files (default: a generated page and a scene)"
    )
    parser.add_argument("--out", metavar="PNG", help=f"the picture (default: {DEFAULTS['show']['out']})")
    parser.add_argument(
        "--scores", action=argparse.BooleanOptionalAction, help="below, the scores of each selector as a heat map"
    )
    parser.add_argument("--question", metavar="TEXT", help="also ask this of every image, and show the answers")
    _length(parser, "show")


def _length(parser: argparse.ArgumentParser, command: str) -> None:
    """How long an answer may be."""
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"tokens of an answer at most (default: {DEFAULTS[command]['max_new_tokens']})",
    )


def _bench(parser: argparse.ArgumentParser) -> None:
    _shared(parser, "bench")
    parser.add_argument("--image", metavar="IMAGE", help="the image to encode (default: a generated page)")
    parser.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help=f"timed calls of each piece of work (default: {DEFAULTS['bench']['repeats']})",
    )


def _calibrate(parser: argparse.ArgumentParser) -> None:
    defaults = DEFAULTS["calibrate"]
    parser.add_argument("selector", metavar="SELECTOR", help="a checkpoint folder, a name, or hf:owner/name")
    _machine(parser, "calibrate")

    # The calibration set.
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help=f"whose images (default: {' '.join(defaults['tasks'])})"
    )
    parser.add_argument("--samples", metavar="N", help=f"samples of each task, or all (default: {defaults['samples']})")

    # What is calibrated, and how exactly.
    parser.add_argument(
        "--shares",
        nargs="+",
        metavar="SHARE",
        help=f"of all visual tokens, between 0 and 1 (default: {' '.join(map(str, defaults['shares']))})",
    )
    parser.add_argument(
        "--newlines",
        nargs="+",
        metavar="POLICY",
        help=f"kept_rows, all, none: thresholds for each (default: {' '.join(defaults['newlines'])})",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="T",
        help=f"by how much of a share the measured one may miss it (default: {defaults['tolerance']})",
    )

    parser.add_argument("--seed", type=int, help=f"of the samples (default: {defaults['seed']})")
    parser.add_argument(
        "--out", metavar="FOLDER", help="the calibrated checkpoint (default: SELECTOR itself, where it is a folder)"
    )
    parser.add_argument(
        "--skip-unreadable",
        action=argparse.BooleanOptionalAction,
        help="leave images out that cannot be decoded (default: an error)",
    )


def _stability(parser: argparse.ArgumentParser) -> None:
    defaults = DEFAULTS["stability"]
    _shared(parser, "stability")

    parser.add_argument(
        "--seeds", nargs="+", metavar="SPEC", help="two or more trainings of one recipe (default: none are compared)"
    )

    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help=f"whose images (default: {' '.join(defaults['tasks'])})"
    )
    parser.add_argument("--samples", metavar="N", help=f"samples of each task, or all (default: {defaults['samples']})")

    parser.add_argument("--out", metavar="JSON", help="the figures as a file (default: none)")
    parser.add_argument(
        "--skip-unreadable",
        action=argparse.BooleanOptionalAction,
        help="leave images out that cannot be decoded, and name them (default: an error)",
    )


def _shared(parser: argparse.ArgumentParser, command: str) -> None:
    """What every command that prunes asks for: machine, selectors, budgets and samples."""
    defaults = DEFAULTS[command]
    keep = " ".join(map(str, defaults["keep"]))
    _machine(parser, command)

    parser.add_argument(
        "--selectors", nargs="+", metavar="SPEC", help="selectors to compare (default: " + " ".join(SELECTORS) + ")"
    )

    # The budget: how much, of what, and what becomes of the rows' ends.
    parser.add_argument(
        "--keep", nargs="+", metavar="BUDGET", help=f"what stays of the visual tokens (default: {keep})"
    )
    parser.add_argument(
        "--scope",
        help=f"image: all patches of an image compete; tile: each tile gets its share (default: {defaults['scope']})",
    )
    parser.add_argument(
        "--newlines",
        help="newline tokens: kept_rows (those of rows with a kept patch), all, none "
        f"(default: {defaults['newlines']})",
    )

    # Only of weight where the language model runs on what is kept.
    if "positions" in defaults:
        parser.add_argument(
            "--positions",
            help="position ids: original (gaps where tokens were dropped) or contiguous (no gaps) "
            f"(default: {defaults['positions']})",
        )

    parser.add_argument("--seed", type=int, help=f"of the samples (default: {defaults['seed']})")


def _machine(parser: argparse.ArgumentParser, command: str) -> None:
    """What runs, and on what."""
    defaults = DEFAULTS[command]
    parser.add_argument("--config", metavar="YAML", help="settings by the names of the flags; flags win")
    parser.add_argument(
        "--model", metavar="NAME", help=f"checkpoint folder or hub name of a LLaVA-NeXT (default: {defaults['model']})"
    )
    parser.add_argument("--device", help=f"cpu, cuda, ... (default: {defaults['device']})")
    parser.add_argument("--dtype", help=f"auto (as stored), float32, bfloat16, float16 (default: {defaults['dtype']})")
    parser.add_argument(
        "--device-map", metavar="MAP", help="spread a large model: auto, or modules and devices as JSON"
    )
    parser.add_argument("--quantization", metavar="NAME", help="int8, int4 or nf4 weights, packed as they are loaded")
    parser.add_argument("--attention", metavar="NAME", help="attn_implementation of the model, e.g. eager")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch (default: 1 for a small model)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


if __name__ == "__main__":
    sys.exit(main())
