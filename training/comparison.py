"""Validation of a ranking: the deterministic top-K against training-free ones, by one reconstructor.

Training sees noisy masks, which can look fine while the ranking behind them is upside down. So what is measured here
is what inference will do: the highest scores survive, no noise. The lower the error of the dropped tokens, the better.

Shapes: B tiles, N patches, D encoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from selector.budget import Budget
from selector.errors import RankingError as RankingError
from selector.methods.gumbel import GumbelSelector
from selector.methods.norm import Norm
from selector.methods.svd_prune import SVDPrune
from selector.methods.uniform import Uniform
from selector.tokens import VisualTokens
from training.autoencoder import Reconstructor
from training.losses import dropped_mean, token_error
from training.schedules import gumbel_top_k

RIVALS = {"leverage": lambda: SVDPrune(matrix="tile"), "norm": lambda: Norm(largest=False), "uniform": Uniform}
RANKERS = ("learned", "random", *RIVALS)


class RankingComparison(nn.Module):
    """Meters of a validation: `rec_RANKER_PERCENT`, their means `rec_RANKER`, and what else tells a ranking's health.

    Args:
        shares: shares of a tile's tokens that are kept, each in (0, 1).
    """

    def __init__(self, shares: Sequence[float]):
        super().__init__()
        self.shares = tuple(shares)
        percents = [percent(share) for share in shares]
        self.names = [
            *(
                f"{what}_{at}"
                for what in (*(f"rec_{r}" for r in RANKERS), "cos_learned", "agreement")
                for at in percents
            ),
            *(f"rec_{ranker}" for ranker in RANKERS),
            "keep_drawn",
        ]
        self.meters = nn.ModuleDict({_key(name): MeanMetric() for name in self.names})
        self.rivals = nn.ModuleDict({name: make() for name, make in RIVALS.items()})

    def measure(
        self,
        selector: GumbelSelector,
        reconstructor: Reconstructor,
        tokens: VisualTokens,
        noise: Callable[[int], torch.Generator],
    ) -> Iterator[tuple[str, MeanMetric]]:
        """Updates every meter with a batch; yields (name, meter), for the logger. `noise(i)` is a seeded generator."""
        features = tokens.features
        target = selector.normalized(features)
        scores = {
            "learned": selector.score(tokens).float(),
            "random": torch.rand(features.shape[:2], generator=noise(0)).to(features),
        }
        for share in self.shares:
            budget, at = Budget(share, newlines="none"), percent(share)
            for ranker in RANKERS:
                rival = ranker in RIVALS
                mask = self.rivals[ranker](tokens, budget) if rival else budget.select(scores[ranker], tokens)
                mask = mask.float()
                rebuilt = reconstructor(target, mask).float()
                error = dropped_mean(token_error(rebuilt, target), mask)
                self._meter(f"rec_{ranker}").update(error, len(features))
                yield self._update(f"rec_{ranker}_{at}", error, len(features))
                if ranker == "learned":
                    cosine = dropped_mean(F.cosine_similarity(rebuilt, target.float(), dim=-1), mask)
                    yield self._update(f"cos_learned_{at}", cosine, len(features))
            yield self._update(f"agreement_{at}", _agreement(scores["learned"], share, noise), len(features))
        yield self._update("keep_drawn", torch.sigmoid(scores["learned"]).mean(), len(features))
        for ranker in RANKERS:
            yield f"rec_{ranker}", self._meter(f"rec_{ranker}")

    def values(self) -> dict[str, float]:
        """What the meters say, by name."""
        return {name: float(self._meter(name).compute()) for name in self.names}

    def losses_to_random(self, seen: dict[str, float]) -> list[str]:
        """The shares at which the learned ranking lost, with both errors."""
        found = []
        for at in map(percent, self.shares):
            ours, theirs = seen[f"rec_learned_{at}"], seen[f"rec_random_{at}"]
            if ours > theirs:
                found.append(f"{at}% kept (learned {ours:.4g}, random {theirs:.4g})")
        return found

    def _meter(self, name: str) -> MeanMetric:
        return cast("MeanMetric", self.meters[_key(name)])

    def _update(self, name: str, value: Tensor, weight: int) -> tuple[str, MeanMetric]:
        meter = self._meter(name)
        meter.update(value, weight)
        return name, meter


def _agreement(
    scores: Float[Tensor, "B N"], share: float, noise: Callable[[int], torch.Generator]
) -> Float[Tensor, ""]:
    """Share of kept tokens that two masks drawn with different noise have in common."""
    keep = max(1, round(share * scores.shape[1]))
    first, second = (gumbel_top_k(scores, keep, 1.0, noise(draw)) for draw in (1, 2))
    return (first * second).sum() / first.sum()


def percent(share: float) -> str:
    return f"{100 * share:g}"


def _key(name: str) -> str:
    return name.replace(".", "_")  # a module's name holds no dot
