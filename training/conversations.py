"""Questions about images as token ids: one prefix with the image, and a branch per question behind it.

All questions about an image share what comes before them, the image included. In a causal language model nothing there
depends on the question, so one pass over `prefix | question 1, answer 1 | question 2, answer 2 | ...`, in which every
branch attends to the prefix and to itself, equals a pass over every conversation by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """One question and its answer.

    Attributes:
        prompt: ``[Q]`` ids of what stands between the image and the answer.
        answer: ``[A]`` ids of the answer, with the token that ends it; None: not known.
        question: its text.

    >>> Branch(prompt=torch.tensor([7, 8]), answer=None, question="What is it?").question
    'What is it?'
    """

    prompt: Int[Tensor, "Q"]
    answer: Int[Tensor, "A"] | None
    question: str


@dataclass(frozen=True)
class Conversation:
    """An image and what is asked about it, ready for the model.

    Attributes:
        pixels: what the processor makes of the image: `pixel_values` ``[1, T, 3, H, W]`` and `image_sizes` ``[1, 2]``.
        prefix: ``[P]`` ids up to the last placeholder of the image.
        branches: the questions.

    >>> branches = tuple(Branch(torch.tensor([7, 8]), None, question) for question in ("What is it?", "Where is it?"))
    >>> conversation = Conversation({}, torch.tensor([1, 5, 5]), branches)
    >>> [branch.question for branch in conversation.only([1]).branches]
    ['Where is it?']
    """

    pixels: dict[str, Tensor]
    prefix: Int[Tensor, "P"]
    branches: tuple[Branch, ...]

    def only(self, chosen: Sequence[int]) -> Conversation:
        """The same image with these questions alone, by their index and in this order."""
        return replace(self, branches=tuple(self.branches[index] for index in chosen))

    def answered(self, answers: Sequence[Int[Tensor, "_A"]]) -> Conversation:
        """The same questions with these answers: ids ``[A]``, one per branch."""
        pairs = zip(self.branches, answers, strict=True)
        return replace(self, branches=tuple(replace(branch, answer=answer) for branch, answer in pairs))

    def to(self, device: torch.device) -> Conversation:
        """The same with every tensor on this device."""
        pixels = {name: value.to(device) for name, value in self.pixels.items()}
        branches = tuple(
            replace(
                branch,
                prompt=branch.prompt.to(device),
                answer=None if branch.answer is None else branch.answer.to(device),
            )
            for branch in self.branches
        )
        return Conversation(pixels, self.prefix.to(device), branches)


class Converse:
    """Makes conversations with a model's own processor and chat template; picklable, for loader workers.

    Args:
        processor: the model's own, with tokenizer, image processor and chat template.
        image_token_id: id of the placeholder of a visual token.

    >>> from training.testbed.vocabulary import IMAGE_ID, build_processor
    >>> converse = Converse(build_processor(), IMAGE_ID)
    >>> asked = converse(Image.new("RGB", (192, 96)), [("what is TAX?", "41"), ("what is DATE?", None)])
    >>> asked.pixels["pixel_values"].shape, int((asked.prefix == IMAGE_ID).sum())
    (torch.Size([1, 3, 3, 96, 96]), 444)
    >>> [branch.answer for branch in asked.branches]
    [tensor([11,  8,  2]), None]
    """

    def __init__(self, processor: Any, image_token_id: int):
        self.processor, self.image_token_id = processor, image_token_id

    def __call__(self, image: Image.Image, turns: Sequence[tuple[str, str | None]]) -> Conversation:
        """The conversation about an image.

        Args:
            image: in RGB.
            turns: (question, answer) pairs; None as the answer: not known.

        Raises:
            ValueError: no question, one that holds the image's placeholder, or a chat template that does not put the
                question behind the image.
        """
        if not turns:
            raise ValueError("turns must hold at least one question about the image")

        # The processor alone knows how many placeholders the image takes, so it makes one whole prompt.
        text = self._prompt(turns[0][0])
        inputs = dict(self.processor(text=text, images=image, return_tensors="pt"))
        ids = inputs.pop("input_ids")[0]
        inputs.pop("attention_mask", None)

        # Everything up to the last placeholder is shared.
        visual = (ids == self.image_token_id).nonzero()[:, 0]
        prefix, rest = ids[: int(visual[-1]) + 1], ids[int(visual[-1]) + 1 :]

        # The questions are tokenized without the prefix. That must give the ids that the whole prompt has: a tokenizer
        # that merges across the border, or a template that puts the question first, would ask something else.
        branches = [self._branch(question, answer) for question, answer in turns]
        if not torch.equal(branches[0].prompt, rest):
            raise ValueError("the chat template must put the question behind the image, tokenized on its own")
        return Conversation(inputs, prefix, tuple(branches))

    def _branch(self, question: str, answer: str | None) -> Branch:
        tokenizer = self.processor.tokenizer
        if self.processor.image_token in question:
            raise ValueError(f"a question must not hold the image's placeholder, got {question!r}")

        # The template and the text of the prompt behind the image, and the answer, as ids of their own.
        behind = self._prompt(question).split(self.processor.image_token, 1)[1]
        ids = None
        if answer is not None:
            ids = torch.tensor([*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id])
        return Branch(torch.tensor(tokenizer.encode(behind, add_special_tokens=False)), ids, question)

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
