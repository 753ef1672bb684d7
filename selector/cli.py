"""The command line: ``selector compare | show | bench | list | report``.

Only the parser lives here, so that ``selector --help`` answers at once; the commands are in
`selector.evaluation.commands` and are imported when one runs. Settings come from three places, the later wins: the
defaults below, a YAML file (``--config``, same names as the flags), the flags.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODEL = "checkpoints/llava-next-tiny"
SELECTORS = ["checkpoints/selector-llava-next-tiny", "svd-prune", "lofi", "random"]
COMMON: dict[str, Any] = {
    "model": MODEL,
    "selectors": SELECTORS,
    "allow": [],
    "scope": "image",
    "newlines": "kept_rows",
    "positions": "original",
    "seed": 0,
    "device": "auto",
    "dtype": "auto",
    "device_map": None,
    "attention": None,
    "threads": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "compare": COMMON
    | {
        "keep": [0.5, 0.25, 64, 32, 16],
        "tasks": ["documents", "scenes"],
        "samples": 60,
        "out": "runs/compare",
        "baseline": "random",
        "answers": True,
        "max_new_tokens": 48,
        "layer": 0,
        "repeats": 1,
        "skip_unreadable": False,
    },
    "show": COMMON | {"keep": [0.25], "out": "selector.png", "question": None, "max_new_tokens": 48, "scores": False},
    "bench": COMMON | {"keep": [0.25], "image": None, "repeats": 20},
}
LISTS = ("selectors", "allow", "keep", "tasks")

EXAMPLES = """\
examples:
  selector compare                                   the shipped model, selector and tasks, offline, a few minutes
  selector compare --selectors svd-prune lofi random --keep 0.5 64 16 --samples 50
  selector compare --selectors checkpoints/my-selector svd-prune random --tasks folder:DATA --no-answers
  selector compare --config configs/compare/llava-next-7b.yaml
  selector show photo.jpg --selectors svd-prune lofi --keep 0.25 --out picture.png
  selector list

A selector is a name (selector list), a name with arguments (svd-prune:energy=0.5,center=false), a checkpoint folder,
or hf:owner/name. A budget (--keep) is what stays: 64 is a count of visual tokens an image, newline tokens and base
view included; 0.25 is a share of them; energy:0.9 and threshold:0 are adaptive.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 2 something the user can put right, 130 interrupted."""
    arguments = vars(_parser().parse_args(argv))
    command, debug = arguments.pop("command"), arguments.pop("debug", False)
    try:
        settings = _settings(command, arguments)
        return importlib.import_module(f"selector.evaluation.commands.{command}").run(settings)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ValueError as error:
        if debug or type(error).__name__ not in ("UsageError", "UnreadableImage"):
            raise
        print(f"selector {command}: error: {error}", file=sys.stderr)
        return 2


def _settings(command: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Defaults, then the YAML file, then the flags; ``given`` names what was not left to the defaults."""
    if command not in DEFAULTS:
        return arguments
    config = arguments.pop("config", None)
    chosen = (_read_config(config, command) if config else {}) | arguments
    return DEFAULTS[command] | chosen | {"given": sorted(chosen)}


def _read_config(name: str, command: str) -> dict[str, Any]:
    import yaml

    from selector.errors import UsageError

    places = (Path(name), Path(__file__).resolve().parent.parent / name)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise UsageError(f"config must be a YAML file, there is no {name!r}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"config {name!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"config {name!r} must hold names and values, got {type(content).__name__}")
    known = [*DEFAULTS[command]]
    for key, value in content.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise UsageError(
                f"config {name!r}: unknown setting {key!r}" + (f"; did you mean {close[0]}?" if close else "")
            )
        if (key in LISTS) != isinstance(value, list):
            raise UsageError(
                f"config {name!r}: {key} must be {'a list' if key in LISTS else 'one value'}, got {value!r}"
            )
    return content


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selector",
        description="Visual-token selection for vision-language models: compare selectors, look at them, time them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
        )

    _compare(
        add("compare", "accuracy, consistency, evidence, tokens and time of every selector at every budget", EXAMPLES)
    )
    _show(add("show", "a PNG of what each selector keeps of an image"))
    _bench(add("bench", "selection time against the prefill and against a full SVD, measured in one run"))
    listing = add("list", "the selectors: name, paper, whether trained, what they need, what they rank")
    listing.add_argument("--markdown", action="store_true", help="the table of the README, without checkpoints")
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
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="documents, scenes (generated), folder:PATH (default: documents scenes)",
    )
    parser.add_argument("--samples", metavar="N", help=f"samples of each task, or all (default: {defaults['samples']})")
    parser.add_argument("--out", metavar="RUN", help=f"folder of the records (default: {defaults['out']})")
    parser.add_argument(
        "--baseline", metavar="LABEL", help="selector that the others are compared with in pairs (default: random)"
    )
    parser.add_argument(
        "--answers",
        action=argparse.BooleanOptionalAction,
        help="ask the questions; without, only tokens, time and evidence are measured, which is fast (default: ask)",
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="length of an answer (default: 16)")
    parser.add_argument(
        "--skip-unreadable",
        action=argparse.BooleanOptionalAction,
        help="leave images out that cannot be decoded, and name them (default: an error)",
    )
    parser.add_argument(
        "--layer",
        type=int,
        metavar="K",
        help="spectra (ΔIPR) of the visual tokens that leave block K of the language model; 0: that enter it",
    )
    parser.add_argument("--repeats", type=int, metavar="N", help="of every timed piece of work (default: 1)")
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
    parser.add_argument("--out", metavar="PNG", help="the picture (default: selector.png)")
    parser.add_argument(
        "--scores", action=argparse.BooleanOptionalAction, help="below, the scores of each selector as a heat map"
    )
    parser.add_argument("--question", metavar="TEXT", help="also ask this of every image, and show the answers")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="length of an answer (default: 16)")


def _bench(parser: argparse.ArgumentParser) -> None:
    _shared(parser, "bench")
    parser.add_argument("--image", metavar="IMAGE", help="the image to encode (default: a generated page)")
    parser.add_argument("--repeats", type=int, metavar="N", help="timed calls of each piece of work (default: 20)")


def _shared(parser: argparse.ArgumentParser, command: str) -> None:
    keep = " ".join(map(str, DEFAULTS[command]["keep"]))
    parser.add_argument("--config", metavar="YAML", help="settings by the names of the flags; flags win")
    parser.add_argument(
        "--model", metavar="NAME", help=f"checkpoint folder or hub name of a LLaVA-NeXT (default: {MODEL})"
    )
    parser.add_argument(
        "--selectors", nargs="+", metavar="SPEC", help="selectors to compare (default: " + " ".join(SELECTORS) + ")"
    )
    parser.add_argument(
        "--keep", nargs="+", metavar="BUDGET", help=f"what stays of the visual tokens (default: {keep})"
    )
    parser.add_argument("--scope", help="image: all patches of an image compete; tile: each tile gets its share")
    parser.add_argument("--newlines", help="newline tokens: kept_rows (those of rows with a kept patch), all, none")
    parser.add_argument(
        "--positions", help="position ids: original (default; gaps where tokens were dropped) or contiguous (no gaps)"
    )
    parser.add_argument("--seed", type=int, help="of the samples (default: 0)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: auto)")
    parser.add_argument("--dtype", help="auto (as stored), float32, bfloat16, float16 (default: auto)")
    parser.add_argument("--device-map", metavar="MAP", help="spread a large model, e.g. auto (needs accelerate)")
    parser.add_argument("--attention", metavar="NAME", help="attn_implementation of the model, e.g. eager")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch (default: 1 for a small model)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


if __name__ == "__main__":
    sys.exit(main())
