"""What the plugin of lmms-eval asks a model, and what comes back; lmms-eval itself is not needed here."""

from __future__ import annotations

import pytest
import torch
from plugged import PROMPT, batch, generate

from selector import Budget, Norm, load_selector, prune_inputs
from selector.lmms.answers import Answerer, turns

SETTINGS = {"max_new_tokens": 6, "do_sample": False}
TEXT = "USER: hello? ASSISTANT:"
TWO = "USER: <image>\n<image>\nwhich one? ASSISTANT:"


@pytest.fixture
def answerer(tiny_model):
    def build(keep=5, **options):
        model, processor = tiny_model()
        return Answerer(model, processor, Norm(), Budget(keep), **options)

    return build


@pytest.fixture
def images(make_image):
    return [make_image(64, 64), make_image(30, 70, seed=1), make_image(90, 40, seed=2)]


def test_everything_kept_is_the_plain_model(answerer, images):
    everything = answerer(1.0)
    plain = generate(everything.model, batch(everything.processor, images[:1], [PROMPT]))
    with everything.selecting():
        [reply] = everything.generate([PROMPT], [images[:1]], SETTINGS)

    prompt = batch(everything.processor, images[:1], [PROMPT])["input_ids"]
    assert reply.text == everything.processor.tokenizer.decode(plain[0, prompt.shape[1] :], skip_special_tokens=True)
    assert reply.kept == reply.full == (int((prompt == everything.model.config.image_token_index).sum()),)
    assert reply.prompt_tokens == prompt.shape[1]


def test_a_batch_answers_as_one_by_one(answerer, images):
    """Two images, and one, of other sizes: who has which tokens, and how long each prompt was."""
    own = [images[:1], images[1:], images[2:]]
    prompts = [PROMPT, TWO, PROMPT]
    pruned = answerer(5)
    with pruned.selecting() as log:
        together = pruned.generate(prompts, own, SETTINGS)
        alone = [pruned.generate([p], [i], SETTINGS)[0] for p, i in zip(prompts, own, strict=True)]

    assert together == alone
    assert [reply.kept for reply in together] == [(5,), (5, 5), (5,)]
    assert len({reply.full for reply in together}) == 3
    assert log.measured == [5] * 8

    # Against the prompts that really went in.
    for prompt, some, reply in zip(prompts, own, together, strict=True):
        inputs = batch(pruned.processor, some, [prompt])
        assert reply.prompt_tokens == prune_inputs(pruned.model, inputs, Norm(), Budget(5)).inputs["input_ids"].shape[1]


def test_what_leaves_inside_the_language_model_is_an_average(tiny_model, images):
    model, processor = tiny_model()
    pruned = Answerer(model, processor, load_selector("fastv:layer=1"), Budget(0.5))
    with pruned.selecting() as log:
        [reply] = pruned.generate([PROMPT], [images[:1]], SETTINGS)
        loss, _ = pruned.loss(PROMPT, " a red square", images[:1])
    whole = batch(processor, images[:1], [PROMPT])["input_ids"].shape[1]
    assert reply.kept == (log.measured[0],) == (sum(log.layers[0]) / len(log.layers[0]),)
    assert reply.kept[0] < reply.full[0]
    assert reply.prompt_tokens == whole - reply.full[0] + reply.kept[0]
    assert loss > 0


def test_an_answer_ends_where_it_ends(answerer, images, monkeypatch):
    pruned = answerer()
    end = pruned.model.generation_config.eos_token_id
    monkeypatch.setattr(
        pruned.model,
        "generate",
        lambda input_ids, **_: torch.cat([input_ids, torch.tensor([[7, end, 0, 0], [7, 8, 9, 7]])], 1),
        raising=False,
    )
    with pruned.selecting():
        replies = pruned.generate([TEXT, TEXT], [[], []], SETTINGS)
    assert [reply.new_tokens for reply in replies] == [2, 4]
    assert [reply.kept for reply in replies] == [(), ()]


@pytest.mark.parametrize("keep", [1.0, 5])
def test_the_loss_is_that_of_the_answer_alone(answerer, images, keep):
    pruned = answerer(keep)
    [prompt, answer] = [PROMPT, " a red square"]
    inputs = batch(pruned.processor, images[:1], [prompt + answer])
    length = len(pruned.processor.tokenizer(answer, add_special_tokens=False)["input_ids"])

    # By the model's own loss: labels are shifted there, and mean over those that are not -100.
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -length:] = inputs["input_ids"][:, -length:]
    with torch.no_grad():
        wanted = pruned.model(**prune_inputs(pruned.model, inputs | {"labels": labels}, Norm(), Budget(keep)).inputs)
    with pruned.selecting():
        loss, greedy = pruned.loss(prompt, answer, images[:1])
    assert loss == pytest.approx(float(wanted.loss), abs=1e-5)
    assert not greedy


def test_what_the_model_says_itself_is_greedy(answerer, make_image):
    pruned = answerer()
    tokenizer, start = pruned.processor.tokenizer, len(pruned.processor.tokenizer(PROMPT)["input_ids"])

    # A random model says any token; only some read back as themselves behind the prompt.
    for seed in range(20):
        image = make_image(64, 64, seed=seed)
        inputs = prune_inputs(pruned.model, batch(pruned.processor, [image], [PROMPT]), Norm(), Budget(5)).inputs
        with torch.no_grad():
            best = tokenizer.decode(pruned.model(**inputs).logits[0, -1].argmax())
        if best.isascii() and len(tokenizer(PROMPT + best)["input_ids"]) == start + 1:
            break
    others = [letter for letter in "abcdxyz" if letter != best]
    with pruned.selecting():
        loss, greedy = pruned.loss(PROMPT, best, [image])
        scores = [pruned.loss(PROMPT, other, [image]) for other in others]
    assert greedy
    assert not any(same for _, same in scores)
    assert loss < min(other for other, _ in scores)


def test_what_fails_is_raised(answerer, images, monkeypatch):
    pruned = answerer()

    def fail(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    with pruned.selecting(), pytest.raises(ValueError, match="batches of their own"):
        pruned.generate([PROMPT, TEXT], [images[:1], []], SETTINGS)
    with pruned.selecting(), pytest.raises(ValueError, match="must add tokens to the prompt, got ''"):
        pruned.loss(PROMPT, "", images[:1])
    with pytest.raises(RuntimeError, match="within `selecting`"):
        pruned.generate([PROMPT], [images[:1]], SETTINGS)

    monkeypatch.setattr(pruned.model, "generate", fail, raising=False)
    with pruned.selecting(), pytest.raises(torch.OutOfMemoryError):
        pruned.generate([PROMPT], [images[:1]], SETTINGS)
    assert vars(pruned.model)["generate"] is fail  # the model is as it was


def test_the_prompt_is_that_of_the_chat_template(answerer, monkeypatch):
    asked = answerer()
    assert asked.prompt(turns("what is shown?", 1)) == "USER: <image>\nwhat is shown? ASSISTANT:"
    assert asked.prompt(turns("left <image> or right <image>?", 2)).count("<image>") == 2

    # As templates for lists do with a text, and the other way round: nothing is shown, and nothing said about it.
    monkeypatch.setattr(asked.processor, "chat_template", "{% for m in messages %}{% endfor %}ASSISTANT:")
    with pytest.raises(ValueError, match=r"the chat template must show every text.*drops 'what is shown"):
        asked.prompt(turns("what is shown?", 1))


def test_images_stand_where_the_question_says():
    assert turns("what?", 2)[0]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what?"}]
    assert turns("what?", 0)[0]["content"] == [{"type": "text", "text": "what?"}]
    assert turns("<image>", 1)[0]["content"] == [{"type": "image"}]
    with pytest.raises(ValueError, match="it has 2, images are 1"):
        turns("<image> or <image>?", 1)
