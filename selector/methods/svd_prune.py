"""SVD-Prune (arXiv 2604.11530): rank tokens by their leverage in the truncated SVD of the encoder's features.

Known from the paper: SVD of the vision-token feature matrix; tokens by statistical leverage; truncation keeps a target
share of the variance; an adaptive variant keeps the smallest set whose cumulative leverage reaches a target (here:
``Budget("energy:0.9")``). No text available to us fixes centring, the share, row normalisation and, with several tiles
per image, whether a tile or the image is the matrix, hence arguments. Our defaults: centred, 0.9, no row normalisation,
and one matrix per image, so that the scores of all its tiles are comparable.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from selector.base import ScoreSelector
from selector.groups import Groups
from selector.spectrum import check_rank, check_seed, leverage_scores
from selector.tokens import VisualTokens


class SVDPrune(ScoreSelector):
    """Leverage scores of encoder features.

    Args:
        energy: share of the variance that the truncation keeps, in (0, 1]; ignored when `rank` is given.
        rank: fixed truncation rank.
        center: subtract the mean token first. Uncentred, a strong common mean hides everything else.
        normalize_rows: unit-length tokens after centring, against outlier ("register-like") tokens.
        matrix: ``"image"`` takes all packed tokens of an image as one matrix, ``"tile"`` each tile by itself.
        method: ``"exact"`` or, with a small `rank`, ``"fast"``, see `selector.spectrum`; `seed` is that of its start.

    Example:
        >>> import torch
        >>> from selector import Budget, SVDPrune, VisualTokens
        >>> rows = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])  # three alike, and one that is not
        >>> SVDPrune()(VisualTokens.from_features(rows), Budget(1)).tolist()
        [[False, False, False, True]]
    """

    paper = "arXiv 2604.11530"
    cost = "N D min(N, D)"

    def __init__(
        self,
        energy: float = 0.9,
        rank: int | None = None,
        center: bool = True,
        normalize_rows: bool = False,
        matrix: Literal["image", "tile"] = "image",
        method: str = "exact",
        seed: int = 0,
    ):
        super().__init__()
        if matrix not in ("image", "tile"):
            raise ValueError(f"matrix must be 'image' or 'tile', got {matrix!r}")
        check_rank(rank, energy if rank is None else None, method)  # a rank wins over the share
        check_seed(seed)

        # Every argument under its own name: a checkpoint is rebuilt from them.
        self.energy, self.rank, self.center, self.normalize_rows = energy, rank, center, normalize_rows
        self.matrix: Literal["image", "tile"] = matrix
        self.method, self.seed = method, seed

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """Leverage in [0, 1] of each token in the matrix of its image, or of its tile."""
        groups = Groups.of(tokens, self.matrix)  # every token once: what unpadding removes is in no row
        leverage = leverage_scores(
            groups.gather(tokens.read("features", self)),
            rank=self.rank,
            energy=None if self.rank is not None else self.energy,
            center=self.center,
            normalize_rows=self.normalize_rows,
            mask=groups.mask,
            method=self.method,
            seed=self.seed,
            overwrite=True,  # `gather` has copied
        )
        return groups.scatter(leverage.scores, tokens)
