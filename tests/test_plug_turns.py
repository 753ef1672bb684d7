"""Many questions about one image: it is encoded, and selected from, once."""

from __future__ import annotations

import pytest
import torch
from plugged import batch, generate

from selector import Budget, ImageTransformer, Norm, SVDPrune, prune_inputs, pruning, select_tokens

ASKED = ["<image> hello", "<image> what is TOTAL?", "<image> and the date? the colour?"]


@pytest.fixture
def counted(tiny_model, make_image, monkeypatch):
    """Model, inputs of several questions about one image, and the list of encodings."""
    model, processor = tiny_model()
    image, encodings, encode = make_image(40, 70, 3), [], pruning.encode
    monkeypatch.setattr(pruning, "encode", lambda *args: encodings.append(1) or encode(*args))
    return model, processor, image, [batch(processor, [image], [text]) for text in ASKED], encodings


def test_further_questions_encode_and_select_no_more(counted):
    model, _, _, questions, encodings = counted
    chosen = []

    class Counts(SVDPrune):
        def score(self, tokens):
            chosen.append(1)
            return super().score(tokens)

    with select_tokens(model, Counts(rank=2), keep=9) as log:
        answers = [generate(model, inputs) for inputs in questions]
    assert len(encodings) == len(chosen) == 1
    assert (log.reused, log.measured, len(log.full)) == (2, [9] * 3, 3)
    for inputs, answer in zip(questions, answers, strict=True):
        with select_tokens(model, SVDPrune(rank=2), keep=9) as alone:
            assert torch.equal(generate(model, inputs), answer)
        assert alone.reused == 0
        assert torch.equal(alone.last.keep, log.last.keep)


def test_logits_of_a_further_question_are_equal_to_the_bit(counted):
    model, _, _, questions, _ = counted
    with torch.no_grad():
        with select_tokens(model, "norm", keep=9) as log:
            again = [model(**inputs).logits for inputs in questions]
        assert log.reused == 2
        for inputs, logits in zip(questions, again, strict=True):
            assert torch.equal(model(**prune_inputs(model, inputs, Norm(), Budget(9)).inputs).logits, logits)


def test_other_pixels_are_encoded(counted, make_image):
    model, processor, image, questions, encodings = counted
    other = batch(processor, [make_image(40, 70, 4)], [ASKED[0]])
    nearly = dict(questions[0], pixel_values=questions[0]["pixel_values"].clone())
    nearly["pixel_values"].view(-1)[-1] += 1e-3
    two = batch(processor, [image, image], [ASKED[0], ASKED[1]])
    with select_tokens(model, "norm", keep=9) as log:
        for number, inputs in enumerate((questions[0], other, questions[0], nearly, two), 1):
            generate(model, inputs)
            assert (len(encodings), log.reused) == (number, 0)


def test_pixels_changed_in_place_are_other_pixels(counted):
    model, _, _, questions, encodings = counted
    with select_tokens(model, "norm", keep=9) as log:
        generate(model, questions[0])
        questions[0]["pixel_values"].mul_(0.5)
        generate(model, questions[0])
    assert (len(encodings), log.reused) == (2, 0)


@pytest.mark.parametrize("what", ["encoder", "selector", "autocast"])
def test_what_the_choice_depends_on_may_change(counted, what):
    model, _, _, questions, encodings = counted
    selector = ImageTransformer(dim=model.config.vision_config.hidden_size, width=16)
    changed = model.base_model.vision_tower if what == "encoder" else selector
    before = {name: value.clone() for name, value in changed.state_dict().items()}  # the model is other tests' as well
    try:
        with select_tokens(model, selector, keep=9) as log:
            generate(model, questions[0])
            if what != "autocast":
                with torch.no_grad():
                    next(changed.parameters()).mul_(1.5)
            with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
                generate(model, questions[0])
    finally:
        changed.load_state_dict(before)
    assert (len(encodings), log.reused) == (2, 0)


def test_a_selector_that_reads_the_question_chooses_anew(counted):
    model, _, _, questions, encodings = counted
    with select_tokens(model, "cdpruner", keep=9, relevance=lambda tokens, _: tokens.features.mean(-1)) as log:
        for inputs in questions:
            generate(model, inputs)
    assert (len(encodings), log.reused) == (3, 0)


def test_features_with_a_graph_and_models_in_training_are_not_taken_again(counted):
    model, _, _, questions, encodings = counted
    with select_tokens(model, "norm", keep=9) as log:
        for _ in range(2):  # the second backward pass would find the first one's graph freed
            model(**questions[0], labels=questions[0]["input_ids"].clamp(max=5)).loss.backward()
        model.train()
        with torch.no_grad():
            model(**questions[0])
            model(**questions[0])
        model.eval()
    model.zero_grad(set_to_none=True)
    assert (len(encodings), log.reused) == (4, 0)


def test_beams_of_a_further_question(counted):
    """Beam search edits what it is handed; the kept tokens must not notice."""
    model, _, _, questions, _ = counted
    with select_tokens(model, "norm", keep=9) as log:
        first = generate(model, questions[0], num_beams=2)
        assert torch.equal(generate(model, questions[0], num_beams=2), first)
        generate(model, questions[1])
        assert torch.equal(generate(model, questions[0], num_beams=2), first)
    assert log.reused == 3


def test_a_chat_goes_on_from_the_cache(counted):
    """The next turn reads the cache of the turn before: its text alone, at the positions of the full prompt."""
    model, processor, _, questions, _ = counted
    more = processor.tokenizer(" and more", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad(), select_tokens(model, "norm", keep=9):
        first = model(**questions[0], use_cache=True)
        start = questions[0]["input_ids"].shape[1]
        positions = torch.arange(start, start + more.shape[1])[None]
        second = model(input_ids=more, past_key_values=first.past_key_values, position_ids=positions)

        whole = {
            name: torch.cat([value, more if name == "input_ids" else torch.ones_like(more)], 1)
            for name, value in questions[0].items()
            if name in ("input_ids", "attention_mask")
        }
        want = model(**(dict(questions[0]) | whole))
    torch.testing.assert_close(second.logits[0], want.logits[0, -more.shape[1] :], rtol=1e-4, atol=1e-4)
