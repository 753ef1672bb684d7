"""What a method picks of given tokens, for the tests of methods."""

from __future__ import annotations

import torch

from selector.groups import Groups

FEATURES = torch.randn(2, 25, 9, generator=torch.Generator().manual_seed(0)) + 2.0


def picked(method, tokens, count):
    """The choices of an order, as lists in the order of the picks."""
    order = method.order(tokens, Groups.of(tokens, "image"), count)
    return [sorted(range(len(row)), key=row.__getitem__)[:count] for row in order.tolist()]
