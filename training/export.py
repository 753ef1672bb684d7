"""From a training checkpoint to a selector folder: config.json, model.safetensors, README.md (the card), training.yaml.

The ``.ckpt`` is read with ``weights_only=True``, so that no code in it can run, and the weights are loaded strictly:
none may be missing or left over.
"""

from __future__ import annotations

import pickle
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from selector.errors import UsageError
from selector.files import atomic

PREFIX = "selector."
"""Of the selector's tensors in a checkpoint; those of the reconstructor are left behind."""
_RULES = {
    "GumbelSelector": "it ranks the patches of each tile, as in arXiv 2503.16660.",
    "ImageTransformer": "it ranks all patches of an image together, base view and tiles.",
}


CHART = "results.png"
"""The picture that an export with results draws."""


def export(
    checkpoint: str | Path,
    folder: str | Path,
    command: str | None = None,
    accuracy: str | Path | None = None,
    results: str | Path | None = None,
    pictures: Sequence[str | Path] = (),
) -> Path:
    """Writes the selector of a checkpoint to a folder that `TokenSelector.from_pretrained` loads.

    Args:
        checkpoint: ``best.ckpt`` or ``last.ckpt`` of a run; the run's ``config.yaml`` is copied if it exists.
        folder: the selector folder; files of an earlier export are replaced.
        command: the command that trained the selector, for the card.
        accuracy: a Markdown file for the end of the card: the selector's results on tasks.
        results: the folder of a finished `selector compare` in which this very selector took part: the card gets its
            results as a table, as a picture and as the metadata ``model-index`` of the hub.
        pictures: image files that are copied beside the card and shown at its end, such as one of `selector show`.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: no such checkpoint, or no such picture.
        ValueError: not a checkpoint of this package, tensors missing, left over or misshapen, or results of another
            selector or of an unfinished run.
    """
    from selector.measure.identity import identity
    from selector.methods.gumbel import GumbelSelector
    from selector.methods.image_transformer import ImageTransformer

    state = _read(Path(checkpoint))
    about = state["selector"]
    fields = ("class", "encoder", "data", "objective", "steps", "tokens_per_s", "validation")
    if missing := [name for name in fields if name not in about]:
        raise ValueError(f"checkpoint {checkpoint} was written by another version: it lacks {missing}")

    # Classes by name from this list, never by an import path that the file names.
    classes = {cls.__name__: cls for cls in (GumbelSelector, ImageTransformer)}
    if about["class"] not in [*classes]:  # a list: whatever the file holds can be compared, but not hashed
        raise ValueError(f"checkpoint {checkpoint} holds a {about['class']}, which is none of {', '.join(classes)}")
    try:
        selector = classes[about["class"]](**about["init_args"])
    except (KeyError, TypeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"checkpoint {checkpoint} holds no arguments of a {about['class']}: {error!r}") from error

    weights = {name[len(PREFIX) :]: value for name, value in state["state_dict"].items() if name.startswith(PREFIX)}
    try:
        selector.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(f"checkpoint {checkpoint} does not fit a {about['class']}: {error}") from error

    # The card, from what the checkpoint says about itself.
    metadata = {name: about[name] for name in fields}
    metadata["torch"] = str(torch.__version__)
    config = _run_config(Path(checkpoint))
    card = model_card(selector.init_args, metadata, command, config is not None, Path(folder).name)
    if about.get("credits"):
        card += f"\n## The images it was trained on\n\n{about['credits']}\n"
    if accuracy is not None:
        card += f"\n## On tasks\n\n{Path(accuracy).read_text().strip()}\n"

    # Pictures come first: a card never shows what is not there.
    if results is not None:
        card = _with_results(card, Path(results), identity(selector), Path(folder))
    card += _copied([Path(picture) for picture in pictures], Path(folder))
    written = selector.save_pretrained(folder, card=card, metadata=metadata)
    if config is not None:
        with atomic(written / "training.yaml") as partial:
            shutil.copyfile(config, partial)
    return written


def _with_results(card: str, run: Path, described: dict[str, Any], folder: Path) -> str:
    """The card with a run's results of the selector as a section and as metadata; draws their picture."""
    from selector.report.results import about_run, draw, model_index, results_of, results_table

    summary, label = results_of(run, described)
    draw(summary, label, folder / CHART)

    # Inside the metadata at the head, which the first line after it closes.
    index = {"model-index": model_index(summary, label, folder.name)}
    head, closing, body = card.partition("\n---\n")
    head += "\n" + yaml.safe_dump(index, sort_keys=False, allow_unicode=True).rstrip()
    shown = f"![Score against visual tokens]({CHART})"
    return f"{head}{closing}{body}\n## Results\n\n{about_run(summary)}\n\n{results_table(summary, label)}\n\n{shown}\n"


def _copied(pictures: list[Path], folder: Path) -> str:
    """Copies pictures beside the card; returns the lines that show them."""
    if missing := [path for path in pictures if not path.is_file()]:
        raise FileNotFoundError(f"pictures must be image files, there is no {str(missing[0])!r}")
    names = [path.name for path in pictures]
    if CHART in names or len(set(names)) < len(names) or any(" " in name or ")" in name for name in names):
        raise UsageError(f"pictures must have names of their own without spaces, other than {CHART}, got {names}")

    for path in pictures:
        # One may be there already, from an earlier export.
        if path.resolve() != (folder / path.name).resolve():
            with atomic(folder / path.name) as partial:
                shutil.copyfile(path, partial)
    return "".join(f"\n![{path.stem.replace('-', ' ')}]({path.name})\n" for path in pictures)


def model_card(init_args: dict[str, Any], about: dict[str, Any], command: str | None, has_yaml: bool, name: str) -> str:
    """The README of a selector folder; every number in it comes from the checkpoint.

    Args:
        init_args: the selector's constructor arguments.
        about: the checkpoint's fields, and the version of torch.
        command: the command that trained the selector, if known.
        has_yaml: whether ``training.yaml`` is part of the folder.
        name: the folder's name.

    Returns:
        Markdown, with the metadata that the hub reads as its head.
    """
    lines = [
        "---",
        "library_name: visual-token-selector",
        "tags: [visual-token-selection]",
        "---",
        f"# {name}",
        "",
        f"A learned visual-token selector ({about['class']}): {_RULES[about['class']]} The highest scores survive.",
        "",
        "```python",
        "from selector import TokenSelector",
        f'selector = TokenSelector.from_pretrained("checkpoints/{name}")',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| encoder | {about['encoder']['name']} (weights {about['encoder']['fingerprint']}) |",
        f"| trained on | {about['data']} |",
        f"| objective | {about['objective']}, {about['steps']} steps |",
        f"| size | {', '.join(f'{key} {value}' for key, value in init_args.items())} |",
        f"| speed | {about['tokens_per_s']:,.0f} tokens per second in training |",
        f"| machine | {platform.machine()}, torch {about['torch']} |",
    ]

    if command:
        lines.append(f"| made with | `{command}` |")
    if has_yaml:
        lines.append("| every setting | `training.yaml`, as Lightning resolved it |")

    # Either kind of objective may have been validated, or both.
    tables = [*_validation_table(about["validation"]), *_answer_table(about["validation"])]
    if not tables:
        tables = ["The checkpoint was written before any validation."]
    return "\n".join([*lines, "", *tables]) + "\n"


def _answer_table(seen: dict[str, float]) -> list[str]:
    """Divergence from the unpruned model's answers, and share of unchanged answers, per ranking and kept share."""
    # The meters `kl_RANKER_PERCENT` give rows and columns; their means `kl_RANKER` have no percentage and are left out.
    shares = [name.removeprefix("kl_learned_") for name in seen if name.startswith("kl_learned_")]
    measured = [name.removeprefix("kl_").rpartition("_") for name in seen if name.startswith("kl_")]
    rankers = list(dict.fromkeys(ranker for ranker, _, share in measured if share in shares))
    if not shares:
        return []

    rows = [
        f"| {ranker} | "
        + " | ".join(f"{seen[f'kl_{ranker}_{at}']:.3f} / {100 * seen[f'same_{ranker}_{at}']:.0f}" for at in shares)
        + " |"
        for ranker in rankers
    ]

    return [
        "",
        "On validation pages (of other seeds; receipts: other windows of the scans trained on), against the model with",
        "all visual tokens: KL of the answers (nats per token; lower is better) / answers that stay the same, token by",
        "token, in %:",
        "",
        "| kept | " + " | ".join(f"{share}%" for share in shares) + " |",
        "|---|" + "---|" * len(shares),
        *rows,
    ]


def _validation_table(seen: dict[str, float]) -> list[str]:
    """Reconstruction error of dropped tokens by the same reconstructor, per ranking and kept share."""
    # From the meters `rec_RANKER_PERCENT`, as above.
    shares = [name.removeprefix("rec_learned_") for name in seen if name.startswith("rec_learned_")]
    if not shares:
        return []

    measured = [name.removeprefix("rec_").rpartition("_") for name in seen if name.startswith("rec_")]
    rankers = list(dict.fromkeys(ranker for ranker, _, share in measured if share in shares))
    rows = [
        f"| {ranker} | " + " | ".join(f"{seen[f'rec_{ranker}_{share}']:.3f}" for share in shares) + " |"
        for ranker in rankers
    ]

    return [
        "Held-out reconstruction error of dropped tokens (normalised features; lower is better), one reconstructor for",
        "all rows, tokens ranked within a tile (norm: the smallest stay):",
        "",
        "| kept | " + " | ".join(f"{share}%" for share in shares) + " |",
        "|---|" + "---|" * len(shares),
        *rows,
    ]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint must be a .ckpt file of a training run, got {str(path)!r}, which is no file"
        )

    # Which of these torch raises depends on what the file holds instead of a checkpoint.
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {path} cannot be read safely (weights only): {error}") from error

    parts = [state.get(name) for name in ("selector", "state_dict")] if isinstance(state, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"checkpoint {path} was not written by selector-train: it has no entry 'selector'")
    return state


def _run_config(checkpoint: Path) -> Path | None:
    """The YAML that LightningCLI saved for the run, beside or above the checkpoint."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    return None
