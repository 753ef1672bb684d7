"""Adapters: what differs between vision-language models, one file per model type, and nothing else.

A file is its own registration: ``qwen2_vl.py``, with an `ADAPTER` in it, serves models whose ``config.model_type`` is
``qwen2_vl`` (files that begin with an underscore are shared by several). Other packages add adapters by
`register_adapter`, or by an entry point of the group ``visual_token_selector.adapters`` whose name is the model type
and whose object is the `Adapter`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

from jaxtyping import Int
from torch import Tensor

from selector.tokens import INSIDE, VisualTokens

Relevance = Callable[[VisualTokens, Mapping[str, Any]], Tensor]
"""(tokens, processor outputs) -> ``[T, N]``, how relevant each token is to the prompt; higher is more."""

ENTRY_POINTS = "visual_token_selector.adapters"
"""Group of entry points by which an installed package adds adapters."""


@dataclass(frozen=True)
class Encoded:
    """The images of a batch, encoded once by the model's own code; they can be pruned any number of times.

    Attributes:
        tokens: what a selector reads.
        packed: per image ``[L_i, d]``, the projected tokens in the order in which the language model sees them.
        output: the encoder output object as the model returned it.
        image_token_id: placeholder in ``input_ids`` that each packed token replaces.
        approximate: whether packed tokens are mixtures of encoder tokens, each traced to the nearest of them.
        modality: ``"image"``, or ``"video"`` where each video counts as an image whose frames are its tiles.

    Example:
        >>> import torch
        >>> tokens = VisualTokens.from_features(torch.zeros(2, 4, 3))
        >>> encoded = Encoded(tokens, packed=[torch.zeros(4, 8), torch.zeros(4, 8)], output=None, image_token_id=32000)
        >>> [list(image.shape) for image in encoded.packed], encoded.deepstack  # two images of four tokens
        ([[4, 8], [4, 8]], [])
    """

    tokens: VisualTokens
    packed: list[Tensor]
    output: Any
    image_token_id: int
    approximate: bool = False
    modality: str = "image"

    @property
    def deepstack(self) -> list[list[Tensor]]:
        """Features that layers of the language model add at the visual tokens: per layer and image ``[L_i, d]``.

        Empty for most models; they are cut and merged as their packed tokens are.
        """
        return [list(layer) for layer in getattr(self.output, "deepstack_features", None) or ()]


Encode = Callable[[Any, Mapping[str, Any], frozenset[str], Relevance | None], Encoded]
"""(model, processor outputs, fields that are read, relevance) -> the images, see `Adapter`."""


@dataclass(frozen=True)
class Adapter:
    """What differs between model types.

    Attributes:
        encode: (model, processor outputs, fields of `VisualTokens` that are read, relevance) -> `Encoded`. It must
            work without ``input_ids``, where only the images are asked for.
        positions: where a position id has several axes (M-RoPE): (model, processor outputs) -> ``[3, B, S]``, those of
            the unpruned prompt. None: one axis, which the plug counts.
        rows: arguments of the prompt's own shape ``[B, S]`` beside ids, mask, positions and labels, which the plug
            shortens with the prompt; for each, its value at padding and its value at the tokens of an answer.
        videos: whether `encode` takes ``pixel_values_videos``.
        whole: whether the one view of an image is all of it, squeezed into the grid: nothing cut, cropped or padded.
            Then every patch has its place in the image. LLaVA-NeXT's tiles have theirs by another rule, see
            `selector.measure.evidence`; for all others no evidence is measured and no picture drawn.

    Example:
        >>> from types import SimpleNamespace
        >>> model = SimpleNamespace(config=SimpleNamespace(model_type="paligemma"))
        >>> adapter = adapter_of(model)
        >>> adapter.videos, dict(adapter.rows)  # the token type is 0 at padding, 1 in an answer
        (False, {'token_type_ids': (0, 1)})
    """

    encode: Encode
    positions: Callable[[Any, Mapping[str, Any]], Int[Tensor, "3 B S"]] | None = None
    rows: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    videos: bool = False
    whole: bool = False


_REGISTERED: dict[str, Adapter] = {}


def register_adapter(model_type: str, adapter: Adapter) -> None:
    """Adds an adapter for models whose ``config.model_type`` is `model_type`, or replaces a registered one.

    Raises:
        TypeError: `adapter` is no `Adapter`.
        ValueError: a model type that this package has an adapter for.
    """
    # A shipped one is not replaced: what this repository measured would silently mean something else.
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter must be an Adapter, got {type(adapter).__name__}")
    if model_type in _shipped():
        raise ValueError(f"model_type must be new, {model_type!r} has its adapter in selector/models/{model_type}.py")
    _REGISTERED[model_type] = adapter


def available_adapters() -> list[str]:
    """The model types with an adapter: shipped, registered, or an entry point of an installed package."""
    return sorted({*_shipped(), *_REGISTERED, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def adapter_of(model: Any) -> Adapter:
    """The adapter of a model, by its ``config.model_type``: a shipped, a registered, or an installed one.

    Raises:
        ValueError: there is none.
        TypeError: an entry point that is no adapter.
    """
    return adapter_for(model_type_of(model))


def adapter_for(kind: str) -> Adapter:
    """As `adapter_of`, by the model type alone."""
    # Imported on demand, since an adapter may import its model's code from transformers.
    if kind in _shipped():
        return importlib.import_module(f"selector.models.{kind}").ADAPTER
    if kind in _REGISTERED:
        return _REGISTERED[kind]

    for point in entry_points(group=ENTRY_POINTS, name=kind):
        adapter = point.load()
        if not isinstance(adapter, Adapter):
            raise TypeError(f"entry point {point.value} of {ENTRY_POINTS} must be an Adapter, got {adapter!r}")
        return adapter
    raise ValueError(f"no adapter for models of type {kind!r}; there is one for {', '.join(available_adapters())}")


def model_type_of(model: Any) -> str:
    """The type by which a model's adapter is found; the class's name where its config states none."""
    return str(getattr(model.config, "model_type", type(model).__name__))


def has_visuals(inputs: Mapping[str, Any]) -> bool:
    """Whether processor outputs hold images or videos."""
    # An empty tensor or list counts as none.
    given = (inputs.get(name) for name in ("pixel_values", "pixel_values_videos"))
    return any(pixels is not None and len(pixels) > 0 for pixels in given)


def encode(
    model: Any,
    inputs: Mapping[str, Any],
    needs: Iterable[str] = ("features",),
    relevance: Relevance | None = None,
) -> Encoded | None:
    """Encodes the images in processor outputs with the model's own ``get_image_features``; None without images.

    Args:
        model: of a type with an adapter.
        inputs: processor outputs; ``input_ids`` are needed only by some models and for the question.
        needs: fields of `VisualTokens` that the selectors to come read; only these are computed.
        relevance: computes `text`, for a model that has no text tower beside its vision tower.

    Raises:
        ValueError: a model type without an adapter, a video that it does not take, or a field that this model cannot
            give, or that exists inside the language model alone, by name.
    """
    if not has_visuals(inputs):
        return None

    # Checked here for all adapters, which could only say that their vision tower lacks it.
    wanted = frozenset(needs)
    inside = sorted(INSIDE & wanted)
    if inside:
        raise ValueError(
            f"{', '.join(inside)} exists inside the language model alone, not where images are encoded: selectors that "
            "read it run under select_tokens"
        )

    # And videos: one that takes no videos would encode the images and leave the videos out.
    adapter = adapter_of(model)
    if inputs.get("pixel_values_videos") is not None and not adapter.videos:
        raise ValueError(f"pixel_values_videos: no tokens are selected in videos for a {model_type_of(model)!r} model")
    return adapter.encode(model, inputs, wanted, relevance)


@functools.cache
def _shipped() -> frozenset[str]:
    """Model types that have a file here; listed once, since every pruned prompt asks."""
    return frozenset({info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")})
