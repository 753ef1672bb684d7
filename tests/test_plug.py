"""The plug on real model classes with random weights: keep-all is the identity, a pruned prefill is really shorter.

Oracle of a pruned run: the language model called from scratch on the kept embeddings, without a cache.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from selector import (
    Budget,
    GumbelSelector,
    Norm,
    Random,
    SVDPrune,
    available_selectors,
    load_selector,
    prune_inputs,
    select_tokens,
)
from selector.models import encode

FAMILIES = list(itertools.product(("clip", "siglip"), ("llama", "mistral", "qwen2")))
PROMPT = "USER: <image>\nwhat is shown? ASSISTANT:"


def batch(processor, images, texts):
    return processor(images=images or None, text=texts, return_tensors="pt", padding=True)


@pytest.fixture
def one(tiny_model, make_image):
    model, processor = tiny_model()
    return model, batch(processor, [make_image(60, 64, 3)], [PROMPT])


@pytest.fixture
def ragged(tiny_model, make_image):
    """Three rows: one image, two images of other shapes, no image at all."""
    model, processor = tiny_model()
    images = [make_image(40, 90, 1), make_image(70, 30, 2), make_image(50, 50, 3)]
    texts = [PROMPT, "USER: <image> and <image> how many? ASSISTANT:", "USER: no image here ASSISTANT:"]
    return model, batch(processor, images, texts)


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, **kwargs)


@pytest.mark.parametrize(("vision", "text"), FAMILIES)
def test_keep_all_is_bit_identical(tiny_model, make_image, vision, text):
    model, processor = tiny_model(vision, text)
    inputs = batch(processor, [make_image(60, 100, 3), make_image(33, 32, 4)], [PROMPT, PROMPT])
    with torch.no_grad():
        logits, ids = model(**inputs).logits, generate(model, inputs)
        with select_tokens(model, Random(), keep=1.0) as log:
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(generate(model, inputs), ids)
    assert log.measured == log.full
    visual = (inputs["input_ids"] == model.config.image_token_id).sum()
    assert sum(log.full) == 2 * int(visual)  # forward and generate


@pytest.mark.parametrize(("vision", "text"), FAMILIES)
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_pruned_prefill_equals_forward_on_kept_embeddings(tiny_model, make_image, vision, text, positions):
    model, processor = tiny_model(vision, text)
    inputs = batch(processor, [make_image(60, 64, 3)], [PROMPT])
    with torch.no_grad():
        pruned = prune_inputs(model, inputs, Random(), Budget(9), positions=positions)
        got = model(**pruned.inputs, use_cache=True)
        ids = inputs["input_ids"][0]
        visual = ids == model.config.image_token_id
        embeddings = model.get_input_embeddings()(ids)
        packed = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True)
        embeddings[visual] = packed.pooler_output[0]
        keep = ~visual
        keep[visual] = pruned.keep[0]
        place = torch.arange(len(ids))[keep] if positions == "original" else torch.arange(int(keep.sum()))
        want = model(
            inputs_embeds=embeddings[keep][None],
            attention_mask=torch.ones(1, int(keep.sum()), dtype=torch.long),
            position_ids=place[None],
            use_cache=False,
        )
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    text_tokens = int((~visual).sum())
    assert got.past_key_values.get_seq_length() == pruned.measured[0] + text_tokens == 9 + text_tokens


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_generation_equals_a_cache_free_loop(tiny_model, make_image, text, positions):
    """Oracle: every new token from a fresh forward over all kept embeddings, with the positions written out."""
    model, processor = tiny_model("clip", text)
    inputs = batch(processor, [make_image(60, 64, 3)], [PROMPT])
    with torch.no_grad():
        with select_tokens(model, Random(), keep=9, positions=positions) as log:
            got = generate(model, inputs)[0, inputs["input_ids"].shape[1] :]
        pruned = log.last
        ids, place = pruned.inputs["input_ids"], pruned.inputs.get("position_ids")
        place = torch.arange(ids.shape[1])[None] if place is None else place
        assert (int(place[0, -1]) == inputs["input_ids"].shape[1] - 1) == (positions == "original")
        embeddings = model.get_input_embeddings()(ids)
        features = pruned.inputs["mm_encoder_outputs"]["image"].pooler_output[0]
        embeddings[ids == model.config.image_token_id] = features
        for token in got:
            mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
            step = model(inputs_embeds=embeddings, attention_mask=mask, position_ids=place, use_cache=False)
            assert int(step.logits[0, -1].argmax()) == int(token)
            embeddings = torch.cat([embeddings, model.get_input_embeddings()(token[None, None])], 1)
            place = torch.cat([place, place[:, -1:] + 1], 1)


def test_pruning_changes_what_the_model_sees(one):
    model, inputs = one
    with torch.no_grad():
        full = model(**inputs).logits[:, -1]
        with select_tokens(model, Random(), keep=5):
            assert not torch.allclose(model(**inputs).logits[:, -1], full, atol=1e-3)


@pytest.mark.parametrize("keep", [3, 0.4])
def test_ragged_batch_equals_one_by_one(tiny_model, ragged, make_image, keep):
    model, inputs = ragged
    _, processor = tiny_model()
    with torch.no_grad(), select_tokens(model, Norm(), keep=keep) as log:
        together = generate(model, inputs)
    images = [[make_image(40, 90, 1)], [make_image(70, 30, 2), make_image(50, 50, 3)], []]
    texts = [PROMPT, "USER: <image> and <image> how many? ASSISTANT:", "USER: no image here ASSISTANT:"]
    measured, length = [], inputs["input_ids"].shape[1]
    for row, (image, text) in enumerate(zip(images, texts, strict=True)):
        single = batch(processor, image, [text])
        with torch.no_grad(), select_tokens(model, Norm(), keep=keep) as alone:
            ids = generate(model, single)[0, single["input_ids"].shape[1] :]
        new = together[row, length:]
        assert torch.equal(new[: len(ids)], ids)
        assert bool((new[len(ids) :] == model.generation_config.pad_token_id).all())
        measured += alone.measured
    assert log.measured == measured
    assert [m <= f for m, f in zip(log.measured, log.full, strict=True)] == [True] * 3


def test_right_padding_stays_on_the_right(tiny_model, ragged):
    model, inputs = ragged
    flipped = {k: v.flip(1) if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()}
    pruned = prune_inputs(model, flipped, Random(), Budget(4))
    mask = pruned.inputs["attention_mask"]
    assert mask.sum(1).unique().numel() > 1  # rows of unequal length
    assert bool((mask.diff(dim=1) <= 0).all())  # ones, then zeros
    left = prune_inputs(model, inputs, Random(), Budget(4)).inputs
    assert bool((left["attention_mask"].diff(dim=1) >= 0).all())


def test_generate_returns_the_original_prompt(one):
    model, inputs = one
    prompt = inputs["input_ids"]
    with select_tokens(model, Random(), keep=5):
        plain = generate(model, inputs)
        rich = generate(model, inputs, return_dict_in_generate=True)
        short = model.generate(**inputs, max_length=prompt.shape[1] + 3, do_sample=False)
    assert torch.equal(plain[:, : prompt.shape[1]], prompt)
    assert torch.equal(rich.sequences, plain)
    assert short.shape[1] <= prompt.shape[1] + 3


def test_beams_and_several_sequences(ragged):
    model, inputs = ragged
    with select_tokens(model, Random(), keep=1.0):
        same = generate(model, inputs, num_beams=3, num_return_sequences=2)
    assert torch.equal(same, generate(model, inputs, num_beams=3, num_return_sequences=2))
    with select_tokens(model, Random(), keep=4):
        first = generate(model, inputs, num_beams=3)
        assert torch.equal(generate(model, inputs, num_beams=3), first)  # nothing was edited in place


def test_static_cache_and_sampling(one):
    model, inputs = one
    with select_tokens(model, Random(), keep=6):
        dynamic = generate(model, inputs)
        assert torch.equal(generate(model, inputs, cache_implementation="static", disable_compile=True), dynamic)
        torch.manual_seed(0)
        first = model.generate(**inputs, max_new_tokens=6, do_sample=True)
        torch.manual_seed(0)
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=True), first)


def test_an_assistant_model_changes_nothing(one, tiny_model):
    model, inputs = one
    assistant, _ = tiny_model("clip", "llama")
    with select_tokens(model, Random(), keep=6):
        alone = generate(model, inputs)
        assert torch.equal(generate(model, inputs, assistant_model=assistant), alone)


def test_labels_and_gradients(one):
    model, inputs = one
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    with select_tokens(model, Random(), keep=6):
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_an_uneven_batch_teach_no_padding(ragged, side):
    """The shortened rows differ in length; each keeps the labels of its text, and -100 at its padding."""
    model, inputs = ragged
    if side == "right":
        inputs = {k: v.flip(1) if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()}
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    image = ids == model.config.image_token_id
    labels = ids.masked_fill(image | ~mask, -100)
    pruned = prune_inputs(model, {**inputs, "labels": labels}, Random(), Budget(4)).inputs
    padding = pruned["attention_mask"] == 0
    assert bool(padding.any())
    assert bool((pruned["labels"][padding] == -100).all())
    for row in range(3):
        taught = pruned["labels"][row] != -100
        assert pruned["labels"][row][taught].tolist() == ids[row][mask[row] & ~image[row]].tolist()
        assert torch.equal(pruned["labels"][row][taught], pruned["input_ids"][row][taught])


def test_text_only_prompt_passes_through(tiny_model):
    model, processor = tiny_model()
    inputs = batch(processor, [], ["USER: hello ASSISTANT:"])
    with torch.no_grad(), select_tokens(model, Random(), keep=4) as log:
        assert torch.equal(generate(model, inputs), model.generate(**inputs, max_new_tokens=6, do_sample=False))
    assert log.measured == []
    assert prune_inputs(model, inputs, Random(), Budget(4)).tokens is None


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


def test_one_encoding_serves_many_budgets(one):
    model, inputs = one
    encoded = encode(model, inputs, {"features"})
    for keep in (3, 17, 1.0):
        reused = prune_inputs(model, inputs, SVDPrune(rank=3), Budget(keep), encoded=encoded)
        fresh = prune_inputs(model, inputs, SVDPrune(rank=3), Budget(keep))
        assert torch.equal(reused.keep, fresh.keep)
        assert reused.measured == fresh.measured


def test_merged_tokens_go_in_in_place_of_the_kept_ones(ragged):
    """Oracle: means of the projected tokens, written out edge by edge; newline tokens go in as they are."""
    model, inputs = ragged
    selector = load_selector("svd-prune:rank=3,merge=nearest")
    with torch.no_grad():
        encoded = encode(model, inputs, selector.needs)
        plain = prune_inputs(model, inputs, selector.selector, Budget(9), encoded=encoded)
        merged = prune_inputs(model, inputs, selector, Budget(9), encoded=encoded)
    assert torch.equal(merged.keep, plain.keep)
    assert merged.measured == plain.measured == [9, 9, 9]
    flow, width = selector.select(encoded.tokens, Budget(9)).flow, encoded.tokens.slots.shape[1]
    for i, (packed, got) in enumerate(zip(encoded.packed, merged.features, strict=True)):
        for slot, row in zip(merged.keep[i].nonzero().flatten().tolist(), got, strict=True):
            mine = (flow.target == i * width + slot).nonzero().flatten().tolist()
            want = sum(flow.weight[e] * packed[int(flow.source[e]) - i * width] for e in mine) if mine else packed[slot]
            torch.testing.assert_close(row, want)
            if int(encoded.tokens.slots[i, slot]) < 0:
                assert not mine
    assert not all(map(torch.equal, merged.features, plain.features))
    sent = merged.inputs["mm_encoder_outputs"]["image"].pooler_output
    assert all(map(torch.equal, sent, merged.features))
    with torch.no_grad():
        assert not torch.allclose(model(**merged.inputs).logits, model(**plain.inputs).logits, atol=1e-3)


@pytest.mark.parametrize("spec", ["norm:merge=nearest", "visionzip", "prumerge", "tome", "grid-pool"])
def test_merging_methods_keep_the_contract_of_the_plug(ragged, tiny_model, spec):
    model, inputs = ragged
    with torch.no_grad():
        logits, ids = model(**inputs).logits, generate(model, inputs)
        with select_tokens(model, spec, keep=1.0):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(generate(model, inputs), ids)
        with select_tokens(model, spec, keep=7) as log:
            generate(model, inputs, num_beams=2)
    assert log.measured == [7, 7, 7]
    with select_tokens(model, spec, keep=7):
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
        model(**inputs, labels=labels).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)


def test_every_shipped_method_runs_on_a_model_as_it_is_loaded(ragged):
    """Attention and keys included, under SDPA; what cannot be had is named."""
    model, inputs = ragged
    for name, cls in available_selectors().items():
        spec = {
            "merge": "merge:selector=norm",
            "mix": "mix:a=norm,b=cls-attention",
            "lofi": "lofi:rank=3",
            "hiprune": "hiprune:layer=1",
        }.get(name, name)
        if cls.learned:
            continue
        with torch.no_grad(), select_tokens(model, spec, keep=7, relevance=lambda t, _: t.features.mean(-1)) as log:
            model(**inputs)
        assert log.measured == [7, 7, 7]


def test_a_method_that_acts_inside_the_language_model_is_refused(one):
    model, inputs = one

    class Inside(Random):
        acts = "inside"

    with pytest.raises(ValueError, match="Inside acts inside the language model"):
        prune_inputs(model, inputs, Inside(), Budget(4))


def test_more_than_there_is_keeps_all(one):
    model, inputs = one
    pruned = prune_inputs(model, inputs, Random(), Budget(10_000))
    assert pruned.measured == pruned.full
    assert bool(pruned.keep.all())


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


def measured(model, inputs):
    with torch.no_grad():
        model(**inputs)


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
