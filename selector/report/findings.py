"""What a comparison says in words; each sentence is a function of the figures."""

from __future__ import annotations

from selector.report.columns import Figures, selector_name


def sentences(rows: list[Figures]) -> list[str]:
    """What the rows of one task say, as sentences.

    Args:
        rows: figures of one task, see `selector.report.summary.summarize`.

    Returns:
        How good the unpruned model is; the largest silent change; and how many samples one point of accuracy needs.
        Nothing where no question was answered.
    """
    full = next((r for r in rows if r["selector"] == "full" and not r["keep"]), None)
    if full is None or full["accuracy"] is None:
        return []
    blind = next((r for r in rows if r["selector"] == "blind" and not r["keep"]), None)

    # A task that is nearly as good without the image measures nothing: both figures go first.
    low, high = full["accuracy_interval"]
    interval = f"{100 * full['accuracy']:.0f}% [{100 * low:.0f}, {100 * high:.0f}]"
    if "metric" in full:
        line, on = f"Unpruned, the model scores {interval} on {full['samples']} questions", ""
    else:
        line, on = f"Unpruned, the model is right on {interval} of {full['samples']} questions", " on"
    line += (
        f"; without the image{on} {100 * blind['accuracy']:.0f}%." if blind and blind["accuracy"] is not None else "."
    )
    lines = [line]

    # Of the rows as accurate as the unpruned model, the one that changed most answers; at equal change, the one with
    # fewer tokens.
    silent = max(
        (r for r in rows if r["versus_full"] and abs(r["versus_full"]["difference"]) <= 0.02),
        key=lambda r: (1 - r["agreement"], -r["tokens"]),
        default=None,
    )
    if silent is not None and silent["agreement"] < 1:
        flips, gap = silent["flips"], 100 * silent["versus_full"]["difference"]
        lines.append(
            f"Silent change: {selector_name(silent)} at keep {silent['keep']} has the unpruned accuracy to within 2 "
            f"points ({gap:+.0f}), and yet {100 * (1 - silent['agreement']):.0f}% of its answers are others "
            f"({flips['right_to_wrong']} broken, {flips['wrong_to_right']} fixed, "
            f"{flips['wrong_to_wrong']} wrong in other words)."
        )

    # How far the run is from seeing a difference of one point, over its easiest and its hardest row.
    needed = [r["versus_full"]["samples_for_a_point"] for r in rows if r["versus_full"]]
    needed = sorted(n for n in needed if n)
    if needed:
        lines.append(
            f"To see a difference of one point from the unpruned model, these rows would need {needed[0]:,} to "
            f"{needed[-1]:,} samples; there are {full['samples']}."
        )
    return lines
