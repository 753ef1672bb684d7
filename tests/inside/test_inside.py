"""Tokens that leave inside the language model, on tiny random models of every family.

Oracle of a pruned run: the plain model at full length, in which the dropped tokens' keys are masked from the stage's
layer on; without hooks of ours, and by 4-D masks of its own.
"""

from __future__ import annotations

import itertools
import math
import threading
from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES, build

from selector import (
    PACT,
    Budget,
    FastV,
    GumbelSelector,
    Inside,
    Norm,
    VisualTokens,
    load_selector,
    prune_inputs,
    select_tokens,
)
from selector.base import Stage
from selector.inside import decoder_of
from selector.measure.answering import forced
from selector.models import encode

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


def by_hand(model, inputs, layer, placeholder):
    """Float64 attention of the last prompt token in a layer of the plain model, from its eager softmax by hand."""
    decoder, caught = decoder_of(model), {}

    def catch(module, args, kwargs):
        caught.update(hidden=args[0].double(), angles=[part.double() for part in kwargs["position_embeddings"]])

    handle = decoder.layers[layer].register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()

    attention = decoder.layers[layer].self_attn
    hidden, (cos, sin) = caught["hidden"][0], caught["angles"]
    norm = decoder.layers[layer].input_layernorm
    normed = hidden * (hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight.double()
    heads, shared, width = 4, 2, attention.head_dim

    def turn(vector, position):
        half = width // 2
        other = torch.cat([-vector[half:], vector[:half]])
        return vector * cos[0, position] + other * sin[0, position]

    visual = (inputs["input_ids"][0] == placeholder).nonzero().flatten().tolist()
    last, paid = len(hidden) - 1, torch.zeros(len(hidden), dtype=torch.float64)
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        group = slice(head // (heads // shared) * width, (head // (heads // shared) + 1) * width)
        query = turn(attention.q_proj.weight[rows].double() @ normed[last], last)
        scores = [
            query @ turn(attention.k_proj.weight[group].double() @ normed[j], j) / width**0.5 for j in range(last + 1)
        ]
        paid += torch.stack(scores).softmax(0) / heads
    return paid[visual].detach()


@pytest.mark.parametrize("own", [False, True])
def test_fastv_reads_the_attention_of_the_last_prompt_token(own):
    """Oracle in float64, head by head and key by key, of the layer before the stage or of its own."""
    family = FAMILIES[0]
    model, inputs = family.model, family.batch([[family.picture(0)]])
    want = by_hand(model, inputs, LAYER if own else LAYER - 1, family.placeholder)
    seen = {}

    class Reads(FastV):
        needs = frozenset({"own_text_attention" if own else "text_attention"})

        def score(self, tokens):
            seen["paid"] = tokens.read(*self.needs, self)
            return seen["paid"]

    with torch.no_grad(), select_tokens(model, Reads(layer=LAYER, count="after"), keep=5) as log:
        model(**inputs)
    torch.testing.assert_close(seen["paid"][0].double(), want, rtol=1e-4, atol=1e-7)
    assert want.std() > 0.01 * want.mean()
    assert log.last.keep[0].nonzero().flatten().tolist() == sorted(want.topk(5).indices.tolist())


def test_layer_keys_and_hidden_states_are_those_of_the_model():
    """The keys as the cache holds them, the states as the model returns them."""
    family = FAMILIES[0]
    model, inputs = family.model, family.batch([[family.picture(0)], [family.picture(1)]])
    seen = {}

    class Reads(FastV):
        needs = frozenset({"layer_keys", "hidden"})

        def score(self, tokens):
            seen.update({name: tokens.read(name, self) for name in self.needs})
            return seen["hidden"].norm(dim=-1)

    with torch.no_grad():
        plain = model(**inputs, use_cache=True, output_hidden_states=True)
        with select_tokens(model, Reads(layer=LAYER, count="after"), keep=5):
            model(**inputs)
    visual = inputs["input_ids"] == family.placeholder
    keys = plain.past_key_values.layers[LAYER - 1].keys.transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen["layer_keys"].flatten(0, 1), keys[visual], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen["hidden"].flatten(0, 1), plain.hidden_states[LAYER][visual])


def test_raters_are_the_text_most_like_the_image():
    """Oracle: SparseVLM's rule written out, and the model's own eager attention."""
    family = FAMILIES[0]
    model, inputs = family.model, family.batch([[family.picture(0)], [family.picture(1)]])
    seen = {}

    class Reads(FastV):
        needs = frozenset({"rater_attention"})

        def score(self, tokens):
            seen["paid"] = tokens.read("rater_attention", self)
            return seen["paid"]

    with torch.no_grad():
        with select_tokens(model, Reads(layer=LAYER, count="after"), keep=5):
            model(**inputs)
        model.set_attn_implementation("eager")
        plain = model(**inputs, output_attentions=True, output_hidden_states=True)
        model.set_attn_implementation("sdpa")
    for row, ids in enumerate(inputs["input_ids"]):
        visual = (ids == family.placeholder).nonzero().flatten()
        text = torch.arange(int(visual[-1]) + 1, len(ids))
        states = plain.hidden_states[0][row]
        alike = torch.stack([(states[v] @ states[text].T).softmax(0) for v in visual]).mean(0)
        raters = text[alike > alike.mean()]
        assert 0 < len(raters) < len(text)
        paid = plain.attentions[LAYER - 1][row].mean(0)[raters].mean(0)
        torch.testing.assert_close(seen["paid"][row], paid[visual], rtol=1e-4, atol=1e-6)
    alone = family.batch([[family.picture(0)]])
    end = int((alone["input_ids"][0] == family.placeholder).nonzero()[-1]) + 1
    alone |= {name: alone[name][:, :end] for name in ("input_ids", "attention_mask")}
    with (
        select_tokens(model, Reads(layer=LAYER, count="after"), keep=5),
        pytest.raises(ValueError, match="text behind"),
    ):
        model(**alone)


class Falling(FastV):
    """Two stages, by the attention of each layer itself."""

    needs = frozenset({"own_text_attention"})

    def stages(self, depth):
        return [Stage(1, 0.5, self), Stage(2, 0.25, self)]

    def score(self, tokens):
        return tokens.read("own_text_attention", self)


@pytest.mark.parametrize("left", [True, False])
def test_stages_nest(left):
    """Two stages: what is gone stays gone, and the result is that of keys masked from each layer on."""
    family = FAMILIES[0]
    model, inputs = family.model, family.batch(ragged(family), left)
    kept = []

    class Noted(Falling):
        def score(self, tokens):
            kept.append(tokens.valid.clone())
            return super().score(tokens)

    with torch.no_grad():
        with select_tokens(model, Noted(count="after"), keep=4) as log:
            got = model(**inputs, use_cache=True)
        last = gone(inputs, log.last, family)
        first = inputs["input_ids"] == family.placeholder
        first[first.clone()] = ~kept[1].flatten()  # not there any more when the second stage chose
        with masked_from(model, 1, first), masked_from(model, 2, last):
            want = model(**inputs)
    assert log.layers == [[16, 8, 4]] * 3
    assert bool((first <= last).all())
    real = inputs["attention_mask"].bool() & ~last
    torch.testing.assert_close(got.logits[real], want.logits[real], rtol=1e-4, atol=1e-4)
    assert [layer.keys.shape[2] for layer in got.past_key_values.layers] == [
        inputs["input_ids"].shape[1],
        int((inputs["attention_mask"].bool() & ~first).sum(1).max()),
        int(real.sum(1).max()),
    ]


def test_stages_nest_beside_a_long_row_of_text():
    """The batch stays as wide as that row, and yet every stage cuts other columns."""
    family = FAMILIES[0]
    model, inputs = family.model, family.batch([[family.picture(0)]])
    text = torch.randint(4, 50, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    inputs |= {"input_ids": torch.cat([inputs["input_ids"], text])}
    inputs |= {"attention_mask": torch.ones_like(inputs["input_ids"])}
    kept = []

    class Noted(Falling):
        def score(self, tokens):
            kept.append(tokens.valid.clone())
            return super().score(tokens)

    with torch.no_grad():
        with select_tokens(model, Noted(count="after"), keep=4) as log:
            got = model(**inputs)
        first, last = inputs["input_ids"] == family.placeholder, gone(inputs, log.last, family)
        first[first.clone()] = ~kept[1].flatten()
        with masked_from(model, 1, first), masked_from(model, 2, last):
            want = model(**inputs)
    torch.testing.assert_close(got.logits[~last], want.logits[~last], rtol=1e-4, atol=1e-4)


def test_before_and_inside_in_turn():
    """The prompt is cut first; the stage inside acts on what is left of it."""
    family = FAMILIES[0]
    model, inputs = family.model, family.batch(ragged(family))
    spec = f"stages:before=norm,inside=(fastv:layer={LAYER}),inside_share=0.5"
    with torch.no_grad(), select_tokens(model, spec, keep=5) as log:
        got = generate(model, inputs)
        cut = log.last
    assert cut.layers == [[6, 6, 3]] * 3
    assert log.measured == [5] * 3
    with torch.no_grad():
        before = prune_inputs(model, inputs, Norm(), Budget(6))
        plan = prune_inputs(model, before.inputs | {"pixel_values": None}, None)
        assert plan.inside is None
        assert torch.equal(before.keep | cut.keep, before.keep)
        assert before.inputs["input_ids"].shape == cut.inputs["input_ids"].shape
        dropped = before.inputs["input_ids"] == family.placeholder
        dropped[dropped.clone()] = ~cut.keep[before.keep]
        with masked_from(model, LAYER, dropped):
            want = generate(model, before.inputs)
    start = before.inputs["input_ids"].shape[1]
    assert torch.equal(got[:, inputs["input_ids"].shape[1] :], want[:, start:])


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


def test_labelled_tokens_are_not_the_question():
    """The last token in front of what is to be learned asks, whatever the answer says."""
    family = FAMILIES[0]
    model, inputs = family.model, family.batch([[family.picture(0)]])
    labels, kept = torch.full_like(inputs["input_ids"], -100), []
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    for answer in (7, 9, 11):
        told = {**inputs, "input_ids": inputs["input_ids"].clone()}
        told["input_ids"][:, -2:] = answer
        with torch.no_grad(), select_tokens(model, FASTV, keep=4) as log:
            model(**told, labels=labels)
            kept.append(log.last.keep)
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])


def test_merging_inside_is_of_hidden_states():
    """A merged token enters the layer as the mean of the states of its group."""
    family = FAMILIES[0]
    model, inputs = family.model, family.batch(ragged(family))
    caught = {}
    decoder = decoder_of(model)
    spec = f"norm:merge=nearest,layer={LAYER},count=after"
    with torch.no_grad(), select_tokens(model, spec, keep=3) as log:
        handle = decoder.layers[LAYER].self_attn.register_forward_pre_hook(
            lambda _, __, kwargs: caught.update(entering=kwargs["hidden_states"]), with_kwargs=True
        )
        model(**inputs)
        handle.remove()
        plain = model.model.language_model
    assert log.last.keep.sum(1).tolist() == [3, 3, 3]
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states[LAYER]
        visual = inputs["input_ids"] == family.placeholder
        tokens = VisualTokens.from_features(states[visual].view(3, 16, -1))
        chosen = load_selector("norm:merge=nearest").select(tokens, Budget(3))
        merged = torch.cat(chosen.flow.apply(list(tokens.features)))
        states[visual] = merged
        dropped = visual.clone()
        dropped[visual] = ~chosen.keep.flatten()
        want = plain.layers[LAYER].input_layernorm(states)
    real = inputs["attention_mask"].bool()
    for row, got in enumerate(caught["entering"]):
        mine = want[row, real[row] & ~dropped[row]]
        torch.testing.assert_close(got[len(got) - len(mine) :], mine, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["lofi:rank=3", "ridge-leverage", "svd-prune:rank=3", "divprune", "random"])
def test_methods_of_before_act_at_a_layer(spec):
    """They choose as on a table of the hidden states."""
    family = FAMILIES[0]
    model, inputs = family.model, family.batch(ragged(family))
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states[LAYER]
        hidden = states[inputs["input_ids"] == family.placeholder].view(3, 16, -1)
        want = load_selector(spec)(VisualTokens.from_features(hidden, projected=hidden), Budget(5))
        with select_tokens(model, f"{spec}{',' if ':' in spec else ':'}layer={LAYER},count=after", keep=5) as log:
            model(**inputs)
    assert torch.equal(log.last.keep, want)


def test_a_learned_selector_acts_at_a_layer_of_its_width():
    family = FAMILIES[0]
    model, inputs = family.model, family.batch(ragged(family))
    torch.manual_seed(0)
    learned = GumbelSelector(dim=48, num_patches=16, width=16, heads=2).eval()
    with torch.no_grad():
        with select_tokens(model, Inside(learned, LAYER, "after"), keep=5) as log:
            model(**inputs)
        states = model(**inputs, output_hidden_states=True).hidden_states[LAYER]
        hidden = states[inputs["input_ids"] == family.placeholder].view(3, 16, -1)
        assert torch.equal(log.last.keep, learned(VisualTokens.from_features(hidden), Budget(5)))
        narrow = GumbelSelector(dim=32, num_patches=16, width=16, heads=2).eval()
        with select_tokens(model, Inside(narrow, LAYER, "after"), keep=5), pytest.raises(ValueError, match="48"):
            model(**inputs)


def test_vtw_leaves_text_alone():
    family = FAMILIES[0]
    model, inputs = family.model, family.batch(ragged(family))
    with torch.no_grad(), select_tokens(model, f"vtw:layer={LAYER}", keep=11) as log:
        out = model(**inputs, use_cache=True)
    assert log.layers == [[16, 16, 0]] * 3
    assert log.measured == [32 / 3] * 3
    words = int(((inputs["input_ids"] != family.placeholder) & inputs["attention_mask"].bool()).sum(1).max())
    assert out.past_key_values.layers[LAYER].keys.shape[2] == words


@pytest.mark.parametrize("spec", ["vtw:layer=1", "fastv:layer=1"])
def test_an_image_that_the_budget_leaves_whole_stays_whole(spec):
    """Beside a larger one that has to lose tokens."""
    (family,) = (family for family in FAMILIES if family.name == "LLaVA-NeXT-Video (images)")
    model, inputs = family.model, family.batch([[family.picture(0)], [family.picture(2)]])
    with torch.no_grad(), select_tokens(model, spec, keep=60) as log:
        generate(model, inputs)
    (large, cut, _), (small, *same) = log.layers
    assert large > 60 > small
    assert cut == (0 if "vtw" in spec else (3 * 60 - large) // 2)
    assert same == [small, small]


def test_budgets_count_the_average_over_the_layers():
    family = FAMILIES[0]
    model, inputs = family.model, family.batch(ragged(family))
    with torch.no_grad():
        with select_tokens(model, "fastv:layer=1", keep=8) as log:
            model(**inputs)
        assert log.layers == [[16, 4, 4]] * 3
        assert log.measured == [8] * 3
        with select_tokens(model, "fastv:layer=1", keep=0.5) as log:
            model(**inputs)
        assert log.layers == [[16, 4, 4]] * 3
        for keep, message in (
            (5, "keep=5 is below what FastV can reach: .* give keep >= 6"),
            ("energy:0.9", "adaptive"),
        ):
            with select_tokens(model, "fastv:layer=1", keep=keep), pytest.raises(ValueError, match=message):
                model(**inputs)


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


def test_compositions_are_rebuilt_from_their_checkpoint(tmp_path):
    for number, spec in enumerate(("stages:before=norm,inside=(fastv:layer=2)", "vtw:layer=2", "lofi:layer=1")):
        one = load_selector(spec)
        folder = one.save_pretrained(tmp_path / str(number))
        again = load_selector(folder)
        assert again.init_args.keys() == one.init_args.keys()
        assert [stage[:2] for stage in again.stages(4)] == [stage[:2] for stage in one.stages(4)]
    inner = load_selector(f"{Norm().save_pretrained(tmp_path / 'norm')}:layer=2,count=after")
    assert (type(inner.selector), inner.layer, inner.count) == (Norm, 2, "after")


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


def test_words_are_read_behind_each_image():
    """Normed states and keys of the text behind an image, against a full-length pass of the model itself."""
    family = FAMILIES[0]
    model, inputs = family.model, family.batch(ragged(family))
    read = {}

    class Reads(FastV):
        needs = frozenset({"word_normed", "word_keys", "normed"})

        def score(self, tokens):
            read.update(normed=tokens.word_normed, keys=tokens.word_keys, visual=tokens.normed)
            return tokens.normed[..., 0]

    with torch.no_grad():
        with select_tokens(model, Reads(LAYER, "after"), keep=4):
            model(**inputs)
        whole = model(**inputs, output_hidden_states=True, use_cache=True)
        states = decoder_of(model).norm(whole.hidden_states[LAYER])
    keys = whole.past_key_values.layers[LAYER - 1].keys.transpose(1, 2).flatten(2)
    visual, real = inputs["input_ids"] == family.placeholder, inputs["attention_mask"].bool()
    for image, (row, before) in enumerate([(0, 0), (1, 0), (1, 16)]):  # images of 16 visual tokens each
        own = visual[row].nonzero()[before : before + 16, 0]
        assert torch.equal(read["visual"][image], states[row, own])
        behind = [c for c in range(int(own[-1]) + 1, visual.shape[1]) if real[row, c] and not visual[row, c]]
        torch.testing.assert_close(read["normed"][image, : len(behind)], states[row, behind])
        torch.testing.assert_close(read["keys"][image, : len(behind)], keys[row, behind])
        assert not read["keys"][image, len(behind) :].any()


@pytest.mark.parametrize(("left", "nested"), [(True, False), (True, True), (False, True)])
def test_readers_of_pact_and_sparse_vlm_plus_see_what_is_still_there(left, nested):
    """In a padded batch, also behind another stage; against an eager pass with masked keys, head by head."""
    family = FAMILIES[0]
    model, inputs = family.model, family.batch(ragged(family), left)
    names, read, kept = ("rater_attention_plus", "mean_query_attention", "own_keys"), {}, []

    class Reads(FastV):
        needs = frozenset(names)

        def stages(self, depth):
            return [Stage(1, 0.5, FastV()), Stage(LAYER, 0.25, self)][not nested :]

        def score(self, tokens):
            read.update({name: tokens.read(name, self) for name in names})
            kept.append(tokens.valid.clone())
            return read["mean_query_attention"]

    with torch.no_grad():
        with select_tokens(model, Reads(count="after"), keep=4):
            model(**inputs)
        visual = inputs["input_ids"] == family.placeholder
        gone_by_then = visual.clone()
        gone_by_then[visual] = ~kept[0].flatten()
        model.set_attn_implementation("eager")
        with masked_from(model, 1, gone_by_then):
            plain = model(**inputs, output_attentions=True, output_hidden_states=True, use_cache=True)
        model.set_attn_implementation("sdpa")
    assert kept[0].sum(1).tolist() == [8 if nested else 16] * 3

    attention = decoder_of(model).layers[LAYER].self_attn
    width, there = attention.head_dim, inputs["attention_mask"].bool() & ~gone_by_then
    entering = decoder_of(model).layers[LAYER].input_layernorm(plain.hidden_states[LAYER]).double().detach()
    turns = [10000.0 ** (-2 * i / width) for i in range(width // 2)]
    for image, (row, before) in enumerate([(0, 0), (1, 0), (1, 16)]):  # images of 16 visual tokens each
        every = visual[row].nonzero()[before : before + 16, 0]
        own = [c for c in every.tolist() if there[row, c]]
        mine = kept[0][image]

        # The keys as the cache would hold them.
        keys = plain.past_key_values.layers[LAYER].keys[row].transpose(0, 1).flatten(1)
        torch.testing.assert_close(read["own_keys"][image, mine], keys[own], rtol=1e-4, atol=1e-4)

        # The mean query of all up to the image's end, its softmax over them, without positions.
        prefix = [c for c in range(int(every[-1]) + 1) if there[row, c]]
        want = torch.zeros(len(prefix), dtype=torch.float64)
        for head in range(4):
            part = slice(head * width, (head + 1) * width)
            group = slice(head // 2 * width, (head // 2 + 1) * width)
            query = torch.stack([attention.q_proj.weight[part].double() @ entering[row, c] for c in prefix]).mean(0)
            own_keys = [attention.k_proj.weight[group].double() @ entering[row, c] for c in prefix]
            want += torch.stack([query @ key / width**0.5 for key in own_keys]).softmax(0) / 4
        want = want[[prefix.index(c) for c in own]].detach()
        got = read["mean_query_attention"][image, mine].double()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
        assert want.std() > 1e-3 * want.mean()

        # Attention over the inner product of ones under rotation; two of four heads.
        states = plain.hidden_states[0][row]
        text = [c for c in range(int(every[-1]) + 1, visual.shape[1]) if there[row, c] and not visual[row, c]]
        alike = (states[every] @ states[text].T).softmax(-1).mean(0)
        raters = [c for c, one in zip(text, alike.tolist(), strict=True) if one > float(alike.mean())]
        divided = torch.zeros(4, len(raters), len(own), dtype=torch.float64)
        for i, rater in enumerate(raters):
            for j, column in enumerate(own):
                ones = sum(2 * math.cos((rater - column) * turn) for turn in turns) / width**0.5
                divided[:, i, j] = plain.attentions[LAYER - 1][row, :, rater, column].double() / ones
        most = sorted(range(4), key=lambda h: -float(divided[h].sum()))[:2]
        got = read["rater_attention_plus"][image, mine].double()
        torch.testing.assert_close(got, divided[most].mean((0, 1)).detach(), rtol=1e-3, atol=1e-5)


def test_pact_merges_the_states_that_enter_its_layer():
    """Its choice is that on the plain model's states and keys, and centres enter the layer as means of states."""
    family = FAMILIES[0]
    model, inputs = family.model, family.batch([[family.picture(0)], [family.picture(1)]])
    layer, read, caught = decoder_of(model).layers[LAYER], {}, {}

    class Noted(PACT):
        def select(self, tokens, budget):
            read["paid"] = tokens.mean_query_attention
            return super().select(tokens, budget)

    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True, use_cache=True)
        with select_tokens(model, Noted(layer=LAYER, rejoin=5.0, count="after"), keep=4) as log:
            handle = layer.input_layernorm.register_forward_pre_hook(lambda _, args: caught.update(entering=args[0]))
            model(**inputs)
            handle.remove()
    visual, states = inputs["input_ids"] == family.placeholder, plain.hidden_states[LAYER].clone()
    keys = plain.past_key_values.layers[LAYER].keys.transpose(1, 2).flatten(2)
    hidden, keys = (values[visual].view(2, 16, -1) for values in (states, keys))
    tokens = VisualTokens.from_features(hidden, hidden=hidden, own_keys=keys, mean_query_attention=read["paid"])
    chosen = PACT(rejoin=5.0).select(tokens, Budget(4))
    assert torch.equal(log.last.keep, chosen.keep)
    assert chosen.flow is not None
    assert len(chosen.flow.source) > 8

    states[visual] = torch.cat(chosen.flow.apply(list(hidden)))
    staying = inputs["attention_mask"].bool()
    staying[visual] = chosen.keep.flatten()
    for row, got in enumerate(caught["entering"]):
        want = states[row, staying[row]]
        torch.testing.assert_close(got[len(got) - len(want) :], want, rtol=1e-4, atol=1e-4)
