"""The teacher of a selector that learns from answers: the unpruned model, and its answers.

By default teacher and student are compared along the model's own answers: the selector learns to agree with the
unpruned model, and no label is needed. Answers are generated once (greedily) and can be kept on disk. Answers in the
data are checked first: where the model would give the same one token by token, nothing has to be generated. The
teacher never changes, so its probabilities for an image are computed once and remembered as long as memory allows.

Shapes: A tokens of an answer, V vocabulary, L packed slots of an image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from selector.models import Encoded
from training.conversations import Branch, Conversation
from training.language import FrozenLanguageModel

AnswersFrom = Literal["model", "data"]


@dataclass(frozen=True)
class Taught:
    """A conversation with the answers to learn, and the teacher's probabilities.

    Attributes:
        conversation: with answers.
        log_probs: per question ``[A, V]``, the teacher's log-probabilities along the answer.
        looks: per question ``[L]``, what the answer's tokens attend to (`FrozenLanguageModel.attention_to_image`), zero
            at newlines; empty where no objective reads it.

    >>> branches = tuple(Branch(torch.tensor([7]), torch.tensor([8, 2]), question) for question in ("Who?", "Where?"))
    >>> taught = Taught(Conversation({}, torch.tensor([1, 5]), branches), [torch.zeros(2, 10)] * 2, looks=[])
    >>> taught.bytes, len(taught.sampled(1, torch.Generator()).log_probs)
    (160, 1)
    """

    conversation: Conversation
    log_probs: list[Float[Tensor, "_A V"]]
    looks: list[Float[Tensor, "_L"]]

    def sampled(self, count: int, generator: torch.Generator) -> Taught:
        """At most `count` of the questions, drawn without replacement."""
        chosen = torch.randperm(len(self.log_probs), generator=generator)[:count].tolist()
        return Taught(
            self.conversation.only(chosen),
            [self.log_probs[index] for index in chosen],
            [self.looks[index] for index in chosen] if self.looks else [],
        )

    @property
    def bytes(self) -> int:
        """Memory of the probabilities and the attention; the ids are negligible."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.log_probs, *self.looks))


class AnswerStore:
    """Answers on disk, one JSON object per line: image, question, ids.

    A line that an interruption cut off is skipped, and its answer is generated again.

    Args:
        file: None keeps the answers in memory only. Its name should identify model and settings (see `Teacher`).

    >>> store = AnswerStore(None)
    >>> store.put("image", "What is it?", [5, 2])
    >>> store.get("image", "What is it?"), store.get("image", "Where is it?")
    ([5, 2], None)
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
        """Ids of an answer; None where it is not known."""
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
    """The unpruned model's answers to the questions of a conversation, with their probabilities.

    Args:
        language: the frozen model.
        answers: ``"model"``: its own greedy answers; ``"data"``: those of the data, where there are any.
        limit: longest answer, in tokens.
        folder: where answers are kept; None keeps them in memory.
        fingerprint: hash of the model's weights, so that another model's answers are never reused.
        looks: also record what the answers attend to.
        memory: bytes of probabilities to remember; what does not fit is computed anew each time.

    Raises:
        ValueError: `answers` is neither of the two, or a limit below 1.

    >>> from training.encoders import LlavaNextModel
    >>> from training.pages import page
    >>> model, shown = LlavaNextModel("checkpoints/llava-next-tiny"), page("documents", "test", 0, 0)
    >>> asked = model.converse(shown.image, [("what is TOTAL?", None)])
    >>> taught = Teacher(FrozenLanguageModel(model.model), limit=7)(model.encoded(asked, frozenset()), asked)
    >>> model.converse.processor.decode(taught.conversation.branches[0].answer), taught.log_probs[0].shape
    ('TOTAL 6', torch.Size([7, 202]))
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
        if answers not in get_args(AnswersFrom):
            raise ValueError(f"answers must be one of {get_args(AnswersFrom)}, got {answers!r}")
        if limit < 1:
            raise ValueError(f"limit must be at least 1 token, got {limit}")
        self.language, self.answers, self.limit, self.looks = language, answers, limit, looks
        self._memory_left = memory

        # Everything that an answer depends on besides image and question is in the file's name: nothing stale is read.
        settings = language.model.generation_config.to_dict()
        settings.pop("transformers_version", None)
        identity = f"{fingerprint} {limit} {json.dumps(settings, sort_keys=True, default=str)}"
        key = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.store = AnswerStore(None if folder is None else Path(folder) / f"answers-{key}.jsonl")
        self._remembered: dict[tuple[str, ...], Taught] = {}

    @torch.no_grad()
    def __call__(self, encoded: Encoded, conversation: Conversation) -> Taught:
        """The answers to learn and the model's probabilities along them.

        Args:
            encoded: the conversation's image, alone.
            conversation: prefix and questions, with the data's answers where there are any.
        """
        # Answers are part of the key: with ``answers="data"`` they decide what is learned.
        image = _image_key(conversation)
        given = [None if branch.answer is None else branch.answer.tolist() for branch in conversation.branches]
        key = image, *(_question_key(conversation, branch) for branch in conversation.branches), str(given)
        if key not in self._remembered:
            taught = self._learned(encoded, conversation, image)
            taught = replace(taught, conversation=replace(taught.conversation, pixels={}))  # nothing reads them again

            # First come, first kept: epochs ask in another order each, so that evicting would gain nothing.
            if self._memory_left < taught.bytes:
                return taught
            self._memory_left -= taught.bytes
            self._remembered[key] = taught
        return self._remembered[key]

    def _learned(self, encoded: Encoded, conversation: Conversation, image: str) -> Taught:
        """Finds the answers to learn; questions that the model has not answered before are put to it."""
        own = self.answers == "model"
        device = conversation.prefix.device

        # The best known answer to each question: the model's own from the store, else the data's.
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

        # The rest is generated, one question at a time, and every answer of the model's is stored.
        for index, key in enumerate(keys):
            answer = answers[index]
            if answer is None or not settled[index]:
                answer = answers[index] = self.language.own_answer(encoded, conversation, index, self.limit)
            if wanted[index] and known[index] is None:
                self.store.put(image, key, answer.tolist())

        # Where all answers held, the pass that checked them is the result.
        return taught if taught is not None and all(settled) else self._pass(encoded, conversation, answers)

    def _pass(self, encoded: Encoded, conversation: Conversation, answers: Sequence[Tensor | None]) -> Taught:
        """The model's probabilities along these answers, with every visual token."""
        answered = conversation.answered([answer for answer in answers if answer is not None])
        row = self.language.row(encoded.packed[0], encoded.image_token_id, answered.prefix, answered.branches)
        if not self.looks:
            return Taught(answered, self.language.log_probs(row), [])

        logs, looks = self.language.attention_to_image(row)
        return Taught(answered, logs, list(looks * encoded.tokens.is_patch[0]))


def _question_key(conversation: Conversation, branch: Branch) -> str:
    """The question, and a hash of all ids of its prompt: with another chat template it is another question."""
    ids = conversation.prefix.tolist(), branch.prompt.tolist()
    return f"{hashlib.sha256(str(ids).encode()).hexdigest()[:12]} {branch.question}"


def _image_key(conversation: Conversation) -> str:
    """A hash of the image as the processor hands it on: the same picture in other tiles is another one."""
    pixels = conversation.pixels["pixel_values"].detach().cpu().float().contiguous()
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:24]
