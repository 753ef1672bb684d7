"""One sample under every row: encoded once, pruned many times, answered by the unpruned model once.

With a batch size of 1 each prompt is answered alone, by ``generate``, and every time belongs to one sample. With a
larger one the prompts of several samples and selectors are answered together (`selector.measure.batches`), and a
selector that scores once for every budget does so once per image; times are then shares of what was done together.

Selectors that act inside the language model choose while it reads the prompt: the time of their stages counts as
selection and not as prefill, so that both add up to the first token as they do for the others. Their spectrum is taken
where their last tokens leave, and compared with the unpruned model's at that layer.
"""

from __future__ import annotations

import base64
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from selector.measure.evidence import Canvas, evidence, model_canvas, unplaced
from selector.measure.flops import cache_bytes, counted_flops, flop_counter, language_flops, tower_flops
from selector.measure.protocol import Protocol
from selector.measure.scoring import answer_record
from selector.models import Encoded, encode
from selector.pruning import Pruned, prune_inputs
from selector.stages import UnmetBudget
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

    Attributes:
        unmet: of a budget that this sample cannot meet, the smallest `keep` that it could; nothing is asked then.

    Example:
        >>> blind = Turn(Row("no image"), {"input_ids": torch.tensor([[1, 5, 9]])}, pruned=None)
        >>> blind.inputs["input_ids"].shape[1]
        3
    """

    row: Row
    inputs: Mapping[str, Any]
    pruned: Pruned | None
    unmet: int | None = None

    @property
    def inside(self) -> Pruned | None:
        """`pruned`, where tokens leave inside the language model."""
        return self.pruned if self.pruned is not None and self.pruned.inside is not None else None


class Harness:
    """A model ready to measure samples, and what it remembers from one sample to the next.

    Args:
        needs: fields of `VisualTokens` that some selector reads before the language model.
        protocol: how each sample is measured.
        batch_threads: of torch, for batches; None: as many as for everything else.
        layers: of the language model, behind the last stages of selectors that act inside it.

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
        layers: Sequence[int] = (),
    ):
        self.model, self.processor, self.needs, self.protocol = model, processor, needs, protocol
        self.batch_threads = batch_threads

        # Spectra are compared at the layer asked for, or deeper where the tokens of some row leave.
        self.layers = sorted({protocol.layer, *(max(protocol.layer, layer) for layer in layers)})

        self.spent = Spent(model.device)
        self.flops: dict[Any, int] = {}  # of selectors, by shapes: see `Measured`
        # What ran once, untimed: "model", "batch", the labels of rows, and ("inside", label).
        self._warm: set[Any] = set()

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

    def answer(self, turn: Turn) -> Answer:
        """The greedy answer to a prompt, asked for `Protocol.repeats` times; its times are medians."""
        answers, seconds = [], []
        warm = turn.inside is None or self._is_warm(("inside", turn.row.label))
        for _ in range(self.protocol.repeats + int(not warm)):
            with self.spent.on("prefill"), self.acting(turn.pruned):
                given = answer(self.model, self.processor, turn.inputs, self.protocol.max_new_tokens)
            self.spent.move("prefill", "decode", (given.decode_seconds or 0.0) * (len(given.ids) - 1))
            answers.append(self._without_stages(given, turn))
            seconds.append(0.0 if turn.inside is None else turn.inside.selection_seconds)

        if turn.inside is not None:
            turn.inside.selection_seconds = median(seconds[-self.protocol.repeats :])
        return _median(answers[-self.protocol.repeats :])

    @contextmanager
    def acting(self, pruned: Pruned | None) -> Iterator[None]:
        """Within the block the model loses what is to leave inside it; does nothing for any other prompt."""
        if pruned is None or pruned.inside is None:
            yield
            return
        try:
            with pruned.acting(self.model):
                yield
        except ValueError as error:  # what cannot be pruned inside, by name
            raise UsageError(str(error)) from error

    def _is_warm(self, what: Any) -> bool:
        """Whether something ran before; it counts as such from now on."""
        warm = what in self._warm
        self._warm.add(what)
        return warm

    def _without_stages(self, given: Answer, turn: Turn) -> Answer:
        """An answer whose prefill does not hold the time of the selection within it, charged to the latter."""
        plan = turn.inside.inside if turn.inside is not None else None
        if plan is None:
            return given
        self.spent.move("prefill", "select", plan.seconds)
        return replace(given, prefill_seconds=max(0.0, given.prefill_seconds - plan.seconds))

    def read(self, turns: Sequence[tuple[Measured, Turn]]) -> list[Reading]:
        """One batch of prompts, answered `Protocol.repeats` times; times are medians.

        Before the first batch two of its prompts are answered, and that time is in no record.
        """
        if "batch" not in self._warm:
            self._warm.add("batch")
            self._read(turns[:2])
        inside = turns[0][1].inside
        if inside is not None and not self._is_warm(("inside", turns[0][1].row.label)):
            self._read(turns)

        timed, seconds = [], []
        for _ in range(self.protocol.repeats):
            timed.append(self._read(turns))
            seconds.append(0.0 if inside is None else inside.selection_seconds)
        if inside is not None:
            inside.selection_seconds = median(seconds)
        return [replace(same[0], answer=_median([each.answer for each in same])) for same in zip(*timed, strict=True)]

    def _read(self, turns: Sequence[tuple[Measured, Turn]]) -> list[Reading]:
        # The unpruned prompts are read at every layer that some row is compared with them at.
        inside = turns[0][1].inside
        whole = any(turn.pruned is measured.whole for measured, turn in turns)
        wanted = self.layers if whole else [self.protocol.layer] if inside is None else []
        layers = [layer for layer in wanted if layer > 0]

        # What cannot be done inside this language model is the user's to put right.
        try:
            with threads(self.batch_threads):
                readings = read(
                    self.model,
                    self.processor,
                    [turn.inputs for _, turn in turns],
                    [None if measured.full is None else measured.full.ids for measured, _ in turns],
                    self.protocol.max_new_tokens,
                    self.spent,
                    layers,
                    [measured.image_token_id if turn.pruned else None for measured, turn in turns],
                    inside,
                )
        except ValueError as error:
            if inside is None or isinstance(error, UsageError):
                raise
            raise UsageError(str(error)) from error

        return [
            replace(reading, answer=self._without_stages(reading.answer, turn))
            for reading, (_, turn) in zip(readings, turns, strict=True)
        ]

    def prune(self, inputs: Mapping[str, Any], row: Row, encoded: Encoded) -> Pruned:
        """The pruned inputs, selected `Protocol.repeats` times; the seconds that selection took are the median."""
        # The first selection of a row also allocates and picks kernels: it is repeated, and its time does not count.
        warm = self._is_warm(row.label)  # by label: budgets of one selector run the same code
        chosen = {"positions": self.protocol.positions, "encoded": encoded, "inside": True}
        with self.spent.on("select"):
            pruned = [
                prune_inputs(self.model, inputs, row.selector, row.budget, **chosen)
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

        # For evidence and the report's pictures. A family without one does without both, which the report says once.
        # Approximate tokens cover no patches of their own.
        self.canvas: Canvas | None = None
        if self.encoded and not self.encoded.approximate and unplaced(model.config) is None:
            size, tokens = (sample.image.height, sample.image.width), self.encoded.tokens
            self.canvas = model_canvas(model.config, size, tokens.grid, len(tokens.features))
        self._rectangles = self.canvas.rectangles() if self.canvas is not None and sample.boxes else None

        # The reference of every comparison. `whole` goes through the plug, too: full and pruned then differ in nothing
        # but what is kept.
        with spent.on("select"):
            self.whole = prune_inputs(model, self.inputs, None, encoded=self.encoded)
        self.asked = harness.protocol.answers and sample.question is not None
        self.full: Answer | None = None
        self.full_spectra: dict[int, Spectrum | None] = {}  # by layer
        self._scores: dict[str, tuple[TokenSelector, float]] = {}  # by label, with the seconds that scoring took
        if harness.protocol.batch_size == 1 or not self.asked:
            self.full = harness.answer(Turn(Row(FULL), self.whole.inputs, self.whole)) if self.asked else None
            self.full_spectra = self._internals(self.whole, None, harness.layers)[0]

    def take_full(self, reading: Reading) -> None:
        """The unpruned model's answer, out of a batch."""
        self.full = reading.answer
        self.full_spectra = self._spectra(self.whole, reading.visual, self.harness.layers)

    def turn(self, row: Row) -> Turn:
        """The prompt of a row; `Turn.unmet` where the budget is spent before its selector acts.

        Raises:
            UsageError: the selector or the budget cannot be met on this sample for any other reason.
        """
        if row.label == BLIND and row.selector is None:
            inputs = self.inputs
            if self.encoded:
                inputs = without_image(inputs, self.encoded.image_token_id)
            return Turn(row, inputs, None)

        # A budget that this image cannot meet is a result, not a mistake: the report names it.
        try:
            pruned = self.whole if row.selector is None else self._prune(row)
        except UnmetBudget as error:
            return Turn(row, self.inputs, None, error.least)

        # The spectrum is taken where the last tokens leave.
        if pruned.inside is not None:
            pruned.inside.watch = max(self.harness.protocol.layer, pruned.inside.stages[-1].layer)
        return Turn(row, pruned.inputs, pruned)

    def refused(self, turn: Turn) -> dict[str, Any]:
        """The record of a budget that this sample cannot meet."""
        return {"full_tokens": sum(self.whole.full), "unmet": turn.unmet}

    def record(self, row: Row) -> dict[str, Any]:
        """Everything measured for one row, as plain values."""
        with self.harness.spent.on("records"):
            turn = self.turn(row)
            if turn.unmet is not None:
                return self.refused(turn)
            given = self.full
            if self.full is not None and turn.pruned is not self.whole:
                given = self.harness.answer(turn)

            # The figures of `full` were taken when the sample was opened.
            after, logits = self.full_spectra, None
            if turn.pruned is None:
                after = {}
            elif turn.pruned is not self.whole:
                after, logits = self._internals(turn.pruned, given, [self.harness.protocol.layer])

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
            return self._figures(turn, self.full, self.full_spectra, self.full.logits if self.full else None)
        logits = reading.answer.logits if self._same(reading.answer) else reading.forced
        after = {}
        if turn.pruned is not None:
            after = self._spectra(turn.pruned, reading.visual, [self.harness.protocol.layer])
        return self._figures(turn, reading.answer, after, logits)

    def _figures(
        self, turn: Turn, given: Answer | None, after: Mapping[int, Spectrum | None], logits: Tensor | None
    ) -> dict[str, Any]:
        answers: dict[str, Any] = {}
        if self.full is not None and given is not None and logits is not None:
            answers = answer_record(self.sample, given, self.full, logits, self.metric)
        shifts = self._shifts(turn, after)
        return self._tokens(turn.pruned) | shifts | self._cost(turn) | self._kept(turn.pruned) | answers

    def _prune(self, row: Row) -> Pruned:
        if self.encoded is None:  # a prompt of text alone passes through
            return self.whole
        try:
            seconds = 0.0
            if self.harness.protocol.batch_size > 1 and scores_once(row.selector):
                scored, seconds = self._scored(row)
                row = replace(row, selector=scored)
            pruned = self.harness.prune(self.inputs, row, self.encoded)
        except UnmetBudget:
            raise
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
        figures = {
            "tokens": sum(pruned.measured),
            "full_tokens": full,
            # The budget allowed all tokens.
            "saturated": pruned is not self.whole and pruned.measured == pruned.full,
            "encode_ms": 1e3 * self.encode_seconds,
            "selection_ms": 1e3 * pruned.selection_seconds,
        }
        if pruned.inside is not None:
            layers = [sum(own) for own in zip(*pruned.layers, strict=True)]  # of all images together
            figures |= {"tokens_per_layer": layers, "last_tokens": layers[-1]}
        return figures

    def _internals(
        self, pruned: Pruned, given: Answer | None, layers: Sequence[int]
    ) -> tuple[dict[int, Spectrum | None], Tensor | None]:
        """(spectra of the visual tokens by layer, teacher-forced logits if they had to be computed)."""
        same, inside = self._same(given), pruned.inside is not None
        target = self.full.ids if self.full else pruned.inputs["input_ids"].new_empty(0)

        # Without a pass: layer 0 is in the inputs, and an answer that stayed the same has the logits of its generation.
        # What leaves inside has left in the pass that answered; without answers this is the only one.
        reading = None
        wanted = [layer for layer in layers if layer > 0] if self.encoded and not inside else []
        if wanted or (given is not None and not same) or (inside and given is None):
            seconds = pruned.selection_seconds
            with self.harness.spent.on("forced"), self.harness.acting(pruned):
                reading = forced(self.harness.model, pruned.inputs, target, wanted, self.image_token_id)
            if given is not None:
                pruned.selection_seconds = seconds
        logits = reading.logits if reading is not None and given is not None and not same else None
        return self._spectra(pruned, reading.visual if reading else {}, layers), logits

    def _spectra(
        self, pruned: Pruned, visual: Mapping[int, Tensor], layers: Sequence[int]
    ) -> dict[int, Spectrum | None]:
        """The spectra of the visual tokens by layer; those that enter the language model are in the inputs."""
        if self.encoded is None:
            return {}
        plan = pruned.inside
        if plan is not None and plan.watch is not None:  # where the last tokens leave, and there alone
            tables = {plan.watch: torch.cat(plan.seen)}
        else:
            tables = {layer: visual[layer] if layer > 0 else torch.cat(_visual(pruned)) for layer in layers}
        return {layer: spectrum(table) if len(table) else None for layer, table in tables.items()}

    def _shifts(self, turn: Turn, spectra: Mapping[int, Spectrum | None]) -> dict[str, Any]:
        plan = turn.inside.inside if turn.inside is not None else None
        layer = self.harness.protocol.layer if plan is None or plan.watch is None else plan.watch
        before, after = self.full_spectra.get(layer), spectra.get(layer)
        if before is None or after is None:
            return {}
        figures = {"ipr": after.ipr, "effective_rank": after.effective_rank} | spectrum_shift(before, after)
        return figures if plan is None else figures | {"spectrum_layer": layer}

    def _cost(self, turn: Turn) -> dict[str, Any]:
        model, prompt = self.harness.model, turn.inputs["input_ids"].shape[1]
        lengths = _lengths(turn)
        costs: dict[str, Any] = {
            "prompt_tokens": prompt,
            "kv_bytes": cache_bytes(model.config, lengths, model.dtype.itemsize),
            "prefill_flops": language_flops(model.config, lengths, lengths),
            # The first decoded token attends to the prompt and to itself.
            "decode_flops": language_flops(model.config, *_decoding(lengths)),
        }

        if turn.pruned is None or self.encoded is None:  # no pixels went in
            return costs
        costs["tower_flops"] = tower_flops(model.config, len(self.encoded.tokens.features))
        if turn.row.selector is not None and turn.row.budget is not None:
            costs["selector_flops"] = self._selector_flops(turn, self.encoded)
        return costs

    def _selector_flops(self, turn: Turn, encoded: Encoded) -> int:
        """Operations of a selection; equal shapes take equal work, and counting is slow.

        Inside the language model the words of the prompt are looked at, too: what is counted is that of the first
        prompt of these shapes, which differs little from that of others.
        """
        # Where one score serves every budget, all that a budget adds is comparisons, which are not counted.
        row = turn.row
        budget = None if scores_once(row.selector) else row.budget
        key = (row.label, budget, encoded.tokens.features.shape, encoded.tokens.slots.shape)
        if key not in self.harness.flops:
            with self.harness.spent.on("flops"):
                self.harness.flops[key] = self._counted(row, encoded)
        return self.harness.flops[key]

    def _counted(self, row: Row, encoded: Encoded) -> int:
        model = self.harness.model
        made: list[Pruned] = []

        def select() -> None:
            made.append(prune_inputs(model, self.inputs, row.selector, row.budget, encoded=encoded, inside=True))

        operations = counted_flops(select)
        plan = made[0].inside
        if plan is None:
            return operations

        # Of the stages alone: the layers around them are in the formula of the prefill.
        stages: list[int] = []

        @contextmanager
        def counting() -> Iterator[None]:
            with flop_counter() as counter:
                yield
            stages.append(counter.get_total_flops())

        plan.around = counting
        with self.harness.acting(made[0]):
            forced(model, made[0].inputs, self.inputs["input_ids"].new_empty(0))
        return operations + sum(stages)

    def _kept(self, pruned: Pruned | None) -> dict[str, Any]:
        if pruned is None or pruned.keep is None or pruned.tokens is None:
            return {}
        kept = pruned.tokens.tiles_of(pruned.keep)
        figures: dict[str, Any] = {"kept": pack(kept)}

        if pruned.approximate:  # a token stands for more than the patch it is traced to: no evidence is counted
            figures["approximate"] = True
        if self._rectangles is not None:
            shares = evidence(kept, self._rectangles, self.sample.boxes)
            if shares is not None:
                named = zip(("evidence", "base_evidence"), shares, strict=True)
                figures |= {name: share for name, share in named if share is not None}
        return figures

    def _same(self, given: Answer | None) -> bool:
        return given is not None and self.full is not None and torch.equal(given.ids, self.full.ids)


def scores_once(selector: TokenSelector | None) -> bool:
    """Whether one score serves every budget, and nothing but the cut depends on the budget."""
    if not isinstance(selector, ScoreSelector):
        return False
    # A subclass with a cut of its own, or one that merges by the budget, is asked for each.
    cls = type(selector)
    if selector.acts == "inside":  # what it reads is known to a stage alone
        return False
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


def _lengths(turn: Turn) -> int | list[int]:
    """Tokens of the prompt, text included: one number, or one per layer where they leave between layers."""
    prompt = turn.inputs["input_ids"].shape[1]
    if turn.inside is None:
        return prompt
    text = prompt - sum(len(own) for own in turn.inside.features)
    return [text + sum(own) for own in zip(*turn.inside.layers, strict=True)]


def _decoding(lengths: int | list[int]) -> tuple[Any, Any]:
    """Arguments of `language_flops` for the first decoded token, which attends to the prompt and to itself."""
    if isinstance(lengths, int):
        return 1, lengths + 1
    return [1] * len(lengths), [length + 1 for length in lengths]


def _visual(pruned: Pruned) -> list[Tensor]:
    """What enters the language model: merged tokens too, as they were merged."""
    return list(pruned.inputs["mm_encoder_outputs"]["image"].pooler_output)
