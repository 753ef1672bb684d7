"""What a comparison was made with: the settings that key its records, and those that its report names."""

from __future__ import annotations

import platform
from typing import Any

import torch

from selector import records
from selector.budget import Budget
from selector.measure.harness import Row
from selector.measure.identity import code, fingerprint, identity
from selector.measure.model_files import quantization
from selector.tasks import Task


def written(budget: Budget | None) -> str | None:
    """How tables write a budget: what stays, and scope and newlines where they are not the defaults.

    Example:
        >>> from selector.budget import Budget
        >>> written(Budget(64)), written(Budget(0.25, scope="tile"))
        ('64', '0.25 tile')
    """
    if budget is None:
        return None
    unusual = [budget.scope] if budget.scope != "image" else []
    return " ".join(
        [str(budget), *unusual, *([f"newlines={budget.newlines}"] if budget.newlines != "kept_rows" else [])]
    )


def environment(model: Any, batch_threads: int | None = None) -> dict[str, Any]:
    """The versions and the machine that figures were measured with, as plain values for the report."""
    import transformers

    cuda = model.device.type == "cuda"
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(model.device) if cuda else f"{model.device.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "batch_threads": batch_threads or torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
    } | ({"quantization": quantised} if (quantised := quantization(model)) else {})


def common_settings(model: Any, processor: Any) -> dict[str, Any]:
    """What the records of every row depend on, besides the `Protocol`: code, model and processor."""
    import transformers

    config = model.config.to_dict()
    # Every entry is part of the key of a record: what is missing here lets two different runs share records.
    return {
        "format": records.FORMAT,
        "code": code(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": fingerprint(model),
        # Weights do not tell the config (rope, scaling, patch sizes); its path and version do not matter.
        "config": records.key_of(
            {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}
        ),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        # The PIL and the torchvision image processor differ in the second decimal of pixels.
        "processor": type(processor.image_processor).__name__,
        "processing": records.key_of(
            {"image": processor.image_processor.to_json_string(), "chat": str(processor.chat_template)}
        ),
    }


def row_settings(row: Row, task: Task) -> dict[str, Any]:
    """What the records of one row on one task depend on: the samples, and what is kept of them."""
    chosen: dict[str, Any] = {"reference": row.label}
    if row.selector is not None and row.budget is not None:
        chosen = {
            "selector": identity(row.selector, row.budget),
            "keep": row.budget.keep,
            "scope": row.budget.scope,
            "newlines": row.budget.newlines,
        }

    # A folder is what it holds, not what it is called: moved, it keeps its records.
    name = task.name if task.size is None else "folder"
    return {"task": name, "task_fingerprint": task.fingerprint} | asked(task) | chosen


def asked(task: Task) -> dict[str, str]:
    """How a task asks and scores, where that is not the usual way: the usual one is in no key and in no plan."""
    usual = {"metric": "exact", "suffix": "", "system": ""}
    return {name: getattr(task, name) for name, value in usual.items() if getattr(task, name) != value}
