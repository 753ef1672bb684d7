"""Images to train on, and the questions about them: from a folder, or generated pages that need no file at all.

For a selector that learns from answers a row of the dataset is a conversation about one image, and a batch is a list
of them. Otherwise a row is one image, already cut into the encoder's pixel tiles ``[T, 3, H, W]``, and every tile is a
training example: a batch concatenates the tiles of `batch_size` images, so its length varies where images have
different numbers of tiles. With `cache_features` or `cache_dir` the tiles are encoded once, and batches hold features
``[T, N, D]``: from memory (`training.cache`) or from a folder (`training.disk_cache`).

How a folder is split: `training.image_folder`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from PIL import Image
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from training import pages
from training.cache import FeatureCache
from training.conversations import Conversation, Converse
from training.disk_cache import StoredType, disk_cache
from training.encoders import LlavaNextModel, Preprocess, VisionEncoder
from training.image_folder import (
    ImageFile,
    credits,
    digest_files,
    even_sample,
    list_images,
    questions_of,
    split_by_hash,
)

MIXED = ("documents", "scenes", "charts")
KINDS = (*MIXED, "receipts")
"""Generated pages, and windows of real receipts (they need the environment variable SELECTOR_DATA)."""

VAL_IMAGES = 500
"""Held-out images of a folder that a validation compares the rankings on, unless another number is given."""

Turns = tuple[tuple[str, str | None], ...]
"""Questions and answers; None: not known."""


class ImageModule(LightningDataModule):
    """Training, validation and test images of a selector.

    Args:
        images: folder of images, or of ``.tar`` shards of images as webdataset writes them, searched recursively; None
            generates pages instead.
        val_share: share of the folder's images, in (0, 1), held out for validation and for `test`.
        train_images: how many of the folder's other images to train on at most, evenly from the folders that hold them
            and always the same; None takes all.
        val_images: the same for the held-out images in validation, of which a share of a large folder would take hours;
            None takes all, as `test` does.
        skip_unreadable: leave out files that cannot be decoded and report how many, instead of stopping at the first;
            costs one pass over the folder.
        generated: what to draw without a folder: ``documents``, ``scenes``, ``charts`` or ``receipts`` (windows of real
            receipts, where the environment variable SELECTOR_DATA names them), several of them in turn, joined by "+"
            (``documents+documents+charts``), or ``mixed`` for documents, scenes and charts.
        generated_train: number of generated training images.
        generated_val: number of generated images for validation, and as many others for `test`. Validation receipts are
            other windows of the scans trained on.
        batch_size: images per step and process; an AnyRes image brings all its tiles.
        workers: loader processes.
        cache_features: encode every image once and keep the features in memory (small sets only).
        cache_dir: folder to keep the features in, encoded once and read by every later run on the same images and
            encoder; `cache_features` is then ignored. An interrupted encoding resumes where it stopped.
        cache_dtype: how `cache_dir` stores them; bfloat16 takes half the space.
        seed: seed of the generated pages and of the order of images.

    Raises:
        ValueError: an argument outside its range, or a sample of a folder without a folder.

    >>> ImageModule(generated="documents", generated_train=32, seed=1).describe()
    '32 generated pages (documents), seed 1'
    """

    def __init__(
        self,
        images: str | None = None,
        val_share: float = 0.1,
        train_images: int | None = None,
        val_images: int | None = VAL_IMAGES,
        skip_unreadable: bool = False,
        generated: str = "mixed",
        generated_train: int = 1200,
        generated_val: int = 100,
        batch_size: int = 8,
        workers: int = 0,
        cache_features: bool = False,
        cache_dir: str | None = None,
        cache_dtype: StoredType = "bfloat16",
        seed: int = 0,
    ):
        super().__init__()
        if not 0 < val_share < 1:
            raise ValueError(f"data.val_share must be in (0, 1), got {val_share}")

        # A kind may be named twice, to be drawn twice as often.
        kinds = MIXED if generated == "mixed" else tuple(generated.split("+"))
        if not set(kinds) <= set(KINDS):
            raise ValueError(
                f"data.generated must be 'mixed' or one or more of {KINDS} joined by '+', got {generated!r}"
            )
        if cache_dtype not in get_args(StoredType):
            raise ValueError(f"data.cache_dtype must be one of {get_args(StoredType)}, got {cache_dtype!r}")
        if cache_dir == "":
            raise ValueError("data.cache_dir must name a folder, got ''")
        for name, number in (
            ("generated_train", generated_train),
            ("generated_val", generated_val),
            ("batch_size", batch_size),
            ("train_images", train_images),
            ("val_images", val_images),
        ):
            if number is not None and number < 1:
                raise ValueError(f"data.{name} must be at least 1, got {number}")
        if images is None and (train_images or val_images not in (None, VAL_IMAGES)):
            raise ValueError("data.images must be a folder where data.train_images or data.val_images is given")

        self.images, self.val_share, self.skip_unreadable = images, val_share, skip_unreadable
        self.train_images, self.val_images = train_images, val_images
        self.kinds, self.generated, self.generated_train, self.generated_val = (
            kinds,
            generated,
            generated_train,
            generated_val,
        )
        self.batch_size, self.workers, self.cache_features, self.seed = batch_size, workers, cache_features, seed
        self.cache_dir = cache_dir
        self.cache_dtype: StoredType = cache_dtype

        # Filled when they are asked for first: listing a large folder or encoding it takes time.
        self._sets: dict[str, Dataset[Any]] = {}
        self._paths: list[Path] | None = None
        self._credits: str | None = None
        self._batches_done = 0  # of the epoch that a checkpoint was written in

    def describe(self) -> str:
        """What the images are, in one line for the model card."""
        if self.images is None:
            return f"{self.generated_train} generated pages ({self.generated}), seed {self.seed}"
        train, val, test = (len(self._split(split)) for split in ("train", "val", "test"))
        held_out = f"{test} more held out, {val} of them for validation"
        return f"{train} images of the folder {Path(self.images).name!r} ({held_out})"

    def credits(self) -> str:
        """Sources and licences of the images trained on, in Markdown for the model card; empty where none is named."""
        if self._credits is None:
            self._credits = credits(self.images, self._split("train")) if self.images else self._credits_of_scans()
        return self._credits

    def _credits_of_scans(self) -> str:
        """The same of the scans that generated receipts are windows of."""
        if "receipts" not in self.kinds:
            return ""

        from selector.tasks.receipts.scans import receipts

        files = [receipt.file for receipt in receipts(None) if receipt.split == "train"]
        return credits(files[0].parent.parent, files)

    def setup(self, stage: str) -> None:
        """Lists, and with a cache encodes, the images of a stage; errors in the data surface here.

        Args:
            stage: Lightning's ``"fit"``, ``"validate"`` or ``"test"``.
        """
        assert self.trainer is not None  # for the type checker: Lightning sets it before
        encoder = cast("VisionEncoder", self.trainer.lightning_module.encoder)

        # For the errors alone: an attribution that cannot be read should not wait for the first checkpoint.
        self.credits()
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ())
        for split in wanted:
            if split not in self._sets:
                self._sets[split] = self._dataset(split, encoder)

    def _dataset(self, split: str, encoder: VisionEncoder) -> Dataset[Any]:
        if self._asks():
            return self._conversations(split, encoder)
        tiles = TileDataset(self._loaders(split), encoder.preprocess)
        if self.cache_dir is not None:
            return self._on_disk(split, tiles, encoder)
        return FeatureCache(tiles, encoder) if self.cache_features else tiles

    def _loaders(self, split: str) -> Sequence[Callable[[], Image.Image]]:
        """What makes the images of a split, one by one."""
        if self.images is not None:
            return [ImageFile(path) for path in self._split(split)]
        return [_PageImage(page) for page in self._pages(split)]

    def _on_disk(self, split: str, tiles: TileDataset, encoder: VisionEncoder) -> Dataset[Tensor]:
        assert self.trainer is not None  # for the type checker
        assert self.cache_dir is not None
        return disk_cache(
            self.cache_dir,
            tiles,
            encoder,
            self._contents(split, tiles),
            self.cache_dtype,
            device=self.trainer.strategy.root_device,  # where Lightning will move the encoder only later
            workers=self.workers,
            verify=self.trainer.local_rank == 0,  # once per machine
        )

    def _contents(self, split: str, tiles: TileDataset) -> dict[str, Any]:
        """Plain values that change whenever an image of the split does."""
        if self.images is not None:
            names = [path.relative_to(self.images).as_posix() for path in self._split(split)]
            return {"files": len(names), "digest": digest_files(self.images, names)}

        # Some pages as they are drawn, so that a changed generator has another key.
        pages = hashlib.sha256()
        for load in tiles.load[:6]:
            pages.update(load().tobytes())
        return {
            "generated": self.generated,
            "split": split,
            "seed": self.seed,
            "pages": len(tiles),
            "digest": pages.hexdigest()[:16],
        }

    def _conversations(self, split: str, encoder: VisionEncoder) -> Dataset[Any]:
        if not isinstance(encoder, LlavaNextModel):
            raise ValueError(f"model.encoder must be a LlavaNextModel to ask questions, got {type(encoder).__name__}")
        if self.cache_features or self.cache_dir is not None:
            raise ValueError(
                "data.cache_features must be false and data.cache_dir unset where questions are asked: "
                "the image itself is needed"
            )

        pages: Sequence[Callable[[], Asked]]
        if self.images is None:
            pages = self._pages(split)
        else:
            pages = [_AskedFile(ImageFile(path), turns) for path, turns in questions_of(self._split(split)).items()]
        return ConversationDataset(pages, encoder.converse)

    def _pages(self, split: str) -> list[_Page]:
        """The generated pages of a split, the kinds in turn."""
        count = self.generated_train if split == "train" else self.generated_val
        return [_Page(self.kinds[index % len(self.kinds)], split, self.seed, index) for index in range(count)]

    def _asks(self) -> bool:
        """Whether the selector learns from answers, which its module knows and the data does not."""
        return bool(self.trainer and getattr(self.trainer.lightning_module, "asks", False))

    def _split(self, split: str) -> list[Path]:
        """The files of a split, sorted; the same in every process and every run."""
        if self.images is None:
            return []

        if self._paths is None:
            self._paths = list_images(self.images, self.skip_unreadable)

            # Before the split, so that the shares are those of the images that can be used.
            if self._asks():
                asked = questions_of(self._paths)
                self._paths = [path for path in self._paths if asked[path]]
                if not self._paths:
                    raise ValueError(
                        f"data.images must hold questions to learn from answers: no image of {self.images!r} has `qa` "
                        "in an annotations.jsonl beside it"
                    )

        train, held_out = split_by_hash(self._paths, self.val_share)
        if split == "train":
            return even_sample(train, self.train_images)
        return even_sample(held_out, self.val_images if split == "val" else None)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of training images; the first epoch of a resumed run starts behind the batches already seen."""
        assert self.trainer is not None  # for the type checker

        # One sampler for any number of processes; its order depends on seed and epoch alone: a resumed run repeats it.
        sampler = ResumableSampler(
            self._sets["train"], self.trainer.world_size, self.trainer.global_rank, shuffle=True, seed=self.seed
        )

        # Once: a loader that Lightning asks for later starts at the front again.
        sampler.start, self._batches_done = self._batches_done * self.batch_size, 0
        return self._loader("train", sampler)

    def state_dict(self) -> dict[str, Any]:
        """How far the epoch has come, in batches: a run resumed from within an epoch continues there."""
        assert self.trainer is not None  # for the type checker

        # Modulo: at the end of an epoch the next one starts at its first batch.
        progress = cast("Any", self.trainer.fit_loop.epoch_loop.batch_progress.current)
        return {"batches_done": progress.processed % int(self.trainer.num_training_batches)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers where the epoch was left, for the next training loader."""
        self._batches_done = state_dict["batches_done"]

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of validation images, in their order."""
        return self._loader("val", None)

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of test images, in their order."""
        return self._loader("test", None)

    def _loader(self, split: str, sampler: DistributedSampler | None) -> DataLoader[Any]:
        """Without a sampler Lightning shares the images out among the processes."""
        return LateLoader(
            self._sets[split],
            self.batch_size,
            sampler=sampler,
            num_workers=self.workers,
            collate_fn=list if self._asks() else torch.cat,
            persistent_workers=self.workers > 0,  # each keeps the pages that it has drawn, see `_Page`
        )


class LateLoader(DataLoader[Tensor]):
    """Asks the sampler for its order with the first batch, not before.

    Lightning makes the first iterator before a resumed run knows its epoch, and workers start on it at once: without
    this they would load the images in the order of epoch 0.

    >>> sampler = ResumableSampler(range(4), num_replicas=1, rank=0, shuffle=False)
    >>> batches = iter(LateLoader(torch.arange(4), batch_size=2, sampler=sampler))
    >>> sampler.start = 2  # still in time: a loader of torch would have asked already
    >>> list(batches)
    [tensor([2, 3])]
    """

    def __iter__(self) -> Any:
        yield from super().__iter__()


class ResumableSampler(DistributedSampler[Any]):
    """Leaves out the first `start` images of this process in the first epoch that it is asked for.

    >>> sampler = ResumableSampler(range(4), num_replicas=1, rank=0, shuffle=False)
    >>> sampler.start = 3
    >>> list(sampler), list(sampler)
    ([3], [0, 1, 2, 3])
    """

    start = 0

    def __iter__(self) -> Iterator[Any]:
        # Left out after shuffling: what is left has the order of the uninterrupted epoch.
        indices = list(super().__iter__())
        start, self.start = self.start, 0
        return iter(indices[start:])


class TileDataset(Dataset[Tensor]):
    """Images as the encoder's pixel tiles ``[T, 3, H, W]``.

    Args:
        load: opens or draws each image, in RGB.
        preprocess: an image to its tiles.

    >>> tiles = TileDataset([lambda: Image.new("RGB", (8, 8))], preprocess=lambda image: torch.zeros(5, 3, 4, 4))
    >>> tiles[0].shape
    torch.Size([5, 3, 4, 4])
    """

    def __init__(self, load: Sequence[Callable[[], Image.Image]], preprocess: Preprocess):
        self.load, self.preprocess = load, preprocess

    def __len__(self) -> int:
        return len(self.load)

    def __getitem__(self, index: int) -> Tensor:
        return self.preprocess(self.load[index]())


@dataclass(frozen=True)
class Asked:
    """An image and what is asked about it.

    Attributes:
        image: in RGB.
        turns: questions and answers; None: not known.

    >>> Asked(Image.new("RGB", (192, 96)), (("what is TAX?", "41"), ("what is DATE?", None))).turns[0]
    ('what is TAX?', '41')
    """

    image: Image.Image
    turns: Turns


class ConversationDataset(Dataset[Conversation]):
    """Images and their questions as a model reads them.

    Args:
        pages: opens or draws each image, with its questions.
        converse: the model's processor and chat template.

    >>> from training.testbed.vocabulary import IMAGE_ID, build_processor
    >>> page = Asked(Image.new("RGB", (192, 96)), (("what is TAX?", "41"),))
    >>> rows = ConversationDataset([lambda: page], Converse(build_processor(), IMAGE_ID))
    >>> len(rows), [branch.question for branch in rows[0].branches]
    (1, ['what is TAX?'])
    """

    def __init__(self, pages: Sequence[Callable[[], Asked]], converse: Converse):
        self.pages, self.converse = pages, converse

    def __len__(self) -> int:
        return len(self.pages)

    def __getitem__(self, index: int) -> Conversation:
        asked = self.pages[index]()
        return self.converse(asked.image, asked.turns)


class _AskedFile:
    """One image of a folder with the questions about it."""

    def __init__(self, load: ImageFile, turns: Turns):
        self.load, self.turns = load, turns

    def __call__(self) -> Asked:
        return Asked(self.load(), self.turns)


class _Page:
    """One generated page; validation pages come from another seed, test pages from the test stream.

    It is drawn once and kept as a PNG: a window of a receipt takes longer to draw than a step of training.
    """

    def __init__(self, kind: str, split: str, seed: int, index: int):
        self.kind, self.split, self.index = kind, split, index
        self.seed = seed + 1_000_003 if split == "val" else seed  # far from any seed that a user would try next
        self._drawn: tuple[bytes, Turns] | None = None

    def __call__(self) -> Asked:
        if self._drawn is None:
            self._drawn = self._draw()
        png, turns = self._drawn
        with Image.open(io.BytesIO(png)) as image:
            return Asked(image.convert("RGB"), turns)  # a copy: the file is closed behind it

    def _draw(self) -> tuple[bytes, Turns]:
        page = pages.page(self.kind, "test" if self.split == "test" else "train", self.seed, self.index)
        png = io.BytesIO()
        page.image.save(png, "PNG", compress_level=1)  # lossless, and fast to write
        return png.getvalue(), tuple((turn.question, turn.answer) for turn in page.turns)


class _PageImage:
    """The image of a page alone."""

    def __init__(self, page: _Page):
        self.page = page

    def __call__(self) -> Image.Image:
        return self.page().image
