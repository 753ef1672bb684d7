"""A learned selector that sees a whole image at once, and if asked to, the question.

The selector of "When Less is Enough" (`gumbel`) ranks the patches of each tile by themselves. AnyRes shows an image
twice, as a base view and as tiles, and what one view shows need not be kept from the other; so here the tokens of all
tiles of an image attend to each other. Positions are rotary in two dimensions, in patches of the page: a token of the
base view lies where its middle lies on the page, so that what is beside a word is found in the same way everywhere and
at any size. With `question_dim` every layer also attends to the embedded question, and the same page is cut
differently for each question. The architecture is ours; it is trained by `training.answers`.

Shapes: I images, M patches of the largest image (padded), R rankings (one per question), Q tokens of the longest
question, C channels of the table, T tiles, N patches per tile.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from selector.grid import places
from selector.groups import Groups
from selector.table import Inputs, TableSelector
from selector.tokens import VisualTokens

WAVELENGTH = 100.0
"""Base of the rotary frequencies: the slowest turns once in about 600 patches, more than a page is wide."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines ``[..., S, C / 2]`` of the angles by which channels are turned."""


class ImageTransformer(TableSelector):
    """Transformer layers over all tokens of an image, with 2-D rotary positions; optionally reads the question.

    Args:
        dim: C, channels of the table it reads.
        inputs: ``"features"``, ``"projected"`` or ``"both"``, see `TableSelector`.
        width: width of the Transformer.
        layers, heads, mlp_ratio: of the Transformer; a head's width must be a multiple of 4.
        question_dim: d, width of the question's embeddings, for a selector that reads the question; None for one that
            does not.

    Example:
        >>> import torch
        >>> from selector import Budget, ImageTransformer, VisualTokens
        >>> tokens = VisualTokens.from_features(torch.randn(2, 16, 8))
        >>> ImageTransformer(dim=8, width=32)(tokens, Budget(4)).sum(1).tolist()
        [4, 4]
    """

    paper = "ours"
    cost = "layers · (N² W + N W²)"

    def __init__(
        self,
        dim: int,
        inputs: Inputs = "features",
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        question_dim: int | None = None,
    ):
        super().__init__(dim, inputs)
        if width % (4 * heads):
            raise ValueError(f"width must be a multiple of 4 * heads, got width {width} and {heads} heads")
        self.width, self.layers, self.heads, self.mlp_ratio = width, layers, heads, mlp_ratio
        self.question_dim = question_dim
        self.embed = nn.Linear(dim, width)
        self.view = nn.Parameter(torch.zeros(2, width))  # high resolution, base view
        asks = question_dim is not None
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, cross=asks) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)
        if question_dim is not None:
            self.needs = self.needs | {"question"}
            self.read = nn.Sequential(nn.LayerNorm(question_dim), nn.Linear(question_dim, width))
            self.question_block = Block(width, heads, mlp_ratio)
            self.question_norm = nn.LayerNorm(width)

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        if self.question_dim is None:
            scores, groups = self.rankings(tokens)
        else:
            scores, groups = self.rankings(tokens, *tokens.read_question(self))
        return groups.scatter(scores, tokens)

    def rankings(
        self,
        tokens: VisualTokens,
        question: Float[Tensor, "R Q d"] | None = None,
        question_mask: Bool[Tensor, "R Q"] | None = None,
        image: Int[Tensor, "R"] | None = None,
    ) -> tuple[Float[Tensor, "R M"], Groups]:
        """Scores of the patches of each image; with questions, one ranking per question.

        Args:
            question, question_mask: embedded questions and which of their tokens are real.
            image: the image that each question is about; None: question i is about image i.

        Returns:
            Scores (zero where there is no patch), and the groups that tell which patch each belongs to.
        """
        groups = Groups.of(tokens, "image")
        members = groups.mask.any(0)  # newlines take part in no image's ranking; a column that is one everywhere goes
        table = groups.gather(self.table(tokens))[:, members]
        there = groups.mask[:, members]
        rotation = turns(page_positions(tokens)[:, members], self.width // self.heads)
        x = self.embed(table) + self.view[tokens.base[:, members].long()]

        text = text_mask = None
        if question is not None and question_mask is not None:
            text, text_mask = self._read(question, question_mask)
            of = torch.arange(len(x), device=x.device) if image is None else image
            x, there = x[of], there[of]
            rotation = (rotation[0][of], rotation[1][of])

        # Without padding no mask is needed, and attention takes its fastest path.
        mask = None if bool(there.all()) else there[:, None, None]
        for block in self.blocks:
            x = block(x, rotation, mask, text, text_mask)
        scores = self.head(self.norm(x))[..., 0] * there
        full = scores.new_zeros(len(scores), groups.mask.shape[1])
        return full.index_copy(1, members.nonzero()[:, 0], scores), groups

    def _read(
        self, question: Float[Tensor, "R Q d"], mask: Bool[Tensor, "R Q"]
    ) -> tuple[Float[Tensor, "R Q W"], Bool[Tensor, "R 1 1 Q"]]:
        """The question's tokens, each knowing its neighbours."""
        place = torch.arange(question.shape[1], device=question.device, dtype=torch.float32)
        rotation = turns(torch.stack([torch.zeros_like(place), place], -1)[None], self.width // self.heads)
        attend = mask[:, None, None]
        text = self.read(question.to(self.feature_mean.dtype))
        return self.question_norm(self.question_block(text, rotation, attend)), attend


class Block(nn.Module):
    """A pre-norm Transformer layer with rotary positions, and with `cross` an attention to the question."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, cross: bool = False):
        super().__init__()
        inner = round(width * mlp_ratio)
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        if cross:
            self.cross_norm = nn.LayerNorm(width)
            self.cross_q, self.cross_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
            self.cross_out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "R S W"],
        rotation: Rotation,
        mask: Bool[Tensor, "R 1 1 S"] | None,
        text: Float[Tensor, "R Q W"] | None = None,
        text_mask: Bool[Tensor, "R 1 1 Q"] | None = None,
    ) -> Float[Tensor, "R S W"]:
        q, k, v = map(self._split, self.qkv(self.attention_norm(x)).chunk(3, -1))
        x = x + self.out(_merge(F.scaled_dot_product_attention(turned(q, rotation), turned(k, rotation), v, mask)))

        if text is not None:
            q = self._split(self.cross_q(self.cross_norm(x)))
            k, v = map(self._split, self.cross_kv(text).chunk(2, -1))
            x = x + self.cross_out(_merge(F.scaled_dot_product_attention(q, k, v, text_mask)))

        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))

    def _split(self, x: Float[Tensor, "R S W"]) -> Float[Tensor, "R H S C"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _merge(x: Float[Tensor, "R H S C"]) -> Float[Tensor, "R S W"]:
    return x.transpose(1, 2).flatten(2)


def page_positions(tokens: VisualTokens) -> Float[Tensor, "I L 2"]:
    """Row and column of every packed patch, in patches of the high-resolution page; 0 at newlines and padding.

    A patch of the base view, which shows the same page smaller, has the position of its middle on the page.
    """
    view, y, x = places(tokens)
    base = tokens.base
    page = (view >= 0) & ~base
    position = torch.stack([y, x], -1).clamp(min=0).float()
    extent = torch.where(page[..., None], position + 1, 0).amax(1, keepdim=True)
    grid = position.new_tensor(tokens.grid)
    return torch.where(base[..., None], (position + 0.5) * extent / grid - 0.5, position)


def turns(positions: Float[Tensor, "I S 2"], width: int) -> Rotation:
    """Rotary angles (Su et al. 2021) in two dimensions: half of a head's channel pairs turn with y, half with x."""
    pairs = width // 4
    steps = torch.arange(pairs, device=positions.device, dtype=torch.float32) / pairs
    angles = (positions[..., None] * WAVELENGTH**-steps).flatten(-2)
    return angles.cos(), angles.sin()


def turned(x: Float[Tensor, "R H S C"], rotation: Rotation) -> Float[Tensor, "R H S C"]:
    """Queries or keys turned by their positions' angles."""
    cos, sin = (part[:, None].to(x.dtype) for part in rotation)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
