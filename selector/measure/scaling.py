"""`selector bench --geometry`: what selection costs at a model's real sizes, and how that grows with tiles and tokens.

Every selector gets the same tensors, those of one picture through a vision tower of that size with random weights, and
everything is measured in one run: ratios carry over to other machines, milliseconds do not. What is timed is scoring,
budget and merging, as in `selector.plug`. Growth is with the number of tiles at the smallest budget, and with the
budget at all tiles; fewer tiles are the first ones of the same image.

`measure` returns plain data, see `selector.report.bench`, which makes the table and the picture of it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor

from selector.base import TokenSelector
from selector.budget import Budget, Newlines, Scope
from selector.errors import UsageError
from selector.images import open_image
from selector.measure.consistency import spectrum
from selector.measure.cost import allocated_cache_bytes, peak_bytes, processor_time, seconds_of
from selector.measure.flops import cache_bytes, counted_flops, language_flops
from selector.measure.geometry import Geometry, build, find_geometry, natural_picture, pixels, prompt
from selector.models import Encoded, encode
from selector.pruning import prune_inputs
from selector.registry import available_selectors, load_selector
from selector.tokens import NEWLINE, VisualTokens

TEXT_TOKENS = 32
"""Words of the prompt beside the image, half before and half behind it."""
REFERENCE = "uniform"
"""Selects for the prefill of fewer tokens, whose time does not depend on which tokens they are."""

LEARNED = {
    "gumbel": {"width": 320, "layers": 3, "heads": 5},
    "image-transformer": {"width": 256, "layers": 2, "heads": 4, "inputs": "projected"},
    "image-transformer-question": {"width": 256, "layers": 2, "heads": 4, "inputs": "projected", "match_rank": 64},
}
"""Learned selectors, which are built with random weights for the geometry: by label, arguments of their classes. Three
layers are those of When Less is Enough, which leaves width and heads open: `gumbel` has those of the recipe for
LLaVA-NeXT (``configs/train/llava-next.yaml``); the others have the depth of the shipped ones, and pool as their classes
do; words and patches are matched by a map of low rank, since a full one would be most of the cost at this width."""
SPECS = {
    "cdpruner": ("cdpruner", "cdpruner:relevance=received_attention", "cdpruner:relevance=none"),
    "hiprune": ("hiprune", "hiprune:layer=1"),
    "inside": ("inside:selector=norm,layer=1",),
    "merge": ("svd-prune:merge=nearest",),
    "mix": ("mix:a=svd-prune,b=norm",),
    "stages": ("stages:before=norm,inside=fastv",),
}
"""Specs of methods that need arguments, or others where a model cannot give what they read: the first that it can."""

Say = Callable[[str], None]


def known_selectors() -> list[str]:
    """Every shipped method, and the learned ones with random weights, by name.

    Example:
        >>> {"svd-prune", "gumbel"} <= set(known_selectors())
        True
    """
    return list(dict.fromkeys([*available_selectors(), *LEARNED]))


def measure(
    geometry: str,
    selectors: Mapping[str, TokenSelector | None] | Sequence[str] = (),
    keeps: Sequence[int] = (64, 160, 320, 640),
    tiles: Sequence[int] = (),
    *,
    layers: int = 0,
    repeats: int = 5,
    scope: Scope = "image",
    newlines: Newlines = "kept_rows",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    picture: Path | None = None,
    seed: int = 0,
    command: str = "",
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Times every selector on one image of a model of that size, and the model around it.

    Args:
        geometry: a name of `selector.measure.geometry.GEOMETRIES`.
        selectors: by label on that device, None for a label that is a name of `known_selectors`; or such names; by
            default all of them.
        keeps: counts of visual tokens that stay.
        tiles: of the image, for the growth; by default all numbers that it has.
        layers: decoder layers to build and time; with 0 the language model enters by its operations alone.
        repeats: timed calls per figure, after one that is counted and not timed.
        scope, newlines: of every budget, see `Budget`.
        dtype: of the model, and so of its tokens.
        attention: as ``attn_implementation`` of transformers.
        picture: an image file; by default `natural_picture`.
        seed: of weights and of that picture.
        command: noted in the result.
        say: is told what is being measured.

    Returns:
        The result as data that JSON can hold. `cells` has a row per selector, number of tiles and budget; operations of
        selectors are matrix products and decompositions; a selector that the model cannot serve stands in `skipped`.

    Raises:
        UsageError: an unknown geometry or selector, tiles that the image does not have, a budget of more tokens than
            there are, or a number of layers that the model does not have.
    """
    sizes, device = find_geometry(geometry), torch.device(device)
    tiles = sorted(tiles or range(1, sizes.tiles + 1))
    for number in tiles:
        if not 1 <= number <= sizes.tiles:
            raise UsageError(f"tiles must be in 1..{sizes.tiles} for {geometry}, got {number}")
    if repeats < 1:
        raise UsageError(f"repeats must be >= 1, got {repeats}")

    # The tower, and the picture as it comes out of it.
    say(f"{geometry}: vision tower and projector")
    model = build(sizes, layers, seed=seed, device=device, dtype=dtype, attention=attention)
    image = natural_picture(*sizes.size, seed) if picture is None else open_image(picture)
    with torch.no_grad():
        inputs = pixels(sizes, image, device, dtype)
        tower_flops, encoded = _counted(lambda: _encoded(model, inputs, {"features", "projected"}))

        # Every budget at all tiles, the smallest at each number of them; checked before anything is timed.
        places = list(dict.fromkeys([(sizes.tiles, keep) for keep in keeps] + [(n, min(keeps)) for n in tiles]))
        for number, keep in places:
            most = len(first_tiles(encoded, number).packed[0])
            if not 1 <= keep <= most:
                raise UsageError(f"keep must be in 1..{most}, the visual tokens of {number} tiles, got {keep}")
        tower, projector = _encoder_seconds(model, inputs, repeats, device)

        # Selectors, each with what it reads; the prompt is there for those that read the question.
        inputs |= prompt(model, len(encoded.packed[0]), TEXT_TOKENS)
        chosen, skipped = _choose(selectors, model, inputs, encoded.tokens)
        needs = {"features", "projected"}.union(*(each.needs for each in chosen.values()))
        encoded = _encoded(model, inputs, needs)

        views = {number: first_tiles(encoded, number) for number in sorted({*tiles, sizes.tiles})}
        budgets = {keep: Budget(keep, scope, newlines) for keep in keeps}
        prefill = _prefill(sizes, model, inputs, encoded, budgets, layers, repeats, say)

        cells: list[dict[str, Any]] = []
        for label, selector in list(chosen.items()):
            say(f"{geometry}: {label}")
            try:
                for number, keep in places:
                    row = _cell(selector, views[number], budgets[keep], repeats, device)
                    cells.append({"selector": label, "tiles": number, "keep": keep} | row)
            except ValueError as error:  # that it has no answer here is a finding, and the others go on
                skipped[label] = " ".join(str(error).split())
                cells = [cell for cell in cells if cell["selector"] != label]
                del chosen[label]
    _check_any(chosen, skipped)

    given = dict(selectors) if isinstance(selectors, Mapping) else {}
    untrained = {label for label in LEARNED if given.get(label) is None}
    return {
        "geometry": geometry,
        "command": command,
        "machine": _machine(device) | {"dtype": str(dtype).removeprefix("torch.")},
        "repeats": repeats,
        "scope": scope,
        "newlines": newlines,
        "picture": f"1/f noise, seed {seed}" if picture is None else picture.name,
        "seed": seed,
        "patches": encoded.tokens.features.shape[1],
        "tokens": {str(number): len(view.packed[0]) for number, view in views.items()},
        "spectrum": {name: _energy(encoded.tokens, name) for name in ("features", "projected")},
        "encoder": {"tiles": sizes.tiles, "tower_ms": tower, "projector_ms": projector, "flops": tower_flops},
        "prefill": prefill,
        "selectors": [
            {"selector": label, "parameters": sum(weight.numel() for weight in selector.parameters())}
            | {"weights": "random" if label in untrained else None}
            for label, selector in chosen.items()
        ],
        "skipped": [{"selector": label, "reason": reason} for label, reason in skipped.items()],
        "cells": cells,
    }


def first_tiles(encoded: Encoded, count: int) -> Encoded:
    """An image cut down to its first tiles, the base view among them, with the newlines of rows that are still there.

    Args:
        encoded: a single image.
        count: at least 1.
    """
    tokens = encoded.tokens
    if count == len(tokens.features):
        return encoded

    # Tiles of an image are numbered one behind the other, so that the numbers in slots stay what they are.
    patch = (tokens.slots >= 0) & (tokens.slots < count * tokens.features.shape[1])
    rows = tokens.rows[patch].unique()
    stays = patch | ((tokens.slots == NEWLINE) & torch.isin(tokens.rows, rows[rows >= 0]))

    # Whatever has a row per tile; the question belongs to the image.
    per_tile = ("features", "image", "projected", "cls_attention", "received_attention", "keys", "text")
    fields = {name: getattr(tokens, name) for name in per_tile}
    cut = {name: value[:count].clone() for name, value in fields.items() if value is not None}
    layers = {name: value[:count].clone() for name, value in tokens.layers.items()}
    short = replace(tokens, slots=tokens.slots[stays][None], layers=layers, **cut)
    return replace(encoded, tokens=short, packed=[encoded.packed[0][stays[0]]])


def _cell(selector: TokenSelector, view: Encoded, budget: Budget, repeats: int, device: torch.device) -> dict[str, Any]:
    """What one selection takes: kept tokens, milliseconds, operations, memory."""

    def work() -> Tensor:
        selection = selector.select(view.tokens, budget)
        if selection.flow is not None:  # kept tokens take dropped ones in
            selection.flow.apply(view.packed)
        return selection.keep

    # One call is counted: its operations, its memory, what it keeps. It warms up, too; a clock would show the counter.
    flops: list[int] = []
    kept: list[Tensor] = []
    peak = peak_bytes(lambda: flops.append(counted_flops(lambda: kept.append(work()))), device)
    seconds = seconds_of(work, device, repeats, warmup=0, clock=lambda: processor_time(device))
    return {"kept": int(kept[0].sum()), "ms": 1e3 * median(seconds), "flops": flops[0], "peak_bytes": peak}


def _encoded(model: Any, inputs: Mapping[str, Any], needs: set[str]) -> Encoded:
    """The image through the tower; there is one."""
    encoded = encode(model, inputs, needs)
    assert encoded is not None
    return encoded


def _counted(work: Callable[[], Encoded]) -> tuple[int, Encoded]:
    outcome: list[Encoded] = []
    flops = counted_flops(lambda: outcome.append(work()))
    return flops, outcome[0]


def _encoder_seconds(
    model: Any, inputs: Mapping[str, Tensor], repeats: int, device: torch.device
) -> tuple[float, float | None]:
    """Milliseconds of the vision tower and of the projector behind it, None where the tower has one inside."""
    parts = [_tower(model), getattr(model.base_model, "multi_modal_projector", None)]
    spent = [0.0 for _ in parts]

    def stopwatch(place: int, sign: int) -> Callable[..., None]:
        def note(*_: Any) -> None:
            spent[place] += sign * processor_time(device)

        return note

    # Where the model itself calls them: a clock is started before each and stopped behind it.
    handles = []
    for place, part in enumerate(parts):
        if part is not None:
            handles.append(part.register_forward_pre_hook(stopwatch(place, -1)))
            handles.append(part.register_forward_hook(stopwatch(place, 1)))

    runs = []
    try:
        for _ in range(repeats):
            spent[:] = [0.0 for _ in parts]
            _encoded(model, inputs, {"features", "projected"})
            runs.append(list(spent))
    finally:
        for handle in handles:
            handle.remove()
    tower, projector = (1e3 * median(times) for times in zip(*runs, strict=True))
    return tower, None if parts[1] is None else projector


def _tower(model: Any) -> torch.nn.Module:
    base = model.base_model
    return base.vision_tower if hasattr(base, "vision_tower") else base.visual


def _choose(
    selectors: Mapping[str, TokenSelector | None] | Sequence[str],
    model: Any,
    inputs: Mapping[str, Any],
    tokens: VisualTokens,
) -> tuple[dict[str, TokenSelector], dict[str, str]]:
    """(selectors by label, reasons by label of those that this model cannot serve)."""
    chosen: dict[str, TokenSelector] = {}
    skipped: dict[str, str] = {}
    given = dict(selectors) if isinstance(selectors, Mapping) else dict.fromkeys(selectors)
    given = given or dict.fromkeys(known_selectors())
    for name, selector in given.items():
        reasons = []
        for label, candidate in _candidates(name, selector, tokens):
            reason = _refusal(model, inputs, candidate)
            if reason is None:
                chosen[label] = candidate.to(model.device).eval()
                break
            reasons.append(reason)
        else:
            skipped[name] = reasons[-1]

    _check_any(chosen, skipped)
    return chosen, skipped


def _check_any(chosen: Mapping[str, TokenSelector], skipped: Mapping[str, str]) -> None:
    if not chosen:
        raise UsageError("selectors must hold one that this geometry can serve: " + "; ".join(skipped.values()))


def _candidates(name: str, selector: TokenSelector | None, tokens: VisualTokens) -> Iterator[tuple[str, TokenSelector]]:
    """A selector under its label; for a bare name in every form in which a model may be able to serve it."""
    if selector is not None:
        yield name, selector
    elif name in LEARNED:
        yield name, _untrained(name, tokens)
    elif name not in available_selectors():
        raise UsageError(f"selectors must be among {', '.join(known_selectors())}, got {name!r}")
    else:
        # Without a CLS token, most methods take the attention that a patch receives.
        takes = "attention" in signature(available_selectors()[name]).parameters
        specs = SPECS.get(name, (name, f"{name}:attention=received") if takes else (name,))
        for spec in specs:
            yield spec, load_selector(spec)


def _untrained(name: str, tokens: VisualTokens) -> TokenSelector:
    """A learned selector of the published size with random weights, for tokens of these widths."""
    assert tokens.projected is not None
    settings: dict[str, Any] = dict(LEARNED[name])
    language = tokens.projected.shape[-1]
    settings["dim"] = language if settings.get("inputs") == "projected" else tokens.features.shape[-1]
    if name == "gumbel":
        settings["num_patches"] = tokens.features.shape[1]
    if name.endswith("-question"):
        settings["question_dim"] = language
        settings["match_rank"] = min(settings["match_rank"], language)  # tiny models are narrower

    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
        torch.manual_seed(0)
        return available_selectors()[name.removesuffix("-question")](**settings)


def _refusal(model: Any, inputs: Mapping[str, Any], selector: TokenSelector) -> str | None:
    """Why this model cannot give what a selector reads; None if it can."""
    if selector.acts != "before":
        return f"{type(selector).__name__} acts inside the language model, of which no whole one is built"
    try:
        with _stopped(_tower(model)):
            encode(model, inputs, selector.needs)
    except _Stop:
        return None
    except ValueError as error:
        return " ".join(str(error).split())
    return None


class _Stop(Exception):
    """The tower was about to run."""


@contextmanager
def _stopped(tower: torch.nn.Module) -> Iterator[None]:
    """Within the block the tower raises `_Stop`: adapters refuse needs before it, and an encoding takes long."""

    def stop(*_: Any) -> None:
        raise _Stop

    handle = tower.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def _prefill(
    sizes: Geometry,
    model: Any,
    inputs: Mapping[str, Any],
    encoded: Encoded,
    budgets: Mapping[int, Budget],
    layers: int,
    repeats: int,
    say: Say,
) -> dict[str, Any]:
    """The language model's prefill with every token and under each budget: operations, with `layers` time and cache.

    Time is that of the layers that were built, scaled to all of them; the cache is what these layers allocate, and
    stands beside the formula for as many.
    """
    whole, small = sizes.config(), model.config
    total, element = whole.get_text_config().num_hidden_layers, model.dtype.itemsize
    rows = []
    for keep in (None, *budgets):
        say(f"prefill, {'every token' if keep is None else f'keep={keep}'}")
        selector = None if keep is None else load_selector(REFERENCE).to(model.device)
        budget = None if keep is None else budgets[keep]
        pruned = prune_inputs(model, inputs, selector, budget, encoded=encoded)
        length = pruned.inputs["input_ids"].shape[1]

        row = {"keep": keep, "tokens": length, "flops": language_flops(whole, length, length)}
        row["kv_bytes_formula"] = cache_bytes(whole, length, element)
        if layers:
            row |= _timed_prefill(model, pruned.inputs, total / layers, repeats)
            row["kv_bytes_formula_built"] = cache_bytes(small, length, element)
        rows.append(row)
    return {"layers": total, "layers_built": layers, "text_tokens": TEXT_TOKENS, "rows": rows}


def _timed_prefill(model: Any, inputs: Mapping[str, Any], scale: float, repeats: int) -> dict[str, Any]:
    """Milliseconds of a prefill, scaled to all layers, and the bytes of its cache in the layers that are there."""

    def work() -> Any:
        # The encoder's output is read and never written, outside of beam search.
        return model(**inputs, use_cache=True, logits_to_keep=1)

    held = allocated_cache_bytes(work().past_key_values)
    seconds = seconds_of(work, model.device, repeats, warmup=0, clock=lambda: processor_time(model.device))
    return {"ms": 1e3 * median(seconds) * scale, "kv_bytes_built": held}


def _energy(tokens: VisualTokens, name: str) -> dict[str, Any]:
    """How fast the spectrum of a field falls: directions that hold half and 90% of its energy, and of how many.

    About the mean token, since selectors subtract it before they decompose.
    """
    table = getattr(tokens, name)[tokens.valid].float()
    shares = spectrum(table - table.mean(0)).shares.cumsum(0)
    half, most = (int((shares < share).sum()) + 1 for share in (0.5, 0.9))
    return {"half": half, "most": most, "directions": min(table.shape)}


def _machine(device: torch.device) -> dict[str, Any]:
    """What ran: the processor's name, the clock, threads, versions."""
    gpu = device.type == "cuda"
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        "clock": "wall time, device synchronised" if gpu else "CPU time of the process",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    """The processor's name as Linux has it, elsewhere as Python does."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()
