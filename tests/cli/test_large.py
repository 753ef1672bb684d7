"""Offloaded and quantised models from the command line; devices are shared out among the processes of a machine."""

from __future__ import annotations

import json

import pytest
import torch

from selector import records
from selector.commands import large
from selector.errors import UsageError
from selector.measure.identity import fingerprint

MODEL = "checkpoints/llava-next-tiny"
OPTIONS = ["compare", "--model", MODEL, "--selectors", "norm", "--keep", "0.25", "--samples", "1", "--tasks", "scenes"]
SPREAD = {
    "model.vision_tower": "cpu",
    "model.multi_modal_projector": "cpu",
    "model.image_newline": "cpu",
    "model.language_model": "disk",
    "lm_head": "disk",
}
# accelerate does not know that a parameter may stand beside the modules of a model.
pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys do not match")


def content(run):
    """What came out, by row: everything but times, and figures to 4 digits."""
    plan = json.loads((run / records.RUN).read_text())
    rows = {}
    for row in plan["rows"]:
        (record,) = records.read_folder(run / row["key"])
        rows[row["label"]] = {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in record.items()
            if not name.endswith("_ms")
        }
    return plan, rows


@pytest.mark.slow
def test_an_offloaded_model_is_compared_like_a_whole_one(call, tmp_path):
    """accelerate reads each weight from disk as it is needed: same answers, and the files for a fingerprint."""
    pytest.importorskip("accelerate")
    assert call(*OPTIONS, "--out", "whole")[0] == 0
    code, out, err = call(*OPTIONS, "--out", "offloaded", "--device-map", json.dumps(SPREAD))
    assert code == 0, err
    assert "norm" in out
    (whole, rows), (offloaded, same) = content(tmp_path / "whole"), content(tmp_path / "offloaded")
    assert rows == same
    assert whole["fingerprint"] != offloaded["fingerprint"]


@pytest.mark.slow
def test_a_quantised_model_is_compared(call, tmp_path):
    """Loaded twice: its records are found again, and they are not those of the plain model."""
    pytest.importorskip("accelerate")
    version = pytest.importorskip("torchao").__version__
    for again in (False, True):
        code, _, err = call(*OPTIONS, "--out", "run", "--quantization", "int8", "--max-new-tokens", "4")
        assert code == 0, err
        files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("predictions.jsonl")}
        assert not again or files == before
        before = files
    assert f"weights by torchao {version} Int8WeightOnlyConfig" in (tmp_path / "run" / "report.md").read_text()
    assert call(*OPTIONS, "--out", "run", "--max-new-tokens", "4")[0] == 0
    assert len(list((tmp_path / "run").rglob("predictions.jsonl"))) == 2 * len(before)


def test_weights_in_4_bits_have_a_fingerprint():
    pytest.importorskip("accelerate")
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForImageTextToText

    from selector.commands.loading import find_folder

    options = large.quantization_options("nf4", "auto")
    assert options["dtype"] == torch.bfloat16
    model = AutoModelForImageTextToText.from_pretrained(find_folder(MODEL), device_map={"": "cpu"}, **options)
    assert len(fingerprint(model)) == 16


def test_a_map_must_leave_the_vision_tower_on_a_device(call):
    pytest.importorskip("accelerate")
    code, _, err = call(*OPTIONS, "--device-map", '{"": "disk"}')
    assert code == 2
    assert "device_map must leave the vision tower on a device" in err


@pytest.mark.parametrize("name", [*large.PACKAGE, "device_map"])
def test_a_missing_package_is_named(call, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    more = ["--device-map", "auto"] if name == "device_map" else ["--quantization", name]
    code, _, err = call(*OPTIONS, *more)
    assert code == 2
    package = large.PACKAGE.get(name, "accelerate")
    assert f"{name} needs the package {package}" in err.replace("quantization ", "")
    assert 'pip install "visual-token-selector[large]"' in err


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("int3", "cpu", "auto", "quantization must be one of int8, int4, nf4, got 'int3'"),
        ("int4", "cpu", "auto", "quantization int4 needs device cuda, got 'cpu'"),
        ("nf4", "cpu", "auto", "quantization nf4 needs device cuda, got 'cpu'"),
        ("int4", "cuda", "float16", "quantization int4 needs dtype bfloat16, got 'float16'"),
    ],
)
def test_what_cannot_be_quantised(monkeypatch, name, device, dtype, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(UsageError, match=message):
        large.check_quantization(name, torch.device(device), dtype)


@pytest.mark.parametrize(
    "value", ["nowhere", "", "disk", "meta", "{", '{"a": "b"}', {"a": None}, {"": True}, {"": -1}, 3.5]
)
def test_a_device_map_that_is_none(value):
    with pytest.raises(UsageError, match="device_map must"):
        large.parse_device_map(value)


@pytest.mark.parametrize("value", [None, "auto", "cpu", "cuda:1", {"": 0}, SPREAD])
def test_a_device_map_is_kept(value):
    assert large.parse_device_map(value) == value
    assert large.parse_device_map(json.dumps(value) if isinstance(value, dict) else value) == value


@pytest.fixture
def machine(monkeypatch):
    """``machine(gpus, local_rank, local_world_size)``: what a process finds around it."""

    def build(gpus, rank=None, ranks=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (1000 * (gpu + 1), 10**6))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        for name, value in (("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", ranks)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, str(value))

    return build


@pytest.mark.parametrize(
    ("around", "own"),
    [
        ((8,), [0, 1, 2, 3, 4, 5, 6, 7]),
        ((8, 3, 8), [3]),
        ((8, 1, 2), [4, 5, 6, 7]),
        ((8, 2, 3), [4, 5]),
        ((1, 3, 4), [0]),  # Slurm shows each process the one that is its own
        ((8, 3), [3]),
        ((8, 0), [0]),
        ((0, 1, 2), []),
    ],
)
def test_every_process_has_gpus_of_its_own(machine, around, own):
    machine(*around)
    assert [*large.own_gpus()] == own


def test_more_processes_than_gpus(machine):
    machine(2, 0, 3)
    with pytest.raises(UsageError, match="LOCAL_WORLD_SIZE must be at most the number of GPUs, 2, got 3"):
        large.own_gpus()


def test_a_model_is_spread_over_the_gpus_of_its_process(machine):
    pytest.importorskip("psutil")
    machine(8, 1, 4)
    options = large.spread_options("auto")
    assert {name: value for name, value in options["max_memory"].items() if name != "cpu"} == {2: 2700, 3: 3600}
    assert options["max_memory"]["cpu"] > 0
    assert large.spread_options({"": 3}) == {"device_map": {"": 3}}
    for stranger in ({"": 1}, "cuda:4", "cuda", {"a": "cuda:2", "b": "cuda:0"}):
        with pytest.raises(UsageError, match=r"device_map must name GPUs of this process, \[2, 3\]"):
            large.spread_options(stranger)
    machine(8)
    assert large.spread_options("auto") == {"device_map": "auto"}
