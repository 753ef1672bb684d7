"""Learning from answers: packed conversations, gated and pruned passes, the teacher, and the objectives.

The oracle is the model itself: one conversation at a time through its public forward, pruned by the plug.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from selector import Budget, Random, prune_inputs
from selector.measure.answering import prepare
from selector.methods.image_transformer import ImageTransformer
from selector.models import encode
from training.answers import Answers, AnswerSaliency
from training.conversations import Converse
from training.language import FrozenLanguageModel, noisy_tokens
from training.objectives import Step
from training.teacher import AnswerStore, Teacher

TURNS = (("what is this?", "a red square."), ("is it red?", "it is"), ("shown?", "image a"))


@pytest.fixture
def asked(tiny_model, make_image):
    """``asked(text="llama")`` -> model, processor, encoded image, conversation, image."""

    def build(text: str = "llama", turns=TURNS):
        model, processor = tiny_model("clip", text)
        model.requires_grad_(False)
        image = make_image(40, 70)
        conversation = Converse(processor, model.config.image_token_id)(image, turns)
        encoded = encode(model, {**conversation.pixels, "input_ids": None}, ("features", "projected"))
        return model, processor, encoded, conversation, image

    return build


def expected(model, processor, image, question, answer_ids, selector=None, budget=None):
    """Log-probabilities of an answer by the model's own forward."""
    inputs = prepare(processor, image, question, model.device)
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer_ids[None]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if selector is not None:
        inputs = prune_inputs(model, inputs, selector, budget).inputs
    with torch.no_grad():
        logits = model(**inputs, use_cache=selector is not None).logits[0]
    assert length > len(answer_ids)
    return logits[-len(answer_ids) - 1 : -1].float().log_softmax(-1)


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_packed_branches_equal_single_conversations(asked, text):
    model, processor, encoded, conversation, image = asked(text)
    said = FrozenLanguageModel(model).answer_log_probs(encoded, conversation, [0, 1, 2])
    for logs, branch in zip(said, conversation.branches, strict=True):
        want = expected(model, processor, image, branch.question, branch.answer)
        torch.testing.assert_close(logs, want, atol=2e-5, rtol=1e-4)


def test_a_pruned_pass_equals_the_plug(asked):
    model, processor, encoded, conversation, image = asked()
    selector, budget = Random(seed=1), Budget(17)
    keep = selector(encoded.tokens, budget)[0]
    said = FrozenLanguageModel(model).answer_log_probs(encoded, conversation, [0, 2], keep=keep)
    for logs, index in zip(said, (0, 2), strict=True):
        branch = conversation.branches[index]
        want = expected(model, processor, image, branch.question, branch.answer, selector, budget)
        torch.testing.assert_close(logs, want, atol=2e-5, rtol=1e-4)


def test_gates_of_zero_and_one_prune_and_gates_in_between_do_not(asked):
    model, _, encoded, conversation, _ = asked()
    language = FrozenLanguageModel(model)
    keep = Random(seed=2)(encoded.tokens, Budget(20))[0]
    pruned = language.answer_log_probs(encoded, conversation, [0], keep=keep)[0]
    gated = language.answer_log_probs(encoded, conversation, [0], gates=keep.float())[0]
    torch.testing.assert_close(gated, pruned)
    dim = language.answer_log_probs(encoded, conversation, [0], gates=torch.where(keep, 1.0, 0.3))[0]
    assert not torch.allclose(dim, pruned, atol=1e-3)


def test_gates_reach_the_scores_and_no_weight_of_the_model(asked):
    model, _, encoded, conversation, _ = asked()
    gates = torch.full((encoded.tokens.slots.shape[1],), 0.5, requires_grad=True)
    language = FrozenLanguageModel(model)
    for noise in (None, torch.Generator().manual_seed(0)):
        logs = language.answer_log_probs(encoded, conversation, [0, 1], gates=gates, noise=noise)
        (gradient,) = torch.autograd.grad(logs[0].square().mean(), gates)
        assert float(gradient.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_noise_replaces_a_closed_token_and_leaves_an_open_one():
    packed = torch.randn(4000, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 9.0, -3.0])
    gates = torch.cat([torch.ones(2000), torch.zeros(2000)])
    mixed = noisy_tokens(packed, gates, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed[:2000], packed[:2000], atol=0.15, rtol=0.05)
    torch.testing.assert_close(mixed[2000:].mean(0), packed.mean(0), atol=0.4, rtol=0.05)
    torch.testing.assert_close(mixed[2000:].std(0), packed.std(0), atol=0.1, rtol=0.06)
    assert abs(float(torch.corrcoef(torch.stack([mixed[2000:, 1], packed[2000:, 1]]))[0, 1])) < 0.08


def test_what_answers_look_at_is_the_models_own_attention(asked, tiny_model):
    """Against the attention that the eager implementation returns, renormalised to the image."""
    model, _, encoded, conversation, _ = asked()
    language = FrozenLanguageModel(model)
    row = language.row(encoded.packed[0], encoded.image_token_id, conversation.prefix, conversation.branches)
    _, looks = language.attention_to_image(row)
    eager, _ = tiny_model("clip", "llama", "eager")
    with torch.no_grad():
        attentions = eager.model.language_model(
            inputs_embeds=row.embeddings[None],
            attention_mask=row.bias[None, None],
            position_ids=row.positions[None],
            output_attentions=True,
        ).attentions
    for (start, length), look in zip(row.answers, looks, strict=True):
        there = torch.stack(attentions)[:, 0, :, start : start + length][..., row.visual]
        share = there / there.sum(-1, keepdim=True)
        torch.testing.assert_close(look, share.square().mean((0, 1, 2)), atol=1e-6, rtol=1e-4)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_teacher_answers_as_generate_does(asked, tmp_path):
    model, processor, encoded, conversation, image = asked()
    teacher = Teacher(FrozenLanguageModel(model), limit=7, folder=str(tmp_path), fingerprint="a")
    taught = teacher(encoded, conversation)
    for branch in taught.conversation.branches:
        inputs = prepare(processor, image, branch.question, model.device)
        ids = model.generate(**inputs, max_new_tokens=7, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert branch.answer.tolist() == ids.tolist()
        assert len(branch.answer) <= 7


def test_answers_are_written_once_and_read_by_the_next_run(asked, tmp_path, monkeypatch):
    model, _, encoded, conversation, _ = asked()
    first = Teacher(FrozenLanguageModel(model), limit=5, folder=str(tmp_path), fingerprint="a")(encoded, conversation)
    (file,) = tmp_path.iterdir()
    with file.open("a") as out:
        out.write('\n{"image": "cut off by an interr')

    monkeypatch.setattr(FrozenLanguageModel, "own_answer", None)  # nothing may be generated again
    again = Teacher(FrozenLanguageModel(model), limit=5, folder=str(tmp_path), fingerprint="a")(encoded, conversation)
    for before, after in zip(first.conversation.branches, again.conversation.branches, strict=True):
        assert before.answer.tolist() == after.answer.tolist()

    store = AnswerStore(file)
    store.put("another", "question", [3, 4])  # behind the torn line
    assert AnswerStore(file).get("another", "question") == [3, 4]
    for other in ({"fingerprint": "b", "limit": 5}, {"fingerprint": "a", "limit": 6}):
        assert not Teacher(FrozenLanguageModel(model), folder=str(tmp_path), **other).store.known


def test_given_answers_are_learned_where_that_is_asked_for(asked):
    model, processor, encoded, conversation, _ = asked()
    taught = Teacher(FrozenLanguageModel(model), answers="data")(encoded, conversation)
    said = [processor.decode(b.answer, skip_special_tokens=True) for b in taught.conversation.branches]
    assert said == [answer for _, answer in TURNS]


def test_an_answer_of_no_tokens_is_refused(tiny_model):
    with pytest.raises(ValueError, match="limit must be at least 1 token, got 0"):
        Teacher(FrozenLanguageModel(tiny_model()[0]), limit=0)


def test_a_question_that_holds_the_placeholder_is_refused(tiny_model, make_image):
    model, processor = tiny_model()
    converse = Converse(processor, model.config.image_token_id)
    with pytest.raises(ValueError, match="must not hold the image's placeholder, got 'what does <image> mean"):
        converse(make_image(40, 40), [("what?", None), ("what does <image> mean?", None)])


def test_missing_answers_are_written_and_kept_where_the_data_gives_the_others(asked, tmp_path, monkeypatch):
    turns = (("what is this?", "a red square."), ("is it red?", None))
    model, processor, encoded, conversation, _ = asked(turns=turns)
    settings = {"answers": "data", "limit": 4, "folder": str(tmp_path)}
    first = Teacher(FrozenLanguageModel(model), **settings)(encoded, conversation)
    monkeypatch.setattr(FrozenLanguageModel, "own_answer", None)
    again = Teacher(FrozenLanguageModel(model), **settings)(encoded, conversation)
    for taught in (first, again):
        given, own = (branch.answer for branch in taught.conversation.branches)
        assert processor.decode(given, skip_special_tokens=True) == "a red square."
        assert own.tolist() == first.conversation.branches[1].answer.tolist()


def test_questions_are_told_apart_by_their_prompts_and_answers(asked):
    teacher = Teacher(FrozenLanguageModel(asked()[0]), answers="data")
    _, processor, encoded, one, _ = asked(turns=(("ab", "red"), ("c", "it")))
    other = asked(turns=(("a", "red"), ("bc", "it")))[3]
    changed = asked(turns=(("ab", "red"), ("c", "image")))[3]
    said = [
        [
            processor.decode(branch.answer, skip_special_tokens=True)
            for branch in teacher(encoded, each).conversation.branches
        ]
        for each in (one, other, changed)
    ]
    assert said == [["red", "it"], ["red", "it"], ["red", "image"]]
    assert [branch.question for branch in teacher(encoded, other).conversation.branches] == ["a", "bc"]


def test_the_teacher_remembers_within_its_memory(asked):
    model, _, encoded, conversation, _ = asked()
    teacher = Teacher(FrozenLanguageModel(model), limit=4)
    assert teacher(encoded, conversation) is teacher(encoded, conversation)
    small = Teacher(FrozenLanguageModel(model), limit=4, memory=10)
    assert small(encoded, conversation) is not small(encoded, conversation)


def given(asked, selector: ImageTransformer, progress: float = 0.5, seed: int = 0, turns=TURNS) -> Step:
    model, _, encoded, conversation, _ = asked(turns=turns)
    language = FrozenLanguageModel(model)
    taught = Teacher(language, limit=6, looks=True)(encoded, conversation)
    generator = torch.Generator().manual_seed(seed)
    return Step(encoded.tokens, selector, progress, generator, None, language, taught, encoded)


def transformer(question: bool = False, rank: int | None = None) -> ImageTransformer:
    torch.manual_seed(0)
    asked = 48 if question else None
    return ImageTransformer(48, "projected", width=32, pool=1, question_dim=asked, match_rank=rank)


@pytest.mark.parametrize(("question", "rank"), [(False, None), (True, None), (True, 3)])
@pytest.mark.parametrize(
    "objective",
    [Answers(), Answers(gate="noise"), AnswerSaliency(), AnswerSaliency(target="gradient")],
    ids=["attention", "noise", "looks", "gradient"],
)
def test_every_objective_trains_every_weight_of_the_selector(asked, question, rank, objective):
    selector = transformer(question, rank)
    objective(given(asked, selector)).value.backward()
    without = [name for name, p in selector.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    assert not without
    assert float(selector.head.weight.grad.abs().sum()) > 0


def test_answers_are_kl_from_teacher_to_student(asked):
    """Against `torch.nn.functional.kl_div` on passes written out here."""
    step = given(asked, transformer())
    language, taught, encoded = step.asked()
    objective = Answers(kept_range=(0.5, 0.5))
    loss = objective(step).value

    from training.gates import relaxed_budget

    generator = torch.Generator().manual_seed(0)
    torch.rand((), generator=generator)  # the budget's draw
    length = encoded.tokens.slots.shape[1]
    scores = encoded.tokens.packed(step.selector.score(encoded.tokens), 0.0)
    temperature = 1.0 * (0.25 / 1.0) ** (0.5 / 0.8)
    gates = relaxed_budget(scores, encoded.tokens, round(0.5 * length), temperature, generator)[0]
    student = language.answer_log_probs(encoded, taught.conversation, [0, 1, 2], gates=gates)
    want = [
        nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum") / len(theirs)
        for ours, theirs in zip(student, taught.log_probs, strict=True)
    ]
    torch.testing.assert_close(loss, torch.stack(want).mean())


def test_saliency_is_zero_at_its_own_target_and_fades(asked):
    step = given(asked, transformer())
    patch = step.tokens.is_patch[0]
    looks = torch.stack(step.taught.looks)
    target = (looks / looks[:, patch].sum(1, keepdim=True)).mean(0, keepdim=True)
    step.__dict__["slot_scores"] = target.clamp(min=1e-30).log()
    assert AnswerSaliency()(step).value.item() == pytest.approx(0, abs=1e-5)
    step.__dict__["slot_scores"] = torch.zeros_like(target)
    full = AnswerSaliency()(step).value.item()
    assert full > 0.01
    assert AnswerSaliency(fades=1.0)(step).value.item() == pytest.approx(full / 2)
    assert AnswerSaliency(fades=0.4)(step).value.item() == 0


def test_answers_may_begin_later(asked):
    step = given(asked, transformer(), progress=0.2)
    assert Answers(begins=0.3)(step).value.item() == 0
    assert Answers(begins=0.2)(step).value.item() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Answers(weight=0.0), "weight of Answers must be positive, got 0"),
        (lambda: Answers(kept_range=(0.4, 0.1)), "kept_range must be 0 < smallest <= largest < 1"),
        (lambda: Answers(temperature_end=2.0), "temperature_end must be in"),
        (lambda: Answers(students=0), "students must be at least 1, got 0"),
        (lambda: Answers(begins=1.5), "begins must be in"),
        (lambda: AnswerSaliency(fades=0.0), "fades must be in"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_step_without_questions_is_refused(asked):
    step = given(asked, transformer())
    step.taught = None
    with pytest.raises(ValueError, match="needs questions"):
        Answers()(step)


def test_a_template_that_puts_the_question_first_is_refused(tiny_model, make_image):
    model, processor = tiny_model()
    converse = Converse(processor, model.config.image_token_id)
    before = processor.chat_template
    try:
        processor.chat_template = before.replace("ASSISTANT:", "{{ 'x' }}") + "{{ messages[0]['content'][0]['type'] }}"
        with pytest.raises(ValueError, match="at least one question"):
            converse(make_image(40, 40), [])
    finally:
        processor.chat_template = before


def test_the_store_keeps_one_json_object_per_line(tmp_path):
    store = AnswerStore(tmp_path / "new" / "answers.jsonl")
    store.put("a", "q", [1])
    store.put("a", "r", [2])
    lines = [json.loads(line) for line in (tmp_path / "new" / "answers.jsonl").read_text().split("\n") if line]
    assert [entry["ids"] for entry in lines] == [[1], [2]]
