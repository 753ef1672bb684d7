"""Objectives that learn from the frozen model's answers: keep what it needs to answer as it would with every token.

`Answers` distils: teacher and student are the same frozen model; the student's visual tokens are gated by the relaxed
choice of the selector (`training.gates`), and the loss is KL(teacher || student) along the answers. It needs neither
labels nor a reconstructor. `AnswerSaliency` is cheaper, since there is no student: one pass of the teacher shows how
much each token mattered for each answer, and the selector learns that. For a selector that reads the question it is a
dense target, which shows from the start which tokens the question is about.

Gates: ``attention`` adds log(g) to the attention to a visual key, in every layer; faint tokens are left out altogether,
so a student costs little more than a pruned model. ``noise`` replaces a token x by ``sqrt(g) x + sqrt(1 - g) e`` with
noise e of the tokens' own mean and spread (AutoSelect and DiffPrune, arXiv 2603.07135 and 2605.28051; no code of theirs
is public): no mask is needed, so any attention kernel works, but no token is ever left out of the student's pass.

Shapes: R rankings of one image, L packed slots, B branches (questions).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from training.gates import relaxed_budget
from training.objectives import Loss, Objective, Step, check_range, check_temperatures, reads_question
from training.schedules import sampled_keep, temperature

Gate = Literal["attention", "noise"]
SaliencyTarget = Literal["attention", "gradient"]


class Answers(Objective):
    """KL between the model's answers with all visual tokens and with gated ones.

    Args:
        weight: factor of this term.
        gate: ``"attention"`` or ``"noise"``, see above.
        kept_range: smallest and largest share of an image's tokens that a step keeps, newlines included, each in
            (0, 1); drawn log-uniformly in between.
        least: fewest tokens that a step keeps.
        temperature_start, temperature_end: temperature of the gates, geometric in between.
        cooled: share of the training, in [0, 1], after which the temperature has reached its end.
        students: questions per image and step whose answers are compared, for a selector that reads the question: it
            ranks anew for each question, so each costs a pass of its own. Any other selector compares all in one pass.
        begins: share of the training, in [0, 1], after which this term starts to count.

    Raises:
        ValueError: an argument outside its range.

    >>> Answers(kept_range=(0.05, 0.25), temperature_end=2.0)
    Traceback (most recent call last):
    ValueError: temperature_end must be in (0, temperature_start], got 2.0 and 1.0
    """

    asks = True

    def __init__(
        self,
        weight: float = 1.0,
        gate: Gate = "attention",
        kept_range: tuple[float, float] = (0.02, 0.4),
        least: int = 6,
        temperature_start: float = 1.0,
        temperature_end: float = 0.25,
        cooled: float = 0.8,
        students: int = 3,
        begins: float = 0.0,
    ):
        super().__init__(weight)
        if gate not in get_args(Gate):
            raise ValueError(f"gate must be one of {get_args(Gate)}, got {gate!r}")
        check_range("kept_range", kept_range)
        check_temperatures(temperature_start, temperature_end)
        for name, share in (("cooled", cooled), ("begins", begins)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share}")
        for name, number in (("least", least), ("students", students)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")

        self.gate: Gate = gate
        self.kept_range, self.least, self.students = kept_range, least, students
        self.temperature_start, self.temperature_end, self.cooled = temperature_start, temperature_end, cooled
        self.begins = begins

    def __call__(self, step: Step) -> Loss:
        scores = step.slot_scores
        if step.progress < self.begins:
            return Loss(0 * scores.sum(), {})  # in the graph all the same: DDP waits for every parameter's gradient

        count, length = len(step.asked()[1].log_probs), step.tokens.slots.shape[1]
        keep = self._count(length, step.generator)

        # Questions that share a ranking share a pass; otherwise a few are drawn, with a pass each.
        passes = [list(range(count))]
        if reads_question(step.selector):
            chosen = torch.randperm(count, generator=step.generator)[: self.students].tolist()
            passes = [[index] for index in chosen]
            scores = scores[chosen]

        # One row of gates per pass, and one loss per question.
        gates = relaxed_budget(scores, step.tokens, keep, self._temperature(step), step.generator)
        losses = [
            divergence
            for row, branches in zip(gates, passes, strict=True)
            for divergence in self._divergences(step, row, branches)
        ]
        loss = torch.stack(losses).mean()

        # Signs of health: gates should end near 0 and 1, and a spread that shrinks to 0 is a ranking that is lost.
        undecided = ((gates > 0.1) & (gates < 0.9)).float().mean()
        spread = scores.detach()[:, step.tokens.is_patch[0]].std()
        return Loss(loss, {"kl": loss.detach(), "undecided": undecided.detach(), "spread": spread})

    def _divergences(self, step: Step, gates: Float[Tensor, "L"], branches: list[int]) -> list[Float[Tensor, ""]]:
        """KL(teacher || student) of every branch in nats, averaged over the tokens of its answer."""
        language, taught, encoded = step.asked()
        noise = step.generator if self.gate == "noise" else None
        with step.timed("student", step.patches):
            student = language.answer_log_probs(encoded, taught.conversation, branches, gates=gates, noise=noise)
        truths = [taught.log_probs[index] for index in branches]
        return [(truth.exp() * (truth - logs)).sum(-1).mean() for truth, logs in zip(truths, student, strict=True)]

    def _count(self, length: int, generator: torch.Generator) -> int:
        """How many of the image's tokens stay in this step."""
        keep = max(self.least, sampled_keep(length, self.kept_range, generator))
        return min(keep, length - 1)  # all of them would teach nothing

    def _temperature(self, step: Step) -> float:
        progress = step.progress / self.cooled if self.cooled else 1.0
        return temperature(progress, self.temperature_start, self.temperature_end)


class AnswerSaliency(Objective):
    """Cross-entropy between the selector's scores and how much each token mattered to the teacher's answers.

    Args:
        weight: factor of this term at the start.
        target: ``"attention"``: what the answer's tokens look at, mean over layers and heads of the squared attention,
            renormalised to the image; ``"gradient"``: absolute gradient of the answer's log-probability with respect
            to the attention to each token (one backward pass per question).
        fades: share of the training, in (0, 1], at which the weight has fallen linearly to zero; None: it stays.

    Raises:
        ValueError: an argument outside its range.

    >>> AnswerSaliency(target="gradient").looks
    False
    """

    asks = True

    @property
    def looks(self) -> bool:
        """Whether the teacher has to record what its answers attend to."""
        return self.target == "attention"

    def __init__(self, weight: float = 1.0, target: SaliencyTarget = "attention", fades: float | None = None):
        super().__init__(weight)
        if target not in get_args(SaliencyTarget):
            raise ValueError(f"target must be one of {get_args(SaliencyTarget)}, got {target!r}")
        if fades is not None and not 0 < fades <= 1:
            raise ValueError(f"fades must be in (0, 1], got {fades}")
        self.target: SaliencyTarget = target
        self.fades = fades

    def __call__(self, step: Step) -> Loss:
        scores = step.slot_scores
        left = 1.0 if self.fades is None else max(0.0, 1 - step.progress / self.fades)
        if left == 0:
            return Loss(0 * scores.sum(), {})  # in the graph all the same, see `Answers`

        # The target is a distribution over the patches. A ranking that all questions share learns their mean.
        patch = step.tokens.is_patch[0]
        looks = step.asked()[1].looks if self.looks else self._gradients(step)
        wanted = torch.stack(looks)[:, patch]
        wanted = wanted / wanted.sum(1, keepdim=True).clamp(min=1e-12)  # all zero: no target rather than NaN
        if not reads_question(step.selector):
            wanted = wanted.mean(0, keepdim=True)

        # Minus the target's entropy: what is left is a divergence, 0 at best.
        entropy = torch.special.entr(wanted).sum(1)
        loss = (-(wanted * scores[:, patch].log_softmax(1)).sum(1) - entropy).mean()
        return Loss(left * loss, {"saliency": loss.detach()})

    def _gradients(self, step: Step) -> list[Float[Tensor, "_L"]]:
        """Per question, how fast the answer's log-probability changes with the attention to each slot."""
        language, taught, encoded = step.asked()
        gradients = []
        for index, branch in enumerate(taught.conversation.branches):
            # Gates of 1 change nothing, but their gradient is that of the attention in every layer at once.
            gates = torch.ones(step.tokens.slots.shape[1], device=branch.prompt.device, requires_grad=True)
            (logs,) = language.answer_log_probs(encoded, taught.conversation, [index], gates=gates)
            assert branch.answer is not None  # for the type checker: the teacher has answered
            likelihood = logs.gather(1, branch.answer[:, None]).sum()
            gradients.append(torch.autograd.grad(likelihood, gates)[0].abs())
        return gradients
