"""PaliGemma: one square tile per image, every patch a visual token, and a prompt that is read in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selector.models import Adapter, Encoded, Relevance
from selector.models._attention import attention_of, overheard, with_fields
from selector.models._towers import check_needs, completed, encoder_output
from selector.tokens import VisualTokens


def encode(model: Any, inputs: Mapping[str, Any], needs: frozenset[str], relevance: Relevance | None = None) -> Encoded:
    """See `selector.models.encode`."""
    check_needs(model, needs, attention_of(0), "its vision tower has no CLS token", relevance)
    with overheard(model.base_model.vision_tower, -1, 0, needs) as fields:
        output = encoder_output(model, inputs)

    tokens = with_fields(VisualTokens.from_features(output.last_hidden_state), fields)
    packed = list(output.pooler_output)
    tokens = completed(tokens, packed, model, inputs, needs, relevance)
    return Encoded(tokens, packed, output, model.config.image_token_id)


# The prompt is read both ways (0), what follows from left to right (1).
ADAPTER = Adapter(encode, rows={"token_type_ids": (0, 1)}, whole=True)
