"""The page: one file, nothing fetched, every figure in a table, every picture described."""

from __future__ import annotations

import base64
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from selector import records
from selector.errors import UsageError
from selector.measure.evidence import canvas_of
from selector.measure.harness import pack
from selector.measure.images import store_image
from selector.report.columns import LEGEND
from selector.report.page.explorer import explorer
from selector.report.page.overview import overview
from selector.report.page.plots import Point, Reference, Series, axis, plot
from selector.report.summary import read_run, run_names, write_report

RIGHT = {"ours": ["1101", "1000"], "theirs": ["0110", "0000"]}


def make_run(folder, model="m", tasks=("toy", "more")):
    plan = []
    canvas = canvas_of((64, 64), [[64, 64]], 32, (4, 4))
    for task in tasks:
        rows = [("full", None, "1111"), ("blind", None, "0000")]
        rows += [(label, keep, hits) for label in RIGHT for keep, hits in zip(("0.5", "8"), RIGHT[label], strict=True)]
        for label, keep, hits in rows:
            file = records.Records(folder, {"label": label, "keep": keep, "task": task})
            plan.append({"task": task, "label": label, "keep": keep, "key": file.key})
            for i, hit in enumerate(hits):
                right = hit == "1"
                kept = torch.zeros(5, 16, dtype=torch.bool)
                kept[1, : 4 * (i + 1)] = True
                record = {
                    "id": f"s{i}",
                    "index": i,
                    "tokens": {None: 80, "0.5": 40, "8": 8}[keep],
                    "full_tokens": 80,
                    "saturated": False,
                    "question": f"</script><b>{i}?",
                    "target": "red",
                    "answer": "red" if right else "blue",
                    "full_answer": "red",
                    "agrees": right,
                    "correct": right,
                    "full_correct": True,
                    "flip": "same" if right else "right_to_wrong",
                    "anls": float(right),
                    "full_anls": 1.0,
                    "nll_shift": 0.0 if right else 1.5,
                    "prefill_ms": 10.0 + i,
                    "kv_bytes": 1000,
                    "ipr_shift": 0.1 * i,
                    "rank_shift": -0.2 * i,
                    "energy_shift": 0.05,
                    "selection_ms": 1.0,
                    "kept": pack(kept),
                }
                file.append(record)
        for i in range(3):  # the image of the last sample is missing
            store_image(
                folder,
                records.image_name(task, 0, f"s{i}"),
                Image.new("RGB", (64, 64), (250, 240, 9) if i else (9, 9, 40)),
                canvas,
                [(8.0, 16.0, 24.0, 32.0)] if i else (),
            )
    settings = {
        "model": model,
        "samples": 4,
        "seed": 0,
        "answers": True,
        "positions": "original",
        "baseline": "theirs",
        "layer": 0,
        "repeats": 1,
        "environment": {"torch": "2", "transformers": "5", "device": "cpu", "threads": 1, "dtype": "float32"},
        "fingerprint": "abc",
        "max_new_tokens": 3,
        "tasks": {task: {"fingerprint": task, "anls": task == "more"} for task in tasks},
        "unreadable": {},
        "rows": plan,
    }
    records.write_json(folder / "run.json", settings)
    return folder


@pytest.fixture
def page(tmp_path):
    run = make_run(tmp_path / "run")
    _, path = write_report([run])
    return path.read_text()


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_every_tag_is_closed_and_nothing_is_fetched(page):
    tags = Tags(page).found
    for _, attributes in tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), attributes
    assert not re.search(r"@import|url\((?!data:)|fetch\(|XMLHttpRequest|https?://", page)
    assert len(page) < 5_000_000


def test_links_lead_somewhere_and_names_are_unique(page):
    tags = Tags(page).found
    names = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(set(names)) == len(names)
    targets = [a["href"][1:] for _, a in tags if (a.get("href") or "").startswith("#")]
    assert set(targets) <= set(names)
    assert len(targets) >= 6


def test_tables_are_readable_without_eyes(page):
    tags = Tags(page).found
    tables = page.count("<table")
    assert tables == page.count("<caption>") == 1 + 2 * 3
    heads = [attributes for tag, attributes in tags if tag == "th"]
    assert heads
    assert all(attributes.get("scope") in ("col", "row") for attributes in heads)
    for tag, attributes in tags:
        if tag == "svg" and attributes.get("aria-hidden") != "true":
            assert attributes["role"] == "img"
            assert len(attributes["aria-label"]) > 40
    assert page.count('<html lang="en">') == 1


def test_every_row_is_in_the_table_and_best_ones_are_marked(page):
    body = page.split('id="task-toy"')[1].split("<tbody>")[1].split("</tbody>")[0]
    assert body.count("<tr") == 6
    assert re.search(r'class="best[^"]*"><td data-value="40">0.5</td><th scope="row">ours</th>', body)
    assert ">ANLS<" not in page.split('id="task-toy"')[1].split('id="task-more"')[0]
    assert ">ANLS<" in page.split('id="task-more"')[1]


def test_the_explorer_holds_answers_masks_and_images(page):
    data = data_of(page)
    assert len(data["samples"]) == 2 * 4
    sample = next(s for s in data["samples"] if s["task"] == "toy" and s["id"] == "s1")
    assert sample["question"] == "</script><b>1?"
    assert {(row["selector"], row["keep"]) for row in sample["rows"]} == {
        ("blind", None),
        *((label, keep) for label in RIGHT for keep in ("0.5", "8")),
    }
    image = data["images"][sample["image"]]
    assert base64.b64decode(image["data"].split(",")[1])[:2] == b"\xff\xd8"
    assert (len(image["xs"]), len(image["ys"]), image["size"]) == (9, 9, [64, 64])
    bits = base64.b64decode(sample["rows"][0]["kept"])
    assert (len(bits), bits[2], bits[3]) == (10, 255, 0)  # the first tile after the base view: 8 of 16 patches
    assert "image" not in next(s for s in data["samples"] if s["id"] == "s3")

    first = data["images"][next(s for s in data["samples"] if s["id"] == "s0")["image"]]
    assert (image["boxes"], first["boxes"]) == ([[8.0, 16.0, 24.0, 32.0]], [])
    assert (image["dark"], first["dark"]) == (False, True)  # the veil over what was dropped is light on a dark image


def test_samples_that_tell_selectors_apart_come_first(page):
    order = [s["id"] for s in data_of(page)["samples"] if s["task"] == "toy"]
    assert order == ["s0", "s2", "s3", "s1"]


def told(**answers):
    """What the explorer shows of one task with samples a, b, ...: per selector and budget (right, same) each."""
    settings = {"tasks": {"t": {"fingerprint": "f"}}, "seed": 0, "rows": []}

    def records_of(hits):
        base = {"question": "?", "tokens": 1, "full_tokens": 9}
        return [base | {"id": "abc"[i], "answer": "x", "correct": r, "agrees": s} for i, (r, s) in enumerate(hits)]

    tables = {("t", *name.split("__")): records_of(hits) for name, hits in answers.items()}
    count = len(next(iter(answers.values())))
    tables["t", "full", None] = records_of([(True, True)] * count)
    return explorer({"run": (Path("nowhere"), settings, tables)})["samples"]


def test_the_explorer_opens_where_selectors_differ_in_being_right():
    # a: wrong everywhere, in words that are the unpruned model's or not; b: right under one at 64 tokens; c: all right
    wrong, other, right = (False, True), (False, False), (True, True)
    shown = told(one__128=[wrong, right, right], two__128=[other, right, right], one__64=[wrong, right, right],
                 two__64=[other, other, right])  # fmt: skip
    assert [(s["id"], s["tells_at"]) for s in shown] == [("b", "64"), ("a", "128"), ("c", None)]


def test_the_explorer_shows_the_score_of_a_task_that_has_one():
    def shown(about, scores):
        base = {
            "id": "a",
            "question": "?",
            "answer": "x",
            "correct": True,
            "agrees": True,
            "tokens": 1,
            "full_tokens": 9,
        }
        settings = {"tasks": {"t": {"fingerprint": "f"} | about}, "seed": 0, "rows": []}
        tables = {("t", "one", "64"): [base | scores[0]], ("t", "full", None): [base | scores[1]]}
        return explorer({"run": (Path("nowhere"), settings, tables)})["samples"][0]

    scored = shown({"metric": "vqa"}, ({"score": 2 / 3}, {"score": 1.0}))
    assert (scored["scored_by"], scored["score"], scored["rows"][0]["score"]) == ("VQA accuracy", 1.0, 2 / 3)
    exact = shown({}, ({}, {}))
    assert "scored_by" not in exact
    assert (exact["correct"], exact["rows"][0]["correct"]) == (True, True)


def row_of(keep, interval, broken, pairs, fixed=0):
    versus = {"interval": interval, "difference": sum(interval) / 2, "broken": broken, "fixed": fixed, "pairs": pairs}
    return {"task": "t", "selector": "s", "sees_question": False, "keep": str(keep), "tokens": keep, "full_tokens": 512,
            "agreement": 0.9, "versus_full": versus | {"samples_for_a_point": None}}  # fmt: skip


def smallest(*rows):
    """The cell of the table of fewest tokens."""
    text = overview({"run": {"tasks": ["t"], "rows": list(rows)}})
    assert "Fewest tokens shown to lose less than 5 points of accuracy" in text
    assert "lower end is above −5 points" in text
    assert "fewer than 59 show nothing" in text
    return re.search(r"<td>(.*?)</td>", text)[1]


def test_fewest_tokens_are_those_shown_to_lose_less_than_the_margin():
    good, wide = row_of(128, (-0.04, 0.02), 3, 200), row_of(64, (-0.13, 0.03), 9, 40)
    assert smallest(good, wide).startswith("128 tokens (25%): -1 [-4, +2] points")  # 0 inside is not enough
    assert smallest(wide) == "not shown for any tried"
    assert smallest(row_of(128, (-0.05, 0.02), 3, 200)) == "not shown for any tried"
    # a smaller budget counts only where every larger one passed
    assert smallest(wide, row_of(32, (-0.01, 0.01), 1, 200)) == "not shown for any tried"


@pytest.mark.parametrize("fixed", [0, 2])
def test_few_questions_show_no_small_loss_though_none_broke(fixed):
    """The bootstrap of questions none of which broke has its lower end at 0 or above, however few they are."""
    assert smallest(row_of(128, (0.0, 0.1 * fixed), 0, 58, fixed)) == "not shown for any tried"
    assert smallest(row_of(128, (0.0, 0.1 * fixed), 0, 59, fixed)).startswith("128 tokens")


def test_accuracy_is_the_first_figure_of_the_head_to_head_and_the_rest_is_announced(page):
    table = page.split('id="task-toy"')[1].split("<table")[1].split("</table>")[0]
    headers = re.findall(r"<button[^>]*>(.*?)</button>", table)
    assert headers[:3] == ["keep", "selector", "right % [95%]"]
    assert headers.index("tokens") > headers.index("vs full")
    assert re.search(r'<caption>[^<]*<span class="hint">[^<]*swipe for more columns', table)
    style = page.split("<style>")[1].split("</style>")[0]
    wide, narrow = style.split("@media (max-width: 620px)")
    assert ".hint { display: none; }" in wide
    assert ".hint { display: inline; }" in narrow
    assert "tbody th { position: sticky" in wide


def test_findings_name_what_n_allows(page):
    overview = page.split('id="overview"')[1].split("</section>")[0]
    assert "Unpruned, the model is right on 100% [51, 100] of 4 questions; without the image on 0%." in overview
    assert "would need" in overview
    assert "none lost" not in overview


def test_several_runs_beside_each_other(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", model="other", tasks=("toy",))]
    summaries, path = write_report(runs, tmp_path / "both.html")
    assert [s["model"] for s in summaries] == ["m", "other"]
    text = path.read_text()
    Tags(text)
    table = text.split('id="differences"')[1].split("</section>")[0]
    assert "<td>m</td><td>other</td>" in table
    assert "seed" not in table
    assert "ours · a" in text
    assert "ours · b" in text
    assert {s["run"] for s in data_of(text)["samples"]} == {"a", "b"}
    markdown = path.with_suffix(".md").read_text()
    assert "# a: comparison on m" in markdown
    assert "# b: comparison on other" in markdown
    assert not (tmp_path / "a" / "report.html").exists()


def test_markdown_lists_changed_answers(tmp_path):
    _, path = write_report([make_run(tmp_path / "run", tasks=("toy",))])
    text = path.with_suffix(".md").read_text()
    assert "Unpruned, the model is right on 100% [51, 100] of 4 questions" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| &lt;/script>&lt;b>0?")]
    assert line == "| &lt;/script>&lt;b>0? | red | red | “blue” theirs 0.5, theirs 8 |"


def test_selectors_that_see_the_question_are_marked_everywhere(page, tmp_path):
    assert "†" not in page
    run = make_run(tmp_path / "asking", tasks=("toy",))
    settings = json.loads((run / "run.json").read_text())
    for planned in settings["rows"]:
        planned["sees_question"] = planned["label"] == "theirs"
    records.write_json(run / "run.json", settings)
    _, path = write_report([run])

    text = path.read_text()
    overview = text[text.index('<section id="overview"') : text.index('<section id="task-toy"')]
    assert "theirs†" in overview
    assert LEGEND in overview
    tables = re.findall(r"<table.*?</table>", text, re.DOTALL)
    assert ["theirs†" in table for table in tables] == [True] * 4  # overview, head to head, consistency, cost
    assert {row["selector"] for row in data_of(text)["samples"][0]["rows"]} == {"blind", "ours", "theirs†"}
    assert "“blue” theirs† 0.5, theirs† 8" in path.with_suffix(".md").read_text()
    plots = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert plots
    assert "theirs†" in "".join(plots)


def test_runs_of_one_name_are_told_apart(tmp_path):
    same = [tmp_path / "x" / "run", tmp_path / "y" / "run"]
    assert run_names(same) == [str(path) for path in same]
    with pytest.raises(UsageError, match="there twice"):
        run_names([same[0], tmp_path / "y" / ".." / "x" / "run"])


def test_the_page_has_room_for_so_much(tmp_path):
    run = make_run(tmp_path / "run")
    small = explorer({"run": (run, *read_run(run))}, room=9000)
    assert 0 < len(small["samples"]) < 8
    assert len(json.dumps(small)) < 9500


def test_plots_put_points_where_they_belong():
    y = axis("share", [], percent=True)
    x = axis("tokens", [16, 256], log=True)
    assert y.share(0.5) == 0.5
    assert x.share(64) == pytest.approx(0.5)
    svg = plot("title", x, y, [Series("a & b", 0, [Point(64, 0.5, "half", (0.25, 0.75))])], front=True)
    assert "a &amp; b: half" in svg
    circle = re.search(r'cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert float(circle[1]) == pytest.approx(50 + 0.5 * (460 - 62), abs=0.1)
    assert float(circle[2]) == pytest.approx(300 - 42 - 0.5 * (300 - 72), abs=0.1)


@pytest.mark.parametrize("levels", [(0.92, 0.07), (1.0, 0.98), (0.0, 0.01), (0.5, 0.5, 0.51)])
def test_names_of_reference_lines_meet_no_point_and_no_other_name(levels):
    lines = [Reference(f"a model of long name {100 * level:.0f}%", level) for level in levels]
    points = [Point(16, 0.07, "first"), Point(256, 0.92, "last")]
    svg = plot("t", axis("x", [16, 256], log=True), axis("share", [], percent=True), [Series("s", 0, points)], lines)
    ends = {float(x) for x in re.findall(r'<line class="reference" x1="50" x2="([\d.]+)"', svg)}
    names = [(float(x), float(y)) for x, y in re.findall(r'<text class="reference" x="([\d.]+)" y="([\d.]+)"', svg)]
    (end,) = ends
    assert max(float(x) for x in re.findall(r'<circle[^>]* cx="([\d.]+)"', svg)) + 5 < end
    assert all(x > end for x, _ in names)
    written = re.findall(r'<text class="reference"[^>]*>([^<]*…)<title>', svg)  # shortened; whole in the tooltip
    assert all(x + 8 * len(name) <= 460 for (x, _), name in zip(names, written, strict=True))
    heights = sorted(y for _, y in names)
    assert all(b - a >= 16 for a, b in itertools.pairwise(heights))
    assert 15 <= heights[0] <= heights[-1] <= 300 - 36
    assert svg.count("<title>a model of long name") == len(levels)


def test_the_title_of_the_y_axis_is_above_its_ticks():
    svg = plot("t", axis("x", [1, 2]), axis("same answers", [], percent=True), [])
    assert "rotate" not in svg
    title = float(re.search(r'<text class="label y" x="4" y="([\d.]+)">same answers', svg)[1])
    highest = min(float(y) for y in re.findall(r'<text class="tick y"[^>]* y="([\d.]+)"', svg))
    assert highest - title >= 15  # the height of a letter on a phone


@pytest.mark.parametrize("values", [[], [0.0], [0.0, 0.0], [5.0], [1e-9, 2e-9], [-3.0, 4.0], [16, 1464]])
@pytest.mark.parametrize("log", [False, True])
def test_axes_hold_their_values(values, log):
    for zero in (False, True):
        made = axis("x", values, log=log, zero=zero and min(values, default=0) >= 0)
        assert all(-1e-9 <= made.share(v) <= 1 + 1e-9 for v in values)
        assert len(made.ticks) < 12
