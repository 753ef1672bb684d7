"""What adapters share whose models have a vision tower, and a projector behind it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from selector.models import Relevance, model_type_of
from selector.models._attention import HEARD, quantity
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
    missing = sorted(need for need in needs if need not in gives and quantity(need) not in attention)
    if missing:
        # The reason holds for what is read off attention layers, and not for a name that no model knows.
        reason = f" ({why})" if any(quantity(need) in HEARD for need in missing) else ""
        layers = (
            f", and NAME@L and joint_NAME@L of any layer L of its tower for {sorted(attention)}" if attention else ""
        )
        instead = "; selectors that read attention take attention=received" if "received_attention" in gives else ""
        raise ValueError(
            f"a {kind!r} model gives no {', '.join(missing)} to a selector{reason}; "
            f"it gives {sorted(gives)}{layers}{instead}"
        )

    if "text" in needs and relevance is None:
        raise ValueError(
            f"text: a {kind!r} model has no text tower to compare visual tokens with; pass relevance=, a function "
            "(tokens, inputs) -> [tiles, patches]"
        )


def setting(inputs: Mapping[str, Any], config: Any, name: str) -> Any:
    """A setting of this call where the caller gives one, as the model itself reads it; else the checkpoint's."""
    return inputs[name] if inputs.get(name) is not None else getattr(config, name)


def feature_layer(model: Any, inputs: Mapping[str, Any]) -> int:
    """The one hidden state of the tower that the projector reads, from the call or else from the checkpoint.

    Raises:
        ValueError: several of them.
    """
    layer = setting(inputs, model.config, "vision_feature_layer")
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer must be one layer for selection, got {layer}")
    return layer


def prefix_of(model: Any, inputs: Mapping[str, Any]) -> int:
    """Tokens before the patches that the model itself cuts off: 1 (CLS) or 0."""
    return 1 if setting(inputs, model.config, "vision_feature_select_strategy") == "default" else 0


def encoder_output(model: Any, inputs: Mapping[str, Any], modality: str = "image") -> Any:
    """The output of the model's own encoding, called with whatever it takes of the inputs."""
    # By its signature: models add arguments of their own (image_sizes, grids), and refuse those of others.
    encoder = getattr(model.base_model, f"get_{modality}_features")
    names = inspect.signature(encoder).parameters
    return encoder(**{name: inputs[name] for name in names if inputs.get(name) is not None}, return_dict=True)


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


def _with_projected(tokens: VisualTokens, packed: list[Tensor]) -> VisualTokens:
    """Adds the projected tokens, read back from the packed ones (projecting twice would cost more)."""
    # The newlines' rows have no encoder token, and tokens that unpadding removed stay zero.
    shape = tokens.features.shape[:2]
    table = packed[0].new_zeros(shape[0] * shape[1], packed[0].shape[-1])
    for slots, feats in zip(tokens.slots, packed, strict=True):
        slots = slots[: len(feats)]
        table[slots[slots >= 0]] = feats[slots >= 0]
    return replace(tokens, projected=table.view(*shape, -1))


def _with_question(
    tokens: VisualTokens, model: Any, inputs: Mapping[str, Any], placeholder: int | None = None
) -> VisualTokens:
    """Adds the embedded text that follows each image in its row of the prompt, up to the end of the row."""
    ids = inputs.get("input_ids")
    if ids is None:
        raise ValueError("question: a selector that reads the question needs input_ids beside the images")

    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    visual = ids == (model.config.image_token_id if placeholder is None else placeholder)
    column = torch.arange(ids.shape[1], device=ids.device)

    # The placeholders of all images stand one behind the other, row by row; an image's text starts behind its last.
    row, position = visual.nonzero(as_tuple=True)
    last = tokens.lengths.to(ids.device).cumsum(0) - 1
    if len(position) != int(last[-1]) + 1:
        raise ValueError(
            f"input_ids hold {len(position)} image placeholders, the images give {int(last[-1]) + 1} tokens"
        )

    # Words behind the last placeholder of each image, in its row; other images' placeholders are no words.
    row, position = row[last], position[last]
    words = mask.bool() & ~visual
    if inputs.get("labels") is not None:  # what is to be predicted is no part of the question
        words = words & (inputs["labels"] == -100)
    text = words[row] & (column > position[:, None])

    # Each image's text moves to the left; the rest is padding.
    width = max(1, int(text.sum(1).max()))
    order = (~text).int().argsort(dim=1, stable=True)[:, :width]
    real = text.gather(1, order)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids[row].gather(1, order))
    device = tokens.features.device
    return replace(tokens, question=embedded.masked_fill(~real[..., None], 0).to(device), question_mask=real.to(device))
