"""What several commands share: checked settings, loaded models and selectors, samples where no image is given."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from selector.base import TokenSelector
from selector.commands import loading
from selector.commands.large import check_quantization, parse_device_map, spread_options
from selector.errors import MissingData, UsageError
from selector.tasks import Task, load_task
from selector.tasks.sample import Sample

MOST_THREADS = max(256, os.cpu_count() or 1)
"""More than any machine can use; some 10,000 threads crash the process."""
SMALL = 100_000_000
"""A model of fewer parameters gets one thread, since synchronisation costs more than further threads gain."""


def choose(settings: dict[str, Any]) -> dict[str, TokenSelector]:
    """Loads the selectors, and checks whatever else can be checked without the model.

    Args:
        settings: ``threads``, ``device``, ``model``, ``dtype``, ``device_map``, ``quantization``, ``selectors`` and
            ``allow`` of a command.

    Returns:
        Selectors by label.

    Raises:
        UsageError: a setting out of its range, a model that is not there, or a selector that cannot be loaded.
    """
    if settings["threads"] is not None and positive("threads", settings["threads"]) > MOST_THREADS:
        raise UsageError(f"threads must be in 1..{MOST_THREADS}, got {settings['threads']}")
    device = loading.find_device(settings["device"])
    loading.choose_model(settings["model"], settings["dtype"])
    spread_options(parse_device_map(settings["device_map"]))
    check_quantization(settings["quantization"], device, settings["dtype"])
    return loading.load_selectors(settings["selectors"], device, settings["allow"])


def load_all(
    settings: dict[str, Any], selectors: dict[str, TokenSelector]
) -> tuple[Any, Any, dict[str, TokenSelector]]:
    """Loads the model, moves the selectors to it, and sets the threads of torch.

    Args:
        settings: ``threads``, ``model``, ``device``, ``dtype``, ``device_map``, ``attention`` and ``quantization`` of a
            command.
        selectors: as `choose` returns them.

    Returns:
        (model, processor, selectors by label on the model's device).

    Raises:
        UsageError: the model cannot be loaded.
    """
    import transformers

    threads = settings["threads"]
    transformers.logging.disable_progress_bar()
    names = ("model", "device", "dtype", "device_map", "attention", "quantization")
    model, processor = loading.load_model(*(settings[name] for name in names))

    # The default depends on the size of the model.
    if threads is None and sum(weight.numel() for weight in model.parameters()) < SMALL:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)
    return model, processor, {label: selector.to(model.device) for label, selector in selectors.items()}


def pages(seed: int) -> list[Sample]:
    """Samples to show where no image is given: one generated page and one scene."""
    return [next(load_task(name).samples(1, seed)) for name in ("documents", "scenes")]


def find_tasks(command: str, specs: list[str], skip_unreadable: bool, quiet: bool = False) -> list[Task]:
    """Loads the tasks whose data is there, and names the others on standard error.

    Args:
        command: named in the message.
        specs: names of tasks, or ``folder:PATH``.
        skip_unreadable: leave out images that cannot be read, instead of an error.
        quiet: name nothing.

    Raises:
        UsageError: a task twice, no task, or none whose data is there.
    """
    # Two tasks of one name would write one table.
    twice = next((spec for i, spec in enumerate(specs) if spec in specs[:i]), None)
    if twice is not None or not specs:
        raise UsageError(f"tasks must name at least one, each once, got {' '.join(specs) or 'none'}")

    # A comparison over several tasks should not fail for the one data set that was not downloaded.
    tasks: list[Task] = []
    missing: list[str] = []
    for spec in specs:
        try:
            tasks.append(load_task(spec, skip_unreadable))
        except MissingData as error:
            missing.append(str(error))
            if not quiet:
                print(f"selector {command}: {spec} is left out: {error}", file=sys.stderr)
    if not tasks:
        raise UsageError(f"tasks must hold one whose data is there: {'; '.join(missing)}")
    return tasks


def name_unreadable(tasks: list[Task]) -> None:
    """Names the images that were left out, on standard error."""
    for task in tasks:
        if task.unreadable:
            print(f"{task.name}: {len(task.unreadable)} images cannot be read and are left out:", file=sys.stderr)
            print(*(f"  {name}" for name in task.unreadable), sep="\n", file=sys.stderr)


def sample_limit(value: Any) -> int | None:
    """The number of samples per task from a setting, a number or "all"; None for all.

    Raises:
        UsageError: anything else.

    Example:
        >>> sample_limit("8"), sample_limit("all")
        (8, None)
    """
    if value == "all":
        return None
    # A command line gives texts, YAML numbers. isdigit alone would take digits of other scripts.
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise UsageError(f"samples must be an int >= 1 or all, got {value!r}")
    return number


def positive(name: str, value: Any) -> int:
    """The value, if it is an int of at least 1.

    Raises:
        UsageError: names the setting.

    Example:
        >>> positive("repeats", 3)
        3
    """
    # YAML's "yes" is a bool, and a bool is an int.
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} must be an int >= 1, got {value!r}")
    return value


def whole(name: str, value: Any) -> int:
    """The value, if it is an int.

    Raises:
        UsageError: names the setting.

    Example:
        >>> whole("seed", -3)
        -3
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} must be an int, got {value!r}")
    return value
