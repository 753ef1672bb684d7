"""What a learned selector reads: one normalised table of the encoder's features, the projected tokens, or both.

Which of them is a constructor argument and so part of a checkpoint; what an adapter has to compute (`needs`) follows.

Shapes: T tiles, N patches per tile, C channels of the table, W width of what reads it.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selector.base import ScoreSelector
from selector.tokens import VisualTokens

Inputs = Literal["features", "projected", "both"]
FIELDS: dict[str, tuple[str, ...]] = {
    "features": ("features",),
    "projected": ("projected",),
    "both": ("features", "projected"),
}


def check_sizes(least: int, **sizes: int) -> None:
    """Refuses constructor arguments below `least`.

    Raises:
        ValueError: names the first such argument.
    """
    for name, size in sizes.items():
        if size < least:
            raise ValueError(f"{name} must be >= {least}, got {size}")


def check_mlp_ratio(mlp_ratio: float, width: int) -> None:
    """Refuses a ratio that gives the MLP of a layer of this width no channel, or endlessly many.

    Raises:
        ValueError: names the ratio; NaN is refused too.
    """
    if not 1 <= width * mlp_ratio < math.inf:
        raise ValueError(f"mlp_ratio must give at least 1 channel of {width} and be finite, got {mlp_ratio}")


class TableSelector(ScoreSelector):
    """A learned selector that ranks tokens by a table of what the model computed for them.

    Args:
        dim: C, channels of the table; of both, the encoder's and the projected ones side by side.
        inputs: ``"features"`` (the encoder's), ``"projected"`` (as the language model sees them) or ``"both"``.

    Attributes:
        feature_mean, feature_std: ``[C]`` statistics of the training set, by which the table is normalised.

    Example:
        >>> class Linear(TableSelector):
        ...     def score(self, tokens):
        ...         return self.table(tokens).mean(-1)
        >>> tokens = VisualTokens.from_features(torch.zeros(1, 4, 3), projected=torch.ones(1, 4, 5))
        >>> selector = Linear(dim=8, inputs="both")
        >>> sorted(selector.needs), list(selector.table(tokens).shape)
        (['features', 'projected'], [1, 4, 8])
    """

    learned = True

    def __init__(self, dim: int, inputs: Inputs = "features"):
        super().__init__()
        if inputs not in FIELDS:
            raise ValueError(f"inputs must be one of {get_args(Inputs)}, got {inputs!r}")

        # `needs` follows from the arguments, so a checkpoint asks an adapter for what it was trained on.
        self.dim = dim
        self.inputs: Inputs = inputs
        self.needs = frozenset(FIELDS[inputs])

        # Buffers: stored with the weights, moved with the module, trained by nobody.
        self.feature_mean: Tensor
        self.feature_std: Tensor
        self.register_buffer("feature_mean", torch.zeros(dim))
        self.register_buffer("feature_std", torch.ones(dim))

    def table(self, tokens: VisualTokens) -> Float[Tensor, "T N C"]:
        """The inputs of every token, each channel in units of the training set's spread.

        Raises:
            ValueError: a field is missing or not finite, or the table's width is another than `dim`.
        """
        return (self.raw_table(tokens) - self.feature_mean) / self.feature_std

    def raw_table(self, tokens: VisualTokens) -> Float[Tensor, "T N C"]:
        """The inputs of every token as the model computed them, for `embedded` or for statistics of a training set.

        Raises:
            ValueError: as `table`.
        """
        columns = [tokens.read(name, self) for name in FIELDS[self.inputs]]
        table = columns[0] if len(columns) == 1 else torch.cat(columns, -1)
        if table.shape[-1] != self.dim:
            raise ValueError(f"the selector reads {self.inputs} of width {self.dim}, got width {table.shape[-1]}")
        return table.to(self.feature_mean.dtype)

    def embedded(self, table: Float[Tensor, "T N C"], embed: nn.Linear) -> Float[Tensor, "T N W"]:
        """``embed`` of the normalised table, computed from the raw one without a normalised copy of it.

        Args:
            table: raw, see `raw_table`.
            embed: linear layer on the normalised table.
        """
        # W ((x - m) / s) + b = (W / s) x + (b - (W / s) m). In full precision even under autocast, since the mean of a
        # raw channel may be far larger than its spread, and the two terms cancel.
        with torch.autocast(table.device.type, enabled=False):
            weight = embed.weight / self.feature_std
            return F.linear(table, weight, embed.bias - weight @ self.feature_mean)
