"""Comparisons in batches: the answers of one prompt at a time, in every family and over a whole run."""

from __future__ import annotations

import pytest
import torch
from families import EOS, FAMILIES, PAD

from selector import Budget, Norm, Random
from selector.measure.answering import answer, forced, without_image
from selector.measure.batches import read
from selector.measure.cost import Spent
from selector.plug import prune_inputs


class Words:
    """A processor that writes ids as numbers."""

    pad_token_id, eos_token_id = PAD, EOS

    @property
    def tokenizer(self):
        return self

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(int(i)) for i in ids if not (skip_special_tokens and i in (PAD, EOS)))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_batch_answers_like_generate_row_by_row(family):
    """Rows of two prompts, whole, pruned and blind: ids, logits, and logits over a given answer."""
    model, rows = family.model, []
    for seed in (0, 1):
        inputs = family.prompts([(seed, [family.picture(seed)])])
        rows += [prune_inputs(model, inputs, None).inputs]
        rows += [prune_inputs(model, inputs, chosen, Budget(3)).inputs for chosen in (Random(), Norm())]
        rows += [without_image(inputs, family.placeholder)]
    want = [answer(model, Words(), row, 6) for row in rows]
    # Targets of other lengths than the answers, and one row without.
    targets = [None, *[torch.arange(5, 6 + i % 4) for i in range(1, len(rows))]]
    readings = read(model, Words(), rows, targets, 6, Spent(model.device))
    for one, row, target, each in zip(want, rows, targets, readings, strict=True):
        assert each.answer.text == one.text
        torch.testing.assert_close(each.answer.ids, one.ids)
        torch.testing.assert_close(each.answer.logits, one.logits, rtol=1e-3, atol=1e-3)
        if target is None:
            assert each.forced is None
        else:
            torch.testing.assert_close(each.forced, forced(model, row, target).logits, rtol=1e-3, atol=1e-3)
