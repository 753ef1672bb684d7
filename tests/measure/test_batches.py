"""Comparisons in batches: the answers of one prompt at a time, in every family and over a whole run."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace

import pytest
import torch
from families import EOS, FAMILIES, PAD
from small_runs import TOKENS, assert_alike, found

from selector import Budget, Norm, Random, SVDPrune, available_selectors, load_selector, records
from selector.errors import UsageError
from selector.measure import harness as measure
from selector.measure import windows
from selector.measure.answering import answer, forced, prepare, without_image
from selector.measure.batches import pad_left, read, refusal
from selector.measure.cost import PHASES, Spent
from selector.measure.protocol import Protocol
from selector.measure.run import compare
from selector.models import encode
from selector.pruning import prune_inputs
from selector.report.summary import summarize
from selector.report.tables import markdown
from selector.tasks import load_task

SELECTORS = {"random": Random(), "svd": SVDPrune(energy=0.5), "norm": Norm()}


class Words:
    """A processor that writes ids as numbers."""

    pad_token_id, eos_token_id = PAD, EOS

    @property
    def tokenizer(self):
        return self

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(int(i)) for i in ids if not (skip_special_tokens and i in (PAD, EOS)))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_batch_answers_like_generate_row_by_row(family):
    """Rows of two prompts, whole, pruned and blind: ids, logits, and logits over a given answer."""
    model, rows = family.model, []
    for seed in (0, 1):
        inputs = family.prompts([(seed, [family.picture(seed)])])
        rows += [prune_inputs(model, inputs, None).inputs]
        rows += [prune_inputs(model, inputs, chosen, Budget(3)).inputs for chosen in (Random(), Norm())]
        rows += [without_image(inputs, family.placeholder)]
    want = [answer(model, Words(), row, 6) for row in rows]
    # Targets of other lengths than the answers, and one row without.
    targets = [None, *[torch.arange(5, 6 + i % 4) for i in range(1, len(rows))]]
    readings = read(model, Words(), rows, targets, 6, Spent(model.device))
    for one, row, target, each in zip(want, rows, targets, readings, strict=True):
        assert each.answer.text == one.text
        torch.testing.assert_close(each.answer.ids, one.ids)
        torch.testing.assert_close(each.answer.logits, one.logits, rtol=1e-3, atol=1e-3)
        if target is None:
            assert each.forced is None
        else:
            torch.testing.assert_close(each.forced, forced(model, row, target).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", [{}, {"layer": 2}, {"repeats": 2}, {"positions": "contiguous"}, {"answers": False}])
def test_a_run_in_batches_has_the_records_of_one_without(run, tmp_path, change):
    """Samples of several sizes, one without a question; a budget that nothing is cut by is among them."""
    single = found(run(SELECTORS, ("0.5", "9", "1000"), **change))
    batched = found(run(SELECTORS, ("0.5", "9", "1000"), batch_size=5, **change))
    assert len(single) == 4 * (1 + change.get("answers", True) + 3 * 3)
    assert_alike(single, batched)


@pytest.mark.slow
def test_the_shipped_model_answers_in_batches_as_it_does_alone(tmp_path):
    """36 samples, 6 selectors, 2 budgets, on what users compare first: a test of a second per sample."""
    from selector.commands.loading import load_model

    model, processor = load_model("checkpoints/llava-next-tiny", "cpu")
    names = ["checkpoints/selector-llava-next-tiny", "ridge-leverage", "svd-prune", "lofi", "divprune", "random"]
    selectors = {name: load_selector(name).eval() for name in names}
    asked = (model, processor, selectors, [Budget(0.25), Budget(16)], [load_task("documents")])
    one, many = (
        found(compare(*asked, tmp_path / str(size), protocol=Protocol(batch_size=size), samples=36)) for size in (1, 32)
    )
    assert len(one) == 36 * (2 + 6 * 2)
    assert_alike(one, many)
    assert len({record["answer"] for record in one.values()}) > 36  # the model does read


def test_a_record_says_how_many_shared_its_times(run):
    single = found(run(SELECTORS, ("9",), samples=2))
    assert not any("batch" in record for record in single.values())
    batched = found(run(SELECTORS, ("9",), samples=2, batch_size=4))
    assert all(record["prefill_ms"] > 0 for record in batched.values())
    # A prompt that no other is like in length is alone, and its times are its own.
    sizes = {record.get("batch", 1) for record in batched.values()}
    assert 1 < max(sizes) <= 4

    summary = summarize(run.folder)
    assert summary["batch_size"] == 4
    page = markdown({"run": summary})
    assert "prefill ms‡" in page
    assert "in batches of up to 4 prompts" in page


def test_times_of_single_samples_are_not_marked(run):
    run(SELECTORS, ("9",), samples=1)
    page = markdown({"run": summarize(run.folder)})
    assert "prefill ms" in page
    assert "‡" not in page


def test_another_batch_size_meets_no_old_record(run):
    run({"random": Random()}, ("9",), samples=2)
    assert all(step.new for step in run({"random": Random()}, ("9",), samples=2, batch_size=2))
    assert not any(step.new for step in run({"random": Random()}, ("9",), samples=2, batch_size=2))


def test_an_interrupted_run_in_batches_goes_on(run, task):
    """Wherever it stops, what was written is kept, and nothing is written twice."""
    whole = found(run(SELECTORS, ("0.5", "9"), batch_size=3, samples=4))
    budgets = [Budget(0.5), Budget(9)]
    protocol = Protocol(max_new_tokens=TOKENS, batch_size=3)
    for stop in (1, 5, 17):
        folder = run.folder / str(stop)
        steps = compare(run.model, run.processor, SELECTORS, budgets, [task], folder, protocol=protocol)
        first = list(itertools.islice(steps, stop))
        steps.close()
        rest = list(compare(run.model, run.processor, SELECTORS, budgets, [task], folder, protocol=protocol))
        assert [step.new for step in first] == [True] * stop
        assert_alike(whole, found(first) | found(rest))
        for path in folder.rglob("predictions.jsonl"):
            written = [record["id"] for record in records.read_records(path)]
            assert sorted(written) == ["s0", "s1", "s2", "s3"]


@dataclass
class Forwards:
    """Rows and new tokens of every call of a model."""

    shapes: list

    def __call__(self, module, args, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))


def test_a_row_that_has_ended_is_not_decoded_on():
    """One prefill, and a decoding step for every row that is still at work; the given answer is read in one pass."""
    family = FAMILIES[0]
    rows = [
        prune_inputs(family.model, family.prompts([(seed, [family.picture(0)])]), Norm(), Budget(4)).inputs
        for seed in range(6)
    ]
    lengths = [len(answer(family.model, Words(), row, 12).ids) for row in rows]
    end = answer(family.model, Words(), rows[0], 12).ids[2].item()
    family.model.generation_config.eos_token_id = [EOS, end]
    seen = Forwards([])
    handle = family.model.register_forward_pre_hook(seen, with_kwargs=True)
    try:
        said = read(family.model, Words(), rows, [torch.tensor([5, 6, 7])] * 6, 12, Spent(family.model.device))
    finally:
        handle.remove()
        family.model.generation_config.eos_token_id = EOS
    ended = [len(reading.answer.ids) for reading in said]
    assert min(ended) <= 3 < max(ended)
    assert ended != lengths
    prefill, given, *steps = seen.shapes
    assert prefill[0] == 6
    assert given == (6, 2)
    assert [count for count, _ in steps] == [sum(n > step for n in ended) for step in range(1, max(ended))]


def test_what_only_generate_follows_is_refused_by_name(run):
    settings = run.model.generation_config
    settings.repetition_penalty = 1.3
    try:
        assert refusal(run.model) == "its generation config sets repetition_penalty"
        with pytest.raises(UsageError, match=r"batch_size must be 1 for this model.*repetition_penalty"):
            run(batch_size=2)
        assert len(found(run(SELECTORS, ("9",), samples=1))) == 5
    finally:
        settings.repetition_penalty = None
    assert refusal(run.model) is None


def test_an_argument_that_nobody_can_pad_is_named(run, task):
    sample = next(task.samples(1, 0))
    inputs = prepare(run.processor, sample.image, "what?", run.model.device)
    row = prune_inputs(run.model, inputs, None).inputs | {"depths": torch.zeros(1, 3)}
    with pytest.raises(UsageError, match=r"batch_size must be 1.*does not say how to pad depths"):
        pad_left(run.model, [row])


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"workers": -1}])
def test_sizes_out_of_range(run, wrong):
    with pytest.raises(UsageError, match="batch_size must be >= 1 and workers >= 0"):
        run(**wrong)


# Every method that needs no checkpoint.
WHOLE = {"gumbel", "image-transformer", "inside", "merge", "mix", "stages"}  # these need a checkpoint, or parts
NAMES = sorted({*available_selectors()} - WHOLE | {"mix:a=norm,b=lofi", "lofi:layer=1"})


def scored(names):
    """The selectors of these names that score once for every budget."""
    return [name for name in names if measure.scores_once(load_selector(name))]


def test_scores_are_taken_once_per_image_and_choose_the_same(run, task):
    """The operations that are counted once for all budgets are those of every budget, too."""
    assert {"norm", "lofi", "svd-prune", "ridge-leverage", "random"} <= set(scored(NAMES))
    assert not {"divprune", "tome", "merge"} & set(scored(NAMES))
    calls = []

    class Watched(Norm):
        def score(self, tokens):
            calls.append(tokens)
            return super().score(tokens)

    results = found(run({"watched": Watched()}, ("0.5", "9", "3"), samples=2, batch_size=8))
    # One per sample, one to warm up, one per shape for the operations.
    shapes = {(tokens.features.shape, tokens.slots.shape) for tokens in calls}
    assert len(calls) == 2 + 1 + len(shapes)
    plain = found(run({"watched": Watched()}, ("0.5", "9", "3"), samples=2))
    assert {key: record.get("kept") for key, record in results.items()} == {
        key: record.get("kept") for key, record in plain.items()
    }


@pytest.mark.parametrize("name", scored(NAMES))
def test_operations_of_a_score_do_not_depend_on_the_budget(run, task, name):
    chosen = load_selector(name).eval()
    sample = next(task.samples(1, 0))
    inputs = prepare(run.processor, sample.image, "what?", run.model.device)
    try:
        encoded = encode(run.model, inputs, chosen.needs)
    except ValueError as error:
        pytest.skip(str(error))
    counts = {
        measure.counted_flops(lambda b=budget: prune_inputs(run.model, inputs, chosen, Budget(b), encoded=encoded))
        for budget in (0.5, 3, 20)
    }
    assert len(counts) == 1


def test_batches_are_of_one_budget_and_of_little_padding(run, monkeypatch):
    seen = []
    original = measure.Harness.read

    def watched(self, turns):
        seen.append([(str(turn.row.budget), turn.inputs["input_ids"].shape[1]) for _, turn in turns])
        return original(self, turns)

    monkeypatch.setattr(measure.Harness, "read", watched)
    run(SELECTORS, ("0.5", "9"), batch_size=4)
    assert max(map(len, seen)) == 4
    for batch in seen:
        assert len({budget for budget, _ in batch}) == 1
        lengths = [length for _, length in batch]
        assert lengths == sorted(lengths)
        assert sum(lengths) >= (1 - windows.PADDING) * len(lengths) * max(lengths)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_images_prepared_ahead_are_the_same(run, batch_size):
    plain = found(run(SELECTORS, ("9",), batch_size=batch_size))
    steps = run(SELECTORS, ("9",), batch_size=batch_size, workers=2, fresh=True)
    assert_alike(plain, found(steps))
    assert {step.index for step in steps} == {0, 1, 2, 3}
    assert not any(step.new for step in run(SELECTORS, ("9",), batch_size=batch_size, workers=2))


def test_an_image_that_cannot_be_prepared_stops_the_run_where_its_turn_comes(run, task):
    def samples(count, seed):
        for sample in task.samples(count, seed):
            if sample.id == "s2":
                raise UsageError("s2 is broken")
            yield sample

    broken = replace(task, samples=samples)
    with pytest.raises(UsageError, match="s2 is broken"):
        run(SELECTORS, ("9",), tasks=[broken], workers=2)
    assert {len(records.read_records(path)) for path in run.folder.rglob("predictions.jsonl")} == {2}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_run_says_what_its_time_went_into(run, batch_size):
    run(SELECTORS, ("9",), samples=2, batch_size=batch_size)
    spent = records.read_time(run.folder)
    assert tuple(spent) == PHASES
    assert all(spent[name] > 0 for name in ("prepare", "encode", "select", "prefill", "decode", "flops", "records"))
    assert "Time:" in markdown({"run": summarize(run.folder)})

    # More samples add to it, and starting over forgets it; shards note theirs apart.
    run(SELECTORS, ("9",), samples=4, batch_size=batch_size)
    assert records.read_time(run.folder)["prefill"] > spent["prefill"]
    run(SELECTORS, ("9",), samples=1, batch_size=batch_size, fresh=True)
    assert json.loads((run.folder / "time.json").read_text()) == records.read_time(run.folder)
    records.add_time(run.folder, (0, 2), {"prefill": 1000.0})
    assert records.read_time(run.folder)["prefill"] > 1000


def test_time_within_another_phase_is_counted_once(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0, 6.0])
    monkeypatch.setattr("selector.measure.cost.time.perf_counter", lambda: next(ticks))
    spent = Spent(torch.device("cpu"))
    with spent.on("records"), spent.on("select"):
        pass
    assert (spent.seconds["records"], spent.seconds["select"]) == (1.0 + 3.0, 2.0)


def test_a_time_file_that_is_none(tmp_path):
    (tmp_path / "time.json").write_text('{"prefill": "long"}')
    with pytest.raises(UsageError, match="must hold seconds by phase"):
        records.read_time(tmp_path)
