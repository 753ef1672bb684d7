"""Shares on average: thresholds against brute force, stored with the selector, and what happens without them."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from visual_tokens import D, N, anyres, only, ragged

from selector import (
    Budget,
    GumbelSelector,
    LoFi,
    Norm,
    Random,
    ScoreSelector,
    TokenSelector,
    VisualTokens,
    available_selectors,
    load_selector,
    select_tokens,
)
from selector.base import GreedySelector, RankSelector
from selector.calibration import CalibratedShare, Calibration, calibrate
from selector.measure.identity import identity

NEWLINES = ("kept_rows", "all", "none")


class Channel(ScoreSelector):
    """The first channel of the features, as it is."""

    def score(self, tokens):
        return tokens.features[..., 0]


def kept_by_hand(tokens: VisualTokens, threshold: float, newlines: str) -> int:
    """Measured tokens in plain Python: patches above the threshold, or the best one, and newlines by the policy."""
    values, total = tokens.features[..., 0].flatten().tolist(), 0
    for slots, rows in zip(tokens.slots.tolist(), tokens.rows.tolist(), strict=True):
        patches = [(values[s], r) for s, r in zip(slots, rows, strict=True) if s >= 0]
        kept = [(v, r) for v, r in patches if v > threshold] or [max(patches, key=lambda pair: pair[0])]
        total += len(kept)
        if newlines == "all":
            total += slots.count(-1)
        elif newlines == "kept_rows":
            total += len({r for _, r in kept if r >= 0})
    return total


def best_by_hand(batches, share: float, newlines: str) -> tuple[float, int]:
    """(distance of the nearest reachable share, all tokens), over every threshold there could be."""
    values = sorted({v for tokens in batches for v in tokens.features[..., 0][tokens.valid].tolist()})
    total = sum(int((tokens.slots != -2).sum()) for tokens in batches)
    kept = [sum(kept_by_hand(tokens, t, newlines) for tokens in batches) for t in (-math.inf, *values)]
    return min(abs(k / total - share) for k in kept), total


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    share=st.floats(0.02, 0.98),
    newlines=st.sampled_from(NEWLINES),
    seed=st.integers(0, 99),
    grain=st.sampled_from([0, 1, 4]),
)
def test_the_nearest_share_that_any_threshold_reaches(share, newlines, seed, grain):
    """Brute force over all thresholds; a coarse grain ties scores, also across images."""
    batches = [anyres(seed), ragged(seed + 1)]
    if grain:
        batches = [replace(b, features=(b.features * grain).round()) for b in batches]
    distance, total = best_by_hand(batches, share, newlines)
    assume(abs(distance - 0.01 * share) > 1e-9)  # at the edge of the tolerance, rounding decides
    if distance > 0.01 * share:
        with pytest.raises(ValueError, match=rf"share {share} with newlines={newlines} cannot be met within 1%"):
            calibrate(Channel(), batches, [share], [newlines])
        return
    (point,) = calibrate(Channel(), batches, [share], [newlines]).points
    assert point.measured == sum(kept_by_hand(b, point.threshold, newlines) for b in batches) / total
    assert abs(point.measured - share) == pytest.approx(distance, abs=1e-12)


@settings(max_examples=10, deadline=None)
@given(
    shares=st.lists(st.floats(0.1, 0.8), min_size=2, max_size=3, unique=True),
    newlines=st.sampled_from(NEWLINES),
    seed=st.integers(0, 99),
)
def test_what_is_selected_averages_the_share_and_higher_shares_keep_more(shares, newlines, seed):
    """Through the selector itself, one image at a time; every image keeps a patch."""
    selector, images = Channel(), [only(anyres(seed, images=6), i) for i in range(6)]
    assume(newlines != "all" or min(shares) > 0.2)
    selector.calibration = calibrate(selector, images, shares, [newlines], tolerance=0.05)
    total = sum(int(tokens.lengths.sum()) for tokens in images)
    smaller = None
    for share in sorted(shares):
        keep = [selector(tokens, Budget(f"auto:{share}", newlines=newlines)) for tokens in images]
        assert abs(sum(int(k.sum()) for k in keep) / total - share) <= 0.05 * share
        assert all(bool((k & tokens.is_patch).any()) for k, tokens in zip(keep, images, strict=True))
        if smaller is not None:
            assert not any(bool((less & ~more).any()) for less, more in zip(smaller, keep, strict=True))
        smaller = keep


def test_images_get_what_their_scores_ask_for():
    """One loud image and one flat one: a share on average is not a share of each."""
    tokens = anyres(3, images=2)
    loud = torch.where(tokens.image[:, None, None] == 0, tokens.features.abs() + 5, tokens.features * 0.1)
    tokens, selector = replace(tokens, features=loud), Channel()
    selector.calibration = calibrate(selector, [tokens], [0.25], tolerance=0.05)
    measured = selector(tokens, Budget("auto:0.25")).sum(1).tolist()
    assert measured[1] in (1, 2)
    assert measured[0] > 0.4 * int(tokens.lengths[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gumbel", "lofi", "svd-prune", "norm", "random"])
def test_batches_do_not_matter(name, dtype):
    """Neither when thresholds are found, nor when they are used."""
    torch.manual_seed(0)
    gumbel = GumbelSelector(dim=D, num_patches=N, width=16, heads=2).eval()
    selector = (
        gumbel if name == "gumbel" else load_selector(name + (":rank=3" if name in ("lofi", "svd-prune") else ""))
    )
    both = [anyres(1, images=3, dtype=dtype), anyres(2, images=3, dtype=dtype)]
    alone = [only(tokens, i) for tokens in both for i in range(3)]
    found = [calibrate(selector, batches, [0.5, 0.3], tolerance=0.05) for batches in (both, alone)]
    selector.calibration = found[0]
    for one, other in zip(*(each.points for each in found), strict=True):
        assert one.measured == other.measured
        assert one.threshold == pytest.approx(other.threshold, rel=1e-4)
        budget = Budget(f"auto:{one.share}")
        kept = [selector(tokens, budget) for tokens in both]
        assert torch.equal(torch.cat(kept), torch.cat([selector(tokens, budget) for tokens in alone]))
        selector.calibration = found[1]
        assert all(torch.equal(k, selector(tokens, budget)) for k, tokens in zip(kept, both, strict=True))


def test_the_threshold_lies_between_scores():
    """So that rounding noise of a batch or a device does not move a token across it."""
    selector, tokens = Channel(), anyres(5)
    selector.calibration = calibrate(selector, [tokens], [0.3], tolerance=0.05)
    threshold = selector.calibration.points[0].threshold
    values = tokens.features[..., 0][tokens.valid].sort().values
    below, above = values[values <= threshold].max().item(), values[values > threshold].min().item()
    assert threshold == pytest.approx((below + above) / 2, rel=1e-6)


def test_neighbouring_floats_are_told_apart():
    one = torch.tensor(1.0)
    values = torch.stack([one, torch.nextafter(one, one * 2), one - 0.5, one - 0.6])[None, :, None]
    selector, tokens = Channel(), VisualTokens.from_features(values)
    selector.calibration = calibrate(selector, [tokens], [0.25])
    assert selector(tokens, Budget("auto:0.25")).tolist() == [[False, True, False, False]]


def test_tied_scores_and_bad_arguments_are_errors():
    tokens, selector = VisualTokens.from_features(torch.zeros(2, 8, 3)), Channel()
    with pytest.raises(
        ValueError, match=r"0\.5 with newlines=kept_rows cannot be met within 1%.* keep 1 and 0\.125 of"
    ):
        calibrate(selector, [tokens], [0.5])
    with pytest.raises(ValueError, match=r"newlines=all cannot be met within 1%: .* keep \S+ and 0\.1042 of"):
        calibrate(selector, [anyres()], [0.05], ["all"])
    with pytest.raises(ValueError, match="batches must hold at least one image"):
        calibrate(selector, [], [0.5])
    with pytest.raises(ValueError, match="scores must be finite"):
        calibrate(selector, [replace(tokens, features=tokens.features + math.nan)], [0.5])
    for shares in ([], [0.5, 0.5]):
        with pytest.raises(ValueError, match="shares and newlines must each hold different values"):
            calibrate(selector, [tokens], shares)
    with pytest.raises(ValueError, match=r"keep must be .* got 'auto:1\.5'"):
        calibrate(selector, [tokens], [1.5])
    with pytest.raises(ValueError, match=r"tolerance must be in \[0, 1\), got -1.0"):
        calibrate(selector, [tokens], [0.5], tolerance=-1.0)


def test_budgets_are_written_in_one_way():
    assert Budget.parse("auto:.20") == Budget("auto:0.2")
    assert str(Budget.parse("auto:2e-1")) == "auto:0.2"
    for keep in ("auto:0", "auto:1", "auto:", "auto:x", "auto:nan", "auto:-0.2"):
        with pytest.raises(ValueError, match=r"keep must be .*'auto:s' with s in"):
            Budget.parse(keep)
    with pytest.raises(ValueError, match=r"keep='auto:0\.2' has one threshold for all tiles: scope must be 'image'"):
        Budget("auto:0.2", scope="tile")


def test_without_a_calibration():
    tokens = anyres()
    with pytest.raises(ValueError, match=r"this Norm is not: run `selector calibrate SELECTOR --shares 0\.2 --out"):
        Norm()(tokens, Budget("auto:0.2"))
    with pytest.raises(ValueError, match="has to be resolved by a calibrated selector"):
        Budget("auto:0.2").select(tokens.features[..., 0], tokens)
    selector = Channel()
    selector.calibration = calibrate(selector, [tokens], [0.5, 0.25], ["kept_rows", "none"], tolerance=0.05)
    with pytest.raises(
        ValueError, match=r"keep='auto:0\.3' .* are 0\.5, 0\.25 with newlines=kept_rows; 0\.5, 0\.25 with"
    ):
        selector(tokens, Budget("auto:0.3"))
    with pytest.raises(ValueError, match="with newlines=all is not calibrated"):
        selector(tokens, Budget("auto:0.25", newlines="all"))
    assert selector.resolved(Budget(7)) == Budget(7)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, cls in available_selectors().items()
        if issubclass(cls, RankSelector) and not cls.learned and name != "mix"  # which is made of others
    ],
)
def test_every_method_is_calibrated_or_says_why_not(name):
    selector, tokens = load_selector(name), anyres(images=6)
    if isinstance(selector, ScoreSelector) or name == "tome":  # one ranking for every budget
        if name in ("lofi", "svd-prune"):
            selector.energy = 0.5
        selector.calibration = calibrate(selector, [tokens], [0.4], tolerance=0.15)
        selected = selector.select(tokens, Budget("auto:0.4")).keep
        assert int(selected.sum()) == round(selector.calibration.points[0].measured * int(tokens.lengths.sum()))
        return
    with pytest.raises(ValueError, match=r"keep='auto:0\.4' is adaptive and needs scores"):
        calibrate(selector, [tokens], [0.4])
    reason = "picks a number" if isinstance(selector, GreedySelector) else "needs a calibrated selector|is adaptive"
    with pytest.raises(ValueError, match=reason):
        selector.select(tokens, Budget("auto:0.4"))


def calibrated(selector, shares=(0.5, 0.25), newlines=("kept_rows",)):
    selector.calibration = calibrate(selector, [anyres(7, images=6)], shares, newlines, 0.05, {"tasks": {"toy": 6}})
    return selector


@pytest.mark.parametrize("learned", [False, True])
def test_it_is_saved_and_loaded_exactly(learned, tmp_path):
    torch.manual_seed(0)
    selector = GumbelSelector(dim=D, num_patches=N, width=16, heads=2).eval() if learned else LoFi(rank=3)
    calibrated(selector, newlines=("kept_rows", "none"))
    assert "calibration" not in selector.init_args
    again = TokenSelector.from_pretrained(selector.save_pretrained(tmp_path, metadata={"steps": 7}))
    assert again.calibration == selector.calibration
    assert again.calibration.about == {"tasks": {"toy": 6}, "images": 6, "tokens": 6 * 48, "tolerance": 0.05}
    assert json.loads((tmp_path / "config.json").read_text())["metadata"] == {"steps": 7}
    tokens = anyres(8)
    assert torch.equal(again(tokens, Budget("auto:0.25")), selector(tokens, Budget("auto:0.25")))


def test_a_selector_without_one_is_saved_as_before(tmp_path):
    config = json.loads((Norm().save_pretrained(tmp_path) / "config.json").read_text())
    assert set(config) == {"class_path", "init_args", "metadata"}


def test_the_parts_of_a_composition_keep_theirs(tmp_path):
    inner = calibrated(Norm()).save_pretrained(tmp_path / "inner")
    merging = load_selector(f"{inner}:merge=nearest")
    tokens = anyres(8)
    want = TokenSelector.from_pretrained(inner)(tokens, Budget("auto:0.25"))
    assert torch.equal(merging.select(tokens, Budget("auto:0.25")).keep, want)
    again = TokenSelector.from_pretrained(merging.save_pretrained(tmp_path / "outer"))
    assert torch.equal(again(tokens, Budget("auto:0.25")), want)
    mixed = calibrated(load_selector("mix:a=norm,b=cls-attention"))
    again = TokenSelector.from_pretrained(mixed.save_pretrained(tmp_path / "mix"))
    assert torch.equal(again(tokens, Budget("auto:0.5")), mixed(tokens, Budget("auto:0.5")))


GOOD = {"share": 0.5, "newlines": "kept_rows", "threshold": 1.0, "measured": 0.5}


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"nowhere": {"points": [GOOD], "about": {}}}, "names 'nowhere', no ranking part of this Norm"),
        ({"": {"points": [GOOD]}}, "must hold points and about"),
        ({"": {"points": GOOD, "about": {}}}, "must hold a list of points"),
        ({"": {"points": [], "about": {}}}, "must hold each share once .* got none"),
        ({"": {"points": [GOOD, GOOD], "about": {}}}, "must hold each share once"),
        ({"": {"points": [GOOD | {"extra": 1}], "about": {}}}, "must hold share, newlines, threshold, measured"),
        ({"": {"points": [GOOD | {"share": 2.0}], "about": {}}}, r"keep must be .* got 'auto:2\.0'"),
        ({"": {"points": [GOOD | {"newlines": "some"}], "about": {}}}, "newlines must be one of"),
        ({"": {"points": [GOOD | {"threshold": math.nan}], "about": {}}}, "threshold .* must be finite, got nan"),
        ({"": {"points": [GOOD | {"threshold": "1"}], "about": {}}}, "threshold .* must be a float, got '1'"),
        (7, "must map names of modules"),
    ],
)
def test_a_broken_calibration_does_not_load(stored, message, tmp_path):
    path = Norm().save_pretrained(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"calibration": stored}))
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        TokenSelector.from_pretrained(tmp_path)


def test_the_key_of_records_follows_the_threshold_where_it_is_used():
    plain, one, two = Norm(), calibrated(Norm()), calibrated(Norm(), shares=(0.25, 0.1))
    half, quarter = Budget("auto:0.5"), Budget("auto:0.25")
    assert identity(one, quarter) == identity(two, quarter)  # another share beside it does not matter
    two.calibration = Calibration((CalibratedShare(0.25, "kept_rows", 2.0, 0.25),))
    assert identity(one, quarter) != identity(two, quarter)
    assert identity(one, Budget(0.25)) == identity(two, Budget(0.25)) == identity(plain, Budget(0.25))
    for selector, budget in ((plain, quarter), (two, half)):
        with pytest.raises(ValueError, match="calibrated"):
            identity(selector, budget)
    inner = load_selector({"class_path": "selector.methods.merge.Merge", "init_args": {"selector": "norm"}})
    inner.selector = one
    keys = [identity(inner, quarter)]
    inner.selector = two
    assert identity(inner, quarter) != keys[0]


def test_in_the_plug(tiny_model, make_image):
    """A quarter on average over images of different shapes; every prompt is really shorter."""
    from selector.models import encode

    model, processor = tiny_model()
    images = [make_image(height, width, seed) for seed, (height, width) in enumerate([(60, 64), (40, 90), (90, 40)])]
    prompt = "USER: <image>\nwhat is shown? ASSISTANT:"
    inputs = processor(images=images, text=[prompt] * 3, return_tensors="pt", padding=True)
    selector = Random()
    with torch.no_grad():
        selector.calibration = calibrate(selector, [encode(model, inputs).tokens], [0.25], tolerance=0.05)
        with select_tokens(model, selector, keep="auto:0.25") as log:
            model(**inputs)
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert sum(log.measured) / sum(log.full) == pytest.approx(selector.calibration.points[0].measured)
    assert abs(sum(log.measured) / sum(log.full) - 0.25) <= 0.05 * 0.25
    with pytest.raises(ValueError, match="is not calibrated"), select_tokens(model, selector, keep="auto:0.5"):
        model(**inputs)


def test_shares_on_average_and_fixed_ones_share_a_group(tmp_path):
    """Rows stand together by share; all tasks together have a table, its paired difference computed by hand."""
    from selector import records
    from selector.report.summary import summarize, write_report
    from selector.report.tables import rich_tables

    right = {
        ("text", "auto:0.25"): "1110",
        ("text", "0.25"): "1000",
        ("flat", "auto:0.25"): "01",
        ("flat", "0.25"): "11",
    }
    tokens = {("text", "auto:0.25"): 14, ("text", "0.25"): 10, ("flat", "auto:0.25"): 2, ("flat", "0.25"): 10}
    plan = []
    for task, keep in itertools.product(("text", "flat"), (None, "0.5", "auto:0.25", "0.25")):
        file = records.Records(tmp_path, {"task": task, "keep": keep})
        plan.append({"task": task, "label": "ours" if keep else "full", "keep": keep, "key": file.key})
        for i, hit in enumerate(right.get((task, keep), "1111" if task == "text" else "11")):
            file.append(
                {
                    "id": f"s{i}",
                    "index": i,
                    "tokens": tokens.get((task, keep), 40),
                    "full_tokens": 40,
                    "saturated": False,
                    "agrees": hit == "1",
                    "correct": hit == "1",
                    "full_correct": True,
                    "flip": "same" if hit == "1" else "right_to_wrong",
                    "anls": float(hit),
                    "full_anls": 1.0,
                    "answer": "red",
                    "full_answer": "red",
                    "question": "colour?",
                    "target": "red",
                }
            )
    about = dict.fromkeys(("device", "dtype", "torch", "transformers", "python", "image_processor", "attention"), "")
    tasks = {task: {"fingerprint": task, "anls": False} for task in ("text", "flat")}
    run = {
        "model": "m",
        "samples": 4,
        "seed": 0,
        "answers": True,
        "positions": "original",
        "baseline": None,
        "layer": 0,
    }
    run |= {"repeats": 1, "environment": about | {"threads": 1}, "fingerprint": "f", "max_new_tokens": 4}
    records.write_json(tmp_path / "run.json", run | {"tasks": tasks, "unreadable": {}, "rows": plan})
    summary = summarize(tmp_path)
    assert [(row["task"], row["keep"]) for row in summary["rows"]] == [
        (task, keep) for task in ("text", "flat") for keep in (None, "0.5", "auto:0.25", "0.25")
    ]
    pooled = {row["keep"]: row for row in summary["pooled"]}
    assert pooled["auto:0.25"]["tokens"] == pooled["0.25"]["tokens"] == 10
    assert pooled["auto:0.25"]["accuracy"] == 4 / 6
    versus = pooled["auto:0.25"]["versus_fixed"]
    assert (versus["difference"], versus["pairs"]) == (pytest.approx((4 - 3) / 6), 6)  # two of them called s0 in both
    assert pooled["0.25"]["versus_fixed"] is None
    last = rich_tables(summary)[-1]
    assert str(last.title).startswith("all tasks")
    assert [row.end_section for row in last.rows] == [True, True, False, False]
    write_report([tmp_path])
    assert "## all tasks" in (tmp_path / "report.md").read_text()
    assert "all tasks" in (tmp_path / "report.html").read_text()
