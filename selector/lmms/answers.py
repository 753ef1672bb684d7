"""Prompts to a model whose visual tokens a selector chooses: answers, losses of given answers, and measured tokens.

Whatever goes wrong is raised: an answer that could not be generated is no empty answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from selector.base import TokenSelector
from selector.budget import Budget
from selector.plug import SelectionLog, select_tokens
from selector.pruning import Positions

IMAGE = "<image>"
"""Where an image stands in a question of lmms-eval; without one, all images stand before the question."""


@dataclass(frozen=True)
class Reply:
    """An answer, and what it took.

    Attributes:
        text: decoded, without special tokens.
        prompt_tokens: of the prompt that the language model read, padding of a batch aside.
        new_tokens: that were generated, the end of the answer included.
        kept: per image, visual tokens that reached the language model; where they leave inside it, their average over
            its layers, in `prompt_tokens` too.
        full: the same before selection.

    Example:
        >>> Reply("42", prompt_tokens=80, new_tokens=3, kept=(64,), full=(2928,)).kept
        (64,)
    """

    text: str
    prompt_tokens: int | float
    new_tokens: int
    kept: tuple[int | float, ...]
    full: tuple[int, ...]


class Answerer:
    """Asks a model under a selector and a budget.

    Args:
        model, processor: of a model type with an adapter (`selector.models`); the tokenizer is set to pad on the left.
        selector: chooses the visual tokens.
        budget: what may stay; 1.0 keeps every token, and answers are those of the plain model.
        positions: see `selector.pruning.prune_inputs`.

    Example:
        >>> from selector import Budget, Norm
        >>> from selector.commands.loading import load_model
        >>> answerer = Answerer(*load_model("checkpoints/llava-next-tiny", "cpu"), Norm(), Budget(16))
        >>> with answerer.selecting():
        ...     reply = answerer.generate(["USER: <image> ASSISTANT:"], [[Image.new("RGB", (96, 96))]], {})[0]
        >>> reply.kept, reply.full
        ((16,), (300,))
    """

    def __init__(
        self, model: Any, processor: Any, selector: TokenSelector, budget: Budget, positions: Positions = "original"
    ):
        self.model, self.processor = model, processor
        self.selector, self.budget = selector, budget
        self.positions: Positions = positions
        self.log: SelectionLog | None = None
        processor.tokenizer.padding_side = "left"  # generation goes on behind the prompt

    @contextmanager
    def selecting(self) -> Iterator[SelectionLog]:
        """Within the block, `generate` and `loss` select; all requests of a task go through one."""
        budget = self.budget
        with select_tokens(
            self.model,
            self.selector,
            budget.keep,
            scope=budget.scope,
            newlines=budget.newlines,
            positions=self.positions,
        ) as log:
            # Where `generate` and `loss` find what they have measured; gone with the block.
            self.log = log
            try:
                yield log
            finally:
                self.log = None

    def prompt(self, turns: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation by the model's own chat template, up to where its answer starts."""
        text = self.processor.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)

        # A template that cannot read the turns may drop them without an error, and the model then answers nothing.
        said = [part["text"] for turn in turns for part in turn["content"] if part["type"] == "text"]
        if missing := [words for words in said if words.strip() not in text]:
            raise ValueError(f"the chat template must show every text of the conversation, it drops {missing[0]!r:.80}")
        return text

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]], settings: Mapping[str, Any]
    ) -> list[Reply]:
        """One answer per prompt, all in one batch.

        Args:
            prompts: see `prompt`; one placeholder per image.
            images: of each prompt; all prompts of a batch have some, or none has.
            settings: of ``model.generate``, such as ``max_new_tokens``.

        Raises:
            ValueError: prompts with and without images in one batch, and whatever the model or the selector raise.
        """
        log = self._open_log()
        if len({bool(own) for own in images}) > 1:
            raise ValueError("images: prompts with and without images must go into batches of their own")

        before = len(log.measured)
        inputs = self._inputs(prompts, images)
        sequences = self.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        kept, full = log.measured[before:], log.full[before:]

        # The log counts per image, in the order of the prompts.
        replies, start = [], 0
        for row, own in enumerate(images):
            here = slice(start, start := start + len(own))
            cut = sum(full[here]) - sum(kept[here])
            replies.append(
                Reply(
                    text=self.processor.tokenizer.decode(sequences[row], skip_special_tokens=True),
                    prompt_tokens=int(inputs["attention_mask"][row].sum()) - cut,
                    new_tokens=self._length(sequences[row]),
                    kept=tuple(kept[here]),
                    full=tuple(full[here]),
                )
            )
        return replies

    @torch.inference_mode()
    def loss(self, prompt: str, continuation: str, images: Sequence[Image.Image]) -> tuple[float, bool]:
        """(mean negative log-likelihood of a given answer in nats per token, whether greedy decoding gives it).

        Raises:
            ValueError: a continuation that adds no token to the prompt.
        """
        self._open_log()
        whole = self._inputs([prompt + continuation], [images])
        alone = self._inputs([prompt], [images])["input_ids"][0]

        # The tokens that are the continuation's: all from the first that the prompt alone does not have. At the seam
        # the tokenizer may have joined letters of both.
        ids = whole["input_ids"][0]
        same = ids[: len(alone)] == alone[: len(ids)]
        first = int(same.long().cumprod(0).sum())
        if first == len(ids):
            raise ValueError(f"continuation must add tokens to the prompt, got {continuation!r}")

        # Counted from the end: what was cut of the prompt is in front.
        targets = ids[first:]
        logits = self.model(**whole).logits[0, -len(targets) - 1 : -1].float()
        chosen = logits.log_softmax(-1).gather(-1, targets[:, None])
        return -float(chosen.mean()), bool((logits.argmax(-1) == targets).all())

    def _open_log(self) -> SelectionLog:
        if self.log is None:
            raise RuntimeError("generate and loss must be called within `selecting`")
        return self.log

    def _inputs(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Any:
        """Processor outputs on the model's device and in its precision."""
        flat = [image for own in images for image in own]
        inputs = self.processor(
            text=list(prompts),
            images=[list(own) for own in images] if flat else None,
            padding=True,
            return_tensors="pt",
        )
        return inputs.to(self.model.device, self.model.dtype)

    def _length(self, ids: torch.Tensor) -> int:
        """New tokens up to the end of the answer; a shorter row of a batch is filled up behind it."""
        ends = self.model.generation_config.eos_token_id
        ends = torch.as_tensor([] if ends is None else ends, device=ids.device).reshape(-1)
        hits = torch.isin(ids, ends).nonzero()
        return int(hits[0]) + 1 if len(hits) else len(ids)


def turns(question: str, images: int) -> list[dict[str, Any]]:
    """One user turn of a question, with its images where it says `IMAGE`, or before it.

    Raises:
        ValueError: the question has another number of places than there are images.

    Example:
        >>> [part["type"] for part in turns("Compare <image> with <image>.", images=2)[0]["content"]]
        ['text', 'image', 'text', 'image', 'text']
    """
    pieces = question.split(IMAGE)
    if len(pieces) == 1:
        content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        return [{"role": "user", "content": content}]
    if len(pieces) - 1 != images:
        raise ValueError(f"a question must have a place for each image, it has {len(pieces) - 1}, images are {images}")

    content: list[dict[str, Any]] = []
    for place, piece in enumerate(pieces):
        content += [{"type": "image"}] if place else []
        content += [{"type": "text", "text": piece}] if piece.strip() else []
    return [{"role": "user", "content": content}]
