"""What a selection drops is gone: once the tokens are chosen, nothing holds those of the whole image."""

from __future__ import annotations

import weakref

import pytest
import torch
from plugged import PROMPT, batch, generate

from selector import SVDPrune, pruning, select_tokens

FIELDS = ("features", "projected", "cls_attention", "keys")


class Reading(SVDPrune):
    """Asks for several fields, so that all of them are there to be held."""

    needs = frozenset(FIELDS)


@pytest.mark.parametrize("call", [generate, lambda model, inputs: model(**inputs)], ids=["generate", "forward"])
def test_the_tokens_of_the_whole_image_are_gone_before_the_prefill(tiny_model, make_image, monkeypatch, call):
    model, processor = tiny_model()
    inputs = batch(processor, [make_image(64, 64, 3)], [PROMPT])
    held: list[weakref.ref] = []
    encode = pruning.encode

    def noting(*args):
        # Storages, since a view of a tensor keeps all of it. torch keeps their objects for as long as the memory lives.
        encoded = encode(*args)
        tensors = [getattr(encoded.tokens, name) for name in FIELDS]
        tensors += [*encoded.packed, *(hidden for hidden in encoded.output.hidden_states if hidden is not None)]
        held.extend(weakref.ref(tensor.untyped_storage()) for tensor in tensors)
        return encoded

    left: list[int] = []
    handle = model.base_model.language_model.register_forward_pre_hook(
        lambda *_: left.append(sum(reference() is not None for reference in held))
    )
    monkeypatch.setattr(pruning, "encode", noting)
    try:
        with select_tokens(model, Reading(rank=2), keep=9) as log, torch.no_grad():
            call(model, inputs)
    finally:
        handle.remove()
    assert len(held) > len(FIELDS)
    assert left[0] == left[-1] == 0, "the prefill, and the last step"

    # What the log keeps says where the kept tokens lie, and holds their features alone.
    last = log.last
    assert last.tokens.tiles_of(last.keep).sum() == (last.tokens.is_patch & last.keep).sum()
    assert [feats.shape[0] for feats in last.features] == [9]
    assert last.tokens.features.untyped_storage().nbytes() == 0


def test_an_outline_answers_what_slots_answer(tiny_model, make_image):
    model, processor = tiny_model()
    encoded = pruning.encode(model, batch(processor, [make_image(40, 70, 3)], [PROMPT]), FIELDS)
    tokens, outline = encoded.tokens, encoded.tokens.outline()
    for name in ("lengths", "valid", "rows", "base", "is_patch"):
        assert torch.equal(getattr(outline, name), getattr(tokens, name)), name
    assert outline.features.shape == (*tokens.features.shape[:2], 0)
    assert (outline.projected, outline.keys, dict(outline.layers)) == (None, None, {})
