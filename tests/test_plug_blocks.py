"""Blocks of `select_tokens`: what they restore, what they refuse, and which lengths count within one."""

from __future__ import annotations

import asyncio
import copy
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from plugged import PROMPT, batch, generate, measured
from transformers import GenerationConfig

from selector import (
    Budget,
    FastV,
    GumbelSelector,
    Random,
    prune_inputs,
    select_tokens,
)


@pytest.fixture
def one(tiny_model, make_image):
    model, processor = tiny_model()
    return model, batch(processor, [make_image(60, 64, 3)], [PROMPT])


def test_the_model_is_restored_also_after_an_error(one):
    model, _ = one
    before = dict(vars(model))
    with pytest.raises(KeyError), select_tokens(model, Random(), keep=4):
        raise KeyError
    assert {k: v for k, v in vars(model).items() if k in ("forward", "generate")} == {}
    model.forward = wrapped = model.forward  # as accelerate does
    with select_tokens(model, Random(), keep=4):
        assert model.forward is not wrapped
    assert vars(model).pop("forward") is wrapped
    assert set(vars(model)) == set(before)


def test_a_method_that_acts_inside_the_language_model_is_refused_where_nobody_would_run_it(one):
    model, inputs = one
    with pytest.raises(ValueError, match="FastV acts inside the language model: use select_tokens, or give inside"):
        prune_inputs(model, inputs, FastV(), Budget(4))


def test_refusals(one, tiny_model):
    model, inputs = one
    with pytest.raises(ValueError, match="both a selector and a budget"):
        prune_inputs(model, inputs, Random())
    with pytest.raises(ValueError, match="placeholders"):
        prune_inputs(model, {**inputs, "input_ids": inputs["input_ids"][:, :-9]}, Random(), Budget(4))
    with select_tokens(model, Random(), keep=4), pytest.raises(ValueError, match="use_cache"):
        generate(model, inputs, use_cache=False)
    with select_tokens(model, Random(), keep=4, positions="contiguous"):
        generate(model, inputs, use_cache=False)
    with select_tokens(model, Random(), keep=4), pytest.raises(ValueError, match="prefill_chunk_size"):
        generate(model, inputs, prefill_chunk_size=4)
    other = type("Model", (), {"config": type("C", (), {"model_type": "blip"})()})()
    with pytest.raises(ValueError, match="no adapter for models of type 'blip'"):
        prune_inputs(other, inputs, Random(), Budget(4))
    embeds = {name: value for name, value in inputs.items() if name != "input_ids"}
    embeds["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    with select_tokens(model, Random(), keep=4), pytest.raises(ValueError, match="input_ids must be given with pixel"):
        generate(model, embeds)
    with select_tokens(model, Random(), keep=4), pytest.raises(ValueError, match="input_ids must be given with pixel"):
        model(**embeds)
    with torch.device("meta"):
        learned = GumbelSelector(dim=32, num_patches=16)
    with pytest.raises(ValueError, match="selector must have weights, GumbelSelector is on the meta device"):
        select_tokens(model, learned, keep=4).__enter__()


@contextmanager
def defaults(model, **settings):
    """The model's own generation config, changed for a while."""
    config, model.generation_config = model.generation_config, copy.deepcopy(model.generation_config)
    for name, value in {"eos_token_id": None, "max_new_tokens": None, **settings}.items():
        setattr(model.generation_config, name, value)
    try:
        yield
    finally:
        model.generation_config = config


@pytest.mark.parametrize("place", ["argument", "config", "positional", "model"])
def test_lengths_count_the_original_prompt_wherever_they_are_set(one, place):
    """Three new tokens, with and without the block."""
    model, inputs = one
    full = inputs["input_ids"].shape[1]
    lengths = {"max_length": full + 3}
    with defaults(model, **(lengths if place == "model" else {})):

        def new_tokens():
            given = {k: v for k, v in inputs.items() if k != "input_ids"}
            if place == "argument":
                return model.generate(**inputs, **lengths).shape[1] - full
            if place == "config":
                return model.generate(**inputs, generation_config=GenerationConfig(**lengths)).shape[1] - full
            if place == "positional":
                return model.generate(inputs["input_ids"], GenerationConfig(**lengths), **given).shape[1] - full
            return model.generate(**inputs).shape[1] - full

        assert new_tokens() == 3
        before = model.generation_config.to_dict()
        with select_tokens(model, Random(), keep=4) as log:
            assert new_tokens() == 3
        assert log.measured == [4]
        assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("shortest", ["min_length", "min_new_tokens"])
def test_a_shortest_answer_stays_as_long(one, shortest):
    """Every token but one ends the answer: it ends soon after it may."""
    model, inputs = one
    full = inputs["input_ids"].shape[1]
    ends = list(range(1, model.config.text_config.vocab_size))
    value = 10 if shortest == "min_new_tokens" else full + 10
    config = GenerationConfig(**{shortest: value}, max_new_tokens=20, eos_token_id=ends, pad_token_id=0)
    assert 10 <= model.generate(**inputs, generation_config=config).shape[1] - full < 20
    with select_tokens(model, Random(), keep=4):
        assert 10 <= model.generate(**inputs, generation_config=config).shape[1] - full < 20
    assert config.min_length == (None if shortest == "min_new_tokens" else value)


def test_a_number_of_new_tokens_wins_over_a_length(one):
    model, inputs = one
    full = inputs["input_ids"].shape[1]
    with defaults(model, max_length=full + 9), select_tokens(model, Random(), keep=4):
        assert model.generate(**inputs, max_new_tokens=2).shape[1] == full + 2
        with pytest.raises(ValueError, match=f"max_length must be above the prompt's length of {full} tokens, got 5"):
            model.generate(**inputs, max_length=5)


def test_blocks_may_be_left_in_any_order(one):
    """Of those open the last entered selects, in forward and in generate; in the end the model is as it was."""
    model, inputs = one
    before = dict(vars(model))
    first, second, third = (select_tokens(model, Random(), keep=keep) for keep in (4, 7, 9))
    logs = [first.__enter__(), second.__enter__(), third.__enter__()]
    measured(model, inputs)
    second.__exit__(None, None, None)
    measured(model, inputs)
    third.__exit__(None, None, None)
    generate(model, inputs)
    assert [log.measured for log in logs] == [[4], [], [9, 9]]
    first.__exit__(None, None, None)
    assert dict(vars(model)) == before
    measured(model, inputs)
    assert [log.measured for log in logs] == [[4], [], [9, 9]]


def test_a_second_thread_opens_no_block(one):
    """Both calls would run with the selector that came last."""
    model, inputs = one
    seen = []

    def other():
        measured(model, inputs)  # using the model is fine: it is what a streamer does
        try:
            with select_tokens(model, Random(), keep=7):
                seen.append("open")
        except RuntimeError as error:
            seen.append(str(error))

    with select_tokens(model, Random(), keep=4) as log:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert log.measured == [4]
    assert len(seen) == 1
    assert "another thread or task has a block open" in seen[0]
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen[1:] == ["open"]


def test_a_second_task_opens_no_block(one):
    model, _ = one

    async def block():
        with select_tokens(model, Random(), keep=4):
            await asyncio.sleep(0.01)

    async def two():
        return await asyncio.gather(block(), block(), return_exceptions=True)

    first, second = asyncio.run(two())
    assert first is None
    assert isinstance(second, RuntimeError)
    assert "_selection_blocks" not in vars(model)


def test_a_model_is_not_copied_within_a_block(one):
    """The copy would run the original's forward for ever."""
    model, inputs = one
    with select_tokens(model, Random(), keep=4), pytest.raises(TypeError, match="not be copied or pickled within"):
        copy.deepcopy(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
        with select_tokens(twin, Random(), keep=4):
            assert twin(**inputs).logits.abs().sum() == 0


def test_a_selector_is_left_as_it_was(one):
    model, inputs = one
    torch.manual_seed(0)
    selector = GumbelSelector(dim=32, num_patches=16).train()
    next(selector.children()).eval()
    modes = [part.training for part in selector.modules()]
    with select_tokens(model, selector, keep=4):
        assert not any(part.training for part in selector.modules())
        measured(model, inputs)
    assert [part.training for part in selector.modules()] == modes
    assert True in modes
    assert False in modes


def test_budgets_of_numpy(one):
    model, inputs = one
    for keep, same in ((np.int64(9), 9), (np.float32(0.25), 0.25), (np.float64(0.5), 0.5)):
        assert Budget(keep) == Budget.parse(keep) == Budget(same)
        assert type(Budget(keep).keep) is type(same)
        with select_tokens(model, Random(), keep=keep) as log, torch.no_grad():
            model(**inputs)
        assert log.measured == prune_inputs(model, inputs, Random(), Budget(same)).measured
    with pytest.raises(ValueError, match="keep must be"):
        Budget(np.int64(0))


def test_a_count_beyond_64_bits_keeps_all(one):
    model, inputs = one
    pruned = prune_inputs(model, inputs, Random(), Budget(10**23))
    assert pruned.measured == pruned.full
