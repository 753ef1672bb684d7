"""The examples of docstrings run; every public class and every selector has one."""

from __future__ import annotations

import ast
import doctest
import importlib
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
WITHOUT_EXAMPLE = {"training": {}}
"""Per folder, the public classes that cannot be shown in an example, each with the reason."""


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)  # an example may write a file

    result = doctest.testmod(module)  # prints what differs
    assert result.attempted, f"no docstring of {name} holds the example that its source shows"
    assert not result.failed


def public_classes(folder: str) -> dict[str, ast.ClassDef]:
    """Classes at the top of the folder's modules, by ``path:Name``."""
    return {
        f"{path.relative_to(ROOT).as_posix()}:{node.name}": node
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    }


def shows(node: ast.ClassDef) -> bool:
    """Whether the docstring has an example that prints something: one that cannot go wrong shows nothing."""
    examples = doctest.DocTestParser().get_examples(ast.get_docstring(node) or "")
    return any(example.want for example in examples)


@pytest.mark.parametrize("folder", WITHOUT_EXAMPLE)
def test_every_public_class_has_an_example(folder):
    """`test_examples_run` runs them."""
    classes = public_classes(folder)
    assert {name for name, node in classes.items() if not shows(node)} == set(WITHOUT_EXAMPLE[folder])


@pytest.mark.parametrize("name", available_selectors())
def test_every_selector_has_a_short_example_of_itself(name):
    cls = available_selectors()[name]
    text = inspect.cleandoc(vars(cls)["__doc__"] or "")
    _, title, example = text.partition("\n\nExample:\n")
    lines = example.split("\n\n")[0].splitlines()

    assert title, f"{cls.__name__} has no Example"
    assert f"{cls.__name__}(" in example, f"the example of {cls.__name__} does not use it"
    assert len(lines) <= LONGEST, f"{len(lines)} lines"
