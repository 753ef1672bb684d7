"""Qwen2-VL: images at their own resolution, 2 x 2 patches merged by the vision tower, rotary positions of three axes.

The tower's own last step merges patches, so its tokens are those that the language model sees: `features` and
`projected` are the same. Each image lies in the upper left corner of a grid that fits them all. Positions are those of
the unpruned prompt (time, row and column of every visual token); gaps between them must not be closed.

The model keeps an offset between positions and lengths of its last prompt (``rope_deltas``). ``generate`` does not read
it within a pruned prompt; a loop of one's own around ``forward`` has to give ``position_ids`` for every new token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Int
from torch import Tensor

from selector.models import Adapter, Encoded, Relevance
from selector.models._layout import Canvas
from selector.models._towers import check_needs, completed, encoder_output
from selector.tokens import VisualTokens


def encode(model: Any, inputs: Mapping[str, Any], needs: frozenset[str], relevance: Relevance | None = None) -> Encoded:
    """See `selector.models.encode`."""
    why = "its vision tower has no CLS token, and queries and keys in one projection"
    check_needs(model, needs, frozenset(), why, relevance)
    output = encoder_output(model, inputs)

    # Sizes in patches before merging; an image has one frame, so time is left out.
    packed, merge = list(output.pooler_output), model.config.vision_config.spatial_merge_size
    canvas = Canvas.of([(int(h) // merge, int(w) // merge) for _, h, w in inputs["image_grid_thw"]], packed[0].device)

    tokens = VisualTokens(canvas.spread(packed), canvas.grid, canvas.image, canvas.slots)
    tokens = completed(tokens, packed, model, inputs, needs, relevance)
    return Encoded(tokens, packed, output, model.config.image_token_id)


def positions(model: Any, inputs: Mapping[str, Any]) -> Int[Tensor, "3 B S"]:
    """Time, row and column of every token of the unpruned prompt, by the model's own rule.

    Raises:
        ValueError: no ``mm_token_type_ids``.
    """
    if inputs.get("mm_token_type_ids") is None:
        raise ValueError("mm_token_type_ids must be given with images: they tell the model's rule where the images are")

    # Its second value is the offset for later tokens, which the plug does without.
    axes, _ = model.base_model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs.get("attention_mask"),
    )
    return axes


ADAPTER = Adapter(encode, positions, rows={"mm_token_type_ids": (0, 0)}, whole=True)
