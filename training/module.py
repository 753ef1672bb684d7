"""The LightningModule: a selector, its objectives, and how its ranking is validated while it trains.

The encoder (or the whole vision-language model) stays frozen. A batch is the tiles of some images, or conversations
about some images; objectives (`training.objectives`, `training.answers`) turn it into a loss. Validation measures the
deterministic ranking, which is what inference uses: the noisy masks of training can look fine while the ranking behind
them is upside down. Training ends with an error where the ranking loses to random choices.

Shapes: B tiles, N patches per tile, C channels of the table that the selector reads.
"""

from __future__ import annotations

import time
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from selector.methods.gumbel import GumbelSelector
from selector.methods.image_transformer import ImageTransformer
from selector.table import FIELDS, Inputs, TableSelector
from selector.tokens import VisualTokens
from training.answers import AnswerSaliency
from training.autoencoder import Reconstructor
from training.comparison import AnswerComparison, RankingComparison, RankingError
from training.conversations import Conversation
from training.data import ImageModule
from training.encoders import LlavaNextModel, VisionEncoder
from training.language import FrozenLanguageModel
from training.objectives import Objective, Paper, SampledBudget, Step
from training.schedules import rate_factor
from training.teacher import AnswersFrom, Teacher
from training.throughput import Throughput, Timed, timed_by, untimed

Architecture = Literal["gumbel", "image-transformer"]
Batch = Tensor | list[Conversation]


class SelectorModule(LightningModule):
    """Trains a selector.

    Args:
        encoder: the frozen vision encoder, or vision-language model, by class_path (`training.encoders`).
        objectives: terms of the loss, by class_path (`training.objectives`, `training.answers`), added up by their
            weights; None trains `SampledBudget`.
        architecture: ``"gumbel"`` (the paper's: layers over the patches of a tile) or ``"image-transformer"`` (layers
            over all tokens of an image).
        inputs: what the selector reads and the reconstructor rebuilds: the encoder's ``"features"``, the
            ``"projected"`` tokens, or ``"both"`` side by side.
        question: the selector reads the question; needs the image-transformer, and objectives that ask questions.
        width: width of selector and reconstructor; None takes the width of what they read.
        layers: Transformer layers of each.
        heads: attention heads of each.
        mlp_ratio: width of the MLPs in units of `width`.
        question_layers: layers of an image-transformer that read the question, behind the others.
        match_rank: rank of the map under which an image-transformer compares patches with the question's words; None:
            full, which costs little beside a small language model and much beside a 7B one.
        pool: side in patches of the cells over which an image-transformer averages keys and values.
        learning_rate: AdamW's, after the warm-up.
        weight_decay: AdamW's.
        warmup_steps: steps in which the learning rate rises linearly.
        clip_norm: largest norm of the gradient; 0 does not clip.
        statistics_batches: training batches from which mean and standard deviation of each channel are estimated.
        kept_shares: shares of the tokens, each in (0, 1), at which validation compares the rankings.
        answers_from: texts along which teacher and student are compared: the ``"model"``'s own greedy answers, or those
            of the ``"data"`` where there are any.
        answer_tokens: longest answer of the model, in tokens.
        answers_dir: folder in which the model's answers are kept for later runs; None keeps them in memory.
        questions: most questions per image and step; more are sampled.
        allow_worse_than_random: end without an error even if the deterministic ranking loses to random choices.
        compile: compile the layers of selector and reconstructor with ``torch.compile``; the first steps then take a
            minute or so (and a C++ compiler, on a CPU). What it gains: `training/README.md`.
        seed: seed of all noise.

    Raises:
        ValueError: an argument outside its range, or arguments that exclude each other.

    >>> from training.encoders import TimmEncoder
    >>> encoder = TimmEncoder("test_vit", pretrained=False)
    >>> module = SelectorModule(encoder, width=16, layers=1)
    >>> type(module.selector).__name__, module.selector.dim, module.selector.num_patches
    ('GumbelSelector', 64, 100)
    >>> SelectorModule(encoder, question=True)
    Traceback (most recent call last):
    ValueError: model.question needs architecture image-transformer, got 'gumbel'
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        objectives: list[Objective] | None = None,
        architecture: Architecture = "gumbel",
        inputs: Inputs = "features",
        question: bool = False,
        width: int | None = None,
        layers: int = 3,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        pool: int = 2,
        question_layers: int = 1,
        match_rank: int | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 50,
        clip_norm: float = 0.0,
        statistics_batches: int = 20,
        kept_shares: tuple[float, ...] = (0.5, 0.25, 0.1),
        answers_from: AnswersFrom = "model",
        answer_tokens: int = 48,
        answers_dir: str | None = None,
        questions: int = 6,
        allow_worse_than_random: bool = False,
        compile: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.objectives = objectives or [SampledBudget()]
        self.asks = any(objective.asks for objective in self.objectives)
        self._check(encoder, architecture, question, match_rank, kept_shares, questions)

        self.encoder = encoder
        self.learning_rate, self.weight_decay, self.warmup_steps = learning_rate, weight_decay, warmup_steps
        self.clip_norm, self.statistics_batches, self.kept_shares = clip_norm, statistics_batches, kept_shares
        self.questions, self.allow_worse_than_random, self.seed = questions, allow_worse_than_random, seed

        # What the selector reads: the channels of its inputs, and the embeddings of the question where it reads that.
        dim = encoder.width_of(inputs)
        self.selector: TableSelector
        if architecture == "gumbel":
            self.selector = GumbelSelector(dim, encoder.num_patches, width, layers, heads, mlp_ratio, inputs)
        else:
            asked = encoder.question_dim if question and isinstance(encoder, LlavaNextModel) else None
            sizes = width or dim, layers, heads, mlp_ratio, pool
            self.selector = ImageTransformer(dim, inputs, *sizes, asked, question_layers, match_rank)

        # Without an objective that rebuilds there is nothing for a reconstructor to learn.
        self.reconstructor: Reconstructor | None = None
        self.comparison: RankingComparison | None = None
        if any(objective.reconstructs for objective in self.objectives):
            self.reconstructor = Reconstructor(dim, encoder.num_patches, width, layers, heads, mlp_ratio)
            self.comparison = RankingComparison(kept_shares)

        if compile:
            _compile(self.selector, self.reconstructor)

        # A teacher only where an objective asks: it needs the whole vision-language model.
        self.teacher: Teacher | None = None
        self.answer_comparison: AnswerComparison | None = None
        if self.asks and isinstance(encoder, LlavaNextModel):
            language = FrozenLanguageModel(encoder.model)
            looks = any(isinstance(each, AnswerSaliency) and each.looks for each in self.objectives)
            self.teacher = Teacher(language, answers_from, answer_tokens, answers_dir, encoder.fingerprint(), looks)
            self.answer_comparison = AnswerComparison(kept_shares)

        self.last_validation: dict[str, float] = {}
        self._trained = 0, 0.0  # tokens and seconds of this run

        # A checkpoint lacks the encoder's weights, which a strict load would report as missing.
        self.register_load_state_dict_post_hook(_encoder_is_not_loaded)

    def _check(
        self,
        encoder: VisionEncoder,
        architecture: Architecture,
        question: bool,
        match_rank: int | None,
        kept_shares: tuple[float, ...],
        questions: int,
    ) -> None:
        """Raises ValueError for arguments outside their range, and for those that exclude each other."""
        if architecture not in get_args(Architecture):
            raise ValueError(f"model.architecture must be one of {get_args(Architecture)}, got {architecture!r}")
        if not kept_shares or not all(0 < share < 1 for share in kept_shares):
            raise ValueError(f"model.kept_shares must be shares in (0, 1), got {kept_shares}")
        if questions < 1:
            raise ValueError(f"model.questions must be at least 1, got {questions}")

        # Questions need a language model to answer them, and a selector that reads one has a ranking per question:
        # there is no single mask of a tile to reconstruct from.
        if self.asks and not isinstance(encoder, LlavaNextModel):
            names = ", ".join(type(objective).__name__ for objective in self.objectives if objective.asks)
            raise ValueError(f"model.encoder must be a LlavaNextModel for {names}, got a {type(encoder).__name__}")
        if architecture != "gumbel" and any(isinstance(objective, Paper) for objective in self.objectives):
            raise ValueError(f"model.objectives: Paper needs architecture gumbel, got {architecture!r}")
        if question and architecture != "image-transformer":
            raise ValueError(f"model.question needs architecture image-transformer, got {architecture!r}")
        if match_rank is not None and not question:
            raise ValueError(f"model.match_rank needs model.question, got {match_rank} without it")
        if question and (not self.asks or any(objective.reconstructs for objective in self.objectives)):
            raise ValueError("model.question needs objectives that ask questions, and none that reconstructs")

    # ---- training

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        """The weighted sum of the objectives' losses, as a mean over images where there are conversations."""
        # By batch, not by step: batches whose gradients are accumulated draw noise of their own.
        generator = self._generator(self.trainer.fit_loop.epoch_loop.total_batch_idx)
        progress = self.global_step / self._total_steps()
        profiler = cast("Any", self.trainer).profiler  # Lightning's annotations lack it
        if isinstance(profiler, Throughput):
            profiler.batch(self._patches(batch))

        losses, logs = [], []
        for step in self._steps(batch, progress, generator):
            for objective in self.objectives:
                loss = objective(step)
                losses.append(objective.weight * loss.value)
                logs.append(loss.logs)

        # A batch of tiles is one step, whose losses are means over its tiles already.
        images = len(batch) if isinstance(batch, list) else 1
        total = torch.stack(losses).sum() / images

        # An objective may leave a value out for some images: the mean is over those that have it.
        self.log("train/loss", total.detach())
        for name in dict.fromkeys(name for entry in logs for name in entry):
            values = [entry[name].float() for entry in logs if name in entry]
            self.log(name, torch.stack(values).mean(), prog_bar=True)
        return total

    def _steps(self, batch: Batch, progress: float, generator: torch.Generator) -> list[Step]:
        """What the objectives get: all tiles of a batch at once, or the images one by one with their questions."""
        if isinstance(batch, Tensor):
            tokens = self._tokens(batch)
            return [Step(tokens, self.selector, progress, generator, self.reconstructor, timed=self._timed())]

        assert self.teacher is not None  # for the type checker: only with a teacher are there conversations
        steps = []
        for conversation in batch:
            there, patches = conversation.to(self.device), self._patches([conversation])
            with self._timed()("encoder", patches):
                encoded = self._encoded(there)
            with self._timed()("teacher", patches):
                taught = self.teacher(encoded, there).sampled(self.questions, generator)
            parts = self.reconstructor, self.teacher.language, taught, encoded, self._timed()
            steps.append(Step(encoded.tokens, self.selector, progress, generator, *parts))
        return steps

    def _timed(self) -> Timed:
        """Brackets the parts of a step under the trainer's profiler."""
        return untimed if self._trainer is None else timed_by(cast("Any", self.trainer).profiler)

    def _patches(self, batch: Batch) -> int:
        """How many patches of tiles a batch holds."""
        tiles = len(batch) if isinstance(batch, Tensor) else sum(int(c.pixels["pixel_values"].shape[1]) for c in batch)
        return tiles * self.encoder.num_patches

    def _tokens(self, batch: Tensor) -> VisualTokens:
        """Visual tokens of pixels ``[B, 3, H, W]`` or cached features ``[B, N, D]``, each tile by itself."""
        with self._timed()("encoder", self._patches(batch)):
            features = batch if batch.ndim == 3 else self.encoder(batch)

            # Caches hold features only: the projector is cheap beside the tower, and its output is wider.
            extra = {"projected": self.encoder.project(features)} if "projected" in self.selector.needs else {}
        return VisualTokens.from_features(features.float(), self.encoder.grid, **extra)

    def _encoded(self, conversation: Conversation) -> Any:
        assert isinstance(self.encoder, LlavaNextModel)  # for the type checker: checked by the constructor

        # Beyond what the selector reads: what the leverage that validation compares it with may read.
        return self.encoder.encoded(conversation, self.selector.needs | {"features", "projected"})

    def on_train_start(self) -> None:
        """Starts the clock of a run resumed within an epoch, which begins no epoch of its own."""
        self._began = time.monotonic()

    def on_train_epoch_start(self) -> None:
        """Starts the clock of `train/tokens_per_s`, which runs from step to step: waiting for the loader counts."""
        self._began = time.monotonic()

    def on_validation_end(self) -> None:
        """Starts it anew after a validation within an epoch, which is no part of a step."""
        self._began = time.monotonic()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Logs the speed of a step, its loading included, and adds it to the run's, which the card reports."""
        patches, now = self._patches(batch), time.monotonic()
        seconds, self._began = now - self._began, now
        self.log("train/tokens_per_s", patches / seconds, prog_bar=True, batch_size=1)
        self._trained = self._trained[0] + patches, self._trained[1] + seconds

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Clips by `clip_norm` of the recipe, not by the trainer's `gradient_clip_val`."""
        if self.clip_norm:
            self.clip_gradients(optimizer, gradient_clip_val=self.clip_norm, gradient_clip_algorithm="norm")

    def _generator(self, step: int) -> torch.Generator:
        """Noise of one step and process: a resumed run draws what the uninterrupted one would have drawn."""
        rank = self.trainer.global_rank if self._trainer is not None else 0

        # A prime stride per seed and per step, so that neither their neighbours nor other ranks share a seed.
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1_009 + rank)

    def _total_steps(self) -> int:
        """Optimizer steps of the whole training, with those before a resumption."""
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("trainer.max_epochs or trainer.max_steps must be positive: the schedules need an end")
        return int(total)

    def configure_optimizers(self) -> Any:
        """AdamW on selector and reconstructor, with the warm-up and the cosine of `rate_factor` in every step."""
        # By name rather than all parameters of the module, which include the frozen encoder's.
        parts = [self.selector] if self.reconstructor is None else [self.selector, self.reconstructor]
        parameters = [parameter for part in parts for parameter in part.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)

        total = self._total_steps()
        factor = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: rate_factor(s, total, self.warmup_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step"}}

    # ---- statistics of what the selector reads

    def on_fit_start(self) -> None:
        """Estimates mean and standard deviation of every channel on the first batches.

        A resumed run has them in its checkpoint.
        """
        if self.trainer.ckpt_path is not None:
            return

        mean, std = self._statistics()
        self.selector.feature_mean.copy_(mean)
        self.selector.feature_std.copy_(std)
        rank_zero_info(f"spread per channel: {float(std.min()):.3g} to {float(std.max()):.3g}")

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``[C]`` over the valid tokens of some batches, of all processes together."""
        # In float64: a variance as the difference of two large numbers loses its digits in float32.
        loader = self.trainer.datamodule.train_dataloader()  # pyright: ignore[reportAttributeAccessIssue]
        sums = torch.zeros(2, self.selector.dim, dtype=torch.float64, device=self.device)
        count = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(loader):
            if index == self.statistics_batches:
                break
            for table in self._raw_tables(batch):
                sums += torch.stack([table.sum(0), table.pow(2).sum(0)])
                count += len(table)

        # Every process has seen other images.
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        count = self.trainer.strategy.reduce(count, reduce_op="sum")
        mean, square = sums / count
        std = (square - mean.pow(2)).clamp(min=0).sqrt()  # rounding can make it slightly negative
        return mean.float(), torch.where(std > 1e-6, std, 1.0).float()  # a constant channel stays as it is

    def _raw_tables(self, batch: Batch) -> list[Float[Tensor, "M C"]]:
        """What the selector would read of the M valid tokens of each image or batch of tiles, before normalisation."""
        if isinstance(batch, Tensor):
            parts = [self._tokens(batch.to(self.device))]
        else:
            parts = [self._encoded(conversation.to(self.device)).tokens for conversation in batch]

        # Patches that unpadding removes do not count: they show the padding.
        fields = FIELDS[self.selector.inputs]
        return [torch.cat([tokens.read(f, self) for f in fields], -1)[tokens.valid].double() for tokens in parts]

    # ---- validation: the deterministic ranking against training-free ones

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Updates the meters of `comparisons` with a batch of validation images."""
        self._compare(batch, batch_idx, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """The same with test images."""
        self._compare(batch, batch_idx, "test")

    def _compare(self, batch: Batch, batch_idx: int, stage: str) -> None:
        # Negative numbers: no training step draws the same noise, and every validation does.
        def noise(draw: int) -> torch.Generator:
            return self._generator(-1 - 3 * batch_idx - draw)

        for step in self._steps(batch, 1.0, noise(0)):
            if self.comparison is not None and self.reconstructor is not None:
                rows = len(step.tokens.features)
                measured = self.comparison.measure(self.selector, self.reconstructor, step.tokens, noise)
                for name, meter in measured:
                    self._log(f"{stage}/{name}", meter, rows, bar=name in ("rec_learned", "rec_random"))
            if self.answer_comparison is not None:
                for name, meter in self.answer_comparison.measure(step, noise):
                    self._log(f"{stage}/{name}", meter, 1, bar=name in ("kl_learned", "kl_random"))

    def _log(self, name: str, meter: Any, rows: int, bar: bool) -> None:
        self.log(name, meter, on_step=False, on_epoch=True, batch_size=rows, prog_bar=bar)

    @property
    def comparisons(self) -> list[RankingComparison | AnswerComparison]:
        """How the ranking is judged: by reconstruction, by answers, or both."""
        return [each for each in (self.comparison, self.answer_comparison) if each is not None]

    def on_validation_epoch_end(self) -> None:
        """Logs the criterion by which checkpoints are chosen, and keeps the values for the card and the final check."""
        seen = {name: value for each in self.comparisons for name, value in each.values().items()}

        # Over all objectives, lower is better.
        self.log("val/criterion", sum(each.criterion(seen) for each in self.comparisons), sync_dist=True)
        if not self.trainer.sanity_checking:
            self.last_validation = seen

    def on_train_end(self) -> None:
        """Fails when the deterministic ranking ended below random: noisy training masks hide that."""
        if getattr(self.trainer, "fast_dev_run", False):
            return
        if not self.last_validation:
            rank_zero_warn("no validation ran, so the ranking was never compared with random choices")
            return

        # By the last validation, not the best: the check is on how the training ended.
        lost = [text for each in self.comparisons for text in each.losses_to_random(self.last_validation)]
        if lost and not self.allow_worse_than_random:
            raise RankingError(
                f"the deterministic ranking is worse than random tokens at {', '.join(lost)}; "
                "train longer, or pass --model.allow_worse_than_random true to end without this error"
            )

    # ---- checkpoints: plain containers only, so that they load with weights_only=True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what `training.export` needs: how to build the selector again, and the facts of its card."""
        data = getattr(self.trainer, "datamodule", None)
        checkpoint["selector"] = {
            "class": type(self.selector).__name__,
            "init_args": self.selector.init_args,
            "encoder": {"name": self.encoder.name, "fingerprint": self.encoder.fingerprint()},
            "data": data.describe() if isinstance(data, ImageModule) else "unknown",
            "credits": data.credits() if isinstance(data, ImageModule) else "",
            "objective": " + ".join(_describe(objective) for objective in self.objectives),
            "steps": self.global_step,
            "validation": dict(self.last_validation),
            "tokens_per_s": self._trained[0] / max(self._trained[1], 1e-9),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the last validation.

        Raises:
            ValueError: the checkpoint was trained on another encoder: its weights would fit, and mean nothing.
        """
        ours, theirs = self.encoder.fingerprint(), checkpoint["selector"]["encoder"]["fingerprint"]
        if ours != theirs:
            raise ValueError(
                f"ckpt_path was trained on another encoder: {checkpoint['selector']['encoder']['name']} ({theirs}), "
                f"this run has {self.encoder.name} ({ours})"
            )

        # A run that is resumed at its end is still compared with random choices.
        self.last_validation = dict(checkpoint["selector"]["validation"])


def _describe(objective: Objective) -> str:
    """For the card: the name, and the weight where it is not 1."""
    name = type(objective).__name__
    return name if objective.weight == 1 else f"{objective.weight:g} {name}"


def _compile(*networks: nn.Module | None) -> None:
    """Compiles the layers of these networks in place; names and values of their weights stay as they are."""
    # The layers alone, which come in lists: what is around them (budgets, cells of an image) depends on the data.
    for network in networks:
        lists = [part for part in network.modules() if isinstance(part, nn.ModuleList)] if network is not None else []
        for layer in (layer for part in lists for layer in part):
            layer.compile()


def _encoder_is_not_loaded(module: nn.Module, keys: Any) -> None:
    """The encoder's weights are never in a checkpoint, so they are not missing from it."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.startswith("encoder.")]
