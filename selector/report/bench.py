"""What selection costs at a model's real sizes: tables and a picture of a result of `selector bench --geometry`.

python -m selector.report.bench configs/bench/llava-next-7b.json                   prints the page
python -m selector.report.bench configs/bench/llava-next-7b.json --out configs/bench   writes page and picture

Everything shown is computed here from the medians that were measured. Growth is the exponent p of the least-squares
line through log(milliseconds) against log(tiles) or log(budget): with p = 1 twice as many tiles take twice as long.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selector.errors import UsageError
from selector.files import atomic, output, write_json, write_text

RANDOM_WEIGHTS = "*"
"""Marks learned selectors, whose weights here are random."""
AIMS = (2, 4)
"""Aims of this package: % of the tower's time that a selection takes, at the smallest and at the largest budget."""


@dataclass(frozen=True)
class Listing:
    """A table as texts: the first column names its rows, the others hold figures.

    Example:
        >>> listing = Listing("Milliseconds per image", ("selector", "K = 64"), (("norm", "1.8"), ("scope", "184")))
        >>> dict(listing.rows)["norm"]
        '1.8'
    """

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def slope(points: Sequence[tuple[int | float, float]]) -> float | None:
    """Exponent p of y = c · xᵖ, by least squares in logarithms; None for fewer than two different x.

    Args:
        points: (x, y), all above 0.

    Example:
        >>> round(slope([(1, 5.0), (2, 20.0), (4, 80.0)]), 6)
        2.0
    """
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(each) / len(logs) for each in zip(*logs, strict=True)) if logs else (0.0, 0.0)
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread if spread > 0 else None


def listings(data: dict[str, Any]) -> list[Listing]:
    """The tables of a result: the model, the selectors at every budget, and how they grow.

    Args:
        data: as `selector.measure.scaling.measure` returns it.
    """
    return [_model(data), _budgets(data), _growth(data)]


def markdown(data: dict[str, Any]) -> str:
    """The page of a result: what was measured and how, the tables, and the selectors that were left out."""
    parts = [f"# {data['geometry']}: what selection costs", *_preface(data), f"![]({data['geometry']}.svg)"]
    for listing in listings(data):
        rule = "|---|" + "---:|" * (len(listing.headers) - 1)
        rows = ["| " + " | ".join(row) + " |" for row in listing.rows]
        parts += [f"## {listing.title}", "\n".join(["| " + " | ".join(listing.headers) + " |", rule, *rows])]

    parts.insert(-2, "\n".join(_above(data)))  # behind the table of the budgets
    if data["skipped"]:
        parts += ["## Left out", "\n".join(left_out(data))]
    return "\n\n".join(parts) + "\n"


def _above(data: dict[str, Any]) -> list[str]:
    """Which selectors take more of the tower than this package aims at, at the smallest and at the largest budget."""
    keeps, tiles, lines = _keeps(data), data["encoder"]["tiles"], []
    for keep, aim in ((keeps[0], AIMS[0]), (keeps[-1], AIMS[1])):
        shares = {name: _share(data, _cells(data, name)[tiles, keep]) for name in _ranked(data)}
        over = [f"{_marked(data, name)} {_percent(share)}" for name, share in shares.items() if share > aim]
        rest = f"Within {aim}% of the tower at K = {keep} are {len(shares) - len(over)} of {len(shares)} selectors"
        lines.append(f"- {rest}" + (f"; above it: {', '.join(over)}." if over else "."))
    return lines


def left_out(data: dict[str, Any]) -> list[str]:
    """A line per selector that this model could not serve, with the reason."""
    return [f"- `{row['selector']}`: {row['reason']}" for row in data["skipped"]]


def _preface(data: dict[str, Any]) -> list[str]:
    """What was measured, on what, and what the words of the tables mean."""
    machine, energy = data["machine"], data["spectrum"]
    tiles = data["encoder"]["tiles"]
    spectra = "; ".join(
        f"of the {'encoder features' if name == 'features' else 'projected tokens'} about their mean, 90% of the "
        f"energy lies in {each['most']:,} of {each['directions']:,} directions"
        for name, each in energy.items()
    )

    runs, threads = _count(data["repeats"], "run"), _count(machine["threads"], "thread")
    return [
        f"{_count(tiles, 'tile')} of {data['patches']} patches, {data['tokens'][str(tiles)]:,} visual tokens, "
        f"{data['prefill']['text_tokens']} text tokens. Random weights in {machine['dtype']}; picture: "
        f"{data['picture']}; {spectra}. Median of {runs}, {machine['clock']}, {threads} on {machine['name']} "
        f"(torch {machine['torch']}, transformers {machine['transformers']}). Ratios carry over to other machines "
        "better than milliseconds do.",
        f"```bash\n{data['command']}\n```",
        "Shares are of the vision tower on all tiles and of the prefill of every token, all from this run. Operations "
        "are those of matrix products and decompositions. Memory is what a selection allocates at most, beyond its "
        f"inputs. {RANDOM_WEIGHTS}: learned, with random weights.",
    ]


def _model(data: dict[str, Any]) -> Listing:
    """The vision tower, the projector, and the prefill with every token and with fewer."""
    encoder, prefill = data["encoder"], data["prefill"]
    built, layers = prefill["layers_built"], prefill["layers"]
    inside = encoder["projector_ms"] is None  # some towers have the projector in them
    rows = [("vision tower", "", _ms(encoder["tower_ms"]), _giga(encoder["flops"]) if inside else "")]
    if not inside:
        rows.append(("projector", "", _ms(encoder["projector_ms"]), ""))
        both = encoder["tower_ms"] + encoder["projector_ms"]
        rows.append(("tower and projector", "", _ms(both), _giga(encoder["flops"])))
    for row in prefill["rows"]:
        name = "prefill, every token" if row["keep"] is None else f"prefill, K = {row['keep']}"
        rows.append((name, f"{row['tokens']:,}", _ms(row.get("ms")), _giga(row["flops"])))

    # The cache of all layers is known by the formula alone, unless all of them were built.
    caches = [(f"{row['kv_bytes_formula'] / 1e6:.1f}",) for row in prefill["rows"]]
    headers: tuple[str, ...] = (f"KV MB, {_count(layers, 'layer')}, by formula",)
    if built:
        measured = [
            (f"{row['kv_bytes_built'] / 1e6:.2f}", f"{row['kv_bytes_formula_built'] / 1e6:.2f}")
            for row in prefill["rows"]
        ]
        caches = [(*two, *one) for two, one in zip(measured, caches, strict=True)]
        headers = (f"KV MB, {_count(built, 'layer')}, allocated", "by formula", *headers)
    references = len(rows) - len(caches)
    caches = [*[("",) * len(headers)] * references, *caches]

    timed = f"time: {built} of {_count(layers, 'layer')}, scaled" if built else "no layer was built, so it has no time"
    rows = [(*row, *cache) for row, cache in zip(rows, caches, strict=True)]
    return Listing(f"The model (prefill: {timed})", ("work", "tokens", "ms", "GFLOP", *headers), tuple(rows))


def _budgets(data: dict[str, Any]) -> Listing:
    """Every selector at every budget, on all tiles: milliseconds, and the share of the tower."""
    keeps = _keeps(data)
    rows = []
    for name in _ranked(data):
        cells = _cells(data, name)
        pairs = ((cell := cells[data["encoder"]["tiles"], keep], _share(data, cell)) for keep in keeps)
        rows.append((_marked(data, name), *(f"{_ms(cell['ms'])} ({_percent(share)})" for cell, share in pairs)))
    headers = ("selector", *(f"K = {keep}" for keep in keeps))
    return Listing("Milliseconds per image (% of the tower), all tiles", headers, tuple(rows))


def _growth(data: dict[str, Any]) -> Listing:
    """At the largest budget the share of the prefill and the memory; growth with budget and tiles."""
    keeps, tiles = _keeps(data), data["encoder"]["tiles"]
    prefill = data["prefill"]["rows"][0]
    counts = sorted({cell["tiles"] for cell in data["cells"] if cell["keep"] == keeps[0]})
    rows = []
    for name in _ranked(data):
        cells = _cells(data, name)

        # What was not built or has no formula leaves its cell empty.
        largest = cells[tiles, keeps[-1]]
        shares = (
            _percent(100 * largest["flops"] / prefill["flops"]) if prefill["flops"] else "",
            _percent(100 * largest["ms"] / prefill["ms"]) if "ms" in prefill else "",
        )

        by_budget = slope([(keep, cells[tiles, keep]["ms"]) for keep in keeps])
        by_tiles = slope([(count, cells[count, keeps[0]]["ms"]) for count in counts])
        times = " / ".join(_ms(cells[count, keeps[0]]["ms"]) for count in counts)
        rows.append(
            (
                _marked(data, name),
                *shares,
                f"{largest['peak_bytes'] / 1e6:.1f}",
                *(_exponent(each) for each in (by_budget, by_tiles)),
                times,
            )
        )
    headers = (
        "selector",
        "of the prefill's FLOPs",
        "of its time",
        "peak MB",
        "growth with K",
        f"growth with tiles, K = {keeps[0]}",
        f"ms at {', '.join(map(str, counts[:-1]))} and {_count(counts[-1], 'tile')}"
        if counts[1:]
        else f"ms at {_count(counts[0], 'tile')}",
    )
    return Listing(f"Prefill, memory (K = {keeps[-1]}), growth", headers, tuple(rows))


def draw(data: dict[str, Any], out: Path) -> None:
    """Writes the picture: each selector's share of the tower by budget, its time by tiles, its memory.

    Args:
        data: as `selector.measure.scaling.measure` returns it.
        out: an SVG or PNG.
    """
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure

    names, keeps, tiles = _ranked(data)[::-1], _keeps(data), data["encoder"]["tiles"]
    counts = sorted({cell["tiles"] for cell in data["cells"] if cell["keep"] == keeps[0]})
    rows = range(len(names))
    cells = [_cells(data, name) for name in names]

    # Text stays text, and the same data gives the same bytes. A row per selector: curves could not be told apart.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 9}):
        figure = Figure(figsize=(11, 1.2 + 0.2 * len(names)), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True, width_ratios=(4, 4, 3))
        shades = colormaps["viridis"]

        # Darker: less is kept, or fewer tiles.
        for i, keep in enumerate(keeps):
            shares = [_share(data, each[tiles, keep]) for each in cells]
            color = shades(0.9 * i / max(1, len(keeps) - 1))
            panels[0].plot(shares, rows, "o", color=color, markersize=4, label=f"K = {keep}")
        for i, count in enumerate(counts):
            times = [each[count, keeps[0]]["ms"] for each in cells]
            color = shades(0.9 * i / max(1, len(counts) - 1))
            panels[1].plot(times, rows, "o", color=color, markersize=4, label=_count(count, "tile"))
        panels[2].plot(
            [each[tiles, keeps[-1]]["peak_bytes"] / 1e6 for each in cells], rows, "o", color="0.3", markersize=4
        )

        panels[0].set(title=f"{data['geometry']}, {_count(tiles, 'tile')}", xlabel="% of the vision tower's time")
        panels[1].set(title=f"K = {keeps[0]}", xlabel="ms")
        panels[2].set(title=f"K = {keeps[-1]}", xlabel="peak memory, MB")
        panels[0].set_yticks(rows, [_marked(data, name) for name in names])
        for axes in panels:
            axes.set_xscale("log")
            axes.grid(alpha=0.25)
        for axes in panels[:2]:
            axes.legend(loc="upper right", fontsize=8)  # the quickest rows are above, so that this corner is free

        with output(out), atomic(out) as partial:
            figure.savefig(partial, metadata={"Date": None} if out.suffix == ".svg" else None)


def write(data: dict[str, Any], folder: Path, measured: bool = True) -> list[Path]:
    """Writes a result into a folder, named after its geometry: the data, the page, the picture.

    Args:
        data: as `selector.measure.scaling.measure` returns it.
        folder: made as needed.
        measured: write the data, too; without, only what is made of it.

    Returns:
        What was written.

    Raises:
        UsageError: a place that cannot be written to.
    """
    stem = folder / data["geometry"]
    # Not with_suffix: a name such as llava-1.5-7b has a point of its own.
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("json", "md", "svg")]
    with output(folder):
        if measured:
            write_json(paths[0], data)
        write_text(paths[1], markdown(data))
    draw(data, paths[2])
    return paths if measured else paths[1:]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _keeps(data: dict[str, Any]) -> list[int]:
    return sorted({cell["keep"] for cell in data["cells"]})


def _cells(data: dict[str, Any], name: str) -> dict[tuple[int, int], dict[str, Any]]:
    """A selector's figures by (tiles, budget)."""
    return {(cell["tiles"], cell["keep"]): cell for cell in data["cells"] if cell["selector"] == name}


def _ranked(data: dict[str, Any]) -> list[str]:
    """The selectors, the quickest at the largest budget first."""
    place = data["encoder"]["tiles"], _keeps(data)[-1]
    return sorted((row["selector"] for row in data["selectors"]), key=lambda name: _cells(data, name)[place]["ms"])


def _marked(data: dict[str, Any], name: str) -> str:
    [row] = [each for each in data["selectors"] if each["selector"] == name]
    return name + (RANDOM_WEIGHTS if row["weights"] == "random" else "")


def _share(data: dict[str, Any], cell: dict[str, Any]) -> float:
    """Time in % of the vision tower's, on all tiles."""
    return 100 * cell["ms"] / data["encoder"]["tower_ms"]


def _ms(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _percent(value: float) -> str:
    return f"{value:.0f}%" if value >= 10 else f"{value:.1f}%" if value >= 1 else f"{value:.2f}%"


def _giga(value: int | None) -> str:
    return "" if value is None else f"{value / 1e9:,.0f}" if value >= 1e11 else f"{value / 1e9:.1f}"


def _exponent(value: float | None) -> str:
    return "" if value is None else f"{round(value, 2) + 0.0:.2f}"  # plus 0: no minus before a zero


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m selector.report.bench``.

    Returns:
        The exit code: 0, or 2 with one line of error.
    """
    parser = argparse.ArgumentParser(
        prog="python -m selector.report.bench", description="tables and picture of a `selector bench --geometry`"
    )
    parser.add_argument("result", type=Path, help="the JSON that it wrote")
    parser.add_argument("--out", type=Path, help="folder for page and picture (default: print the page)")
    options = parser.parse_args(argv)

    try:
        data = json.loads(options.result.read_text(encoding="utf-8"))
        if options.out is None:
            print(markdown(data), end="")
        else:
            print(*write(data, options.out, measured=False), sep="\n")
    except (UsageError, OSError, ValueError, KeyError) as error:
        print(f"selector.report.bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
