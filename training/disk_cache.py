"""Features of an image set, encoded once and kept in a folder, for sets that do not fit into memory.

    DIR/KEY.lock                   held by the process that plans or checks; the others wait for it
    DIR/KEY/00000.lock             held by the process that encodes this shard; the others go on to the next one
    DIR/KEY/index.json             what was encoded, how, and the size and SHA-256 of every shard
    DIR/KEY/00000.safetensors ...  the features ``[T, N, D]`` of consecutive images, by the images' numbers

KEY is a hash of everything that determines the features: the encoder (class, arguments, weights, preprocessing), the
images (names and contents, or generator, seed and what it draws) and the stored type. Another encoder or a changed
image has another key, so nothing stale is read; the folders of old keys can be deleted by hand.

A shard is written to a temporary file and renamed, and is entered in the index after that: an interrupted build resumes
with the first shard that is missing. Processes that build the same cache, such as the ranks of a training with a GPU
each, share its shards out. Rows are memory-mapped, so ranks and workers of a machine share one copy of them.

Shapes: T tiles of an image, N patches, D encoder width.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from selector.files import atomic

if TYPE_CHECKING:
    from training.encoders import VisionEncoder

StoredType = Literal["bfloat16", "float32"]
VERSION = 1
SHARD_BYTES = 128 * 2**20
"""Size of a shard, and so about what is lost when a build is interrupted."""
BATCH_TILES = 64
"""Tiles that an accelerator encodes at once; the few of one image would leave it idle. A CPU takes image by image."""
SAMPLED = 64
"""Images whose tiles are counted to estimate the size; all of them in smaller sets."""


class DiskCache(Dataset[Tensor]):
    """Rows of a tile dataset as stored features ``[T, N, D]``, read from the shards of a complete cache.

    Args:
        folder: ``DIR/KEY``.
        index: the contents of its ``index.json``.

    >>> from training.data import TileDataset
    >>> from training.encoders import TimmEncoder
    >>> encoder = TimmEncoder("test_vit", pretrained=False)
    >>> tiles = TileDataset([lambda: Image.new("RGB", (300, 200))], encoder.preprocess)
    >>> rows = disk_cache("features", tiles, encoder, images={"pages": 1})  # encodes now, or reads what is there
    >>> rows[0].shape, rows[0].dtype
    (torch.Size([1, 100, 64]), torch.bfloat16)
    """

    def __init__(self, folder: Path, index: Mapping[str, Any]):
        self.folder, self.images, self.per_shard = folder, index["images"], index["images_per_shard"]
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.images:
            raise IndexError(f"index must be in [0, {self.images}), got {index}")

        # Shards are mapped when they are first read: a worker may never touch most of them.
        shard = index // self.per_shard
        if shard not in self._open:
            self._open[shard] = safe_open(self.folder / shard_name(shard), "pt")
        return self._open[shard].get_tensor(str(index))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # mappings cannot be pickled; a loader's worker makes its own


def disk_cache(
    root: str | Path,
    tiles: Dataset[Tensor],
    encoder: VisionEncoder,
    images: Mapping[str, Any],
    dtype: StoredType = "bfloat16",
    *,
    device: torch.device | None = None,
    workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
    batch_tiles: int | None = None,
    verify: bool = True,
) -> DiskCache:
    """The cache of these images and this encoder below `root`; what is missing is encoded now.

    Args:
        root: folder of all caches, made if missing.
        tiles: the images' pixel tiles, one row ``[T, 3, H, W]`` per image.
        encoder: what encodes them, in its own precision.
        images: plain values that identify the images' contents; part of the key.
        dtype: type of the stored features.
        device: device to encode on; None stays where the encoder is.
        workers: processes that load the images to encode.
        shard_bytes: approximate size of a shard.
        batch_tiles: encode images together until they have this many tiles; None: `BATCH_TILES` on an accelerator, one
            image at a time on a CPU.
        verify: read the existing shards and compare their checksums (one process per machine is enough).

    Returns:
        The features, as float tensors of `dtype`.

    Raises:
        ValueError: `root` cannot be written or is too small, or its contents are damaged.
    """
    identity = {"encoder": encoder_identity(encoder), "images": dict(images), "dtype": dtype, "version": VERSION}
    folder = Path(root) / _digest(json.dumps(identity, sort_keys=True).encode())[:16]
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)

        # Whoever comes second waits, and then finds a plan.
        with _lock(folder):
            build = _Build(folder, identity, tiles, encoder, getattr(torch, dtype))
            if verify:
                build.check()
            build.plan(shard_bytes)
        build.finish(device, workers, batch_tiles)
    return DiskCache(folder, build.index)


def shard_name(number: int) -> str:
    """The file name of a shard.

    >>> shard_name(3)
    '00003.safetensors'
    """
    return f"{number:05d}.safetensors"


class _Build:
    """A cache that may be empty, begun or complete; planned and checked under its lock.

    Attributes:
        index: the contents of ``index.json``; empty before the shards are planned.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], tiles: Dataset[Tensor], encoder: VisionEncoder, dtype: torch.dtype
    ):
        self.folder, self.identity, self.tiles, self.encoder, self.dtype = folder, identity, tiles, encoder, dtype
        self.images = len(tiles)  # pyright: ignore[reportArgumentType]
        self.index = _read_index(folder / "index.json", identity, self.images)
        for left in folder.glob("*.partial"):  # of a process that was killed: nobody else writes under the lock
            left.unlink()

    def missing(self) -> list[int]:
        """Numbers of the shards still to encode."""
        # Not reached yet, or deleted by hand because it was damaged.
        shards = self.index["shards"]
        return [
            number
            for number, shard in enumerate(shards)
            if shard is None or not (self.folder / shard_name(number)).is_file()
        ]

    def check(self) -> None:
        """Compares the existing shards with their checksums, and the first image with what the encoder gives now."""
        if not self.index:
            return

        there = sorted(set(range(len(self.index["shards"]))) - set(self.missing()))
        for number in _track(there, f"checking {self.folder}"):
            _check_shard(self.folder / shard_name(number), self.index["shards"][number])
        if 0 in there:
            self._check_first()

    def _check_first(self) -> None:
        """The key covers what is known to matter; this catches the rest, such as a new version's resampling.

        The tolerance lets the rounding of bfloat16 and another device's arithmetic pass.
        """
        stored = DiskCache(self.folder, self.index)[0].float()
        device = next(self.encoder.parameters()).device
        now = self.encoder(self.tiles[0].to(device)).float().cpu()
        if stored.shape != now.shape or float((stored - now).norm()) > 0.02 * float(now.norm()):
            raise ValueError(
                f"feature cache {self.folder} does not hold what the encoder makes of the first image now; "
                "delete the folder to have it encoded again"
            )

    def plan(self, shard_bytes: int) -> None:
        """Decides how many images a shard holds, for all processes, and says how much is to be encoded."""
        if self.index and not self.missing():
            rank_zero_info(f"feature cache {self.folder}: all {self.images} images are there")
            return

        # A plan once made is kept: shards that are there have its number of images.
        each, counted = self._bytes_of_an_image()
        if not self.index:
            per_shard = max(1, int(shard_bytes // each))
            shards = [None] * -(-self.images // per_shard)  # rounded up
            self.index = {"images": self.images, "images_per_shard": per_shard, "shards": shards}
            self.index["identity"] = self.identity
        self._announce(each, counted, self.missing())
        self._write_index()

    def finish(self, device: torch.device | None, workers: int, batch_tiles: int | None) -> None:
        """Encodes what is missing, together with any other process that does so."""
        if not self.missing():
            return

        if device is not None:
            self.encoder.to(device)
        device = next(self.encoder.parameters()).device
        batch = batch_tiles or (1 if device.type == "cpu" else BATCH_TILES)

        # First the shards that no other process is at, then those that the others had: one may have been killed.
        for wait in (False, True):
            for number in _track(self.missing(), f"encoding {self.images} images"):
                with _shard_lock(self.folder, number, wait) as ours:
                    if ours and self._still_missing(number):
                        self._encode(number, device, workers, batch)
            self._read_again()

    def _still_missing(self, number: int) -> bool:
        """Whether nobody has encoded a shard since the index was read."""
        self._read_again()
        return number in self.missing()

    def _read_again(self) -> None:
        self.index = _read_index(self.folder / "index.json", self.identity, self.images)

    def _write_index(self) -> None:
        _write(self.folder / "index.json", json.dumps(self.index, indent=1).encode())

    def _bytes_of_an_image(self) -> tuple[float, str]:
        """Mean size in bytes, and its factors as text, from the number of tiles of some images."""
        chosen = np.unique(np.linspace(0, self.images - 1, SAMPLED).round().astype(int)).tolist()
        mean = sum(len(self.tiles[index]) for index in chosen) / len(chosen)
        patches, width, size = self.encoder.num_patches, self.encoder.dim, self.dtype.itemsize
        how = "" if len(chosen) == self.images else f", as {len(chosen)} of them have"
        text = f"{self.images} images × {mean:.4g} tiles{how} × {patches} patches × {width} channels × {size} bytes"
        return mean * patches * width * size, text

    def _announce(self, each: float, counted: str, missing: Sequence[int]) -> None:
        """Reports the size, and stops before hours of encoding where it does not fit on the disk."""
        per_shard = self.index["images_per_shard"]
        todo = sum(min(per_shard, self.images - number * per_shard) for number in missing)
        need, free = int(each * todo), shutil.disk_usage(self.folder).free
        rest = "" if todo == self.images else f"; {todo} images ({_size(need)}) are still to encode"
        rank_zero_info(f"feature cache {self.folder}: {counted} = {_size(each * self.images)}{rest}")

        if need > free:
            raise ValueError(
                f"data.cache_dir needs about {_size(need)} more in {self.folder}, where {_size(free)} are free; make "
                "room, choose another folder, or leave data.cache_dir out to encode on the fly"
            )

    def _encode(self, number: int, device: torch.device, workers: int, batch_tiles: int) -> None:
        start = number * self.index["images_per_shard"]
        chosen = range(start, min(start + self.index["images_per_shard"], self.images))

        # A generator of its own: the loader would draw from the global one, and a run would then depend on whether the
        # cache was there already.
        loader = DataLoader(
            Subset(self.tiles, chosen), batch_size=None, num_workers=workers, generator=torch.Generator()
        )
        rows = self._rows(loader, device, batch_tiles)
        content = save({str(index): row for index, row in zip(chosen, rows, strict=True)})

        # The shard first: the index must never name one that is not on the disk. Others enter theirs meanwhile.
        _write(self.folder / shard_name(number), content)
        with _lock(self.folder):
            self._read_again()
            self.index["shards"][number] = {"bytes": len(content), "sha256": _digest(content)}
            self._write_index()

    def _rows(self, loader: Iterable[Tensor], device: torch.device, batch_tiles: int) -> Iterator[Tensor]:
        """The features of each image as they are stored, encoded together until they have `batch_tiles` tiles."""
        waiting: list[Tensor] = []
        for number, pixels in enumerate(loader, start=1):
            waiting.append(pixels)
            if sum(map(len, waiting)) < batch_tiles and number < len(loader):  # pyright: ignore[reportArgumentType]
                continue

            features = self.encoder(torch.cat(waiting).to(device)).to(self.dtype).cpu()
            for row in features.split([len(each) for each in waiting]):
                # A view would take the whole batch to the disk; encoders may give features whose channels come first.
                yield row.clone(memory_format=torch.contiguous_format)
            waiting = []


def encoder_identity(encoder: VisionEncoder) -> dict[str, Any]:
    """Plain values that change whenever the features may: class, plain attributes, weights, buffers, preprocessing.

    Of the path of the weights only the folder's name counts, as part of the encoder's `name`: a moved model keeps its
    cache.
    """
    plain = (bool, int, float, str, type(None))
    attributes = {name: value for name, value in vars(encoder).items() if isinstance(value, plain) and name[0] != "_"}

    # The fingerprint covers a state dict, which lacks the buffers that are not saved.
    buffers = hashlib.sha256()
    for name, buffer in encoder.named_buffers():
        buffers.update(name.encode())
        buffers.update(buffer.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    # An odd-sized image of noise: resizing, cropping and normalising all leave their mark on it.
    noise = np.random.default_rng(0).integers(0, 256, (67, 101, 3), dtype=np.uint8)
    pixels = encoder.preprocess(Image.fromarray(noise))
    return {
        "class": f"{type(encoder).__module__}.{type(encoder).__qualname__}",
        "attributes": {name: value for name, value in attributes.items() if name not in ("training", "path")},
        "grid": list(encoder.grid),
        "weights": encoder.fingerprint(),
        "buffers": buffers.hexdigest()[:16],
        "preprocess": [list(pixels.shape), _digest(pixels.float().contiguous().numpy().tobytes())[:16]],
    }


def _read_index(path: Path, identity: Mapping[str, Any], images: int) -> dict[str, Any]:
    """The index of a cache; empty where there is none yet."""
    if not path.is_file():
        return {}

    # The identity is compared in full, although the folder's name is a hash of it already.
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        shards, per_shard = index["shards"], index["images_per_shard"]
        fits = index["identity"] == identity and index["images"] == images and per_shard * len(shards) >= images
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"feature cache index {path} cannot be read ({error}); delete {path.parent}") from error
    if not fits:
        raise ValueError(f"feature cache index {path} is not that of these images and this encoder; delete it")
    return index


def _check_shard(path: Path, entry: Mapping[str, Any]) -> None:
    """Compares a shard with its entry in the index; the size first, which costs nothing."""
    size = path.stat().st_size
    with path.open("rb") as file:
        whole = size == entry["bytes"] and hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
    if not whole:
        fault = f"{size} of {entry['bytes']} bytes" if size != entry["bytes"] else "another SHA-256 than in index.json"
        raise ValueError(f"feature cache shard {path} is damaged ({fault}); delete it: its images are encoded again")


def _write(path: Path, content: bytes) -> None:
    """Writes all of the file or nothing; it is on the disk when this returns."""
    with atomic(path) as partial:
        partial.write_bytes(content)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns the system's errors into one that names the argument."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"data.cache_dir must be a folder with room that can be written, {folder} is not ({error}); "
            "what is complete stays, and the same command goes on from there"
        ) from error


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Admits one process at a time; the system releases the lock when the process ends, however it ends."""
    lock = FileLock(f"{folder}.lock")

    # Tried once without waiting, so that a wait of hours is explained.
    try:
        lock.acquire(timeout=0)
    except Timeout:
        rank_zero_info(f"feature cache {folder}: another process is at it; waiting")
        lock.acquire()

    try:
        yield
    finally:
        lock.release()


@contextmanager
def _shard_lock(folder: Path, number: int, wait: bool) -> Iterator[bool]:
    """Whether this process has the shard to itself; without `wait` it says no where another process has it."""
    path = folder / f"{number:05d}.lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return

    # Whoever has waited for a file that is deleted here finds the shard encoded, and does nothing.
    try:
        yield True
        path.unlink(missing_ok=True)
    finally:
        lock.release()


def _track(numbers: Sequence[int], what: str) -> Iterator[int]:
    """Yields the numbers of shards, and shows progress on standard error: standard output is for results."""
    console = Console(stderr=True)
    first = getattr(rank_zero_only, "rank", 0) == 0
    with Progress(console=console, disable=not numbers or not first) as progress:
        yield from cast("Iterator[int]", progress.track(numbers, description=what))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _size(count: int | float) -> str:
    """A number of bytes with a unit that suits it."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1024
    return f"{count:,.1f} GiB"
