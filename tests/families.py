"""Tiny random models of every family, their prompts as plain tensors, and which family holds which contract.

Nothing is downloaded and no processor is needed: prompts are drawn token by token, images as pixels or patches, and the
number of placeholders follows from the sizes of the pictures (where the model packs, from its own packing).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PretrainedConfig

PAD, BOS, EOS, IMAGE, VIDEO, START, END, GLOBAL, TILE = 0, 1, 2, 60, 61, 62, 63, 64, 65
VOCABULARY = 72

Picture = tuple[int, int, int]
"""(height, width, seed); what a height and a width mean is the family's own."""

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "tie_word_embeddings": False}


def draw(picture: Picture, *shape: int) -> Tensor:
    """Pixels of a picture; equal for equal pictures."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash(picture) % 2**31))


@dataclass(frozen=True)
class Family:
    """How to build a tiny model and what it is fed with.

    Attributes:
        name: what tests and the table call it; `kind` is the model type.
        config: builds its configuration.
        pixels: rows of pictures -> what the processor would give beside the ids.
        wrap: (visual tokens of a picture, picture) -> ids of that picture in the prompt.
        count: (model, picture, whether it is alone in its row) -> its visual tokens.
        sizes: three (height, width), as unlike as the family allows.
        rows: arguments of the prompt's shape: name -> function of the ids.
        cls: whether its tower has a CLS token; keys: whether its attention keys can be read.
    """

    name: str
    kind: str
    config: Callable[[], PretrainedConfig]
    pixels: Callable[[Sequence[Sequence[Picture]]], dict[str, Tensor]]
    count: Callable[[Any, Picture, bool], int]
    sizes: tuple[tuple[int, int], ...] = ((32, 32), (32, 32), (32, 32))
    wrap: Callable[[int, Picture], list[int]] = lambda n, picture: [IMAGE] * n
    rows: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    cls: bool = False
    keys: bool = True
    language: str = "language_model"
    placeholder: int = IMAGE

    @functools.cached_property
    def model(self) -> Any:
        return build(self.config())

    def picture(self, index: int) -> Picture:
        height, width = self.sizes[index % len(self.sizes)]
        return height, width, index

    def batch(self, rows: Sequence[Sequence[Picture]], left: bool = True) -> dict[str, Tensor]:
        """A padded batch: row i has its pictures, text of its own around them, and more text in later rows."""
        return self.prompts([(i, pictures) for i, pictures in enumerate(rows)], left)

    def prompts(self, rows: Sequence[tuple[int, Sequence[Picture]]], left: bool = True) -> dict[str, Tensor]:
        ids = [self._ids(seed, pictures) for seed, pictures in rows]
        width = max(map(len, ids))
        empty = [[PAD] * (width - len(row)) for row in ids]
        table = [e + row if left else row + e for e, row in zip(empty, ids, strict=True)]
        inputs = {"input_ids": torch.tensor(table)}
        inputs["attention_mask"] = (inputs["input_ids"] != PAD).long()
        if any(pictures for _, pictures in rows):
            inputs |= self.pixels([pictures for _, pictures in rows])
        return inputs | {name: rule(inputs["input_ids"]) for name, rule in self.rows.items()}

    def _ids(self, seed: int, pictures: Sequence[Picture]) -> list[int]:
        generator = torch.Generator().manual_seed(seed)

        def words(count: int) -> list[int]:
            return torch.randint(4, 50, (count,), generator=generator).tolist()

        ids = [BOS, *words(2)]
        for picture in pictures:
            count = self.count(self.model, picture, len(pictures) == 1)
            ids += [*self.wrap(count, picture), *words(2 + seed)]
        return ids + words(3)


def build(config: PretrainedConfig) -> Any:
    """A model with random weights that are large enough to see: with the default ones (0.02) parity proves nothing."""
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                fan_in = weight[0].numel() if "embed" not in name else weight.shape[-1]
                scale = (1.6 if "proj" in name else 1.0) / fan_in**0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model


def flat(rows: Sequence[Sequence[Picture]]) -> list[Picture]:
    return [picture for row in rows for picture in row]


def square(rows: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
    """Pictures of one size, one behind the other."""
    return {"pixel_values": torch.stack([draw(picture, 3, 32, 32) for picture in flat(rows)])}


# LLaVA-1.5 and Pixtral


def llava(vision: str) -> PretrainedConfig:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PixtralVisionConfig, SiglipVisionConfig

    tower = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig, "pixtral": PixtralVisionConfig}[vision]
    extra = {"projection_dim": 16} if vision == "clip" else {}
    return LlavaConfig(
        vision_config=tower(**{**TOWER, **({"image_size": 64} if vision == "pixtral" else {})}, **extra),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1 if vision == "pixtral" else -2,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
        **SPECIAL,
    )


def any_size(rows: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
    """Pictures padded to the largest, and their sizes in pixels."""
    pictures = flat(rows)
    height, width = (max(side) for side in zip(*[picture[:2] for picture in pictures], strict=True))
    table = torch.zeros(len(pictures), 3, height, width)
    for own, picture in zip(table, pictures, strict=True):
        own[:, : picture[0], : picture[1]] = draw(picture, 3, *picture[:2])
    return {"pixel_values": table, "image_sizes": torch.tensor([picture[:2] for picture in pictures])}


def broken_rows(count: int, picture: Picture) -> list[int]:
    """Rows of visual tokens with a text token behind each, as Pixtral's processor sets them."""
    columns = picture[1] // 8
    return [token for _ in range(count // columns) for token in (*[IMAGE] * columns, END)]


# LLaVA-OneVision


def onevision() -> PretrainedConfig:
    from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER),
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        image_grid_pinpoints=[[32 * h, 32 * w] for h in (1, 2, 3) for w in (1, 2, 3)],
        **SPECIAL,
    )


def anyres(rows: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
    """Tiles of every picture, padded to the most; several pictures in a row have one tile each."""
    tiles = [
        [draw(p, 1 if len(row) > 1 else 1 + pinpoint(p[0]) * pinpoint(p[1]), 3, 32, 32) for p in row] for row in rows
    ]
    return {
        "pixel_values": torch.nn.utils.rnn.pad_sequence(flat(tiles), batch_first=True),
        "image_sizes": torch.tensor([picture[:2] for picture in flat(rows)]),
        "batch_num_images": torch.tensor([len(row) for row in rows]),
    }


def pinpoint(side: int) -> int:
    """Tiles along a side that is at most three tiles long."""
    return -(-side // 32)


def packed_count(model: Any, picture: Picture, alone: bool) -> int:
    """Visual tokens of a picture, newlines included, by the model's own packing of tiles without content."""
    height, width, _ = picture
    tiles = 1 + pinpoint(height) * pinpoint(width) if alone else 1
    base, size = model.base_model, torch.tensor([[height, width]])
    limit = getattr(model.config, "vision_aspect_ratio", None) or model.config.vision_feature_select_strategy
    names = inspect.signature(base.pack_image_features).parameters
    name = "vision_aspect_ratio" if "vision_aspect_ratio" in names else "vision_feature_select_strategy"
    tiles = [torch.zeros(tiles, 16, 1)]
    (packed,), _ = base.pack_image_features(tiles, size, image_newline=torch.zeros(1), **{name: limit})
    return len(packed)


def packed_alone(model: Any, picture: Picture, alone: bool) -> int:
    """The same where other pictures of the row change nothing."""
    return packed_count(model, picture, True)


# Qwen


def qwen(kind: str) -> PretrainedConfig:
    from transformers import AutoConfig

    text = {**TEXT, "num_attention_heads": 4, "head_dim": 12}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    vision: dict[str, Any] = {"depth": 3, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "in_channels": 3}
    vision |= {
        "qwen2_vl": {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2},
        "qwen2_5_vl": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 48,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        "qwen3_vl": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 48,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
    }[kind]
    return AutoConfig.for_model(
        kind,
        vision_config=vision,
        text_config={**text, "rope_parameters": rope, "rope_scaling": rope},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        **SPECIAL,
    )


def patches(rows: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
    """Patches of every picture, one behind the other, and how many rows and columns of them there are."""
    pictures = flat(rows)
    grids = [(1, height // 4, width // 4) for height, width, _ in pictures]
    drawn = [draw(p, h * w, 3 * 2 * 4 * 4) for p, (_, h, w) in zip(pictures, grids, strict=True)]
    return {"pixel_values": torch.cat(drawn), "image_grid_thw": torch.tensor(grids)}


def wrapped(count: int, picture: Picture) -> list[int]:
    return [START, *[IMAGE] * count, END]


def is_image(ids: Tensor) -> Tensor:
    return (ids == IMAGE).long()


# InternVL, Idefics3 and SmolVLM: square tiles, blocks of patches to a visual token, the whole image last


def internvl() -> PretrainedConfig:
    from transformers import InternVLConfig, Qwen2Config
    from transformers.models.internvl import InternVLVisionConfig

    return InternVLConfig(
        vision_config=InternVLVisionConfig(**TOWER),
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
        **SPECIAL,
    )


def idefics(kind: str) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        kind,
        vision_config={**TOWER, "num_channels": 3},
        text_config={**TEXT, "model_type": "llama"},
        image_token_id=IMAGE,
        scale_factor=2,
        **SPECIAL,
    )


def tiles_of(picture: Picture) -> int:
    """Tiles of a picture whose sides are given in tiles, with the whole image where there are several."""
    count = picture[0] * picture[1]
    return count + (count > 1)


def tiled(rows: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
    """The tiles of all pictures, one behind the other."""
    return {"pixel_values": torch.cat([draw(picture, tiles_of(picture), 3, 32, 32) for picture in flat(rows)])}


def tiled_by_row(rows: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
    """The tiles of the pictures of each row, filled up with blank ones."""
    tiles = [torch.cat([torch.zeros(0, 3, 32, 32), *[draw(p, tiles_of(p), 3, 32, 32) for p in row]]) for row in rows]
    return {"pixel_values": torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True)}


def named_tiles(count: int, picture: Picture) -> list[int]:
    """Every tile behind a token that names it, the whole image last."""
    tiles = tiles_of(picture)
    names = [GLOBAL - 1 if tile < tiles - 1 else GLOBAL for tile in range(tiles)]
    return [token for name in names for token in (START, name, *[IMAGE] * (count // tiles))] + [START]


# Gemma's relatives


def paligemma() -> PretrainedConfig:
    from transformers import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

    return PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**TOWER),
        text_config=GemmaConfig(**TEXT, head_dim=12),
        image_token_index=IMAGE,
        vocab_size=VOCABULARY,
        projection_dim=48,
        hidden_size=48,
        **SPECIAL,
    )


def gemma3() -> PretrainedConfig:
    from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

    return Gemma3Config(
        vision_config=SiglipVisionConfig(**TOWER),
        text_config=Gemma3TextConfig(**TEXT, head_dim=12, sliding_window=512, query_pre_attn_scalar=12),
        mm_tokens_per_image=4,
        boi_token_index=START,
        eoi_token_index=END,
        image_token_index=IMAGE,
        **SPECIAL,
    )


def mistral3() -> PretrainedConfig:
    from transformers import Mistral3Config, MistralConfig, PixtralVisionConfig

    return Mistral3Config(
        vision_config=PixtralVisionConfig(**{**TOWER, "image_size": 64, "patch_size": 4}),
        text_config=MistralConfig(**TEXT, head_dim=12),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        spatial_merge_size=2,
        **SPECIAL,
    )


# LLaVA-NeXT-Video


def next_video() -> PretrainedConfig:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig

    return LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**TOWER, projection_dim=16),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=[[32 * h, 32 * w] for h in (1, 2, 3) for w in (1, 2, 3)],
        **SPECIAL,
    )


def frames(rows: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
    """Three frames of every video."""
    return {"pixel_values_videos": torch.stack([draw(picture, 3, 3, 32, 32) for picture in flat(rows)])}


def sized_tiles(rows: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
    """Tiles of every picture, padded to the most, whatever else is in its row."""
    return {name: anyres([[picture] for picture in flat(rows)])[name] for name in ("pixel_values", "image_sizes")}


QWEN: dict[str, Any] = {
    "pixels": patches,
    "count": lambda _, p, alone: p[0] * p[1] // 64,
    "sizes": ((32, 48), (16, 24), (40, 16)),
    "wrap": wrapped,
    "rows": {"mm_token_type_ids": is_image},
    "keys": False,
}

IDEFICS: dict[str, Any] = {
    "pixels": tiled_by_row,
    "count": lambda _, p, alone: 4 * tiles_of(p),
    "sizes": ((2, 2), (1, 1), (2, 3)),
    "wrap": named_tiles,
    "language": "text_model",
}

FAMILIES = [
    Family("LLaVA-1.5 (CLIP)", "llava", lambda: llava("clip"), square, lambda *_: 16, cls=True),
    Family("LLaVA-1.5 (SigLIP)", "llava", lambda: llava("siglip"), square, lambda *_: 16),
    Family(
        "LLaVA-OneVision",
        "llava_onevision",
        onevision,
        anyres,
        packed_count,
        sizes=((90, 80), (40, 90), (20, 30)),
    ),
    Family("Qwen2-VL", "qwen2_vl", lambda: qwen("qwen2_vl"), **QWEN),
    Family("Qwen2.5-VL", "qwen2_5_vl", lambda: qwen("qwen2_5_vl"), **QWEN),
    Family("Qwen3-VL", "qwen3_vl", lambda: qwen("qwen3_vl"), **QWEN),
    Family(
        "InternVL",
        "internvl",
        internvl,
        tiled,
        lambda _, p, alone: 4 * tiles_of(p),
        sizes=((2, 2), (2, 1), (2, 3)),
        wrap=wrapped,
        cls=True,
    ),
    Family("Idefics3", "idefics3", lambda: idefics("idefics3"), **IDEFICS),
    Family("SmolVLM", "smolvlm", lambda: idefics("smolvlm"), **IDEFICS),
    Family(
        "PaliGemma",
        "paligemma",
        paligemma,
        square,
        lambda *_: 16,
        rows={"token_type_ids": lambda ids: 0 * is_image(ids)},
    ),
    Family("Gemma 3", "gemma3", gemma3, square, lambda *_: 4, wrap=wrapped, rows={"token_type_ids": is_image}),
    Family(
        "Mistral 3",
        "mistral3",
        mistral3,
        any_size,
        lambda _, p, alone: p[0] * p[1] // 64,
        sizes=((32, 48), (24, 32), (40, 16)),
        wrap=broken_rows,
        keys=False,
    ),
    Family(
        "Pixtral",
        "llava",
        lambda: llava("pixtral"),
        any_size,
        lambda _, p, alone: p[0] * p[1] // 64,
        sizes=((32, 48), (24, 32), (40, 16)),
        wrap=broken_rows,
        keys=False,
    ),
    Family(
        "LLaVA-NeXT-Video (images)",
        "llava_next_video",
        next_video,
        sized_tiles,
        packed_alone,
        sizes=((90, 80), (40, 90), (20, 30)),
        cls=True,
    ),
    Family(
        "LLaVA-NeXT-Video (videos)",
        "llava_next_video",
        next_video,
        frames,
        lambda *_: 12,
        wrap=lambda count, _: [VIDEO] * count,
        cls=True,
        placeholder=VIDEO,
    ),
]

CONTRACTS = {
    "keep all": "with everything kept, logits and generated ids equal the plain model's bit for bit",
    "pruned": "generation equals a cache-free loop over the kept embeddings, at two budgets, with two images",
    "batches": "a padded batch of one image, two images and none equals its rows one by one",
    "beams": "beams and several sequences of such a batch equal those of its rows",
    "text only": "a prompt without images passes through untouched",
    "measured": "an answer read in one pass, as `selector compare` does, has the logits with which it was generated",
    "labels": "loss and gradients, which reach the vision tower",
    "selectors": "every shipped selector runs, or is refused by the name of the field that this family lacks",
    "unknown arguments": "an argument of the prompt's length that nobody shortens is refused by name",
}
"""What the tests of `every` family hold; a family that could not would have to leave `FAMILIES`."""


def markdown() -> str:
    """The table of families and contracts, as selector/models/README.md has it."""
    lines = [
        "| family | model type | " + " | ".join(CONTRACTS) + " | CLS attention | keys, received attention |",
        "|---" * (len(CONTRACTS) + 4) + "|",
    ]
    for family in FAMILIES:
        held = ["yes"] * len(CONTRACTS)
        gives = ["yes" if there else "no" for there in (family.cls, family.keys)]
        lines.append(f"| {family.name} | `{family.kind}` | " + " | ".join(held + gives) + " |")
    return "\n".join(lines) + "\n"
