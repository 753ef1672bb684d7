"""Validation of a ranking: the deterministic top-K against training-free ones.

Training sees noisy masks, which can look fine while the ranking behind them is upside down. So validation measures what
inference will do: the highest scores survive, without noise. Rankings are judged by one reconstructor for all of them
(the error of the dropped tokens), or by the frozen model's answers (the divergence from its answers with all tokens).
Lower is better in both.

Shapes: B tiles, N patches per tile, C channels of the table, L packed slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from selector.base import ScoreSelector
from selector.budget import Budget
from selector.errors import RankingError as RankingError
from selector.methods.norm import Norm
from selector.methods.ridge_leverage import RidgeLeverage
from selector.methods.svd_prune import SVDPrune
from selector.methods.uniform import Uniform
from selector.table import TableSelector
from selector.tokens import VisualTokens
from training.autoencoder import Reconstructor
from training.losses import dropped_mean, token_error
from training.objectives import Step
from training.schedules import gumbel_top_k

RIVALS = {"leverage": lambda: SVDPrune(matrix="tile"), "norm": lambda: Norm(largest=False), "uniform": Uniform}
"""Training-free rankings of the patches of a tile."""
RANKERS = ("learned", "random", *RIVALS)
ANSWER_RIVALS = {"leverage": RidgeLeverage}
"""The same of all patches of an image; one only, since each costs a pass of the language model per budget."""
ANSWER_RANKERS = ("learned", "random", *ANSWER_RIVALS)


class RankingComparison(nn.Module):
    """Meters of a validation by reconstruction.

    `rec_RANKER_PERCENT` is the error of the dropped tokens in units of the features' variance, `rec_RANKER` its mean
    over the shares. Three more show whether a ranking is healthy: `cos_learned_PERCENT`, the cosine of rebuilt and
    true tokens; `agreement_PERCENT`, the share of kept tokens that two noisy draws have in common; and `keep_drawn`,
    the mean probability of a token to be kept when each is drawn by itself.

    Args:
        shares: shares of a tile's tokens that are kept, each in (0, 1).

    >>> RankingComparison([0.25]).names[:3]
    ['rec_learned_25', 'rec_random_25', 'rec_leverage_25']
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

        # Weighted means, which Lightning averages over processes; modules, so that they move to the device.
        self.meters = nn.ModuleDict({_key(name): MeanMetric() for name in self.names})
        self.rivals = nn.ModuleDict({name: make() for name, make in RIVALS.items()})

    def measure(
        self,
        selector: TableSelector,
        reconstructor: Reconstructor,
        tokens: VisualTokens,
        noise: Callable[[int], torch.Generator],
    ) -> Iterator[tuple[str, MeanMetric]]:
        """Updates every meter with a batch of tiles.

        Args:
            selector: the one that is trained.
            reconstructor: rebuilds the dropped tokens for all rankings alike.
            tokens: B tiles.
            noise: `noise(i)` is the seeded generator of draw i, the same for every run of a validation.

        Yields:
            (name, meter), for the logger.
        """
        features = tokens.features
        target = selector.table(tokens)
        tiles = VisualTokens.from_features(features, tokens.grid)  # every tile has the same budget
        scores = {
            "learned": selector.score(tokens).float(),
            "random": torch.rand(features.shape[:2], generator=noise(0)).to(features),
        }

        for share in self.shares:
            # Newline tokens are no part of a reconstruction.
            budget, at = Budget(share, newlines="none"), percent(share)

            # Every ranking by the same reconstructor: only then do the errors compare rankings.
            for ranker in RANKERS:
                rival = ranker in RIVALS
                mask = self.rivals[ranker](tiles, budget) if rival else budget.select(scores[ranker], tiles)
                mask = mask.float()
                rebuilt = reconstructor(target, mask).float()
                error = dropped_mean(token_error(rebuilt, target), mask)
                self._meter(f"rec_{ranker}").update(error, len(features))
                yield self._update(f"rec_{ranker}_{at}", error, len(features))
                if ranker == "learned":
                    cosine = dropped_mean(F.cosine_similarity(rebuilt, target.float(), dim=-1), mask)
                    yield self._update(f"cos_learned_{at}", cosine, len(features))

            # Agreement near the share itself means that the noise decides, not the scores.
            yield self._update(f"agreement_{at}", _agreement(scores["learned"], share, noise), len(features))

        # The means come last, when every share is in them.
        yield self._update("keep_drawn", torch.sigmoid(scores["learned"]).mean(), len(features))
        for ranker in RANKERS:
            yield f"rec_{ranker}", self._meter(f"rec_{ranker}")

    def values(self) -> dict[str, float]:
        """What the meters say, by name."""
        return {name: float(self._meter(name).compute()) for name in self.names}

    def criterion(self, seen: dict[str, float]) -> float:
        """What checkpoints are chosen by: the learned ranking's mean error."""
        return seen["rec_learned"]

    def losses_to_random(self, seen: dict[str, float]) -> list[str]:
        """The shares at which the learned ranking lost, with both errors; empty where it won everywhere."""
        lost = []
        for at in map(percent, self.shares):
            ours, theirs = seen[f"rec_learned_{at}"], seen[f"rec_random_{at}"]
            if ours > theirs:
                lost.append(f"{at}% kept (learned {ours:.4g}, random {theirs:.4g})")
        return lost

    def _meter(self, name: str) -> MeanMetric:
        return cast("MeanMetric", self.meters[_key(name)])

    def _update(self, name: str, value: Tensor, weight: int) -> tuple[str, MeanMetric]:
        meter = self._meter(name)
        meter.update(value, weight)
        return name, meter


class AnswerComparison(nn.Module):
    """Meters of a validation by answers.

    `kl_RANKER_PERCENT` is the divergence from the model with all tokens, in nats per token of the answer, and
    `same_RANKER_PERCENT` the share of answers that stay the same, token by token; `kl_RANKER` and `same_RANKER` are
    their means over the shares. Every question counts once, and an image's tokens are ranked together as in a
    comparison: the budget is a share of all its visual tokens, newlines included.

    Args:
        shares: shares of an image's tokens that are kept, each in (0, 1).

    >>> AnswerComparison([0.25]).names[:3]
    ['kl_learned_25', 'kl_random_25', 'kl_leverage_25']
    """

    def __init__(self, shares: Sequence[float]):
        super().__init__()
        self.shares = tuple(shares)
        self.names = [f"{what}_{r}_{percent(at)}" for what in ("kl", "same") for r in ANSWER_RANKERS for at in shares]
        self.names += [f"{what}_{r}" for what in ("kl", "same") for r in ANSWER_RANKERS]

        self.meters = nn.ModuleDict({_key(name): MeanMetric() for name in self.names})
        self.rivals = nn.ModuleDict({name: make() for name, make in ANSWER_RIVALS.items()})

    def measure(self, step: Step, noise: Callable[[int], torch.Generator]) -> Iterator[tuple[str, MeanMetric]]:
        """Updates every meter with the questions about one image.

        Args:
            step: the image, its questions, and the selector that is trained.
            noise: `noise(i)` is the seeded generator of draw i.

        Yields:
            (name, meter), for the logger.
        """
        tokens, learned = step.tokens, step.slot_scores.detach()
        language, taught, encoded = step.asked()
        questions = list(range(len(taught.log_probs)))

        # Scores of the tiles, and the questions that they are for.
        rankings: dict[str, list[tuple[Tensor, list[int]]]] = {
            # One per question where the selector reads it, else one for all.
            "learned": [(tokens.unpacked(row[None]), [i]) for i, row in enumerate(learned)]
            if len(learned) > 1
            else [(tokens.unpacked(learned), questions)],
            "random": [(torch.rand(tokens.valid.shape, generator=noise(0)).to(learned), questions)],
        }

        for share in self.shares:
            budget = Budget(share)

            # One pruned pass of the language model per ranking; its questions are branches of that pass.
            for ranker in ANSWER_RANKERS:
                passes = rankings.get(ranker)
                if passes is None:
                    passes = [(cast("ScoreSelector", self.rivals[ranker]).score(tokens), questions)]
                for scores, asked in passes:
                    keep = budget.select(scores, tokens)[0]
                    said = language.answer_log_probs(encoded, taught.conversation, asked, keep=keep)

                    # KL from the unpruned model, and whether greedy decoding would give the same tokens.
                    for index, logs in zip(asked, said, strict=True):
                        truth = taught.log_probs[index]
                        divergence = (truth.exp() * (truth - logs)).sum(-1).mean()
                        same = (truth.argmax(-1) == logs.argmax(-1)).all().float()
                        yield from self._update(ranker, share, divergence, same)

    def values(self) -> dict[str, float]:
        """What the meters say, by name."""
        return {name: float(cast("MeanMetric", self.meters[_key(name)]).compute()) for name in self.names}

    def criterion(self, seen: dict[str, float]) -> float:
        """What checkpoints are chosen by: the learned ranking's mean divergence."""
        return seen["kl_learned"]

    def losses_to_random(self, seen: dict[str, float]) -> list[str]:
        """The shares at which the learned ranking lost, with both divergences; empty where it won everywhere."""
        return [
            f"{at}% kept (KL learned {ours:.4g}, random {theirs:.4g})"
            for at in map(percent, self.shares)
            if (ours := seen[f"kl_learned_{at}"]) > (theirs := seen[f"kl_random_{at}"])
        ]

    def _update(
        self, ranker: str, share: float, divergence: Float[Tensor, ""], same: Float[Tensor, ""]
    ) -> Iterator[tuple[str, MeanMetric]]:
        for what, value in (("kl", divergence), ("same", same)):
            for name in (f"{what}_{ranker}_{percent(share)}", f"{what}_{ranker}"):
                meter = cast("MeanMetric", self.meters[_key(name)])
                meter.update(value)
                yield name, meter


def _agreement(
    scores: Float[Tensor, "B N"], share: float, noise: Callable[[int], torch.Generator]
) -> Float[Tensor, ""]:
    """Share of kept tokens that two masks have in common when they are drawn with different noise, at temperature 1."""
    keep = max(1, round(share * scores.shape[1]))
    first, second = (gumbel_top_k(scores, keep, 1.0, noise(draw)) for draw in (1, 2))
    return (first * second).sum() / first.sum()


def percent(share: float) -> str:
    """A share as the meters' names have it.

    >>> percent(0.125)
    '12.5'
    """
    return f"{100 * share:g}"


def _key(name: str) -> str:
    return name.replace(".", "_")  # a module's name holds no dot
