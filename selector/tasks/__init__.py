"""Tasks: streams of samples.

Those in `GENERATED` are drawn without end; ``folder:PATH`` reads a folder of images, ``hf:NAME`` a public benchmark.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType

from selector.errors import UsageError
from selector.record import METRICS
from selector.tasks.sample import Sample

GENERATED = {
    "documents": "selector.tasks.generated.documents",
    "scenes": "selector.tasks.generated.scenes",
    "charts": "selector.tasks.generated.charts",
    "receipts": "selector.tasks.receipts.windows",
}
"""Tasks without end, each with the module that draws it."""

SCORED_BY_ANLS = ("receipts",)
"""Generated tasks whose answers are also scored by ANLS: a text read from a scan may be nearly right."""

PLACEHOLDER = "<image>"
"""What stands for the image in a prompt; a question must not contain a second one."""


@dataclass(frozen=True)
class Task:
    """A named stream of samples: the first k of a seed are the same whatever the count.

    Attributes:
        name: the spec as the user wrote it.
        samples: (count, seed) -> samples; a count above `size` gives all there are.
        size: how many samples there are; None if they are generated without end.
        fingerprint: changes when the samples do.
        unreadable: images that were left out; filled while iterating, only where the user allowed it.
        anls: whether answers are also scored by ANLS, which forgives a misread letter.
        metric: how an answer is scored, of `selector.record.METRICS`.
        suffix: asked after every question, on a line of its own ("Answer the question using a single word or phrase.").
        system: what the system turn says; "" for none.

    >>> task = load_task("scenes")
    >>> [sample.id for sample in task.samples(2, seed=0)]
    ['scenes-0-0', 'scenes-0-1']
    >>> task.size is None
    True
    """

    name: str
    samples: Callable[[int, int], Iterator[Sample]]
    size: int | None
    fingerprint: str
    unreadable: list[str] = field(default_factory=list)
    anls: bool = False
    metric: str = "exact"
    suffix: str = ""
    system: str = ""

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UsageError(f"task {self.name!r}: metric must be one of {', '.join(METRICS)}, got {self.metric!r}")

    def prompt(self, question: str | None) -> str | None:
        """The question as it is asked: with the suffix below it. None stays None."""
        return f"{question}\n{self.suffix}" if question is not None and self.suffix else question


def load_task(spec: str, skip_unreadable: bool = False) -> Task:
    """The task of a spec: a name of `GENERATED`, "folder:PATH", or "hf:NAME" (`selector.tasks.benchmarks`).

    Args:
        spec: a name, or "folder:PATH" with the filters that `selector.tasks.folder` describes.
        skip_unreadable: leave images out that cannot be decoded (named in `Task.unreadable`) instead of raising.

    Raises:
        UsageError: unknown task, a folder without images or annotations, or a benchmark that cannot be read.
    """
    kind, _, argument = spec.partition(":")
    if kind == "folder":
        # Imported here, since `folder` itself needs `Task`.
        from selector.tasks.folder import load_folder

        return load_folder(spec, argument, skip_unreadable)
    if kind == "hf":
        from selector.tasks.benchmarks import load_benchmark

        return load_benchmark(spec, argument, skip_unreadable)

    if spec not in GENERATED:
        close = difflib.get_close_matches(spec, GENERATED, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"unknown task {spec!r}: not one of {', '.join(GENERATED)}, folder:PATH, hf:NAME{hint}")

    # Only tasks with files behind them (the scans of `receipts`) have a fingerprint of their own to mix in.
    module = generator(spec)
    data = module.fingerprint() if hasattr(module, "fingerprint") else ""
    return Task(spec, module.samples, None, _probe(module.samples, data), anls=spec in SCORED_BY_ANLS)


def check_question(text: str) -> str:
    """Returns a question that can be asked unchanged.

    Raises:
        UsageError: it is empty, or holds the placeholder of an image.

    >>> check_question("what is TOTAL?")
    'what is TOTAL?'
    """
    if not text.strip():
        raise UsageError(f"a question must be a text, got {text!r}")
    if PLACEHOLDER in text:
        raise UsageError(f"a question must not hold {PLACEHOLDER}, which stands for the image, got {text[:80]!r}")
    return text


def generator(name: str) -> ModuleType:
    """The module of a generated task, with its functions `draft`, `page` and `samples`.

    Raises:
        ValueError: no generated task has this name.
    """
    if name not in GENERATED:
        raise ValueError(f"task must be one of {', '.join(GENERATED)}, got {name!r}")
    return import_module(GENERATED[name])


def _probe(samples: Callable[[int, int], Iterator[Sample]], data: str, count: int = 4) -> str:
    """A fingerprint of a generator's output, so that records of an older version of it are never reused.

    `data` is the fingerprint of the files behind it, if it has any. Only the first `count` samples of seed 0 are drawn:
    a change of the generator almost surely shows in them, and all that could be drawn has no end.
    """
    digest = hashlib.sha256(data.encode())

    for sample in samples(count, 0):
        digest.update(repr((sample.id, sample.image.size, sample.question, sample.answer, sample.boxes)).encode())
        digest.update(sample.image.convert("RGB").tobytes())
    return digest.hexdigest()[:16]
