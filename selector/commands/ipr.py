"""Does the change of the inverse participation ratio (IPR) predict how consistent a pruned model is? Study and data.

    python -m selector.commands.ipr --out configs/compare/ipr.json
    python -m selector.commands.ipr configs/compare/ipr.json

The first line measures `SETTINGS` and writes the data, the second reads them; both draw the figure beside the data
(``ipr.svg``) and print the correlations in Markdown.

*Silent Hazards of Token Reduction* (arXiv 2503.06794) says that |ΔIPR| goes with consistency: the larger it is, the
more answers differ from the unpruned ones, so a rank correlation with agreement is **negative** where the claim
holds. The text that we could read fixes neither the layer, nor whether the mean is subtracted, nor what the correlation
runs over; the study crosses them. In all three ways of counting a figure is a mean of Spearman's ρ over groups:

- ``budgets``: a group per selector, a point per budget (the IPR of few tokens differs from that of many);
- ``selectors``: a group per budget, a point per selector (which one to trust, at equal cost);
- ``questions``: a group per selector and budget, a point per question (which answer to trust).

Points of the first two are shares of equal answers and the size of the mean ΔIPR over the questions, as in the report.
Intervals are 95%, of a bootstrap over the questions, which all points of a group share. Drawing questions twice adds
noise to every point, so they lean a little towards 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from selector.commands.loading import load_model, load_selectors, parse_budgets
from selector.errors import UsageError
from selector.files import output, write_text
from selector.measure.answering import answer, answer_nll, encode_image, forced
from selector.measure.consistency import spectrum
from selector.pruning import Pruned, prune_inputs
from selector.tasks import load_task

SETTINGS: dict[str, Any] = {
    "model": "checkpoints/llava-next-tiny",
    "tasks": ["documents", "charts", "scenes"],
    "selectors": ["svd-prune", "lofi", "ridge-leverage", "cls-attention", "divprune", "dart", "uniform", "random"],
    "keep": [0.5, 0.25, 64, 32, 16],
    "questions": 40,
    "seed": 0,
    "layers": [0, 1, 4],
}
MEANS = ("uncentred", "centred")
OVER = ("budgets", "selectors", "questions")
UNIT, NLL_UNIT = 1e-5, 1e-3
"""Units of ΔIPR and ΔNLL in the data, so that whole numbers do: the file stays small."""

Data = dict[str, Any]
"""The settings of a study and its rows, see `measure`."""


@dataclass(frozen=True)
class Correlation:
    """Mean rank correlation of |ΔIPR| with consistency.

    Attributes:
        layer: whose visual tokens the spectrum is of; 0 is what enters the language model.
        mean: ``"uncentred"``, or ``"centred"``: the mean token is subtracted first.
        over: what the points of a group differ in, one of `OVER`.
        groups: in which ρ is defined (in the others every answer is equal, or none).
        points: of all those groups together.
        rank: in [-1, 1]; negative where the claim holds.
        interval: 95%, a bootstrap over the questions.

    Example:
        >>> held = Correlation("scenes", 0, "uncentred", "budgets", -0.82, (-0.9, -0.6), groups=7, points=35)
        >>> print(markdown([held]).splitlines()[-1])
        | budgets | 0 | uncentred | scenes | -0.82 [-0.90, -0.60] | 7 | 35 |
    """

    task: str
    layer: int
    mean: str
    over: str
    rank: float
    interval: tuple[float, float]
    groups: int
    points: int


def measure(settings: Mapping[str, Any]) -> Data:
    """Runs the study: one row per task, selector and budget, with one figure per question.

    Args:
        settings: as `SETTINGS`.

    Returns:
        The settings and ``rows``: ``same`` (1 or 0 per question: whether the answer stayed), ``nll`` (ΔNLL of the
        unpruned answer, in `NLL_UNIT` nats per token) and ``ipr`` (ΔIPR in `UNIT`, by mean and layer).

    Raises:
        UsageError: a model, selector or budget that cannot be.
    """
    model, processor = load_model(settings["model"], "cpu")
    selectors = load_selectors(settings["selectors"], model.device)
    budgets = parse_budgets(settings["keep"], "image", "kept_rows")
    rows = {
        (task, name, str(budget)): {"task": task, "selector": name, "keep": str(budget)} | _empty(settings["layers"])
        for task in settings["tasks"]
        for budget in budgets
        for name in selectors
    }

    needs = frozenset({"features"}).union(*(selector.needs for selector in selectors.values()))
    for task in settings["tasks"]:
        samples = load_task(task).samples(settings["questions"], settings["seed"])
        for number, sample in enumerate(samples, 1):
            inputs, encoded = encode_image(model, processor, sample.image, sample.question, needs)

            # The unpruned model answers once; every pruned one then reads that answer, and gives one of its own.
            whole = prune_inputs(model, inputs, None, encoded=encoded)
            reference = answer(model, processor, whole.inputs, 48).ids
            before, nll = _read(model, whole, reference, settings["layers"], encoded.image_token_id)
            for budget in budgets:
                for name, selector in selectors.items():
                    pruned = prune_inputs(model, inputs, selector, budget, encoded=encoded)
                    after, later = _read(model, pruned, reference, settings["layers"], encoded.image_token_id)
                    other = answer(model, processor, pruned.inputs, 48).ids

                    row = rows[task, name, str(budget)]
                    row["same"] += str(int(torch.equal(reference, other)))
                    row["nll"].append(round((later - nll) / NLL_UNIT))
                    for kind, values in after.items():
                        row["ipr"][kind].append(round((values - before[kind]) / UNIT))
            # One line, overwritten with every question.
            print(f"\r{task}: {number} of {settings['questions']}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    return {**settings, "rows": list(rows.values())}


def _empty(layers: Sequence[int]) -> dict[str, Any]:
    """A row before its first question."""
    return {"same": "", "nll": [], "ipr": {_kind(mean, layer): [] for mean in MEANS for layer in layers}}


def _kind(mean: str, layer: int) -> str:
    """The key of a series of ΔIPR in a row; JSON has no tuples."""
    return f"{mean} {layer}"


def _read(
    model: Any, pruned: Pruned, reference: Int[Tensor, "A"], layers: Sequence[int], image_token_id: int
) -> tuple[dict[str, float], float]:
    """(IPR of the visual tokens by mean and layer, NLL of the unpruned answer), in one pass of the language model."""
    read = forced(model, pruned.inputs, reference, layers, image_token_id)
    ratios = {}
    for layer, tokens in read.visual.items():
        ratios[_kind("uncentred", layer)] = spectrum(tokens).ipr
        ratios[_kind("centred", layer)] = spectrum(_centred(tokens)).ipr
    return ratios, answer_nll(read.logits, reference)


def _centred(tokens: Float[Tensor, "L d"]) -> Float[Tensor, "L d"]:
    return (tokens.double() - tokens.double().mean(0)).to(tokens.dtype)  # float64: the mean can be far from 0


def correlations(data: Data, consistency: str = "same", draws: int = 1000, seed: int = 0) -> list[Correlation]:
    """Every correlation of the study for which some group has a ρ.

    Args:
        data: as `measure` returns it.
        consistency: ``same``, whether an answer stayed; or ``nll``, minus the ΔNLL of the unpruned answer.
        draws: of the bootstrap over the questions, seeded with `seed`; 0 gives intervals of no width.

    Raises:
        ValueError: another consistency.
    """
    if consistency not in ("same", "nll"):
        raise ValueError(f"consistency must be 'same' or 'nll', got {consistency!r}")

    # Draw 0 is the questions as they are: it gives ρ itself, the others its interval.
    count = data["questions"]
    resampled = np.random.default_rng(seed).integers(count, size=(draws, count))
    picks = np.concatenate([np.arange(count)[None], resampled])

    results = []
    for task in data["tasks"]:
        for layer in data["layers"]:
            for mean in MEANS:
                kind = _kind(mean, layer)
                shift = _table(data, task, lambda row, kind=kind: row["ipr"][kind])
                steady = _table(data, task, lambda row: _consistency(row, consistency))
                for over in OVER:
                    ranks, groups, points = _over(shift, steady, picks, over)
                    if groups:  # else nothing varies, and there is nothing to say
                        low, high = np.nanquantile(ranks, [0.025, 0.975])
                        interval = (float(low), float(high))
                        results.append(Correlation(task, layer, mean, over, float(ranks[0]), interval, groups, points))
    return results


def _consistency(row: Mapping[str, Any], kind: str) -> list[float]:
    """Per question, higher where the model changed less."""
    return [float(c) for c in row["same"]] if kind == "same" else [-float(value) for value in row["nll"]]


def _table(data: Data, task: str, values: Any) -> np.ndarray:
    """The values of a task's rows, ``[selectors, budgets, questions]``."""
    rows = {(row["selector"], row["keep"]): row for row in data["rows"] if row["task"] == task}
    return np.array([[values(rows[name, str(keep)]) for keep in data["keep"]] for name in data["selectors"]], float)


def _over(shift: np.ndarray, steady: np.ndarray, picks: np.ndarray, over: str) -> tuple[np.ndarray, int, int]:
    """(mean ρ of every draw, groups in which the first has one, their points); `picks` is ``[draws, questions]``."""
    if over == "questions":
        # Points are questions: a draw has some of them several times, which is faster counted than repeated.
        counts = np.stack([np.bincount(pick, minlength=shift.shape[2]) for pick in picks])
        cells = zip(_flat(abs(shift)), _flat(steady), strict=True)
        ranks = np.stack([counted_correlations(a, b, counts) for a, b in cells], -1)
    else:
        # Points are means over the questions, which every draw takes anew; of the signed shift first, then its size.
        x, y = (table[:, :, picks].mean(-1).transpose(2, 0, 1) for table in (shift, steady))  # [draws, S, K]
        x = abs(x)
        ranks = rank_correlations(x, y) if over == "budgets" else rank_correlations(x.swapaxes(1, 2), y.swapaxes(1, 2))

    # Each draw is a mean over the groups that have a ρ in it.
    groups = int(np.isfinite(ranks[0]).sum())
    # Points of a group.
    size = {"budgets": shift.shape[1], "selectors": shift.shape[0], "questions": shift.shape[2]}[over]
    defined = np.isfinite(ranks)
    total, number = np.where(defined, ranks, 0).sum(-1), defined.sum(-1)
    return np.divide(total, number, out=np.full(len(ranks), np.nan), where=number > 0), groups, groups * size


def _flat(table: np.ndarray) -> np.ndarray:
    return table.reshape(-1, table.shape[-1])


def rank_correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's ρ along the last axis, mean ranks for ties; NaN where either does not vary.

    `selector.report.statistics.spearman` in bulk.

    Example:
        >>> import numpy as np
        >>> rank_correlations(np.array([[1, 2, 3], [1, 2, 3]]), np.array([[2, 4, 9], [3, 3, 3]])).tolist()
        [1.0, nan]
    """
    a, b = _ranks(x), _ranks(y)
    product = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.divide((a * b).sum(-1), product, out=np.full(product.shape, np.nan), where=product > 0)


def counted_correlations(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`rank_correlations` of points that count several times each, or not at all.

    Args:
        x, y: ``[n]``
        counts: ``[draws, n]``, how often each draw has each point.

    Returns:
        ``[draws]``
    """
    a, b = _counted_ranks(x, counts), _counted_ranks(y, counts)
    product = np.sqrt((counts * a * a).sum(-1) * (counts * b * b).sum(-1))
    return np.divide((counts * a * b).sum(-1), product, out=np.full(len(counts), np.nan), where=product > 0)


def _counted_ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``[draws, n]`` mean ranks, less their mean."""
    level = np.unique(values, return_inverse=True)[1]
    belongs = np.eye(level.max() + 1)[level]  # [n, levels]: equal values share a rank

    # The mean rank of equal values: all points below them, and half of their own.
    held = counts @ belongs
    return (held.cumsum(1) - held / 2 - counts.sum(1, keepdims=True) / 2) @ belongs.T


def _ranks(values: np.ndarray) -> np.ndarray:
    """Mean ranks along the last axis, less their mean."""
    # Pairwise: groups are small, and ties come out right by themselves.
    below = (values[..., None] > values[..., None, :]).sum(-1)
    above = (values[..., None] < values[..., None, :]).sum(-1)
    return (below - above) / 2


def markdown(results: Sequence[Correlation]) -> str:
    """A Markdown table of the correlations, their intervals, and how many groups and points each is from."""
    lines = ["| over | layer | mean | task | ρ [95%] | groups | points |", "|---|---|---|---|---|---|---|"]
    for each in sorted(results, key=lambda c: (OVER.index(c.over), c.layer, -MEANS.index(c.mean))):
        low, high = each.interval
        figures = f"{each.rank:+.2f} [{low:+.2f}, {high:+.2f}] | {each.groups} | {each.points}"
        lines.append(f"| {each.over} | {each.layer} | {each.mean} | {each.task} | {figures} |")
    return "\n".join(lines)


def figure(results: Sequence[Correlation]) -> str:
    """The correlations as SVG: one panel per entry of `OVER`, by layer and mean; a colour and mark per task."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(each.task for each in results))
    layers = sorted({each.layer for each in results})
    titles = {
        "budgets": "over the budgets of one selector",
        "selectors": "over the selectors at one budget",
        "questions": "over the questions of one row",
    }
    # Text stays text (small, searchable), and a fixed salt for the ids makes the file the same every time.
    with pyplot.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "ipr", "font.size": 9, "font.family": "sans-serif"}
    ):
        drawn, panels = pyplot.subplots(1, len(OVER), figsize=(10, 3.4), sharey=True, layout="constrained")
        for panel, over in zip(panels, OVER, strict=True):
            for i, task in enumerate(tasks):
                own = [each for each in results if (each.over, each.task) == (over, task)]
                # Tasks stand side by side around the place of their layer and mean.
                x = [2 * layers.index(c.layer) + MEANS.index(c.mean) + 0.22 * (i - (len(tasks) - 1) / 2) for c in own]
                spans = np.abs([[c.rank - c.interval[0] for c in own], [c.interval[1] - c.rank for c in own]])
                style = {"fmt": "osD^v"[i % 5], "markersize": 4.5, "capsize": 2, "elinewidth": 1, "color": f"C{i}"}
                panel.errorbar(x, [c.rank for c in own], yerr=spans, label=task, **style)

            panel.axhline(0, color="0.4", linewidth=0.8)
            panel.set_title(titles[over], fontsize=10)
            places = [(layer, mean) for layer in layers for mean in MEANS]
            panel.set_xticks(range(len(places)), [f"{mean}\nlayer {layer}" for layer, mean in places], rotation=45)
            panel.set_ylim(-1.05, 1.05)
            panel.grid(axis="y", alpha=0.3)
        panels[0].set_ylabel("Spearman's ρ, |ΔIPR| with agreement\n← as claimed           the other way →")
        panels[0].legend(fontsize=8)
        held = io.StringIO()
        drawn.savefig(held, format="svg", metadata={"Date": None})
        pyplot.close(drawn)
    return held.getvalue()


def _compact(data: Data) -> str:
    """JSON with a row per line: small, and a change shows where it is."""
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in data["rows"])
    head = json.dumps({name: value for name, value in data.items() if name != "rows"})
    return f'{head[:-1]}, "rows": [\n{rows}\n]}}\n'


def check(data: Any) -> Data:
    """The data, if every row is there, with a figure for every question.

    Raises:
        UsageError: names what is missing.
    """
    missing = [name for name in (*SETTINGS, "rows") if name not in data] if isinstance(data, dict) else ["everything"]
    if missing:
        raise UsageError(f"data must be what this command wrote, they lack {', '.join(missing)}")

    rows = {(row["task"], row["selector"], row["keep"]): row for row in data["rows"]}
    for task, name, keep in _cells(data):
        row = rows.get((task, name, keep))
        if row is None:
            raise UsageError(f"data must be whole, {name} at {keep} on {task} is missing")
        if {len(row["same"]), len(row["nll"]), *map(len, row["ipr"].values())} != {data["questions"]}:
            raise UsageError(
                f"data must have {data['questions']} questions per row, {name} at {keep} on {task} has not"
            )
    return data


def _cells(data: Data) -> Iterator[tuple[str, str, str]]:
    return ((t, s, str(k)) for t in data["tasks"] for s in data["selectors"] for k in data["keep"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command of this module.

    Returns:
        The exit code: 0, or 2 with one line of error.
    """
    parser = argparse.ArgumentParser(prog="python -m selector.commands.ipr", description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", help="data of an earlier run; without, the study is measured")
    parser.add_argument("--out", type=Path, help="where measured data are written")
    options = parser.parse_args(argv)
    if (options.data is None) == (options.out is None):
        parser.error("give either data to read, or --out to measure")
    try:
        data = measure(SETTINGS) if options.data is None else json.loads(options.data.read_text(encoding="utf-8"))
        results = correlations(check(data))

        # The figure goes next to the data, which are written only where they were measured.
        target: Path = options.data or options.out
        with output(target):
            if options.out:
                write_text(target, _compact(data))
            write_text(target.with_suffix(".svg"), figure(results))
    except (UsageError, OSError, json.JSONDecodeError) as error:
        print(f"ipr: error: {error}", file=sys.stderr)
        return 2
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
