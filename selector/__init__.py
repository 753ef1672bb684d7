"""Visual-token selection for vision-language models. See README.md for the ten-line tour.

Names are imported on first use, so that ``import selector`` (and ``selector --help``) costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Budget": "budget",
    "GumbelSelector": "methods.gumbel",
    "LoFi": "methods.lofi",
    "Norm": "methods.norm",
    "Random": "methods.random",
    "SVDPrune": "methods.svd_prune",
    "ScoreSelector": "base",
    "TokenSelector": "base",
    "Uniform": "methods.uniform",
    "VisualTokens": "tokens",
    "available_selectors": "registry",
    "load_selector": "registry",
    "prune_inputs": "plug",
    "select_tokens": "plug",
}

if TYPE_CHECKING:
    from selector.base import ScoreSelector, TokenSelector
    from selector.budget import Budget
    from selector.methods.gumbel import GumbelSelector
    from selector.methods.lofi import LoFi
    from selector.methods.norm import Norm
    from selector.methods.random import Random
    from selector.methods.svd_prune import SVDPrune
    from selector.methods.uniform import Uniform
    from selector.plug import prune_inputs, select_tokens
    from selector.registry import available_selectors, load_selector
    from selector.tokens import VisualTokens

__all__ = [
    "Budget",
    "GumbelSelector",
    "LoFi",
    "Norm",
    "Random",
    "SVDPrune",
    "ScoreSelector",
    "TokenSelector",
    "Uniform",
    "VisualTokens",
    "available_selectors",
    "load_selector",
    "prune_inputs",
    "select_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'selector' has no attribute {name!r}")
    return getattr(importlib.import_module(f"selector.{_HOME[name]}"), name)
