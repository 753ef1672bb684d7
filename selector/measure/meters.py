"""Consistency and answer metrics for torchmetrics: batch by batch and over processes, in any loop.

Every meter sums what a pure function of `selector.measure.metrics` or `selector.measure.consistency` gives for each
sample. A reduction over processes is then a sum, and the result equals that of one process over all samples.
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
    """Means of named figures over samples; subclasses name them in `names`, in the order of the values they add."""

    full_state_update = False
    names: tuple[str, ...] = ()
    sums: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Sums, not running means: they add up over processes, however many samples each has seen.
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, *values: float | int) -> None:
        self.sums += torch.tensor(values, dtype=torch.float64, device=self.sums.device)
        self.count += 1

    def compute(self) -> dict[str, Tensor]:
        """The means so far, by name.

        Raises:
            ValueError: no sample yet.
        """
        if self.count == 0:
            raise ValueError(f"{type(self).__name__} has no sample to take a mean of")
        return dict(zip(self.names, (self.sums / self.count).unbind(), strict=True))


class Agreement(_Means):
    """Share of pruned answers that are the unpruned model's, word for word.

    Example:
        >>> meter = Agreement()
        >>> meter.update(pruned=["red", "two"], full=["red", "three"])
        >>> meter.compute()["agreement"].item()
        0.5
    """

    names = ("agreement",)

    def update(self, pruned: Sequence[str], full: Sequence[str]) -> None:
        """Adds a batch: the answers of the pruned and of the unpruned model to the same questions."""
        for ours, theirs in zip(pruned, full, strict=True):
            self._add(ours == theirs)


class Flips(_Means):
    """Shares of answers by how selection changed them: see `selector.measure.metrics.flip`.

    Example:
        >>> meter = Flips()
        >>> meter.update(pruned=["red", "two"], full=["red", "three"], target=["red", "three"])
        >>> meter.compute()["right_to_wrong"].item()
        0.5
    """

    names = FLIPS

    def update(self, pruned: Sequence[str], full: Sequence[str], target: Sequence[str]) -> None:
        """Adds a batch: answers of both models to the same questions, and the right ones."""
        for ours, theirs, right in zip(pruned, full, target, strict=True):
            kind = flip(exact_match(theirs, right), exact_match(ours, right), ours == theirs)
            self._add(*(name == kind for name in FLIPS))


class ANLS(_Means):
    """Mean normalised Levenshtein similarity with the right answers.

    Example:
        >>> meter = ANLS()
        >>> meter.update(prediction=["invoice 12", "no"], target=["invoice 17", "no"])
        >>> round(meter.compute()["anls"].item(), 2)
        0.95
    """

    names = ("anls",)

    def update(self, prediction: Sequence[str], target: Sequence[str]) -> None:
        """Adds a batch: answers, and the right ones to the same questions."""
        for ours, right in zip(prediction, target, strict=True):
            self._add(anls(ours, right))


class Divergence(_Means):
    """KL(full ‖ pruned) and Jensen-Shannon, in nats: of the first answer token, and a mean over the whole answer.

    Example:
        >>> import torch
        >>> meter = Divergence()
        >>> meter.update(full=torch.zeros(3, 10), pruned=torch.zeros(3, 10))  # an answer of 3 tokens
        >>> meter.compute()["forced_kl"].item()
        0.0
    """

    names = ("first_token_kl", "first_token_js", "forced_kl", "forced_js")

    def update(self, full: Float[Tensor, "A V"], pruned: Float[Tensor, "A V"]) -> None:
        """Adds one sample: logits of the unpruned model's answer under both models, teacher-forced."""
        # The first token is apart: both models predict it from the prompt alone.
        self._add(*divergences(full[:1], pruned[:1]), *divergences(full, pruned))


class NLLShift(_Means):
    """Increase of the NLL of the unpruned model's own answer under the pruned model, in nats per token.

    Example:
        >>> import torch
        >>> meter = NLLShift()
        >>> meter.update(torch.zeros(3, 10), torch.zeros(3, 10), answer=torch.tensor([4, 2, 0]))
        >>> meter.compute()["nll_shift"].item()
        0.0
    """

    names = ("nll_shift",)

    def update(self, full: Float[Tensor, "A V"], pruned: Float[Tensor, "A V"], answer: Int[Tensor, "A"]) -> None:
        """Adds one sample: teacher-forced logits under both models, and the ids of the unpruned model's answer."""
        self._add(answer_nll(pruned, answer) - answer_nll(full, answer))


class SpectrumShift(_Means):
    """ΔIPR, Δ effective rank and the shift of the energy distribution of visual tokens at one layer.

    Example:
        >>> import torch
        >>> meter = SpectrumShift()
        >>> meter.update(full=torch.eye(4), pruned=torch.eye(4)[:2])  # 4 equal directions, then 2
        >>> round(meter.compute()["ipr_shift"].item(), 2)
        0.25
    """

    names = ("ipr_shift", "rank_shift", "energy_shift")

    def update(self, full: Float[Tensor, "L d"], pruned: Float[Tensor, "K d"]) -> None:
        """Adds one sample: the visual tokens of its image, all of them and those that were kept."""
        shift = spectrum_shift(spectrum(full), spectrum(pruned))
        self._add(*(shift[name] for name in self.names))
