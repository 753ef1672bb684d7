"""The examples of docstrings run, and every public class has one."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
from pathlib import Path

import pytest

from selector import available_selectors

ROOT = Path(__file__).parent.parent
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("selector", "training")
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
SHOWN = ("selector",)
"""Packages of which every public class has an example."""
EXCEPTIONS = {
    "selector/errors.py:RankingError",  # raised at the end of a training
}
"""Public classes of these packages that no short example could show."""
LONGEST = 6
"""Lines of a selector's example, with what it prints: what a reader takes in at a glance."""


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)  # an example may write a file

    result = doctest.testmod(module)  # prints what differs
    assert result.attempted, f"no docstring of {name} holds the example that its source shows"
    assert not result.failed


@pytest.mark.parametrize("package", SHOWN)
def test_every_public_class_has_an_example(package):
    # Loaded by its path: `.ci` is no package.
    spec = importlib.util.spec_from_file_location("house", ROOT / ".ci" / "house.py")
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)

    # Equal, not a subset: an exception that has an example by now, or is gone, must leave the list.
    assert house.without_example(ROOT / package) == sorted(
        name for name in EXCEPTIONS if name.startswith(f"{package}/")
    )


@pytest.mark.parametrize("name", available_selectors())
def test_every_selector_has_a_short_example_of_itself(name):
    cls = available_selectors()[name]
    text = inspect.cleandoc(vars(cls)["__doc__"] or "")
    _, title, example = text.partition("\n\nExample:\n")
    lines = example.split("\n\n")[0].splitlines()

    assert title, f"{cls.__name__} has no Example"
    assert f"{cls.__name__}(" in example, f"the example of {cls.__name__} does not use it"
    assert len(lines) <= LONGEST, f"{len(lines)} lines"
