"""Visual tokens for the tests of methods: images as LLaVA-NeXT packs them, with every field a method may read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from selector import VisualTokens

N, D = 16, 12
TABLES = ("features", "projected", "keys", "hidden", "normed", "layer_keys", "own_keys")
WORDS = ("word_normed", "word_keys")
SCORES = ("cls_attention", "received_attention", "text", "text_attention", "own_text_attention", "rater_attention")
SCORES += ("rater_attention_plus", "mean_query_attention")
LAYERS = ("cls_attention@0", "received_attention@0", "received_attention@1", "received_attention@9")
JOINT = ("joint_cls_attention@-1", "joint_received_attention@-1")


def anyres(seed: int = 0, images: int = 2, dtype: torch.dtype = torch.float32, dim: int = D) -> VisualTokens:
    """Images of a base view and 1 x 2 tiles with newlines, the last column of the grid unpadded."""
    generator = torch.Generator().manual_seed(seed)
    side = int(N**0.5)
    rows = []
    for i in range(images):
        first = 3 * i * N
        slots = list(range(first, first + N))
        for y in range(side):
            slots += [first + (1 + x // side) * N + y * side + x % side for x in range(2 * side - 1)] + [-1]
        rows.append(slots)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(3 * images, N, *size, generator=generator)

    tokens = VisualTokens(
        features=draw(dim).to(dtype),
        grid=(side, side),
        image=torch.arange(images).repeat_interleave(3),
        slots=torch.tensor(rows),
        projected=draw(dim + 2).to(dtype),
        cls_attention=draw().mul(2).softmax(1).to(dtype),
        received_attention=draw().mul(2).softmax(1).to(dtype),
        keys=draw(6).to(dtype),
        text=draw().to(dtype),
        hidden=draw(dim + 2).to(dtype),
        normed=draw(dim + 2).to(dtype),
        word_normed=torch.randn(images, 5, dim + 2, generator=generator).to(dtype),
        word_keys=torch.randn(images, 5, 8, generator=generator).to(dtype),
        text_attention=draw().mul(2).softmax(1).to(dtype),
        own_text_attention=draw().mul(2).softmax(1).to(dtype),
        rater_attention=draw().mul(2).softmax(1).to(dtype),
        rater_attention_plus=draw().to(dtype),
        mean_query_attention=draw().mul(2).softmax(1).to(dtype),
        layer_keys=draw(8).to(dtype),
        own_keys=draw(8).to(dtype),
        question=torch.randn(images, 5, dim + 2, generator=generator).to(dtype),
        question_mask=torch.arange(5)[None] < torch.arange(3, 3 + images).clamp(max=5)[:, None],
        layers={name: draw().mul(2).softmax(1).to(dtype) for name in (*LAYERS, *JOINT)}
        | {"joint_keys@-1": draw(10).to(dtype)},
    )
    return replace(tokens, projected=tokens.projected * tokens.valid[..., None])


def single(features: torch.Tensor, seed: int = 0) -> VisualTokens:
    """Images of one tile without newlines; fields that are not given are drawn, the projected ones are the features."""
    generator = torch.Generator().manual_seed(seed)
    shape = features.shape[:2]
    cls, text, received, *layers = (
        torch.rand(shape, generator=generator).to(features) for _ in range(3 + len(LAYERS) + len(JOINT))
    )
    return VisualTokens.from_features(
        features,
        projected=features,
        keys=features,
        cls_attention=cls,
        received_attention=received,
        text=text,
        hidden=features,
        normed=features,
        word_normed=torch.randn(len(features), 3, features.shape[2], generator=generator).to(features),
        word_keys=torch.randn(len(features), 3, features.shape[2], generator=generator).to(features),
        text_attention=cls.flip(1),
        own_text_attention=received.flip(1),
        rater_attention=text.flip(1),
        rater_attention_plus=cls.roll(1, 1),
        mean_query_attention=received.roll(1, 1),
        layer_keys=features,
        own_keys=features,
        layers=dict(zip((*LAYERS, *JOINT), layers, strict=True)) | {"joint_keys@-1": features},
    )


def changed(tokens: VisualTokens, change: Callable[[torch.Tensor], torch.Tensor], *names: str) -> VisualTokens:
    """The same with `change` made to these fields (all that a method reads of a token if none is named).

    With the keys go the joint ones, with attention that of other layers.
    """
    names = names or (*TABLES, *SCORES)
    fields = {name: change(value) for name in names if (value := getattr(tokens, name)) is not None}
    kinds = tuple(name for name in names if name not in ("features", "projected", "text"))
    layers = {
        name: change(value) if name.removeprefix("joint_").startswith(kinds) and kinds else value
        for name, value in tokens.layers.items()
    }
    return replace(tokens, layers=layers, **fields)


def only(tokens: VisualTokens, i: int) -> VisualTokens:
    """Image i of the batch alone, without the batch's padding."""
    mine = tokens.image == i
    first = int(mine.nonzero()[0]) * tokens.features.shape[1]
    slots = tokens.slots[i : i + 1, : int(tokens.lengths[i])]
    fields = {
        name: None if (value := getattr(tokens, name)) is None else value[mine] for name in (*TABLES, *SCORES)
    } | {"layers": {name: value[mine] for name, value in tokens.layers.items()}}
    image = torch.zeros(int(mine.sum()), dtype=torch.long)
    fields |= {name: None if (value := getattr(tokens, name)) is None else value[i : i + 1] for name in WORDS}
    if tokens.question is not None and tokens.question_mask is not None:
        real = int(tokens.question_mask[i].sum())
        fields |= {
            "question": tokens.question[i : i + 1, :real],
            "question_mask": tokens.question_mask[i : i + 1, :real],
        }
    return VisualTokens(grid=tokens.grid, image=image, slots=torch.where(slots >= 0, slots - first, slots), **fields)


def ragged(seed: int = 0) -> VisualTokens:
    """An image of three tiles with an unpadded column, and one of a single tile, with newlines and padding."""
    both = anyres(seed)
    short = torch.cat([torch.arange(3 * N, 4 * N), torch.tensor([-1])])
    slots = both.slots.clone()
    slots[1] = torch.nn.functional.pad(short, (0, slots.shape[1] - len(short)), value=-2)
    fields = {name: getattr(both, name)[:4] for name in (*TABLES, *SCORES)}
    fields |= {"layers": {name: value[:4] for name, value in both.layers.items()}}
    asked = {name: getattr(both, name) for name in ("question", "question_mask", *WORDS)}
    return VisualTokens(grid=both.grid, image=torch.tensor([0, 0, 0, 1]), slots=slots, **fields, **asked)


def square(side, rows, columns):
    """One image of a base view and `rows` x `columns` tiles of ``side ** 2`` patches, all of them packed."""
    patches, slots = side * side, list(range(side * side))
    for y in range(rows * side):
        tiles = [1 + (y // side) * columns + x // side for x in range(columns * side)]
        slots += [t * patches + (y % side) * side + x % side for x, t in enumerate(tiles)] + [-1]
    tokens = single(torch.randn(1 + rows * columns, patches, 3))
    words = {name: getattr(tokens, name)[:1] for name in WORDS}
    image = torch.zeros(1 + rows * columns, dtype=torch.long)
    return replace(tokens, image=image, slots=torch.tensor([slots]), **words)
