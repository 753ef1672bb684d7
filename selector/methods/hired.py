"""HiRED (arXiv 2408.10945): the base view gets a part of the budget, the tiles theirs by where the base view attends.

Of B tokens the base view gets int(B · alpha), those with the highest CLS attention at the feature layer. The remaining
r go to the tiles. The int(N (1 - alpha)) base tokens with the highest CLS attention at the *first* layer vote for the
tile that shows their place: with m of M votes a tile gets int(r m / M) tokens, again those with the highest CLS
attention at the feature layer. Officially B is a fifth of all encoder tokens, before unpadding; here it is what the
budget pays for.

Where we depart: a tile's region is the part of the picture that the tile shows. Officially a reshape makes it a
horizontal band of the base view (``regions="bands"``: the T tiles take T equal runs of its tokens). A view never gets
more tokens than it has. What rounding and full views leave over goes to the views in turn, one each, so that the count
is exact; newline tokens cost all views alike. An image without tiles, and every tile under ``scope="tile"``, keeps its
highest attention.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selector.attention import Attention, attention_field
from selector.base import RankSelector
from selector.budget import Budget
from selector.grid import places, view_extents
from selector.groups import Groups, ranks, shared_out
from selector.tokens import VisualTokens

Regions = Literal["tiles", "bands"]


class HiRED(RankSelector):
    """Top CLS attention in each view; tiles share the budget by the first layer's attention to their places.

    Args:
        alpha: share of the budget that the base view gets, and share of its tokens that do not vote, in [0, 1].
        regions: where a tile lies in the base view; ``"bands"`` is what the official code does.
        attention: ``"cls"``, or ``"received"`` for towers without a CLS token, which is not the published method.

    Example:
        >>> import torch
        >>> from selector import Budget, HiRED, VisualTokens
        >>> read = {"cls_attention": torch.eye(2, 4), "layers": {"cls_attention@0": torch.eye(2, 4)}}
        >>> tokens = VisualTokens(torch.zeros(2, 4, 1), (2, 2), torch.tensor([0, 0]), torch.arange(8)[None], **read)
        >>> HiRED()(tokens, Budget(2)).tolist()  # the best of the base view, and of the one tile
        [[True, False, False, False, False, True, False, False]]
    """

    paper = "arXiv 2408.10945"
    cost = "N log N"
    needs = frozenset({"cls_attention", "cls_attention@0"})

    def __init__(self, alpha: float = 0.5, regions: Regions = "tiles", attention: Attention = "cls"):
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        if regions not in get_args(Regions):
            raise ValueError(f"regions must be one of {', '.join(get_args(Regions))}, got {regions!r}")
        self.alpha = alpha
        self.regions: Regions = regions
        self.attention: Attention = attention
        late = attention_field(attention)
        self.needs = frozenset({late, f"{late}@0"})

    @torch.no_grad()
    def ranking(self, tokens: VisualTokens, budget: Budget) -> Float[Tensor, "T N"]:
        """Attention within each view, cut so that every prefix holds the views in proportion to their quotas."""
        name = attention_field(self.attention)
        late, early = tokens.read(name, self).float(), tokens.read(f"{name}@0", self).float()
        if budget.scope == "tile":
            Groups.of(tokens, "tile").quota(tokens, budget)  # a fixed budget, or an error
            return late

        groups = Groups.of(tokens, "image")
        quota = self._quotas(early, groups.quota(tokens, budget), tokens)

        # What quotas leave over goes round in the order of tiles, the base view first.
        rank, turn = ranks(late, tokens.valid), torch.arange(len(quota), device=quota.device)
        rank, quota, turn = (groups.gather(part.expand_as(rank)) for part in (rank, quota[:, None], turn[:, None]))
        return groups.scatter(shared_out(rank, quota, turn, groups.mask), tokens)

    def _quotas(self, early: Float[Tensor, "T N"], count: Int[Tensor, "I"], tokens: VisualTokens) -> Int[Tensor, "T"]:
        """Tokens that each view gets, at most those it has.

        Args:
            early: attention by which base tokens vote, of the tower's first layer.
            count: patches that the budget pays for per image.
        """
        image, size = tokens.image, tokens.valid.sum(1)
        per_image = torch.bincount(image, minlength=tokens.num_images)
        base = torch.arange(len(image), device=image.device) == (per_image.cumsum(0) - per_image)[image]

        # A product that rounding puts a hair below a whole number must not cost one token.
        first = (count.double() * self.alpha + 1e-9).floor().long()

        # A single view gets everything; a base view at most what it has.
        first = torch.where(per_image > 1, torch.minimum(first, size[base]), torch.minimum(count, size[base]))

        # Votes of the base view's tokens, counted per tile.
        voters = int(early.shape[1] * (1 - self.alpha) + 1e-9)
        votes = tokens.valid & base[:, None] & (ranks(early, tokens.valid) < voters)
        region = self._bands(tokens) if self.regions == "bands" else shown_by(tokens)
        votes = torch.bincount(region[votes & (region >= 0)], minlength=len(image))
        votes = votes.masked_fill(base, 0)

        # Without any vote the tiles get nothing here, and the turns of `shared_out` go round all views.
        total = torch.zeros_like(count).index_add(0, image, votes).clamp(min=1)
        return torch.where(base, first[image], torch.minimum((count - first)[image] * votes // total[image], size))

    def _bands(self, tokens: VisualTokens) -> Int[Tensor, "T N"]:
        """The tile of each base token by equal runs of the base view's tokens (-1: no tiles).

        What it holds for tokens outside the base view means nothing.
        """
        image, patches = tokens.image, tokens.features.shape[1]
        tiles = torch.bincount(image, minlength=tokens.num_images)[image][:, None] - 1
        number = torch.arange(patches, device=image.device)
        run = number * tiles.clamp(min=1) // patches
        return (torch.arange(len(image), device=image.device)[:, None] + 1 + run).masked_fill(tiles == 0, -1)


def shown_by(tokens: VisualTokens) -> Int[Tensor, "T N"]:
    """The tile that shows the middle of each token of a base view (-1: no base view, or no tile shows it)."""
    view, y, x, height, width = view_extents(places(tokens), tokens)
    tile = tokens.slots.div(tokens.features.shape[1], rounding_mode="floor")
    of_grid = tokens.is_patch & ~tokens.base
    h, w = tokens.grid  # of the base view, which is never unpadded

    region = torch.full_like(tokens.slots, -1)
    for i in range(tokens.num_images):
        mine, looking = of_grid[i], tokens.base[i]
        if not bool(looking.any() and mine.any()):
            continue

        # The tile at every row and column of the grid of tiles, after unpadding.
        grid = int(view[i][mine][0])
        rows, columns = int(height[grid]), int(width[grid])
        shown = torch.full((rows, columns), -1, dtype=torch.long, device=view.device)
        shown[y[i][mine], x[i][mine]] = tile[i][mine]

        # The middle of a base token, (y + 1/2) / h of the picture, in integers.
        at_y = (2 * y[i][looking] + 1) * rows // (2 * h)
        at_x = (2 * x[i][looking] + 1) * columns // (2 * w)
        region[i, looking] = shown[at_y, at_x]
    return tokens.unpacked(region.double(), -1.0).long()
