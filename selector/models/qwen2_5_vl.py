"""Qwen2.5-VL: as Qwen2-VL; that its tower attends in windows is undone before its tokens leave it."""

from __future__ import annotations

from selector.models.qwen2_vl import ADAPTER

__all__ = ["ADAPTER"]
