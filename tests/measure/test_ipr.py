"""The study of ΔIPR: data made by hand, its measuring against the comparison's, and what was published."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from selector import Budget
from selector.commands.ipr import (
    OVER,
    SETTINGS,
    check,
    correlations,
    counted_correlations,
    figure,
    main,
    measure,
    rank_correlations,
)
from selector.commands.loading import load_model, load_selectors
from selector.errors import UsageError
from selector.measure.answering import forced, prepare
from selector.measure.harness import Harness, Row
from selector.measure.protocol import Protocol
from selector.models import encode
from selector.pruning import prune_inputs
from selector.report.statistics import spearman
from selector.tasks import load_task

pytestmark = pytest.mark.slow  # a small study, twice

ROOT = Path(__file__).parents[2]
DATA = ROOT / "configs" / "compare" / "ipr.json"


def made(shift, same):
    """Data of one task, layer 0 uncentred, from ``[selector][budget][question]`` of ΔIPR and of answers that stayed."""
    names, keeps = [f"s{i}" for i in range(len(shift))], [8, 4, 2][: len(shift[0])]
    count = len(shift[0][0])
    rows = [
        {"task": "t", "selector": name, "keep": str(keep), "same": "".join(map(str, same[i][j])), "nll": [0] * count,
         "ipr": {"uncentred 0": list(shift[i][j]), "centred 0": [0] * count}}
        for i, name in enumerate(names)
        for j, keep in enumerate(keeps)
    ]  # fmt: skip
    about = {"model": "m", "seed": 0, "tasks": ["t"], "selectors": names, "keep": keeps, "layers": [0]}
    return about | {"questions": count, "rows": rows}


def found(data, **more):
    return {(c.over, c.mean): c for c in correlations(data, **more)}


def test_correlations_of_data_made_by_hand():
    """Fewer tokens change the spectrum more and answers more; the selector that changes it more keeps more answers."""
    shift = [[[1, -3], [4, 4], [-7, -7]], [[2, 2], [5, 5], [8, 8]]]
    same = [[[1, 0], [0, 0], [0, 0]], [[1, 1], [1, 0], [0, 0]]]
    by = found(made(shift, same))
    budgets, selectors, questions = (by[over, "uncentred"] for over in OVER)
    # over budgets: agreement .5, 0, 0 and 1, .5, 0 against |mean shift| 1, 4, 7 and 2, 5, 8
    assert budgets.rank == pytest.approx((-math.sqrt(0.75) - 1) / 2)
    assert (budgets.groups, budgets.points) == (2, 6)
    # over selectors: 1 < 2 with .5 < 1; 4 < 5 with 0 < .5; the third group has no spread
    assert (selectors.rank, selectors.groups, selectors.points) == (pytest.approx(1.0), 2, 4)
    # over questions: the first cell alone has spread in both: |1| < |-3|, and the first answer stayed
    assert (questions.rank, questions.groups, questions.points) == (pytest.approx(-1.0), 1, 2)
    assert budgets.interval[0] <= budgets.rank <= budgets.interval[1]


def test_consistency_by_likelihood_points_the_same_way():
    data = made([[[1, 2, 3], [4, 5, 6]]], [[[0, 0, 0], [0, 0, 0]]])
    for row in data["rows"]:
        row["nll"] = [10 * v for v in row["ipr"]["uncentred 0"]]  # the larger the shift, the less likely the old answer
    by = found(data, consistency="nll")
    assert by["questions", "uncentred"].rank == pytest.approx(-1.0)
    assert by["budgets", "uncentred"].rank == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="consistency must be 'same' or 'nll', got 'kl'"):
        correlations(data, consistency="kl")


def test_rank_correlations_are_spearmans():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, (2, 6, 9)).astype(float)  # with many ties
    assert rank_correlations(x, y) == pytest.approx([spearman(list(a), list(b)) for a, b in zip(x, y, strict=True)])
    assert np.isnan(rank_correlations(np.ones(4), np.arange(4.0)))


def test_points_that_are_there_several_times_count_as_often():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 4, (2, 8)).astype(float)
    counts = rng.multinomial(8, [1 / 8] * 8, size=20)
    expected = [float(rank_correlations(np.repeat(x, c), np.repeat(y, c))) for c in counts]
    assert counted_correlations(x, y, counts) == pytest.approx(expected, nan_ok=True)
    assert np.isnan(counted_correlations(x, y, np.eye(8, dtype=int))).all()  # one point, eight times over


@pytest.fixture(scope="module")
def published():
    return check(json.loads(DATA.read_text()))


def test_measures_what_the_comparison_measures(published):
    """One question: ΔIPR, answers and ΔNLL are those that `selector compare --layer` records, and those published."""
    settings = SETTINGS | {"tasks": ["charts"], "selectors": ["lofi", "random"], "keep": [32], "questions": 1}
    measured = {row["selector"]: row for row in measure(settings)["rows"]}
    model, processor = load_model(SETTINGS["model"], "cpu")
    (sample,) = load_task("charts").samples(1, 0)
    for name, chosen in load_selectors(settings["selectors"], model.device).items():
        (old,) = [r for r in published["rows"] if (r["task"], r["selector"], r["keep"]) == ("charts", name, "32")]
        for layer in SETTINGS["layers"]:
            opened = Harness(model, processor, chosen.needs, Protocol(layer=layer)).open(sample)
            record = opened.record(Row(name, chosen, Budget(32)))
            kind = f"uncentred {layer}"
            assert measured[name]["ipr"][kind] == [pytest.approx(1e5 * record["ipr_shift"], abs=0.6)]
            assert old["ipr"][kind][0] == pytest.approx(1e5 * record["ipr_shift"], abs=30)  # other machines round else
        assert measured[name]["same"] == str(int(record["agrees"]))
        assert measured[name]["nll"] == [pytest.approx(1e3 * record["nll_shift"], abs=0.6)]


def test_centred_takes_the_mean_off():
    """Of random's shift, with the spectrum computed here."""
    settings = SETTINGS | {"tasks": ["scenes"], "selectors": ["random"], "keep": [16], "questions": 1, "layers": [1]}
    (row,) = measure(settings)["rows"]
    model, processor = load_model(SETTINGS["model"], "cpu")
    (sample,) = load_task("scenes").samples(1, 0)
    inputs = prepare(processor, sample.image, sample.question, model.device)
    with torch.no_grad():
        encoded = encode(model, inputs)
    (chosen,) = load_selectors(["random"], model.device).values()
    ipr = []
    for selector, budget in ((None, None), (chosen, Budget(16))):
        pruned = prune_inputs(model, inputs, selector, budget, encoded=encoded)
        tokens = forced(model, pruned.inputs, torch.tensor([5]), [1], encoded.image_token_id).visual[1].double()
        energy = torch.linalg.svdvals(tokens - tokens.mean(0)).square()
        ipr.append(((energy / energy.sum()) ** 2).sum().item())
    assert row["ipr"]["centred 1"] == [pytest.approx(1e5 * (ipr[1] - ipr[0]), abs=2)]


def numbers_of(cases, over, mean=None):
    own = [c for c in cases if c.over == over and mean in (None, c.mean)]
    ranks = [c.rank for c in own]
    return own, min(ranks), max(ranks)


def test_every_number_in_the_paragraph_is_from_the_data(published):
    text = (ROOT / "configs/compare/README.md").read_text()
    text = text.split("### What ΔIPR tells")[1].split("\n\n")[2].replace("\n", " ")
    same, likely = correlations(published), correlations(published, "nll")

    budgets, low, high = numbers_of(same, "budgets")
    assert all(c.interval[1] < 0 for c in budgets)
    wrong, least, most = numbers_of(same, "selectors", "uncentred")
    assert all(c.interval[0] > 0 for c in wrong)
    centred, _, _ = numbers_of(same, "selectors", "centred")
    below, above = sum(c.interval[1] < 0 for c in centred), sum(c.interval[0] > 0 for c in centred)
    questions, smallest, largest = numbers_of(same, "questions")
    _, nll_low, nll_high = numbers_of(likely, "budgets")
    _, nll_least, nll_most = numbers_of(likely, "selectors", "uncentred")
    _, nll_smallest, nll_largest = numbers_of(likely, "questions")

    counts = {over: [c.points for c in same if c.over == over] for over in OVER}
    said = [
        f"{len(published['selectors'])} selectors at {len(published['keep'])} budgets answer "
        f"{published['questions']} questions of each of {len(published['tasks'])} tasks",
        "layers {}, {} and {} (what enters the language model".format(*published["layers"]),
        f"it holds** in all {len(budgets)} cases: ρ from {low:+.2f} to {high:+.2f}, every interval below 0.",
        f"in {len(wrong)} of {len(wrong)} cases (ρ from {least:+.2f} to {most:+.2f}, every interval above 0)",
        f"below 0 in {below} cases, above 0 in {above} and hold it in {len(centred) - below - above}.",
        f"|ρ| is at most {max(-smallest, largest):.2f}.",
        f"ρ is {nll_low:+.2f} to {nll_high:+.2f} over budgets, {nll_least:+.2f} to {nll_most:+.2f} over selectors",
        f"at most {max(-nll_smallest, nll_largest):.2f} in size over questions.",
        f"over budgets has {min(counts['budgets'])} to {max(counts['budgets'])} points, over selectors "
        f"{max(counts['selectors'])}, over questions {min(counts['questions'])} to {max(counts['questions'])};",
    ]
    for words in said:
        assert words in text
        text = text.replace(words, "")
    assert re.findall(r"\d+", text) == []
    assert min(counts["selectors"]) == max(counts["selectors"])
    assert len(questions) == 18


def test_the_data_are_small_and_of_these_settings(published):
    assert DATA.stat().st_size < 300_000
    assert {name: published[name] for name in SETTINGS} == SETTINGS


def test_the_figure_is_drawn_from_the_data(published, tmp_path, capsys):
    copy = tmp_path / "ipr.json"
    copy.write_text(DATA.read_text())
    assert main([str(copy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 * 3 * 2 * 3
    drawn = (tmp_path / "ipr.svg").read_text()
    assert len(drawn) < 150_000
    for words in ("over the budgets of one selector", "over the selectors at one budget", "documents", "layer 4"):
        assert words in drawn
    there = DATA.with_suffix(".svg").read_text()
    if f"Matplotlib v{matplotlib.__version__}," in there:  # another version draws the same otherwise
        assert drawn == there
    wrong = correlations(published, draws=0)
    assert figure(wrong) != drawn


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("layers"), "they lack layers"),
        (lambda d: d["rows"].pop(), "s1 at 4 on t is missing"),
        (lambda d: d["rows"][0]["nll"].pop(), "must have 2 questions per row, s0 at 8 on t has not"),
    ],
)
def test_data_that_are_not_whole_are_refused(change, said, tmp_path, capsys):
    data = made([[[1, 2], [3, 4]], [[1, 2], [3, 4]]], [[[1, 1], [0, 0]], [[1, 1], [0, 0]]])
    change(data)
    with pytest.raises(UsageError, match=said):
        check(data)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(data))
    assert main([str(path)]) == 2
    assert said in capsys.readouterr().err
    assert not path.with_suffix(".svg").exists()
