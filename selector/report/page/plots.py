"""Plots as inline SVG: no library, no script, colours from the page's own style (so they follow light and dark).

A plot is drawn in a fixed box of 460 × 300 and scales with the page. Every series has a colour and a marker of its own;
every point gives its figures in a ``<title>``; the whole plot is described for those who cannot see it. Names of
reference lines are to the right of the plot and the title of the y axis above it, where no point and no tick can be.

matplotlib, on which this package depends, writes SVG too, but with fixed colours and without text at the points. Drawn
here, a plot follows the reader's light or dark theme, and every point has a tooltip with its figures. Importing
matplotlib for its ticks alone would take longer than making the page.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 30, 42
LETTER, LINE = 8.2, 17
"""Width and height that a letter of a label may take: those on a phone, where letters are larger."""
LONGEST = 16
"""Most letters of a reference line's name; its tooltip has the rest."""
COLOURS, MARKERS = 8, 5  # a pair of them repeats after 40 series, see `marker`

Number = float | int


@dataclass(frozen=True)
class Point:
    """A figure at (x, y), its interval (low, high) in y if it has one, and the text of its tooltip.

    Example:
        >>> point = Point(64, 0.5, "64 tokens: 50%", interval=(0.25, 0.75))
        >>> x, y = axis("tokens", [16, 64]), axis("right", [], percent=True)
        >>> svg = plot("accuracy", x, y, [Series("lofi", 0, [point])])
        >>> "<title>lofi: 64 tokens: 50%</title>" in svg, svg.count("whisker")
        (True, 1)
    """

    x: Number
    y: Number
    text: str
    interval: tuple[Number, Number] | None = None


@dataclass(frozen=True)
class Series:
    """Points of one selector; `number` gives colour and marker; a joined series has a line through them in order.

    Example:
        >>> curve = Series("lofi", 1, [Point(16, 0.25, "16"), Point(64, 0.5, "64")])
        >>> svg = plot("accuracy", axis("tokens", [16, 64]), axis("right", [], percent=True), [curve])
        >>> svg.count('class="mark c1"'), svg.count("<polyline")  # two marks, and the line that joins them
        (2, 1)
    """

    name: str
    number: int
    points: Sequence[Point]
    joined: bool = True


@dataclass(frozen=True)
class Axis:
    """Label, range and scale of an axis; the ticks of a percent axis are written in percent.

    Example:
        >>> round(Axis("tokens", 16, 64, log=True).share(32), 3)
        0.5
    """

    label: str
    low: Number
    high: Number
    log: bool = False
    percent: bool = False
    ticks: Sequence[Number] = field(default_factory=tuple)

    def share(self, value: Number) -> float:
        """Where a value lies between the ends, 0 to 1."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Reference:
    """A horizontal reference over the whole plot, such as the unpruned model.

    Example:
        >>> full = Reference("full 81%", 0.81)
        >>> svg = plot("accuracy", axis("tokens", [16]), axis("right", [], percent=True), series=[], lines=[full])
        >>> svg.count('<line class="reference"'), "full 81%" in svg
        (1, True)
    """

    name: str
    y: Number


def axis(label: str, values: Sequence[Number], log: bool = False, percent: bool = False, zero: bool = False) -> Axis:
    """An axis that holds the values, with some margin and round ticks.

    Args:
        values: that will be drawn; none are needed for a percent axis, which always spans 0 to 1.
        log: logarithmic, if all values are positive.
        zero: begin at 0.

    Example:
        >>> axis("ms", [3, 41], zero=True).ticks
        [0, 20, 40]
    """
    if percent:
        return Axis(label, 0, 1, percent=True, ticks=(0, 0.25, 0.5, 0.75, 1))

    low, high = min(values, default=0.0), max(values, default=1.0)
    if log and low > 0:
        low, high = low / 1.25, high * 1.25
        return Axis(label, low, high, log=True, ticks=_log_ticks(low, high))

    low = 0.0 if zero else low
    gap = (high - low) or abs(high) or 1.0  # one value, or only zeros, still need a width
    low, high = (0.0 if zero else low - 0.06 * gap), high + 0.06 * gap
    return Axis(label, low, high, ticks=_linear_ticks(low, high))


def plot(
    title: str, x: Axis, y: Axis, series: Sequence[Series], lines: Sequence[Reference] = (), front: bool = False
) -> str:
    """The SVG of a plot.

    Args:
        title: describes it where it cannot be seen.
        series: drawn in this order, later ones on top.
        lines: horizontal references, named at the right.
        front: shade the Pareto front: the points that no other beats with as little x.
    """
    # The longest name of a reference decides how much room is left for the plot itself.
    names = {line: _short(line.name) for line in lines}
    right = WIDTH - max([RIGHT, *(10 + LETTER * len(name) for name in names.values())])
    across = functools.partial(_x, x, right)
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_frame(x, y, right),
    ]

    # References lie below the points; names of equal heights are moved apart, their lines are not.
    for line, height in zip(lines, _apart([_y(y, line.y) for line in lines]), strict=True):
        level = f'y1="{_y(y, line.y):.1f}" y2="{_y(y, line.y):.1f}"'
        parts.append(f'<line class="reference" x1="{LEFT}" x2="{right:.1f}" {level}/>')
        words = f"{escape(names[line])}<title>{escape(line.name)}</title>"
        parts.append(f'<text class="reference" x="{right + 5:.1f}" y="{height + 4:.1f}">{words}</text>')

    if front:
        path = " ".join(f"{across(p.x):.1f},{_y(y, p.y):.1f}" for p in _front(series))
        parts.append(f'<polyline class="front" points="{path}"/>')

    # Curves at the same budgets would hide one another's intervals: each is moved aside by a pixel or two.
    for i, each in enumerate(series):
        parts += _drawn(across, y, each, nudge=(i - (len(series) - 1) / 2) * 2.2 if each.joined else 0)
    return "".join([*parts, "</svg>"])


def marker(number: int, x: Number = 7, y: Number = 7, size: float = 4.6) -> str:
    """The SVG of a series' mark at (x, y); colours repeat after `COLOURS`, then with another shape."""
    shape = (number + number // COLOURS) % MARKERS
    attributes = f'class="mark c{number % COLOURS}"'
    if shape == 0:
        return f'<circle {attributes} cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
    # In units of `size`, about equal in area.
    corners = {
        1: [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
        2: [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
        3: [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        4: [(0, 1.15), (1.1, -0.85), (-1.1, -0.85)],
    }[shape]
    outline = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners)
    return f'<polygon {attributes} points="{outline}"/>'


def legend(series: Sequence[tuple[str, int]]) -> str:
    """A list of names with their marks, as HTML, from (name, number) pairs."""
    items = (
        f'<li><svg viewBox="0 0 14 14" aria-hidden="true">{marker(number)}</svg>{escape(name)}</li>'
        for name, number in series
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _front(series: Sequence[Series]) -> list[Point]:
    """The Pareto front, from left to right: points than which no other has more y at as little x."""
    best: list[Point] = []
    # By x, and at equal x the highest first: what comes later must be higher to be on the front.
    for point in sorted((p for each in series for p in each.points), key=lambda p: (p.x, -p.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _apart(heights: Sequence[float]) -> list[float]:
    """Heights of labels in the same order, moved just far enough for each to have a line of its own in the plot."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    floor = float(TOP)
    for i in order:  # from the top down: no label above the plot or on the one before
        placed[i] = max(placed[i], floor)
        floor = placed[i] + LINE
    ceiling = float(HEIGHT - BOTTOM)
    for i in reversed(order):  # and back up: none below it
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - LINE
    return placed


def _drawn(across: Callable[[Number], float], y: Axis, series: Series, nudge: Number) -> list[str]:
    """The elements of a series: its line, then intervals and marks; `nudge` moves it aside in pixels."""
    points = series.points
    places = [(across(p.x) + nudge, _y(y, p.y)) for p in points]
    parts = []
    colour = f"c{series.number % COLOURS}"
    if series.joined and len(points) > 1:
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        parts.append(f'<polyline class="line {colour}" points="{path}"/>')

    for point, (px, py) in zip(points, places, strict=True):
        if point.interval is not None:
            low, high = (_y(y, end) for end in point.interval)
            parts.append(f'<line class="whisker {colour}" x1="{px:.1f}" x2="{px:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        title = escape(f"{series.name}: {point.text}")
        parts.append(f"<g>{marker(series.number, px, py, 4.2)}<title>{title}</title></g>")
    return parts


def _frame(x: Axis, y: Axis, right: Number) -> list[str]:
    """Grid lines, ticks and titles of both axes; the plot ends at `right`."""
    parts = []
    for tick in y.ticks:
        height = _y(y, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right:.1f}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text class="tick y" x="{LEFT - 7}" y="{height + 4:.1f}">{_written(tick, y)}</text>')
    floor = HEIGHT - BOTTOM
    for tick in x.ticks:
        across = _x(x, right, tick)
        parts.append(f'<line class="grid" x1="{across:.1f}" x2="{across:.1f}" y1="{TOP}" y2="{floor}"/>')
        parts.append(f'<text class="tick x" x="{across:.1f}" y="{floor + 16}">{_written(tick, x)}</text>')

    middle = (LEFT + right) / 2
    parts.append(f'<text class="label" x="{middle:.1f}" y="{HEIGHT - 6}">{escape(x.label)}</text>')
    parts.append(f'<text class="label y" x="4" y="13">{escape(y.label)}</text>')
    return parts


def _x(x: Axis, right: Number, value: Number) -> float:
    return LEFT + x.share(value) * (right - LEFT)


def _y(y: Axis, value: Number) -> float:
    # SVG counts from the top.
    return HEIGHT - BOTTOM - y.share(value) * (HEIGHT - TOP - BOTTOM)


def _written(value: Number, which: Axis) -> str:
    return f"{100 * value:.0f}%" if which.percent else f"{value:g}"


def _linear_ticks(low: Number, high: Number) -> list[Number]:
    """Three to six ticks at multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / 4
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.99)
    first = math.ceil(low / step - 1e-9)  # a tick at the very end counts in spite of rounding
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: Number, high: Number) -> list[Number]:
    """Powers of two, as budgets often are; every other one, or fewer, over a long range."""
    span = math.log2(high / low)
    every = max(1, math.ceil(span / 6))
    first = math.ceil(math.log2(low) - 1e-9)
    return [2.0**i for i in range(first, math.floor(math.log2(high) + 1e-9) + 1, every)]
