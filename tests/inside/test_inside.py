"""Tokens that leave inside the language model, on tiny random models of every family.

Oracle of a pruned run: the plain model at full length, in which the dropped tokens' keys are masked from the stage's
layer on; without hooks of ours, and by 4-D masks of its own.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES, PAD

from selector import Budget, FastV, Random, load_selector, prune_inputs, select_tokens
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


@every
def test_keep_all_is_bit_identical(family):
    model, inputs = family.model, family.batch(ragged(family))
    with torch.no_grad():
        logits, ids = model(**inputs).logits, generate(model, inputs)
        with select_tokens(model, FASTV, keep=1.0) as log:
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(generate(model, inputs), ids)
    assert log.measured == log.full
    assert log.layers == [[n] * 3 for n in log.full]


@every
@pytest.mark.parametrize("left", [True, False])
def test_pruned_is_the_full_length_with_masked_keys(family, left):
    """Logits of every kept column, in a batch with padding on either side, two images and none."""
    model, inputs = family.model, family.batch(ragged(family), left)
    with torch.no_grad():
        with select_tokens(model, FASTV, keep=3) as log:
            got = model(**inputs, use_cache=True)
        assert all(own[:LAYER] == [n] * LAYER for own, n in zip(log.layers, log.full, strict=True))
        assert all(own[LAYER:] == [3] for own in log.layers)
        dropped = gone(inputs, log.last, family)
        with masked_from(model, LAYER, dropped):
            want = model(**inputs, use_cache=True)
        plain = model(**inputs)
    real = inputs["attention_mask"].bool()
    assert got.logits.shape == want.logits.shape
    torch.testing.assert_close(got.logits[real & ~dropped], want.logits[real & ~dropped], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got.logits[real & ~dropped], plain.logits[real & ~dropped], rtol=0.02, atol=0.02)
    lengths = [layer.keys.shape[2] for layer in got.past_key_values.layers]
    longest = int((real & ~dropped).sum(1).max())
    assert lengths == [inputs["input_ids"].shape[1]] * LAYER + [longest]


@every
def test_generation_is_that_of_masked_keys(family):
    model, inputs = family.model, family.batch(ragged(family))
    before = hooks(model)
    with torch.no_grad():
        with select_tokens(model, FASTV, keep=3) as log:
            got = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
        with masked_from(model, LAYER, gone(inputs, log.last, family)):
            want = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(got.sequences, want.sequences)
    for ours, theirs in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert hooks(model) == before


@every
def test_a_ragged_batch_equals_its_rows(family):
    model, rows = family.model, ragged(family)
    inputs = family.batch(rows)
    with torch.no_grad(), select_tokens(model, FASTV, keep=3) as log:
        together = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
    layers = []
    for i, pictures in enumerate(rows):
        single = family.prompts([(i, pictures)])
        with torch.no_grad(), select_tokens(model, FASTV, keep=3) as alone:
            want = generate(model, single, output_logits=True, return_dict_in_generate=True)
        torch.testing.assert_close(together.logits[0][i], want.logits[0][0], rtol=1e-3, atol=1e-3)
        new = want.sequences[0, single["input_ids"].shape[1] :]
        assert torch.equal(together.sequences[i, inputs["input_ids"].shape[1] :][: len(new)], new)
        layers += alone.layers
    assert log.layers == layers


@every
def test_beams_are_those_of_single_rows(family):
    model, rows = family.model, ragged(family)
    inputs = family.batch(rows)
    asked = {"num_beams": 3, "num_return_sequences": 2}
    with torch.no_grad(), select_tokens(model, FASTV, keep=3):
        together = generate(model, inputs, **asked)[:, inputs["input_ids"].shape[1] :]
    for i, pictures in enumerate(rows):
        single = family.prompts([(i, pictures)])
        with torch.no_grad(), select_tokens(model, FASTV, keep=3):
            want = generate(model, single, **asked)[:, single["input_ids"].shape[1] :]
        assert torch.equal(together[2 * i : 2 * i + 2, : want.shape[1]], want)
