"""Selector checkpoints: ``config.json`` (class_path + init_args + metadata), ``model.safetensors``, ``README.md``.

A calibrated selector's ``config.json`` also holds its calibration (see `selector.calibration`).

Loading is strict and safe: the class must be known or explicitly allowed, every tensor must be there with its shape,
none may be left over, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from selector import calibration, schema
from selector.files import atomic, write_json, write_text

HARMLESS = 2**30
"""Bytes that a config may ask for whatever its weight file holds; more than that must be in the file."""
CONFIG, WEIGHTS, CARD, TRAINING = "config.json", "model.safetensors", "README.md", "training.yaml"
_PICTURE = re.compile(r"""!\[[^\]]*\]\(\s*([^)\s]+)|<img[^>]*?\ssrc=["']([^"']+)""")
_LOADED = re.compile(r"""(TokenSelector\.from_pretrained\()(["'])[^"']*\2""")
"""The line of a card that loads its selector."""
Loaded = TypeVar("Loaded", bound="Checkpoint")


class Checkpoint(nn.Module):
    """A module that is saved, loaded and shared as a checkpoint.

    Example:
        >>> from selector import Norm, TokenSelector
        >>> folder = Norm(largest=False).save_pretrained("smallest-norm")
        >>> TokenSelector.from_pretrained(folder)
        Norm(largest=False)
    """

    @property
    def init_args(self) -> dict[str, Any]:
        """Constructor arguments, read back from the attributes of the same names; a selector as its class_path.

        They are what a checkpoint is rebuilt from and what a record is filed under, so they are complete or an error.

        Raises:
            TypeError: an argument that is not kept under its own name, or a constructor with ``*args`` or ``**kwargs``.
        """
        return schema.init_args(self)

    def extra_repr(self) -> str:
        """The constructor arguments, so that a printed selector reads like the call that makes it."""
        return ", ".join(f"{name}={value!r}" for name, value in self.init_args.items())

    def save_pretrained(self, folder: str | Path, card: str | None = None, metadata: dict | None = None) -> Path:
        """Writes config.json, model.safetensors and README.md, each atomically. See `save`."""
        return save(self, folder, card=card, metadata=metadata)

    @classmethod
    def from_pretrained(
        cls: type[Loaded], name_or_path: str | Path, allow: Iterable[str] = (), revision: str | None = None
    ) -> Loaded:
        """The selector that a folder (or a hub repository) holds, weights strict. See `load`."""
        loaded = load(name_or_path, allow=allow, revision=revision)
        if not isinstance(loaded, cls):
            raise TypeError(f"{name_or_path} holds a {type(loaded).__name__}, not a {cls.__name__}")
        return loaded

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Saves and uploads to the Hugging Face hub; returns the address of the commit. See `push`."""
        return push(self, repo_id, **kwargs)


def save(
    selector: Checkpoint, folder: str | Path, card: str | None = None, metadata: dict[str, Any] | None = None
) -> Path:
    """Writes a checkpoint; each file appears whole or not at all.

    Args:
        selector: with its weights, on any device.
        folder: made as needed.
        card: text of the README.md; by default a short one that shows how to load the checkpoint.
        metadata: plain values that go into config.json, and come back from `about`.

    Returns:
        The folder.
    """
    # Described first: a selector that could not be rebuilt is an error before any file is written.
    folder = Path(folder)
    config = schema.describe(selector) | {"metadata": metadata or {}}
    if calibrations := calibration.collect(selector):
        config["calibration"] = calibrations

    # From any device, and contiguous: safetensors stores no views.
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in selector.state_dict().items()}
    with atomic(folder / WEIGHTS) as partial:
        save_file(state, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # its writer makes files that only their owner can read
    write_json(folder / CONFIG, config)
    write_text(folder / CARD, card or _default_card(selector))
    return folder


def load(name_or_path: str | Path, allow: Iterable[str] = (), revision: str | None = None) -> Checkpoint:
    """The selector in a folder, or in a hub repository when no such folder exists; in evaluation mode.

    Args:
        name_or_path: a folder, or owner/name of a hub repository.
        allow: packages beside ``selector`` whose classes the config may name.
        revision: a commit, branch or tag of the hub repository; by default its main branch.

    Raises:
        FileNotFoundError: no such repository or revision, or a file of the checkpoint is missing.
        ValueError: a class from elsewhere, wrong arguments, weights that do not fit exactly, or a revision of a folder.
    """
    folder = _folder(name_or_path, revision)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no selector checkpoint: {name} is missing")

    # The module, from its class and arguments. The config may come from anywhere: whatever reading it raises becomes an
    # error that names the file.
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        class_path, init_args = config["class_path"], config["init_args"]
        if not isinstance(class_path, str) or not isinstance(init_args, dict):
            raise TypeError(f"class_path must be a text and init_args a mapping, got {class_path!r} and {init_args!r}")
        _check_size(lambda: schema.build(class_path, init_args, Checkpoint, allow), folder)
        selector = schema.build(class_path, init_args, Checkpoint, allow)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{folder / CONFIG} is no selector config (class_path, init_args): {error!r}") from error
    except RuntimeError as error:
        raise ValueError(f"{folder / CONFIG} asks for a selector that cannot be made: {error}") from error

    # Its weights: all of them, of the right shapes, none left over.
    try:
        state = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not a safetensors file: {error}") from error
    try:
        selector.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit {type(selector).__name__}: {error}") from error

    # NaN loads without a word, and would only be refused as a score, far from its cause.
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{folder / WEIGHTS} holds NaN or infinity in {', '.join(broken)}")

    # What is neither argument nor weight.
    try:
        calibration.attach(selector, config.get("calibration", {}))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    return selector.eval()


def _check_size(make: Callable[[], Checkpoint], folder: Path) -> None:
    """Refuses a config that asks for far more than its weights fill, before a byte of it is allocated."""
    try:
        with torch.device("meta"):  # shapes without memory
            wanted = sum(tensor.nbytes for tensor in make().state_dict().values())
    # A constructor that computes with its tensors cannot run on meta: nothing can be compared beforehand then, and the
    # strict load that follows still refuses weights that do not fit.
    except NotImplementedError:
        return

    there = (folder / WEIGHTS).stat().st_size
    if wanted > max(there, HARMLESS):
        raise ValueError(f"{folder / CONFIG} asks for {wanted:,} bytes of weights, {WEIGHTS} holds {there:,}")


def about(name_or_path: str | Path, revision: str | None = None) -> tuple[dict[str, Any], str | None]:
    """(metadata, card) of a checkpoint that `load` takes, to save them again with it."""
    folder = _folder(name_or_path, revision)
    card = folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    return json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("metadata", {}), text


def push(
    selector: Checkpoint,
    repo_id: str,
    private: bool = False,
    card: str | None = None,
    metadata: dict[str, Any] | None = None,
    folder: str | Path | None = None,
    branch: str | None = None,
    message: str | None = None,
) -> str:
    """Uploads a checkpoint to the Hugging Face hub (needs a login).

    Args:
        repo_id: owner/name; a name alone is one of the user who is logged in. Made where it is not there.
        private: of a new repository.
        card, metadata: see `save`; by default those of `folder`. In the card that is uploaded, the line that loads the
            selector names the repository.
        folder: a checkpoint of this selector, such as `selector-train export` writes: its card, its metadata, the
            pictures that the card shows and ``training.yaml`` go along.
        branch: of the repository, made where it is not there; by default its main branch.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: a folder of another selector, a card whose metadata the hub would refuse, or a picture in it that is
            not in the folder; nothing is uploaded then.
    """
    # Slow to import, and only the hub needs it.
    from huggingface_hub import HfApi

    # What is wrong here is refused before a repository is made.
    if folder is not None:
        _check_same(selector, Path(folder))
        there = about(folder)
        metadata, card = metadata or there[0], card or there[1]
    card = card or _default_card(selector)
    files = _beside(card, None if folder is None else Path(folder))

    api = HfApi()
    full_name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if branch is not None:
        api.create_branch(full_name, branch=branch, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        save(selector, place, card=_LOADED.sub(rf'\g<1>"{full_name}"', card), metadata=metadata)
        for file in files:
            shutil.copyfile(file, Path(place) / file.name)
        commit = api.upload_folder(repo_id=full_name, folder_path=place, revision=branch, commit_message=message)
        return str(commit)


def _check_same(selector: Checkpoint, folder: Path) -> None:
    """Refuses the folder of another selector: its card would describe weights that are not uploaded."""
    if not folder.is_dir():
        raise ValueError(f"folder must be a checkpoint of the selector, there is no folder {str(folder)!r}")
    there = load(folder)
    own, state = selector.state_dict(), there.state_dict()
    alike = schema.describe(there) == schema.describe(selector) and own.keys() == state.keys()
    if not alike or not all(torch.equal(tensor.cpu(), state[name]) for name, tensor in own.items()):
        raise ValueError(f"folder must be a checkpoint of the selector, {folder} holds another one")


def _beside(card: str, folder: Path | None) -> list[Path]:
    """The files that a card needs beside it; its metadata is checked as the hub checks it.

    Raises:
        ValueError: metadata that the hub would refuse, or a picture that is not in the folder.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    if card.startswith("---"):
        try:
            ModelCard(card)
        except (YAMLError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"card must begin with metadata that the hub can read: {error!r}") from error

    named = dict.fromkeys(one or other for one, other in _PICTURE.findall(card))
    files = []
    for name in (name for name in named if not re.match(r"(?i)https?:|data:", name)):
        # Only from the folder itself: a card may come from anywhere, and must not fetch other files of the machine.
        if folder is None or Path(name).name != name or not (folder / name).is_file():
            where = "no folder is given" if folder is None else f"there is no such file in {folder}"
            raise ValueError(f"card must show pictures that are uploaded with it, it shows {name!r}, and {where}")
        files.append(folder / name)
    training = [folder / TRAINING] if folder is not None and (folder / TRAINING).is_file() else []
    return files + training


def _folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """A folder that is there wins over a hub repository of the same name."""
    folder = Path(name_or_path)
    if folder.is_dir() and revision is not None:
        raise ValueError(f"revision must be of a hub repository, {str(folder)!r} is a folder, got {revision!r}")
    return folder if folder.is_dir() else _download(name_or_path, revision)


def _download(name: str | Path, revision: str | None) -> Path:
    """The three files of a hub repository, in the hub's cache; no other file of it is fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=[CONFIG, WEIGHTS, CARD]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision!r}" if revision is not None else ""
        raise FileNotFoundError(f"no folder {str(name)!r}, and the hub gave none{at}: {error}") from error


def _default_card(selector: Checkpoint) -> str:
    """A README.md with the metadata by which the hub lists a repository, and the way to load it."""
    return (
        "---\nlibrary_name: visual-token-selector\ntags: [visual-token-selection]\n---\n"
        f"# {type(selector).__name__}\n\n```python\nfrom selector import TokenSelector\n"
        'selector = TokenSelector.from_pretrained("THIS_FOLDER")\n```\n'
    )
