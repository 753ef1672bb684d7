"""How every sample of a comparison is measured. Imports no torch: the command line reads its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Protocol:
    """The settings of a comparison that its figures depend on, whatever is compared.

    ``dataclasses.asdict`` of it is part of the key of every record and of the plan in ``run.json``: a new setting is
    one field here and one flag in `selector.cli`.

    Attributes:
        seed: from which tasks draw their samples.
        answers: False skips generation: tokens, time and evidence only.
        max_new_tokens: per answer, at least 1.
        positions: position ids of pruned prompts, see `selector.pruning.prune_inputs`.
        layer: of the language model, at which the spectrum of the visual tokens is taken; 0 is what enters it.
        repeats: timed runs of every piece of work, of which the median is recorded, after one untimed warm-up.
        batch_size: prompts that are answered at once; times are one sample's own with 1 only, see
            `selector.measure.harness`. Part of the key, so that no run mixes two kinds of times.

    Example:
        >>> Protocol(answers=False, repeats=5).max_new_tokens
        48
    """

    seed: int = 0
    answers: bool = True
    max_new_tokens: int = 48
    positions: Literal["original", "contiguous"] = "original"
    layer: int = 0
    repeats: int = 1
    batch_size: int = 1
