"""Qwen3-VL: as Qwen2-VL, with features of further tower layers that the first layers of the language model add.

These deepstack features are cut, and merged, as their packed tokens are.
"""

from __future__ import annotations

from selector.models.qwen2_vl import ADAPTER

__all__ = ["ADAPTER"]
