"""Stage 1, the tower: a small CLIP vision model learns, densely, what lies under each patch.

The features that LLaVA-NeXT takes (layer -2, without CLS) go through a layer norm and a linear head to the classes of `symbols`;
a second head tells the centre patches of objects. The last layer's CLS token tells which classes occur in the tile, so that CLS,
its attention and the last layer have something to say too. The heads are dropped afterwards.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from training.testbed import tiles
from training.testbed.state import Log, load_state, save_state, schedule
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
        self, pixels: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B N"], Float[Tensor, "B C"]]:
        out = self.tower(pixels, output_hidden_states=True)
        patches = self.norm(out.hidden_states[-2][:, 1:])
        return self.classes(patches), self.centre(patches)[..., 0], self.present(out.pooler_output)


def losses(
    model: DenseTower, pixels: Float[Tensor, "B 3 H W"], labels: Int[Tensor, "B 2 R C"]
) -> tuple[Tensor, dict[str, float]]:
    """The training loss, and the shares of characters, object patches, centres and background told rightly."""
    classes, centre, present = model(pixels)
    target, middle = labels[:, 0].flatten(1), labels[:, 1].flatten(1)
    weight = torch.ones(len(CLASSES))
    weight[0] = 0.4
    dense = F.cross_entropy(classes.flatten(0, 1), target.flatten(), weight=weight)
    in_objects = (target > len(CHARACTERS)).float()
    where = F.binary_cross_entropy_with_logits(centre, middle.float(), weight=0.1 + in_objects)
    seen = torch.zeros_like(present).scatter_(1, target, 1.0)
    which = F.binary_cross_entropy_with_logits(present, seen)
    right = classes.argmax(-1) == target
    character = (target > 0) & (target <= len(CHARACTERS))
    scores = {
        "characters": right[character].float().mean().item(),
        "objects": right[target > len(CHARACTERS)].float().mean().item(),
        "background": right[target == 0].float().mean().item(),
        "centres": ((centre > 0) == (middle > 0))[in_objects > 0].float().mean().item(),
    }
    return dense + where + 0.2 * which, scores


def train_tower(
    config: CLIPVisionConfig, work: Path, steps: int, batch: int, rate: float, warmup: int, seed: int, every: int = 100
) -> CLIPVisionModel:
    """Trains for `steps` steps (going on from the state under `work`), saves `work`/tower and returns the tower."""
    torch.manual_seed(seed)
    model = DenseTower(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
    path, log, start = work / "tower.pt", Log(work / "log.jsonl", "tower"), 0
    if state := load_state(path):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    for step in range(start, steps):
        pixels, labels = tiles.batch(Random(f"tower/{seed}/{step}"), batch)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, steps, rate, warmup)
        loss, scores = losses(model, torch.from_numpy(pixels), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % min(25, every) == 0:
            log(step + 1, loss=loss.item(), **scores)
        if (step + 1) % every == 0 or step + 1 == steps:
            save_state(path, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
    model.tower.save_pretrained(work / "tower")
    return model.tower
