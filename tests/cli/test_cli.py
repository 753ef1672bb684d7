"""The command line: help, every command on a tiny random model, settings, and every mistake as one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cli_runs import SMALL, folder
from PIL import Image

from selector import cli
from selector.tasks import GENERATED

ROOT = Path(__file__).resolve().parent.parent.parent


def test_help_imports_no_torch():
    """What makes it answer at once; the time itself is the machine's business."""
    code = "import sys; from selector.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'rich', 'yaml'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for word in ("compare", "show", "bench", "calibrate", "stability", "list", "report", "examples:"):
        assert word in done.stdout


def test_report_imports_no_torch():
    code = "import sys; import selector.commands.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("command", ["compare", "show", "bench", "calibrate", "stability", "list", "report"])
def test_help_of_every_command(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert command in shown

    # Each default that a user gets is named, beside the flag whose default it is.
    flags = dict(re.findall(r"(?ms)^  --([a-z-]+)(.*?)(?=^  -|\Z)", shown))
    for name, value in cli.DEFAULTS.get(command, {}).items():
        if value is None or value is False or value == []:
            continue  # not there unless asked for
        text = " ".join(map(str, value)) if isinstance(value, list) else "ask" if value is True else str(value)
        assert f"(default: {text})" in " ".join(flags[name.replace("_", "-")].split()), name


@pytest.mark.parametrize("command", ["compare", "show", "bench", "calibrate", "stability"])
def test_help_names_every_default_as_it_is(command, monkeypatch, capsys):
    """Other defaults, other help: no figure in it is a text of its own."""
    monkeypatch.setenv("COLUMNS", "500")
    changed = {"max_new_tokens": 4711, "repeats": 4712, "out": "elsewhere.png", "seed": 4713, "scope": "halves"}
    changed |= {"newlines": "some", "positions": "odd", "device": "abacus", "dtype": "float7", "samples": 4714}
    changed |= {"baseline": "nobody", "layer": 4715, "tasks": ["a", "b"], "keep": [4716]}
    changed |= {"shares": [0.47], "tolerance": 0.18}
    known = cli.DEFAULTS[command]
    if command in ("bench", "calibrate", "stability"):
        del changed["out"]  # none by default
    if command == "calibrate":
        changed["newlines"] = ["some", "most"]
    for name, value in changed.items():
        if name in known:
            monkeypatch.setitem(known, name, value)
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    for name, value in changed.items():
        if name in known:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            assert f"(default: {text})" in shown, name
    if command == "compare":
        for task in GENERATED:
            assert task in shown


def test_tiny_yaml_equals_the_defaults():
    assert yaml.safe_load((ROOT / "configs/compare/tiny.yaml").read_text()) == cli.DEFAULTS["compare"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/compare").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_is_valid(path):
    from selector.commands import loading
    from selector.commands.common import find_tasks
    from selector.tasks.benchmarks import find_recipe

    settings = cli._settings("compare", {"config": str(path)})
    loading.parse_budgets(settings["keep"], settings["scope"], settings["newlines"])
    here = [task for task in settings["tasks"] if not task.startswith("hf:")]
    assert not here or find_tasks("compare", here, False)  # a task whose data is not here is left out
    for task in set(settings["tasks"]) - set(here):  # their data needs a network
        assert find_recipe(task, task.removeprefix("hf:"))
    names = [s for s in settings["selectors"] if "/" not in s]
    assert len(loading.load_selectors(names, loading.find_device("cpu"))) == len(names)


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("samples: 7\nkeep: [3]\n")
    parsed = vars(cli._parser().parse_args(["compare", "--config", str(tmp_path / "c.yaml"), "--keep", "0.5"]))
    parsed.pop("command")
    settings = cli._settings("compare", parsed)
    assert (settings["samples"], settings["keep"], settings["seed"]) == (7, ["0.5"], 0)
    assert settings["given"] == ["keep", "samples"]


def timeless(report):
    """Without the line on what the time went into: a second report counts what the first one took."""
    return [line for line in report.splitlines() if not line.startswith("Time: ")]


@pytest.mark.slow
def test_compare_then_report(call, model):
    code, out, _ = call("compare", "--model", model, *SMALL, "--out", "runs/a", "--tasks", "documents", "scenes")
    assert code == 0
    for word in ("documents", "scenes", "full", "blind", "svd-prune:rank=2", "vs random", "prefill ms"):
        assert word in out
    results = json.loads(Path("runs/a/results.json").read_text())
    assert len(results["rows"]) == 2 * (2 + 2 * 2)
    assert {row["samples"] for row in results["rows"]} == {2}
    again = call("report", "runs/a")
    assert timeless(again[1]) == timeless(out)
    assert again[0] == 0
    assert "| 9 | " in Path("runs/a/report.md").read_text().replace("**", "")
    assert "Report: runs/a/report.html" in out
    assert Path("runs/a/report.html").read_text().startswith("<!doctype html>")
    shutil.copytree("runs/a", "runs/b")
    code, beside, _ = call("report", "runs/a", "runs/b", "--out", "both.html")
    assert code == 0
    assert beside.count("documents ·") == 2
    assert "What differs between the runs" in Path("both.html").read_text()
    repeated = call("compare", "--model", model, *SMALL, "--out", "runs/a", "--tasks", "documents", "scenes")
    assert timeless(repeated[1]) == timeless(out)  # nothing was measured anew: the times in the table are the same


def test_compare_with_a_file_and_a_class_in_it(call, model):
    selectors = ["random", {"class_path": "selector.methods.norm.Norm", "init_args": {"largest": False}}]
    settings = {
        "model": model,
        "selectors": selectors,
        "keep": [9],
        "samples": 1,
        "tasks": ["scenes"],
        "answers": False,
    }
    Path("c.yaml").write_text(yaml.safe_dump(settings))
    code, out, _ = call("compare", "--config", "c.yaml")
    assert code == 0
    assert "Norm:largest=False" in out
    assert Path("runs/compare/results.json").is_file()


def test_compare_a_folder(call, model, tmp_path):
    folder(tmp_path / "data", ["a.png", "b.png"])
    code, out, _ = call(
        "compare", "--model", model, *SMALL, "--tasks", "folder:data", "--no-answers", "--samples", "all"
    )
    assert code == 0
    assert "evidence" in out
    assert "blind" not in out
    assert {row["samples"] for row in json.loads(Path("runs/compare/results.json").read_text())["rows"]} == {2}


@pytest.mark.slow
def test_interrupted_prints_what_is_done(call, model, monkeypatch):
    from selector.measure import harness as measure

    kept, calls = measure.answer, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 10:  # within the second sample; the first call warms up
            raise KeyboardInterrupt
        return kept(*args)

    one_by_one = ("--batch-size", "1")  # in batches, samples end together
    with monkeypatch.context() as patch:
        patch.setattr(measure, "answer", interrupt)
        code, out, err = call("compare", "--model", model, *SMALL, "--tasks", "scenes", *one_by_one)
    assert code == 130
    assert "the same command goes on from here" in err
    assert "svd-prune:rank=2" in out
    counts = [row["samples"] for row in json.loads(Path("runs/compare/results.json").read_text())["rows"]]
    assert counts == [2, 2, 1, 1, 1, 1]
    assert call("compare", "--model", model, *SMALL, "--tasks", "scenes", *one_by_one)[0] == 0


@pytest.mark.slow
def test_show(call, model, make_image):
    make_image(70, 120).save("a.png")
    make_image(50, 50).save("b.jpg")
    options = ["--model", model, "--selectors", "svd-prune:rank=2", "random", "--keep", "0.25", "9"]
    code, out, _ = call("show", "a.png", "b.jpg", *options, "--out", "deep/p.png")
    assert code == 0
    assert "4 rows of 3 panels" in out
    assert re.search(r"a\.png: svd-prune:rank=2, keep 9: 9 of \d+ tokens", out)
    with Image.open("deep/p.png") as picture:
        assert picture.width == 3 * 368
    code, _, _ = call("show", *options, "--question", "what?", "--max-new-tokens", "2", "--scores")
    assert code == 0
    assert Path("selector.png").is_file()


def test_show_asks_the_question_without_an_image_too(call, model):
    options = ["--model", model, "--selectors", "random", "--max-new-tokens", "2"]
    code, out, _ = call("show", *options, "--question", "what is TOTAL?")
    assert code == 0
    assert "Q: what is TOTAL?" in out
    assert "right:" not in out
    assert out.count("Q: ") == out.count("Q: what is TOTAL?")


def test_a_selector_has_the_name_that_it_is_given(call, model):
    specs = ["mine=svd-prune:rank=2", "other=svd-prune:rank=3", "random"]
    options = ["--model", model, "--keep", "9", "--samples", "1", "--no-answers", "--tasks", "scenes"]
    code, out, _ = call("compare", "--selectors", *specs, *options, "--baseline", "mine")
    assert code == 0
    assert "vs mine" not in out  # nothing is asked
    rows = json.loads(Path("runs/compare/results.json").read_text())["rows"]
    assert {row["selector"] for row in rows} == {"full", "mine", "other", "random"}


def test_two_folders_of_one_name_are_told_apart(call, model):
    from selector import SVDPrune

    for rank in (2, 3):
        SVDPrune(rank=rank).save_pretrained(f"r{rank}/best")
    SVDPrune(rank=4).save_pretrained("full")
    options = ["compare", "--model", model, "--keep", "9", "--samples", "1", "--no-answers", "--tasks", "scenes"]
    code, _, err = call(*options, "--selectors", "r2/best", "r3/best")
    assert code == 2
    assert "'best' is there twice; NAME=SPEC gives one another name, as in other=r3/best" in err
    code, _, err = call(*options, "--selectors", "full")
    assert code == 2
    assert "must not be called full or blind" in err
    assert call(*options, "--selectors", "r2/best", "again=r3/best", "third=full")[0] == 0
    code, _, err = call(*options, "--selectors", "a=svd-prune:rank=2", "b=r2/best")
    assert code == 2
    assert "'a' and 'b' are one selector" in err


def test_a_list_skips_what_is_no_checkpoint(call):
    for name, content in (("a", "{"), ("b", "[]"), ("c", '{"class_path": "x.Y"}'), ("d", '{"class_path": 5}')):
        Path(f"checkpoints/{name}").mkdir(parents=True)
        Path(f"checkpoints/{name}/config.json").write_text(content)
    code, out, _ = call("list")
    assert code == 0
    assert re.findall(r"^checkpoint (.*)$", out, re.MULTILINE) == ["checkpoints/c: x.Y"]


def test_bench(call, model):
    code, out, _ = call("bench", "--model", model, "--selectors", "random", "--keep", "9", "--repeats", "2")
    assert code == 0
    for word in ("full SVD", "prefill", "random", "of the full prefill"):
        assert word in out


def test_bench_at_the_sizes_of_a_model(call, make_image):
    make_image(70, 50).save("a.png")
    options = [
        "--geometry",
        "llava-next-tiny",
        "--keep",
        "16",
        "9",
        "--tiles",
        "2",
        "--repeats",
        "1",
        "--image",
        "a.png",
    ]
    selectors = ["--selectors", "two=svd-prune:rank=2", "hiprune", "image-transformer"]
    code, out, err = call("bench", *options, *selectors, "--prefill-layers", "1", "--out", "deep/er")
    assert code == 0
    for word in ("two", "image-transformer*", "tower and projector", "growth with tiles, K = 9", "ms at 2 and 5 tiles"):
        assert word in out
    assert "hiprune:layer=1" in out, "the tower has no layer 9"
    assert "selector bench: llava-next-tiny: two" in err

    # The command in the result measures the same again.
    data = json.loads(Path("deep/er/llava-next-tiny.json").read_text())
    assert data["picture"] == "a.png"
    assert data["command"] == " ".join(["selector", "bench", "--geometry", "llava-next-tiny", "--image", "a.png"]) + (
        " --keep 16 9 --prefill-layers 1 --repeats 1 --selectors two=svd-prune:rank=2 hiprune image-transformer"
        " --tiles 2"
    )
    assert (Path("deep/er/llava-next-tiny.md").read_text()).startswith("# llava-next-tiny: what selection costs")
    assert Path("deep/er/llava-next-tiny.svg").is_file()


@pytest.mark.slow
def test_calibrate_then_compare(call, model):
    """A method's name gives a new checkpoint, a checkpoint is calibrated in place; both keep what they say."""
    from selector import TokenSelector

    common = ["--model", model, "--tasks", "documents", "scenes", "--samples", "8"]
    options = [*common, "--shares", "0.5", "0.25", "--tolerance", "0.05"]
    code, out, _ = call("calibrate", "lofi:rank=2", *options, "--out", "runs/lofi")
    assert code == 0
    assert "auto:0.25" in out
    assert "Selector: runs/lofi" in out
    about = TokenSelector.from_pretrained("runs/lofi").calibration.about
    assert (about["tasks"], about["images"], about["seed"]) == ({"documents": 8, "scenes": 8}, 16, 1)

    own = ["--selectors", "runs/lofi", "--seed", "1", "--no-answers"]
    code, out, _ = call("compare", *common, *own, "--keep", "0.25", "0.5", "auto:0.25")
    assert code == 0
    assert "all tasks · " in out
    results = json.loads(Path("runs/compare/results.json").read_text())
    assert [row["keep"] for row in results["pooled"]] == [None, "0.25", "auto:0.25", "0.5"]
    fixed, average = results["pooled"][1:3]
    (point,) = [p for p in TokenSelector.from_pretrained("runs/lofi").calibration.points if p.share == 0.25]
    assert average["tokens"] / average["full_tokens"] == pytest.approx(point.measured)
    assert average["tokens"] == pytest.approx(fixed["tokens"], rel=0.06)
    by_task = {row["task"]: row["tokens"] for row in results["rows"] if row["keep"] == "auto:0.25"}
    assert len(set(by_task.values())) == 2  # task by task it is not a quarter

    weights, card = Path("runs/lofi/model.safetensors"), Path("runs/lofi/README.md")
    card.write_text("# mine\n")
    before = weights.read_bytes()
    code, out, _ = call("calibrate", "runs/lofi", *options, "--shares", "0.3", "--newlines", "none", "all")
    assert code == 0
    again = TokenSelector.from_pretrained("runs/lofi").calibration
    assert [(p.share, p.newlines) for p in again.points] == [(0.3, "none"), (0.3, "all")]
    assert (weights.read_bytes(), card.read_text()) == (before, "# mine\n")


def test_compare_names_the_command_that_calibrates(call, model):
    code, _, err = call("compare", "--model", model, "--selectors", "random", "--keep", "auto:0.25", "--samples", "1")
    assert code == 2
    assert "random: keep='auto:0.25' needs a calibrated selector" in err
    assert "run `selector calibrate SELECTOR --shares 0.25 --out FOLDER`" in err
    assert not list(Path().rglob("predictions.jsonl"))


def test_list(call):
    code, out, _ = call("list")
    assert code == 0
    for word in ("gumbel", "svd-prune", "lofi", "random", "arXiv 2604.11530", "projected"):
        assert word in out


def test_list_as_the_table_of_the_page(call):
    code, out, _ = call("list", "--markdown")
    assert code == 0
    assert out.startswith("| name |")
    assert out.strip() in (ROOT / "selector" / "methods" / "README.md").read_text()
