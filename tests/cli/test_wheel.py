"""What ships is found from anywhere: in a clone, and inside an installed wheel."""

from __future__ import annotations

import runpy
import shutil
import tomllib
from pathlib import Path

from selector.cli import MODEL, SELECTORS

ROOT = Path(__file__).resolve().parent.parent.parent


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
    assert runpy.run_path(str(path))["candidates"]("configs") == (
        Path("configs"),
        tmp_path / "site-packages" / "configs",
    )
    (path.parent / "shipped").mkdir()
    assert runpy.run_path(str(path))["candidates"]("configs") == (Path("configs"), path.parent / "shipped" / "configs")


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
