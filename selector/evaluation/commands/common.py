"""What several commands share: checked settings, loaded models and selectors, what is shown without an image."""

from __future__ import annotations

from typing import Any

import torch

from selector.errors import UsageError
from selector.evaluation import loading
from selector.evaluation.tasks import load_task
from selector.evaluation.tasks.sample import Sample

SMALL = 100_000_000
"""A model of fewer parameters gets one thread: several wait for one another more than they help, the more so on busy
cores."""


def load_all(settings: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(model, processor, selectors by label), and the threads of torch set."""
    import transformers

    threads = None if settings["threads"] is None else positive("threads", settings["threads"])
    transformers.logging.disable_progress_bar()
    device = loading.find_device(settings["device"])
    selectors = loading.load_selectors(settings["selectors"], device, settings["allow"])
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


def positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} must be an int >= 1, got {value!r}")
    return value


def whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} must be an int, got {value!r}")
    return value
