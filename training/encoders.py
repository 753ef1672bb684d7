"""Frozen vision encoders behind one wrapper: an image becomes pixel tiles, pixel tiles become patch features.

Whatever the encoder, ``preprocess`` is the encoder's own, with the mean, std and input size of its processor or its
pretrained configuration, and ``forward`` returns what a selector will read at inference: the hidden states of one
layer, patches in row-major order, without prefix tokens (CLS, registers).

    LlavaNextEncoder      the tower inside a LLaVA-NeXT; images become AnyRes tiles exactly as its processor makes them
    LlavaNextModel        a whole LLaVA-NeXT, for a selector that learns from its answers
    TransformersEncoder   CLIP, SigLIP, DINOv2, ViT, ... from a model folder (or a hub name)
    TimmEncoder           any timm model with patch features

Shapes: T tiles, H x W pixels, N = h * w patches, D encoder width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from selector.commands.loading import find_folder
from selector.measure.identity import fingerprint, fingerprint_of
from selector.models import Encoded, encode
from selector.table import Inputs
from training.conversations import Conversation, Converse

Preprocess = Callable[[Image.Image], Tensor]
"""An RGB image to its pixel tiles ``[T, 3, H, W]``; picklable, so that loader workers can run it."""
Precision = Literal["float32", "bfloat16", "float16"]
"""Type of a frozen encoder's weights, and so of its arithmetic."""


class VisionEncoder(nn.Module, ABC):
    """A frozen encoder: always in evaluation mode, never in a checkpoint, never with gradients.

    It computes in a precision of its own, which the trainer's does not change: features are the same whether they are
    encoded on the fly or read from a cache. `fingerprint` and cache tell precisions apart.

    Attributes:
        preprocess: image to pixel tiles.
        grid: (h, w), rows and columns of patches in a tile.
        dim: D, width of the features.
        name: its name in a model card.
        dtype: type of its weights.

    A new kind of encoder needs its preprocessing, a name, and `encode`; grid and width are measured.

    >>> class Colours(VisionEncoder):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.name, self.preprocess = "mean colours", lambda image: torch.zeros(1, 3, 32, 32)
    ...         self._freeze()
    ...
    ...     def encode(self, pixels):
    ...         self.grid = (4, 4)
    ...         return nn.functional.avg_pool2d(pixels, 8).flatten(2).mT
    >>> encoder = Colours()
    >>> encoder.grid, encoder.num_patches, encoder.dim
    ((4, 4), 16, 3)
    """

    preprocess: Preprocess
    grid: tuple[int, int]
    dim: int
    name: str
    dtype: Precision = "float32"

    def _freeze(self, dtype: Precision = "float32") -> None:
        """Call at the end of a constructor: freezes the weights and measures grid and width on one blank image."""
        if dtype not in get_args(Precision):
            raise ValueError(f"dtype must be one of {get_args(Precision)}, got {dtype!r}")

        # A plain attribute: part of the key under which features are cached, see `encoder_identity`.
        self.dtype = dtype
        self.to(getattr(torch, dtype))
        self.requires_grad_(False)
        super().train(False)

        # Measured rather than read from a configuration, where every family of models has other names for them.
        features = self(self.preprocess(Image.new("RGB", (64, 64)))[:1])
        self.dim = features.shape[-1]

    @abstractmethod
    def encode(self, pixels: Float[Tensor, "T 3 H W"]) -> Float[Tensor, "T N D"]:
        """Patch features ``[T, N, D]`` of tiles ``[T, 3, H, W]``, both in the type of the weights; sets `grid`."""

    def forward(self, pixels: Float[Tensor, "T 3 H W"]) -> Float[Tensor, "T N D"]:
        """`encode` in inference mode and in the encoder's own precision; the features are float32."""
        # Without autocast, which would cast all frozen weights again in every step: it remembers casts only of weights
        # that are trained.
        with torch.inference_mode(), torch.autocast(pixels.device.type, enabled=False):
            features = self.encode(pixels.to(getattr(torch, self.dtype)))

        # A copy made out here is a normal tensor. The backward pass of what reads the features has to keep them, which
        # is an error with tensors of inference mode.
        return features.to(torch.float32, copy=True)

    def project(self, features: Float[Tensor, "T N D"]) -> Float[Tensor, "T N d"]:
        """The features ``[T, N, d]`` as a language model sees them.

        Raises:
            ValueError: the encoder does not belong to a vision-language model.
        """
        raise ValueError(f"{self.name} has no projector: a selector of its features needs model.inputs features")

    def width_of(self, inputs: Inputs) -> int:
        """Number of channels that a selector with these inputs reads per token."""
        if inputs == "features":
            return self.dim

        blank = torch.zeros(1, self.num_patches, self.dim, device=next(self.parameters()).device)
        projected = self.project(blank).shape[-1]
        return projected if inputs == "projected" else self.dim + projected

    @property
    def num_patches(self) -> int:
        """N, patches per tile."""
        return self.grid[0] * self.grid[1]

    def train(self, mode: bool = True) -> VisionEncoder:
        """Stays in evaluation mode, whatever `mode` is: Lightning calls this for the whole module."""
        return super().train(False)

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Empty: the weights are in the encoder's own files, and a training checkpoint does not copy them."""
        return {} if destination is None else destination

    def fingerprint(self) -> str:
        """A hash of the weights, to check that a run is resumed with the encoder that it was started with."""
        return fingerprint_of(nn.Module.state_dict(self))  # its own `state_dict` is empty

    def _without_prefix(self, hidden: Tensor, pixels: Tensor, patch: int) -> Tensor:
        """Drops the tokens before the patches, and sets `grid` from the size of the pixels."""
        # How many they are differs (CLS, registers, a distillation token), but patches always come last.
        height, width = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        prefix = hidden.shape[1] - height * width
        if prefix < 0:
            raise ValueError(
                f"encoder {self.name}: {hidden.shape[1]} tokens for {height} x {width} patches of {patch} pixels"
            )
        self.grid = (height, width)
        return hidden[:, prefix:]


class LlavaNextEncoder(VisionEncoder):
    """The tower of a LLaVA-NeXT: its feature layer, its prefix rule, its AnyRes tiles (base view and high resolution).

    The language model's layers are not loaded.

    Args:
        path: folder (or hub name) of the LLaVA-NeXT, with its processor.
        backend: backend of the image processor; "pil" gives the same pixels everywhere.
        dtype: type of the frozen weights; the selector itself stays in float32.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: another kind of model, one that joins several layers, or one without weights for its tower.

    >>> encoder = LlavaNextEncoder("checkpoints/llava-next-tiny")
    >>> tiles = encoder.preprocess(Image.new("RGB", (192, 96)))  # the base view and two tiles
    >>> features = encoder(tiles)
    >>> tiles.shape, features.shape, encoder.project(features).shape
    (torch.Size([3, 3, 96, 96]), torch.Size([3, 144, 160]), torch.Size([3, 144, 192]))
    """

    def __init__(self, path: str, backend: str = "pil", dtype: Precision = "float32"):
        super().__init__()
        from transformers import AutoProcessor

        path = find_model(path, "path")
        model, report = without_language_layers(path)
        config = model.config
        if not isinstance(config.vision_feature_layer, int):
            raise ValueError(f"vision_feature_layer must be one layer, {path!r} has {config.vision_feature_layer}")

        # transformers fills missing weights with random ones and only warns.
        missing = [name for name in report["missing_keys"] if "vision_tower" in name]
        if missing:
            raise ValueError(
                f"{path!r} lacks {len(missing)} weights of its vision tower, the first {sorted(missing)[0]}"
            )

        self.path, self.backend = path, backend
        self.name = f"{Path(path).name} vision tower, layer {config.vision_feature_layer}"
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        self.layer = config.vision_feature_layer
        self.prefix = 1 if config.vision_feature_select_strategy == "default" else 0
        self.patch = config.vision_config.patch_size
        self.preprocess = ProcessorTiles(AutoProcessor.from_pretrained(path, backend=backend).image_processor)
        self._freeze(dtype)

    def fingerprint(self) -> str:
        """A hash of the tower alone: the features depend on nothing else."""
        return fingerprint(self.tower)

    def encode(self, pixels: Float[Tensor, "T 3 H W"]) -> Float[Tensor, "T N D"]:
        """The tower's hidden states at the layer that the LLaVA-NeXT reads."""
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[self.layer][:, self.prefix :]
        self.grid = (pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch)
        return hidden

    def project(self, features: Float[Tensor, "T N D"]) -> Float[Tensor, "T N d"]:
        """The features through the multimodal projector, in float32."""
        return _projected(self.projector, features, self.dtype)


class LlavaNextModel(VisionEncoder):
    """A whole LLaVA-NeXT, frozen: its tower as above, and its language model to learn from.

    Args:
        path: folder (or hub name) of the LLaVA-NeXT, with its processor.
        backend: backend of the image processor; "pil" gives the same pixels everywhere.
        dtype: type of the frozen weights; the selector itself stays in float32.
        gradient_checkpointing: recompute the activations of the language model's layers in the backward pass instead of
            keeping them, which saves memory and takes longer.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder holds another kind of model.

    >>> model = LlavaNextModel("checkpoints/llava-next-tiny")
    >>> asked = model.converse(Image.new("RGB", (192, 96)), [("what is TAX?", None)])
    >>> tokens = model.encoded(asked, frozenset({"features"})).tokens
    >>> tokens.features.shape, tokens.slots.shape  # 3 tiles of 144 patches, and 12 newlines
    (torch.Size([3, 144, 160]), torch.Size([1, 444]))
    """

    def __init__(
        self,
        path: str,
        backend: str = "pil",
        dtype: Precision = "float32",
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        from transformers import AutoConfig, AutoProcessor, LlavaNextForConditionalGeneration

        path = find_model(path, "path")
        if (kind := AutoConfig.from_pretrained(path).model_type) != "llava_next":
            raise ValueError(f"path must hold a LLaVA-NeXT, got {path!r} of type {kind!r}")
        with _quiet():
            loaded: Any = LlavaNextForConditionalGeneration
            self.model: Any = loaded.from_pretrained(path, dtype=getattr(torch, dtype))

        processor = AutoProcessor.from_pretrained(path, backend=backend)
        config = self.model.config

        # Plain attributes are part of the key under which features are cached, see `encoder_identity`.
        self.path, self.backend = path, backend
        self.gradient_checkpointing = gradient_checkpointing
        self.name = f"{Path(path).name}, layer {config.vision_feature_layer}"
        self.layer, self.patch = config.vision_feature_layer, config.vision_config.patch_size
        self.prefix = 1 if config.vision_feature_select_strategy == "default" else 0
        self.preprocess = ProcessorTiles(processor.image_processor)
        self.converse = Converse(processor, config.image_token_id)

        # Not the reentrant kind: it has no gradient where a layer's input has none, and gates come in by the mask.
        if gradient_checkpointing:
            self.model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        self._freeze(dtype)

    def fingerprint(self) -> str:
        """A hash of the whole model, the same that the records of a comparison name."""
        return fingerprint(self.model)

    @property
    def question_dim(self) -> int:
        """Width of the embeddings of a question's tokens."""
        return self.model.get_input_embeddings().weight.shape[1]

    def encode(self, pixels: Float[Tensor, "T 3 H W"]) -> Float[Tensor, "T N D"]:
        """As of `LlavaNextEncoder`."""
        hidden = self.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[self.layer]
        self.grid = (pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch)
        return hidden[:, self.prefix :]

    def project(self, features: Float[Tensor, "T N D"]) -> Float[Tensor, "T N d"]:
        """The features through the multimodal projector, in float32."""
        return _projected(self.model.model.multi_modal_projector, features, self.dtype)

    @torch.no_grad()
    def encoded(self, conversation: Conversation, needs: frozenset[str]) -> Encoded:
        """The image of a conversation, encoded by the model's own code.

        Args:
            conversation: on the model's device.
            needs: what the selector reads, see `TokenSelector.needs`; the question is left to the caller.
        """
        # Not inference mode: the student's backward pass keeps these tokens, where their gates mix them with noise.
        encoded = encode(self.model, {**conversation.pixels, "input_ids": None}, needs - {"question"})
        assert encoded is not None  # for the type checker: there are pixels
        return encoded


class TransformersEncoder(VisionEncoder):
    """A vision model of transformers (CLIP, SigLIP, DINOv2, DINOv3, ViT, ...), or the vision half of a dual encoder.

    Args:
        path: folder (or hub name) with config, weights and image processor.
        layer: entry of ``hidden_states``; None takes the last hidden state, after the model's final norm if it has one.
        backend: backend of the image processor; "pil" gives the same pixels everywhere.
        dtype: type of the frozen weights; the selector itself stays in float32.

    Raises:
        FileNotFoundError: no such folder.

    >>> from transformers import ViTConfig, ViTImageProcessorPil, ViTModel
    >>> config = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    >>> ViTModel(config).save_pretrained("vit")
    >>> _ = ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained("vit")
    >>> encoder = TransformersEncoder("./vit", layer=-2)
    >>> encoder.grid, encoder(encoder.preprocess(Image.new("RGB", (300, 200)))).shape
    ((4, 4), torch.Size([1, 16, 8]))
    """

    def __init__(self, path: str, layer: int | None = None, backend: str = "pil", dtype: Precision = "float32"):
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        path = find_model(path, "path")
        with _quiet():
            model = AutoModel.from_pretrained(path, dtype=torch.float32)
            self.preprocess = ProcessorTiles(AutoImageProcessor.from_pretrained(path, backend=backend))
        self.path, self.layer, self.backend = path, layer, backend
        self.name = f"{Path(path).name}, layer {'last' if layer is None else layer}"

        # CLIP and SigLIP are dual encoders, others are a vision model alone.
        self.model = getattr(model, "vision_model", model)
        config = getattr(model.config, "vision_config", model.config)
        self.patch = config.patch_size
        self._freeze(dtype)

    def encode(self, pixels: Float[Tensor, "T 3 H W"]) -> Float[Tensor, "T N D"]:
        """The hidden states of the chosen layer."""
        out = self.model(pixel_values=pixels, output_hidden_states=self.layer is not None)
        hidden = out.last_hidden_state if self.layer is None else out.hidden_states[self.layer]
        return self._without_prefix(hidden, pixels, self.patch)


class TimmEncoder(VisionEncoder):
    """A timm model; convolutional ones (ConvNeXt, Swin) too, whose last feature map is the grid.

    Args:
        name: timm's model name, such as ``vit_base_patch16_clip_224.openai``.
        pretrained: download timm's weights (True) or start from random ones (False); there is no default, so that
            nothing is downloaded, and no untrained encoder used, by accident.
        layer: block whose output is taken; negative counts from the end.
        norm: apply the model's final norm; None does so for the last block only.
        image_size: side of the input in pixels; None takes the model's own.
        dtype: type of the frozen weights; the selector itself stays in float32.

    Raises:
        ValueError: timm does not know the name.

    >>> encoder = TimmEncoder("test_vit", pretrained=False)
    >>> encoder(encoder.preprocess(Image.new("RGB", (300, 200)))).shape
    torch.Size([1, 100, 64])
    """

    def __init__(
        self,
        name: str,
        pretrained: bool,
        layer: int = -1,
        norm: bool | None = None,
        image_size: int | None = None,
        dtype: Precision = "float32",
    ):
        super().__init__()
        import timm
        from timm.data.config import resolve_model_data_config
        from timm.data.transforms_factory import create_transform

        if not timm.is_model(name):
            raise ValueError(f"name must be a timm model, got {name!r}; timm.list_models('*{name[:4]}*') lists some")

        sized: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
        self.model = timm.create_model(name, pretrained=pretrained, num_classes=0, **sized)

        # A block before the last was never trained to be read through the final norm.
        self.layer, self.norm = layer, layer == -1 if norm is None else norm
        self.name = f"timm {name}{'' if pretrained else ' (random weights)'}, block {layer}"

        data = resolve_model_data_config(self.model)
        if image_size is not None:
            data["input_size"] = (3, image_size, image_size)
        # A selector sees the whole image, squeezed into a square, not the centre crop of a classifier.
        data |= {"crop_pct": 1.0, "crop_mode": "squash"}
        transform: Any = create_transform(**data, is_training=False)
        self.preprocess = TransformTiles(transform)
        self._freeze(dtype)

    def encode(self, pixels: Float[Tensor, "T 3 H W"]) -> Float[Tensor, "T N D"]:
        """The feature map of the chosen block, as a row of patches."""
        blocks = getattr(self.model, "blocks", None)
        index = self.layer + len(blocks) if blocks is not None and self.layer < 0 else self.layer
        options: Any = {"indices": [index], "norm": self.norm, "output_fmt": "NCHW", "intermediates_only": True}
        (features,) = cast("Any", self.model).forward_intermediates(pixels, **options)
        self.grid = (features.shape[-2], features.shape[-1])
        return features.flatten(2).transpose(1, 2)


class ProcessorTiles:
    """The tiles of an image by an image processor of transformers; one tile where it makes no tiles.

    Args:
        processor: an image processor of transformers.

    >>> from training.testbed.vocabulary import build_processor
    >>> tiles = ProcessorTiles(build_processor().image_processor)
    >>> tiles(Image.new("RGB", (192, 96))).shape  # the base view, then the two halves
    torch.Size([3, 3, 96, 96])
    """

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, image: Image.Image) -> Float[Tensor, "T 3 H W"]:
        pixels = self.processor(images=[image], return_tensors="pt")["pixel_values"]
        return pixels[0] if pixels.ndim == 5 else pixels  # AnyRes: [1, T, 3, H, W]


class TransformTiles:
    """One tile per image, by a torchvision transform.

    Args:
        transform: an RGB image to pixels ``[3, H, W]``.

    >>> TransformTiles(lambda image: torch.zeros(3, 4, 4))(Image.new("RGB", (8, 8))).shape
    torch.Size([1, 3, 4, 4])
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor]):
        self.transform = transform

    def __call__(self, image: Image.Image) -> Float[Tensor, "1 3 H W"]:
        return self.transform(image)[None]


def without_language_layers(path: str) -> tuple[Any, dict[str, Any]]:
    """A LLaVA-NeXT whose language model has no layers, on the CPU, and transformers' report on its weights.

    A 7B model's tower and embeddings fit where its language model does not.

    Raises:
        ValueError: the folder holds another kind of model.
    """
    from transformers import AutoConfig, LlavaNextForConditionalGeneration

    config = AutoConfig.from_pretrained(path)
    if config.model_type != "llava_next":
        raise ValueError(f"path must hold a LLaVA-NeXT, got {path!r} of type {config.model_type!r}")

    config.text_config.num_hidden_layers = 0
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = []
    with _quiet():
        options: dict[str, Any] = {"config": config, "dtype": torch.float32, "output_loading_info": True}
        loaded: Any = LlavaNextForConditionalGeneration.from_pretrained(path, **options)
    return loaded


def _projected(projector: nn.Module, features: Float[Tensor, "T N D"], dtype: Precision) -> Float[Tensor, "T N d"]:
    """Features through a frozen projector, in its own precision as in `VisionEncoder.forward`."""
    with torch.inference_mode(), torch.autocast(features.device.type, enabled=False):
        projected = projector(features.to(getattr(torch, dtype)))
    return projected.to(torch.float32, copy=True)


class _quiet:
    """Silences the loading report of transformers: layers left out on purpose are listed there as unexpected."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.verbosity, self.bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.verbosity)
        if self.bars:
            logging.enable_progress_bar()


def find_model(path: str, argument: str) -> str:
    """A model folder below the current folder, else one that ships with the package, else a hub name.

    A path that looks local must exist; otherwise it would be taken for a hub name and fail obscurely.
    """
    local = path.startswith((".", "/", "~")) or path.count("/") != 1 or path.split("/")[0] == "checkpoints"
    folder = find_folder(path)
    if local and folder is None:
        raise FileNotFoundError(f"{argument} must be a model folder, got {path!r}, which does not exist")
    return path if folder is None else str(folder)
