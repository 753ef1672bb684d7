"""Layers that attend within an image, and to a question: what the image-transformer is built of.

Keys and values are pooled over cells of patches, since the tower has already told each patch about its neighbours; and
positions are rotary in two dimensions, in patches of the page.

Shapes: T tiles, N patches per tile, P cells per tile, K cells of the image with most tiles, R questions, Q tokens of
the longest question, S tokens of either, C channels of what is pooled or of a head, W width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from selector.grid import places
from selector.tokens import VisualTokens

WAVELENGTH = 100.0
"""Base of the rotary frequencies: the slowest turns once in a few hundred patches, more than a page is wide."""


@dataclass(frozen=True)
class Asked:
    """Questions in the form that the layers read.

    Attributes:
        embeddings: ``[R, Q, d]`` in the units of the table's projected columns.
        words: ``[R, Q, W]`` the same after a layer of attention among them, as keys and values.
        mask: ``[R, 1, 1, Q]`` which of them are real.

    Example:
        >>> asked = Asked(torch.zeros(2, 3, 8), torch.zeros(2, 3, 4), torch.ones(2, 1, 1, 3, dtype=torch.bool))
        >>> asked.of(torch.tensor([0, 0, 1])).words.shape  # of three tiles, two of the first image
        torch.Size([3, 3, 4])
    """

    embeddings: Float[Tensor, "R Q d"]
    words: Float[Tensor, "R Q W"]
    mask: Bool[Tensor, "R 1 1 Q"]

    def of(self, index: Int[Tensor, "T"]) -> Asked:
        """The question that belongs to each tile.

        Args:
            index: ``[T]`` number of the question, in 0..R-1.
        """
        return Asked(self.embeddings[index], self.words[index], self.mask[index])


class Words:
    """Keys and values of a question attending to itself: its own tokens, where `Cells` has those of an image.

    Attributes:
        mask: ``[R, 1, 1, Q]`` tokens that may be attended to.

    Example:
        >>> words = Words(torch.ones(1, 1, 1, 2, dtype=torch.bool))
        >>> words.mean(torch.tensor([[[1.0], [3.0]]])).tolist()
        [[[1.0], [3.0]]]
    """

    def __init__(self, mask: Bool[Tensor, "R 1 1 Q"]):
        self.mask: Bool[Tensor, "R 1 1 Q"] | None = mask

    def mean(self, x: Float[Tensor, "R Q C"]) -> Float[Tensor, "R Q C"]:
        """The tokens themselves: words are not pooled."""
        return x

    def of_image(self, x: Float[Tensor, "R H Q C"]) -> Float[Tensor, "R H Q C"]:
        """The tokens themselves: no question sees another."""
        return x


class Cells:
    """Keys and values of an image: cells of `pool` x `pool` patches of all its tiles.

    Patches that unpadding removes count in no mean, and cells of nothing else are never attended to.

    Args:
        grid: ``(h, w)`` patches of a tile.
        image: ``[T]`` index of the image of each tile, ascending.
        valid: ``[T, N]`` patches that the language model sees.
        pool: side of a cell, in patches; 1: every patch is a cell.

    Attributes:
        mask: ``[T, 1, 1, K]`` cells that may be attended to; None: all.

    Example:
        >>> cells = Cells((2, 2), torch.tensor([0]), torch.tensor([[True, True, True, False]]), pool=2)
        >>> cells.mean(torch.tensor([[[1.0], [2.0], [6.0], [100.0]]])).tolist()  # the last patch is not valid
        [[[3.0]]]
    """

    def __init__(self, grid: tuple[int, int], image: Int[Tensor, "T"], valid: Bool[Tensor, "T N"], pool: int):
        self.grid, self.image, self.valid, self.pool = grid, image, valid, pool
        self.weight = valid[..., None].float()
        self.whole = bool(valid.all())
        self.count = self._pooled(self.weight)  # share of each cell's patches that are valid
        there = self.count[..., 0] > 0

        # [I, most tiles]: which tiles an image has, so that their cells can be laid side by side.
        tiles = torch.bincount(self.image)
        first = tiles.cumsum(0) - tiles
        number = torch.arange(int(tiles.max()), device=self.image.device)
        self.tiles = torch.minimum(first[:, None] + number, first[:, None] + tiles[:, None] - 1)

        # An image with fewer tiles repeats its last one; the mask removes the copies. None is faster than a full mask.
        mask = there[self.tiles] & (number < tiles[:, None])[..., None]
        self.alone = len(tiles) == 1
        self.mask = None if bool(mask.all()) else mask.flatten(1)[self.image][:, None, None]

    def repeated(self, count: int) -> Cells:
        """The cells of one image, for `count` questions about it: as many images, none of which sees another."""
        image = torch.arange(count, device=self.image.device).repeat_interleave(len(self.image))
        return Cells(self.grid, image, self.valid.repeat(count, 1), self.pool)

    def mean(self, x: Float[Tensor, "T N C"]) -> Float[Tensor, "T P C"]:
        """Mean over the valid patches of each cell; a cell without any is masked, and what it holds means nothing."""
        if self.pool == 1:
            return x
        if self.whole:
            return self._pooled(x)

        # Mean of the valid ones: the mean with zeros for the others, over the share of valid ones.
        return self._pooled(x * self.weight) / self.count.clamp(min=1e-6)

    def of_image(self, x: Float[Tensor, "T H P C"]) -> Float[Tensor, "T H K C"]:
        """For every tile, the cells of all tiles of its image, side by side."""
        if self.alone:  # one image: no copy is needed
            return x.transpose(0, 1).flatten(1, 2)[None].expand(len(x), -1, -1, -1)
        return x[self.tiles].transpose(1, 2).flatten(2, 3)[self.image]

    def _pooled(self, x: Float[Tensor, "T N C"]) -> Float[Tensor, "T P C"]:
        """Mean over each cell of the grid; cells at the far edges may be smaller."""
        h, w = self.grid
        p = self.pool

        # Sums of strided views: several times faster than one mean over two axes.
        if h % p == 0 and w % p == 0:
            rows = x.unflatten(1, (h // p, p, w)).unbind(2)
            columns = sum(rows[1:], rows[0]).unflatten(2, (w // p, p)).unbind(3)
            return (sum(columns[1:], columns[0]) / p**2).flatten(1, 2)

        # Cells that stick out of the grid are means of what is inside.
        table = x.transpose(1, 2).unflatten(-1, self.grid)
        cells = F.avg_pool2d(table, p, ceil_mode=True, count_include_pad=False)
        return cells.flatten(2).transpose(1, 2)


class Block(nn.Module):
    """A pre-norm Transformer layer with rotary positions, and with `cross` an attention to the question.

    Args:
        width: W, channels of the tokens.
        heads: H, attention heads; `width` is a multiple of it.
        mlp_ratio: width of the MLP, as a multiple of `width`.
        cross: whether the layer also attends to the question.

    Example:
        >>> layer, cells = Block(8, 2, 2.0), Cells((2, 2), torch.tensor([0]), torch.ones(1, 4, dtype=torch.bool), 2)
        >>> patches, pooled = rotations(torch.zeros(1, 4, 2), 4), rotations(torch.zeros(1, 1, 2), 4)
        >>> layer(torch.zeros(1, 4, 8), patches, pooled, cells).shape
        torch.Size([1, 4, 8])
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, cross: bool = False):
        super().__init__()
        inner = round(width * mlp_ratio)
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value, self.out = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        if cross:
            self.cross_norm = nn.LayerNorm(width)
            self.cross_query, self.cross_key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
            self.cross_out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "T N W"],
        rotation: Tensor,
        key_rotation: Tensor,
        seen: Cells | Words,
        asked: Asked | None = None,
    ) -> Float[Tensor, "T N W"]:
        """The tokens after attention to what they see, to the question if there is one, and the MLP.

        Args:
            x: the tokens, patches of T tiles or words of T questions.
            rotation, key_rotation: rotary angles of the tokens and of `seen`, see `rotations`.
            seen: what the tokens attend to.
            asked: the question of each tile, for a layer made with `cross`.
        """
        # Keys and values are of pooled tokens, and turned before they are gathered: once, not once per tile.
        normed = self.attention_norm(x)
        keys, values = self.key_value(seen.mean(normed)).chunk(2, -1)
        q = turned(self._split(self.query(normed)), rotation)
        k = seen.of_image(turned(self._split(keys), key_rotation))
        v = seen.of_image(self._split(values))
        x = x + self.out(_merge(F.scaled_dot_product_attention(q, k, v, seen.mask)))

        # Without rotation: positions of words and of patches have no common scale.
        if asked is not None:
            k, v = map(self._split, self.cross_key_value(asked.words).chunk(2, -1))
            q = self._split(self.cross_query(self.cross_norm(x)))
            x = x + self.cross_out(_merge(F.scaled_dot_product_attention(q, k, v, asked.mask)))

        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))

    def _split(self, x: Float[Tensor, "T S W"]) -> Float[Tensor, "T H S C"]:
        """Channels into heads."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _merge(x: Float[Tensor, "T H S C"]) -> Float[Tensor, "T S W"]:
    """Heads back into channels."""
    return x.transpose(1, 2).flatten(2)


def page_positions(tokens: VisualTokens) -> tuple[Float[Tensor, "T N 2"], Bool[Tensor, "T N"]]:
    """Row and column of every patch, in patches of the high-resolution page, and which ones are of a base view.

    A patch of the base view, which shows the same page smaller, has the position of its middle on the page. Patches
    that have no slot are at 0.

    Returns:
        ``[T, N, 2]`` rows and columns, fractional in the base view, and ``[T, N]`` True in a base view.
    """
    # The page is what is packed of the tiles, laid out as one grid; its size is that after unpadding.
    view, y, x = places(tokens)
    base = tokens.base
    page = (view >= 0) & ~base
    position = torch.stack([y, x], -1).clamp(min=0).float()
    extent = torch.where(page[..., None], position + 1, 0).amax(1, keepdim=True)

    # Middles on middles: patch i of h covers the page from i / h to (i + 1) / h.
    grid = position.new_tensor(tokens.grid)
    position = torch.where(base[..., None], (position + 0.5) * extent / grid - 0.5, position)

    rows, columns = (tokens.unpacked(part) for part in position.unbind(-1))
    return torch.stack([rows, columns], -1), tokens.unpacked(base.float()).bool()


def rotations(positions: Float[Tensor, "T S 2"], width: int) -> Tensor:
    """Rotary angles (Su et al. 2021) in two dimensions, as unit complex numbers ``[T, 1, S, width / 2]``.

    Half of the channel pairs of a head turn with y, half with x.

    Args:
        positions: rows and columns, in patches.
        width: channels of a head, a multiple of 4.
    """
    # Frequencies fall geometrically from one radian per patch, as in one dimension; both axes have the same.
    pairs = width // 4
    steps = torch.arange(pairs, device=positions.device, dtype=torch.float32) / pairs
    angles = (positions[..., None] * WAVELENGTH**-steps).flatten(-2)
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def turned(x: Float[Tensor, "T H S C"], rotation: Tensor) -> Float[Tensor, "T H S C"]:
    """Queries or keys turned by their positions' angles; neighbouring channels are a pair.

    Args:
        x: queries or keys, split into heads.
        rotation: angles of the same tokens, see `rotations`.
    """
    # In float32 whatever the input: bfloat16 has no complex type.
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)
