"""SmolVLM: as Idefics3, with fewer and larger blocks of patches."""

from __future__ import annotations

from selector.models.idefics3 import ADAPTER

__all__ = ["ADAPTER"]
