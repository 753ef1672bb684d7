"""Fingerprints follow weights, arguments and code, not names."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from selector import Norm
from selector.measure import identity
from selector.registry import load_selector


def test_fingerprint_sees_every_value_of_a_small_module():
    module = nn.Linear(40, 30)
    before = identity.fingerprint(module)
    assert identity.fingerprint(module) == before
    with torch.no_grad():
        module.weight[17, 23] += 1e-3
    assert identity.fingerprint(module) != before


def test_fingerprint_of_a_large_module_is_sampled(monkeypatch):
    monkeypatch.setattr(identity, "WHOLE", 16)
    module = nn.Linear(300, 200).to(torch.bfloat16)
    before = identity.fingerprint(module)
    with torch.no_grad():
        module.weight += 1
    assert identity.fingerprint(module) != before


def test_identity_is_the_same_under_any_name_and_differs_by_argument(tmp_path):
    plain, spelled = load_selector("random"), load_selector("random:seed=0")
    assert identity.identity(plain) == identity.identity(spelled)
    assert identity.identity(plain) != identity.identity(load_selector("random:seed=1"))


def test_a_composition_is_keyed_by_its_parts(tmp_path, monkeypatch):
    """The file of an inner selector, and the file of a base class."""
    seen = {}
    monkeypatch.setattr(identity, "_source", lambda cls: seen.setdefault(cls.__name__, cls.__name__))
    inner, outer = load_selector("norm"), load_selector("random")
    alone = identity.identity(outer)["source"]
    outer.inner = inner
    together = identity.identity(outer)["source"]
    assert together != alone
    seen["Norm"] = "changed"
    assert identity.identity(outer)["source"] != together
    seen["ScoreSelector"] = "changed"
    assert len({alone, together, identity.identity(outer)["source"]}) == 3


def test_other_code_is_another_key(tmp_path):
    """Of what every choice passes through; the command line is not among it."""
    (tmp_path / "models").mkdir()
    files = {name: tmp_path / name for name in ("budget.py", "models/llava_next.py", "cli.py")}
    for path in files.values():
        path.write_text("x = 1\n")
    before = identity.code(tmp_path)
    files["cli.py"].write_text("x = 2\n")
    assert identity.code(tmp_path) == before
    found = {before}
    for name in ("budget.py", "models/llava_next.py"):
        files[name].write_text("x = 3\n")
        found.add(identity.code(tmp_path))
    (tmp_path / "merging.py").write_text("x = 1\n")
    found.add(identity.code(tmp_path))
    assert len(found) == 4
    assert identity.code() == identity.code()


class Hidden(Norm):
    """Keeps its argument under another name."""

    def __init__(self, power: float = 1.0):
        super().__init__()
        self._p = power


class Loose(Norm):
    def __init__(self, **options):
        super().__init__()


class Callback(Norm):
    def __init__(self, rule: object):
        super().__init__()
        self.rule = rule


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (Hidden(), "Hidden must keep argument 'power' as self.power"),
        (Loose(power=2), r"Loose must name its arguments one by one, got \*\*options"),
        (Callback(print), "Callback must keep argument 'rule' as numbers, texts, lists or selectors"),
        (Callback(float("nan")), "Callback must keep argument 'rule'"),
    ],
)
def test_an_identity_is_complete_or_an_error(selector, message):
    with pytest.raises(TypeError, match=message):
        identity.identity(selector)


def test_selectors_in_a_list_are_part_of_the_identity():
    first, second = (identity.identity(Callback([Norm(largest=largest)])) for largest in (True, False))
    assert first != second
    assert first["init_args"]["rule"][0]["init_args"] == {"largest": True}


def in_a_shell(body: str) -> type:
    """A class from a module without a file, as in a notebook."""
    home = types.ModuleType("shell_session")
    sys.modules["shell_session"] = home
    home.__dict__.update(Norm=Norm)
    exec(
        f"def weigh(x):\n    return {body}\n\nclass Shell(Norm):\n    def score(self, t):\n        return weigh(t)\n",
        vars(home),
    )
    return home.Shell


def test_a_class_of_a_notebook_is_known_by_its_code():
    """Run again after an edit, even of a function that it calls, it must not meet its earlier records."""
    found = [identity.identity(in_a_shell(body)())["source"] for body in ("x + 1", "x + 1", "x + 2", "x * 1")]
    assert found[0] == found[1]
    assert len(set(found)) == 3
