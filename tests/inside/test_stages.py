"""Stages: how they nest, what their budgets count, and which selectors act at one."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from inside_runs import LAYER, Falling, generate, gone, masked_from, ragged

from selector import (
    Budget,
    GumbelSelector,
    Inside,
    Norm,
    VisualTokens,
    load_selector,
    prune_inputs,
    select_tokens,
)
from selector.inside import decoder_of


@pytest.mark.parametrize("left", [True, False])
def test_stages_nest(left):
    """Two stages: what is gone stays gone, and the result is that of keys masked from each layer on."""
    family = FAMILIES[0]
    model, inputs = family.model, family.batch(ragged(family), left)
    noted = Falling(count="after")

    with torch.no_grad():
        with select_tokens(model, noted, keep=4) as log:
            got = model(**inputs, use_cache=True)
        last = gone(inputs, log.last, family)
        first = inputs["input_ids"] == family.placeholder
        first[first.clone()] = ~noted.seen[1].flatten()  # not there any more when the second stage chose
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
    noted = Falling(count="after")

    with torch.no_grad():
        with select_tokens(model, noted, keep=4) as log:
            got = model(**inputs)
        first, last = inputs["input_ids"] == family.placeholder, gone(inputs, log.last, family)
        first[first.clone()] = ~noted.seen[1].flatten()
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


def test_compositions_are_rebuilt_from_their_checkpoint(tmp_path):
    for number, spec in enumerate(("stages:before=norm,inside=(fastv:layer=2)", "vtw:layer=2", "lofi:layer=1")):
        one = load_selector(spec)
        folder = one.save_pretrained(tmp_path / str(number))
        again = load_selector(folder)
        assert again.init_args.keys() == one.init_args.keys()
        assert [stage[:2] for stage in again.stages(4)] == [stage[:2] for stage in one.stages(4)]
    inner = load_selector(f"{Norm().save_pretrained(tmp_path / 'norm')}:layer=2,count=after")
    assert (type(inner.selector), inner.layer, inner.count) == (Norm, 2, "after")


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
