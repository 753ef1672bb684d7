"""A learned selector that sees a whole image at once, and optionally the question.

The selector of "When Less is Enough" (`gumbel`) ranks the patches of each tile by themselves. AnyRes shows an image
twice, as a base view and as tiles, and what one view shows need not be kept from the other; so here the tokens of all
tiles of an image attend to each other. Two things keep that cheap: keys and values are averaged over cells of
`pool` x `pool` patches (the tower has already told each patch about its neighbours), and the layers are few and narrow.

Positions are rotary in two dimensions, in patches of the page: a token of the base view lies where its middle lies on
the page, so that an offset means the same everywhere on the page and at any page size.

With `question_dim` it reads the question, and what is kept of a page differs per question. The layers described above
see only the image, once per image; then patches are compared with the question's tokens where the language model
compares them, in its embedding space (`_Match`), and `question_layers` more layers attend to both, once per question.

The architecture is ours; it is trained by `training.answers`.

Shapes: T tiles, N patches per tile, P cells per tile, I images, K cells of the image with most tiles, R questions,
Q tokens of the longest question, C channels of the table, W width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from selector.page_attention import Asked, Block, Cells, Words, page_positions, rotations
from selector.table import Inputs, TableSelector, check_mlp_ratio, check_sizes
from selector.tokens import VisualTokens

MATCHED = 128
"""Patches per tile that are compared with the question at a time."""


class ImageTransformer(TableSelector):
    """Transformer layers over all tokens of an image, with 2-D rotary positions; optionally reads the question.

    Args:
        dim: C, channels of the table it reads.
        inputs: ``"features"``, ``"projected"`` or ``"both"``, see `TableSelector`.
        width: W, width of the Transformer.
        layers: number of layers that see only the image.
        heads: attention heads per layer; a head's width, `width` / `heads`, must be a multiple of 4.
        mlp_ratio: width of a layer's MLP, as a multiple of `width`.
        pool: side of the cells, in patches, over which keys and values are averaged; 1 attends to every token.
        question_dim: d, width of the question's embeddings, for a selector that reads the question; None for one that
            does not.
        question_layers: layers behind the others that also attend to the question.
        match_rank: rank of what is learned of the map under which patches and words are compared, in 1..d; None learns
            all of it, which at the width of a 7B model is most of what selection then costs.

    Raises:
        ValueError: a size that breaks these rules or is below 1 (layers: below 0), a question wider than the table, or
            one without the projected tokens in `inputs`, or a rank without a question.

    Example:
        >>> import torch
        >>> from selector import Budget, ImageTransformer, VisualTokens
        >>> tokens = VisualTokens.from_features(torch.randn(2, 16, 8))
        >>> ImageTransformer(dim=8, width=32)(tokens, Budget(4)).sum(1).tolist()
        [4, 4]
    """

    paper = "ours"
    cost = "layers · (N² W / pool² + N W²)"

    def __init__(
        self,
        dim: int,
        inputs: Inputs = "features",
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        pool: int = 2,
        question_dim: int | None = None,
        question_layers: int = 1,
        match_rank: int | None = None,
    ):
        super().__init__(dim, inputs)
        check_sizes(1, dim=dim, width=width, heads=heads, pool=pool)
        check_sizes(0, layers=layers, question_layers=question_layers)
        check_mlp_ratio(mlp_ratio, width)
        if width % (4 * heads):
            raise ValueError(f"width must be a multiple of 4 * heads, got width {width} and {heads} heads")
        self.width, self.layers, self.heads, self.mlp_ratio = width, layers, heads, mlp_ratio
        self.pool, self.question_dim = pool, question_dim
        self.question_layers, self.match_rank = question_layers, match_rank

        # What every image passes through, with a question or without.
        self.embed = nn.Linear(dim, width)
        self.view = nn.Parameter(torch.zeros(2, width))  # high resolution, base view
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

        if question_dim is None and match_rank is not None:
            raise ValueError(f"match_rank must be None for a selector that reads no question, got {match_rank}")

        # What only a selector with a question has; without one these weights are not in the checkpoint.
        if question_dim is not None:
            if inputs == "features":
                raise ValueError("inputs must hold the projected tokens ('projected' or 'both') for a question")
            if not 1 <= question_dim <= dim:
                raise ValueError(f"question_dim must be in 1..{dim}, the width of the table, got {question_dim}")
            if match_rank is not None and not 1 <= match_rank <= question_dim:
                raise ValueError(f"match_rank must be in 1..{question_dim}, the width of a question, got {match_rank}")
            self.needs = self.needs | {"question"}
            self.match = _Match(question_dim, width, match_rank)

            asked = [Block(width, heads, mlp_ratio, cross=True) for _ in range(question_layers)]
            self.asked_blocks = nn.ModuleList(asked)

            # Embeddings know no context: one layer among the words gives them some before patches read them.
            self.read_words = nn.Sequential(nn.LayerNorm(question_dim), nn.Linear(question_dim, width))
            self.question_block = Block(width, heads, mlp_ratio)
            self.question_norm = nn.LayerNorm(width)

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """The head's logit; with `question_dim` it depends on the question that the tokens carry."""
        seen = self._look(tokens)
        if self.question_dim is None:
            return self._heads(seen.x)
        asked = self._read(*tokens.read_question(self)).of(tokens.image)
        return self._heads(self._answer(seen, asked))

    def scores_per_question(
        self, tokens: VisualTokens, question: Float[Tensor, "R Q d"], mask: Bool[Tensor, "R Q"]
    ) -> Float[Tensor, "R T N"]:
        """Scores of one image's tokens for each of several questions. The layers that see only the image run once.

        Args:
            tokens: of a single image.
            question: the language model's input embeddings of each question.
            mask: which tokens of each question are real, at least one per question.

        Raises:
            ValueError: several images.
        """
        if tokens.num_images != 1:
            raise ValueError(f"tokens must be those of one image, got {tokens.num_images}")

        # Questions and tiles are one batch: question 0 with every tile, then question 1 with every tile, and so on.
        count, tiles = len(question), len(tokens.features)
        number = torch.arange(count, device=question.device).repeat_interleave(tiles)
        asked = self._read(question, mask).of(number)
        scores = self._heads(self._answer(self._look(tokens).repeated(count), asked))
        return scores.view(count, tiles, -1)

    def _look(self, tokens: VisualTokens) -> _Seen:
        """The image after the layers that do not read the question."""
        positions, base = page_positions(tokens)
        cells = Cells(tokens.grid, tokens.image, tokens.valid, self.pool)
        table = self.raw_table(tokens)

        # A cell lies where the mean of its patches lies: its key turns by that position.
        rotation = rotations(positions, self.width // self.heads)
        cell_rotation = rotations(cells.mean(positions), self.width // self.heads)

        # Positions of the two views interleave on the page; only this tells a coarse patch from a fine one.
        x = self.embedded(table, self.embed) + self.view[base.long()]
        for block in self.blocks:
            x = block(x, rotation, cell_rotation, cells)
        return _Seen(x, table, rotation, cell_rotation, cells)

    def _answer(self, seen: _Seen, asked: Asked) -> Float[Tensor, "T N W"]:
        """The image after the layers that read the question."""
        # A part of the patches at a time: what is made of a wide table on the way then stays in the cache.
        parts = seen.table.split(MATCHED, dim=1)
        x = seen.x + torch.cat([self.match(self._projected(part), asked) for part in parts], 1)
        for block in self.asked_blocks:
            x = block(x, seen.rotation, seen.cell_rotation, seen.cells, asked)
        return x

    def _heads(self, x: Float[Tensor, "T N W"]) -> Float[Tensor, "T N"]:
        """One score per patch, from what the last layer leaves."""
        return self.head(self.norm(x))[..., 0]

    def _read(self, question: Float[Tensor, "R Q d"], mask: Bool[Tensor, "R Q"]) -> Asked:
        """The question's tokens: in the units of the table, and as words that know their neighbours."""
        raw = question.to(self.feature_mean.dtype)

        # Text lies on one row: the rotary positions of patches serve it too, with y = 0.
        column = torch.arange(question.shape[1], device=question.device, dtype=torch.float32)
        positions = torch.stack([torch.zeros_like(column), column], -1).expand(len(question), -1, -1)
        rotation, attend = rotations(positions, self.width // self.heads), mask[:, None, None]

        words = self.question_norm(self.question_block(self.read_words(raw), rotation, rotation, Words(attend)))
        return Asked(self._projected(raw), words, attend)

    def _projected(self, raw: Float[Tensor, "R S C"]) -> Float[Tensor, "R S d"]:
        """A question, or the projected columns of a table (its last), in units of the training set's spread.

        Words and patches share one space, so they share the statistics of its channels.
        """
        width = self.question_dim or 0
        return (raw[..., -width:] - self.feature_mean[-width:]) / self.feature_std[-width:]


@dataclass(frozen=True)
class _Seen:
    """Images after the layers that do not read the question.

    Attributes:
        x: ``[T, N, W]`` the tokens.
        table: ``[T, N, C]`` the raw table that they come from.
        rotation, cell_rotation: rotary angles of queries and of keys, see `rotations`.
        cells: which keys each tile attends to.
    """

    x: Float[Tensor, "T N W"]
    table: Float[Tensor, "T N C"]
    rotation: Tensor
    cell_rotation: Tensor
    cells: Cells

    def repeated(self, count: int) -> _Seen:
        """The image `count` times, one after the other, each an image by itself for the attention."""
        x, table = self.x.repeat(count, 1, 1), self.table.repeat(count, 1, 1)
        rotation, cell_rotation = (each.repeat(count, 1, 1, 1) for each in (self.rotation, self.cell_rotation))
        return _Seen(x, table, rotation, cell_rotation, self.cells.repeated(count))


class _Match(nn.Module):
    """Tells each patch which of the question's tokens it looks like, by cosine in the language model's embedding space.

    The projector moves a patch close to the embeddings of the words that it shows, so this works before anything is
    learned; a linear map, the identity at the start, is learned on top. A patch that resembles no word attends to
    nothing.

    Args:
        question_dim: d, width of the language model's embeddings.
        width: W, width of what comes out.
        rank: of what the map learns beside the identity; None: any.
    """

    SHARPNESS = 10.0
    """Factor on the cosines at the start of the training."""

    def __init__(self, question_dim: int, width: int, rank: int | None):
        super().__init__()
        self.space: nn.Module = _LowRank(question_dim, rank) if rank else nn.Linear(question_dim, question_dim, False)
        if isinstance(self.space, nn.Linear):
            nn.init.eye_(self.space.weight)

        # Nothing's logit is that of a cosine of 1/2 at the start: words less like a patch than that get less than it.
        self.sharpness = nn.Parameter(torch.tensor(self.SHARPNESS))
        self.nothing = nn.Parameter(torch.tensor(0.5 * self.SHARPNESS))
        self.value, self.best = nn.Linear(width, width), nn.Linear(1, width)

    def forward(self, projected: Float[Tensor, "T N d"], asked: Asked) -> Float[Tensor, "T N W"]:
        """What each patch takes from the words most like it, and how much its best word is like it.

        Args:
            projected: patches in units of the training set's spread.
            asked: the question of each tile, R = T.
        """
        patches = F.normalize(self.space(projected), dim=-1)
        words = F.normalize(self.space(asked.embeddings), dim=-1)
        alike = self.sharpness * patches @ words.mT
        alike = alike.masked_fill(~asked.mask[:, 0], -torch.inf)

        # One more word, which has no value: its share of the attention is lost, and it may be all of it.
        none = self.nothing.expand(*alike.shape[:2], 1)
        attention = torch.cat([alike, none], -1).softmax(-1)[..., :-1]

        # Attention sums to at most one whatever the words; how good the best match is comes as a channel of its own.
        best = alike.amax(-1, keepdim=True)
        return attention @ self.value(asked.words) + self.best(best)


class _LowRank(nn.Module):
    """x + U V x, which is x at the start: V is drawn as a linear layer's weight is, U is zero (Hu et al. 2021, LoRA).

    Args:
        dim: d, width of x.
        rank: rows of V and columns of U.
    """

    def __init__(self, dim: int, rank: int):
        super().__init__()
        self.down, self.up = nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Float[Tensor, "*S d"]) -> Float[Tensor, "*S d"]:
        """The same, moved within `rank` directions."""
        return x + self.up(self.down(x))
