"""The columns of every table: how a figure is written, what rows are sorted by, and what the header means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from selector.record import FIELDS, METRICS, RIGHT_FROM

Figures = dict[str, Any]
Summary = dict[str, Any]
MARK = "†"
LEGEND = f"{MARK} sees the question: what is kept of an image differs per question."

OF_A_METRIC = ("f1", "paired")
"""Figures of a row that are no field of its records: a metric gives them over all samples together."""

SHARED = "‡"
"""Marks times that are a batch's, divided by its rows."""

AVERAGED = (
    "keep and tokens are averages over the layers of the language model. Where tokens leave inside it, its first "
    "layers see all of them and the last ones fewer than keep says (with count=after, keep counts those of the last "
    "layers, and tokens says what the average then is). Selection there takes place during prefill and is taken off "
    "its time; such prompts are answered one at a time, also where others are answered in batches. Their ΔIPR is taken "
    "where the last tokens leave."
)
"""What a reader must know of selectors that act inside the language model."""

POOLED = "all tasks"
"""What tables call all tasks taken together."""


def share_of(keep: str | None) -> str | None:
    """What budgets are grouped by: ``auto:0.2`` is 0.2 on average, and is shown next to it.

    Example:
        >>> share_of("auto:0.2"), share_of("64")
        ('0.2', '64')
    """
    return None if keep is None else keep.removeprefix("auto:")


def is_auto(row: Figures) -> bool:
    """Whether the budget of a row is a share on average over images."""
    return share_of(row["keep"]) != row["keep"]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        header: what stands above it.
        text: writes the cell of a row.
        value: what the column is sorted by; None for a row without the figure.
        note: what the header means, for the legend.

    Example:
        >>> row = {"tokens": 64.0, "full_tokens": 256.0}
        >>> TOKENS.header, TOKENS.text(row), TOKENS.value(row)
        ('tokens', '64 (25%)', 64.0)
    """

    header: str
    text: Callable[[Figures], str]
    value: Callable[[Figures], Any]
    note: str


def marked(label: str, sees_question: bool) -> str:
    """How tables write a selector: with `MARK` if it sees the question; `LEGEND` says what the mark means."""
    return label + MARK if sees_question else label


def selector_name(row: Figures) -> str:
    """What tables call the selector of a row."""
    return marked(row["selector"], row["sees_question"])


def legend(summary: Summary) -> list[str]:
    """What the marks mean, as the lines to print: none where nothing of the run has them."""
    lines = [LEGEND] if any(row["sees_question"] for row in summary["rows"]) else []
    if batch_size(summary) > 1:
        lines.append(
            f"{SHARED} in batches of up to {batch_size(summary)} prompts: the time of a batch divided by its rows (or "
            "by its decoded tokens), the memory of the whole batch. --batch-size 1 times every sample by itself."
        )
    return lines


def batch_size(summary: Summary) -> int:
    """Prompts that were answered at once; a plan of an older version does not say, and had one."""
    return summary.get("batch_size", 1)


def timed(header: str, summary: Summary) -> str:
    """The header of a time, marked where samples share it."""
    return header + SHARED if batch_size(summary) > 1 else header


def _plain(header: str, field: str, digits: int, note: str, scale: float = 1.0) -> Column:
    """A figure without an interval, times `scale`: bytes as GB, for example.

    Raises:
        KeyError: a figure that no row ever has: its column would be left out without a word.
    """
    if field not in FIELDS and field not in OF_A_METRIC:
        raise KeyError(field)

    def value(row: Figures) -> Any:
        return None if row.get(field) is None else scale * row[field]

    return Column(header, lambda r: _number(value(r), digits), value, note)


def _shift(header: str, field: str, digits: int, note: str) -> Column:
    """A mean difference with its sign and interval."""

    def text(row: Figures) -> str:
        if row[field] is None:
            return "–"
        low, high = row[f"{field}_interval"]
        return f"{row[field]:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"

    return Column(header, text, lambda r: r[field], note)


def _flips(header: str, name: str, note: str) -> Column:
    """How many answers changed in one way, see `selector.measure.metrics.flip`."""
    return Column(
        header,
        lambda r: "–" if r["flips"] is None else str(r["flips"][name]),
        lambda r: None if r["flips"] is None else r["flips"][name],
        note,
    )


def _versus(header: str, field: str, note: str) -> Column:
    """A paired difference of accuracy in points, with its interval; a star: significant after Holm's correction."""

    def text(row: Figures) -> str:
        if row[field] is None:
            # The references have nothing to be compared with; a selector may just lack the other row.
            return "" if row["keep"] is None else "–"
        low, high = row[field]["interval"]
        star = "*" if row[field]["p_holm"] < 0.05 else ""
        return f"{100 * row[field]['difference']:+.0f} [{100 * low:+.0f}, {100 * high:+.0f}]{star}"

    return Column(header, text, lambda r: None if r[field] is None else r[field]["difference"], note)


KEEP = Column(
    "keep",
    lambda r: r["keep"] or "",
    lambda r: r["tokens"],
    "what may stay: a count or a share (auto: on average)",
)
SELECTOR = Column("selector", selector_name, lambda r: r["selector"], "full: unpruned; blind: no image")
SAMPLES = Column("n", lambda r: str(r["samples"]), lambda r: r["samples"], "samples")
TOKENS = Column(
    "tokens", lambda r: _tokens(r), lambda r: r["tokens"], "visual tokens that reached the language model (mean)"
)
LAST = _plain("last tokens", "last_tokens", 0, "visual tokens in the last layer, where they leave inside the model")
SAME = Column(
    "same %", lambda r: _percent(r["agreement"]), lambda r: r["agreement"], "answers identical to the unpruned model's"
)
BROKEN = _flips("r→w", "right_to_wrong", "answers that selection broke")
FIXED = _flips("w→r", "wrong_to_right", "answers that selection fixed")


def main_columns(summary: Summary, task: str | None = None) -> list[Column]:
    """Head to head: what was right, what stayed the same, what it cost. Columns without any figure are left out.

    Args:
        summary: the figures of a run, see `selector.report.summary.summarize`.
        task: whose table it is; None or `POOLED` for that of all tasks.
    """
    # Only tasks that ask for it are scored by how near an answer comes.
    wanted = summary["tasks"].values() if task in (None, POOLED) else [summary["tasks"][task]]
    metrics = [about.get("metric", "exact") for about in wanted]
    anls = [_plain("ANLS", "anls", 1, "mean normalised Levenshtein similarity × 100", 100.0)]
    f1 = [_plain("F1", "f1", 1, "F1 of yes × 100", 100.0)]
    note = "accuracy + accuracy+ (both questions of an image right), in %, summed over categories"
    paired = [_plain("MME", "paired", 1, note)]

    columns = [
        # Who, and what stayed.
        KEEP,
        SELECTOR,
        # Right or wrong, and against what.
        _main(metrics),
        *(anls if any(each["anls"] for each in wanted) else []),
        *(f1 if "yes_no" in metrics else []),
        *(paired if "mme" in metrics else []),
        _versus("vs full", "versus_full", "points right more than the unpruned model, paired; *: McNemar, Holm < 0.05"),
        _versus(f"vs {summary['baseline']}", "versus_baseline", "the same against the baseline at the same budget"),
        _versus("vs fixed", "versus_fixed", "a share on average against the same share of every image, same selector"),
        # What changed, whether right or not, and whether the evidence was still visible.
        SAME,
        TOKENS,
        SAMPLES,
        BROKEN,
        FIXED,
        _plain("ΔNLL", "nll_shift", 2, "increase of the NLL of the unpruned model's own answer, nats per token"),
        Column(
            "evidence % (base)", _evidence, lambda r: r["evidence"], "share of the answer's boxes under kept tokens"
        ),
        # What it cost.
        Column("select ms", _selection, lambda r: r["selection_ms"] if r["keep"] else None, "selector and budget"),
        _plain(timed("prefill ms", summary), "prefill_ms", 1, "prompt to first token"),
    ]
    return _with_figures(columns, summary)


def _main(metrics: Sequence[str]) -> Column:
    """The column of how right the answers are: a share where they are right or wrong, else the mean of the scores."""
    if set(metrics) <= {"exact"}:
        return Column("right % [95%]", _accuracy, lambda r: r["accuracy"], "exact match, with its Wilson interval")
    known = dict.fromkeys(METRICS[metric].header for metric in metrics)
    header = next(iter(known)) if len(known) == 1 else "score %"
    note = " or ".join(dict.fromkeys(METRICS[metric].note for metric in metrics))
    if len(known) > 1:
        note = f"each task's own score ({note})"
    return Column(f"{header} [95%]", _accuracy, lambda r: r["accuracy"], f"{note}; mean, with its bootstrap interval")


def scored(summary: Summary) -> list[str]:
    """How the tasks that are not scored by exact match are asked and scored, a line each."""
    lines = []
    for task, about in summary["tasks"].items():
        asked = [f"{name} {about[name]!r}" for name in ("suffix", "system") if about.get(name)]
        metric = about.get("metric", "exact")
        if metric != "exact":
            lines.append(
                f"{task}: scored by {METRICS[metric].note}. Points are of that score; in flips and McNemar's test an "
                f"answer is right from {RIGHT_FROM} on."
            )
        if asked:
            lines.append(f"{task}: asked with {' and '.join(asked)}.")
    return lines


def consistency_columns(summary: Summary) -> list[Column]:
    """How far a pruned model moves away from the unpruned one. Columns without any figure are left out."""

    def needed(row: Figures) -> Any:
        return None if row["versus_full"] is None else row["versus_full"]["samples_for_a_point"]

    def chance(row: Figures) -> str:
        versus = row["versus_full"]
        return "–" if versus is None else f"{versus['p']:.3g} ({versus['p_holm']:.3g})"

    columns = [
        KEEP,
        SELECTOR,
        Column("same % [95%]", _agreement, lambda r: r["agreement"], SAME.note),
        Column("evidence % [95%]", _kept, lambda r: r["evidence"], "share of the boxes kept, bootstrap interval"),
        BROKEN,
        FIXED,
        # Answers that flips show, and whether chance explains them.
        _flips("w→w", "wrong_to_wrong", "wrong before and after, in other words"),
        Column("p (Holm)", chance, lambda r: r["versus_full"] and r["versus_full"]["p"], "exact McNemar against full"),
        Column("n for 1 pt", lambda r: f"{needed(r):,}" if needed(r) else "–", needed, "samples to see 1 point"),
        # The distributions behind the answers.
        _plain("KL first", "first_token_kl", 3, "KL(full ‖ pruned) of the first answer token, nats"),
        _plain("JS first", "first_token_js", 3, "Jensen-Shannon of the same"),
        _plain("KL answer", "forced_kl", 3, "KL over the unpruned model's answer, teacher-forced"),
        _plain("JS answer", "forced_js", 3, "Jensen-Shannon of the same"),
        _shift("ΔNLL [95%]", "nll_shift", 2, "increase of the NLL of the unpruned model's own answer, nats per token"),
        # The visual tokens themselves.
        _shift("ΔIPR [95%]", "ipr_shift", 4, "inverse participation ratio of the visual tokens' spectrum"),
        _shift("Δ effective rank", "rank_shift", 2, "effective rank of the visual tokens' spectrum"),
        _plain("energy shift", "energy_shift", 3, "total variation between the energy distributions, 0 to 1"),
    ]
    return _with_figures(columns, summary)


def cost_columns(summary: Summary) -> list[Column]:
    """What enters the language model, and the work and time it takes. Columns without any figure are left out."""
    columns = [
        KEEP,
        SELECTOR,
        TOKENS,
        LAST,
        # By formula: the same on every machine.
        _plain("prompt", "prompt_tokens", 0, "tokens of the prompt that enters the language model, text included"),
        _plain("KV MB", "kv_bytes", 2, "keys and values of the prompt, 10⁶ bytes", 1e-6),
        _plain("tower GF", "tower_flops", 3, "vision tower and projector, 10⁹ operations", 1e-9),
        _plain("selector GF", "selector_flops", 4, "the selector, 10⁹ operations", 1e-9),
        _plain("prefill GF", "prefill_flops", 3, "language model over the prompt, 10⁹ operations", 1e-9),
        _plain("GF per token", "decode_flops", 4, "language model, first decoded token, 10⁹ operations", 1e-9),
        # By the clock.
        _plain("encode ms", "encode_ms", 1, "vision tower and projector"),
        Column("select ms", _selection, lambda r: r["selection_ms"] if r["keep"] else None, "selector and budget"),
        _plain(timed("prefill ms", summary), "prefill_ms", 1, "prompt to first token"),
        _plain(timed("ms per token", summary), "decode_ms", 1, "each token after the first"),
        _plain(timed("peak GB", summary), "peak_bytes", 2, "highest GPU memory, weights included, 10⁹ bytes", 1e-9),
    ]
    return _with_figures(columns, summary)


def _with_figures(columns: Sequence[Column], summary: Summary) -> list[Column]:
    # A run without answers has no accuracy, one on a CPU no peak memory: their columns would be empty.
    return [c for c in columns if any(c.value(row) is not None for row in summary["rows"])]


def _tokens(row: Figures) -> str:
    if row["tokens"] is None:
        return "–"
    # Images differ in their tokens: the share is of what they have on average.
    share = f" ({100 * row['tokens'] / row['full_tokens']:.0f}%)" if row["full_tokens"] else ""
    return f"{row['tokens']:.0f}{share}"


def _share(row: Figures, field: str) -> str:
    """A share in percent with its interval."""
    if row[field] is None:
        return "–"
    low, high = row[f"{field}_interval"]
    return f"{100 * row[field]:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def _accuracy(row: Figures) -> str:
    return _share(row, "accuracy")


def _agreement(row: Figures) -> str:
    return _share(row, "agreement")


def _kept(row: Figures) -> str:
    return _share(row, "evidence")


def _selection(row: Figures) -> str:
    # The references select nothing: their few microseconds are not a figure.
    return _number(row["selection_ms"] if row["keep"] else None, 1)


def _evidence(row: Figures) -> str:
    if row["evidence"] is None:
        return "–"
    text = f"{100 * row['evidence']:.0f}"
    if row["base_evidence"] is not None:  # a model of one view per image has no base view
        text += f" ({100 * row['base_evidence']:.0f})"
    # Samples without boxes have no evidence: a share over a few of them must not look like one over all.
    return text if row["evidence_samples"] == row["samples"] else f"{text} n={row['evidence_samples']}"


def _percent(value: float | int | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}"


def _number(value: float | int | None, digits: int) -> str:
    return "–" if value is None else f"{value:z.{digits}f}"  # z: no minus before a zero
