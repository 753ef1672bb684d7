"""Bad input of every kind, through both command lines: one line that says what is wrong, an exit status, no traceback.

No model is loaded: where a case needs one to be named, loading it is an error of the test.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from selector import cli
from selector.commands import loading
from training import cli as training

ROOT = Path(__file__).resolve().parent.parent
ROW = {"image": "a.png", "qa": [{"q": "what?", "a": "red", "boxes": [[1, 1, 9, 9]]}]}
BOX = {"image": "a.png", "objects": [{"c": "cat", "box": [1, 1, 9, 9]}]}
GUMBEL = {"class_path": "selector.methods.gumbel.GumbelSelector", "init_args": {"dim": 8, "num_patches": 16}}
PLAN = {
    **{"model": "m", "seed": 0, "samples": 1, "layer": 0, "positions": "original", "baseline": None, "unreadable": {}},
    "environment": {"torch": "2", "transformers": "5", "device": "cpu", "threads": 1, "dtype": "float32"},
    "tasks": {"toy": {"fingerprint": "x", "anls": False}},
    "rows": [{"task": "toy", "label": "full", "keep": None, "key": "ab"}],
}
RECORD = {"id": "a", "index": 0, "tokens": 9, "full_tokens": 9}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder with a model that must not be loaded, a picture, and a folder of pictures."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SELECTOR_DATA", "SELECTOR_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    Path("empty").mkdir()
    Path("data").mkdir()
    Image.new("RGB", (40, 30)).save("data/a.png")
    Image.new("RGB", (40, 30)).save("good.png")
    Path("file").write_text("")
    os.mkfifo("pipe.png")

    def never(*args):
        raise AssertionError("the model is loaded before the mistake is found")

    monkeypatch.setattr(loading, "load_model", never)


def refused(capsys, main, arguments):
    """The one line on stderr of a command that the user has to put right."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2, (code, out, err)
    assert "Traceback" not in err + out
    assert err.count("\n") == 1, err
    assert len(err) < 2000
    return err


def compare(*arguments):
    return ["compare", "--model", "model", "--selectors", "random", "--tasks", "scenes", "--samples", "1", *arguments]


FLAGS = [
    *((("--keep", value), "keep") for value in ("0", "-3", "nan", "inf", "1.5", "many", "", "0.0", "-0.5", "energy:2")),
    *(
        (("--keep", value), "keep")
        for value in ("energy:", "energy:x", "threshold:", "threshold:nan", "1e400", ":", "1:2")
    ),
    *((("--samples", value), "samples") for value in ("0", "-1", "few", "1.5", "all", "", "²")),
    *(
        (("--tasks", value), "task")
        for value in ("paintings", "", "folder:", "folder:none", "folder:empty", "folder:file")
    ),
    *(
        (("--tasks", f"folder:data?{value}"), "behind")
        for value in ("held_out=2", "held_out=nan", "boxes=no", "x=1", "")
    ),
    (("--tasks", "scenes", "scenes"), "tasks"),
    *(
        (("--selectors", value), "selector")
        for value in ("", " ", "svd-prone", "checkpoints/none", "gumbel", ":", "hf:")
    ),
    *((("--selectors", value), "selectors: ") for value in ("random:sede=3", "random:seed", "random:seed=1,seed=2")),
    *(
        (("--selectors", f"random:seed={value}"), "seed")
        for value in ("1.5", "x", "true", "[", "1" * 40, "!!python/x 1")
    ),
    *(
        (("--selectors", f"svd-prune:{value}"), "must")
        for value in ("energy=2.0", "energy=0.0", "rank=0", "rank=-1", "rank=x")
    ),
    *(
        (("--selectors", f"svd-prune:{value}"), "")
        for value in ("method=quick", "method=x", "matrix=page", "merge=far")
    ),
    *((("--selectors", f"lofi:{value}"), "must") for value in ("energy=-1.0", "rank=0", "center=maybe", "rank=x")),
    *(
        (("--selectors", f"{value}"), "must")
        for value in ("dart:pivots=0", "lrcp:rank=0", "tome:drop=0.0", "scope:alpha=-1.0")
    ),
    *(
        (("--selectors", f"mix:{value}"), "")
        for value in ("a=random", "a=random,b=none", "a=(random,b=norm", "a=5,b=6")
    ),
    (("--selectors", "random", "random"), "twice"),
    (("--selectors", "a=random", "b=random:seed=0"), "one selector"),
    (("--selectors", "full=random"), "must not be called full"),
    (("--selectors", "blind=random"), "must not be called full or blind"),
    (("--selectors", "a=random", "a=norm"), "twice"),
    (("--selectors", "empty"), "config.json is missing"),
    (("--selectors", "x" * 5000), "File name too long"),
    (("--scope", "page"), "scope"),
    (("--newlines", "some"), "newlines"),
    (("--positions", "all"), "positions"),
    *((("--device", value), "device") for value in ("abacus", "meta", "cuda:99", "cpu:x", "")),
    *((("--dtype", value), "dtype") for value in ("float7", "int8", "")),
    *((("--device-map", value), "device_map must") for value in ("nowhere", "disk", "", "{", '{"": "x"}', "[]")),
    *((("--quantization", value), "quantization must") for value in ("int3", "8", "")),
    *(
        (("--model", value), "model")
        for value in ("none", "", "./none", "checkpoints/none", "empty", "file", "a/b/c", "a/b")
    ),
    *((("--threads", value), "threads") for value in ("0", "-1", "x", "100000", "1.5")),
    *((("--max-new-tokens", value), "max") for value in ("0", "-1", "x", "1e3")),
    *((("--repeats", value), "repeats") for value in ("0", "-1", "x")),
    *((("--layer", value), "layer") for value in ("-1", "x")),
    *((("--seed", value), "seed") for value in ("x", "1.5", "")),
    *((("--shard", value), "shard") for value in ("2/2", "1", "0/0", "-1/2", "a/b", "", "0/2/3")),
    (("--shard", "0/2", "--fresh"), "fresh"),
    *((("--rank-timeout", value), "timeout") for value in ("0", "-1", "x", "nan", "inf", "")),
    (("--baseline", "nobody"), "baseline"),
    *((("--out", value), "out") for value in ("", "file", "file/deep")),
    *((("--config", value), "config") for value in ("none.yaml", "empty", "")),
    (("--unknown",), "--unknown"),
    (("--keep",), "--keep"),
]


@pytest.mark.parametrize(
    ("arguments", "word"), FLAGS, ids=lambda value: " ".join(value)[:60] if type(value) is tuple else ""
)
def test_flags_of_compare(capsys, arguments, word):
    error = refused(capsys, cli.main, compare(*arguments))
    assert error.startswith(("selector compare: error: ", "selector: error: "))
    assert word in error


OTHERS = [
    ([], "COMMAND"),
    (["compere"], "compere"),
    (["show", "gone.png"], "gone.png"),
    (["show", "file"], "file"),
    (["show", "empty"], "empty"),
    (["show", "pipe.png"], "pipe.png"),
    (["show", "good.png", "--out", "p.jpg"], "out"),
    (["show", "good.png", "--out", ""], "out"),
    (["show", "good.png", "--out", "file/p.png"], "out"),
    (["show", "good.png", "--question", "<image>?"], "question"),
    (["show", "good.png", "--question", " "], "question"),
    (["show", "good.png", "--keep", "0"], "keep"),
    (["show", "good.png", "--max-new-tokens", "0"], "max_new_tokens"),
    (["show", "good.png", "--positions", "odd"], "positions"),
    (["show", "good.png", "--selectors", "nobody"], "nobody"),
    (["show", "good.png", "--model", "none"], "none"),
    (["show", "--seed", "x"], "seed"),
    (["bench", "--image", "gone.png"], "gone.png"),
    (["bench", "--image", "pipe.png"], "pipe.png"),
    (["bench", "--repeats", "0"], "repeats"),
    (["bench", "--keep", "0"], "keep"),
    (["bench", "--selectors", "nobody"], "nobody"),
    (["bench", "--model", "none"], "none"),
    (["report"], "RUN"),
    (["report", "none"], "run must be"),
    (["report", "file"], "run must be"),
    (["report", "empty"], "run must be"),
    (["report", "empty", "empty"], "each folder once"),
    (["report", "empty", "--out", "page.pdf"], "out"),
    (["list", "--all"], "--all"),
]


@pytest.mark.parametrize(
    ("arguments", "word"), OTHERS, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_the_other_commands(capsys, arguments, word):
    assert word in refused(capsys, cli.main, arguments)


CONFIGS = [
    *("", "5", "- 1", "a: [", "\t", "null", "[" * 5000, "kepe: [1]", "5: 5", "null: 1"),
    *("tasks: [5]", "tasks: 5", "tasks: []", "tasks: [[a]]", "tasks: [null]", "tasks: {a: b}"),
    *(
        "out: 5",
        "out: [a]",
        "out: null",
        "model: 5",
        "model: null",
        "model: true",
        "device: 5",
        "dtype: 5",
        "dtype: null",
    ),
    *("answers: maybe", "answers: 5", "answers: null", "skip_unreadable: maybe", "skip_unreadable: 1"),
    *("attention: 5", "attention: [a]", "device_map: 5", "scope: 5", "newlines: [all]", "positions: true"),
    *("allow: [5]", "allow: selector", "allow: [null]", "baseline: 5", "baseline: [random]"),
    *("samples: true", "samples: 1.5", "samples: [1]", "samples: 0", "samples: null", "samples: {}"),
    *("seed: x", "seed: 1.5", "seed: true", "seed: null", "layer: x", "layer: -1", "repeats: 0", "repeats: 1.5"),
    *("threads: 0", "threads: x", "threads: true", "max_new_tokens: x", "max_new_tokens: 0"),
    *("keep: 1", "keep: []", "keep: [true]", "keep: [null]", "keep: [[1]]", "keep: [0]", "keep: [{}]", "keep: [.nan]"),
    *(
        "selectors: random",
        "selectors: []",
        "selectors: [5]",
        "selectors: [null]",
        "selectors: [{}]",
        "selectors: [[a]]",
    ),
    "selectors: [{class_path: 5}]",
    "selectors: [{class_path: os.path.join}]",
    "selectors: [{class_path: selector.methods.norm.Norm, init_args: [1]}]",
    "selectors: [{class_path: selector.methods.norm.Norm, init_args: 5}]",
    "selectors: [{class_path: selector.methods.norm.Norm, init_args: {large: true}}]",
    "selectors: [{class_path: selector.methods.norm.Norm, init_args: {largest: maybe}}]",
    "out: !!python/object/apply:os.system ['true']",
    "out: 2024-13-45",
]


@pytest.mark.parametrize("content", CONFIGS, ids=lambda text: text[:50])
def test_yaml(capsys, content):
    base = {"model": "model", "selectors": ["random"], "samples": 1, "tasks": ["scenes"]}
    given = content.partition(":")[0]
    flags = []
    for name, value in base.items():
        if name != given:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    Path("c.yaml").write_text(content)
    assert refused(capsys, cli.main, ["compare", "--config", "c.yaml", *flags]).startswith("selector compare: error: ")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", "seed: é".encode("latin-1"), b"\x00", b"\x89PNG\r\n\x1a\n"])
def test_yaml_that_is_no_text(capsys, content):
    Path("c.yaml").write_bytes(content)
    assert "c.yaml" in refused(capsys, cli.main, ["compare", "--config", "c.yaml"])


def changed(row, **fields):
    return json.dumps(row | fields)


def asked(**fields):
    return json.dumps(ROW | {"qa": [ROW["qa"][0] | fields]})


def boxed(*box):
    return json.dumps(BOX | {"objects": [{"box": list(box)}]})


ANNOTATIONS = [
    *("not json", "[]", "{}", "5", "null", '"a"', "{", '{"image": ', "[" * 5000, '{"image": NaN}', ""),
    *(
        changed(ROW, image=value)
        for value in (7, None, [], "gone.png", "../good.png", "/etc/passwd", "a/../../good.png")
    ),
    *(changed(ROW, image=value) for value in ("", ".", "x" * 5000, "a\0b", "\ud800")),
    *(changed(ROW, qa=value) for value in (5, "what?", {"q": "what?"}, [5], [None], [[]], ["what?"])),
    *(asked(q=value) for value in (5, None, [], "", " ", "<image>", "a <image> b", "\ud800")),
    *(asked(a=value) for value in ([], ["red"], {}, {"a": 1}, True, False, float("nan"), float("inf"), "\udfff")),
    *(
        asked(boxes=value)
        for value in (5, "x", {}, [5], [None], [[]], [[1, 2, 3]], [[1, 2, 3, 4, 5]], [["1", 1, 9, 9]])
    ),
    *(changed(BOX, objects=value) for value in (5, "x", {}, [5], [{}], [{"box": 5}], [{"box": None}])),
    *(boxed(*box) for box in ((9, 1, 1, 9), (1, 9, 9, 1), (5, 5, 5, 9), (5, 5, 9, 5), (-1, 1, 9, 9), (1, -1, 9, 9))),
    *(boxed(*box) for box in ((1, 1, 41, 9), (1, 1, 9, 31), (1000, 1000, 1100, 1100), (1, 1, 1e308, 9))),
    *(boxed(*box) for box in ((1, 1, float("inf"), 9), (1, 1, float("nan"), 9), (True, 1, 9, 9), (1, 1, None, 9))),
    json.dumps(ROW) + "\n" + json.dumps(ROW),
    json.dumps(ROW) + "\n" + changed(ROW, image="./a.png"),
    json.dumps(ROW) + "\n" + changed(ROW, image="images/../a.png"),
]


@pytest.mark.parametrize("content", ANNOTATIONS, ids=lambda text: text[:70])
def test_annotations(capsys, content):
    Path("data/annotations.jsonl").write_text(content)
    error = refused(capsys, cli.main, compare("--tasks", "folder:data"))
    assert "annotations.jsonl" in error


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_annotations_of_another_encoding(capsys, encoding):
    Path("data/annotations.jsonl").write_bytes(json.dumps(ROW | {"x": "é"}, ensure_ascii=False).encode(encoding))
    assert "must be UTF-8" in refused(capsys, cli.main, compare("--tasks", "folder:data"))


DEEP = Image.new("I", (4, 4), 70_000)
IMAGES = [
    *(
        b"",
        b"no image",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"GIF89a",
        b"BM",
        b"RIFF....WEBP",
        b"II*\x00",
        b"%PDF-1.4",
    ),
    *(b"<svg></svg>", b"P6 99999 99999 255\n", b"P5 20000 20000 255\n"),
]


@pytest.mark.parametrize("command", ["show", "bench"])
@pytest.mark.parametrize("content", IMAGES, ids=lambda data: repr(data[:20]))
def test_images(capsys, command, content):
    Path("bad.png").write_bytes(content)
    arguments = ["show", "bad.png"] if command == "show" else ["bench", "--image", "bad.png"]
    assert "image bad.png cannot be read" in refused(capsys, cli.main, [*arguments, "--model", "model"])


def test_an_image_whose_white_is_not_known(capsys):
    Image.new("I", (4, 4), 70_000).save("deep.tif")
    assert "integer pixels must be within" in refused(capsys, cli.main, ["show", "deep.tif"])


CHECKPOINTS = [
    *(b"{", b"", b"[]", b"null", b"5", b"[" * 5000, b"\xff\xfe"),
    *(
        json.dumps(GUMBEL | {"class_path": value}).encode()
        for value in (5, None, [], "", "x", "os.system", "selector.none.X")
    ),
    *(json.dumps(GUMBEL | {"init_args": value}).encode() for value in (None, 5, [], "x", {}, {"dim": 8}, {"dim": "8"})),
    *(
        json.dumps(GUMBEL | {"init_args": GUMBEL["init_args"] | {name: value}}).encode()
        for name, value in (
            *(("heads", 0), ("heads", -1), ("heads", 3), ("heads", "4"), ("heads", 2.5), ("num_patches", -1)),
            *(
                ("num_patches", 0),
                ("dim", 0),
                ("dim", -8),
                ("dim", 2**40),
                ("width", 0),
                ("layers", 0),
                ("layers", None),
            ),
            *(("mlp_ratio", -1.0), ("mlp_ratio", 1e9), ("mlp_ratio", 1e300), ("mlp_ratio", "2"), ("more", 1)),
        )
    ),
    json.dumps(GUMBEL).encode(),  # without its weights
]


@pytest.mark.parametrize("content", CHECKPOINTS, ids=lambda data: repr(data[-60:]))
def test_checkpoints(capsys, content):
    Path("mine").mkdir()
    Path("mine/config.json").write_bytes(content)
    save_file({"x": torch.zeros(3)}, "mine/model.safetensors")
    assert "selectors: " in refused(capsys, cli.main, compare("--selectors", "./mine"))


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\xff" * 100, b"PK\x03\x04"])
def test_weights(capsys, content):
    Path("mine").mkdir()
    Path("mine/config.json").write_text(json.dumps(GUMBEL))
    Path("mine/model.safetensors").write_bytes(content)
    assert "is not a safetensors file" in refused(capsys, cli.main, compare("--selectors", "./mine"))


PLANS = [
    *("", "{", "[]", "null", "5", "{}", '"x"', "[" * 5000),
    *(json.dumps({name: value for name, value in PLAN.items() if name != missing}) for missing in PLAN),
    *(json.dumps(PLAN | {"rows": value}) for value in ([5], [{}], {}, "x", [PLAN["rows"][0] | {"key": "../x"}])),
    *(json.dumps(PLAN | {"tasks": value}) for value in ([], {"toy": 5}, {"toy": {}}, {})),
]


@pytest.mark.parametrize("content", PLANS, ids=lambda text: text[:60])
def test_run_folders(capsys, content):
    Path("run").mkdir()
    Path("run/run.json").write_text(content)
    assert "run.json" in refused(capsys, cli.main, ["report", "run"])


LINES = [
    *("{}", "[1]", "5", "null", "{", '{"id": 5}', "[" * 5000),
    *(json.dumps(RECORD | {name: value}) for name, value in (("index", "0"), ("index", None), ("tokens", "9"))),
    *(json.dumps(RECORD | {name: value}) for name, value in (("full_tokens", None), ("tokens", -1), ("evidence", "x"))),
    *(json.dumps(RECORD | {name: value}) for name, value in (("answer", 5), ("correct", True), ("correct", "yes"))),
    json.dumps({"id": "a", "index": 0}),
]


@pytest.mark.parametrize("content", LINES, ids=lambda text: text[:60])
def test_records(capsys, content):
    Path("run/ab").mkdir(parents=True)
    Path("run/run.json").write_text(json.dumps(PLAN))
    Path("run/ab/predictions.jsonl").write_text(content + "\n")
    assert "run/ab" in refused(capsys, cli.main, ["report", "run"])


ENVIRONMENT = [
    *({"RANK": value} for value in ("abc", "", "-1", "1.5", "1")),
    *({"WORLD_SIZE": value} for value in ("abc", "", "0", "-2")),
    {"RANK": "4", "WORLD_SIZE": "4"},
]


@pytest.mark.parametrize("variables", ENVIRONMENT, ids=str)
def test_environment(capsys, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "environment variable" in refused(capsys, cli.main, compare())


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"image": "a.png", "source": "other"}'])
def test_scans(capsys, monkeypatch, content):
    monkeypatch.setenv("SELECTOR_DATA", str(Path("scans").resolve()))
    if content is not None:
        Path("scans/documents").mkdir(parents=True)
        Path("scans/documents/annotations.jsonl").write_text(content)
    assert "annotations.jsonl" in refused(capsys, cli.main, compare("--tasks", "receipts"))


TRAINING = [
    (["train"], "command must be one of"),
    (["export", "none.ckpt", "out"], "checkpoint must be a .ckpt file"),
    (["export", "empty", "out"], "checkpoint must be a .ckpt file"),
    (["export", "file", "out"], "file"),
    (["export", "foreign.ckpt", "out"], "was not written by selector-train"),
    (["export", "list.ckpt", "out"], "was not written by selector-train"),
    (["export", "flat.ckpt", "out"], "was not written by selector-train"),
    (["export", "older.ckpt", "out"], "was written by another version"),
    (["export", "bare.ckpt", "out"], "holds no arguments"),
    (["export", "sizes.ckpt", "out"], "heads must be >= 1"),
    (["export", "elsewhere.ckpt", "out"], "holds a Elsewhere, which is none of GumbelSelector, ImageTransformer"),
    (["export", "unnamed.ckpt", "out"], "holds a [{}], which is none of"),
    (["export", "pickled.ckpt", "out"], "cannot be read safely"),
]


@pytest.mark.parametrize(
    ("arguments", "word"), TRAINING, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_training(capsys, arguments, word):
    told = dict.fromkeys(("encoder", "data", "objective", "steps", "tokens_per_s", "validation"), "")
    told["class"] = "GumbelSelector"
    sizes = {"init_args": GUMBEL["init_args"] | {"heads": 0}}
    for name, content in {
        "foreign": {"model": 1},
        "list": [1],
        "flat": {"selector": 5, "state_dict": {}},
        "older": {"selector": {}, "state_dict": {}},
        "bare": {"selector": told, "state_dict": {}},
        "sizes": {"selector": told | sizes, "state_dict": {}},
        "elsewhere": {"selector": told | {"class": "Elsewhere"}, "state_dict": {}},
        "unnamed": {"selector": told | {"class": [{}]}, "state_dict": {}},
        "pickled": {"selector": Path("a")},
    }.items():
        torch.save(content, f"{name}.ckpt")
    error = refused(capsys, training.main, arguments)
    assert error.startswith("selector-train: ")
    assert word in error


def test_a_mistake_of_ours_is_no_mistake_of_the_user(monkeypatch):
    """The matrix would prove nothing, were every exception turned into a line."""

    def broken(*args):
        raise ValueError("ours")

    monkeypatch.setattr(loading, "parse_budgets", broken)
    with pytest.raises(ValueError, match="ours"):
        cli.main(compare())


def test_there_are_as_many_cases_as_promised():
    tables = (FLAGS, OTHERS, CONFIGS, ANNOTATIONS, IMAGES, CHECKPOINTS, PLANS, LINES, ENVIRONMENT, TRAINING)
    assert sum(map(len, tables)) > 300


def test_a_hub_that_cannot_be_reached(capsys, monkeypatch):
    """Its library lets the errors of its HTTP client through, which are no OSErrors (and of httpx or httpx2)."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    def unreachable(*args, **more):
        raise HTTPError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    error = refused(capsys, cli.main, compare("--model", "owner/name"))
    assert "no folder 'owner/name', and the hub gave none: Name or service not known" in error
