"""The plug on real model classes with random weights: keep-all is the identity, a pruned prefill is really shorter.

Oracle of a pruned run: the language model called from scratch on the kept embeddings, without a cache.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from plugged import PROMPT, batch, generate

from selector import (
    Budget,
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
            "dart-inside": "dart-inside:count=after",
            "fastv": "fastv:count=after",
            "pact": "pact:count=after",
            "pyramid-drop": "pyramid-drop:count=after",
            "sparse-vlm": "sparse-vlm:count=after",
            "vscan": "vscan:layer=0,count=after",
            "inside": "inside:selector=norm,layer=1,count=after",
            "stages": "stages:before=norm,inside=fastv,count=after",
        }.get(name, name)
        if cls.learned or name == "vtw":  # its budget is its layer
            continue
        with torch.no_grad(), select_tokens(model, spec, keep=7, relevance=lambda t, _: t.features.mean(-1)) as log:
            model(**inputs)
        left = [own[-1] for own in log.layers] or log.measured  # behind the last stage, for those that act inside
        assert left == [7, 7, 7]


def test_more_than_there_is_keeps_all(one):
    model, inputs = one
    pruned = prune_inputs(model, inputs, Random(), Budget(10_000))
    assert pruned.measured == pruned.full
    assert bool(pruned.keep.all())
