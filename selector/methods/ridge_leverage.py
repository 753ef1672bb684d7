"""Ridge leverage scores: leverage with a soft cut in place of a truncation rank.

Alaoui and Mahoney 2015 (arXiv 1411.0306) introduced them for sampling columns in kernel ridge regression. Ranking
visual tokens by them is our choice, as are the defaults: projected tokens, centred, alpha 1, one matrix per image.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from selector.base import ScoreSelector
from selector.budget import Scope
from selector.groups import Groups
from selector.ridge import ridge_leverage_scores
from selector.spectrum import check_method, check_seed
from selector.tokens import VisualTokens

Field = Literal["projected", "features"]


class RidgeLeverage(ScoreSelector):
    """Ridge leverage scores x (XᵀX + λI)⁻¹ xᵀ of the projected visual tokens of each image.

    Args:
        alpha: λ as a multiple of the mean diagonal of XᵀX, ‖X‖² / D; above 0. The larger, the more the long tokens
            count; towards 0 every direction of the tokens counts alike.
        field: the tokens that make the matrix X: ``"projected"``, as the language model receives them, or
            ``"features"`` of the encoder.
        center: subtract the mean token first.
        matrix: ``"image"`` takes all packed tokens of an image as one matrix, ``"tile"`` each tile by itself.
        method: ``"exact"``, or ``"fast"``: 192 leading directions from a seeded start, the others as one.

    Example:
        >>> import torch
        >>> from selector import Budget, RidgeLeverage, VisualTokens
        >>> rows = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])  # three alike, and one that is not
        >>> RidgeLeverage()(VisualTokens.from_features(rows, projected=rows), Budget(1)).tolist()
        [[False, False, False, True]]
    """

    paper = "baseline (Alaoui & Mahoney 2015)"
    cost = "N D min(N, D)"
    needs = frozenset({"projected"})

    def __init__(
        self,
        alpha: float = 1.0,
        field: Field = "projected",
        center: bool = True,
        matrix: Scope = "image",
        method: str = "exact",
        seed: int = 0,
    ):
        super().__init__()
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"alpha must be finite and above 0, got {alpha}")
        if field not in get_args(Field):
            raise ValueError(f"field must be 'projected' or 'features', got {field!r}")
        if matrix not in get_args(Scope):
            raise ValueError(f"matrix must be 'image' or 'tile', got {matrix!r}")
        check_method(method)
        check_seed(seed)

        # Every argument under its own name: a checkpoint is rebuilt from them.
        self.alpha, self.center, self.method, self.seed = alpha, center, method, seed
        self.field: Field = field
        self.matrix: Scope = matrix
        self.needs = frozenset({field})

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """Ridge leverage in [0, 1)."""
        groups = Groups.of(tokens, self.matrix)
        scores = ridge_leverage_scores(
            groups.gather(tokens.read(self.field, self)),
            alpha=self.alpha,
            center=self.center,
            mask=groups.mask,
            method=self.method,
            seed=self.seed,
            overwrite=True,  # `gather` has copied
        )
        return groups.scatter(scores, tokens)
