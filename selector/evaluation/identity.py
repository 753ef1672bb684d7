"""What a model or a selector is, whatever it is called: the part of a record's key that follows weights and code."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

import selector

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


def identity(module: nn.Module) -> dict[str, Any]:
    """What a selector is, whatever it was called: class, arguments, weights, and the source of its file.

    The source is in so that a method under development never meets the records of its earlier self.
    """
    cls = type(module)
    try:
        source = inspect.getsource(inspect.getmodule(cls) or cls)
    except (OSError, TypeError):  # defined in a shell: no file to read
        source = ""
    return {
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "init_args": getattr(module, "init_args", {}),
        "weights": fingerprint(module),
        "source": hashlib.sha256(source.encode()).hexdigest()[:16],
    }
