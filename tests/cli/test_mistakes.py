"""Mistakes on the command line: one line that names argument, rule and value, and exit status 2."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_runs import SMALL, folder


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


def test_a_stray_rank_is_said_aloud(call, model, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ["compare", "--model", model, "--selectors", "random", "--keep", "9", "--samples", "4", "--no-answers"]
    code, out, err = call(*options, "--tasks", "scenes", "--rank-timeout", "0.1")
    assert code == 2
    assert "RANK=0 and WORLD_SIZE=2 in the environment: this process takes shard 0/2" in err
    assert "rank 1 of 2 has given no sign of life for 0.1 s" in err
    assert "scenes · " in out
    assert "partial: 2 of 4 samples" in out
    assert "Shard 0/2 lacks" not in out
    assert "Shard 1/2 lacks all 2." in out
    code, out, err = call(*options, "--tasks", "scenes", "--shard", "0/1")
    assert "partial" not in out
    assert "RANK" not in err


def test_no_image_that_can_be_read_is_an_error(call, model, tmp_path):
    folder(tmp_path / "data", ["a.png", "b.png"], broken=["a.png", "b.png"])
    options = ["compare", "--model", model, *SMALL, "--tasks", "folder:data", "--no-answers", "--samples", "all"]
    code, _, err = call(*options, "--skip-unreadable")
    assert code == 2
    assert "task 'folder:data': none of its 2 images can be read" in err


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
        (["bench", "--tiles", "2"], "tiles must come with --geometry"),
        (["bench", "--out", "x"], "out must come with --geometry"),
        (["bench", "--prefill-layers", "1"], "prefill-layers must come with --geometry"),
    ],
)
def test_mistakes_of_the_other_commands(call, arguments, message):
    code, _, err = call(*arguments)
    assert code == 2
    assert re.search(message, err), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--geometry", "llava-next-8b"], "geometry must be one of .*llava-next-7b.*, got 'llava-next-8b'"),
        (["--model", "x"], "model must not be given with --geometry"),
        (["--positions", "contiguous"], "positions must not be given with --geometry"),
        (["--keep", "0.25"], r"keep must be a count of visual tokens with --geometry, got 0\.25"),
        (["--keep", "745"], r"keep must be in 1\.\.744, the visual tokens of 5 tiles, got 745"),
        (["--tiles", "0"], "tiles must be an int >= 1, got 0"),
        (["--tiles", "6"], r"tiles must be in 1\.\.5 for llava-next-tiny, got 6"),
        (["--prefill-layers", "5"], r"prefill-layers must be in 0\.\.4, .*, got 5"),
        (["--threads", "0"], "threads must be an int >= 1, got 0"),
        (["--repeats", "0"], "repeats must be an int >= 1, got 0"),
        (["--attention", "careful"], "attention 'careful' cannot be used: "),
        (["--dtype", "float7"], "dtype must be one of .*, got 'float7'"),
        (["--image", "gone.png"], r"gone\.png cannot be read"),
        (["--selectors", "nobody"], "unknown selector 'nobody'"),
        (["--selectors", "gumbel", "gumbel"], "selectors must be different, 'gumbel' is there twice"),
        (["--out", "taken/x"], "taken is no folder"),
    ],
)
def test_mistakes_of_a_geometry(call, arguments, message):
    Path("taken").write_text("")
    code, _, err = call("bench", "--geometry", "llava-next-tiny", *arguments)
    assert code == 2
    assert re.search(message, err.splitlines()[-1]), err


def test_debug_shows_the_traceback(call):
    from selector.errors import UsageError

    with pytest.raises(UsageError):
        call("compare", "--keep", "0", "--debug")
