"""Comparisons of selectors that act inside the language model: costs per layer, spectra, budgets out of reach."""

from __future__ import annotations

import json

import pytest
import torch
from small_runs import TOKENS, assert_alike, found

from selector import Budget, FastV, Inside, Norm, Random, load_selector, select_tokens
from selector.errors import UsageError
from selector.measure import harness as measure
from selector.measure.answering import answer, forced, prepare
from selector.measure.batches import read
from selector.measure.consistency import spectrum
from selector.measure.cost import Spent, allocated_cache_bytes
from selector.measure.flops import cache_bytes, flop_counter, language_flops
from selector.models import encode
from selector.pruning import prune_inputs
from selector.report.summary import summarize
from selector.report.tables import markdown, notes

KINDS = [("clip", "llama", "sdpa"), ("siglip", "mistral", "eager"), ("clip", "qwen2", "sdpa")]
SELECTORS = {
    "random": Random(),
    "at-1": Inside(Random(), layer=1),
    "fastv": FastV(),
    "both": load_selector("stages:before=norm,inside=fastv,inside_share=0.5"),
}


def opened(model, processor, image, selector, keep):
    inputs = prepare(processor, image, "how many?", model.device)
    encoded = encode(model, inputs, frozenset({"features"}))
    return prune_inputs(model, inputs, selector, Budget(keep), encoded=encoded, inside=True), encoded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", ["vtw:layer=1", "inside:selector=random,layer=1", "stages:before=random,inside=vtw"])
def test_prefill_decoding_and_cache_by_formula(tiny_model, make_image, kind, spec):
    """These selectors compute nothing at their stages: what torch counts is the language model's alone."""
    model, processor = tiny_model(*kind)
    pruned, _ = opened(model, processor, make_image(64, 90), load_selector(spec), 0.7)
    with torch.no_grad(), pruned.acting(model):
        with flop_counter() as prefill:
            output = model(**pruned.inputs, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        turn = measure.Turn(measure.Row("x"), pruned.inputs, pruned)
        lengths = measure._lengths(turn)
        assert len(set(lengths)) > 1
        assert lengths == [layer.keys.shape[2] for layer in cache.layers]
        assert cache_bytes(model.config, lengths, model.dtype.itemsize) == allocated_cache_bytes(cache)
        with flop_counter() as decode:
            model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    assert language_flops(model.config, lengths, lengths) == prefill.get_total_flops()
    assert language_flops(model.config, *measure._decoding(lengths)) == decode.get_total_flops()


def test_a_record_has_what_each_layer_costs(run, task):
    """Three layers: FastV sees all tokens in the first, and the budget is the average of all."""
    records = found(run(SELECTORS, ("0.5",), samples=2))
    for (label, keep, name), record in records.items():
        if label in ("full", "blind", "random"):
            assert "tokens_per_layer" not in record
            assert "spectrum_layer" not in record
            continue
        layers = record["tokens_per_layer"]
        assert len(layers) == 3
        assert record["tokens"] == sum(layers) / 3 <= 0.5 * record["full_tokens"] + 0.5
        assert record["last_tokens"] == layers[2] == layers[1] < layers[0]
        assert (layers[0] < record["full_tokens"]) == (label == "both")
        assert record["spectrum_layer"] == 1
        # All layers together hold as many tokens as those of a selector that acts before: so do their caches.
        before = records["random", keep, name]
        assert record["kv_bytes"] == pytest.approx(before["kv_bytes"], rel=0.02)
        # Yet attention is quadratic: the same average costs more where layers differ.
        assert record["prefill_flops"] > before["prefill_flops"] * (1 - 0.02)
        assert (record["selector_flops"] > 0) == (label in ("fastv", "both"))
        assert record["selection_ms"] > 0
        assert record["prefill_ms"] > 0


def test_operations_at_a_stage_are_those_of_its_attention(tiny_model, task):
    """FastV takes one row of attention of the layer before: 2 · S · q of products, and no more."""
    model, processor = tiny_model()
    harness = measure.Harness(model, processor, frozenset({"features"}), measure.Protocol(max_new_tokens=2), layers=[1])
    measured = harness.open(next(task.samples(1, 0)))
    row = measure.Row("fastv", FastV(), Budget(0.7))
    record = measured.record(row)
    text = model.config.text_config
    width = text.num_attention_heads * text.hidden_size // text.num_attention_heads
    assert record["selector_flops"] == 2 * record["prompt_tokens"] * width


def test_answers_are_those_of_select_tokens(run, task):
    records = found(run(SELECTORS, ("0.7",), samples=2))
    for sample in task.samples(2, 0):
        inputs = prepare(run.processor, sample.image, sample.question, run.model.device)
        for label, selector in SELECTORS.items():
            with select_tokens(run.model, selector, keep=0.7) as log:
                said = answer(run.model, run.processor, inputs, TOKENS)
            record = records[label, "0.7", sample.id]
            assert record["answer"] == said.text
            assert record["tokens"] == sum(log.measured)
            assert [record.get("tokens_per_layer", [])] == (log.layers or [[]])


@pytest.mark.parametrize("change", [{}, {"layer": 2}, {"layer": 3}, {"repeats": 2}, {"answers": False}])
def test_a_run_in_batches_has_the_records_of_one_without(run, change):
    """In batches, prompts that are pruned inside are answered one at a time, and their logits over an answer are read
    on a copy of the cache, not in a pass of their own."""
    single = found(run(SELECTORS, ("0.7", "0.55", "1000"), **change))
    batched = found(run(SELECTORS, ("0.7", "0.55", "1000"), batch_size=5, **change))
    assert len(single) == 4 * (1 + change.get("answers", True) + 3 * len(SELECTORS))
    assert_alike(single, batched)
    for (label, keep, _), record in batched.items():
        if label in ("at-1", "fastv", "both"):
            assert "batch" not in record
            assert record["saturated"] == (keep == "1000")
            assert record["spectrum_layer"] == max(1, change.get("layer", 0))


def test_logits_over_an_answer_are_those_that_gave_it(tiny_model, make_image):
    """Teacher forcing behind a stage, in one pass or on a copy of the cache, and generation: one and the same."""
    model, processor = tiny_model()
    pruned, _ = opened(model, processor, make_image(64, 90), FastV(), 0.7)
    with pruned.acting(model):
        said = answer(model, processor, pruned.inputs, 5)
    with pruned.acting(model):
        passed = forced(model, pruned.inputs, said.ids)
    reading = read(model, processor, [pruned.inputs], [said.ids], 5, Spent(model.device), pruned=pruned)[0]
    for logits in (passed.logits, reading.forced, reading.answer.logits):
        torch.testing.assert_close(logits, said.logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="rows must be one where tokens leave inside the language model, got 2"):
        read(model, processor, [pruned.inputs] * 2, [None] * 2, 5, Spent(model.device), pruned=pruned)


def test_the_spectrum_is_that_of_the_tokens_behind_the_stage(run, task):
    """Oracle: up to its stage a prompt is the unpruned one: the kept rows of the unpruned states are its own."""
    records = found(run({"fastv": FastV()}, ("0.7",), samples=1))
    sample = next(task.samples(1, 0))
    inputs = prepare(run.processor, sample.image, sample.question, run.model.device)
    encoded = encode(run.model, inputs, frozenset({"features"}))
    whole = prune_inputs(run.model, inputs, None, encoded=encoded)
    states = forced(run.model, whole.inputs, torch.tensor([5]), [1], encoded.image_token_id).visual[1]
    pruned = prune_inputs(run.model, inputs, FastV(), Budget(0.7), encoded=encoded, inside=True)
    with pruned.acting(run.model):
        answer(run.model, run.processor, pruned.inputs, 2)
    after, before = spectrum(states[pruned.keep[0]]), spectrum(states)
    record = records["fastv", "0.7", "s0"]
    assert record["ipr"] == pytest.approx(after.ipr, rel=1e-4)
    assert record["ipr_shift"] == pytest.approx(after.ipr - before.ipr, rel=1e-3)
    assert record["ipr_shift"] != 0


def test_a_budget_out_of_reach_is_recorded_and_listed(run):
    """A quarter on average cannot be met where a third of the layers see all tokens; other rows are measured."""
    for batch_size in (1, 3):
        chosen = {"fastv": FastV(), "norm": Norm()}
        records = found(run(chosen, ("0.25", "0.7"), samples=2, batch_size=batch_size, baseline=None))
        one = records["fastv", "0.25", "s0"]
        full = records["full", "None", "s0"]["tokens"]
        assert one == {"id": "s0", "index": 0, "full_tokens": full, "unmet": -(-(full + 2) // 3)}

        summary = summarize(run.folder)
        rows = {(row["selector"], row["keep"]) for row in summary["rows"]}
        assert ("fastv", "0.25") not in rows
        assert {("fastv", "0.7"), ("norm", "0.25"), ("norm", "0.7")} < rows
        least = max(records["fastv", "0.25", name]["unmet"] for name in ("s0", "s1"))
        about = {"task": "toy", "selector": "fastv", "keep": "0.25", "least": least, "images": 2, "samples": 2}
        assert summary["unmet"] == [about]
        line = f"toy: fastv cannot meet keep=0.25 on 2 of 2 images; all could meet {least}."
        assert any(line in note for note in notes(summary))
        assert line in markdown({"run": summary})


def test_a_resumed_run_does_not_try_again(run):
    run({"fastv": FastV()}, ("0.25",), samples=2)
    assert not any(step.new for step in run({"fastv": FastV()}, ("0.25",), samples=2))


def test_spectra_of_several_layers_are_not_correlated_together(run):
    run({"fastv": FastV(), "norm": Norm()}, ("0.5", "0.7"), samples=2, baseline=None)
    summary = summarize(run.folder)
    assert {row["selector"] for row in summary["rows"] if row["ipr_shift"] is not None and row["keep"]} == {
        "fastv",
        "norm",
    }
    assert {each["points"] for each in summary["correlations"]} == {2}


@pytest.mark.parametrize(
    ("spec", "keep", "message"),
    [
        ("fastv:layer=3", "0.5", "mine: FastV: layer must be below 3, the number of decoder layers, got 3"),
        ("fastv", "threshold:0.5", "mine acts inside the language model, keep must be a count or a share"),
    ],
)
def test_what_no_sample_could_meet_is_an_error_at_the_start(run, spec, keep, message):
    with pytest.raises(UsageError, match=message):
        run({"mine": load_selector(spec)}, (keep,))
    assert not (run.folder / "run.json").exists()


def test_the_plan_says_where_tokens_leave(run):
    run(SELECTORS, ("0.7",), samples=1)
    rows = {row["label"]: row for row in json.loads((run.folder / "run.json").read_text())["rows"]}
    assert rows["fastv"]["leaves_at"] == 1
    assert rows["fastv"]["count"] == "average"
    assert "leaves_at" not in rows["random"]
