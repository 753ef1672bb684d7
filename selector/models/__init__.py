"""Adapters: what differs between vision-language models, one file a model type, and nothing else."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from selector.tokens import VisualTokens

Relevance = Callable[[VisualTokens, Mapping[str, Any]], Tensor]
"""(tokens, processor outputs) -> ``[T, N]``, how relevant each token is to the prompt; higher is more."""

_ADAPTERS = {"llava_next": "selector.models.llava_next"}


@dataclass(frozen=True)
class Encoded:
    """The images of a batch, encoded once by the model's own code; can be pruned any number of times.

    Attributes:
        tokens: what a selector reads.
        packed: per image ``[L_i, d]``, the projected tokens in the order in which the language model sees them.
        output: the encoder output object as the model returned it.
        image_token_id: placeholder in ``input_ids`` that each packed token replaces.
    """

    tokens: VisualTokens
    packed: list[Tensor]
    output: Any
    image_token_id: int


def encode(
    model: Any,
    inputs: Mapping[str, Any],
    needs: Iterable[str] = ("features",),
    relevance: Relevance | None = None,
) -> Encoded | None:
    """Encodes the images in processor outputs with the model's own ``get_image_features``; None without images.

    Args:
        needs: fields of `VisualTokens` that the selectors to come read; only these are computed.
        relevance: computes `text`, for a model that has no text tower beside its vision tower.

    Raises:
        ValueError: a model type without an adapter, or a field that this model cannot give, by name.
    """
    if inputs.get("pixel_values") is None or len(inputs["pixel_values"]) == 0:
        return None
    kind = getattr(model.config, "model_type", type(model).__name__)
    if kind not in _ADAPTERS:
        raise ValueError(f"no adapter for models of type {kind!r}; there is one for {', '.join(sorted(_ADAPTERS))}")
    return importlib.import_module(_ADAPTERS[kind]).encode(model, inputs, frozenset(needs), relevance)
