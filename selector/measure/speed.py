"""`selector bench`: what selection costs beside what it saves, all measured in one run on one machine.

Selection time means scoring plus budget on encoded features. It is set against the full SVD of the same features (the
primitive that leverage methods are often written with) and against the prefill of the language model, unpruned and
pruned. Ratios travel between machines better than milliseconds do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from rich.text import Text

from selector.base import TokenSelector
from selector.budget import Budget
from selector.groups import Groups
from selector.measure.answering import prepare
from selector.measure.cost import seconds_of
from selector.models import encode
from selector.plug import prune_inputs


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one piece of work over `calls` timed calls, and the visual tokens it left."""

    name: str
    milliseconds: float
    calls: int
    tokens: int | None = None


@dataclass(frozen=True)
class Bench:
    """Timings of one run: the references, then one a selector, then the prefill at its budget."""

    encode: Timing
    prefill: Timing
    svd: Timing
    pruned_prefill: Timing
    selectors: tuple[Timing, ...]


def measure(
    model: Any,
    processor: Any,
    selectors: Mapping[str, TokenSelector],
    budget: Budget,
    image: Image.Image,
    repeats: int = 20,
) -> Bench:
    """Times every selector on one image, and what surrounds it.

    Raises:
        ValueError: no selectors, or repeats below 1.
    """
    if not selectors:
        raise ValueError("selectors must name at least one, got none")
    device = model.device
    inputs = prepare(processor, image, "what is in the image?", device)
    needs = frozenset({"features"}).union(*(s.needs for s in selectors.values()))

    def timed(name: str, work: Any, tokens: int | None = None) -> Timing:
        with torch.no_grad():
            seconds = seconds_of(work, device, repeats)
        return Timing(name, 1e3 * median(seconds), len(seconds), tokens)

    def prefill(ready: Mapping[str, Any]) -> Any:
        return model(**ready, use_cache=True, logits_to_keep=1)

    def selection(selector: TokenSelector) -> list[float]:
        """What the plug itself measures: selector, budget, merging."""
        runs = [prune_inputs(model, inputs, selector, budget, encoded=encoded) for _ in range(repeats + 2)]
        return [run.selection_seconds for run in runs[2:]]

    with torch.no_grad():
        encoded = encode(model, inputs, needs)
        if encoded is None:
            raise ValueError("the image gave no visual tokens")
        whole = prune_inputs(model, inputs, None, encoded=encoded)
        pruned = [prune_inputs(model, inputs, s, budget, encoded=encoded) for s in selectors.values()]
    tokens = encoded.tokens
    matrix = Groups.of(tokens, "image").gather(tokens.features.float())
    return Bench(
        encode=timed("vision tower and projector", lambda: encode(model, inputs, needs)),
        prefill=timed("prefill, every token", lambda: prefill(whole.inputs), sum(whole.measured)),
        svd=timed("full SVD of the features", lambda: torch.linalg.svd(matrix, full_matrices=False)),
        pruned_prefill=timed(f"prefill, keep={budget}", lambda: prefill(pruned[0].inputs), sum(pruned[0].measured)),
        selectors=tuple(
            Timing(name, 1e3 * median(selection(selector)), repeats, sum(cut.measured))
            for (name, selector), cut in zip(selectors.items(), pruned, strict=True)
        ),
    )


def table(bench: Bench, title: str) -> Table:
    """References first, then selectors; a net gain is what the shorter prefill saves minus the selection."""
    shown = Table(title=Text(title), title_justify="left", title_style="bold")
    shown.add_column("work")
    for header in ("tokens", "ms", "of the full prefill", "of the full SVD", "net gain ms"):
        shown.add_column(header, justify="right", no_wrap=True)
    references = (bench.encode, bench.prefill, bench.pruned_prefill, bench.svd)
    for i, timing in enumerate((*references, *bench.selectors)):
        saved = bench.prefill.milliseconds - bench.pruned_prefill.milliseconds - timing.milliseconds
        shown.add_row(
            Text(timing.name),
            "" if timing.tokens is None else str(timing.tokens),
            f"{timing.milliseconds:.2f}",
            f"{100 * timing.milliseconds / bench.prefill.milliseconds:.1f}%",
            f"{100 * timing.milliseconds / bench.svd.milliseconds:.1f}%",
            "" if i < len(references) else f"{saved:+.1f}",
            end_section=i + 1 == len(references),
        )
    return shown
