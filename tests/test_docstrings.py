"""The examples of docstrings run; every public class and every selector has one."""

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
LONGEST = 6
"""Lines of a selector's example, with what it prints: what a reader takes in at a glance."""
WITHOUT_EXAMPLE = {
    "selector": {
        "selector/errors.py:RankingError": "raised at the end of a training",
        "selector/lmms/model.py:MeasuredTokens": "needs lmms-eval",
        "selector/lmms/model.py:SelectorSimple": "needs lmms-eval",
        "selector/lmms/model.py:SelectorChat": "needs lmms-eval",
    },
    "training": {},
}
"""Per folder, the public classes that cannot be shown in an example, each with the reason."""


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)  # an example may write a file

    result = doctest.testmod(module)  # prints what differs
    assert result.attempted, f"no docstring of {name} holds the example that its source shows"
    assert not result.failed


def house():
    """The script that measures the code, loaded by its path: `.ci` is no package."""
    spec = importlib.util.spec_from_file_location("house", ROOT / ".ci" / "house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docstrings_and_directives_count_neither_as_comments_nor_as_code():
    source = (
        '"""Doc # with a mark.\n\nOf several lines."""\n\n# why\nx = "# no comment"  # and why\ny = 1  # noqa: F841\n'
    )
    assert house().comments_and_code(source) == (2, 2)


@pytest.mark.parametrize("folder", WITHOUT_EXAMPLE)
def test_every_public_class_has_an_example(folder):
    """`test_examples_run` runs them."""
    # Equal, not a subset: a class that has an example by now, or is gone, must leave the list.
    assert set(house().without_example(ROOT / folder)) == set(WITHOUT_EXAMPLE[folder])


@pytest.mark.parametrize("name", available_selectors())
def test_every_selector_has_a_short_example_of_itself(name):
    cls = available_selectors()[name]
    text = inspect.cleandoc(vars(cls)["__doc__"] or "")
    _, title, example = text.partition("\n\nExample:\n")
    lines = example.split("\n\n")[0].splitlines()

    assert title, f"{cls.__name__} has no Example"
    assert f"{cls.__name__}(" in example, f"the example of {cls.__name__} does not use it"
    assert len(lines) <= LONGEST, f"{len(lines)} lines"
