"""Hooks are gone after any exit, and what they cannot serve is refused by name."""

from __future__ import annotations

import threading

import pytest
import torch
from families import FAMILIES
from inside_runs import FASTV, LAYER, generate, hooks, ragged

from selector import (
    Budget,
    FastV,
    prune_inputs,
    select_tokens,
)
from selector.inside import decoder_of
from selector.models import encode


def test_no_hook_is_left_after_any_exit():
    family = FAMILIES[0]
    model, inputs = family.model, family.batch(ragged(family))
    with torch.no_grad():
        model(**inputs, output_hidden_states=True)  # transformers sets hooks of its own once, for good
    before = hooks(model)

    class Fails(FastV):
        def score(self, tokens):
            raise KeyError("on purpose")

    with select_tokens(model, Fails(LAYER, "after"), keep=3):
        with pytest.raises(KeyError, match="on purpose"):
            model(**inputs)
        assert hooks(model) == before
        with pytest.raises(KeyError, match="on purpose"):
            generate(model, inputs)
        assert hooks(model) == before
    with pytest.raises(KeyError), select_tokens(model, FASTV, keep=3):
        raise KeyError
    pruned = prune_inputs(model, inputs, FastV(LAYER, "after"), Budget(3), inside=True)
    with pytest.raises(KeyError), pruned.acting(model):
        raise KeyError
    with pruned.acting(model), pytest.raises(RuntimeError, match="within another block"), pruned.acting(model):
        pass
    assert hooks(model) == before
    assert "_selection_blocks" not in vars(model)


def test_refusals():
    family = FAMILIES[0]
    model, inputs = family.model, family.batch([[family.picture(0)]])
    with torch.no_grad(), select_tokens(model, FASTV, keep=3):
        with pytest.raises(
            ValueError, match=r"must be a DynamicCache .* got a StaticCache .* leave cache_implementation"
        ):
            generate(model, inputs, cache_implementation="static", disable_compile=True)
        filled = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="past_key_values must be empty"):
            model(**inputs, past_key_values=filled)
    foreign = model(**inputs, use_cache=True).past_key_values
    with select_tokens(model, FASTV, keep=3), pytest.raises(ValueError, match="past_key_values must be empty"):
        model(**inputs, past_key_values=foreign)
    with pytest.raises(ValueError, match="hidden, text_attention exists inside the language model alone"):
        encode(model, inputs, {"text_attention", "features", "hidden"})
    with select_tokens(model, "fastv:layer=3", keep=3), pytest.raises(ValueError, match="layer must be below 3"):
        model(**inputs)
    layer = decoder_of(model).layers[0]
    layer.compile(backend="eager")
    try:
        with select_tokens(model, FASTV, keep=3), pytest.raises(ValueError, match="must not be compiled"):
            model(**inputs)
    finally:
        layer._compiled_call_impl = None


def test_sliding_windows_are_refused_once_they_are_reached():
    (family,) = (family for family in FAMILIES if family.name == "Gemma 3")
    model, inputs = family.model, family.batch(ragged(family))
    config = decoder_of(model).config
    length = inputs["input_ids"].shape[1]
    window, config.sliding_window = config.sliding_window, length
    try:
        with (
            select_tokens(model, FASTV, keep=3),
            pytest.raises(ValueError, match=f"sliding_window={length} is reached"),
        ):
            model(**inputs)
    finally:
        config.sliding_window = window


def test_deepstack_needs_its_layers():
    (family,) = (family for family in FAMILIES if family.name == "Qwen3-VL")
    model, inputs = family.model, family.batch(ragged(family))
    with (
        select_tokens(model, "fastv:layer=1,count=after", keep=3),
        pytest.raises(ValueError, match="layer must be >= 2"),
    ):
        model(**inputs)


def test_another_thread_meets_no_hooks_of_this_one():
    """A block belongs to its thread; hooks set for a call here pass over a forward pass elsewhere."""
    family = FAMILIES[0]
    model, inputs = family.model, family.batch([[family.picture(0)]])
    with torch.no_grad():
        plain = model(**inputs).logits
    pruned, found = prune_inputs(model, inputs, FastV(LAYER, "after"), Budget(3), inside=True), []

    def other():
        with torch.no_grad():
            found.append(model(**inputs).logits)

    with pruned.acting(model):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert torch.equal(found[0], plain)
