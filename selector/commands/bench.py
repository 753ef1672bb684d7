"""`selector bench`: one table of times and ratios per budget, of a checkpoint or at the sizes of a published model."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from selector.base import TokenSelector
from selector.cli import GEOMETRY
from selector.commands import loading
from selector.commands.common import MOST_THREADS, choose, load_all, pages, positive, whole
from selector.commands.printing import console
from selector.errors import UsageError
from selector.files import check_output
from selector.images import open_image
from selector.measure import scaling, speed
from selector.measure.geometry import find_geometry
from selector.report import bench

ONLY_A_CHECKPOINT = ("model", "device_map", "positions")
ONLY_A_GEOMETRY = ("tiles", "prefill_layers", "out")
"""Settings that mean something with a checkpoint alone, or with a geometry alone."""


def run(settings: dict[str, Any]) -> int:
    """Times every selector at every budget on one image.

    Args:
        settings: by the names of ``DEFAULTS["bench"]`` in `selector.cli`.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: a setting out of its range or that the other kind of measurement has, a budget that does not fit.
    """
    geometry = settings["geometry"]
    wrong = ONLY_A_GEOMETRY if geometry is None else ONLY_A_CHECKPOINT
    for name in wrong:
        if name in settings["given"]:
            flag = name.replace("_", "-")
            raise UsageError(f"{flag} must {'come with' if geometry is None else 'not be given with'} --geometry")
    return _checkpoint(settings) if geometry is None else _geometry(settings)


def _geometry(settings: dict[str, Any]) -> int:
    """At the sizes of a published model: one result, as tables, and with ``out`` as files."""
    chosen = settings | {name: value for name, value in GEOMETRY.items() if name not in settings["given"]}

    # Mistakes in the settings are errors before anything is built; the measurement itself checks tiles and layers.
    find_geometry(chosen["geometry"])
    budgets = loading.parse_budgets(chosen["keep"], chosen["scope"], chosen["newlines"])
    for budget in budgets:
        if not isinstance(budget.keep, int):
            raise UsageError(f"keep must be a count of visual tokens with --geometry, got {budget}")
    if positive("threads", chosen["threads"]) > MOST_THREADS:
        raise UsageError(f"threads must be in 1..{MOST_THREADS}, got {chosen['threads']}")
    repeats, seed = positive("repeats", chosen["repeats"]), whole("seed", chosen["seed"])
    for number in chosen["tiles"]:
        positive("tiles", number)

    device, folder, picture = loading.find_device(chosen["device"]), chosen["out"], chosen["image"]
    if picture is not None:
        open_image(Path(picture))
    if folder is not None:
        check_output(Path(folder))

    torch.set_num_threads(chosen["threads"])
    data = scaling.measure(
        chosen["geometry"],
        _selectors(chosen["selectors"], device, chosen["allow"]),
        [int(budget.keep) for budget in budgets],
        chosen["tiles"],
        layers=whole("prefill-layers", chosen["prefill_layers"]),
        repeats=repeats,
        scope=chosen["scope"],
        newlines=chosen["newlines"],
        device=device,
        dtype=_dtype(chosen["dtype"], device),
        attention=chosen["attention"],
        picture=None if picture is None else Path(picture),
        seed=seed,
        command=_command(settings),
        say=lambda line: print(f"selector bench: {line}", file=sys.stderr),
    )

    terminal = console()
    for listing in bench.listings(data):
        terminal.print(_table(listing))
    for line in bench.left_out(data):
        terminal.print(f"left out {line}", highlight=False, markup=False, soft_wrap=True)
    if folder is not None:
        terminal.print(*bench.write(data, Path(folder)), sep="\n", highlight=False, markup=False, soft_wrap=True)
    return 0


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of that name; "auto" is the one that such a device runs these models in."""
    if name not in loading.DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(loading.DTYPES)}, got {name!r}")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def _selectors(specs: Sequence[Any], device: torch.device, allow: Sequence[str]) -> dict[str, TokenSelector | None]:
    """By label, in the order given: loaded ones, and None for a name that the measurement has to fit to its model."""
    known = scaling.known_selectors()

    # Whatever is no bare name has arguments or weights of its own; labels come back in the order of the specs.
    rest = [spec for spec in specs if spec not in known]
    loaded = loading.load_selectors(rest, device, allow) if rest else {}
    labels = iter(loaded)
    chosen: dict[str, TokenSelector | None] = {}
    for spec in specs:
        label = spec if spec in known else next(labels)
        if label in chosen:
            raise UsageError(f"selectors must be different, {label!r} is there twice")
        chosen[label] = loaded.get(label)
    return chosen


def _command(settings: dict[str, Any]) -> str:
    """The command line that measures this again: what was given, whether by flags or in a file."""
    words = ["selector", "bench"]
    for name in sorted(settings["given"], key=lambda name: (name != "geometry", name)):
        value = settings[name]
        if name in ("config", "out", "debug"):
            continue
        words.append("--" + name.replace("_", "-"))
        words += [str(each) for each in value] if isinstance(value, list) else [str(value)]
    return shlex.join(words)


def _table(listing: bench.Listing) -> Table:
    shown = Table(title=Text(listing.title), title_justify="left", title_style="bold")
    for i, header in enumerate(listing.headers):
        shown.add_column(Text(header), justify="right" if i else "left")
    for row in listing.rows:
        shown.add_row(*map(Text, row))
    return shown


def _checkpoint(settings: dict[str, Any]) -> int:
    """On a checkpoint: a table per budget."""
    # Mistakes in the settings are errors before a model is loaded.
    budgets = loading.parse_budgets(settings["keep"], settings["scope"], settings["newlines"])
    repeats = positive("repeats", settings["repeats"])
    # Any image will do: times depend on the number of tiles, not on what it shows.
    image = (
        open_image(Path(settings["image"])) if settings["image"] else pages(whole("seed", settings["seed"]))[0].image
    )

    model, processor, selectors = load_all(settings, choose(settings))

    terminal = console()
    for budget in budgets:
        try:
            result = speed.measure(model, processor, selectors, budget, image, repeats)
        except ValueError as error:
            # Only now is it known how many tokens the image has.
            raise UsageError(f"keep={budget}: {error}") from error
        where = f"{model.device.type}, {torch.get_num_threads()} threads"
        terminal.print(speed.table(result, f"{settings['model']} · keep {budget} · {where} · median of {repeats}"))
    return 0
