"""The teacher of a selector that learns from answers: the unpruned model, and what it answers.

By default the texts along which teacher and student are compared are the model's own answers: agreement with the
unpruned model is what is learned, and no label is needed. They are written once (greedy) and can be kept on disk.
Given answers are checked first: where the model would say the same token by token, nothing has to be generated.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selector.models import Encoded
from training.conversations import Conversation
from training.language import FrozenLanguageModel, Row

AnswersFrom = Literal["model", "data"]


@dataclass(frozen=True)
class Taught:
    """A conversation with the answers to learn, and the teacher's view of them.

    Attributes:
        conversation: with answers.
        log_probs: per branch ``[A, V]``.
        row: the packed row behind them.
    """

    conversation: Conversation
    log_probs: list[Float[Tensor, "A V"]]
    row: Row


class AnswerStore:
    """Answers on disk, one JSON object per line: image, question, ids. Lines are appended whole; a torn one is skipped.

    Args:
        file: None keeps them in memory only. The name should tell model and settings (see `Teacher`).
    """

    def __init__(self, file: Path | None):
        self.file = file
        self.known: dict[tuple[str, str], list[int]] = {}
        if file is not None and file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    self.known[entry["image"], entry["question"]] = [int(token) for token in entry["ids"]]
                except (json.JSONDecodeError, KeyError, TypeError, ValueError):
                    continue  # a line that an interruption cut: its answer is written again

    def get(self, image: str, question: str) -> list[int] | None:
        return self.known.get((image, question))

    def put(self, image: str, question: str, ids: list[int]) -> None:
        self.known[image, question] = ids
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"image": image, "question": question, "ids": ids}) + "\n")


class Teacher:
    """What the unpruned model answers.

    Args:
        language: the frozen model.
        answers: ``"model"``: its own greedy answers; ``"data"``: those of the data, where there are any.
        limit: longest answer, in tokens.
        folder: where answers are kept; None keeps them in memory.
        fingerprint: of the model, so that another model's answers are never reused.
    """

    def __init__(
        self,
        language: FrozenLanguageModel,
        answers: AnswersFrom = "model",
        limit: int = 48,
        folder: str | None = None,
        fingerprint: str = "",
    ):
        self.language, self.answers, self.limit = language, answers, limit
        key = hashlib.sha256(f"{fingerprint} {limit}".encode()).hexdigest()[:16]
        self.store = AnswerStore(None if folder is None else Path(folder) / f"answers-{key}.jsonl")

    @torch.no_grad()
    def __call__(self, encoded: Encoded, conversation: Conversation) -> Taught:
        """Answers the questions, and says with what probabilities."""
        image = _image_key(conversation)
        known = [self.store.get(image, branch.question) for branch in conversation.branches]
        own = self.answers == "model"
        answers: list[Tensor | None] = [
            torch.tensor(ids, device=conversation.prefix.device) if own and ids is not None else branch.answer
            for ids, branch in zip(known, conversation.branches, strict=True)
        ]

        # A given answer that the model would give itself, token by token, need not be generated.
        taught = self._pass(encoded, conversation, answers) if all(a is not None for a in answers) else None
        if not own and taught is not None:
            return taught
        changed = False
        for index, ids in enumerate(known):
            given = answers[index]
            if (not own and given is not None) or (own and ids is not None):
                continue
            if taught is None or given is None or not _says(taught.log_probs[index], given):
                answers[index] = self.language.own_answer(encoded, conversation, index, self.limit)
                changed = True
            if own:
                answer = answers[index]
                assert answer is not None  # for the type checker
                self.store.put(image, conversation.branches[index].question, answer.tolist())
        if taught is None or changed:
            taught = self._pass(encoded, conversation, answers)
        return taught

    def _pass(self, encoded: Encoded, conversation: Conversation, answers: list[Tensor | None]) -> Taught:
        answered = conversation.answered([answer for answer in answers if answer is not None])
        row = self.language.row(encoded.packed[0], encoded.image_token_id, answered.prefix, answered.branches)
        return Taught(answered, self.language.log_probs(row), row)


def _says(log_probs: Float[Tensor, "A V"], answer: Int[Tensor, "A"]) -> bool:
    return bool((log_probs.argmax(-1) == answer).all())


def _image_key(conversation: Conversation) -> str:
    pixels = conversation.pixels["pixel_values"].detach().cpu().float().contiguous()
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:24]
