"""Stage 1, the tower: a small CLIP vision model learns, densely, what lies under each patch.

The features that LLaVA-NeXT takes (layer -2, without CLS) go through a layer norm and a linear head to the classes
of `symbols`;
a second head tells the centre patches of objects. The last layer's CLS token tells which classes occur in the
tile, so that CLS,
its attention and the last layer have something to say too. The heads are dropped afterwards.
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
    """CLS and patches where LLaVA-NeXT takes them: behind the last layer but one."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    *layers, _ = tower.encoder.layers
    for layer in layers:
        hidden = layer(hidden, attention_mask=None)
    return hidden


class DenseTower(nn.Module):
    """The tower with its training heads."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.tower = CLIPVisionModel(config)
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, len(CLASSES))
        self.centre = nn.Linear(width, 1)
        self.present = nn.Linear(width, len(CLASSES))

    def forward(
        self, pixels: Float[Tensor, "B 3 H W"], whole: bool = True
    ) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B N"], Float[Tensor, "B C"] | None]:
        """Logits of the classes and of being a centre for every patch; with `whole`, of the classes in the tile (the
        last layer is left out otherwise)."""
        hidden = feature_layer(self.tower, pixels)
        classes, centre = self.tell(hidden[:, 1:])
        if not whole:
            return classes, centre, None
        last = self.tower.encoder.layers[-1](hidden, attention_mask=None)
        return classes, centre, self.present(self.tower.post_layernorm(last[:, 0]))

    def tell(self, features: Float[Tensor, "B N D"]) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B N"]]:
        """What the two heads say of the patches' features."""
        patches = self.norm(features)
        return self.classes(patches), self.centre(patches)[..., 0]


def dense_loss(
    classes: Float[Tensor, "B N C"],
    centre: Float[Tensor, "B N"],
    labels: Int[Tensor, "B 2 R C2"],
    objects: float,
    centres: float,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of every patch, and the shares of characters, object patches, centres and background told rightly.

    `objects` weighs the classes of objects against those of characters, `centres` the rare centres against other
    patches.
    """
    target, middle = labels[:, 0].flatten(1), labels[:, 1].flatten(1)
    weight = torch.ones(len(CLASSES))
    weight[0] = 0.4
    weight[1 + len(CHARACTERS) :] = objects
    dense = F.cross_entropy(classes.flatten(0, 1), target.flatten(), weight=weight)
    in_objects = (target > len(CHARACTERS)).float()
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
    """The training loss and the scores of `dense_loss`; with `whole`, the last layer's CLS token learns too."""
    classes, centre, present = model(pixels, whole)
    loss, scores = dense_loss(classes, centre, labels, objects, centres)
    if present is not None:
        seen = torch.zeros_like(present).scatter_(1, labels[:, 0].flatten(1), 1.0)
        loss = loss + 0.2 * F.binary_cross_entropy_with_logits(present, seen)
    return loss, scores


@dataclass(frozen=True)
class Phase:
    """`steps` steps at a rate going linearly from `rate` to `last`, on a mixture of tiles (see `tiles.batch`).

    `shares`: of every task; the other tiles are random text. `positions`: the amplitude of a 2-D sine table added to
    the position embeddings as the phase begins. CLIP's own start has no sense of nearness, and shapes, unlike
    characters, are only told by comparing neighbours. `parts`: batches a step; as many processes under torchrun share
    them. `whole_every`: the last layer is trained in every so many-th step only.
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
    """[1 + side * side, width]: sines and cosines of row and column, a quarter of the width each; zeros for CLS."""
    frequency = longest ** (-torch.arange(width // 4) / (width // 4))
    place = torch.arange(side)[:, None] * frequency
    waves = torch.cat([place.sin(), place.cos()], dim=1)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return torch.cat([torch.zeros(1, width), torch.cat([rows, columns], dim=-1).flatten(0, 1)])


def train_tower(
    config: CLIPVisionConfig, work: Path, phases: list[Phase], batch: int, warmup: int, seed: int, every: int = 50
) -> CLIPVisionModel:
    """Goes through the phases (going on from the state under `work`), saves `work`/tower and returns the tower."""
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
    plan = [(phase, within) for phase in phases for within in range(phase.steps)]
    for step in range(start, len(plan)):
        phase, within = plan[step]
        if phase.parts % world:
            raise ValueError(f"parts must be a multiple of the number of processes, {world}, got {phase}")
        if within == 0 and phase.positions:
            table = model.tower.embeddings.position_embedding.weight
            with torch.no_grad():
                table += phase.positions * sine_table(table.shape[1], TILE // PATCH)
        ramp = warmup if step == within else 0
        for group in optimizer.param_groups:
            group["lr"] = schedule(within, phase.steps, phase.rate, ramp, phase.last / phase.rate)
        optimizer.zero_grad()
        values: dict[str, float] = {}
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
        if (step + 1) % min(25, every) == 0:
            log(step + 1, **values)
        if (step + 1) % every == 0 or step + 1 == len(plan):
            save_state(path, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
    if rank == 0:
        model.tower.save_pretrained(work / "tower")
    return model.tower
