"""What several commands share: checked settings, loaded models and selectors, what is shown without an image."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from selector.base import TokenSelector
from selector.commands import loading
from selector.errors import MissingData, UsageError
from selector.tasks import Task, load_task
from selector.tasks.sample import Sample

MOST_THREADS = max(256, os.cpu_count() or 1)
"""More than any machine has use for; some 10,000 threads crash the process."""
SMALL = 100_000_000
"""A model of fewer parameters gets one thread: several wait for one another more than they help, the more so on busy
cores."""


def choose(settings: dict[str, Any]) -> dict[str, TokenSelector]:
    """The selectors by label; every other mistake that can be seen without the model is an error here, too."""
    if settings["threads"] is not None and positive("threads", settings["threads"]) > MOST_THREADS:
        raise UsageError(f"threads must be in 1..{MOST_THREADS}, got {settings['threads']}")
    device = loading.find_device(settings["device"])
    loading.choose_model(settings["model"], settings["dtype"])
    return loading.load_selectors(settings["selectors"], device, settings["allow"])


def load_all(
    settings: dict[str, Any], selectors: dict[str, TokenSelector]
) -> tuple[Any, Any, dict[str, TokenSelector]]:
    """(model, processor, selectors by label on the model's device), and the threads of torch set."""
    import transformers

    threads = settings["threads"]
    transformers.logging.disable_progress_bar()
    model, processor = loading.load_model(
        settings["model"], settings["device"], settings["dtype"], settings["device_map"], settings["attention"]
    )
    if threads is None and sum(weight.numel() for weight in model.parameters()) < SMALL:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)
    return model, processor, {label: selector.to(model.device) for label, selector in selectors.items()}


def pages(seed: int) -> list[Sample]:
    """What is shown where no image is given: one generated page and one scene."""
    return [next(load_task(name).samples(1, seed)) for name in ("documents", "scenes")]


def find_tasks(command: str, specs: list[str], skip_unreadable: bool) -> list[Task]:
    """The tasks whose data is there; the others are named, and are an error where none is left."""
    twice = next((spec for i, spec in enumerate(specs) if spec in specs[:i]), None)
    if twice is not None or not specs:
        raise UsageError(f"tasks must name at least one, each once, got {' '.join(specs) or 'none'}")
    found: list[Task] = []
    missing: list[str] = []
    for spec in specs:
        try:
            found.append(load_task(spec, skip_unreadable))
        except MissingData as error:
            missing.append(str(error))
            print(f"selector {command}: {spec} is left out: {error}", file=sys.stderr)
    if not found:
        raise UsageError(f"tasks must hold one whose data is there: {'; '.join(missing)}")
    return found


def name_unreadable(tasks: list[Task]) -> None:
    for task in tasks:
        if task.unreadable:
            print(f"{task.name}: {len(task.unreadable)} images cannot be read and are left out:", file=sys.stderr)
            print(*(f"  {name}" for name in task.unreadable), sep="\n", file=sys.stderr)


def sample_limit(value: Any) -> int | None:
    """Samples of each task; None for all."""
    if value == "all":
        return None
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise UsageError(f"samples must be an int >= 1 or all, got {value!r}")
    return number


def positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} must be an int >= 1, got {value!r}")
    return value


def whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} must be an int, got {value!r}")
    return value
