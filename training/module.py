"""The LightningModule: a Gumbel-Softmax selector and a reconstructor, trained on frozen features.

Paper: "When Less is Enough" (arXiv 2503.16660): keep what the other tokens cannot reconstruct. Objectives:

    paper             Gumbel-Softmax masks, straight-through; ``||F_rec - F||^2 + max(mean(M), p)``
    straight_through  one ranking for every budget: Gumbel masks of a sampled, exact size, straight-through
    sampled_budget    the default: the same masks, but the score is regressed onto the log error of each dropped token

The ranking can come out upside down (blank patches kept, text dropped). In our prototypes on a small text-reading tower
it did when the threshold of the straight-through top-k was kept out of the graph: then every score is only ever pushed
up, all rise together, their spread vanishes, and no ranking is left. With the threshold in the graph the gradient sums
to zero over a tile (tested) and the ranking was right side up. The regression is the default because it asks least of
the reconstructor (``tests/training/test_ranking.py``). Random masks alone are not enough: the reconstructor then never
sees the masks of the ranking it serves. The figures of the shipped selector are in its card; those prototypes are not
part of the repository, so none of theirs is given here.

Shapes: B tiles, N patches, D encoder width; masks are 1 where a token is kept.
"""

from __future__ import annotations

import time
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from selector.methods.gumbel import GumbelSelector
from selector.tokens import VisualTokens
from training.autoencoder import Reconstructor
from training.comparison import RankingComparison, RankingError
from training.data import ImageModule
from training.encoders import VisionEncoder
from training.losses import drop_error_regression, dropped_mean, paper_loss, token_error
from training.schedules import gumbel_top_k, random_mask, rate_factor, sampled_keep, temperature

Objective = Literal["sampled_budget", "straight_through", "paper"]


class SelectorModule(LightningModule):
    """Trains a `GumbelSelector` and its reconstructor.

    Args:
        encoder: the frozen vision encoder, by class_path (`training.encoders`).
        objective: ``"sampled_budget"``, ``"straight_through"`` or ``"paper"``; see above.
        kept_range: smallest and largest share of a tile kept in a step of a sampled budget.
        random_share: share of the steps, from the start, whose masks are uniformly random, of sampled budgets, so that
            the reconstructor is right before its errors count; after them the selector draws the masks.
        proportion: p of the paper's clamp, the wanted share of kept tokens (paper).
        regularizer: weight of the clamp; the paper leaves the norm's scale, and so this weight, open (paper).
        width: width of both Transformers; None takes the encoder's.
        layers: of each Transformer.
        heads: attention heads of each.
        mlp_ratio: of each.
        learning_rate: AdamW's, after the warm-up.
        weight_decay: AdamW's.
        warmup_steps: linear warm-up of the learning rate.
        temperature_start: of the Gumbel-Softmax (paper), or scale of the Gumbel noise on the ranking (sampled_budget),
            at the first step.
        temperature_end: at the last; geometric in between.
        statistics_batches: training batches from which the mean and spread of each feature channel are estimated.
        kept_shares: shares of a tile's tokens at which validation compares the rankings.
        allow_worse_than_random: end without an error even if the deterministic ranking loses to random choices.
        seed: of all mask noise.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        objective: Objective = "sampled_budget",
        kept_range: tuple[float, float] = (0.05, 0.75),
        random_share: float = 0.5,
        proportion: float = 0.3,
        regularizer: float = 1.0,
        width: int | None = None,
        layers: int = 3,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 50,
        temperature_start: float = 1.0,
        temperature_end: float = 0.5,
        statistics_batches: int = 20,
        kept_shares: tuple[float, ...] = (0.5, 0.25, 0.1),
        allow_worse_than_random: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        _check(objective, kept_range, random_share, proportion, temperature_end, temperature_start, kept_shares)
        self.encoder = encoder
        self.objective, self.kept_range, self.random_share = objective, kept_range, random_share
        self.proportion, self.regularizer = proportion, regularizer
        self.learning_rate, self.weight_decay, self.warmup_steps = learning_rate, weight_decay, warmup_steps
        self.temperature_start, self.temperature_end = temperature_start, temperature_end
        self.statistics_batches, self.kept_shares = statistics_batches, kept_shares
        self.allow_worse_than_random, self.seed = allow_worse_than_random, seed
        sizes = (encoder.dim, encoder.num_patches, width, layers, heads, mlp_ratio)
        self.selector = GumbelSelector(*sizes)
        self.reconstructor = Reconstructor(*sizes)
        self.comparison = RankingComparison(kept_shares)
        self.last_validation: dict[str, float] = {}
        self._trained = 0, 0.0  # tokens and seconds of this run
        self.register_load_state_dict_post_hook(_encoder_is_not_loaded)

    # ---- training

    def features(self, batch: Tensor) -> Float[Tensor, "B N D"]:
        """Encoder features of a batch, which holds pixels ``[B, 3, H, W]`` or cached features ``[B, N, D]``."""
        return (batch if batch.ndim == 3 else self.encoder(batch)).float()

    def training_step(self, batch: Tensor, batch_idx: int) -> Float[Tensor, ""]:
        features = self.features(batch)
        step, total = self.global_step, self._total_steps()
        tau = temperature(step, total, self.temperature_start, self.temperature_end)
        loss, logs = getattr(self, f"_{self.objective}")(
            features, tau, step < self.random_share * total, self._generator(step)
        )
        self.log_dict({"train/loss": loss.detach(), "train/temperature": tau})
        self.log_dict(logs, prog_bar=True)
        return loss

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self._began = time.monotonic()

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        patches = len(batch) * self.encoder.grid[0] * self.encoder.grid[1]
        seconds = time.monotonic() - self._began
        self.log("train/tokens_per_s", patches / seconds, prog_bar=True)
        self._trained = self._trained[0] + patches, self._trained[1] + seconds

    def _sampled_budget(
        self, features: Float[Tensor, "B N D"], tau: float, at_random: bool, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        scores = self.selector.score(VisualTokens.from_features(features, self.encoder.grid)).float()
        batch, patches = scores.shape
        keep = sampled_keep(patches, self.kept_range, generator)
        if at_random:
            mask = random_mask(batch, patches, keep, generator).to(scores)
        else:
            mask = gumbel_top_k(scores, keep, tau, generator).detach()
        target = self.selector.normalized(features)
        error = token_error(self.reconstructor(target, mask), target)
        rebuild, rank = dropped_mean(error, mask), drop_error_regression(scores, error, mask)
        return rebuild + rank, {"rec": rebuild.detach(), "rank": rank.detach(), "keep": mask.mean()}

    def _straight_through(
        self, features: Float[Tensor, "B N D"], tau: float, at_random: bool, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        scores = self.selector.score(VisualTokens.from_features(features, self.encoder.grid)).float()
        batch, patches = scores.shape
        keep = sampled_keep(patches, self.kept_range, generator)
        if at_random:  # only the reconstructor learns; the selector stays in the graph, as DDP wants it
            mask = random_mask(batch, patches, keep, generator).to(scores) + 0 * scores.sum()
        else:
            mask = gumbel_top_k(scores, keep, tau, generator)
        target = self.selector.normalized(features)
        error = token_error(self.reconstructor(target, mask), target)
        return error.mean(), {"rec": dropped_mean(error, mask).detach(), "keep": mask.detach().mean()}

    def _paper(
        self, features: Float[Tensor, "B N D"], tau: float, at_random: bool, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.random.fork_rng(devices=[features.device] if features.is_cuda else []):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            mask, logits = self.selector.sample(features, tau)
        if at_random:  # only the reconstructor learns; the selector stays in the graph, as DDP wants it
            batch, patches = mask.shape
            keep = sampled_keep(patches, self.kept_range, generator)
            mask = random_mask(batch, patches, keep, generator).to(mask) + 0 * logits.sum()
        target = self.selector.normalized(features)
        error = token_error(self.reconstructor(target, mask), target)
        loss = paper_loss(error, mask, self.proportion, self.regularizer)
        return loss, {"rec": dropped_mean(error, mask.detach()).detach(), "keep": mask.detach().mean()}

    def _generator(self, step: int) -> torch.Generator:
        """Noise of one step and process: a resumed run draws what the uninterrupted one would have drawn."""
        rank = self.trainer.global_rank if self._trainer is not None else 0
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1_009 + rank)

    def _total_steps(self) -> int:
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("trainer.max_epochs or trainer.max_steps must be positive: the schedules need an end")
        return int(total)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            [*self.selector.parameters(), *self.reconstructor.parameters()],
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
        )
        total = self._total_steps()
        factor = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: rate_factor(s, total, self.warmup_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step"}}

    # ---- feature statistics

    def on_fit_start(self) -> None:
        """Estimates mean and spread of every channel on the first batches; a resumed run has them in its checkpoint."""
        if self.trainer.ckpt_path is not None:
            return
        mean, std = self._statistics()
        self.selector.feature_mean.copy_(mean)
        self.selector.feature_std.copy_(std)
        rank_zero_info(f"feature spread per channel: {float(std.min()):.3g} to {float(std.max()):.3g}")

    def _statistics(self) -> tuple[Tensor, Tensor]:
        loader = self.trainer.datamodule.train_dataloader()  # pyright: ignore[reportAttributeAccessIssue]
        width = self.encoder.dim
        sums = torch.zeros(2, width, dtype=torch.float64, device=self.device)
        count = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(loader):
            if index == self.statistics_batches:
                break
            table = self.features(batch.to(self.device)).flatten(0, 1).double()
            sums += torch.stack([table.sum(0), table.pow(2).sum(0)])
            count += len(table)
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        count = self.trainer.strategy.reduce(count, reduce_op="sum")
        mean, square = sums / count
        std = (square - mean.pow(2)).clamp(min=0).sqrt()
        return mean.float(), torch.where(std > 1e-6, std, 1.0).float()  # a constant channel stays as it is

    # ---- validation: the deterministic ranking against random and leverage, by the same reconstructor

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._compare(batch, batch_idx, "val")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self._compare(batch, batch_idx, "test")

    def _compare(self, batch: Tensor, batch_idx: int, stage: str) -> None:
        tokens = VisualTokens.from_features(self.features(batch), self.encoder.grid)
        rows = len(tokens.features)

        def noise(draw: int) -> torch.Generator:
            return self._generator(-1 - 3 * batch_idx - draw)

        for name, meter in self.comparison.measure(self.selector, self.reconstructor, tokens, noise):
            main = name in ("rec_learned", "rec_random")
            self.log(f"{stage}/{name}", meter, on_step=False, on_epoch=True, batch_size=rows, prog_bar=main)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.last_validation = self.comparison.values()

    def on_train_end(self) -> None:
        """Fails when the deterministic ranking ended below random: noisy training masks hide that."""
        if getattr(self.trainer, "fast_dev_run", False):
            return
        if not self.last_validation:
            rank_zero_warn("no validation ran, so the ranking was never compared with random choices")
            return
        lost = self.comparison.losses_to_random(self.last_validation)
        if lost and not self.allow_worse_than_random:
            raise RankingError(
                f"the deterministic ranking reconstructs worse than random tokens at {', '.join(lost)}; "
                "train longer, or pass --model.allow_worse_than_random true to end without this error"
            )

    # ---- checkpoints: plain containers only, so that they load with weights_only=True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data = getattr(self.trainer, "datamodule", None)
        checkpoint["selector"] = {
            "init_args": self.selector.init_args,
            "encoder": {"name": self.encoder.name, "fingerprint": self.encoder.fingerprint()},
            "data": data.describe() if isinstance(data, ImageModule) else "unknown",
            "credits": data.credits() if isinstance(data, ImageModule) else "",
            "objective": self.objective,
            "steps": self.global_step,
            "validation": dict(self.last_validation),
            "tokens_per_s": self._trained[0] / max(self._trained[1], 1e-9),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        ours, theirs = self.encoder.fingerprint(), checkpoint["selector"]["encoder"]["fingerprint"]
        if ours != theirs:
            raise ValueError(
                f"ckpt_path was trained on another encoder: {checkpoint['selector']['encoder']['name']} ({theirs}), "
                f"this run has {self.encoder.name} ({ours})"
            )
        self.last_validation = dict(checkpoint["selector"]["validation"])


def _encoder_is_not_loaded(module: nn.Module, keys: Any) -> None:
    """The encoder's weights are never in a checkpoint, so they are not missing from it."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.startswith("encoder.")]


def _check(
    objective: str,
    kept_range: tuple[float, float],
    random_share: float,
    proportion: float,
    cold: float,
    hot: float,
    kept_shares: tuple[float, ...],
) -> None:
    if objective not in get_args(Objective):
        raise ValueError(f"model.objective must be one of {get_args(Objective)}, got {objective!r}")
    if not 0 < kept_range[0] <= kept_range[1] < 1:
        raise ValueError(f"model.kept_range must be 0 < smallest <= largest < 1, got {kept_range}")
    if not 0 <= random_share <= 1:
        raise ValueError(f"model.random_share must be in [0, 1], got {random_share}")
    if not 0 < proportion <= 1:
        raise ValueError(f"model.proportion must be in (0, 1], got {proportion}")
    if not 0 < cold <= hot:
        raise ValueError(f"model.temperature_end must be in (0, temperature_start], got {cold} and {hot}")
    if not kept_shares or not all(0 < share < 1 for share in kept_shares):
        raise ValueError(f"model.kept_shares must be shares in (0, 1), got {kept_shares}")
