"""Visual-token selection for vision-language models. See README.md for the ten-line tour.

Names are imported on first use, so that ``import selector`` (and ``selector --help``) costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Budget": "budget",
    "CDPruner": "methods.cdpruner",
    "CLSAttention": "methods.cls_attention",
    "DART": "methods.dart",
    "DivPrune": "methods.divprune",
    "Downsample": "methods.downsample",
    "FarthestPoint": "methods.farthest_point",
    "Flow": "merging",
    "GreedySelector": "base",
    "GridPool": "methods.grid_pool",
    "GumbelSelector": "methods.gumbel",
    "HiPrune": "methods.hiprune",
    "HiRED": "methods.hired",
    "HoloV": "methods.holov",
    "ImageTransformer": "methods.image_transformer",
    "LRCP": "methods.lrcp",
    "LoFi": "methods.lofi",
    "Merge": "methods.merge",
    "Mix": "methods.mix",
    "Norm": "methods.norm",
    "PivotedQR": "methods.pivoted_qr",
    "PruMerge": "methods.prumerge",
    "PruMergePlus": "methods.prumerge_plus",
    "Random": "methods.random",
    "RankSelector": "base",
    "RidgeLeverage": "methods.ridge_leverage",
    "SCOPE": "methods.scope",
    "SVDPrune": "methods.svd_prune",
    "ScoreSelector": "base",
    "Selection": "merging",
    "ToMe": "methods.tome",
    "TokenSelector": "base",
    "Uniform": "methods.uniform",
    "VisPruner": "methods.vispruner",
    "VisionZip": "methods.visionzip",
    "VisualTokens": "tokens",
    "available_selectors": "registry",
    "load_selector": "registry",
    "prune_inputs": "plug",
    "select_tokens": "plug",
}

if TYPE_CHECKING:
    from selector.base import GreedySelector, RankSelector, ScoreSelector, TokenSelector
    from selector.budget import Budget
    from selector.merging import Flow, Selection
    from selector.methods.cdpruner import CDPruner
    from selector.methods.cls_attention import CLSAttention
    from selector.methods.dart import DART
    from selector.methods.divprune import DivPrune
    from selector.methods.downsample import Downsample
    from selector.methods.farthest_point import FarthestPoint
    from selector.methods.grid_pool import GridPool
    from selector.methods.gumbel import GumbelSelector
    from selector.methods.hiprune import HiPrune
    from selector.methods.hired import HiRED
    from selector.methods.holov import HoloV
    from selector.methods.image_transformer import ImageTransformer
    from selector.methods.lofi import LoFi
    from selector.methods.lrcp import LRCP
    from selector.methods.merge import Merge
    from selector.methods.mix import Mix
    from selector.methods.norm import Norm
    from selector.methods.pivoted_qr import PivotedQR
    from selector.methods.prumerge import PruMerge
    from selector.methods.prumerge_plus import PruMergePlus
    from selector.methods.random import Random
    from selector.methods.ridge_leverage import RidgeLeverage
    from selector.methods.scope import SCOPE
    from selector.methods.svd_prune import SVDPrune
    from selector.methods.tome import ToMe
    from selector.methods.uniform import Uniform
    from selector.methods.visionzip import VisionZip
    from selector.methods.vispruner import VisPruner
    from selector.plug import prune_inputs, select_tokens
    from selector.registry import available_selectors, load_selector
    from selector.tokens import VisualTokens

__all__ = [
    "DART",
    "LRCP",
    "SCOPE",
    "Budget",
    "CDPruner",
    "CLSAttention",
    "DivPrune",
    "Downsample",
    "FarthestPoint",
    "Flow",
    "GreedySelector",
    "GridPool",
    "GumbelSelector",
    "HiPrune",
    "HiRED",
    "HoloV",
    "ImageTransformer",
    "LoFi",
    "Merge",
    "Mix",
    "Norm",
    "PivotedQR",
    "PruMerge",
    "PruMergePlus",
    "Random",
    "RankSelector",
    "RidgeLeverage",
    "SVDPrune",
    "ScoreSelector",
    "Selection",
    "ToMe",
    "TokenSelector",
    "Uniform",
    "VisPruner",
    "VisionZip",
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
