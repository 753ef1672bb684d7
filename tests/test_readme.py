"""The pages are executed: their Python blocks run, their command lines parse, what they name exists."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml

from selector.report.standings import flops_standings, markdown, standings
from selector.report.statistics import spearman, spearman_interval, wilson

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / name / "README.md"
    for name in (
        ".",
        "selector",
        "selector/methods",
        "selector/models",
        "training",
        "configs/compare",
        "configs/bench",
        "checkpoints",
    )
]
FRONT = (ROOT / "README.md").read_text()
METHODS = (ROOT / "selector" / "methods" / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Of all pages, each once."""
    found = [
        block for page in PAGES for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)
    ]
    return list(dict.fromkeys(found))


def commands(program: str) -> list[str]:
    lines = (line.split("  #")[0] for block in blocks("bash") for line in block.splitlines())
    parts = (part.strip() for line in lines for part in line.split("&&"))
    return list(dict.fromkeys(part for part in parts if part.split()[:1] == [program]))


def test_the_front_page_is_short():
    assert len(FRONT.splitlines()) <= 130


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_blocks_run(number):
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[number]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", commands("selector"))
def test_selector_commands_parse(command):
    from selector.cli import _parser

    _parser().parse_args(shlex.split(command)[1:])


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands("selector-train") if " fit " in c])
def test_fit_commands_give_a_whole_configuration(command):
    words = [sys.executable, "-m", "training.cli", *shlex.split(command)[1:], "--print_config"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "class_path" in done.stdout


def test_every_selector_is_in_the_table():
    from selector import available_selectors
    from selector.commands.list import markdown

    assert markdown() in METHODS, "selector list --markdown prints the table"
    for name, cls in available_selectors().items():
        row = next((line for line in METHODS.splitlines() if line.startswith(f"| `{name}`")), "")
        assert cls.paper in row, name
        assert ("| yes |" in row) == cls.learned, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.parent.relative_to(ROOT)))
def test_links_and_pictures_exist(page):
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())
    for target in targets:
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"(?m)^#+ (.*)$", there.read_text())
            slugs = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target


def test_the_first_table_is_the_committed_data():
    """Right answers at 64 / 32 / 16 tokens, from configs/compare/standings.json."""
    data = json.loads((ROOT / "configs/compare/standings.json").read_text())
    right = {(row["task"], row["selector"], row["keep"]): row["right"] for row in data["rows"]}
    names = {
        "**trained, reads the question** †": "selector-llava-next-tiny-question",
        "**trained, does not**": "selector-llava-next-tiny",
        "ridge-leverage (formula)": "ridge-leverage",
        "random": "random",
    }

    def percent(task: str, name: str, keep: str) -> str:
        hits = right[task, name, keep]
        return f"{100 * hits.count('1') / len(hits):.0f}"

    for label, name in names.items():
        cells = [
            " / ".join(percent(task, name, keep) for keep in ("64", "32", "16"))
            for task in ("documents", "charts", "scenes", "receipts")
        ]
        assert f"| {label} | {' | '.join(cells)} |" in FRONT


def test_the_first_number_is_that_of_the_largest_image():
    """Base view, the 2 x 2 tiles of a square image of full size, and a newline for each of its rows of patches."""
    side = 336 // 14
    assert f"Which of the up to {side**2 + (2 * side) ** 2 + 2 * side:,} visual tokens of an image" in FRONT


def sweep_cell(data: dict, variant: str, keep: str, task: str) -> str:
    """Right answers of a variant in %, mean over its seeds, with the interval of the questions, as tables write it."""
    rows = [
        row
        for row in data["rows"]
        if re.fullmatch(rf"{re.escape(variant)}(-\d)?", row["selector"]) and (row["keep"], row["task"]) == (keep, task)
    ]
    assert rows, (variant, keep, task)
    right = sum(round(row["accuracy"] * row["samples"]) for row in rows) / len(rows)
    low, high = wilson(round(right), rows[0]["samples"])
    return f"{100 * right / rows[0]['samples']:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def test_the_upside_down_table_is_the_committed_data():
    data = json.loads((ROOT / "configs/ablation/upside-down.json").read_text())
    page = (ROOT / "training/README.md").read_text()
    names = {
        "in the graph": "threshold-in-the-graph",
        "detached": "threshold-detached",
        "*random tokens*": "random",
        "*ridge-leverage*": "ridge-leverage",
    }
    for label, name in names.items():
        cells = [sweep_cell(data, name, keep, "documents") for keep in ("0.5", "0.25", "64")]
        assert f"| {label} | {' | '.join(cells)} |" in page


def test_the_tables_of_training_speed_are_the_committed_data():
    from training.bench import ratio_table, ratios, table

    page = (ROOT / "training/README.md").read_text()
    data = json.loads((ROOT / "configs/bench/training.json").read_text())
    assert table(data["rows"]) in page
    assert ratio_table(data["ratios"]) in page
    assert data["ratios"] == ratios(data["rows"])
    machine = data["machine"]
    assert f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['instructions'])}" in page


def test_the_estimates_of_training_follow_from_their_formulas():
    """Images per second, hours and terabytes of 558,000 images at a third of an A100's peak."""
    page = " ".join((ROOT / "training/README.md").read_text().split())
    images, tiles, rate = 558_000, 4, 312e12 / 3
    tower = 24 * (24 * 1024**2 + 4 * 577 * 1024) * 577

    # Selector and reconstructor: 3 layers of 8 W^2 weights and their linear layers, forward and backward.
    width = yaml.safe_load((ROOT / "configs/train/llava-next.yaml").read_text())["model"]["width"]
    weights = (3 * 8 * width**2 + 1024 * width) + (3 * 8 * width**2 + 2 * 1024 * width)
    trained = (6 * weights + 2 * 3 * 3 * 4 * 576 * width) * 576
    assert f"= {tower / 1e12:.2f} Tflop per tile" in page
    assert f"**{rate / (tiles * tower):.0f} images per second and GPU**" in page
    assert f"add {100 * trained / tower:.0f}%" in page

    def hours(operations: float) -> float:
        return images * operations / rate / 3600

    size = images * tiles * 576 * 1024 * 2
    assert f"| {hours(tiles * tower):.1f} h, {size / 1e12:.1f} TB" in page
    cached = f"{size / 2e9 / 3600:.1f} h where the disk reads 2 GB/s; {hours(tiles * trained):.1f} h of it computing"
    assert f"| an epoch | {hours(tiles * (tower + trained)):.1f} h | {cached} |" in page
    assert f"{hours(77e12):.0f} h per epoch of 558,000 images on one A100, or {hours(77e12) / 8:.0f} h on eight" in page
    assert f"so {round(hours(6 * 40e12), -1):.0f} h for six questions" in page


def test_inside_the_language_model_the_page_is_the_committed_data():
    page = (ROOT / "configs/compare/README.md").read_text()
    tables = {}
    for name in ("inside", "inside-after"):
        data = json.loads((ROOT / f"configs/compare/{name}.json").read_text())
        assert markdown(data).strip() in page
        tables[name] = data
    prose = " ".join(page.split())

    # The figures of the paragraph.
    average, after = standings(tables["inside"]), standings(tables["inside-after"], after=True)
    before = standings(tables["inside-after"])

    def mean(rows, name, keep):
        return next(round(100 * row[keep]) for row in rows if row["selector"] == name)

    assert f"falls to {mean(average, 'ridge-leverage:layer=1', '0.3')}% of the unpruned" in prose
    behind = mean(after, "ridge-leverage:layer=2,count=after", "16")
    assert f"({behind}%, against {mean(before, 'ridge-leverage', '16')}% for 16" in prose
    assert f"(`vtw`) {mean(average, 'vtw', '0.5')}% remain" in prose
    lost = {row["selector"]: row["lost"] for row in flops_standings(tables["inside"])}
    assert lost["ridge-leverage"] == lost["lofi"] == 0

    # ΔIPR and agreement, means over tasks.
    points = defaultdict(list)
    for row in json.loads((ROOT / "configs/compare/inside-shifts.json").read_text())["rows"]:
        if row["keep"] == "64" and "count=after" in row["selector"]:
            points[row["selector"]].append((abs(row["ipr_shift"]), row["agreement"]))
    shift, agreement = zip(*(np.mean(own, axis=0) for own in points.values()), strict=True)
    rank = spearman(shift, agreement)
    low, high = spearman_interval(rank, len(points))
    assert f"Spearman {rank:+.2f} [{low:+.2f}, {high:+.2f}]" in prose


def test_the_table_of_the_match_is_the_committed_data():
    page = (ROOT / "training/README.md").read_text()
    rows = json.loads((ROOT / "configs/compare/match-rank.json").read_text())["rows"]
    right = {(row["selector"], row["keep"], row["task"]): row["right"].count("1") for row in rows}
    assert {len(row["right"]) for row in rows} == {100}

    def said(name: str, keep: str | None) -> str:
        return " / ".join(str(right[name, keep, task]) for task in ("documents", "charts", "scenes", "receipts"))

    assert f"without pruning {said('full', None)};" in page
    labels = {
        "full rank, 192 (the shipped checkpoint)": "selector-llava-next-tiny-question",
        "rank 16": "question-rank-16",
        "*ridge-leverage*": "ridge-leverage",
    }
    for label, name in labels.items():
        assert f"| {label} | {' | '.join(said(name, keep) for keep in ('64', '32', '16'))} |" in page


def test_the_claims_are_the_committed_data():
    page = (ROOT / "configs/compare/README.md").read_text()
    data = json.loads((ROOT / "configs/compare/claims.json").read_text())
    right = {(row["task"], row["selector"], row["keep"]): row["right"] for row in data["rows"]}

    def said(task: str, name: str, keep: str | None) -> str:
        hits = right[task, name, keep].count("1")
        low, high = wilson(hits, len(right[task, name, keep]))
        return f"{100 * hits / len(right[task, name, keep]):.0f} [{100 * low:.0f}, {100 * high:.0f}]"

    ours = "selector-llava-next-tiny"
    assert f"full {said('documents', 'full', None)}, trained by reconstruction " in page
    assert f"trained by reconstruction {said('documents', ours + '-reconstruction', '0.5')}, trained from" in page
    assert f"trained from answers {said('documents', ours, '0.5')}, random {said('documents', 'random', '0.5')}" in page
    assert f"scenes: full {said('scenes', 'full', None)}, random {said('scenes', 'random', '0.3')}" in page

    shifts = json.loads((ROOT / "configs/compare/shifts.json").read_text())["correlations"]
    for row in shifts:
        if row["shift"] == "ipr_shift" and row["task"]:
            low, high = row["interval"]
            assert f"{row['task']} {row['rank']:+.2f} [{low:+.2f}, {high:+.2f}]" in page


def test_the_stability_table_is_the_committed_data():
    card = (ROOT / "checkpoints/selector-llava-next-tiny/README.md").read_text()
    data = json.loads((ROOT / "configs/compare/stability.json").read_text())
    rows = {(row["task"], row["selector"], row["keep"], row["change"]): row for row in data["rows"]}
    assert len(rows) == 72
    for _, name, keep, change in rows:
        cells = []
        for task in ("documents", "charts", "scenes"):
            row = rows[task, name, keep, change]
            low, high = row["common_interval"]
            cells.append(f"{row['common']:.2f} [{low:.2f}, {high:.2f}] ({row['chance_common']:.2f})")
        assert f"| {name} | {keep} | {change} | {' | '.join(cells)} |" in card


def test_the_table_of_real_images_is_the_committed_data():
    page = (ROOT / "configs/compare/README.md").read_text()
    rows = json.loads((ROOT / "configs/compare/real.json").read_text())["rows"]
    data = {(row["task"], row["selector"], row["keep"]): row for row in rows if row["keep"]}
    names = {
        "selector-llava-next-tiny-real": "**trained by reconstruction, on real images**",
        "real-paper-projected": "the same, the paper's objective on projected tokens",
        "selector-llava-next-tiny-reconstruction": "trained by reconstruction, on generated pages",
        "selector-llava-next-tiny": "trained from answers",
    }
    for name in {selector for _, selector, _ in data}:
        cells = []
        for place in ("documents", "photos"):
            for keep in ("0.5", "0.25", "0.1"):
                row = data[place, name, keep]
                low, high = row["evidence_interval"]
                cells.append(f"{100 * row['evidence']:.0f} [{100 * low:.0f}, {100 * high:.0f}]")
        assert f"| {names.get(name, name)} | {' | '.join(cells)} |" in page


def test_the_table_of_what_answers_teach_is_the_committed_data():
    card = (ROOT / "checkpoints/selector-llava-next-tiny/README.md").read_text()
    data = json.loads((ROOT / "configs/ablation/answers.json").read_text())
    variants = {re.sub(r"-\d$", "", row["selector"]) for row in data["rows"]}
    assert len(variants) == 7
    for variant in variants:
        cells = []
        for task in ("documents", "charts", "scenes"):
            names = {variant, *(f"{variant}-{seed}" for seed in range(3))}
            same = [r["agreement"] for r in data["rows"] if r["selector"] in names and r["task"] == task]
            cells.append(f"{sweep_cell(data, variant, '64', task)} / {100 * (sum(same) / len(same)):.0f}")
        assert f"| {variant} | {' | '.join(cells)} |" in card


def test_the_table_of_what_reconstructs_is_the_committed_data():
    card = (ROOT / "checkpoints/selector-llava-next-tiny-reconstruction/README.md").read_text()
    data = json.loads((ROOT / "configs/ablation/reconstruction.json").read_text())
    variants = sorted({name.removesuffix(name[-2:]) for name in data["validation"]})
    assert len(variants) == 6
    for variant in variants:
        seeds = [data["validation"][f"{variant}-{seed}"] for seed in range(3)]
        cells = []
        for share in (50, 25, 10):
            ours, chance, leverage = (
                sum(seed[f"rec_{who}_{share}"] for seed in seeds) / 3 for who in ("learned", "random", "leverage")
            )
            cells.append(f"{ours:.3f} ({chance:.3f}, {leverage:.3f})")
        for task in ("documents", "charts", "scenes"):
            same = [
                row["agreement"] for row in data["rows"]
                if row["selector"] in {f"{variant}-{seed}" for seed in range(3)} and row["task"] == task
            ]  # fmt: skip
            cells.append(f"{sweep_cell(data, variant, '64', task)} / {100 * (sum(same) / len(same)):.0f}")
        assert f"| {variant} | {' | '.join(cells)} |" in card
