"""Specs and checkpoints: what loads, and what must not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from selector import (
    Budget,
    GumbelSelector,
    ImageTransformer,
    Random,
    ScoreSelector,
    SVDPrune,
    TokenSelector,
    VisualTokens,
    load_selector,
)
from selector.calibration import CalibratedShare, Calibration

CALIBRATION = Calibration(
    (CalibratedShare(share=0.25, newlines="kept_rows", threshold=0.5, measured=0.251),), {"images": 3}
)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    selector = GumbelSelector(dim=8, num_patches=16, heads=2)
    selector.feature_mean.normal_()
    return selector.save_pretrained(tmp_path / "mine", metadata={"steps": 7})


class Mine(ScoreSelector):
    def __init__(self, channel: int = 0):
        super().__init__()
        self.channel = channel

    def score(self, tokens):
        return tokens.features[..., self.channel]


def test_round_trip_keeps_weights_buffers_and_metadata(checkpoint):
    torch.manual_seed(1)
    one, two = TokenSelector.from_pretrained(checkpoint), load_selector(str(checkpoint))
    assert isinstance(one, GumbelSelector)
    assert not one.training
    assert one.feature_mean.abs().sum() > 0
    tokens = VisualTokens.from_features(torch.randn(2, 16, 8))
    assert torch.equal(one(tokens, Budget(5)), two(tokens, Budget(5)))
    assert json.loads((checkpoint / "config.json").read_text())["metadata"] == {"steps": 7}
    assert sorted(p.name for p in checkpoint.iterdir()) == ["README.md", "config.json", "model.safetensors"]


class Hub:
    """Stands for the hub: one user, whose repositories are folders. Calls are checked against the real signatures."""

    def __init__(self, root):
        self.root, self.created = root, {}
        self.api = create_autospec(huggingface_hub.HfApi, instance=True)
        self.api.create_repo.side_effect = self.create_repo
        self.api.upload_folder.side_effect = self.upload_folder

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        name = repo_id if "/" in repo_id else f"someone/{repo_id}"
        assert exist_ok or name not in self.created
        self.created[name] = private
        (self.root / name).mkdir(parents=True, exist_ok=True)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(self, *, repo_id, folder_path, revision=None, commit_message=None):
        assert repo_id in self.created, "the hub knows a repository by its full name"
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"https://huggingface.co/{repo_id}/commit/1"


@pytest.mark.parametrize("name", ["someone/mine", "mine"])
def test_what_is_pushed_loads_again(checkpoint, tmp_path, monkeypatch, name):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub.api)
    selector = TokenSelector.from_pretrained(checkpoint)
    selector.calibration = CALIBRATION
    for _ in range(2):  # again: a new commit of the same repository
        address = selector.push_to_hub(name, private=True, card="# Mine\n", metadata={"steps": 7})
    assert address == "https://huggingface.co/someone/mine/commit/1"
    assert hub.created == {"someone/mine": True}

    pushed = tmp_path / "hub" / "someone" / "mine"
    assert sorted(p.name for p in pushed.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (pushed / "README.md").read_text() == "# Mine\n"
    assert json.loads((pushed / "config.json").read_text())["metadata"] == {"steps": 7}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / "hub" / name))
    again = TokenSelector.from_pretrained("someone/mine")
    assert again.calibration == CALIBRATION
    for key, tensor in selector.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], tensor, rtol=0, atol=0)


def test_specs():
    svd = load_selector("svd-prune:energy=0.5,center=false")
    assert isinstance(svd, SVDPrune)
    assert (svd.energy, svd.center) == (0.5, False)
    assert load_selector("random:seed=3").seed == 3
    by_path = load_selector({"class_path": "selector.methods.random.Random", "init_args": {"seed": 4}})
    assert isinstance(by_path, Random)
    assert load_selector(by_path) is by_path


def test_a_class_defined_here_round_trips(tmp_path):
    again = TokenSelector.from_pretrained(Mine(channel=2).save_pretrained(tmp_path))
    assert isinstance(again, Mine)
    assert again.channel == 2
    assert "channel=2" in repr(again)


def test_dispatch_checks_the_class_asked_for(checkpoint):
    assert isinstance(GumbelSelector.from_pretrained(checkpoint), GumbelSelector)
    with pytest.raises(TypeError, match="holds a GumbelSelector, not a Random"):
        Random.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("svd-prun", "unknown selector 'svd-prun'.*did you mean svd-prune"),
        ("zzz", "unknown selector 'zzz': not one of"),
        ("checkpoints/none", "no selector checkpoint at 'checkpoints/none'"),
        ("gumbel", "is learned: name a checkpoint folder"),
        (
            {"class_path": "selector.methods.gumbel.GumbelSelector", "init_args": {"dim": 8, "num_patches": 16}},
            "is learned: name a checkpoint folder",
        ),
        ("random:sede=3", "init_args of Random.*sede"),
        ("random:seed", "not of the form argument=value"),
        ("random:seed=1,seed=2", "seed is given twice"),
        ("random:seed=1.5", "init_args of Random: seed must be int, got 1.5"),
        ("norm:largest=maybe", "init_args of Norm: largest must be bool, got 'maybe'"),
        ("svd-prune:rank=true", r"init_args of SVDPrune: rank must be int \| None, got True"),
        ("svd-prune:energy=high", "init_args of SVDPrune: energy must be float, got 'high'"),
        ("", "selector must be a name, a folder or a mapping, got ''"),
        (":seed=1", "unknown selector ''"),
        ("svd-prune:energy=[", r"'\[' is no value of YAML"),
        ("svd-prune:energy=!!python/object/apply:os.system ['true']", "is no value of YAML"),
        ("svd-prune:energy=2.0", r"energy must be in \(0, 1\], got 2"),
        ("svd-prune:rank=0", "rank must be >= 1, got 0"),
        ("svd-prune:method=quick", "method must be .exact. or .fast., got .quick."),
        ("lofi:rank=0", "rank must be >= 1, got 0"),
        (f"random:seed={10**30}", r"seed must be in \[-2\^63, 2\^63\), got 1"),
        (f"svd-prune:seed={10**30}", r"seed must be in \[-2\^63, 2\^63\), got 1"),
        ("scope:alpha=.nan", "alpha must be >= 0, got nan"),
        ("prumerge:fences=.inf", "fences must be finite, got inf"),
        ("holov:crops=0", "crops must be >= 1, got 0"),
        ("holov:variety=-1.0", "variety must be finite and >= 0, got -1.0"),
        ("hired:alpha=1.5", r"alpha must be in \[0, 1\], got 1.5"),
        ("hiprune:alpha=-0.5", r"alpha must be in \[0, 1\], got -0.5"),
        ("vispruner:drop=0", "drop must be >= 1, got 0"),
        ("hf:", "must go on with owner/name"),
        ({"class_path": "selector.methods.norm.Norm", "init_args": [1]}, "init_args must be a mapping"),
        ({"class_path": "os.path.join"}, "is not from selector"),
        ({"class_path": "selector.methods.nothing.X"}, "cannot be imported"),
        ({"class_path": "selector.budget.Budget", "init_args": {"keep": 1}}, "is not a TokenSelector"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        load_selector(spec)


def test_a_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "random").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_selector("random").seed == load_selector("random:seed=0").seed == 0


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_class_from_elsewhere_is_not_imported(checkpoint):
    edit(checkpoint, class_path="antigravity.Selector")
    with pytest.raises(ValueError, match="is not from selector"):
        TokenSelector.from_pretrained(checkpoint)
    assert "antigravity" not in sys.modules


def test_an_allowed_package_is_imported(checkpoint, tmp_path, monkeypatch):
    package = tmp_path / "my_selectors"
    package.mkdir()
    (package / "__init__.py").write_text("from selector import Random\nclass Loud(Random):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    edit(checkpoint, class_path="my_selectors.Loud", init_args={"seed": 1})
    save_file({}, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match="is not from selector"):
        TokenSelector.from_pretrained(checkpoint)
    assert type(TokenSelector.from_pretrained(checkpoint, allow=["my_selectors"])).__name__ == "Loud"


def change(folder, **tensors):
    state = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        state.pop(name) if value is None else state.update({name: value})
    save_file(state, folder / "model.safetensors")


def test_weights_must_fit_exactly(checkpoint):
    bias = load_file(checkpoint / "model.safetensors")["head.bias"]
    change(checkpoint, **{"head.bias": None})
    with pytest.raises(ValueError, match=r"(?s)does not fit GumbelSelector.*head.bias"):
        TokenSelector.from_pretrained(checkpoint)
    change(checkpoint, **{"head.bias": bias, "extra": bias.clone()})
    with pytest.raises(ValueError, match=r"(?s)does not fit.*extra"):
        TokenSelector.from_pretrained(checkpoint)
    change(checkpoint, **{"head.bias": torch.full_like(bias, float("nan")), "extra": None})
    with pytest.raises(ValueError, match=r"NaN or infinity in head.bias"):
        TokenSelector.from_pretrained(checkpoint)
    change(checkpoint, **{"head.bias": bias})
    edit(checkpoint, init_args={"dim": 16, "num_patches": 16, "heads": 2})
    with pytest.raises(ValueError, match=r"(?s)does not fit.*size mismatch"):
        TokenSelector.from_pretrained(checkpoint)


def test_broken_folders(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").write_bytes(b"\x80\x04pickle?")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        TokenSelector.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        TokenSelector.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").touch()
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no selector config"):
        TokenSelector.from_pretrained(checkpoint)
    with pytest.raises(FileNotFoundError, match="no folder"):
        TokenSelector.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"class_path": value}, "is no selector config") for value in (5, None, ["selector.methods.norm.Norm"])),
        *(({"init_args": value}, "is no selector config") for value in (None, [1], "dim", 5)),
        ({"init_args": {"dim": 8, "num_patches": 16, "heads": 0}}, "heads must be >= 1, got 0"),
        ({"init_args": {"dim": 8, "num_patches": -1}}, "num_patches must be >= 1, got -1"),
        ({"init_args": {"dim": 0, "num_patches": 16}}, "dim must be >= 1, got 0"),
        ({"init_args": {"dim": 8, "num_patches": 16, "width": 0}}, "width must be >= 1, got 0"),
        ({"init_args": {"dim": 8, "num_patches": 16, "layers": 0}}, "layers must be >= 1, got 0"),
        ({"init_args": {"dim": 8, "num_patches": 16, "mlp_ratio": -1.0}}, "mlp_ratio must .* got -1"),
        ({"init_args": {"dim": 8, "num_patches": 16, "mlp_ratio": float("inf")}}, "mlp_ratio must .* got inf"),
        ({"init_args": {"dim": 8, "num_patches": 16, "mlp_ratio": 1e12}}, r"asks for [\d,]+ bytes of weights"),
        ({"init_args": {"dim": 2**20, "num_patches": 16}}, r"asks for [\d,]+ bytes of weights"),
        ({"init_args": {"dim": 8, "num_patches": 16, "heads": 2.5}}, "heads must be int, got 2.5"),
    ],
)
def test_a_config_that_cannot_be_is_named(checkpoint, changes, message):
    edit(checkpoint, **changes)
    with pytest.raises(ValueError, match=message):
        TokenSelector.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({name: 0}, f"{name} must be >= 1, got 0") for name in ("dim", "width", "heads", "pool")),
        *(({name: -1}, f"{name} must be >= 0, got -1") for name in ("layers", "question_layers")),
        *(({"mlp_ratio": value}, "mlp_ratio must .* finite, got") for value in (-1.0, float("nan"), float("inf"))),
        ({"width": 24}, "width must be a multiple of 4 \\* heads, got width 24 and 4 heads"),
        *(({"question_dim": value, "inputs": "both"}, r"question_dim must be in 1\.\.8") for value in (0, 9)),
        ({"match_rank": 4}, "match_rank must be None for a selector that reads no question, got 4"),
        *(
            (
                {"question_dim": 6, "inputs": "both", "match_rank": value},
                rf"match_rank must be in 1\.\.6, .* got {value}",
            )
            for value in (0, 7)
        ),
    ],
)
def test_sizes_of_an_image_transformer_that_cannot_be_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageTransformer(**{"dim": 8} | arguments)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe{}", b"[]", b"null", b"5", b'"x"'])
def test_a_config_that_is_none_is_named(checkpoint, content):
    (checkpoint / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is no selector config"):
        TokenSelector.from_pretrained(checkpoint)


def test_importing_the_package_is_light():
    code = "import selector, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
