"""What a model or a selector is, whatever it is called: the part of a record's key that follows weights and code."""

from __future__ import annotations

import hashlib
import inspect
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import selector
from selector.base import TokenSelector
from selector.budget import Budget

ASIDE = ("__init__.py", "cli.py", "hub.py", "registry.py")
"""Files of the package through which no choice passes."""
WHOLE = 256 * 2**20
"""Modules up to this many bytes are fingerprinted whole, larger ones by 4,096 entries of every tensor."""


def fingerprint(module: nn.Module) -> str:
    """Hash of a module's tensors: names, types, shapes and values (sampled evenly in modules above 256 MiB)."""
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    whole = sum(value.nbytes for value in state.values()) <= WHOLE
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().flatten()
        if not whole and len(flat) > 4096:
            flat = flat[torch.linspace(0, len(flat) - 1, 4096, dtype=torch.float64, device=flat.device).long()]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def code(package: Path = Path(selector.__file__).parent) -> str:
    """Hash of the sources that every choice passes through, whatever the method: changed code is measured anew."""
    files = [*package.glob("*.py"), *(package / "models").glob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.parent != package or path.name not in ASIDE:
            digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def identity(module: nn.Module, budget: Budget | None = None) -> dict[str, Any]:
    """What a selector is, whatever it was called: class, arguments, weights, and the sources of the files it is from.

    The sources are in so that a method under development never meets the records of its earlier self: its own file,
    those it inherits from, and those of the selectors it is composed of.

    Args:
        budget: with ``keep="auto:s"``, the threshold that the selector's calibration gives is part of what it is.

    Raises:
        ValueError: a selector that is not calibrated for that budget.
    """
    cls = type(module)
    classes = {base for part in module.modules() for base in type(part).__mro__ if issubclass(base, TokenSelector)}
    source = "".join(sorted({_source(base) for base in classes}))
    known = {
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "init_args": getattr(module, "init_args", {}),
        "weights": fingerprint(module),
        "source": hashlib.sha256(source.encode()).hexdigest()[:16],
    }
    if budget is not None and budget.is_auto and isinstance(module, TokenSelector):
        known["calibrated"] = module.resolved(budget).keep
    return known


def _source(cls: type) -> str:
    """The file of a class, and the files beside it that it borrows from."""
    beside = cls.__module__.rpartition(".")[0] + "."
    home = inspect.getmodule(cls)
    owners = {str(getattr(value, "__module__", "")) for value in vars(home).values()} if home else set()
    names = {cls.__module__} | {name for name in owners if name.startswith(beside)}
    try:
        return "".join(inspect.getsource(sys.modules[name]) for name in sorted(names))
    except (OSError, TypeError, KeyError):  # defined in a shell: no file to read
        return ""
