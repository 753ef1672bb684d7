"""Tokens that leave inside the language model, on tiny random models of every family.

Oracle of a pruned run: the plain model at full length, in which the dropped tokens' keys are masked from the stage's
layer on; without hooks of ours, and by 4-D masks of its own.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from families import FAMILIES, build
from inside_runs import DRAWN, FASTV, LAYER, every, generate, gone, hooks, masked_from, ragged

from selector import (
    Budget,
    FastV,
    prune_inputs,
    select_tokens,
)
from selector.measure.answering import forced


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


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("spec", [FASTV, DRAWN])
def test_generation_is_a_cache_free_loop(attention, spec, tiny_model, make_image):
    """Oracle: every new token from a pass over the whole sequence, without a cache, dropped keys masked."""
    model, processor = tiny_model("clip", "qwen2", attention)
    inputs = dict(
        processor(images=[make_image(60, 64, 3)], text=["USER: <image>\nwhat? ASSISTANT:"], return_tensors="pt")
    )
    with torch.no_grad():
        with select_tokens(model, spec, keep=9) as log:
            got = generate(model, inputs)
            again = generate(model, inputs, use_cache=False)
        assert torch.equal(got, again)
        dropped = inputs["input_ids"] == model.config.image_token_id
        dropped[dropped.clone()] = ~log.last.keep[0]
        start = inputs["input_ids"].shape[1]
        with masked_from(model, LAYER, dropped):
            for end in range(start, got.shape[1]):
                mask = torch.ones(1, end, dtype=torch.long)
                step = model(**{**inputs, "input_ids": got[:, :end], "attention_mask": mask}, use_cache=False)
                assert int(step.logits[0, -1].argmax()) == int(got[0, end])


def test_a_cache_of_the_block_is_continued_by_hand():
    """Token by token, in a batch with padding, where masks have to lose the same columns."""
    family = FAMILIES[0]
    model, inputs = family.model, family.batch(ragged(family))
    with torch.no_grad(), select_tokens(model, FASTV, keep=3):
        said = generate(model, inputs)[:, inputs["input_ids"].shape[1] :]
        mask = inputs["attention_mask"]
        out = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
        for step in range(3):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            assert torch.equal(token[:, 0], said[:, step])
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            place = mask.cumsum(1)[:, -1:] - 1
            out = model(input_ids=token, attention_mask=mask, position_ids=place, past_key_values=out.past_key_values)


def test_an_assistant_model_changes_nothing():
    family = FAMILIES[0]
    model, inputs = family.model, family.batch([[family.picture(0)]])
    other = build(family.config())
    with select_tokens(model, FASTV, keep=3):
        alone = generate(model, inputs)
        assert torch.equal(generate(model, inputs, assistant_model=other), alone)


def test_an_answer_read_in_one_pass_is_the_generated_one():
    """Teacher forcing: the answer behind the prompt changes nothing in what the question looks at."""
    family = FAMILIES[0]
    model, inputs = family.model, family.batch([[family.picture(0), family.picture(2)]])
    pruned = prune_inputs(model, inputs, FastV(LAYER, "after"), Budget(3), inside=True)
    with torch.no_grad(), pruned.acting(model):
        said = generate(model, dict(pruned.inputs), output_logits=True, return_dict_in_generate=True)
    new = said.sequences[0, inputs["input_ids"].shape[1] :]
    with pruned.acting(model):
        read = forced(model, pruned.inputs, new)
    torch.testing.assert_close(read.logits, torch.cat(said.logits), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("left", [True, False])
def test_labels_and_gradients(left):
    """Loss of full length; where the token before a label is gone, what is left before it predicts that label."""
    family = FAMILIES[0]
    model, inputs = family.model, family.batch(ragged(family), left)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    first = real & (real.cumsum(1) == 1)  # nothing real stands before it
    labels = ids.masked_fill((ids == family.placeholder) | ~real | first, -100)
    with select_tokens(model, DRAWN, keep=4) as log:
        out = model(**inputs, labels=labels)
    out.loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)

    dropped = gone(inputs, log.last, family)
    with torch.no_grad(), masked_from(model, LAYER, dropped):
        logits = model(**inputs).logits
    losses = []
    for row in range(len(ids)):
        columns = (real[row] & ~dropped[row]).nonzero().flatten().tolist()
        for before, here in itertools.pairwise(columns):
            if labels[row, here] != -100:
                losses.append(torch.nn.functional.cross_entropy(logits[row, before][None], ids[row, here][None]))
    torch.testing.assert_close(out.loss.detach(), torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)
