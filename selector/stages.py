"""How many visual tokens each layer of the language model sees: the arithmetic of budgets inside it.

A budget counts visual tokens **averaged over the layers**, so that it means about the same work wherever tokens leave:
with L layers, n tokens before layer K and m from it on, the average is (K·n + (L − K)·m) / L. A method that acts at
layer K therefore keeps fewer tokens behind it than a method that acts before the language model keeps at the same
budget, and below K·n / L there is nothing it could keep. ``count="after"`` counts what stays behind the last stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from selector.base import Count, Stage, TokenSelector
from selector.budget import Budget
from selector.tokens import INSIDE, VisualTokens

PUBLISHED_DEPTH = 32
"""Layers of the language models (Vicuna 7B, Mistral 7B) that published layer numbers are of."""


@dataclass(frozen=True)
class Counts(Budget):
    """A budget that gives every image a number of its own: what a stage passes to its selector.

    Args:
        per_image: visual tokens that stay of each image, newline tokens included.

    Example:
        >>> tokens = VisualTokens.from_features(torch.zeros(2, 4, 1))
        >>> Counts(3, per_image=(1, 3)).counts(tokens).tolist()
        [1, 3]
    """

    per_image: tuple[int, ...] = ()

    @classmethod
    def of(cls, budget: Budget, per_image: Sequence[int]) -> Counts:
        """These numbers, under the scope and the newline policy of `budget`."""
        return cls(max(1, *per_image), budget.scope, budget.newlines, tuple(per_image))

    def counts(self, tokens: VisualTokens) -> Int[Tensor, "I"]:
        """The numbers, or an image's length where that is less."""
        return torch.minimum(tokens.lengths.new_tensor(self.per_image), tokens.lengths)


class UnmetBudget(ValueError):
    """A budget that is spent before the first stage.

    Args:
        message: names method, budget and image.
        least: the smallest `keep`, in tokens, that this image could meet.

    Example:
        >>> try:  # two of four layers see all 100 tokens
        ...     planned_counts("fastv", 100, 16, 4, [Stage(2, 1.0, None)], "average")
        ... except UnmetBudget as error:
        ...     error.least
        51
    """

    def __init__(self, message: str, least: int):
        super().__init__(message)
        self.least = least


def scaled_layer(published: int, depth: int, of: int = PUBLISHED_DEPTH) -> int:
    """The layer that lies as deep in this model as a published one in a model of `of` layers.

    Returns:
        ``round(published / of · depth)``, halves up, but at least 1 and at most ``depth - 1``.

    Raises:
        ValueError: a language model of a single layer, which has no inside.

    >>> scaled_layer(2, 32), scaled_layer(2, 28), scaled_layer(16, 28), scaled_layer(2, 4)
    (2, 2, 14, 1)
    """
    if depth < 2:
        raise ValueError(f"a language model of {depth} layer has no layer between its first and its last")
    return min(max(1, (2 * published * depth + of) // (2 * of)), depth - 1)


def steps_at(layers: Sequence[int], shares: Sequence[float], selector: TokenSelector) -> list[Stage]:
    """Stages of one selector; of steps that fall together in a shallow model, the last is left.

    >>> from selector import FastV
    >>> [(stage.layer, stage.share) for stage in steps_at([1, 1, 2], [0.5, 0.2, 0.1], FastV())]
    [(1, 0.2), (2, 0.1)]
    """
    last = dict(zip(layers, shares, strict=True))
    return [Stage(layer, share, selector) for layer, share in sorted(last.items())]


def check_layer(layer: object) -> None:
    """Raises ValueError unless `layer` may be the argument of a method that acts inside the language model."""
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 1):
        raise ValueError(f"layer must be an int >= 1, the first decoder layer that sees fewer tokens, got {layer!r}")


def check_count(count: str) -> None:
    """Raises ValueError unless `count` is one of `Count`."""
    if count not in ("average", "after"):
        raise ValueError(f"count must be 'average' (over the layers) or 'after' (the last stage), got {count!r}")


def checked_stages(selector: TokenSelector, depth: int) -> list[Stage]:
    """The stages of a selector in a model of `depth` layers.

    Raises:
        ValueError: layers out of range or not rising, or shares that rise; naming selector and stages.
    """
    stages = selector.stages(depth)
    name, layers, shares = type(selector).__name__, [each.layer for each in stages], [each.share for each in stages]
    if not stages or layers != sorted(set(layers)) or layers[0] < 0:
        raise ValueError(f"{name}: stages must have rising layers, got {layers}")
    if layers[-1] >= depth:
        raise ValueError(f"{name}: layer must be below {depth}, the number of decoder layers, got {layers[-1]}")
    if shares != sorted(shares, reverse=True) or not 0 <= shares[-1] <= shares[0] <= 1:
        raise ValueError(f"{name}: shares of stages must fall and lie in [0, 1], got {shares}")
    return stages


def planned_counts(name: str, length: int, keep: int, depth: int, stages: Sequence[Stage], count: Count) -> list[int]:
    """Visual tokens of an image that stay at each stage.

    Args:
        name: of the method, for errors.
        length: visual tokens of the image.
        keep: what the budget grants; `length` or more keeps all at every stage.
        depth, stages: see `checked_stages`.
        count: what `keep` counts.

    Returns:
        Falling counts, in the proportions of the shares and at least 1 where a share is not 0. With ``"average"``
        the largest ones whose average over the layers is at most `keep`; with ``"after"`` the last one is `keep`.

    Raises:
        UnmetBudget: a `keep` that no counts can meet, with the smallest that could be met.
        ValueError: ``"after"`` where nothing stays.

    Example:
        >>> stages = [Stage(2, 1.0, None)]  # of 4 layers, two see all of 100 tokens: 50 on average
        >>> planned_counts("fastv", 100, 60, 4, stages, "average"), planned_counts("fastv", 100, 60, 4, stages, "after")
        ([20], [60])
    """
    if keep >= length:
        return [length] * len(stages)

    def counts(largest: int) -> list[int]:
        # The first stage keeps `largest`, the others in proportion, halves up; with all shares 0 it has no effect.
        top = stages[0].share or 1.0
        return [min(length, max(int(s.share > 0), int(largest * s.share / top + 0.5))) for s in stages]

    if count == "after":
        if stages[-1].share == 0:
            raise ValueError(f"{name}: count must be 'average', nothing stays after layer {stages[-1].layer}")
        return [min(length, int(keep * stage.share / stages[-1].share + 0.5)) for stage in stages]

    # The sum over the layers only grows with the largest count: bisection, in whole tokens.
    if layer_sum(length, counts(1), depth, stages) > keep * depth:
        _refuse(name, length, keep, depth, stages, layer_sum(length, counts(1), depth, stages))
    low, high = 1, length
    while low < high:
        middle = (low + high + 1) // 2
        fits = layer_sum(length, counts(middle), depth, stages) <= keep * depth
        low, high = (middle, high) if fits else (low, middle - 1)
    return counts(low)


def per_layer(length: int, counts: Sequence[int], depth: int, stages: Sequence[Stage]) -> list[int]:
    """Visual tokens that each layer sees: all of `length` in front of the first stage.

    >>> per_layer(100, [20], 4, [Stage(1, 1.0, None)])
    [100, 20, 20, 20]
    """
    tokens = [length] * depth
    for stage, kept in zip(stages, counts, strict=True):
        tokens[stage.layer :] = [kept] * (depth - stage.layer)
    return tokens


def layer_sum(length: int, counts: Sequence[int], depth: int, stages: Sequence[Stage]) -> int:
    """Visual tokens summed over the layers."""
    return sum(per_layer(length, counts, depth, stages))


def _refuse(name: str, length: int, keep: int, depth: int, stages: Sequence[Stage], least: int) -> None:
    """Raises the error of a budget that is spent before the first stage."""
    raise UnmetBudget(
        f"keep={keep} is below what {name} can reach: its first stage is layer {stages[0].layer} of {depth}, so an "
        f"image of {length} visual tokens has at least {least / depth:.4g} on average over the layers; give keep >= "
        f"{-(-least // depth)}, count=after to count the tokens behind the last stage, or cut before the language "
        "model as well (stages:before=...)",
        -(-least // depth),
    )


def mean_tokens(layers: Sequence[int]) -> int | float:
    """The average over the layers, as an int where it is one."""
    total = sum(layers)
    return total // len(layers) if total % len(layers) == 0 else total / len(layers)


def outside_needs(stages: Sequence[Stage]) -> frozenset[str]:
    """What the stages read that the vision tower gives.

    Raises:
        ValueError: a stage before the language model that reads what is inside it, by name.
    """
    for stage in stages:
        wrong = stage.selector.needs & INSIDE
        if stage.layer == 0 and wrong:
            raise ValueError(
                f"{type(stage.selector).__name__} reads {', '.join(sorted(wrong))} inside the language model, and acts "
                "before it here"
            )
    return frozenset().union(*(stage.selector.needs for stage in stages)) - INSIDE
