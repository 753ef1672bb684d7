"""Consistency and answer metrics as torchmetrics: batch by batch, over processes, in any training or evaluation loop.

Every meter sums what a pure function of `selector.measure.metrics` or `selector.measure.consistency` gives for a
sample, so that a reduction over processes is a sum, and the result that of one process over all samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from selector.measure.consistency import answer_nll, divergences, spectrum, spectrum_shift
from selector.measure.metrics import anls, exact_match, flip
from selector.records import FLIPS


class _Means(Metric):
    """Means of named figures over samples."""

    full_state_update = False
    names: tuple[str, ...] = ()
    sums: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, *values: float | int) -> None:
        self.sums += torch.tensor(values, dtype=torch.float64, device=self.sums.device)
        self.count += 1

    def compute(self) -> dict[str, Tensor]:
        if self.count == 0:
            raise ValueError(f"{type(self).__name__} has no sample to take a mean of")
        return dict(zip(self.names, (self.sums / self.count).unbind(), strict=True))


class Agreement(_Means):
    """Share of pruned answers that are the unpruned model's, word for word."""

    names = ("agreement",)

    def update(self, pruned: Sequence[str], full: Sequence[str]) -> None:
        for ours, theirs in zip(pruned, full, strict=True):
            self._add(ours == theirs)


class Flips(_Means):
    """Shares of answers by how selection changed them: see `selector.measure.metrics.flip`."""

    names = FLIPS

    def update(self, pruned: Sequence[str], full: Sequence[str], target: Sequence[str]) -> None:
        for ours, theirs, right in zip(pruned, full, target, strict=True):
            kind = flip(exact_match(theirs, right), exact_match(ours, right), ours == theirs)
            self._add(*(name == kind for name in FLIPS))


class ANLS(_Means):
    """Mean normalised Levenshtein similarity with the right answers."""

    names = ("anls",)

    def update(self, prediction: Sequence[str], target: Sequence[str]) -> None:
        for said, right in zip(prediction, target, strict=True):
            self._add(anls(said, right))


class Divergence(_Means):
    """KL(full ‖ pruned) and Jensen-Shannon, in nats: of the first answer token, and a mean over the whole answer.

    One sample an update: logits of the unpruned model's answer ``[A, V]`` under both models, teacher-forced.
    """

    names = ("first_token_kl", "first_token_js", "forced_kl", "forced_js")

    def update(self, full: Float[Tensor, "A V"], pruned: Float[Tensor, "A V"]) -> None:
        self._add(*divergences(full[:1], pruned[:1]), *divergences(full, pruned))


class NLLShift(_Means):
    """What the unpruned model's own answer loses, in nats a token. One sample an update, as `Divergence`."""

    names = ("nll_shift",)

    def update(self, full: Float[Tensor, "A V"], pruned: Float[Tensor, "A V"], answer: Int[Tensor, "A"]) -> None:
        self._add(answer_nll(pruned, answer) - answer_nll(full, answer))


class SpectrumShift(_Means):
    """ΔIPR, Δ effective rank and the shift of the energy distribution of visual tokens at one layer, one sample."""

    names = ("ipr_shift", "rank_shift", "energy_shift")

    def update(self, full: Float[Tensor, "L d"], pruned: Float[Tensor, "K d"]) -> None:
        shift = spectrum_shift(spectrum(full), spectrum(pruned))
        self._add(*(shift[name] for name in self.names))
