"""One sample under every row: encoded once, pruned many times, answered by the unpruned model once."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from selector.base import TokenSelector
from selector.budget import Budget
from selector.errors import UsageError
from selector.measure.answering import Answer, answer, forced, prepare, without_image
from selector.measure.consistency import Spectrum, spectrum, spectrum_shift
from selector.measure.cost import synchronize
from selector.measure.evidence import Canvas, evidence, model_canvas, unplaced
from selector.measure.flops import cache_bytes, counted_flops, language_flops, tower_flops
from selector.measure.protocol import Protocol
from selector.measure.scoring import answer_record
from selector.models import Encoded, encode
from selector.plug import Pruned, prune_inputs
from selector.tasks import Task
from selector.tasks.sample import Sample

FULL, BLIND = "full", "blind"


@dataclass(frozen=True)
class Row:
    """One line of the table: a selector at a budget, or one of the two references, which have neither.

    Example:
        >>> from selector import load_selector
        >>> rows = [Row(FULL), *(Row("norm", load_selector("norm"), Budget(keep)) for keep in (64, 16))]
        >>> [(row.label, None if row.budget is None else row.budget.keep) for row in rows]
        [('full', None), ('norm', 64), ('norm', 16)]
    """

    label: str
    selector: TokenSelector | None = None
    budget: Budget | None = None


class Harness:
    """A model ready to measure samples, and what it remembers from one sample to the next.

    Args:
        needs: fields of `VisualTokens` that some selector reads.
        protocol: how each sample is measured.

    Example:
        >>> from selector.commands.loading import load_model
        >>> from selector.tasks import load_task
        >>> model, processor = load_model("checkpoints/llava-next-tiny", "cpu")
        >>> harness = Harness(model, processor, frozenset({"features"}), Protocol(max_new_tokens=4))
        >>> [sum(harness.open(sample).whole.full) for sample in load_task("scenes").samples(2, seed=0)]  # visual tokens
        [744, 444]
    """

    def __init__(self, model: Any, processor: Any, needs: frozenset[str], protocol: Protocol):
        self.model, self.processor, self.needs, self.protocol = model, processor, needs, protocol
        self.flops: dict[Any, int] = {}  # of selectors, by shapes: see `Measured`
        self._warm: set[Any] = set()  # what ran once, untimed: "model", and the labels of rows

    def open(self, sample: Sample, task: Task | None = None) -> Measured:
        """The sample, encoded and answered by the unpruned model; the first one twice, since a first pass is slow.

        Args:
            task: how it is asked and scored; None: as it stands, by exact match.
        """
        if "model" not in self._warm:
            self._warm.add("model")
            Measured(self, sample, task)
        return Measured(self, sample, task)

    def answer(self, inputs: Mapping[str, Any]) -> Answer:
        """The greedy answer to prepared inputs, asked for `Protocol.repeats` times; its times are medians."""
        answers = [
            answer(self.model, self.processor, inputs, self.protocol.max_new_tokens)
            for _ in range(self.protocol.repeats)
        ]
        decode = [each.decode_seconds for each in answers if each.decode_seconds is not None]
        return replace(
            answers[0],
            prefill_seconds=median(each.prefill_seconds for each in answers),
            decode_seconds=median(decode) if decode else None,
        )

    def prune(self, inputs: Mapping[str, Any], row: Row, encoded: Encoded) -> Pruned:
        """The pruned inputs, selected `Protocol.repeats` times; the seconds that selection took are the median."""
        # The first selection of a row also allocates and picks kernels: it is repeated, and its time does not count.
        warm = row.label in self._warm  # by label: budgets of one selector run the same code
        self._warm.add(row.label)
        pruned = [
            prune_inputs(
                self.model, inputs, row.selector, row.budget, positions=self.protocol.positions, encoded=encoded
            )
            for _ in range(self.protocol.repeats + int(not warm))
        ]

        seconds = median(each.selection_seconds for each in pruned[-self.protocol.repeats :])
        return replace(pruned[-1], selection_seconds=seconds)


class Measured:
    """A sample, encoded once and answered by the unpruned model; gives a record for every row.

    Example:
        >>> from selector import load_selector
        >>> from selector.commands.loading import load_model
        >>> from selector.tasks import load_task
        >>> harness = Harness(*load_model("checkpoints/llava-next-tiny", "cpu"), frozenset({"features"}), Protocol())
        >>> measured = harness.open(next(load_task("scenes").samples(1, seed=0)))
        >>> record = measured.record(Row("norm", load_selector("norm"), Budget(64)))
        >>> record["tokens"], record["full_tokens"], record["prompt_tokens"]
        (64, 744, 81)
    """

    def __init__(self, harness: Harness, sample: Sample, task: Task | None = None):
        self.harness, self.sample = harness, sample
        self.metric = "exact" if task is None else task.metric
        model = harness.model

        question, system = (sample.question, "") if task is None else (task.prompt(sample.question), task.system)
        self.inputs = prepare(harness.processor, sample.image, question, model.device, system)
        synchronize(model.device)

        # Encoding is timed between two synchronisations: a GPU only queues the work.
        start = time.perf_counter()
        try:
            with torch.no_grad():
                self.encoded: Encoded | None = encode(model, self.inputs, harness.needs)
        except ValueError as error:  # no adapter for this model, or it cannot give what a selector needs
            raise UsageError(f"on sample {sample.id!r}: {error}") from error
        synchronize(model.device)
        self.encode_seconds = time.perf_counter() - start

        # The reference of every comparison. `whole` goes through the plug, too: full and pruned then differ in nothing
        # but what is kept.
        self.whole = prune_inputs(model, self.inputs, None, encoded=self.encoded)
        asked = harness.protocol.answers and sample.question is not None
        self.full = harness.answer(self.whole.inputs) if asked else None
        self.full_spectrum = self._internals(self.whole, None)[0]

        # For evidence and the report's pictures. A family without one does without both, which the report says once.
        # Approximate tokens cover no patches of their own.
        self.canvas: Canvas | None = None
        if self.encoded and not self.encoded.approximate and unplaced(model.config) is None:
            size, tokens = (sample.image.height, sample.image.width), self.encoded.tokens
            self.canvas = model_canvas(model.config, size, tokens.grid, len(tokens.features))

    def record(self, row: Row) -> dict[str, Any]:
        """Everything measured for one row, as plain values."""
        if row.label == BLIND and row.selector is None:
            inputs = self.inputs
            if self.encoded:
                inputs = without_image(inputs, self.encoded.image_token_id)
            given = None if self.full is None else self.harness.answer(inputs)
            return self._tokens(None) | self._cost(inputs, None, None) | self._answers(inputs, given, None)

        pruned = self.whole if row.selector is None else self._prune(row)
        given = self.full
        if self.full is not None and pruned is not self.whole:
            given = self.harness.answer(pruned.inputs)

        # The figures of `full` were taken when the sample was opened.
        after, logits = (self.full_spectrum, None) if pruned is self.whole else self._internals(pruned, given)
        return (
            self._tokens(pruned)
            | self._shifts(after)
            | self._cost(pruned.inputs, pruned, row)
            | self._kept(pruned)
            | self._answers(pruned.inputs, given, logits)
        )

    def _prune(self, row: Row) -> Pruned:
        if self.encoded is None:  # a prompt of text alone passes through
            return self.whole
        try:
            return self.harness.prune(self.inputs, row, self.encoded)
        except ValueError as error:
            raise UsageError(f"{row.label} at keep={row.budget} on sample {self.sample.id!r}: {error}") from error

    def _tokens(self, pruned: Pruned | None) -> dict[str, Any]:
        full = sum(self.whole.full)
        if pruned is None or self.encoded is None:
            return {"tokens": 0, "full_tokens": full, "saturated": False}
        return {
            "tokens": sum(pruned.measured),
            "full_tokens": full,
            # The budget allowed all tokens.
            "saturated": pruned is not self.whole and pruned.measured == pruned.full,
            "encode_ms": 1e3 * self.encode_seconds,
            "selection_ms": 1e3 * pruned.selection_seconds,
        }

    def _internals(self, pruned: Pruned, given: Answer | None) -> tuple[Spectrum | None, Tensor | None]:
        """(spectrum of the visual tokens at the layer, teacher-forced logits if they had to be computed)."""
        layer, same = self.harness.protocol.layer, self._same(given)
        target = self.full.ids if self.full else pruned.inputs["input_ids"].new_empty(0)

        # Without a pass: layer 0 is in the inputs, and an answer that stayed the same has the logits of its generation.
        reading = None
        if (layer > 0 and self.encoded) or (given is not None and not same):
            image_token_id = self.encoded.image_token_id if self.encoded else None
            wanted = [layer] if layer > 0 and self.encoded else []
            reading = forced(self.harness.model, pruned.inputs, target, wanted, image_token_id)
        logits = reading.logits if reading is not None and given is not None and not same else None
        if self.encoded is None:
            return None, logits
        visual = reading.visual[layer] if layer > 0 and reading else torch.cat(_visual(pruned))
        return (spectrum(visual) if len(visual) else None), logits

    def _shifts(self, after: Spectrum | None) -> dict[str, Any]:
        if after is None or self.full_spectrum is None:
            return {}
        return {"ipr": after.ipr, "effective_rank": after.effective_rank} | spectrum_shift(self.full_spectrum, after)

    def _cost(self, inputs: Mapping[str, Any], pruned: Pruned | None, row: Row | None) -> dict[str, Any]:
        model, prompt = self.harness.model, inputs["input_ids"].shape[1]
        costs: dict[str, Any] = {
            "prompt_tokens": prompt,
            "kv_bytes": cache_bytes(model.config, prompt, model.dtype.itemsize),
            "prefill_flops": language_flops(model.config, prompt, prompt),
            # The first decoded token attends to the prompt and to itself.
            "decode_flops": language_flops(model.config, 1, prompt + 1),
        }

        if pruned is None or self.encoded is None:  # no pixels went in
            return costs
        costs["tower_flops"] = tower_flops(model.config, len(self.encoded.tokens.features))
        if row is not None and row.selector is not None and row.budget is not None:
            key = (row.label, row.budget, self.encoded.tokens.features.shape, self.encoded.tokens.slots.shape)
            if key not in self.harness.flops:  # equal shapes take equal work, and counting is slow
                self.harness.flops[key] = counted_flops(
                    lambda: prune_inputs(model, self.inputs, row.selector, row.budget, encoded=self.encoded)
                )
            costs["selector_flops"] = self.harness.flops[key]
        return costs

    def _kept(self, pruned: Pruned) -> dict[str, Any]:
        if pruned.keep is None or pruned.tokens is None:
            return {}
        kept = pruned.tokens.tiles_of(pruned.keep)
        figures: dict[str, Any] = {"kept": pack(kept)}

        if pruned.approximate:  # a token stands for more than the patch it is traced to: no evidence is counted
            figures["approximate"] = True
        if self.canvas is not None and self.sample.boxes:
            shares = evidence(kept, self.canvas.rectangles(), self.sample.boxes)
            if shares is not None:
                named = zip(("evidence", "base_evidence"), shares, strict=True)
                figures |= {name: share for name, share in named if share is not None}
        return figures

    def _same(self, given: Answer | None) -> bool:
        return given is not None and self.full is not None and torch.equal(given.ids, self.full.ids)

    def _answers(self, inputs: Mapping[str, Any], given: Answer | None, logits: Tensor | None) -> dict[str, Any]:
        full = self.full
        if full is None or given is None:
            return {}

        # The pruned model's logits over the unpruned answer: known where it gave that answer itself.
        if self._same(given):
            forced_logits = given.logits
        else:
            forced_logits = logits if logits is not None else forced(self.harness.model, inputs, full.ids).logits
        return answer_record(self.sample, given, full, forced_logits, self.metric)


def pack(kept: Bool[Tensor, "T N"]) -> str:
    """A keep mask as text: base64 of its bits, tile by tile, the first bit of a byte being the highest.

    Example:
        >>> import torch
        >>> pack(torch.tensor([[True, False, False, False], [False, False, False, True]]))  # 10000001
        'gQ=='
    """
    return base64.b64encode(np.packbits(kept.cpu().numpy().reshape(-1)).tobytes()).decode()


def _visual(pruned: Pruned) -> list[Tensor]:
    """What enters the language model: merged tokens too, as they were merged."""
    return list(pruned.inputs["mm_encoder_outputs"]["image"].pooler_output)
