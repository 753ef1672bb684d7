"""What is to leave a prompt inside the language model: stages, counts, and where each visual token stands in it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.base import Stage
from selector.budget import Budget
from selector.stages import per_layer
from selector.tokens import PAD, VisualTokens


@dataclass
class Plan:
    """What is to leave a prompt inside the language model, and, once the model has run, what has left.

    Attributes:
        stages: those inside, by rising layer.
        counts: per stage, the visual tokens that each image keeps.
        budget: whose scope and newline policy the stages are under.
        tokens: the visual tokens that reach the language model: slots of others are `PAD`.
        row, column: ``[I, L]`` where each slot's token stands in the prompt; 0 where there is none.
        prompt: ``[B, S]`` real columns of the prompt.
        asker: ``[B]`` column of the last token of each row's prompt, in front of any labelled token.
        right: whether rows are padded on the right.
        kept: ``[I, L]`` slots that reach the language model.
        last: the same behind the last stage; None until the model has run.
        layers: per image, the visual tokens in each decoder layer; as planned, and as it was after a run.
        seconds: wall time of selection and merging at the stages.
        watch: a layer whose visual tokens are wanted: those that enter it, behind any stage there; the number of layers
            for what leaves the last one, normed. None for none.
        seen: ``[n, d]`` per image, those of the latest run.
        around: opened around the work of every stage, to count it.

    Example:
        >>> from PIL import Image
        >>> from selector import Budget, load_selector, prune_inputs
        >>> from selector.commands.loading import load_model
        >>> model, processor = load_model("checkpoints/llava-next-tiny", "cpu")
        >>> inputs = processor(text="<image> what is TOTAL?", images=Image.new("RGB", (96, 96)), return_tensors="pt")
        >>> pruned = prune_inputs(model, inputs, load_selector("fastv"), Budget(0.5), inside=True)
        >>> pruned.inside.counts, pruned.inside.layers
        ([[100]], [[300, 100, 100, 100]])
    """

    stages: list[Stage]
    counts: list[list[int]]
    budget: Budget
    tokens: VisualTokens
    row: Int[Tensor, "I L"]
    column: Int[Tensor, "I L"]
    prompt: Bool[Tensor, "B S"]
    asker: Int[Tensor, "B"]
    right: bool
    kept: Bool[Tensor, "I L"]
    layers: list[list[int]] = field(default_factory=list)
    last: Bool[Tensor, "I L"] | None = None
    seconds: float = 0.0
    watch: int | None = None
    seen: list[Float[Tensor, "n d"]] = field(default_factory=list)
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    @classmethod
    def of(
        cls,
        stages: list[Stage],
        counts: list[list[int]],
        budget: Budget,
        tokens: VisualTokens,
        keep: Bool[Tensor, "I L"],
        inputs: dict[str, Any],
        image_token_id: int,
        depth: int,
    ) -> Plan:
        """The plan of a prompt.

        Args:
            stages, counts: those inside the language model.
            budget: see the class.
            tokens: what the vision tower gave.
            keep: what of it reaches the language model.
            inputs: of the prompt as the language model gets it, placeholders of dropped tokens cut.
            image_token_id: placeholder of a visual token.
            depth: decoder layers of the language model.
        """
        ids = inputs["input_ids"]
        prompt = inputs["attention_mask"].bool() if inputs.get("attention_mask") is not None else torch.ones_like(ids)
        prompt = prompt.bool()

        # Placeholders stand in the order of the packed tokens, row by row.
        where = (ids == image_token_id).nonzero().to(keep.device)
        row, column = (torch.zeros_like(tokens.slots) for _ in range(2))
        row[keep], column[keep] = where.unbind(1)

        # The question ends where the answer that is to be learned begins.
        asks, labels = prompt, inputs.get("labels")
        if labels is not None:
            asks = prompt & (labels.to(prompt.device) == -100)
        asker = (asks * torch.arange(1, ids.shape[1] + 1, device=ids.device)).amax(1) - 1

        slots = tokens.slots.masked_fill(~keep, PAD)
        lengths = keep.sum(1).tolist()
        layers = [per_layer(n, own, depth, stages) for n, own in zip(lengths, zip(*counts, strict=True), strict=True)]
        right = bool((~prompt[:, -1]).any())
        return cls(
            stages, counts, budget, replace(tokens, slots=slots), row, column, prompt, asker, right, keep, layers
        )
