"""A task of four samples, and a comparison on it."""

from __future__ import annotations

import pytest
from small_runs import SIZES, TOKENS

from selector import Budget, Random, SVDPrune
from selector.measure.protocol import Protocol
from selector.measure.run import compare
from selector.tasks import Task
from selector.tasks.sample import Sample


@pytest.fixture
def task(make_image):
    questions = ["what is shown?", "how many?", None, "what is shown?"]

    def samples(count, seed):
        for i, ((h, w), question) in enumerate(zip(SIZES, questions, strict=True)):
            if i < count:
                yield Sample(
                    f"s{i}", make_image(h, w, i + seed), question, "red" if question else None, ((1.0, 1.0, 9.0, 9.0),)
                )

    return Task("toy", samples, len(SIZES), "toy-1")


@pytest.fixture
def run(tiny_model, task, tmp_path):
    """``run(**changes)`` -> the steps of a comparison in `tmp_path`."""
    model, processor = tiny_model()

    def call(selectors=None, keeps=("0.5", "9"), tasks=None, **changes):
        options = {"baseline": "random", "model_name": "toy-model"} | changes
        settings = {name: options.pop(name) for name in Protocol.__dataclass_fields__ if name in options}
        return list(
            compare(
                options.pop("model", model),
                processor,
                selectors or {"random": Random(), "svd": SVDPrune(energy=0.5)},
                [Budget.parse(keep) for keep in keeps],
                tasks or [task],
                tmp_path,
                protocol=Protocol(**{"max_new_tokens": TOKENS} | settings),
                **options,
            )
        )

    call.folder, call.model, call.processor = tmp_path, model, processor
    return call
