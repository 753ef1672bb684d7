"""Stage 1, the tower: a small CLIP vision model learns, densely, what lies under each patch.

The features that LLaVA-NeXT takes (layer -2, without CLS) go through a layer norm and a linear head to the classes of
`symbols`; a second head finds the centre patches of objects. The last layer's CLS token learns which classes occur in
the tile, so that CLS, its attention and the last layer carry information too. The heads are dropped afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from training.testbed import tiles
from training.testbed.muon import Muon, matrices_apart
from training.testbed.state import Log, load_state, process_rank, save_state, schedule, sum_gradients
from training.testbed.symbols import CHARACTERS, CLASSES, PATCH, TILE


def tower_config(width: int, layers: int, heads: int) -> CLIPVisionConfig:
    """The configuration of a small CLIP vision model for tiles of 96 and patches of 8 pixels.

    Args:
        width: features per token.
        layers: number of layers.
        heads: attention heads per layer.
    """
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=TILE,
        patch_size=PATCH,
        projection_dim=width,
    )


def feature_layer(tower: CLIPVisionModel, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B S D"]:
    """CLS and patches where LLaVA-NeXT takes them: behind the last layer but one.

    Args:
        tower: the vision model; its last layer is not computed.
        pixels: tiles [B, 3, H, W] in [-1, 1].

    Returns:
        [B, 1 + patches, D], the CLS token first.
    """
    # "layrnorm" is how transformers spells it.
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))

    *layers, _ = tower.encoder.layers
    for layer in layers:
        hidden = layer(hidden, attention_mask=None)

    return hidden


class DenseTower(nn.Module):
    """The tower with its training heads.

    Args:
        config: the tower's configuration.

    >>> model = DenseTower(tower_config(width=16, layers=2, heads=2))
    >>> classes, centre, present = model(torch.zeros(1, 3, 96, 96))
    >>> classes.shape[1], centre.shape[1], classes.shape[2] == present.shape[1]
    (144, 144, True)
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.tower = CLIPVisionModel(config)
        # A norm of its own: the features that are taken come before the tower's last one.
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, len(CLASSES))
        self.centre = nn.Linear(width, 1)
        self.present = nn.Linear(width, len(CLASSES))

    def forward(
        self, pixels: Float[Tensor, "B 3 H W"], whole: bool = True
    ) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B N"], Float[Tensor, "B C"] | None]:
        """Logits of every patch and, with `whole`, of the tile.

        Args:
            pixels: tiles [B, 3, H, W] in [-1, 1].
            whole: also compute the last layer, which only the classes in the tile depend on.

        Returns:
            the classes of every patch [B, N, C], whether it is an object's centre [B, N], and the classes that occur
            in the tile [B, C] (None without `whole`).
        """
        hidden = feature_layer(self.tower, pixels)
        classes, centre = self.patch_logits(hidden[:, 1:])
        if not whole:
            return classes, centre, None

        last = self.tower.encoder.layers[-1](hidden, attention_mask=None)
        return classes, centre, self.present(self.tower.post_layernorm(last[:, 0]))

    def patch_logits(self, features: Float[Tensor, "B N D"]) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B N"]]:
        """Logits of the patches' classes, and of being an object's centre.

        Args:
            features: those of patches alone, without CLS.
        """
        patches = self.norm(features)
        return self.classes(patches), self.centre(patches)[..., 0]


def dense_loss(
    classes: Float[Tensor, "B N C"],
    centre: Float[Tensor, "B N"],
    labels: Int[Tensor, "B 2 R C2"],
    objects: float,
    centres: float,
) -> tuple[Tensor, dict[str, float]]:
    """The mean loss of the patches, and the shares of them that are classified correctly.

    Args:
        classes: logits.
        centre: logits.
        labels: classes and centre flags of the patches, [B, 2, rows, columns].
        objects: weight of the classes of objects against those of characters.
        centres: weight of the rare centres against other patches.

    Returns:
        (loss, shares of characters, objects, background and centres); NaN where the batch has no such patch.
    """
    target, middle = labels[:, 0].flatten(1), labels[:, 1].flatten(1)

    # Nine in ten patches of a page are background, so it weighs less.
    weight = torch.ones(len(CLASSES))
    weight[0] = 0.4
    weight[1 + len(CHARACTERS) :] = objects
    dense = F.cross_entropy(classes.flatten(0, 1), target.flatten(), weight=weight)

    # Centres are learnt within objects: elsewhere the class already says that there is none.
    in_objects = (target > len(CHARACTERS)).float()
    # Patches outside of objects count too, but little.
    where = F.binary_cross_entropy_with_logits(
        centre, middle.float(), weight=0.1 + in_objects, pos_weight=torch.tensor(centres)
    )

    right = classes.argmax(-1) == target
    character = (target > 0) & (target <= len(CHARACTERS))
    scores = {
        "characters": right[character].float().mean().item(),
        "objects": right[target > len(CHARACTERS)].float().mean().item(),
        "background": right[target == 0].float().mean().item(),
        "centres": ((centre > 0) == (middle > 0))[in_objects > 0].float().mean().item(),
    }

    return dense + where, scores


def losses(
    model: DenseTower,
    pixels: Float[Tensor, "B 3 H W"],
    labels: Int[Tensor, "B 2 R C"],
    objects: float,
    centres: float,
    whole: bool = True,
) -> tuple[Tensor, dict[str, float]]:
    """The training loss and the scores of `dense_loss`; with `whole`, the last layer's CLS token learns too.

    Args:
        model: the tower with its heads.
        pixels: tiles in [-1, 1].
        labels: classes and centre flags of the patches, [B, 2, rows, columns].
        objects: see `dense_loss`.
        centres: see `dense_loss`.
        whole: see `DenseTower.forward`.
    """
    classes, centre, present = model(pixels, whole)
    loss, scores = dense_loss(classes, centre, labels, objects, centres)

    if present is not None:
        # 1 for every class that occurs in the tile, background too.
        seen = torch.zeros_like(present).scatter_(1, labels[:, 0].flatten(1), 1.0)
        loss = loss + 0.2 * F.binary_cross_entropy_with_logits(present, seen)

    return loss, scores


@dataclass(frozen=True)
class Phase:
    """Steps at a rate going linearly from `rate` to `last`, on one mixture of tiles.

    Attributes:
        steps: number of steps.
        rate: learning rate at their beginning.
        last: learning rate at their end.
        shares: share of every task; the other tiles are random text (see `tiles.batch`).
        objects: see `dense_loss`.
        centres: see `dense_loss`.
        positions: the amplitude of a 2-D sine table added to the position embeddings as the phase begins. CLIP's own
            start has no notion of neighbourhood, and shapes, unlike characters, can only be recognised by comparing
            neighbours.
        parts: batches per step; as many processes under torchrun share them.
        whole_every: the last layer is trained in one step out of this many.

    >>> phase = Phase(steps=100, rate=1e-3, last=1e-4, shares={"documents": 0.75})
    >>> [round(schedule(step, phase.steps, phase.rate, 0, phase.last / phase.rate), 6) for step in (0, 50, 100)]
    [0.001, 0.00055, 0.0001]
    """

    steps: int
    rate: float
    last: float
    shares: dict[str, float]
    objects: float = 1.0
    centres: float = 1.0
    positions: float = 0.0
    parts: int = 1
    whole_every: int = 1


def sine_table(width: int, side: int, longest: float = 30.0) -> Float[Tensor, "N D"]:
    """Sines and cosines of row and column, a quarter of the width each; zeros for CLS.

    Args:
        width: features per token, a multiple of 4.
        side: patches per side of a tile.
        longest: about the slowest wave's length over 2 pi, in patches.

    Returns:
        [1 + side * side, width], in the order of CLIP's position embeddings.

    >>> sine_table(width=8, side=3).shape
    torch.Size([10, 8])
    """
    # Wavelengths from 2 pi patches upwards, in equal ratios.
    frequency = longest ** (-torch.arange(width // 4) / (width // 4))
    place = torch.arange(side)[:, None] * frequency
    waves = torch.cat([place.sin(), place.cos()], dim=1)

    # The first half of the width encodes the row, the second the column.
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)

    return torch.cat([torch.zeros(1, width), torch.cat([rows, columns], dim=-1).flatten(0, 1)])


def train_tower(
    config: CLIPVisionConfig, work: Path, phases: list[Phase], batch: int, warmup: int, seed: int, every: int = 50
) -> CLIPVisionModel:
    """Goes through the phases, going on from the state under `work`, and saves `work`/tower.

    Args:
        config: the tower's configuration.
        work: folder of the state, the log and the finished tower.
        phases: one after the other; optimizer and heads go on.
        batch: tiles per part of a step.
        warmup: steps of the first phase in which the rate rises.
        seed: seed of weights and tiles.
        every: steps from one saved state to the next.

    Returns:
        the trained tower, without heads.

    Raises:
        ValueError: a phase's parts cannot be shared evenly among the processes.
    """
    torch.manual_seed(seed)
    rank, world = process_rank()

    model = DenseTower(config)
    model.tower.set_attn_implementation("eager")  # on CPUs faster than sdpa for so few patches

    optimizer = Muon(matrices_apart(model.named_parameters()), phases[0].rate, weight_decay=0.02, betas=(0.9, 0.98))

    path, log, start = work / "tower.pt", Log(work / "log.jsonl", "tower"), 0
    if state := load_state(path):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]

    # A flat list of steps, so that a number is all that is needed to go on.
    plan = [(phase, within) for phase in phases for within in range(phase.steps)]
    for step in range(start, len(plan)):
        phase, within = plan[step]
        if phase.parts % world:
            raise ValueError(f"parts must be a multiple of the number of processes, {world}, got {phase}")

        if within == 0 and phase.positions:
            # Once, as the phase begins; from then on the table is trained like any weight.
            table = model.tower.embeddings.position_embedding.weight
            with torch.no_grad():
                table += phase.positions * sine_table(table.shape[1], TILE // PATCH)

        # Only the first phase warms up: the optimizer's moments carry over.
        ramp = warmup if step == within else 0
        for group in optimizer.param_groups:
            group["lr"] = schedule(within, phase.steps, phase.rate, ramp, phase.last / phase.rate)

        optimizer.zero_grad()
        values: dict[str, float] = {}

        # Tiles are drawn from step and part, so neither a resumed run nor another number of processes changes them.
        for part in range(rank, phase.parts, world):
            rng = Random(f"tower/{seed}/{step}/{part}")
            pixels, labels = map(torch.from_numpy, tiles.batch(rng, batch, phase.shares))
            whole = step % phase.whole_every == 0
            loss, scores = losses(model, pixels, labels, phase.objects, phase.centres, whole)
            (loss / phase.parts).backward()
            values = {"loss": loss.item(), **scores}
            log.count(world * len(pixels) * (TILE // PATCH) ** 2)

        sum_gradients(model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        if rank:
            continue

        # All processes hold the same weights, so the first one saves and logs, with the scores of its last part.
        if (step + 1) % min(25, every) == 0:
            log(step + 1, **values)
        if (step + 1) % every == 0 or step + 1 == len(plan):
            save_state(path, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)

    if rank == 0:
        model.tower.save_pretrained(work / "tower")
    return model.tower
