"""VisualTokens: the one table that every selector reads.

What a vision-language model does between its encoder and its language model (tiles, unpadding, newline tokens) is
boiled down to one index map, ``slots``: for every position of the packed sequence, which encoder token lands there.
A selector scores encoder tokens ``[T, N]``; a budget cuts packed slots ``[I, L]``; the map joins the two.

Shapes: I images, T tiles in the batch, N patches per tile, D encoder width, d width of the language model,
L packed slots of the longest image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

NEWLINE = -1
"""Slot of a learned newline embedding: no encoder token lands here."""
PAD = -2
"""Slot past the end of a shorter image of the batch."""
INSIDE = frozenset(
    {"hidden", "normed", "text_attention", "own_text_attention", "rater_attention", "layer_keys", "word_normed"}
    | {"word_keys", "rater_attention_plus", "mean_query_attention", "own_keys"}
)
"""Fields of `VisualTokens` that only a stage inside the language model can fill, see `selector.inside`."""


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of a batch and where each one lands.

    Attributes:
        features: ``[T, N, D]`` encoder hidden states at the model's feature layer, row-major patches, prefix tokens
            (CLS, registers) removed.
        grid: ``(h, w)`` patches of one tile, ``h * w == N``.
        image: ``[T]`` index of the image each tile belongs to, ascending, every image at least once. The first tile
            of an image with several is its downscaled base view.
        slots: ``[I, L]`` packed order: ``t * N + n`` of the token that lands there, or `NEWLINE`, or `PAD`.
        projected: ``[T, N, d]`` the tokens as the language model sees them; zero where `valid` is False.
        cls_attention: ``[T, N]`` attention from CLS at the feature layer, mean over heads.
        received_attention: ``[T, N]`` attention that each patch receives at the feature layer, mean over heads and over
            all queries (CLS's too, where there is one).
        keys: ``[T, N, k]`` attention keys of the layer that produced the features, mean over heads.
        text: ``[T, N]`` relevance of each token to the prompt, higher is more.
        question: ``[I, Q, d]`` the language model's input embeddings of the text that follows each image in its prompt
            (the user's words and what the chat template puts around them, of several turns all that follow; labelled
            tokens are left out), zero where `question_mask` is False.
        question_mask: ``[I, Q]`` which of these are real.
        hidden: ``[T, N, h]`` inside the language model: the states that enter the decoder layer of this stage.
        normed: ``[T, N, h]`` inside it: `hidden` under the norm that stands behind the last layer.
        text_attention: ``[T, N]`` inside it: what the last token of the prompt paid each visual token in the layer
            before this stage, mean over heads, softmax over all that it could see.
        own_text_attention: ``[T, N]`` the same of the layer of this stage itself, by its own weights, before it runs.
        rater_attention: ``[T, N]`` as `text_attention`, the mean over the text tokens behind the image that are most
            like it: M, the mean over its visual tokens of the softmax over the text of their inner products, all as
            embedded, is above the mean of M (SparseVLM, arXiv 2410.04417).
        rater_attention_plus: ``[T, N]`` as `rater_attention`, each head's attention divided by what a query and a key
            of ones would score there under rotation (their inner product over √c, c channels per head), so that it no
            longer falls with distance; then the mean over the 14 of 32 heads that pay the image most, or that share of
            another number of heads (SparseVLM+).
        mean_query_attention: ``[T, N]`` inside it: what the mean query of the prompt up to the image's last token pays
            each visual token, by the weights of this stage's layer, without rotation, mean over heads, softmax over
            that part of the prompt (PACT, arXiv 2504.08966).
        layer_keys: ``[T, N, g]`` rotated keys of the layer before this stage, all key heads side by side.
        own_keys: ``[T, N, g]`` the same of the layer of this stage itself, by its own weights, before it runs.
        word_normed, word_keys: ``[I, Q, h]`` and ``[I, Q, g]``, as `normed` and `layer_keys`, of the text tokens behind
            each image; rows of zeros behind the last one.
        layers: `cls_attention`, `received_attention` and `keys` of any attention layer of the vision tower, by names
            such as ``"cls_attention@0"``: layers count from 0, or from -1 backwards. With ``joint_`` before the name
            (``"joint_keys@-1"``), all heads side by side count as a single one, scaled by their common width.

    Raises:
        ValueError: a grid that has another number of patches than the features.

    Example:
        >>> tokens = VisualTokens.from_features(torch.zeros(2, 4, 3))
        >>> tokens.grid, tokens.slots.tolist(), tokens.lengths.tolist()
        ((2, 2), [[0, 1, 2, 3], [4, 5, 6, 7]], [4, 4])
    """

    features: Float[Tensor, "T N D"]
    grid: tuple[int, int]
    image: Int[Tensor, "T"]
    slots: Int[Tensor, "I L"]
    projected: Float[Tensor, "T N d"] | None = None
    cls_attention: Float[Tensor, "T N"] | None = None
    received_attention: Float[Tensor, "T N"] | None = None
    keys: Float[Tensor, "T N k"] | None = None
    text: Float[Tensor, "T N"] | None = None
    question: Float[Tensor, "I Q d"] | None = None
    question_mask: Bool[Tensor, "I Q"] | None = None
    hidden: Float[Tensor, "T N h"] | None = None
    normed: Float[Tensor, "T N h"] | None = None
    text_attention: Float[Tensor, "T N"] | None = None
    own_text_attention: Float[Tensor, "T N"] | None = None
    rater_attention: Float[Tensor, "T N"] | None = None
    rater_attention_plus: Float[Tensor, "T N"] | None = None
    mean_query_attention: Float[Tensor, "T N"] | None = None
    layer_keys: Float[Tensor, "T N g"] | None = None
    own_keys: Float[Tensor, "T N g"] | None = None
    word_normed: Float[Tensor, "I Q2 h"] | None = None
    word_keys: Float[Tensor, "I Q2 g"] | None = None
    layers: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The annotations check shapes, but not a product of two numbers.
        h, w = self.grid
        if h * w != self.features.shape[1]:
            raise ValueError(f"grid {self.grid} has {h * w} patches, features have {self.features.shape[1]} per tile")

    @classmethod
    def from_features(
        cls, features: Float[Tensor, "B N D"], grid: tuple[int, int] | None = None, **extra: Any
    ) -> VisualTokens:
        """Every row is an image of one tile, with no newline: a bare encoder, or a training batch.

        Args:
            features: ``[B, N, D]``.
            grid: rows and columns of patches; by default a square, or a single row where N is no square.
            extra: further fields of the class.
        """
        rows, patches = features.shape[:2]
        index = torch.arange(rows * patches, device=features.device).view(rows, patches)
        side = int(patches**0.5)
        grid = grid or ((side, side) if side * side == patches else (1, patches))
        return cls(features, grid, torch.arange(rows, device=features.device), index, **extra)

    def outline(self) -> VisualTokens:
        """The same places without what lies there: features of width 0, and no other values.

        It answers what `slots` and `grid` answer (`lengths`, `valid`, `tiles_of`), and keeps no large tensor alive.

        Example:
            >>> VisualTokens.from_features(torch.zeros(2, 4, 3)).outline().lengths.tolist()
            [4, 4]
        """
        empty = self.features.new_empty(*self.features.shape[:2], 0)  # a slice would hold the whole storage
        return VisualTokens(empty, self.grid, self.image, self.slots)

    def read(self, name: str, reader: object) -> Tensor:
        """The field of that name (with ``@``: of `layers`), finite where tokens are valid and zero elsewhere.

        Raises:
            ValueError: these tokens do not have it, or it holds NaN or infinity; naming field and reader.
        """
        value = self.layers.get(name) if "@" in name else getattr(self, name)
        if value is None:
            raise ValueError(f"{type(reader).__name__} reads `{name}` of the visual tokens, and these tokens have none")

        # What the language model never sees must not matter; the copy is spared where there is nothing of the kind.
        valid = self.valid
        if not bool(valid.all()):
            value = torch.where(valid if value.ndim == 2 else valid[..., None], value, 0)

        # A sum is many times faster than a look at every value; finite values may overflow it, so it only excuses.
        if not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} must be finite: {type(reader).__name__} got NaN or infinity for a visual token")
        return value

    def read_question(self, reader: object) -> tuple[Float[Tensor, "I Q d"], Bool[Tensor, "I Q"]]:
        """The embedded text that follows each image, and which of its tokens are real.

        Raises:
            ValueError: these tokens were made without a question, or an image has no text behind it; naming the reader.
        """
        name = type(reader).__name__
        if self.question is None or self.question_mask is None:
            raise ValueError(
                f"{name} reads the question (`question`), and these tokens have none: give a prompt beside the image"
            )
        if not bool(self.question_mask.any(1).all()):
            raise ValueError(f"{name} reads the question, and an image of this batch has no text behind it")
        return self.question, self.question_mask

    @property
    def num_images(self) -> int:
        """I, images of the batch."""
        return self.slots.shape[0]

    # What follows from the packing is computed once: the tensors of a table are never changed.

    @cached_property
    def is_patch(self) -> Bool[Tensor, "I L"]:
        """Slots that hold an encoder token (neither newline nor padding)."""
        return self.slots >= 0

    @cached_property
    def lengths(self) -> Int[Tensor, "I"]:
        """Visual tokens of each image that reach an unpruned language model, newlines included."""
        return (self.slots != PAD).sum(1)

    @cached_property
    def valid(self) -> Bool[Tensor, "T N"]:
        """Tokens that land in a slot; unpadding removes the others before the language model sees them."""
        mask = self.slots.new_zeros(self.features.shape[0] * self.features.shape[1], dtype=torch.bool)
        mask[self.slots[self.is_patch]] = True
        return mask.view(self.features.shape[:2])

    @cached_property
    def base(self) -> Bool[Tensor, "I L"]:
        """Slots of the downscaled base view of an image that has tiles beside it."""
        # Tiles are numbered through the batch, an image's one behind the other, the base view first.
        per_image = torch.bincount(self.image, minlength=self.num_images)[:, None]
        first_tile = per_image.cumsum(0) - per_image
        tile = self.slots.div(self.features.shape[1], rounding_mode="floor")
        return self.is_patch & (tile == first_tile) & (per_image > 1)

    @cached_property
    def rows(self) -> Int[Tensor, "I L"]:
        """Row of the packed grid that each slot lies in, -1 where no newline ends it (base view, no newlines)."""
        # A row begins behind the newline before it; a newline belongs to the row that it ends.
        newline = self.slots == NEWLINE
        row = newline.cumsum(1) - newline.long()

        # Slots behind the last newline lie in no row, and the base view has none, though the first newline follows it.
        ended = row < newline.sum(1, keepdim=True)
        return row.masked_fill(~ended | self.base | (self.slots == PAD), -1)

    def packed(self, values: Float[Tensor, "T N"], fill: float) -> Float[Tensor, "I L"]:
        """Values of encoder tokens in packed order; `fill` at newlines and padding."""
        # Newlines and padding, which are negative, look up token 0 first: their values are overwritten.
        return values.flatten()[self.slots.clamp(min=0)].masked_fill(~self.is_patch, fill)

    def packed_rows(self, rows: Float[Tensor, "T N C"]) -> Float[Tensor, "I L C"]:
        """Rows of a table of encoder tokens in packed order; zero at newlines and padding."""
        table = rows.flatten(0, 1).index_select(0, self.slots.clamp(min=0).flatten()).unflatten(0, self.slots.shape)
        table[~self.is_patch] = 0  # selecting has copied: these are ours to change
        return table

    def unpacked(self, values: Float[Tensor, "I L"], fill: float = 0.0) -> Float[Tensor, "T N"]:
        """Inverse of `packed`: `fill` where a token has no slot."""
        out = values.new_full((self.features.shape[0] * self.features.shape[1],), fill)
        out[self.slots[self.is_patch]] = values[self.is_patch]
        return out.view(self.features.shape[:2])

    def tiles_of(self, keep: Bool[Tensor, "I L"]) -> Bool[Tensor, "T N"]:
        """The keep mask seen from the encoder: which patches of which tile survive."""
        return self.unpacked(keep.float()).bool()
