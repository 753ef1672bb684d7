"""One sample under every row: encoded once, pruned many times, answered by the unpruned model once.

With a batch size of 1 each prompt is answered alone, by ``generate``, and every time belongs to one sample. With a
larger one the prompts of several samples and selectors are answered together (`selector.measure.batches`), and a
selector that scores once for every budget does so once per image; times are then shares of what was done together.
"""

from __future__ import annotations

import base64
import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from selector.base import RankSelector, ScoreSelector, TokenSelector
from selector.budget import Budget
from selector.devices import synchronize
from selector.errors import UsageError
from selector.measure.answering import Answer, answer, forced, prepare, without_image
from selector.measure.batches import Reading, read
from selector.measure.consistency import Spectrum, spectrum, spectrum_shift
from selector.measure.cost import Spent, threads
from selector.measure.evidence import Canvas, evidence, model_canvas
from selector.measure.flops import cache_bytes, counted_flops, language_flops, tower_flops
from selector.measure.protocol import Protocol
from selector.measure.scoring import answer_record
from selector.models import Encoded, encode
from selector.pruning import Pruned, prune_inputs
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


@dataclass(frozen=True)
class Turn:
    """What a row asks of a sample: its prompt, and how that was cut (None: no pixels go in).

    Example:
        >>> blind = Turn(Row("no image"), {"input_ids": torch.tensor([[1, 5, 9]])}, pruned=None)
        >>> blind.inputs["input_ids"].shape[1]
        3
    """

    row: Row
    inputs: Mapping[str, Any]
    pruned: Pruned | None


class Harness:
    """A model ready to measure samples, and what it remembers from one sample to the next.

    Args:
        needs: fields of `VisualTokens` that some selector reads.
        protocol: how each sample is measured.
        batch_threads: of torch, for batches; None: as many as for everything else.

    Attributes:
        spent: what the time went into so far.

    Example:
        >>> from selector.commands.loading import load_model
        >>> from selector.tasks import load_task
        >>> model, processor = load_model("checkpoints/llava-next-tiny", "cpu")
        >>> harness = Harness(model, processor, frozenset({"features"}), Protocol(max_new_tokens=4))
        >>> [sum(harness.open(sample).whole.full) for sample in load_task("scenes").samples(2, seed=0)]  # visual tokens
        [744, 444]
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        needs: frozenset[str],
        protocol: Protocol,
        batch_threads: int | None = None,
    ):
        self.model, self.processor, self.needs, self.protocol = model, processor, needs, protocol
        self.batch_threads = batch_threads
        self.spent = Spent(model.device)
        self.flops: dict[Any, int] = {}  # of selectors, by shapes: see `Measured`
        self._warm: set[Any] = set()  # what ran once, untimed: "model", "batch", and the labels of rows

    def open(self, sample: Sample, task: Task | None = None, inputs: Mapping[str, Any] | None = None) -> Measured:
        """The sample, encoded and (but for batches) answered by the unpruned model; the first one twice, untimed.

        Args:
            task: how it is asked and scored; None: as it stands, by exact match.
            inputs: the prompt, where it was prepared ahead.
        """
        # A first pass is slow: it allocates memory and picks kernels.
        if "model" not in self._warm:
            self._warm.add("model")
            Measured(self, sample, task, inputs)
        return Measured(self, sample, task, inputs)

    def prepare(self, sample: Sample, task: Task | None, processor: Any = None) -> dict[str, Any]:
        """The prompt of a sample, as `task` asks it.

        Args:
            processor: a copy of the harness's own, for a thread of its own.
        """
        question, system = (sample.question, "") if task is None else (task.prompt(sample.question), task.system)
        return prepare(processor or self.processor, sample.image, question, self.model.device, system)

    def answer(self, inputs: Mapping[str, Any]) -> Answer:
        """The greedy answer to prepared inputs, asked for `Protocol.repeats` times; its times are medians."""
        with self.spent.on("prefill"):
            answers = [
                answer(self.model, self.processor, inputs, self.protocol.max_new_tokens)
                for _ in range(self.protocol.repeats)
            ]
        for each in answers:
            self.spent.move("prefill", "decode", (each.decode_seconds or 0.0) * (len(each.ids) - 1))
        return _median(answers)

    def read(self, turns: Sequence[tuple[Measured, Turn]]) -> list[Reading]:
        """One batch of prompts, answered `Protocol.repeats` times; times are medians.

        Before the first batch two of its prompts are answered, and that time is in no record.
        """
        if "batch" not in self._warm:
            self._warm.add("batch")
            self._read(turns[:2])
        timed = zip(*(self._read(turns) for _ in range(self.protocol.repeats)), strict=True)
        return [replace(same[0], answer=_median([each.answer for each in same])) for same in timed]

    def _read(self, turns: Sequence[tuple[Measured, Turn]]) -> list[Reading]:
        layer = self.protocol.layer
        with threads(self.batch_threads):
            return read(
                self.model,
                self.processor,
                [turn.inputs for _, turn in turns],
                [None if measured.full is None else measured.full.ids for measured, _ in turns],
                self.protocol.max_new_tokens,
                self.spent,
                layer,
                [measured.image_token_id if turn.pruned else None for measured, turn in turns] if layer else (),
            )

    def prune(self, inputs: Mapping[str, Any], row: Row, encoded: Encoded) -> Pruned:
        """The pruned inputs, selected `Protocol.repeats` times; the seconds that selection took are the median."""
        # The first selection of a row also allocates and picks kernels: it is repeated, and its time does not count.
        warm = row.label in self._warm  # by label: budgets of one selector run the same code
        self._warm.add(row.label)
        with self.spent.on("select"):
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

    Attributes:
        asked: whether the sample has a question, and the run asks it.
        full: the unpruned model's answer; in batches it comes later, from `take_full`.
        image_token_id: placeholder of visual tokens; None for a prompt without images.

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

    def __init__(
        self, harness: Harness, sample: Sample, task: Task | None = None, inputs: Mapping[str, Any] | None = None
    ):
        self.harness, self.sample = harness, sample
        self.metric = "exact" if task is None else task.metric
        model, spent = harness.model, harness.spent

        with spent.on("prepare"):
            self.inputs = harness.prepare(sample, task) if inputs is None else dict(inputs)

        # Encoding is timed between two synchronisations: a GPU only queues the work.
        with spent.on("encode"):
            synchronize(model.device)
            start = time.perf_counter()
            try:
                with torch.no_grad():
                    self.encoded: Encoded | None = encode(model, self.inputs, harness.needs)
            except ValueError as error:  # no adapter for this model, or it cannot give what a selector needs
                raise UsageError(f"on sample {sample.id!r}: {error}") from error
            synchronize(model.device)
            self.encode_seconds = time.perf_counter() - start
        self.image_token_id = self.encoded.image_token_id if self.encoded else None

        # A sample with boxes needs the canvas of a LLaVA-NeXT: other models raise. Without boxes the canvas serves the
        # report's pictures, and is done without. Approximate tokens cover no patches of their own.
        self.canvas: Canvas | None = None
        placed = sample.boxes or hasattr(model.config, "image_grid_pinpoints")
        if placed and self.encoded and not self.encoded.approximate:
            size = (sample.image.height, sample.image.width)
            self.canvas = model_canvas(model.config, size, self.encoded.tokens.grid)
        self._rectangles = self.canvas.rectangles() if self.canvas is not None and sample.boxes else None

        # The reference of every comparison. `whole` goes through the plug, too: full and pruned then differ in nothing
        # but what is kept.
        with spent.on("select"):
            self.whole = prune_inputs(model, self.inputs, None, encoded=self.encoded)
        self.asked = harness.protocol.answers and sample.question is not None
        self.full: Answer | None = None
        self.full_spectrum: Spectrum | None = None
        self._scores: dict[str, tuple[TokenSelector, float]] = {}  # by label, with the seconds that scoring took
        if harness.protocol.batch_size == 1 or not self.asked:
            self.full = harness.answer(self.whole.inputs) if self.asked else None
            self.full_spectrum = self._internals(self.whole, None)[0]

    def take_full(self, reading: Reading) -> None:
        """The unpruned model's answer, out of a batch."""
        self.full, self.full_spectrum = reading.answer, self._spectrum(self.whole, reading.visual)

    def turn(self, row: Row) -> Turn:
        """The prompt of a row.

        Raises:
            UsageError: the selector or the budget cannot be met on this sample.
        """
        if row.label == BLIND and row.selector is None:
            inputs = self.inputs
            if self.encoded:
                inputs = without_image(inputs, self.encoded.image_token_id)
            return Turn(row, inputs, None)
        pruned = self.whole if row.selector is None else self._prune(row)
        return Turn(row, pruned.inputs, pruned)

    def record(self, row: Row) -> dict[str, Any]:
        """Everything measured for one row, as plain values."""
        with self.harness.spent.on("records"):
            turn = self.turn(row)
            given = self.full
            if self.full is not None and turn.pruned is not self.whole:
                given = self.harness.answer(turn.inputs)

            # The figures of `full` were taken when the sample was opened.
            after, logits = self.full_spectrum, None
            if turn.pruned is None:
                after = None
            elif turn.pruned is not self.whole:
                after, logits = self._internals(turn.pruned, given)

            # The pruned model's logits over the unpruned answer: known where it gave that answer itself.
            if self.full is not None and given is not None and logits is None:
                logits = given.logits
                if not self._same(given):
                    with self.harness.spent.on("forced"):
                        logits = forced(self.harness.model, turn.inputs, self.full.ids).logits
            return self._figures(turn, given, after, logits)

    def batched(self, turn: Turn, reading: Reading | None) -> dict[str, Any]:
        """The same as `record`, of a turn that was answered in a batch; without a reading, it is the whole prompt."""
        if reading is None:
            return self._figures(turn, self.full, self.full_spectrum, self.full.logits if self.full else None)
        logits = reading.answer.logits if self._same(reading.answer) else reading.forced
        after = None if turn.pruned is None else self._spectrum(turn.pruned, reading.visual)
        return self._figures(turn, reading.answer, after, logits)

    def _figures(
        self, turn: Turn, given: Answer | None, after: Spectrum | None, logits: Tensor | None
    ) -> dict[str, Any]:
        answers: dict[str, Any] = {}
        if self.full is not None and given is not None and logits is not None:
            answers = answer_record(self.sample, given, self.full, logits, self.metric)
        return self._tokens(turn.pruned) | self._shifts(after) | self._cost(turn) | self._kept(turn.pruned) | answers

    def _prune(self, row: Row) -> Pruned:
        if self.encoded is None:  # a prompt of text alone passes through
            return self.whole
        try:
            seconds = 0.0
            if self.harness.protocol.batch_size > 1 and scores_once(row.selector):
                scored, seconds = self._scored(row)
                row = replace(row, selector=scored)
            pruned = self.harness.prune(self.inputs, row, self.encoded)
        except ValueError as error:
            raise UsageError(f"{row.label} at keep={row.budget} on sample {self.sample.id!r}: {error}") from error
        return replace(pruned, selection_seconds=pruned.selection_seconds + seconds)

    def _scored(self, row: Row) -> tuple[TokenSelector, float]:
        """The selector with its scores of this image, taken once for all budgets, and the seconds that they took."""
        assert isinstance(row.selector, ScoreSelector)
        assert self.encoded is not None
        if row.label not in self._scores:
            tokens, repeats = self.encoded.tokens, self.harness.protocol.repeats
            warm = row.label in self.harness._warm
            times: list[float] = []
            taken: list[Tensor] = []
            with torch.no_grad(), self.harness.spent.on("select"):
                for _ in range(repeats + int(not warm)):
                    synchronize(self.harness.model.device)
                    start = time.perf_counter()
                    taken.append(row.selector.score(tokens))
                    synchronize(self.harness.model.device)
                    times.append(time.perf_counter() - start)

            # A shallow copy: calibration and all else stay the selector's own, and its method is set on the copy alone.
            known = copy.copy(row.selector)
            vars(known)["score"] = lambda _: taken[-1]
            self._scores[row.label] = known, median(times[-repeats:])
        return self._scores[row.label]

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
            wanted = [layer] if layer > 0 and self.encoded else []
            with self.harness.spent.on("forced"):
                reading = forced(self.harness.model, pruned.inputs, target, wanted, self.image_token_id)
        logits = reading.logits if reading is not None and given is not None and not same else None
        return self._spectrum(pruned, reading.visual[layer] if layer > 0 and reading and self.encoded else None), logits

    def _spectrum(self, pruned: Pruned, visual: Tensor | None) -> Spectrum | None:
        """The spectrum of the visual tokens at the layer; those that enter the language model are in the inputs."""
        if self.encoded is None:
            return None
        visual = torch.cat(_visual(pruned)) if visual is None else visual
        return spectrum(visual) if len(visual) else None

    def _shifts(self, after: Spectrum | None) -> dict[str, Any]:
        if after is None or self.full_spectrum is None:
            return {}
        return {"ipr": after.ipr, "effective_rank": after.effective_rank} | spectrum_shift(self.full_spectrum, after)

    def _cost(self, turn: Turn) -> dict[str, Any]:
        model, prompt = self.harness.model, turn.inputs["input_ids"].shape[1]
        costs: dict[str, Any] = {
            "prompt_tokens": prompt,
            "kv_bytes": cache_bytes(model.config, prompt, model.dtype.itemsize),
            "prefill_flops": language_flops(model.config, prompt, prompt),
            # The first decoded token attends to the prompt and to itself.
            "decode_flops": language_flops(model.config, 1, prompt + 1),
        }

        if turn.pruned is None or self.encoded is None:  # no pixels went in
            return costs
        costs["tower_flops"] = tower_flops(model.config, len(self.encoded.tokens.features))
        if turn.row.selector is not None and turn.row.budget is not None:
            costs["selector_flops"] = self._selector_flops(turn.row, self.encoded)
        return costs

    def _selector_flops(self, row: Row, encoded: Encoded) -> int:
        """Operations of a selection; equal shapes take equal work, and counting is slow."""
        # Where one score serves every budget, all that a budget adds is comparisons, which are not counted.
        budget = None if scores_once(row.selector) else row.budget
        key = (row.label, budget, encoded.tokens.features.shape, encoded.tokens.slots.shape)
        if key not in self.harness.flops:
            with self.harness.spent.on("flops"):
                self.harness.flops[key] = counted_flops(
                    lambda: prune_inputs(self.harness.model, self.inputs, row.selector, row.budget, encoded=encoded)
                )
        return self.harness.flops[key]

    def _kept(self, pruned: Pruned | None) -> dict[str, Any]:
        if pruned is None or pruned.keep is None or pruned.tokens is None:
            return {}
        kept = pruned.tokens.tiles_of(pruned.keep)
        figures: dict[str, Any] = {"kept": pack(kept)}

        if pruned.approximate:  # a token stands for more than the patch it is traced to: no evidence is counted
            figures["approximate"] = True
        if self._rectangles is not None:
            shares = evidence(kept, self._rectangles, self.sample.boxes)
            figures |= {} if shares is None else {"evidence": shares[0], "base_evidence": shares[1]}
        return figures

    def _same(self, given: Answer | None) -> bool:
        return given is not None and self.full is not None and torch.equal(given.ids, self.full.ids)


def scores_once(selector: TokenSelector | None) -> bool:
    """Whether one score serves every budget, and nothing but the cut depends on the budget."""
    if not isinstance(selector, ScoreSelector):
        return False
    # A subclass with a cut of its own, or one that merges by the budget, is asked for each.
    cls = type(selector)
    return (
        cls.ranking is ScoreSelector.ranking
        and cls.forward is RankSelector.forward
        and cls.select is TokenSelector.select
    )


def _median(answers: Sequence[Answer]) -> Answer:
    """The same answer given several times, with the medians of its times."""
    decode = [each.decode_seconds for each in answers if each.decode_seconds is not None]
    return replace(
        answers[0],
        prefill_seconds=median(each.prefill_seconds for each in answers),
        decode_seconds=median(decode) if decode else None,
    )


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
