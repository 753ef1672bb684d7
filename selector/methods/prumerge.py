"""PruMerge (arXiv 2403.15388): keep the outliers of CLS attention, let each absorb the tokens most like it.

Outliers exceed the third quartile of their tile by `fences` interquartile ranges; each kept token then absorbs its
`absorb` nearest dropped tokens by cosine of their keys, weighted by attention. The published K is adaptive:
``keep="threshold:0"`` keeps exactly the outliers, since a score is the distance to that fence in interquartile ranges.
With a fixed budget the same ranking is cut. Where we depart: the absorbed tokens and the kept one are averaged
(weights sum to one; the kept token's weight is its own attention), on the projected tokens, within a view.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from selector.base import ScoreSelector
from selector.budget import Budget
from selector.greedy import grained, precise, unit
from selector.grid import places
from selector.merging import Flow, Selection
from selector.tokens import VisualTokens


class PruMerge(ScoreSelector):
    """Keeps outliers of CLS attention; each absorbs its nearest dropped tokens by key, weighted by attention.

    Args:
        absorb: dropped tokens that a kept one takes in.
        fences: interquartile ranges above the third quartile at which an outlier begins.
    """

    paper = "arXiv 2403.15388"
    cost = "N K D"
    needs = frozenset({"cls_attention", "keys"})
    merges = True

    def __init__(self, absorb: int = 32, fences: float = 1.5):
        super().__init__()
        if absorb < 0:
            raise ValueError(f"absorb must be >= 0, got {absorb}")
        if not math.isfinite(fences):
            raise ValueError(f"fences must be finite, got {fences}")
        self.absorb, self.fences = absorb, fences

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        return outlier_score(tokens.read("cls_attention", self).float(), tokens.valid) - self.fences

    @torch.no_grad()
    def select(self, tokens: VisualTokens, budget: Budget) -> Selection:
        keep = self(tokens, budget)
        return Selection(keep, absorbing(tokens, keep, self.absorb, self, budget))


def outlier_score(attention: Float[Tensor, "T N"], valid: Bool[Tensor, "T N"]) -> Float[Tensor, "T N"]:
    """Distance to the third quartile of the tile, in interquartile ranges."""
    table = attention.masked_fill(~valid, torch.nan)
    low, high = (table.nanquantile(q, dim=1, keepdim=True).nan_to_num() for q in (0.25, 0.75))
    return (attention - high) / torch.maximum(high - low, high.abs() * 1e-6).clamp(min=1e-12)


def absorbing(tokens: VisualTokens, keep: Bool[Tensor, "I L"], count: int, reader: object, budget: Budget) -> Flow:
    """Each kept patch and its `count` nearest dropped ones of the same view, weighted by attention."""
    attention, _ = tokens.by_image(tokens.read("cls_attention", reader)[..., None])
    keys, patch = tokens.by_image(tokens.read("keys", reader))
    kept, dropped, view = keep & patch, ~keep & patch, places(tokens, budget.scope).view
    most = max(1, int(kept.sum(1).max()))
    order = (~kept).int().argsort(dim=1, stable=True)[:, :most]  # the kept ones first
    real = kept.gather(1, order)
    rows = unit(keys)
    similarity = grained(rows.gather(1, order[..., None].expand(-1, -1, rows.shape[-1])) @ rows.mT)  # [I, K, L]
    fits = real[..., None] & dropped[:, None] & (view.gather(1, order)[..., None] == view[:, None])
    best, member = similarity.masked_fill(~fits, -torch.inf).topk(min(count, view.shape[1]), dim=2)
    source = torch.cat([order[..., None], member], 2)
    edge = torch.cat([real[..., None], ~best.isneginf()], 2)
    target = order[..., None].expand_as(source)
    weight = precise(attention)[..., 0].gather(1, source.flatten(1)).view_as(source).clamp(min=1e-12)
    offset = torch.arange(len(keep), device=keep.device)[:, None, None] * keep.shape[1]
    flow = Flow((target + offset)[edge], (source + offset)[edge], weight[edge])
    return flow.normalized(keep.numel())
