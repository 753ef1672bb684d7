"""The teacher of a selector that learns from answers: the unpruned model, and what it answers.

By default the texts along which teacher and student are compared are the model's own answers: agreement with the
unpruned model is what is learned, and no label is needed. They are written once (greedy) and can be kept on disk.
Given answers are checked first: where the model would say the same token by token, nothing has to be generated.
The teacher never changes, so what it says about an image is computed once and remembered as long as memory allows.

Shapes: A tokens of an answer, V vocabulary, L packed slots of an image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from selector.models import Encoded
from training.conversations import Branch, Conversation
from training.language import FrozenLanguageModel

AnswersFrom = Literal["model", "data"]


@dataclass(frozen=True)
class Taught:
    """A conversation with the answers to learn, and the teacher's view of them.

    Attributes:
        conversation: with answers.
        log_probs: per question ``[A, V]``.
        looks: per question ``[L]``, what the answer's tokens look at (`FrozenLanguageModel.attention_to_image`), zero
            at newlines; empty where no objective reads it.
    """

    conversation: Conversation
    log_probs: list[Float[Tensor, "_A V"]]
    looks: list[Float[Tensor, "_L"]]

    def sampled(self, count: int, generator: torch.Generator) -> Taught:
        """At most `count` of the questions, drawn without repetition."""
        chosen = torch.randperm(len(self.log_probs), generator=generator)[:count].tolist()
        return Taught(
            self.conversation.only(chosen),
            [self.log_probs[index] for index in chosen],
            [self.looks[index] for index in chosen] if self.looks else [],
        )

    @property
    def bytes(self) -> int:
        """Memory of what it says; ids are next to nothing."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.log_probs, *self.looks))


class AnswerStore:
    """Answers on disk, one JSON object per line: image, question, ids. One that an interruption cut is written again.

    Args:
        file: None keeps them in memory only. Its name should tell model and settings (see `Teacher`).
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
                    continue

    def get(self, image: str, question: str) -> list[int] | None:
        """Ids of an answer, None where it is not known."""
        return self.known.get((image, question))

    def put(self, image: str, question: str, ids: list[int]) -> None:
        """Remembers an answer, on disk too."""
        self.known[image, question] = ids
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as out:
                # The newline comes first: what follows a torn line must not be torn with it.
                out.write("\n" + json.dumps({"image": image, "question": question, "ids": ids}))


class Teacher:
    """What the unpruned model answers.

    Args:
        language: the frozen model.
        answers: ``"model"``: its own greedy answers; ``"data"``: those of the data, where there are any.
        limit: longest answer, in tokens.
        folder: where answers are kept; None keeps them in memory.
        fingerprint: of the model, so that another model's answers are never reused.
        looks: also tell what the answers look at.
        memory: bytes of what is remembered; beyond it, it is computed again each time.
    """

    def __init__(
        self,
        language: FrozenLanguageModel,
        answers: AnswersFrom = "model",
        limit: int = 48,
        folder: str | None = None,
        fingerprint: str = "",
        looks: bool = False,
        memory: int = 2 * 2**30,
    ):
        self.language, self.answers, self.limit, self.looks, self.memory = language, answers, limit, looks, memory
        settings = language.model.generation_config.to_dict()
        settings.pop("transformers_version", None)
        told = f"{fingerprint} {limit} {json.dumps(settings, sort_keys=True, default=str)}"
        key = hashlib.sha256(told.encode()).hexdigest()[:16]
        self.store = AnswerStore(None if folder is None else Path(folder) / f"answers-{key}.jsonl")
        self._remembered: dict[tuple[str, ...], Taught] = {}

    @torch.no_grad()
    def __call__(self, encoded: Encoded, conversation: Conversation) -> Taught:
        """Answers the questions, and says with what probabilities."""
        image = _image_key(conversation)
        given = [None if branch.answer is None else branch.answer.tolist() for branch in conversation.branches]
        key = image, *(_question_key(conversation, branch) for branch in conversation.branches), str(given)
        if key not in self._remembered:
            found = self._learned(encoded, conversation, image)
            found = replace(found, conversation=replace(found.conversation, pixels={}))  # nothing reads them again
            if self.memory < found.bytes:
                return found
            self.memory -= found.bytes
            self._remembered[key] = found
        return self._remembered[key]

    def _learned(self, encoded: Encoded, conversation: Conversation, image: str) -> Taught:
        """Finds the answers to learn; what the model has not answered before is generated."""
        own = self.answers == "model"
        device = conversation.prefix.device
        keys = [_question_key(conversation, branch) for branch in conversation.branches]
        wanted = [own or branch.answer is None for branch in conversation.branches]  # from the model, not the data
        known = [self.store.get(image, key) if ours else None for key, ours in zip(keys, wanted, strict=True)]
        answers = [
            torch.tensor(ids, device=device) if ids is not None else branch.answer
            for ids, branch in zip(known, conversation.branches, strict=True)
        ]

        # Where the model would give the data's answer itself, token by token, there is nothing to generate.
        taught = None
        settled = [ids is not None or not ours for ids, ours in zip(known, wanted, strict=True)]
        if all(answer is not None for answer in answers):
            taught = self._pass(encoded, conversation, answers)
            pairs = zip(settled, taught.log_probs, answers, strict=True)
            settled = [
                done or (answer is not None and torch.equal(logs.argmax(-1), answer)) for done, logs, answer in pairs
            ]

        for index, key in enumerate(keys):
            answer = answers[index]
            if answer is None or not settled[index]:
                answer = answers[index] = self.language.own_answer(encoded, conversation, index, self.limit)
            if wanted[index] and known[index] is None:
                self.store.put(image, key, answer.tolist())
        return taught if taught is not None and all(settled) else self._pass(encoded, conversation, answers)

    def _pass(self, encoded: Encoded, conversation: Conversation, answers: Sequence[Tensor | None]) -> Taught:
        """What the model says along these answers, with every visual token there."""
        answered = conversation.answered([answer for answer in answers if answer is not None])
        row = self.language.row(encoded.packed[0], encoded.image_token_id, answered.prefix, answered.branches)
        if not self.looks:
            return Taught(answered, self.language.log_probs(row), [])
        logs, looks = self.language.attention_to_image(row)
        return Taught(answered, logs, list(looks * encoded.tokens.is_patch[0]))


def _question_key(conversation: Conversation, branch: Branch) -> str:
    """The question, and a hash of the ids around the image: another chat template is another question."""
    ids = conversation.prefix.tolist(), branch.prompt.tolist()
    return f"{hashlib.sha256(str(ids).encode()).hexdigest()[:12]} {branch.question}"


def _image_key(conversation: Conversation) -> str:
    pixels = conversation.pixels["pixel_values"].detach().cpu().float().contiguous()
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:24]
