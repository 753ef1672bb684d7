"""Every family of models holds the same contracts, each on a tiny random model of the real class.

Oracle of a pruned run: what the unpruned model hands to its language model (embeddings, positions, masks, deepstack
features), cut by the keep mask, and read by the language model again for every new token, without a cache.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import CONTRACTS, FAMILIES, Family, markdown

from selector import Budget, Norm, Random, available_selectors, load_selector, prune_inputs, select_tokens
from selector.measure.answering import forced
from selector.methods.image_transformer import ImageTransformer
from selector.models import available_adapters, encode
from selector.models._attention import HEARD, quantity
from selector.models._towers import ALWAYS

pytestmark = pytest.mark.slow  # thirteen families: a sixth of the suite

NEW = 5


def every(contract: str):
    """All families, for a test of a contract."""
    assert contract in CONTRACTS
    TESTED.add(contract)
    return pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


TESTED: set[str] = set()


def ragged(family: Family):
    """Rows of one picture, two of other sizes, and none."""
    return [[family.picture(0)], [family.picture(1), family.picture(2)], []]


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **kwargs)


@every("keep all")
def test_keep_all_is_bit_identical(family):
    model, inputs = family.model, family.batch(ragged(family))
    with torch.no_grad():
        logits, ids = model(**inputs).logits, generate(model, inputs)
        with select_tokens(model, Random(), keep=1.0) as log:
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(generate(model, inputs), ids)
    assert log.measured == log.full
    assert sum(log.full) == 2 * int((inputs["input_ids"] == family.placeholder).sum())  # forward and generate


def handed_over(family: Family, inputs):
    """(language model, the arguments with which the unpruned model calls it)."""
    caught = {}
    language = getattr(family.model.base_model, family.language)
    handle = language.register_forward_pre_hook(lambda _, __, kwargs: caught.update(kwargs), with_kwargs=True)
    try:
        family.model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return language, caught


class Loop:
    """The language model on the kept part of a prompt of one row, from scratch for every token."""

    def __init__(self, family: Family, inputs, keep):
        self.model = family.model
        self.language, whole = handed_over(family, inputs)
        self.embeddings = whole["inputs_embeds"][:, keep]
        place = whole.get("position_ids")
        self.place = (torch.arange(len(keep))[None] if place is None else place)[..., keep]
        mask = whole.get("attention_mask")
        self.mask = None
        if isinstance(mask, dict):
            self.mask = {name: part[:, :, keep][..., keep] for name, part in mask.items()}
        elif mask is not None and mask.ndim == 4:
            self.mask = mask[:, :, keep][..., keep]
        self.deep = {}
        if whole.get("deepstack_visual_embeds") is not None:
            visual = whole["visual_pos_masks"][0]
            self.deep = {
                "visual_pos_masks": visual[None, keep],
                "deepstack_visual_embeds": [layer[keep[visual]] for layer in whole["deepstack_visual_embeds"]],
            }

    def logits(self):
        mask = self.mask if self.mask is not None else torch.ones(self.embeddings.shape[:2], dtype=torch.long)
        read = self.language(
            inputs_embeds=self.embeddings, position_ids=self.place, attention_mask=mask, use_cache=False, **self.deep
        )
        return self.model.lm_head(read.last_hidden_state[:, -1])

    @staticmethod
    def grown(mask):
        return torch.nn.functional.pad(torch.nn.functional.pad(mask, (0, 1)), (0, 0, 0, 1), value=True)

    def append(self, token):
        self.embeddings = torch.cat([self.embeddings, self.model.get_input_embeddings()(token[None, None])], 1)
        self.place = torch.cat([self.place, self.place[..., -1:] + 1], -1)
        if self.mask is not None:  # seen by nothing before it, sees everything
            one = isinstance(self.mask, torch.Tensor)
            grown = {name: self.grown(part) for name, part in ({"": self.mask} if one else self.mask).items()}
            self.mask = grown[""] if one else grown
        if self.deep:
            self.deep["visual_pos_masks"] = torch.nn.functional.pad(self.deep["visual_pos_masks"], (0, 1))


@every("pruned")
@pytest.mark.parametrize("keep", [3, 0.4])
def test_pruned_generation_equals_a_cache_free_loop(family, keep):
    model, inputs = family.model, family.batch([[family.picture(0), family.picture(2)]])
    with torch.no_grad():
        with select_tokens(model, Random(), keep=keep) as log:
            got = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
            alone = model(**inputs).logits[:, -1]
        plain = model(**inputs).logits[:, -1]
        visual = inputs["input_ids"][0] == family.placeholder
        kept = ~visual
        lengths = log.last.tokens.lengths.tolist()
        kept[visual] = torch.cat([row[:n] for row, n in zip(log.last.keep, lengths, strict=True)])
        loop = Loop(family, inputs, kept)
        for step, token in enumerate(got.sequences[0, inputs["input_ids"].shape[1] :]):
            want = loop.logits()
            torch.testing.assert_close(got.logits[step], want, rtol=1e-3, atol=1e-3)
            loop.append(token)
    assert int(kept.sum()) == log.last.inputs["input_ids"].shape[1] < len(kept)
    torch.testing.assert_close(alone, got.logits[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(alone, plain, rtol=0.02, atol=0.02)  # else the model is blind and parity proves nothing


@every("batches")
@pytest.mark.parametrize("keep", [3, 0.5])
def test_a_ragged_batch_equals_its_rows(family, keep):
    model, rows = family.model, ragged(family)
    inputs = family.batch(rows)
    with torch.no_grad(), select_tokens(model, Norm(), keep=keep) as log:
        together = generate(model, inputs, output_logits=True, return_dict_in_generate=True)
    measured = []
    for i, pictures in enumerate(rows):
        single = family.prompts([(i, pictures)])
        with torch.no_grad(), select_tokens(model, Norm(), keep=keep) as alone:
            want = generate(model, single, output_logits=True, return_dict_in_generate=True)
        torch.testing.assert_close(together.logits[0][i], want.logits[0][0], rtol=1e-3, atol=1e-3)
        new = want.sequences[0, single["input_ids"].shape[1] :]
        assert torch.equal(together.sequences[i, inputs["input_ids"].shape[1] :][: len(new)], new)
        measured += alone.measured
    assert log.measured == measured
    assert all(few < many for few, many in zip(log.measured, log.full, strict=True))


@every("batches")
def test_padding_stays_on_its_side(family):
    model = family.model
    for left in (True, False):
        pruned = prune_inputs(model, family.batch(ragged(family), left), Random(), Budget(4)).inputs
        rising = pruned["attention_mask"].diff(dim=1) >= 0
        assert bool(rising.all()) == left
        for name in family.rows:
            assert torch.equal(pruned[name], family.rows[name](pruned["input_ids"])), name


@every("beams")
@pytest.mark.parametrize("keep", [4, 0.5, 1.0])
def test_beams_of_a_batch_are_those_of_its_rows(family, keep):
    model, rows = family.model, ragged(family)
    inputs = family.batch(rows)
    asked = {"num_beams": 3, "num_return_sequences": 2}
    with torch.no_grad(), select_tokens(model, Norm(), keep=keep):
        together = generate(model, inputs, **asked)[:, inputs["input_ids"].shape[1] :]
        again = generate(model, inputs, **asked)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(together, again)  # nothing was edited in place
    if keep == 1.0:
        with torch.no_grad():
            assert torch.equal(together, generate(model, inputs, **asked)[:, inputs["input_ids"].shape[1] :])
    for i, pictures in enumerate(rows):
        single = family.prompts([(i, pictures)])
        with torch.no_grad(), select_tokens(model, Norm(), keep=keep):
            want = generate(model, single, **asked)[:, single["input_ids"].shape[1] :]
        assert torch.equal(together[2 * i : 2 * i + 2, : want.shape[1]], want)


@every("text only")
def test_a_prompt_of_text_passes_through(family):
    model, inputs = family.model, family.batch([[], []])
    with torch.no_grad(), select_tokens(model, Random(), keep=4) as log:
        inside = generate(model, inputs)
    with torch.no_grad():
        assert torch.equal(inside, generate(model, inputs))
    assert log.measured == []


@every("measured")
@pytest.mark.parametrize("keep", [3, 1.0])
def test_an_answer_read_in_one_pass_is_the_generated_one(family, keep):
    model, inputs = family.model, family.batch([[family.picture(0), family.picture(2)]])
    pruned = prune_inputs(model, inputs, Random(), Budget(keep))
    for _ in range(2):  # nothing is edited in place
        read = forced(model, pruned.inputs, torch.arange(5, 9), layers=(2,), image_token_id=family.placeholder)
    assert read.visual[2].shape == (sum(pruned.measured), 48)
    with torch.no_grad():
        said = generate(model, pruned.inputs, output_logits=True, return_dict_in_generate=True)
        new = said.sequences[0, pruned.inputs["input_ids"].shape[1] :]
    read = forced(model, pruned.inputs, new)
    torch.testing.assert_close(read.logits, torch.cat(said.logits), rtol=1e-3, atol=1e-3)


@every("labels")
def test_labels_and_gradients(family):
    model, inputs = family.model, family.batch(ragged(family)[:2], left=False)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == family.placeholder, -100)
    with select_tokens(model, Random(), keep=4):
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    grown = [name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()]
    assert any("vision" in name or "visual" in name for name in grown)  # through the visual tokens into the tower
    model.zero_grad(set_to_none=True)


def gives(family: Family) -> frozenset[str]:
    """The tower's queries and keys, once they can be read, give all but attention from a missing CLS token."""
    attention = HEARD if family.cls else HEARD - {"cls_attention"}
    return ALWAYS | (attention if family.keys else set())


@pytest.mark.filterwarnings("ignore::selector.spectrum.FullRankWarning")  # pictures of a handful of tokens
@every("selectors")
def test_every_selector_runs_or_is_refused_by_name(family):
    """A method that reads what this family lacks is refused by the name of that field."""
    model, inputs = family.model, family.batch(ragged(family))
    torch.manual_seed(0)
    specs = {
        "merge": "merge:selector=norm",
        "mix": "mix:a=norm,b=uniform",
        "lofi": "lofi:rank=3",
        "hiprune": "hiprune:layer=1",
    }
    specs |= dict.fromkeys(
        ("dart-inside", "fastv", "pact", "pyramid-drop", "sparse-vlm", "vscan", "vtw", "inside", "stages"), "norm"
    )  # tests/inside has them
    chosen = [load_selector(specs.get(name, name)) for name, cls in available_selectors().items() if not cls.learned]
    chosen += [load_selector(f"{name}:attention=received") for name in ("visionzip", "prumerge", "cls-attention")]
    chosen += [load_selector("norm:merge=nearest"), ImageTransformer(48, "projected", 32, question_dim=48)]
    served = 0
    for selector in chosen:
        missing = sorted(need for need in selector.needs if quantity(need) not in gives(family))
        with torch.no_grad(), select_tokens(model, selector, keep=4, relevance=lambda t, _: t.features.mean(-1)) as log:
            if missing:
                with pytest.raises(ValueError, match=f"gives no {', '.join(missing)} to a selector"):
                    model(**inputs)
                continue
            model(**inputs)
        assert log.measured == [4, 4, 4], selector
        served += 1
    assert served >= 15


@every("selectors")
def test_the_question_is_the_text_behind_each_picture(family):
    model, inputs = family.model, family.batch(ragged(family))
    with torch.no_grad():
        tokens = encode(model, inputs, {"question"}).tokens
    embed = model.get_input_embeddings()
    place = 0
    for i, pictures in enumerate(ragged(family)):
        ids = inputs["input_ids"][i]
        left = len(pictures)
        for _ in pictures:
            left -= 1
            seen = tokens.question[place][tokens.question_mask[place]]
            # From the end of the row: the text behind the last placeholder of this picture, without later pictures.
            visual = (ids == family.placeholder).nonzero().flatten()
            later = sum(tokens.lengths[place + 1 : place + 1 + left].tolist())
            behind = ids[int(visual[len(visual) - 1 - later]) + 1 :]
            behind = behind[(behind != family.placeholder)]
            torch.testing.assert_close(seen, embed(behind).detach())
            place += 1


@every("selectors")
def test_projected_tokens_are_the_packed_ones(family):
    with torch.no_grad():
        found = encode(family.model, family.batch(ragged(family)), {"features", "projected"})
    tokens = found.tokens
    for slots, packed in zip(tokens.slots, found.packed, strict=True):
        slots = slots[: len(packed)]
        own = slots[slots >= 0]
        assert len(own.unique()) == len(own)  # a packed token, an encoder token
        torch.testing.assert_close(tokens.projected.flatten(0, 1)[own], packed[slots >= 0])
    assert not tokens.projected[~tokens.valid].any()
    assert tokens.lengths.tolist() == [len(packed) for packed in found.packed]
    assert bool((tokens.image.diff() >= 0).all())
    assert tokens.image.unique().tolist() == list(range(len(found.packed)))


@every("unknown arguments")
def test_an_argument_of_the_prompts_length_is_refused_by_name(family):
    """It would go on uncut; models take it without a word."""
    model, inputs = family.model, family.batch(ragged(family))
    for stray in (torch.ones_like(inputs["input_ids"]), torch.arange(inputs["input_ids"].shape[1])):
        with pytest.raises(ValueError, match="stray_ids has the prompt's length"):
            prune_inputs(model, {**inputs, "stray_ids": stray}, Random(), Budget(4))
    with pytest.raises(ValueError, match="attention_mask must be of the shape of input_ids"):
        prune_inputs(model, {**inputs, "attention_mask": inputs["attention_mask"][:, 1:]}, Random(), Budget(4))


def test_every_contract_is_tested_and_every_adapter_too():
    assert set(CONTRACTS) == TESTED
    assert {family.kind for family in FAMILIES} | {"llava_next"} == set(available_adapters())


def test_the_table_of_families_is_printed_from_these_tests():
    page = Path(__file__).parents[2] / "selector" / "models" / "README.md"
    assert markdown() in page.read_text()
