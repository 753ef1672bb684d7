"""The comparison end to end on a tiny random model: what is measured, what is stored, what a re-run does."""

from __future__ import annotations

import base64
import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_runs import TOKENS, found

from selector import Budget, GumbelSelector, Norm, Random, SVDPrune, records, select_tokens
from selector.errors import UsageError
from selector.measure import harness as measure
from selector.measure.answering import answer, forced, prepare, without_image
from selector.measure.protocol import Protocol
from selector.measure.scores import vqa
from selector.measure.settings import row_settings
from selector.models import encode
from selector.pruning import Pruned, prune_inputs
from selector.report.standings import distil
from selector.report.summary import summarize
from selector.tasks import Task
from selector.tasks.sample import Sample


def test_every_row_and_sample_once(run):
    steps = run()
    assert len(steps) == len(found(steps)) == 4 * (2 + 2 * 2)
    assert all((s.total, s.task) == (4, "toy") for s in steps)


def test_the_plan_says_who_sees_the_question(run):
    class Asking(Norm):
        sees_question = True

    run({"random": Random(), "asking": Asking()})
    plan = json.loads((run.folder / "run.json").read_text())
    assert {row["label"]: row["sees_question"] for row in plan["rows"]} == {
        "full": False,
        "blind": False,
        "random": False,
        "asking": True,
    }
    rows = summarize(run.folder)["rows"]
    assert {row["selector"] for row in rows if row["sees_question"]} == {"asking"}
    data = distil(run.folder)
    assert {row["selector"] for row in data["rows"] if row["sees_question"]} == {"asking"}


def test_counts_are_those_that_reach_the_language_model(run, task):
    results = found(run())
    for sample in task.samples(4, 0):
        inputs = prepare(run.processor, sample.image, sample.question, run.model.device)
        whole = int((inputs["input_ids"] == run.model.config.image_token_id).sum())
        row = {key[:2]: record for key, record in results.items() if key[2] == sample.id}
        assert row["full", "None"]["tokens"] == whole
        assert row["blind", "None"]["tokens"] == 0
        assert row["svd", "0.5"]["tokens"] == int(whole / 2 + 0.5)
        assert row["random", "9"]["tokens"] == 9
        assert {record["full_tokens"] for record in row.values()} == {whole}


def test_answers_are_those_of_the_plain_model_and_of_the_context_manager(run, task):
    """Two other ways to the same words: generate untouched, and generate inside select_tokens."""
    results = found(run())
    for sample in task.samples(4, 0):
        if sample.question is None:
            continue
        inputs = prepare(run.processor, sample.image, sample.question, run.model.device)

        def words(**kwargs):
            ids = run.model.generate(**kwargs, max_new_tokens=TOKENS, do_sample=False)
            return run.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)  # noqa: B023

        assert results["full", "None", sample.id]["answer"] == words(**inputs).strip()
        with select_tokens(run.model, SVDPrune(energy=0.5), keep=9):
            assert results["svd", "9", sample.id]["answer"] == words(**inputs).strip()


def test_the_full_row_is_in_full_agreement_with_itself(run):
    for (label, _, _), record in found(run()).items():
        if label == "full":
            assert record["ipr_shift"] == 0
            assert not record["saturated"]
            if "answer" in record:
                assert (record["agrees"], record["flip"], record["nll_shift"], record["first_token_kl"]) == (
                    True,
                    "same",
                    0,
                    0,
                )


def test_a_budget_above_the_image_keeps_all_and_says_so(run):
    results = found(run(keeps=("100000",)))
    for (label, _, sample), record in results.items():
        if label in ("svd", "random"):
            full = results["full", "None", sample]
            assert record["saturated"]
            assert record["tokens"] == full["tokens"]
            assert record.get("answer") == full.get("answer")
            assert record["ipr_shift"] == 0
            assert record["evidence"] == full["evidence"]


def test_blind_never_sees_the_image(run):
    results = found(run())
    same_question = [results["blind", "None", name]["answer"] for name in ("s0", "s3")]
    assert same_question[0] == same_question[1]
    shifts = [results["blind", "None", name]["first_token_kl"] for name in ("s0", "s3")]
    assert shifts[0] != shifts[1]  # the unpruned model does see it


def test_a_sample_without_a_question_has_tokens_and_evidence_only(run):
    results = found(run())
    record = results["svd", "0.5", "s2"]
    assert "answer" not in record
    assert 0 <= record["evidence"] <= 1
    assert record["tokens"] > 0


def test_an_image_is_encoded_once_and_the_full_model_answers_once(run, monkeypatch):
    calls = {"encode": 0, "generate": 0}
    encode, generate = run.model.base_model.get_image_features, type(run.model).generate

    def counted_encode(*args, **kwargs):
        calls["encode"] += 1
        return encode(*args, **kwargs)

    def counted_generate(*args, **kwargs):
        calls["generate"] += 1
        return generate(*args, **kwargs)

    counted_encode.__signature__ = inspect.signature(encode)
    monkeypatch.setattr(run.model.base_model, "get_image_features", counted_encode)
    monkeypatch.setattr(type(run.model), "generate", counted_generate)
    run()
    assert calls == {"encode": 4 + 1, "generate": 3 * (2 + 2 * 2) + 1}  # and the first sample once before, untimed


def test_without_answers_nothing_is_generated(run, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("generate was called")

    monkeypatch.setattr(type(run.model), "generate", never)
    results = found(run(answers=False))
    assert len(results) == 4 * (1 + 2 * 2)
    assert all("answer" not in record and "evidence" in record for record in results.values())


def test_an_exception_goes_up_and_nothing_is_scored(run, monkeypatch):
    generate, calls = type(run.model).generate, []

    def fails_at_the_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # the first warms up
            raise RuntimeError("out of memory")
        return generate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(run.model), "generate", fails_at_the_third)
        with pytest.raises(RuntimeError, match="out of memory"):
            run()
    stored = [r for p in run.folder.rglob("*.jsonl") for r in records.read_records(p)]
    assert len(stored) == 2  # full and blind of the first sample
    assert all("answer" in r for r in stored)
    assert len(found(run())) == 24 - 2


def test_a_budget_that_cannot_be_met_is_named(run):
    with pytest.raises(UsageError, match=r"svd at keep=0\.999 on sample 's0'.*removes nothing"):
        run(selectors={"svd": SVDPrune()}, keeps=("0.999",))


def test_all_of_an_endless_task_is_refused(run, task):
    endless = Task("endless", task.samples, None, "x")
    with pytest.raises(UsageError, match="no end, got 'all'"):
        run(tasks=[endless], samples=None)


def test_a_prompt_of_text_alone_passes_through(run):
    class Text(Sample):
        def __init__(self):
            self.__dict__ |= {"id": "text", "image": None, "question": "what is shown?", "answer": "red", "boxes": ()}

    results = found(run(tasks=[Task("text", lambda count, seed: iter([Text()]), 1, "text-1")]))
    answers = {record["answer"] for record in results.values()}
    assert len(answers) == 1
    assert all((r["tokens"], r["full_tokens"], r["agrees"]) == (0, 0, True) for r in results.values())


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_teacher_forcing_repeats_what_generation_computed(tiny_model, make_image, positions):
    """One forward pass over the answer gives the logits that token-by-token decoding chose from."""
    model, processor = tiny_model()
    inputs = prepare(processor, make_image(64, 64), "how many?", model.device)
    pruned = prune_inputs(model, inputs, SVDPrune(rank=2), Budget(9), positions=positions)
    said = answer(model, processor, pruned.inputs, 8)
    assert len(said.ids) == len(said.logits) == 8
    assert torch.equal(said.logits.argmax(-1), said.ids)
    read = forced(model, pruned.inputs, said.ids)
    assert read.visual == {}
    torch.testing.assert_close(read.logits, said.logits, atol=1e-4, rtol=1e-4)
    assert answer(model, processor, pruned.inputs, 8).text == said.text  # the inputs can be used again
    assert said.prefill_seconds > 0


def test_the_blind_prompt_is_the_text_alone(tiny_model, make_image):
    model, processor = tiny_model()
    inputs = prepare(processor, make_image(64, 64), "how many?", model.device)
    blind = without_image(inputs, model.config.image_token_id)
    text = processor.tokenizer.decode(blind["input_ids"][0])
    assert text == "USER: \nhow many? ASSISTANT:"
    assert set(blind) == {"input_ids", "attention_mask"}
    assert blind["attention_mask"].all()


def test_a_model_that_cannot_give_what_a_selector_needs(run):
    """No text tower: a named error, not a run that goes on."""

    class Relevant(Random):
        needs = frozenset({"text"})

    with pytest.raises(UsageError, match=r"on sample 's0': text: .*no text tower"):
        run(selectors={"a": Relevant()})


def test_a_selector_of_another_width_is_named(run):
    selector = GumbelSelector(dim=7, num_patches=16, heads=1).eval()
    with pytest.raises(UsageError, match=r"ours at keep=9 on sample 's0': .*width 7, got width 32"):
        run(selectors={"ours": selector}, keeps=("9",))


def test_a_learned_selector_runs_like_the_others(run):
    torch.manual_seed(0)
    selector = GumbelSelector(dim=32, num_patches=16).eval()
    results = found(run(selectors={"ours": selector, "random": Random()}, keeps=("9",)))
    assert {r["tokens"] for (label, _, _), r in results.items() if label == "ours"} == {9}


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_the_spectrum_is_of_the_visual_tokens_at_the_layer(run, task, layer):
    """The oracle is one plain forward pass over the pruned prompt, without the answer."""
    results = found(run(layer=layer, selectors={"svd": SVDPrune(rank=2)}, keeps=("9",)))
    sample = next(task.samples(1, 0))
    inputs = prepare(run.processor, sample.image, sample.question, run.model.device)
    ipr = {}
    for name, pruned in (
        ("full", prune_inputs(run.model, inputs, None)),
        ("svd", prune_inputs(run.model, inputs, SVDPrune(rank=2), Budget(9))),
    ):
        visual = pruned.inputs["input_ids"][0] == run.model.config.image_token_id
        with torch.no_grad():
            hidden = run.model(**pruned.inputs, use_cache=False, output_hidden_states=True).hidden_states[layer]
        squares = torch.linalg.svdvals(hidden[0, visual].double()).square()
        ipr[name] = (squares / squares.sum()).square().sum().item()
    record = results["svd", "9", "s0"]
    assert record["ipr"] == pytest.approx(ipr["svd"], rel=1e-4)
    assert record["ipr_shift"] == pytest.approx(ipr["svd"] - ipr["full"], rel=1e-3, abs=1e-6)
    assert 0 < record["energy_shift"] <= 1
    assert results["full", "None", "s0"]["ipr_shift"] == 0


def test_the_first_selection_warms_up_and_its_time_is_not_counted(tiny_model, make_image, monkeypatch):
    model, processor = tiny_model()
    inputs = prepare(processor, make_image(64, 64), "what?", model.device)
    seconds = iter([100.0, 2.0, 1.0, 3.0, 5.0, 4.0, 6.0, 100.0, 7.0, 8.0, 9.0])
    monkeypatch.setattr(measure, "prune_inputs", lambda *_, **__: Pruned({}, selection_seconds=next(seconds)))
    harness = measure.Harness(model, processor, frozenset(), Protocol(answers=False, max_new_tokens=TOKENS, repeats=3))
    encoded = encode(model, inputs)

    def timed(label):
        return harness.prune(inputs, measure.Row(label, Random(), Budget(9)), encoded).selection_seconds

    assert timed("random") == 2  # of 2, 1, 3, after a first of 100
    assert timed("random") == 5  # warm: all three count
    assert timed("other") == 8  # each selector warms up by itself
    assert next(seconds, None) is None


def test_the_first_sample_is_measured_twice_and_the_first_time_thrown_away(tiny_model, task, monkeypatch):
    opened = []

    class Counted(measure.Measured):
        def __init__(self, harness, sample, task=None, inputs=None):
            opened.append(sample.id)

    monkeypatch.setattr(measure, "Measured", Counted)
    harness = measure.Harness(*tiny_model(), frozenset(), Protocol(answers=False, max_new_tokens=TOKENS))
    for sample in task.samples(2, 0):
        harness.open(sample)
    assert opened == ["s0", "s0", "s1"]


def test_divergences_over_the_answer_are_those_of_two_forward_passes(run, task):
    results = found(run(keeps=("9",)))
    sample = next(task.samples(1, 0))
    inputs = prepare(run.processor, sample.image, sample.question, run.model.device)
    full = answer(run.model, run.processor, prune_inputs(run.model, inputs, None).inputs, TOKENS)
    pruned = prune_inputs(run.model, inputs, SVDPrune(energy=0.5), Budget(9))
    q = forced(run.model, pruned.inputs, full.ids).logits.double().log_softmax(-1)
    p = full.logits.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    record = results["svd", "9", "s0"]
    assert record["forced_kl"] == pytest.approx(kl.mean().item(), rel=1e-3)
    assert record["first_token_kl"] == pytest.approx(kl[0].item(), rel=1e-3)
    chosen = full.ids[:, None]
    assert record["nll_shift"] == pytest.approx((p - q).gather(1, chosen).mean().item(), rel=1e-3)


def test_a_record_says_what_was_kept_and_what_it_cost(run, task):
    results = found(run(keeps=("9",)))
    full, ours, blind = (results[key, keep, "s0"] for key, keep in (("full", "None"), ("svd", "9"), ("blind", "None")))
    sample = next(task.samples(1, 0))
    inputs = prepare(run.processor, sample.image, sample.question, run.model.device)
    pruned = prune_inputs(run.model, inputs, SVDPrune(energy=0.5), Budget(9))
    kept = pruned.tokens.tiles_of(pruned.keep)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(ours["kept"]), dtype=np.uint8))
    assert bits[: kept.numel()].reshape(kept.shape).tolist() == kept.int().tolist()
    assert ours["prompt_tokens"] == pruned.inputs["input_ids"].shape[1]
    assert full["prompt_tokens"] - ours["prompt_tokens"] == full["tokens"] - 9
    assert blind["prompt_tokens"] == full["prompt_tokens"] - full["tokens"]
    assert full["kv_bytes"] / full["prompt_tokens"] == ours["kv_bytes"] / ours["prompt_tokens"]
    assert full["prefill_flops"] > ours["prefill_flops"] > blind["prefill_flops"]
    assert full["tower_flops"] == ours["tower_flops"]
    assert ours["selector_flops"] > 0
    assert results["random", "9", "s0"]["selector_flops"] == 0
    assert "selector_flops" not in full
    assert 0 <= ours["anls"] <= 1
    assert ours["decode_ms"] > 0
    assert ours["peak_bytes"] is None


def test_images_are_stored_with_the_lines_of_their_patches(run):
    run(keeps=("9",), answers=False)
    lines = [json.loads(path.read_text()) for path in (run.folder / "images").glob("*.json")]
    assert len(lines) == 4
    for each in lines:
        rows, columns = (a * b for a, b in zip(each["tiles"], each["grid"], strict=True))
        assert (len(each["ys"]), len(each["xs"])) == (rows + 1, columns + 1)
        assert each["xs"] == sorted(each["xs"])
        assert each["size"] == [each["xs"][-1], each["ys"][-1]]


def test_a_run_says_which_tasks_are_scored_by_anls(run, task):
    run(tasks=[task, replace(task, name="scans", anls=True)], keeps=("9",), samples=1)
    plan = json.loads((run.folder / "run.json").read_text())
    assert {name: about["anls"] for name, about in plan["tasks"].items()} == {"toy": False, "scans": True}


@pytest.mark.parametrize("label", ["full", "blind"])
def test_a_selector_is_not_called_like_a_reference(run, label):
    with pytest.raises(UsageError, match=f"must not be called full or blind.*got '{label}'"):
        run(selectors={label: Random()})


def test_a_task_is_asked_with_its_suffix_and_scored_by_its_metric(run, make_image, monkeypatch):
    asked = []

    def watched(processor, image, question, device, system=""):
        asked.append((question, system))
        return prepare(processor, image, question, device, system)

    monkeypatch.setattr(measure, "prepare", watched)
    sample = Sample("s0", make_image(64, 64), "how many?", "2", (), ("2", "2", "two", "3"), (), "count/a")
    task = Task("scored", lambda count, seed: iter([sample]), 1, "scored-1", metric="vqa", suffix="Short.")
    steps = run(keeps=("9",), tasks=[task], selectors={"random": Random()})
    assert set(asked) == {("how many?\nShort.", "")}
    for step in steps:
        record = step.record
        assert record["question"] == "how many?"
        assert (record["group"], record["target"]) == ("count/a", "2")
        assert record["score"] == vqa(record["answer"], ["2", "2", "two", "3"])
        assert record["correct"] == (record["score"] >= 0.5)
    plan = json.loads((run.folder / "run.json").read_text())
    assert (plan["tasks"]["scored"]["metric"], plan["tasks"]["scored"]["suffix"]) == ("vqa", "Short.")


def test_the_usual_way_to_ask_is_in_no_key_and_no_record(run, task):
    steps = run(keeps=("9",), samples=1, selectors={"random": Random()})
    assert not any({"score", "full_score", "group"} & step.record.keys() for step in steps)
    usual, other = row_settings(measure.Row("full"), task), row_settings(measure.Row("full"), replace(task, suffix="x"))
    assert other == usual | {"suffix": "x"}
    assert not {"metric", "suffix", "system"} & usual.keys()


def test_a_system_turn_is_in_the_prompt_or_refused(run, make_image):
    image, device = make_image(64, 64), run.model.device
    turns = []

    class Template:
        tokenizer = run.processor.tokenizer

        def apply_chat_template(self, given, **options):
            turns.append(given)
            return "a text without it"

    with pytest.raises(UsageError, match="system must be empty for this model"):
        prepare(Template(), image, "what?", device, "Be brief.")
    assert [turn["role"] for turn in turns[0]] == ["system", "user"]
