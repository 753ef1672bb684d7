"""What adapters share whose models have a vision tower with queries and keys, and a projector behind it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from selector.models import Relevance, model_type_of
from selector.models.llava_next import (
    HEARD,
    _listening,
    _quantity,
    _read,
    _setting,
    _with_projected,
    _with_question,
)
from selector.tokens import VisualTokens

ALWAYS = frozenset({"features", "projected", "text", "question"})
"""Fields of `VisualTokens` that every adapter here gives (`text` where the caller gives a relevance)."""


def check_needs(
    model: Any, needs: frozenset[str], attention: frozenset[str], why: str, relevance: Relevance | None
) -> None:
    """Refuses, by name, what this model cannot give.

    Args:
        model: named in the error.
        needs: fields that the selectors read.
        attention: what the model gives of `HEARD` beside `ALWAYS`, of its feature layer and of any other.
        why: the reason why the rest of `HEARD` is missing.
        relevance: see `selector.models.encode`.

    Raises:
        ValueError: something else is needed, or ``text`` without a relevance.
    """
    kind, gives = model_type_of(model), ALWAYS | attention

    # Before anything runs: an encoder call of a large model is too long to end in this error.
    missing = sorted(need for need in needs if need not in gives and _quantity(need) not in attention)
    if missing:
        instead = "; selectors that read attention take attention=received" if "received_attention" in gives else ""
        raise ValueError(
            f"a {kind!r} model gives no {', '.join(missing)} to a selector ({why}); it gives {sorted(gives)}{instead}"
        )

    if "text" in needs and relevance is None:
        raise ValueError(
            f"text: a {kind!r} model has no text tower to compare visual tokens with; pass relevance=, a function "
            "(tokens, inputs) -> [tiles, patches]"
        )


def feature_layer(model: Any, inputs: Mapping[str, Any]) -> int:
    """The one hidden state of the tower that the projector reads, from the call or else from the checkpoint.

    Raises:
        ValueError: several of them.
    """
    layer = _setting(inputs, model.config, "vision_feature_layer")
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer must be one layer for selection, got {layer}")
    return layer


def prefix_of(model: Any, inputs: Mapping[str, Any]) -> int:
    """Tokens before the patches that the model itself cuts off: 1 (CLS) or 0."""
    return 1 if _setting(inputs, model.config, "vision_feature_select_strategy") == "default" else 0


def encoder_output(model: Any, inputs: Mapping[str, Any], modality: str = "image") -> Any:
    """The output of the model's own encoding, called with whatever it takes of the inputs."""
    # By its signature: models add arguments of their own (image_sizes, grids), and refuse those of others.
    encoder = getattr(model.base_model, f"get_{modality}_features")
    names = inspect.signature(encoder).parameters
    return encoder(**{name: inputs[name] for name in names if inputs.get(name) is not None}, return_dict=True)


@contextmanager
def overheard(tower: Any, layer: int, prefix: int, needs: frozenset[str]) -> Iterator[dict[str, Tensor]]:
    """Reads attention ``[T, patches]`` and keys ``[T, patches, k]`` off a tower that runs within the block.

    Args:
        tower: the vision tower.
        layer: the feature layer, which fields without ``@`` are of.
        prefix: tokens before the patches, which the fields leave out.
        needs: fields that the selectors read; others than `HEARD` are ignored.

    Yields:
        The values by field name: empty while the tower runs, filled when the block has ended.

    Raises:
        ValueError: the tower has no such attention, or normalises its queries and keys behind the projections.
    """
    wanted: frozenset[str] = frozenset(need for need in needs if _quantity(need) in HEARD)
    fields: dict[str, Tensor] = {}

    # The hooks hear what the projections return; a norm behind them would make other queries and keys of it. Some
    # towers keep an identity in its place, which changes nothing.
    if wanted and any(isinstance(getattr(part, "q_norm", None), torch.nn.Module) for part in tower.modules()):
        norms = [part.q_norm for part in tower.modules() if hasattr(part, "q_norm")]
        if any(not isinstance(norm, torch.nn.Identity) for norm in norms):
            raise ValueError(f"{' and '.join(sorted(wanted))}: this vision tower normalises its queries and keys")
    with _listening(tower, layer, wanted) as heard:
        yield fields

    # Only after the block: the caller holds the same mapping.
    fields |= {need: _read(need, heard[need], prefix) for need in wanted}


def with_fields(tokens: VisualTokens, fields: Mapping[str, Tensor]) -> VisualTokens:
    """Adds what was overheard: the feature layer's to the fields of that name, that of named layers to `layers`."""
    plain = {name: values for name, values in fields.items() if name in HEARD}
    layers = {name: values for name, values in fields.items() if name not in HEARD}
    return replace(tokens, **plain, layers=layers)


def attention_of(prefix: int) -> frozenset[str]:
    """What a tower gives of `HEARD`: without a CLS token (no `prefix`), no attention from it."""
    return HEARD if prefix else HEARD - {"cls_attention"}


def completed(
    tokens: VisualTokens,
    packed: list[Tensor],
    model: Any,
    inputs: Mapping[str, Any],
    needs: frozenset[str],
    relevance: Relevance | None,
    placeholder: int | None = None,
) -> VisualTokens:
    """Adds what follows from the tokens and the prompt: `projected`, `text` and `question`, where needed.

    Args:
        tokens: with features and slots.
        packed: per image the projected tokens in packed order.
        model, inputs, needs, relevance: see `selector.models.encode`.
        placeholder: id that stands for a visual token in the prompt, if not the ``image_token_id`` of the config.
    """
    if "projected" in needs:
        tokens = _with_projected(tokens, packed)
    if "text" in needs and relevance is not None:
        tokens = replace(tokens, text=relevance(tokens, inputs))
    if "question" in needs:
        tokens = _with_question(tokens, model, inputs, placeholder)
    return tokens
