"""Who may import whom: the data flow of the package, as a test."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
APPLICATION = [f"selector.{name}" for name in ("tasks", "measure", "report", "show", "commands", "records", "cli")]
TRAINING_ONLY = ["pytorch_lightning", "lightning", "timm", "wandb", "tensorboard", "jsonargparse"]
FORBIDDEN = {
    "selector": ["training", *TRAINING_ONLY],
    "selector/methods": ["selector.models", "selector.plug", "selector.pruning", "transformers", *APPLICATION],
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


@pytest.mark.slow
def test_a_comparison_needs_nothing_that_only_training_needs(tmp_path):
    code = f"""
import sys
sys.modules.update(dict.fromkeys({TRAINING_ONLY!r}))  # None: importing one is an ImportError
from selector.cli import main
sys.exit(main(["compare", "--samples", "1", "--tasks", "scenes", "--keep", "16", "--selectors", "random",
               "--no-answers", "--out", {str(tmp_path / "run")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_top_level_is_what_was_agreed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {name.split("/")[0] for name in listed}
    agreed = {"pyproject.toml", "selector", "training", "configs", "checkpoints", "tests", "README.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} <= agreed
