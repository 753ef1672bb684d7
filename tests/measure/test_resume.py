"""What a run takes up from an earlier one: nothing that another setting, selector or sample would change."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from small_runs import TOKENS, found

from selector import Budget, Norm, Random, SVDPrune, records
from selector.errors import UsageError
from selector.measure.protocol import Protocol
from selector.measure.run import compare


def test_a_rerun_touches_no_model(run, monkeypatch):
    first = found(run())
    before = {p: p.read_bytes() for p in run.folder.rglob("*.jsonl")}
    forbid(monkeypatch, run.model)
    steps = run()
    assert not any(s.new for s in steps)
    assert len(steps) == len(first)
    assert {p: p.read_bytes() for p in run.folder.rglob("*.jsonl")} == before


def forbid(monkeypatch, model):
    def never(*args, **kwargs):
        raise AssertionError("the model was called")

    monkeypatch.setattr(type(model), "generate", never)
    monkeypatch.setattr(model.base_model, "get_image_features", never)


def test_more_samples_continue_where_fewer_ended(run):
    run(samples=2)
    steps = run(samples=4)
    assert [s.new for s in steps] == [s.index >= 2 for s in steps]


def test_a_killed_run_loses_one_sample(run):
    first = found(run())
    path = sorted(run.folder.rglob("predictions.jsonl"))[0]
    whole = records.read_records(path)
    path.write_bytes(path.read_bytes()[:-7])
    redone = [s for s in run() if s.new]
    assert [s.record["id"] for s in redone] == ["s3"]
    times = {"encode_ms", "selection_ms", "prefill_ms", "decode_ms"}
    strip = [{k: v for k, v in r.items() if k not in times} for r in (whole[-1], redone[0].record)]
    assert strip[0] == strip[1]
    assert len(records.read_records(path)) == len(whole) == 4
    assert len(first) == 24


@pytest.mark.slow
def test_fresh_starts_over(run):
    run()
    assert all(s.new for s in run(fresh=True))
    assert all(len(records.read_records(p)) == 4 for p in run.folder.rglob("*.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"max_new_tokens": TOKENS + 1},
        {"answers": False},
        {"positions": "contiguous"},
        {"selectors": {"random": Random(seed=1)}},
        {"selectors": {"random": Norm()}},
    ],
)
def test_a_changed_setting_meets_no_old_record(run, change):
    run(selectors={"random": Random()})
    steps = run(**({"selectors": {"random": Random()}} | change))
    assert all(s.new for s in steps if s.row.selector)


@pytest.mark.slow
def test_a_changed_selector_or_model_meets_no_old_record(run, tiny_model):
    class Weighted(Random):
        def __init__(self, seed: int = 0):
            super().__init__(seed)
            self.weight = torch.nn.Parameter(torch.ones(3))

    selector = Weighted()
    run(selectors={"w": selector})
    with torch.no_grad():
        selector.weight[1] += 1e-6
    changed = run(selectors={"w": selector})
    assert [s.new for s in changed] == [s.row.selector is not None for s in changed]
    other = tiny_model(text="mistral")[0]
    assert all(s.new for s in run(selectors={"w": selector}, model=other))


def test_scope_and_newlines_are_part_of_the_key(run, tiny_model, task):
    model, processor = tiny_model()
    brief = Protocol(max_new_tokens=2)
    for newlines, scope in itertools.product(("kept_rows", "none"), ("image", "tile")):
        budget = Budget(9, scope=scope, newlines=newlines)
        steps = list(compare(model, processor, {"svd": SVDPrune(rank=2)}, [budget], [task], run.folder, protocol=brief))
        assert all(s.new for s in steps if s.row.selector)
    keeps = {row["keep"] for row in json.loads((run.folder / "run.json").read_text())["rows"]}
    assert keeps == {None, "9 tile newlines=none"}


def test_another_layer_or_number_of_repeats_meets_no_old_record(run):
    run(keeps=("9",), samples=1)
    for change in ({"layer": 1}, {"repeats": 2}):
        assert all(s.new for s in run(keeps=("9",), samples=1, **change))


def test_two_rows_never_share_records(run):
    """Before anything runs: the second of them would show what the first measured."""
    with pytest.raises(UsageError, match=r"'a' and 'b' at keep=0\.5 are the same"):
        run(selectors={"a": Random(), "b": Random(seed=0)})
    assert not list(run.folder.rglob("*.jsonl"))


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_that_is_none(run, shard):
    with pytest.raises(UsageError, match="shard must be i/n"):
        run(shard=shard)


def test_shards_of_one_process_make_one_run(run):
    first, second = run(shard=(0, 3)), run(shard=(1, 3))
    assert {s.record["id"] for s in first} == {"s0", "s3"}
    assert {s.record["id"] for s in second} == {"s1"}
    rest = run()  # the whole of it: what no shard did
    assert {s.record["id"] for s in rest if s.new} == {"s2"}
    assert not any(s.new for s in run(shard=(2, 3)))
    assert all(len(records.read_folder(p.parent)) == 4 for p in run.folder.rglob("predictions.jsonl"))
