"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, and videos, whose frames are the tiles of one image.

A budget per image is a budget per video then, and one per tile gives every frame its share. Frames are pooled by the
model (2 x 2 patches to one visual token), and so are `features`, attention and keys here; no newline tokens. Methods
that treat a base view apart take the first frame for it. Images and videos in one batch are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from selector.models import Adapter, Encoded, Relevance, llava_next
from selector.models._attention import attention_of, overheard, with_fields
from selector.models._towers import check_needs, completed, encoder_output, feature_layer, prefix_of
from selector.tokens import VisualTokens


def encode(model: Any, inputs: Mapping[str, Any], needs: frozenset[str], relevance: Relevance | None = None) -> Encoded:
    """See `selector.models.encode`."""
    if inputs.get("pixel_values_videos") is None:
        return llava_next.encode(model, inputs, needs, relevance)
    if inputs.get("pixel_values") is not None:
        raise ValueError("pixel_values and pixel_values_videos must not be in one batch: give images or videos")

    base, config = model.base_model, model.config
    layer, prefix = feature_layer(model, inputs), prefix_of(model, inputs)
    attention = attention_of(prefix)
    why = "vision_feature_select_strategy is 'full': its vision tower has no CLS token"
    if config.spatial_pool_mode == "conv":
        attention, why = frozenset(), "spatial_pool_mode is 'conv', which pools nothing but features"
    check_needs(model, needs, attention, why, relevance)

    with overheard(base.vision_tower, layer, prefix, needs) as fields:
        output = encoder_output(model, inputs, "video")

    # By the model's own pooling; attention goes in as a table of one channel.
    pool = base.vision_resampler
    features = pool(output.hidden_states[layer][:, prefix:])
    fields = {name: pool(v) if v.ndim == 3 else pool(v[..., None])[..., 0] for name, v in fields.items()}

    # The pixels of all videos are one tensor, so each has the same number of frames.
    videos, (frames, count) = len(output.pooler_output), features.shape[:2]
    tokens = VisualTokens(
        features=features,
        grid=(int(count**0.5), int(count**0.5)),
        image=torch.arange(videos, device=features.device).repeat_interleave(frames // videos),
        slots=torch.arange(frames * count, device=features.device).view(videos, -1),
    )
    tokens = with_fields(tokens, fields)

    packed = list(output.pooler_output)
    tokens = completed(tokens, packed, model, inputs, needs, relevance, config.video_token_id)
    return Encoded(tokens, packed, output, config.video_token_id, modality="video")


ADAPTER = Adapter(encode, videos=True)
