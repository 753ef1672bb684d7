"""LLaVA-1.5 and its kin: one view per image and no newline tokens.

With a CLIP or SigLIP tower every image is one square tile. With a Pixtral tower (Pixtral-12B) images keep their own
sizes: each lies in the upper left corner of a grid that fits them all, and its ``[IMG_BREAK]`` tokens are text of the
prompt, which stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selector.models import Adapter, Encoded, Relevance
from selector.models._attention import attention_of, overheard, with_fields
from selector.models._layout import Canvas
from selector.models._towers import check_needs, completed, encoder_output, feature_layer, prefix_of
from selector.tokens import VisualTokens


def encode(model: Any, inputs: Mapping[str, Any], needs: frozenset[str], relevance: Relevance | None = None) -> Encoded:
    """See `selector.models.encode`."""
    layer, prefix = feature_layer(model, inputs), prefix_of(model, inputs)

    # Only Pixtral's processor gives the sizes of images: CLIP and SigLIP see squares.
    if inputs.get("image_sizes") is not None:
        tokens, output = _of_any_size(model, inputs, needs, relevance, layer)
    else:
        attention = attention_of(prefix)
        why = "vision_feature_select_strategy is 'full': its vision tower has no CLS token"
        check_needs(model, needs, attention, why, relevance)
        with overheard(model.base_model.vision_tower, layer, prefix, needs) as fields:
            output = encoder_output(model, inputs)
        tokens = VisualTokens.from_features(output.hidden_states[layer][:, prefix:])
        tokens = with_fields(tokens, fields)

    packed = list(output.pooler_output)
    tokens = completed(tokens, packed, model, inputs, needs, relevance)
    return Encoded(tokens, packed, output, model.config.image_token_id)


def _of_any_size(
    model: Any, inputs: Mapping[str, Any], needs: frozenset[str], relevance: Relevance | None, layer: int
) -> tuple[VisualTokens, Any]:
    """(tokens, encoder output) of a tower that reads images of any size as one sequence."""
    why = "its vision tower reads all images as one sequence, without a CLS token"
    check_needs(model, needs, frozenset(), why, relevance)
    output = encoder_output(model, inputs)

    # One row of all images' patches, cut up by their sizes.
    hidden = output.hidden_states[layer][0]
    side = model.config.vision_config.patch_size
    sizes = [(int(h) // side, int(w) // side) for h, w in inputs["image_sizes"]]
    canvas = Canvas.of(sizes, hidden.device)
    features = canvas.spread(hidden.split([h * w for h, w in sizes]))
    return VisualTokens(features, canvas.grid, canvas.image, canvas.slots), output


ADAPTER = Adapter(encode)
