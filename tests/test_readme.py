"""The pages are executed: their Python blocks run, their command lines parse, what they name exists."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from selector.report.statistics import wilson

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
    assert f"turns one image into up to {side**2 + (2 * side) ** 2 + 2 * side:,} visual tokens" in FRONT


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
