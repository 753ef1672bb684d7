"""Runs with tokens that leave inside the language model, and the plain model with masked keys beside them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES

from selector import (
    FastV,
)
from selector.base import Stage
from selector.inside import decoder_of

LAYER, NEW = 2, 5
FASTV = f"fastv:layer={LAYER},count=after"
DRAWN = f"random:layer={LAYER},count=after"

every = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def ragged(family):
    """Rows of one picture, two of other sizes, and none."""
    return [[family.picture(0)], [family.picture(1), family.picture(2)], []]


def hooks(model):
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **kwargs)


def gone(inputs, pruned, family):
    """[B, S] the columns of visual tokens that the last stage has dropped."""
    visual = inputs["input_ids"] == family.placeholder
    lengths = pruned.tokens.lengths.tolist()
    kept = torch.cat([row[:n] for row, n in zip(pruned.keep, lengths, strict=True)])
    dropped = torch.zeros_like(visual)
    dropped[visual] = ~kept
    return dropped


@contextmanager
def masked_from(model, layer, dropped):
    """The plain model, whose layers from `layer` on do not see these columns as keys, at any length."""

    def hook(module, args, kwargs):
        hidden, mask = args[0], kwargs.get("attention_mask")
        queries = hidden.shape[1]
        if mask is None:
            length = queries + (kwargs["past_key_values"].get_seq_length(LAYER) if queries == 1 else 0)
            mask = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)[None, None]
        length = mask.shape[-1]
        closed = torch.nn.functional.pad(dropped, (0, length - dropped.shape[1]))[:, None, None]
        closed = closed.repeat_interleave(len(hidden) // len(dropped), 0)
        if queries == length:  # a dropped token still sees itself, or its row would be empty
            closed = closed & ~torch.eye(length, dtype=torch.bool)
        low = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = mask.expand(len(hidden), -1, -1, -1).masked_fill(closed, low)
        return args, {**kwargs, "attention_mask": mask}

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in decoder_of(model).layers[layer:]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Falling(FastV):
    """Two stages, by the attention of each layer itself; `seen` holds what was still there at each."""

    needs = frozenset({"own_text_attention"})

    def __init__(self, layer=None, count="average"):
        super().__init__(layer, count)
        self.seen = []

    def stages(self, depth):
        return [Stage(1, 0.5, self), Stage(2, 0.25, self)]

    def score(self, tokens):
        self.seen.append(tokens.valid.clone())
        return tokens.read("own_text_attention", self)
