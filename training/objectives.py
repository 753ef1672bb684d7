"""What a selector is trained for. Objectives are objects; a run may add up several, each with its weight.

By reconstruction, without a language model ("When Less is Enough", arXiv 2503.16660: keep what the other tokens cannot
reconstruct):

    Paper            Gumbel-Softmax masks, straight-through; ``||F_rec - F||^2 + max(mean(M), p)``
    StraightThrough  one ranking for every budget: Gumbel masks of a sampled, exact size, straight-through
    SampledBudget    the same masks, but the score is regressed onto the log error of each dropped token

By the answers of the frozen model (`training.answers`): `Answers`, `AnswerSaliency`.

A ranking can come out upside down (blank patches kept, text dropped) where the threshold of the straight-through top-k
is not part of the graph: then every score is only ever pushed up, all rise together, their spread vanishes, and no
ranking is left. With the threshold in the graph (`schedules.gumbel_top_k`) the gradient sums to zero over a tile.

On the encoder's features `SampledBudget` loses to leverage where little is kept, for another reason: the tokens that
are hardest to rebuild, decorative texture among them, are not those from which the rest can be rebuilt. On projected
tokens it does not lose (`configs/ablation/reconstruction.json`).

Shapes: B tiles, N patches per tile, C channels of the table, R rankings of one image, L packed slots; masks are 1 where
a token is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from selector.methods.gumbel import GumbelSelector
from selector.methods.image_transformer import ImageTransformer
from selector.models import Encoded
from selector.table import TableSelector
from selector.tokens import VisualTokens
from training.autoencoder import Reconstructor
from training.language import FrozenLanguageModel
from training.losses import drop_error_regression, dropped_mean, paper_loss, token_error
from training.schedules import gumbel_top_k, random_mask, sampled_keep, temperature
from training.teacher import Taught
from training.throughput import Timed, untimed


class Loss(NamedTuple):
    """A scalar with its graph, and what to log.

    Attributes:
        value: before the objective's weight.
        logs: detached scalars by name.

    >>> Loss(torch.tensor(0.5), {"rec": torch.tensor(0.25)})._asdict()
    {'value': tensor(0.5000), 'logs': {'rec': tensor(0.2500)}}
    """

    value: Float[Tensor, ""]
    logs: dict[str, Tensor]


@dataclass
class Step:
    """What an objective is given: the tokens of some images, and what there is to learn from them.

    Attributes:
        tokens: visual tokens of a batch of tiles, or of one image with questions.
        selector: the one that is trained.
        progress: share of the training that is done, in [0, 1); 1 in validation.
        generator: draws all noise of this step.
        reconstructor: rebuilds dropped tokens; None where no objective needs it.
        language: the frozen language model; None where no objective asks questions.
        taught: the questions about the image and the model's answers; None without questions.
        encoded: the image as the language model gets it; None without questions.
        timed: brackets the parts of the step for the table of `training.throughput`.

    Scores and inputs are computed once, however many objectives read them.

    >>> tokens = VisualTokens.from_features(torch.randn(2, 16, 8), grid=(4, 4))
    >>> step = Step(tokens, GumbelSelector(8, 16), 0.0, torch.Generator(), Reconstructor(8, 16))
    >>> sorted(SampledBudget()(step).logs)
    ['keep', 'rank', 'rec']
    """

    tokens: VisualTokens
    selector: TableSelector
    progress: float
    generator: torch.Generator
    reconstructor: Reconstructor | None = None
    language: FrozenLanguageModel | None = None
    taught: Taught | None = None
    encoded: Encoded | None = None
    timed: Timed = untimed

    @cached_property
    def scores(self) -> Float[Tensor, "B N"]:
        """The selector's scores ``[B, N]``, in float32."""
        with self.timed("selector", self.patches):
            return self.selector.score(self.tokens).float()

    @property
    def patches(self) -> int:
        """Patches of all tiles of the step, in which its parts are timed."""
        return self.tokens.features.shape[0] * self.tokens.features.shape[1]

    @cached_property
    def slot_scores(self) -> Float[Tensor, "R L"]:
        """Scores ``[R, L]`` of the packed slots of one image: one row, or one per question if the selector reads it."""
        if not reads_question(self.selector):
            return self.tokens.packed(self.scores, 0.0)  # newlines have no score of their own
        with self.timed("selector", self.patches):
            return _scores_per_question(self)

    def asked(self) -> tuple[FrozenLanguageModel, Taught, Encoded]:
        """The language model, the questions with its answers, and the encoded image.

        Raises:
            ValueError: this step has no questions.
        """
        if self.language is None or self.taught is None or self.encoded is None:
            raise ValueError("this objective needs questions: an encoder with a language model, and data that asks")
        return self.language, self.taught, self.encoded

    @cached_property
    def table(self) -> Float[Tensor, "B N C"]:
        """What the selector reads and the reconstructor rebuilds: ``[B, N, C]``, normalised per channel."""
        return self.selector.table(self.tokens)

    def error(self, mask: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """Error ``[B, N]`` with which each token is rebuilt from those that the mask ``[B, N]`` keeps.

        Raises:
            ValueError: this step has no reconstructor.
        """
        if self.reconstructor is None:
            raise ValueError("this objective needs a reconstructor, and the step has none")
        with self.timed("reconstructor", self.patches):
            rebuilt = self.reconstructor(self.table, mask)
        return token_error(rebuilt, self.table)


def reads_question(selector: object) -> bool:
    """Whether a selector ranks the tokens anew for each question."""
    return isinstance(selector, ImageTransformer) and selector.question_dim is not None


def _scores_per_question(step: Step) -> Float[Tensor, "R L"]:
    """One row of scores per question, in a single pass of the selector."""
    assert isinstance(step.selector, ImageTransformer)  # for the type checker: the only one that reads a question
    language, taught, _ = step.asked()

    # Questions differ in length: padded at their end, and masked.
    prompts = [branch.prompt for branch in taught.conversation.branches]
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    mask = torch.arange(ids.shape[1], device=ids.device) < ids.new_tensor([len(p) for p in prompts])[:, None]

    # The embeddings that inference gives the selector, see `VisualTokens.question`.
    with torch.no_grad():
        question = language.model.get_input_embeddings()(ids).float().masked_fill(~mask[..., None], 0)

    scores = step.selector.scores_per_question(step.tokens, question, mask).float()
    return torch.cat([step.tokens.packed(row, 0.0) for row in scores])


class Objective(ABC):
    """One term of the loss.

    Args:
        weight: factor of this term, positive.

    Attributes:
        reconstructs: True when it needs the reconstructor.
        asks: True when it needs questions and the frozen language model.

    Raises:
        ValueError: a weight that is not positive.

    >>> class Spread(Objective):
    ...     def __call__(self, step):
    ...         spread = step.scores.std()
    ...         return Loss(-spread, {"spread": spread.detach()})
    >>> tokens = VisualTokens.from_features(torch.randn(2, 16, 8))
    >>> Spread(weight=0.1)(Step(tokens, GumbelSelector(8, 16), 0.0, torch.Generator())).logs.keys()
    dict_keys(['spread'])
    """

    reconstructs: bool = False
    asks: bool = False

    def __init__(self, weight: float = 1.0):
        if not weight > 0:
            raise ValueError(f"weight of {type(self).__name__} must be positive, got {weight}")
        self.weight = weight

    @abstractmethod
    def __call__(self, step: Step) -> Loss:
        """The loss of a step, before the weight."""


class _Reconstruction(Objective):
    """Base of the three: sampled budgets, noise, and random masks at the start. Arguments: see `SampledBudget`."""

    reconstructs = True
    threshold_gradient = True

    def __init__(
        self,
        weight: float = 1.0,
        kept_range: tuple[float, float] = (0.05, 0.75),
        random_share: float = 0.5,
        temperature_start: float = 1.0,
        temperature_end: float = 0.5,
    ):
        super().__init__(weight)
        check_range("kept_range", kept_range)
        if not 0 <= random_share <= 1:
            raise ValueError(f"random_share must be in [0, 1], got {random_share}")
        check_temperatures(temperature_start, temperature_end)
        self.kept_range, self.random_share = kept_range, random_share
        self.temperature_start, self.temperature_end = temperature_start, temperature_end

    def at_random(self, step: Step) -> bool:
        """Whether this step's masks are uniformly random."""
        return step.progress < self.random_share

    def temperature(self, step: Step) -> float:
        """The temperature of this step's noise."""
        return temperature(step.progress, self.temperature_start, self.temperature_end)

    def random(self, step: Step) -> Float[Tensor, "B N"]:
        """A uniformly random mask of a sampled size."""
        batch, patches = step.scores.shape
        keep = sampled_keep(patches, self.kept_range, step.generator)

        # Zero times the scores keeps the selector in the graph: DDP waits for the gradient of every parameter.
        return random_mask(batch, patches, keep, step.generator).to(step.scores) + 0 * step.scores.sum()

    def drawn(self, step: Step) -> Float[Tensor, "B N"]:
        """A mask of a sampled size by noisy scores, straight-through."""
        keep = sampled_keep(step.scores.shape[1], self.kept_range, step.generator)
        return gumbel_top_k(step.scores, keep, self.temperature(step), step.generator, self.threshold_gradient)


class SampledBudget(_Reconstruction):
    """Regresses a token's score onto the log error with which it is rebuilt when dropped, under masks of all sizes.

    Args:
        weight: factor of this term.
        kept_range: smallest and largest share of a tile kept in a step, each in (0, 1).
        random_share: share of the training, from its start, whose masks are uniformly random, so that the reconstructor
            is good before its errors count; after it the selector draws the masks.
        temperature_start, temperature_end: temperature of the noise, geometric in between.

    >>> tokens = VisualTokens.from_features(torch.randn(2, 16, 8))
    >>> step = Step(tokens, GumbelSelector(8, 16), 0.9, torch.Generator(), Reconstructor(8, 16))
    >>> SampledBudget(kept_range=(0.25, 0.25))(step).logs["keep"]  # 4 of 16, exactly
    tensor(0.2500)
    """

    def __call__(self, step: Step) -> Loss:
        # No gradient through the mask: the score learns from the regression alone.
        mask = (self.random(step) if self.at_random(step) else self.drawn(step)).detach()
        error = step.error(mask)

        # The first term trains the reconstructor, the second the selector.
        rebuild, rank = dropped_mean(error, mask), drop_error_regression(step.scores, error, mask)
        return Loss(rebuild + rank, {"rec": rebuild.detach(), "rank": rank.detach(), "keep": mask.mean()})


class StraightThrough(_Reconstruction):
    """Mean error over all tokens under straight-through masks of all sizes.

    Args:
        threshold_gradient: keep the threshold of the masks in the graph. False is there to demonstrate the trap, not to
            be used: the ranking can come out upside down (`configs/ablation/upside-down.yaml`).
        weight, kept_range, random_share, temperature_start, temperature_end: as for `SampledBudget`.

    >>> tokens, selector = VisualTokens.from_features(torch.randn(2, 16, 8)), GumbelSelector(8, 16)
    >>> step = Step(tokens, selector, 0.9, torch.Generator(), Reconstructor(8, 16))
    >>> (slopes,) = torch.autograd.grad(StraightThrough()(step).value, step.scores)
    >>> slopes.shape, slopes.sum(1).abs().max() < 1e-4  # no reward for raising all scores together
    (torch.Size([2, 16]), tensor(True))
    """

    def __init__(
        self,
        weight: float = 1.0,
        threshold_gradient: bool = True,
        kept_range: tuple[float, float] = (0.05, 0.75),
        random_share: float = 0.5,
        temperature_start: float = 1.0,
        temperature_end: float = 0.5,
    ):
        super().__init__(weight, kept_range, random_share, temperature_start, temperature_end)
        self.threshold_gradient = threshold_gradient

    def __call__(self, step: Step) -> Loss:
        mask = self.random(step) if self.at_random(step) else self.drawn(step)
        error = step.error(mask)

        # Over all tokens, as in the paper; what is logged is of dropped tokens alone, comparable between objectives.
        return Loss(error.mean(), {"rec": dropped_mean(error, mask).detach(), "keep": mask.detach().mean()})


class Paper(_Reconstruction):
    """The paper's: Gumbel-Softmax masks, each token by itself, and a clamp on their mean.

    Args:
        proportion: p of the clamp, the wanted share of kept tokens, in (0, 1].
        regularizer: weight of the clamp; the paper leaves the norm's scale, and so this weight, open.
        weight, kept_range, random_share, temperature_start, temperature_end: as for `SampledBudget`; `kept_range` is
            that of the random masks at the start only.

    >>> tokens = VisualTokens.from_features(torch.randn(2, 16, 8))
    >>> step = Step(tokens, GumbelSelector(8, 16), 0.9, torch.Generator(), Reconstructor(8, 16))
    >>> loss, logs = Paper(proportion=0.3)(step)
    >>> sorted(logs), bool(loss > 0.3)  # the clamp alone costs p
    (['keep', 'rec'], True)
    """

    def __init__(
        self,
        weight: float = 1.0,
        proportion: float = 0.3,
        regularizer: float = 1.0,
        kept_range: tuple[float, float] = (0.05, 0.75),
        random_share: float = 0.5,
        temperature_start: float = 1.0,
        temperature_end: float = 0.5,
    ):
        super().__init__(weight, kept_range, random_share, temperature_start, temperature_end)
        if not 0 < proportion <= 1:
            raise ValueError(f"proportion must be in (0, 1], got {proportion}")
        self.proportion, self.regularizer = proportion, regularizer

    def __call__(self, step: Step) -> Loss:
        mask = self.random(step) if self.at_random(step) else self._sampled(step)
        error = step.error(mask)
        loss = paper_loss(error, mask, self.proportion, self.regularizer)
        return Loss(loss, {"rec": dropped_mean(error, mask.detach()).detach(), "keep": mask.detach().mean()})

    def _sampled(self, step: Step) -> Float[Tensor, "B N"]:
        """Masks by the selector's own Gumbel-Softmax, of any size."""
        if not isinstance(step.selector, GumbelSelector):
            raise ValueError(f"Paper draws masks from a GumbelSelector, got a {type(step.selector).__name__}")

        # `gumbel_softmax` draws from the global generator only: seeded for this draw, and put back afterwards.
        # Of the features: asking the scores for theirs would compute them, and a mask drawn here does not need them.
        device = step.tokens.features.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**31, (), generator=step.generator)))
            with step.timed("selector", step.patches):
                return step.selector.sample(step.table, self.temperature(step))[0]


def check_range(name: str, shares: tuple[float, float]) -> None:
    """Raises ValueError unless these are shares in (0, 1), the smaller first."""
    if not 0 < shares[0] <= shares[1] < 1:
        raise ValueError(f"{name} must be 0 < smallest <= largest < 1, got {shares}")


def check_temperatures(start: float, end: float) -> None:
    """Raises ValueError unless the temperature falls and stays positive."""
    if not 0 < end <= start:
        raise ValueError(f"temperature_end must be in (0, temperature_start], got {end} and {start}")
