"""Models of published sizes with random weights, for measurements that do not depend on what a model has learned.

Nothing is downloaded: the sizes are in `GEOMETRIES`, the classes are those of transformers, and pixels go through the
model's own image processor. Vision tower and projector are whole. The language model, which for a 7B model would be
28 GB, has as many decoder layers as are asked for, by default none, and a vocabulary of a few ids: what all layers cost
follows from the full configuration by the formulas of `selector.measure.flops`.

Times of selection depend on how fast the spectrum of the features falls, and what random weights make of white noise or
of a blank page is far from what a trained tower makes of a photograph. `natural_picture` draws noise whose amplitude
falls as 1/f, as that of natural images does (Field, 1987); through CLIP-L with random weights, 90% of the features'
energy about their mean then lies in about 130 of 1,024 directions. What it is in a run stands in its result.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from selector.errors import UsageError
from selector.shipped import ROOT

WORDS = 64
"""Ids of the vocabulary that is built: no part of what is measured reads more than a few."""
SPECIAL = {
    "image_token_index": 3,
    "image_token_id": 3,
    "video_token_index": 4,
    "video_token_id": 4,
    "vision_start_token_id": 5,
    "vision_end_token_id": 6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Ids within that vocabulary, by the names that configurations have for them."""

CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,  # of 27: LLaVA-OneVision leaves the last one out
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
QWEN25_TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "out_hidden_size": 3584,
}
VICUNA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
}
VICUNA_13B = VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
MISTRAL_7B = VICUNA_7B | {"model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8}
QWEN2_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152000,
}
QWEN25_7B = QWEN2_7B | {
    "model_type": "qwen2_5_vl_text",
    "vocab_size": 152064,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CLIP = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model, and the picture that it is measured on.

    Attributes:
        kind: model type of transformers.
        settings: of its configuration, by the names of transformers.
        size: height and width of the picture in pixels.
        tiles: views that the model makes of such a picture, the base view included.

    Example:
        >>> sizes = GEOMETRIES["llava-next-7b"]
        >>> [config.text_config.num_hidden_layers for config in (sizes.config(), sizes.small_config(1))]
        [32, 1]
    """

    kind: str
    settings: Mapping[str, Any]
    size: tuple[int, int]
    tiles: int

    def config(self) -> PretrainedConfig:
        """The whole model's configuration: what formulas read."""
        return AutoConfig.for_model(self.kind, **copy.deepcopy(dict(self.settings)))

    def small_config(self, layers: int) -> PretrainedConfig:
        """The same with `layers` decoder layers and a vocabulary of `WORDS`: what is built."""
        settings = copy.deepcopy(dict(self.settings))
        settings["text_config"] |= {"num_hidden_layers": layers, "vocab_size": WORDS}

        # Special ids must lie within that vocabulary; a configuration takes those it knows.
        known = AutoConfig.for_model(self.kind)
        places = (settings, known), (settings["text_config"], known.text_config)
        for part, names in places:
            part |= {name: value for name, value in SPECIAL.items() if hasattr(names, name)}
        return AutoConfig.for_model(self.kind, **settings)


def _shipped() -> Geometry:
    """llava-next-tiny, by the configuration of its checkpoint."""
    settings = json.loads((ROOT / "checkpoints" / "llava-next-tiny" / "config.json").read_text(encoding="utf-8"))
    kind = settings.pop("model_type")
    for name in ("architectures", "dtype", "transformers_version"):
        settings.pop(name)
    return Geometry(kind, settings, (192, 192), 5)


def _llava_next(text: Mapping[str, Any]) -> Geometry:
    settings = {"vision_config": CLIP_L, "text_config": text, "image_grid_pinpoints": PINPOINTS, **CLIP}
    return Geometry("llava_next", settings, (672, 672), 5)


GEOMETRIES: dict[str, Geometry] = {
    "llava-next-tiny": _shipped(),
    "llava-next-7b": _llava_next(VICUNA_7B),
    "llava-next-mistral-7b": _llava_next(MISTRAL_7B),
    "llava-next-13b": _llava_next(VICUNA_13B),
    "llava-1.5-7b": Geometry("llava", {"vision_config": CLIP_L, "text_config": VICUNA_7B, **CLIP}, (336, 336), 1),
    "llava-onevision-7b": Geometry(
        "llava_onevision",
        {
            "vision_config": SIGLIP_SO400M,
            "text_config": QWEN2_7B,
            "image_grid_pinpoints": [[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)],
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
        (768, 768),
        5,
    ),
    "qwen2.5-vl-7b": Geometry("qwen2_5_vl", {"vision_config": QWEN25_TOWER, "text_config": QWEN25_7B}, (1008, 1008), 1),
}
"""By name; sizes as in the configurations of the published checkpoints."""


def find_geometry(name: str) -> Geometry:
    """The geometry of that name.

    Raises:
        UsageError: there is none, with the known names.

    Example:
        >>> find_geometry("llava-next-7b").size
        (672, 672)
    """
    if name not in GEOMETRIES:
        close = difflib.get_close_matches(name, GEOMETRIES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"geometry must be one of {', '.join(GEOMETRIES)}, got {name!r}{hint}")
    return GEOMETRIES[name]


def build(
    geometry: Geometry,
    layers: int = 0,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
) -> Any:
    """A model with random weights, in evaluation mode: tower, projector, and some decoder layers.

    Args:
        layers: of the language model; those that are not built are not allocated.
        seed: of the weights, which have the distributions that transformers itself starts from.
        attention: as ``attn_implementation`` of transformers.

    Raises:
        UsageError: more layers than the language model has, or fewer than 0; an unknown kind of attention.
    """
    most = geometry.config().get_text_config().num_hidden_layers
    if not 0 <= layers <= most:
        raise UsageError(f"prefill-layers must be in 0..{most}, the layers of the language model, got {layers}")
    options: dict[str, Any] = {"dtype": dtype}
    if attention is not None:
        options["attn_implementation"] = attention

    # The caller's random numbers go on as if nothing had been drawn.
    device = torch.device(device)
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type="cuda"), device:
        torch.manual_seed(seed)
        try:
            model = AutoModelForImageTextToText.from_config(geometry.small_config(layers), **options)
        except (ValueError, ImportError) as error:  # an implementation that model or machine do not have
            if attention is None:
                raise
            raise UsageError(f"attention {attention!r} cannot be used: {' '.join(str(error).split())}") from error
    return model.eval().requires_grad_(False)


def natural_picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Colour noise whose amplitude falls as 1/f, as that of natural images does."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1 / max(height, width)  # the mean, which is set below

    def plane() -> np.ndarray:
        noise = np.fft.ifft2(np.fft.fft2(generator.standard_normal((height, width))) / frequency).real
        return (noise - noise.mean()) / noise.std()

    # The channels of a photograph are alike: most of each is brightness, which all of them share.
    brightness = plane()
    channels = np.stack([brightness + plane() / 2 for _ in range(3)], -1)
    return Image.fromarray((128 + 45 * channels).clip(0, 255).astype(np.uint8))


def pixels(geometry: Geometry, picture: Image.Image, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the model's own image processor makes of a picture, resized to the geometry's size.

    Returns:
        ``pixel_values`` and what the model wants beside them.
    """
    config, (height, width) = geometry.config(), geometry.size
    vision = config.vision_config
    processors = {
        "llava": "CLIPImageProcessorPil",
        "llava_next": "LlavaNextImageProcessorPil",
        "llava_onevision": "LlavaOnevisionImageProcessorPil",
        "qwen2_5_vl": "Qwen2VLImageProcessorPil",
    }
    settings: dict[str, Any]
    if geometry.kind == "qwen2_5_vl":
        settings = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
        settings["size"] = {"shortest_edge": height * width, "longest_edge": height * width}  # in pixels of area
    elif geometry.kind == "llava_onevision":
        settings = {"size": {"height": vision.image_size, "width": vision.image_size}}
    else:
        side = vision.image_size
        settings = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if hasattr(config, "image_grid_pinpoints"):
        settings["image_grid_pinpoints"] = config.image_grid_pinpoints

    processor = getattr(transformers, processors[geometry.kind])(**settings)
    resized = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    inputs = dict(processor(images=resized, return_tensors="pt").to(device))

    # Some processors give the number of tiles, which the models count by themselves.
    inputs.pop("batch_num_images", None)
    return inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}


def prompt(model: Any, visual: int, words: int) -> dict[str, Tensor]:
    """A prompt of one image between words: ids drawn once, and the mask.

    Args:
        model: as `build` returns it.
        visual: placeholders, one per visual token.
        words: of text, half of them before the image.
    """
    drawn = torch.randint(8, WORDS, (words,), generator=torch.Generator().manual_seed(0))
    image = torch.full((visual,), model.config.image_token_id)
    ids = torch.cat([drawn[: words // 2], image, drawn[words // 2 :]])[None].to(model.device)

    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.model_type == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return inputs
