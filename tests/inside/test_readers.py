"""What a stage reads of the language model: attention, keys, states and words, against the plain model."""

from __future__ import annotations

import math

import pytest
import torch
from families import FAMILIES
from inside_runs import FASTV, LAYER, masked_from, ragged

from selector import (
    PACT,
    Budget,
    FastV,
    VisualTokens,
    select_tokens,
)
from selector.base import Stage
from selector.inside import decoder_of


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
