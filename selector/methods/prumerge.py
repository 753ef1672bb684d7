"""PruMerge (arXiv 2403.15388): keep the outliers of CLS attention, let each absorb the tokens most like it.

Attention and keys are those of the tower's last layer with all heads side by side as a single one, and the tokens are
those of the feature layer, as in the official code. Outliers exceed the third quartile of their tile by `fences`
interquartile ranges. Each kept token i takes in its `absorb` nearest other ones, kept or not, by cosine of the keys:
officially x_i + Σ a_j x_j, where the attention a_j is about 1/N, so that the kept token has about 88% of the weight.
The published K is adaptive: ``keep="threshold:0"`` keeps exactly the outliers, since a score is the distance to that
fence in interquartile ranges. With a fixed budget the same ranking is cut.

Where we depart: tokens merge after the projector, and within a view; an image that keeps everything is left as it is;
and the official code ends with one token more, Σ a_j x_j over all that are dropped, which has no place in the picture
and would exceed the count.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from selector.attention import Attention, attention_field
from selector.base import ScoreSelector
from selector.budget import Budget
from selector.grid import places
from selector.merging import Flow, Selection
from selector.numerics import grained, precise, unit
from selector.tokens import VisualTokens

Weights = Literal["published", "scaled", "attention"]
KEYS = "joint_keys@-1"


class PruMerge(ScoreSelector):
    """Keeps outliers of CLS attention; each takes in its nearest others by key, weighted by attention.

    Args:
        absorb: other tokens that a kept one takes in.
        fences: distance above the third quartile at which an outlier begins, in interquartile ranges.
        weights: ``"published"`` is x_i + Σ a_j x_j. ``"scaled"`` divides that by 1 + Σ a_j, so that the weights sum to
            one. ``"attention"`` is no published rule: the average of the kept token and the others by attention alone.
            It leaves the kept token 4 to 7% of the weight and a cosine of 0.83 to 0.90 to itself (published: 0.98 to
            0.99); of 24 documents, llava-next-tiny then reads 9 right at a quarter of the tokens, where the published
            weights, and no merging at all, give 21.
        attention: ``"cls"``, or ``"received"`` for towers without a CLS token, which is not the published method.

    Example:
        >>> import torch
        >>> from selector import Budget, PruMerge, VisualTokens
        >>> attention = {"joint_cls_attention@-1": torch.tensor([[0.1, 0.12, 0.7, 0.08]])}
        >>> tokens = VisualTokens.from_features(torch.zeros(1, 4, 1), layers=attention)
        >>> PruMerge()(tokens, Budget("threshold:0")).tolist()  # exactly the outliers
        [[False, False, True, False]]
    """

    paper = "arXiv 2403.15388"
    cost = "N K D"
    needs = frozenset({"joint_cls_attention@-1", KEYS})
    merges = True

    def __init__(
        self, absorb: int = 32, fences: float = 1.5, weights: Weights = "published", attention: Attention = "cls"
    ):
        super().__init__()
        if absorb < 0:
            raise ValueError(f"absorb must be >= 0, got {absorb}")
        if not math.isfinite(fences):
            raise ValueError(f"fences must be finite, got {fences}")
        if weights not in get_args(Weights):
            raise ValueError(f"weights must be one of {', '.join(get_args(Weights))}, got {weights!r}")
        self.absorb, self.fences = absorb, fences
        self.weights: Weights = weights
        self.attention: Attention = attention
        self.needs = frozenset({f"joint_{attention_field(attention)}@-1", KEYS})

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """Interquartile ranges above the fence; positive exactly for outliers."""
        return outlier_score(self._attention(tokens), tokens.valid) - self.fences

    @torch.no_grad()
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        """The keep mask, and every kept token with what it takes in, weighted as `weights` says."""
        keep = self(tokens, budget)
        flow = absorbing(tokens, keep, self._attention(tokens), tokens.read(KEYS, self), self.absorb, budget)

        # Except under "attention", a kept token counts whole, and what it takes in by attention (about 1/N each).
        own = flow.source == flow.target
        if self.weights != "attention":
            flow = Flow(flow.target, flow.source, flow.weight.masked_fill(own, 1.0))
        return Selection(keep, flow if self.weights == "published" else flow.normalized(keep.numel()))

    def _attention(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """Attention of the tower's last layer, all heads as one."""
        return tokens.read(f"joint_{attention_field(self.attention)}@-1", self).float()


def outlier_score(attention: Float[Tensor, "T N"], valid: Bool[Tensor, "T N"]) -> Float[Tensor, "T N"]:
    """Distance to the third quartile of the tile, in interquartile ranges; finite for flat attention too.

    Args:
        attention: that each patch gets.
        valid: patches that count towards the quartiles.
    """
    # NaN marks what unpadding removes: it belongs to no quartile.
    table = attention.masked_fill(~valid, torch.nan)
    low, high = (table.nanquantile(q, dim=1, keepdim=True).nan_to_num() for q in (0.25, 0.75))

    # Where attention is flat, rounding is no outlier: a range counts for at least a millionth of the quartile.
    return (attention - high) / torch.maximum(high - low, high.abs() * 1e-6).clamp(min=1e-12)


def absorbing(
    tokens: VisualTokens,
    keep: Bool[Tensor, "I L"],
    attention: Float[Tensor, "T N"],
    keys: Float[Tensor, "T N C"],
    count: int,
    budget: Budget,
) -> Flow:
    """Each kept patch and the `count` others of its view with the most similar keys, weighted by attention.

    Nothing flows in an image that keeps all its patches.

    Args:
        keep: what the budget has left.
        attention: weight of each patch as a source.
        keys: what patches are compared by (cosine).
        count: others per kept patch, fewer where its view has no more.
        budget: its scope says what a view is.

    Returns:
        Edges with plain attention as weight, a patch's own included; they do not sum to one.
    """
    rows, patch = tokens.packed_rows(keys), tokens.is_patch
    kept = keep & patch & (~keep & patch).any(1, keepdim=True)
    view = places(tokens, budget.scope).view

    # Kept patches are few: a matrix of them against all, not of all pairs.
    most = max(1, int(kept.sum(1).max()))
    order = (~kept).int().argsort(dim=1, stable=True)[:, :most]  # the kept ones first
    real = kept.gather(1, order)
    rows = unit(rows)
    similarity = grained(rows.gather(1, order[..., None].expand(-1, -1, rows.shape[-1])) @ rows.mT)  # [I, K, L]

    # Only patches of the same view, since the base view is coarser than the tiles.
    fits = real[..., None] & patch[:, None] & (view.gather(1, order)[..., None] == view[:, None])
    fits = fits.scatter(2, order[..., None], False)  # its own token is no other
    best, member = similarity.masked_fill(~fits, -torch.inf).topk(min(count, view.shape[1]), dim=2)

    # Its own edge and those of the others, and which of them exist.
    source = torch.cat([order[..., None], member], 2)
    edge = torch.cat([real[..., None], ~best.isneginf()], 2)
    target = order[..., None].expand_as(source)

    # An attention of zero could leave a target whose weights sum to zero.
    weight = precise(tokens.packed(attention, 0.0)).gather(1, source.flatten(1)).view_as(source).clamp(min=1e-12)
    offset = torch.arange(len(keep), device=keep.device)[:, None, None] * keep.shape[1]
    return Flow((target + offset)[edge], (source + offset)[edge], weight[edge])
