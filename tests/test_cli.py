"""The command line: help, every command on a tiny random model, settings, and every mistake as one line."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from PIL import Image

from selector import cli
from selector.cli import MODEL, SELECTORS
from selector.tasks import GENERATED

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--selectors", "svd-prune:rank=2", "random", "--keep", "0.5", "9", "--samples", "2", "--max-new-tokens", "2"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def model(tiny_model, saved):
    """Folder of a tiny random LLaVA-NeXT."""
    folder = saved / "tiny"
    if not folder.is_dir():
        built, processor = tiny_model()
        built.save_pretrained(folder)
        processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """``call("compare", ...)`` in an empty folder -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()  # saving the model leaves a progress bar behind
        code = cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


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
    if command in ("calibrate", "stability"):
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

    settings = cli._settings("compare", {"config": str(path)})
    loading.parse_budgets(settings["keep"], settings["scope"], settings["newlines"])
    assert find_tasks("compare", settings["tasks"], False)  # a task whose data is not here is left out
    names = [s for s in settings["selectors"] if "/" not in s]
    assert len(loading.load_selectors(names, loading.find_device("cpu"))) == len(names)


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("samples: 7\nkeep: [3]\n")
    parsed = vars(cli._parser().parse_args(["compare", "--config", str(tmp_path / "c.yaml"), "--keep", "0.5"]))
    parsed.pop("command")
    settings = cli._settings("compare", parsed)
    assert (settings["samples"], settings["keep"], settings["seed"]) == (7, ["0.5"], 0)
    assert settings["given"] == ["keep", "samples"]


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
    assert (again[0], again[1]) == (0, out)
    assert "| 9 | " in Path("runs/a/report.md").read_text().replace("**", "")
    assert "Report: runs/a/report.html" in out
    assert Path("runs/a/report.html").read_text().startswith("<!doctype html>")
    shutil.copytree("runs/a", "runs/b")
    code, beside, _ = call("report", "runs/a", "runs/b", "--out", "both.html")
    assert code == 0
    assert beside.count("documents ·") == 2
    assert "What differs between the runs" in Path("both.html").read_text()
    repeated = call("compare", "--model", model, *SMALL, "--out", "runs/a", "--tasks", "documents", "scenes")
    assert repeated[1] == out  # nothing was measured anew: even the times are the same


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


def folder(path, names, broken=()):
    path.mkdir()
    rows = []
    for i, name in enumerate(names):
        Image.new("RGB", (60 + i, 50), (i, 200, 90)).save(path / name)
        if name in broken:
            (path / name).write_bytes(b"not an image")
        rows.append({"image": name, "qa": [{"q": "what?", "a": "red", "boxes": [[5, 5, 20, 20]]}]})
    (path / "annotations.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def test_unreadable_images(call, model, tmp_path):
    folder(tmp_path / "data", ["a.png", "b.png", "c.png"], broken=["b.png"])
    arguments = ["compare", "--model", model, *SMALL, "--tasks", "folder:data", "--no-answers", "--samples", "all"]
    code, _, err = call(*arguments)
    assert code == 2
    assert "b.png cannot be read" in err
    code, out, err = call(*arguments, "--skip-unreadable")
    assert code == 0
    assert "1 images cannot be read and are left out" in err
    assert "b.png" in out


@pytest.mark.slow
def test_interrupted_prints_what_is_done(call, model, monkeypatch):
    from selector.measure import harness as measure

    kept, calls = measure.answer, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 10:  # within the second sample; the first call warms up
            raise KeyboardInterrupt
        return kept(*args)

    with monkeypatch.context() as patch:
        patch.setattr(measure, "answer", interrupt)
        code, out, err = call("compare", "--model", model, *SMALL, "--tasks", "scenes")
    assert code == 130
    assert "the same command goes on from here" in err
    assert "svd-prune:rank=2" in out
    counts = [row["samples"] for row in json.loads(Path("runs/compare/results.json").read_text())["rows"]]
    assert counts == [2, 2, 1, 1, 1, 1]
    assert call("compare", "--model", model, *SMALL, "--tasks", "scenes")[0] == 0


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


def test_a_stray_rank_is_said_aloud(call, model, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ["compare", "--model", model, "--selectors", "random", "--keep", "9", "--samples", "4", "--no-answers"]
    code, out, err = call(*options, "--tasks", "scenes")
    assert code == 0
    assert "RANK=0 and WORLD_SIZE=2 in the environment: this process takes shard 0/2" in err
    assert "scenes · " in out
    assert "shard 0/2: 2 of 4 samples" in out
    code, out, err = call(*options, "--tasks", "scenes", "--shard", "0/1")
    assert "of 4 samples" not in out
    assert "RANK" not in err


def test_no_image_that_can_be_read_is_an_error(call, model, tmp_path):
    folder(tmp_path / "data", ["a.png", "b.png"], broken=["a.png", "b.png"])
    options = ["compare", "--model", model, *SMALL, "--tasks", "folder:data", "--no-answers", "--samples", "all"]
    code, _, err = call(*options, "--skip-unreadable")
    assert code == 2
    assert "task 'folder:data': none of its 2 images can be read" in err


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lofi", "--out", "x", "--shares", "1.5"], r"shares must lie between 0 and 1, got '1\.5'"),
        (["lofi", "--out", "x", "--shares", "half"], "shares must lie between 0 and 1, got 'half'"),
        (["lofi", "--out", "x", "--shares", "0.5", "0.50"], r"shares must be different, 0\.50 is there twice"),
        (["lofi", "--out", "x", "--newlines", "some"], "newlines must be of kept_rows, all, none, .* got 'some'"),
        (["lofi", "--out", "x", "--tolerance", "2"], r"tolerance must be in \[0, 1\), got 2"),
        (["lofi", "--out", "x", "--samples", "all"], "samples must be a number for the task 'scenes'"),
        (["lofi"], "out must name the folder to write: 'lofi' is no folder"),
        (["svd-prone", "--out", "x"], "unknown selector 'svd-prone'"),
        (["divprune", "--out", "x"], r"divprune: keep='auto:0\.5' is adaptive and needs scores"),
        (["norm:merge=nearest", "--out", "x"], "a Merge has no scores; calibrate what it is made of"),
        (["lofi:rank=2", "--out", "x", "--shares", "0.0001"], r"share 0\.0001 .* cannot be met within 1%"),
    ],
)
def test_mistakes_of_calibrate(call, model, arguments, message):
    common = ["--model", model, "--tasks", "scenes", "--samples", "2"]
    code, out, err = call("calibrate", *common, *arguments)
    assert code == 2
    assert out == ""
    assert err.splitlines()[-1].startswith("selector calibrate: error: ")
    assert re.search(message, err), err
    assert not Path("x").exists()


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--selectors", "svd-prone"], "unknown selector 'svd-prone'.*did you mean.*svd-prune"),
        (["--selectors", "checkpoints/none"], "no selector checkpoint at 'checkpoints/none'"),
        (["--selectors", "gumbel"], "'gumbel' is learned: name a checkpoint folder"),
        (["--selectors", "random:sede=3"], "sede"),
        (["--selectors", "random", "random"], "must be different, 'random' is there twice"),
        (["--keep", "0"], "keep must be .* got 0"),
        (["--keep", "-3"], "keep must be .* got -3"),
        (["--keep", "nan"], "keep must be .* got nan"),
        (["--keep", "1.5"], "keep must be .* got 1.5"),
        (["--keep", "many"], "keep must be .* got 'many'"),
        (["--keep", "energy:2"], "keep must be .* got 'energy:2'"),
        (["--keep", "0.5", "0.50"], "0.5 is there twice"),
        (["--scope", "page"], "scope must be one of .*got 'page'"),
        (["--newlines", "some"], "newlines must be one of .*got 'some'"),
        (["--positions", "all"], "positions must be one of contiguous, original, got 'all'"),
        (["--samples", "0"], "samples must be an int >= 1 or all, got '0'"),
        (["--samples", "few"], "samples must be an int >= 1 or all, got 'few'"),
        (["--samples", "all"], "samples must be a number for the task 'documents'"),
        (["--tasks", "paintings"], "unknown task 'paintings'"),
        (["--tasks", "scenes", "scenes"], "tasks must name at least one, each once"),
        (["--tasks", "folder:nowhere"], "PATH must be a folder .* got 'nowhere'"),
        (["--tasks", "folder:."], r"annotations\.jsonl is missing"),
        (["--model", "checkpoints/nothing"], "model must be a folder .* there is no 'checkpoints/nothing'"),
        (["--device", "abacus"], "device must be auto or one that torch has"),
        (["--dtype", "float7"], "dtype must be one of .* got 'float7'"),
        (["--layer", "9"], "layer must be in 0..3 for this model, got 9"),
        (["--repeats", "0"], "repeats must be an int >= 1, got 0"),
        (["--shard", "2/2"], "shard must be i/n with 0 <= i < n.* got '2/2'"),
        (["--shard", "1"], "shard must be i/n .* got '1'"),
        (["--shard", "0/2", "--fresh"], "fresh must not go with a shard"),
        (["--max-new-tokens", "0"], "max_new_tokens must be an int >= 1, got 0"),
        (["--threads", "0"], "threads must be an int >= 1, got 0"),
        (["--baseline", "nobody"], "baseline must be one of the selectors .*got 'nobody'"),
        (["--config", "none.yaml"], "config must be a YAML file, there is no 'none.yaml'"),
    ],
)
def test_mistakes_are_one_line(call, model, arguments, message):
    code, out, err = call("compare", "--model", model, *SMALL, *arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("selector compare: error: ")
    assert re.search(message, err), err
    assert not list(Path().rglob("predictions.jsonl"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kepe: [1]", "unknown setting 'kepe'; did you mean keep"),
        ("keep: 1", "keep must be a list, got 1"),
        ("samples: [1]", "samples must be one value"),
        ("- 1", "must hold names and values, got list"),
        ("a: [", "is not YAML"),
        ("samples: true", "samples must be an int >= 1 or all, got True"),
        ("seed: x", "seed must be an int, got 'x'"),
        ("keep: [true]", "keep must be .* got True"),
        ("selectors: []", "selectors must name at least one"),
    ],
)
def test_mistakes_in_a_config(call, model, content, message):
    Path("c.yaml").write_text(content)
    code, _, err = call("compare", "--config", "c.yaml", "--model", model, "--tasks", "scenes")
    assert code == 2
    assert re.search(message, err), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "run must be a folder that `selector compare` wrote"),
        (["report", "nowhere", "--out", "page.pdf"], "out must be the name of an HTML file, got 'page.pdf'"),
        (["show", "gone.png"], r"image gone\.png cannot be read"),
        (["show", "--out", "picture.jpg"], "out must be the name of a PNG file"),
        (["bench", "--image", "gone.png"], r"gone\.png cannot be read"),
        (["bench", "--repeats", "0"], "repeats must be an int >= 1, got 0"),
    ],
)
def test_mistakes_of_the_other_commands(call, arguments, message):
    code, _, err = call(*arguments)
    assert code == 2
    assert re.search(message, err), err


def test_the_shipped_names_are_found_from_anywhere(call, monkeypatch):
    """Defaults are looked for in the current folder, then at the root of the clone (below: of the wheel)."""
    from selector.commands.loading import find_folder

    assert find_folder("configs/compare") == ROOT / "configs/compare"
    Path("configs/compare").mkdir(parents=True)
    assert find_folder("configs/compare") == Path("configs/compare")
    assert find_folder("checkpoints/none") is None


def test_a_wheel_finds_what_ships_inside_its_package(tmp_path):
    """The same module where an installer puts it: with a folder `shipped` beside it, that is the place."""
    (tmp_path / "site-packages" / "selector").mkdir(parents=True)
    path = tmp_path / "site-packages" / "selector" / "shipped.py"
    shutil.copy(ROOT / "selector" / "shipped.py", path)
    assert runpy.run_path(str(path))["places"]("configs") == (Path("configs"), tmp_path / "site-packages" / "configs")
    (path.parent / "shipped").mkdir()
    assert runpy.run_path(str(path))["places"]("configs") == (Path("configs"), path.parent / "shipped" / "configs")


def test_the_wheel_has_every_default():
    """What the commands name without being asked is among what the wheel takes, and comes where `shipped` looks."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    named = {value for value in (MODEL, *SELECTORS) if "/" in value}
    assert len(named) > 1
    assert named <= {*wheel["only-include"]}
    assert {*wheel["sources"].values()} == {"selector/shipped/checkpoints", "selector/shipped/configs"}


def test_an_installed_checkpoint_is_not_calibrated_in_place(call, monkeypatch, tmp_path):
    from selector.commands import calibrate

    shutil.copytree(ROOT / "checkpoints" / "selector-llava-next-tiny", tmp_path / "one")
    monkeypatch.setattr(calibrate, "INSTALLED", tmp_path)
    code, _, err = call("calibrate", "./one", "--tasks", "documents", "--samples", "1")
    assert code == 2
    assert "out must name the folder to write" in err
    assert "part of the installed package" in err


def test_debug_shows_the_traceback(call):
    from selector.errors import UsageError

    with pytest.raises(UsageError):
        call("compare", "--keep", "0", "--debug")
