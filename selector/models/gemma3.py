"""Gemma 3: one square tile per image, blocks of patches averaged to visual tokens, which attend to all of their image.

`features`, attention and keys are means over a token's block of patches, as the projector averages them. The crops
that a processor may add to an image (pan and scan) stand apart in the prompt, and are images of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from selector.models import Adapter, Encoded, Relevance
from selector.models._attention import attention_of, overheard, with_fields
from selector.models._towers import check_needs, completed, encoder_output
from selector.tokens import VisualTokens


def encode(model: Any, inputs: Mapping[str, Any], needs: frozenset[str], relevance: Relevance | None = None) -> Encoded:
    """See `selector.models.encode`."""
    check_needs(model, needs, attention_of(0), "its vision tower has no CLS token", relevance)
    with overheard(model.base_model.vision_tower, -1, 0, needs) as fields:
        output = encoder_output(model, inputs)

    # Everything that is per patch goes the way of the features.
    projector = model.base_model.multi_modal_projector
    tokens = VisualTokens.from_features(_averaged(output.last_hidden_state, projector))
    tokens = with_fields(tokens, {name: _averaged(values, projector) for name, values in fields.items()})

    packed = list(output.pooler_output)
    tokens = completed(tokens, packed, model, inputs, needs, relevance)
    return Encoded(tokens, packed, output, model.config.image_token_id)


def _averaged(values: Tensor, projector: Any) -> Tensor:
    """``[T, patches]`` or ``[T, patches, C]`` to ``[T, N]`` or ``[T, N, C]``, by the projector's own pooling."""
    if values.ndim == 2:
        return _averaged(values[..., None], projector)[..., 0]
    side = projector.patches_per_image
    return projector.avg_pool(values.mT.unflatten(-1, (side, side))).flatten(2).mT


# The model tells visual tokens (1) from text (0) by this: both padding and answers are text.
ADAPTER = Adapter(encode, rows={"token_type_ids": (0, 0)}, whole=True)
