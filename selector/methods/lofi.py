"""LoFi (arXiv 2503.06794, "Silent Hazards of Token Reduction"): leverage scores of the model's internal representation.

Known from the abstracts: training-free, low-rank SVD of the model's internal representations, pruning by the leverage
score. No text available to us fixes the layer, the rank or centring. Here the internal representation is the projected
visual tokens as the language model receives them, where SVD-Prune takes the encoder's features.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from selector.base import ScoreSelector
from selector.groups import Groups
from selector.spectrum import check_rank, check_seed, leverage_scores
from selector.tokens import VisualTokens


class LoFi(ScoreSelector):
    """Leverage scores of the projected visual tokens of each image.

    Args:
        energy: share of the variance that the truncation keeps, in (0, 1]; ignored when `rank` is given.
        rank: fixed truncation rank.
        center: subtract the mean token first.
        method: ``"exact"`` or, with a small `rank`, ``"fast"``, see `selector.spectrum`; `seed` is that of its start.

    Example:
        >>> import torch
        >>> from selector import Budget, LoFi, VisualTokens
        >>> rows = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])  # three alike, and one that is not
        >>> LoFi()(VisualTokens.from_features(rows, projected=rows), Budget(1)).tolist()
        [[False, False, False, True]]
    """

    paper = "Silent Hazards, arXiv 2503.06794"
    cost = "N D min(N, D)"
    needs = frozenset({"projected"})

    def __init__(
        self,
        energy: float = 0.9,
        rank: int | None = None,
        center: bool = True,
        method: str = "exact",
        seed: int = 0,
    ):
        super().__init__()
        check_rank(rank, energy if rank is None else None, method)
        check_seed(seed)
        self.energy, self.rank, self.center, self.seed = energy, rank, center, seed
        self.method = method

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """Leverage in [0, 1], of each token in the matrix of its image; a token's score depends on all others."""
        groups = Groups.of(tokens, "image")
        leverage = leverage_scores(
            groups.gather(tokens.read("projected", self)),
            rank=self.rank,
            energy=None if self.rank is not None else self.energy,  # the two ways to truncate exclude each other
            center=self.center,
            mask=groups.mask,
            method=self.method,
            seed=self.seed,
            overwrite=True,  # `gather` has copied
        )
        return groups.scatter(leverage.scores, tokens)
