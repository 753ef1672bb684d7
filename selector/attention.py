"""Which attention of the vision tower tells how much a patch matters: what CLS pays it, or what it receives.

Towers without a CLS token (SigLIP) have the second alone. The choice is an argument of every selector that reads
attention, and never made silently.
"""

from __future__ import annotations

from typing import Literal, get_args

Attention = Literal["cls", "received"]
"""``"cls"``: what the CLS token pays each patch; ``"received"``: what each patch receives, mean over all queries."""


def attention_field(attention: Attention) -> str:
    """The field of `VisualTokens` that holds this attention.

    Raises:
        ValueError: any other value, naming it.

    >>> attention_field("received")
    'received_attention'
    """
    if attention not in get_args(Attention):
        raise ValueError(f"attention must be one of {', '.join(get_args(Attention))}, got {attention!r}")
    return f"{attention}_attention"
