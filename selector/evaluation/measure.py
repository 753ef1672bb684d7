"""One sample under every row: encoded once, pruned many times, answered by the unpruned model once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from selector.base import TokenSelector
from selector.budget import Budget
from selector.evaluation.answering import Answer, answer, forced_nll, prepare, without_image
from selector.evaluation.consistency import divergences, spectral_ipr
from selector.evaluation.cost import synchronize
from selector.evaluation.errors import UsageError
from selector.evaluation.evidence import evidence, model_rectangles
from selector.evaluation.metrics import exact_match, flip
from selector.evaluation.tasks.sample import Sample
from selector.models import Encoded, encode
from selector.plug import Positions, Pruned, prune_inputs

FULL, BLIND = "full", "blind"


@dataclass(frozen=True)
class Row:
    """One line of the table: a selector at a budget, or one of the two references."""

    label: str
    selector: TokenSelector | None = None
    budget: Budget | None = None


class Bench:
    """A model ready to take samples."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        needs: frozenset[str],
        answers: bool,
        max_new_tokens: int,
        positions: Positions = "original",
    ):
        self.model, self.processor, self.needs = model, processor, needs
        self.positions: Positions = positions
        self.answers, self.max_new_tokens = answers, max_new_tokens

    def open(self, sample: Sample) -> Measured:
        return Measured(self, sample)

    def answer(self, inputs: Mapping[str, Any]) -> Answer:
        return answer(self.model, self.processor, inputs, self.max_new_tokens)


class Measured:
    """A sample encoded once, with the unpruned model's answer; gives a record for every row."""

    def __init__(self, bench: Bench, sample: Sample):
        self.bench, self.sample = bench, sample
        model = bench.model
        self.inputs = prepare(bench.processor, sample.image, sample.question, model.device)
        synchronize(model.device)
        start = time.perf_counter()
        try:
            with torch.no_grad():
                self.encoded: Encoded | None = encode(model, self.inputs, bench.needs)
        except ValueError as error:  # no adapter for this model, or it cannot give what a selector needs
            raise UsageError(f"on sample {sample.id!r}: {error}") from error
        synchronize(model.device)
        self.encode_seconds = time.perf_counter() - start
        self.whole = prune_inputs(model, self.inputs, None, encoded=self.encoded)
        asked = bench.answers and sample.question is not None
        self.full = bench.answer(self.whole.inputs) if asked else None
        self.full_nll = self.full.nll if self.full else None
        self.full_ipr = spectral_ipr(self.encoded.packed[0]) if self.encoded else None
        self.rectangles = None
        if self.encoded and sample.boxes:
            size = (sample.image.height, sample.image.width)
            self.rectangles = model_rectangles(model.config, size, self.encoded.tokens.grid)

    def record(self, row: Row) -> dict[str, Any]:
        """Everything measured for one row, as plain values."""
        if row.label == BLIND and row.selector is None:
            inputs = self.inputs
            if self.encoded:
                inputs = without_image(inputs, self.encoded.image_token_id)
            return self._tokens(None) | self._answers(inputs, self.full is not None and self.bench.answer(inputs))
        pruned = self.whole if row.selector is None else self._prune(row)
        said = self.full if row.selector is None else (self.bench.answer(pruned.inputs) if self.full else None)
        return self._tokens(pruned) | self._evidence(pruned) | self._answers(pruned.inputs, said)

    def _prune(self, row: Row) -> Pruned:
        if self.encoded is None:  # a prompt of text alone passes through
            return self.whole
        try:
            return prune_inputs(
                self.bench.model,
                self.inputs,
                row.selector,
                row.budget,
                positions=self.bench.positions,
                encoded=self.encoded,
            )
        except ValueError as error:
            raise UsageError(f"{row.label} at keep={row.budget} on sample {self.sample.id!r}: {error}") from error

    def _tokens(self, pruned: Pruned | None) -> dict[str, Any]:
        found: dict[str, Any] = {"tokens": 0, "full_tokens": sum(self.whole.full), "saturated": False}
        if pruned is None or self.encoded is None:
            return found
        with torch.no_grad():
            kept = self.encoded.packed[0][pruned.keep[0].to(self.encoded.packed[0].device)]  # type: ignore[index]
            ipr = spectral_ipr(kept) if len(kept) else None
        return {
            "tokens": sum(pruned.measured),
            "full_tokens": sum(pruned.full),
            "saturated": pruned is not self.whole and pruned.measured == pruned.full,
            "encode_ms": 1e3 * self.encode_seconds,
            "selection_ms": 1e3 * pruned.selection_seconds,
            "ipr_shift": ipr - self.full_ipr if ipr is not None and self.full_ipr is not None else None,
        }

    def _evidence(self, pruned: Pruned) -> dict[str, Any]:
        if self.rectangles is None or pruned.keep is None or pruned.tokens is None:
            return {}
        shares = evidence(pruned.tokens.tiles_of(pruned.keep), self.rectangles, self.sample.boxes)
        return {} if shares is None else {"evidence": shares[0], "base_evidence": shares[1]}

    def _answers(self, inputs: Mapping[str, Any], said: Answer | bool | None) -> dict[str, Any]:
        full = self.full
        if full is None or not isinstance(said, Answer) or self.full_nll is None:
            return {}
        agrees = said.text == full.text
        found: dict[str, Any] = {
            "question": self.sample.question,
            "target": self.sample.answer,
            "answer": said.text,
            "full_answer": full.text,
            "agrees": agrees,
            "prefill_ms": 1e3 * said.prefill_seconds,
        }
        if self.sample.answer is not None:
            right, full_right = (exact_match(a.text, self.sample.answer) for a in (said, full))
            found |= {"correct": right, "full_correct": full_right, "flip": flip(full_right, right, agrees)}
        same = torch.equal(said.ids, full.ids)
        nll = said.nll if same else forced_nll(self.bench.model, inputs, full.ids)
        kl, js = divergences(full.logits[0], said.logits[0])
        return found | {"first_token_kl": kl, "first_token_js": js, "nll_shift": nll - self.full_nll}
