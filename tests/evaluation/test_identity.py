"""Fingerprints follow weights, arguments and code, not names."""

from __future__ import annotations

import torch
from torch import nn

from selector.evaluation import identity
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
