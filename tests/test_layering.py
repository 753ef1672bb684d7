"""Who may import whom: the data flow of the package, as a test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
APPLICATION = [f"selector.{name}" for name in ("tasks", "measure", "report", "show", "commands", "records", "cli")]
FORBIDDEN = {
    "selector": ["training", "pytorch_lightning", "lightning"],
    "selector/methods": ["selector.models", "selector.plug", "transformers", *APPLICATION],
    "selector/models": ["selector.methods", "selector.registry", *APPLICATION],
    "selector/tasks": ["selector.methods", "selector.models", "selector.measure", "selector.report", "torch"],
    # The seam of a comparison is the record file: what measures writes it, what reports reads it.
    "selector/measure": ["selector.methods", "selector.report", "selector.show", "selector.commands"],
    "selector/report": ["selector.measure", "selector.tasks", "selector.show", "selector.commands", "torch"],
    "selector/show": ["selector.methods", "selector.report", "selector.commands"],
    "selector/commands": ["selector.methods"],
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_go_one_way(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        wrong = [
            name for name in imports(path) for ban in FORBIDDEN[folder] if name == ban or name.startswith(ban + ".")
        ]
        assert wrong == [], f"{path.relative_to(ROOT)} imports {wrong}"


def test_the_order_of_the_core_has_no_circle():
    """Each imports only those before it, in functions too: what is written down, saved, defined, collected."""
    order = ["schema", "hub", "base", "registry"]
    for place, name in enumerate(order):
        later = {f"selector.{each}" for each in order[place + 1 :]}
        assert not imports(ROOT / "selector" / f"{name}.py") & later
    for path in (ROOT / "selector" / "methods").glob("*.py"):
        assert "selector.registry" not in imports(path)


def test_the_top_level_is_what_was_agreed():
    import subprocess

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {name.split("/")[0] for name in listed}
    agreed = {"pyproject.toml", "selector", "training", "configs", "checkpoints", "tests", "README.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} <= agreed
