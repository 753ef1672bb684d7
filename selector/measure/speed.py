"""`selector bench`: what selection costs and what it saves, measured in one run on one machine.

Selection time means scoring plus budget on encoded features. It is compared with the full SVD of the same features (the
primitive that leverage methods are often written with) and with the prefill of the language model, unpruned and
pruned. Ratios carry over to other machines better than milliseconds do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from selector.measure.cost import allocated_cache_bytes, seconds_of
from selector.measure.flops import cache_bytes
from selector.models import encode
from selector.pruning import Pruned, prune_inputs


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one piece of work over `calls` timed calls, and what it left, where that is asked.

    Attributes:
        tokens: visual tokens that reach the language model.
        cache: bytes of keys and values after a prefill: allocated, and by the formula of `selector.measure.flops`.

    Example:
        >>> prefill = Timing("prefill", 412.0, calls=20, tokens=2880)
        >>> selection = Timing("norm", 2.1, calls=20, tokens=720)
        >>> f"{selection.name} takes {100 * selection.milliseconds / prefill.milliseconds:.1f}% of the prefill"
        'norm takes 0.5% of the prefill'
    """

    name: str
    milliseconds: float
    calls: int
    tokens: int | float | None = None
    cache: tuple[int, int] | None = None


@dataclass(frozen=True)
class Bench:
    """Timings of one run: the references, and one timing per selector; `pruned_prefill` is that of the first one.

    Example:
        >>> full, pruned = Timing("prefill", 412.0, 20, 2880), Timing("prefill, keep=0.25", 110.0, 20, 720)
        >>> encode, svd, norm = Timing("encode", 85.0, 20), Timing("svd", 94.0, 20), Timing("norm", 2.0, 20, 720)
        >>> bench = Bench(encode, full, svd, pruned, selectors=(norm,))
        >>> bench.prefill.milliseconds - bench.pruned_prefill.milliseconds - bench.selectors[0].milliseconds  # net gain
        300.0
    """

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
    """Times every selector on one image, and the work around it.

    Args:
        selectors: by name, on the model's device; what they need is encoded once for all of them.
        budget: the same for every selector.
        repeats: timed calls per piece of work, after two untimed ones.

    Raises:
        ValueError: no selectors, repeats below 1, or a model or budget that does not fit the image.
    """
    if not selectors:
        raise ValueError("selectors must name at least one, got none")
    device = model.device
    inputs = prepare(processor, image, "what is in the image?", device)
    needs = frozenset({"features"}).union(*(s.needs for s in selectors.values()))

    def timed(name: str, work: Any) -> Timing:
        with torch.no_grad():
            seconds = seconds_of(work, device, repeats)
        return Timing(name, 1e3 * median(seconds), len(seconds))

    def prefill(name: str, pruned: Pruned) -> Timing:
        def work() -> Any:
            return model(**pruned.inputs, use_cache=True, logits_to_keep=1)

        with torch.no_grad():
            held = allocated_cache_bytes(work().past_key_values)
        formula = cache_bytes(model.config, pruned.inputs["input_ids"].shape[1], model.dtype.itemsize)
        return replace(timed(name, work), tokens=sum(pruned.measured), cache=(held, formula))

    def selection(selector: TokenSelector) -> list[float]:
        """Seconds as the plug itself measures them: selector, budget and merging, without the prompt."""
        runs = [prune_inputs(model, inputs, selector, budget, encoded=encoded) for _ in range(repeats + 2)]
        return [run.selection_seconds for run in runs[2:]]  # two warm-up calls, as in `seconds_of`

    # Everything is encoded and pruned once before any clock starts: a budget that does not fit fails here.
    with torch.no_grad():
        encoded = encode(model, inputs, needs)
        if encoded is None:
            raise ValueError("the image gave no visual tokens")
        whole = prune_inputs(model, inputs, None, encoded=encoded)
        pruned = [prune_inputs(model, inputs, s, budget, encoded=encoded) for s in selectors.values()]
    tokens = encoded.tokens

    # The packed tokens of the image, as spectral methods see them, in the type of the decomposition.
    matrix = Groups.of(tokens, "image").gather(tokens.features.float())
    return Bench(
        encode=timed("vision tower and projector", lambda: encode(model, inputs, needs)),
        prefill=prefill("prefill, every token", whole),
        svd=timed("full SVD of the features", lambda: torch.linalg.svd(matrix, full_matrices=False)),
        pruned_prefill=prefill(f"prefill, keep={budget}", pruned[0]),
        selectors=tuple(
            Timing(name, 1e3 * median(selection(selector)), repeats, sum(cut.measured))
            for (name, selector), cut in zip(selectors.items(), pruned, strict=True)
        ),
    )


def table(bench: Bench, title: str) -> Table:
    """The timings as a table: references first, then selectors.

    Args:
        bench: as `measure` returns it.
        title: shown above, as plain text.

    Returns:
        A row per timing; the net gain of a selector is what the shorter prefill saves minus the selection itself. Of
        the cache of keys and values stands what is allocated after the prefill, beside the formula.
    """
    shown = Table(title=Text(title), title_justify="left", title_style="bold")
    shown.add_column("work")
    headers = ("tokens", "ms", "of the full prefill", "of the full SVD", "net gain ms", "KV MB", "by formula")
    for header in headers:
        shown.add_column(header, justify="right", no_wrap=True)

    # At one budget every selector leaves about as many tokens: one pruned prefill stands for all.
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
            *(["", ""] if timing.cache is None else [f"{each / 1e6:.2f}" for each in timing.cache]),
            end_section=i + 1 == len(references),  # a rule between references and selectors
        )
    return shown
