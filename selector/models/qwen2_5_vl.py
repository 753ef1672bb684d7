"""Qwen2.5-VL: as Qwen2-VL. Its tower sorts patches into windows, and sorts its tokens back before it returns them."""

from __future__ import annotations

from selector.models.qwen2_vl import ADAPTER

__all__ = ["ADAPTER"]
