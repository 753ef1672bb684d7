"""Stage 3, the join: tower and reader become one LLaVA-NeXT.

First the projector is fitted so that a patch's projected feature is the reader's embedding of the symbol under it, then
projector and language model are tuned together on pixels; the tower stays frozen. Both use the lessons of the reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaNextForConditionalGeneration, PreTrainedTokenizerFast

from training.testbed import tiles
from training.testbed.lessons import Lesson, collate
from training.testbed.reader import Grade, Reader, answer_loss
from training.testbed.state import Log, load_state, process_rank, save_state, schedule, sum_gradients
from training.testbed.symbols import GRID, TILE, cut


@dataclass(frozen=True)
class Round:
    """Lessons over which the rate goes down once, from each grade's own to `last` times that.

    A step averages `parts` batches; as many processes under torchrun share them.
    """

    grades: list[Grade]
    last: float = 0.05
    parts: int = 1


def transplant(model: LlavaNextForConditionalGeneration, tower: CLIPVisionModel, reader: Reader) -> None:
    """Puts the two trained halves into the model and freezes the tower."""
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(reader.language.state_dict())
    model.tie_weights()
    with torch.no_grad():
        model.model.image_newline.copy_(reader.newline)
    model.model.vision_tower.requires_grad_(False)


def tower_features(
    model: LlavaNextForConditionalGeneration, pixels: Float[Tensor, "T 3 H W"]
) -> Float[Tensor, "T N D"]:
    """What LLaVA-NeXT takes from its tower: the last layer but one, without CLS."""
    tower = model.model.vision_tower
    *layers, _ = tower.encoder.layers
    with torch.no_grad():
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer in layers:
            hidden = layer(hidden, attention_mask=None)
    return hidden[:, 1:]


def pack(projected: Float[Tensor, "T N D"], newline: Float[Tensor, " D"], columns: int) -> Float[Tensor, "S D"]:
    """The slots of one page without padding: base tile, then the tiles as one grid, a newline behind every row."""
    width = projected.shape[-1]
    grid = projected[1:].reshape(-1, columns, GRID, GRID, width).transpose(1, 2)
    grid = grid.reshape(-1, columns * GRID, width)
    grid = torch.cat([grid, newline.expand(grid.shape[0], 1, width)], dim=1)
    return torch.cat([projected[0], grid.flatten(0, 1)])


def fit_projector(
    model: LlavaNextForConditionalGeneration,
    reader: Reader,
    work: Path,
    shares: dict[str, float],
    steps: int,
    batch: int,
    rate: float,
    seed: int,
) -> None:
    """Regression onto the embeddings of the symbols; the log tells how often the right one is the nearest."""
    projector, log = model.model.multi_modal_projector, Log(work / "log.jsonl", "projector")
    table = reader.table()[:-1].detach()
    scale = table.std()
    optimizer = torch.optim.AdamW(projector.parameters(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        pixels, labels = (
            torch.from_numpy(part) for part in tiles.batch(Random(f"projector/{seed}/{step}"), batch, shares)
        )
        classes, centres = labels.flatten(2).unbind(1)
        wanted = table[classes] + centres[..., None] * reader.centre.detach()
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, steps, rate, 10)
        projected = projector(tower_features(model, pixels))
        weight = torch.where(classes > 0, 1.0, 0.3)
        error = (((projected - wanted) / scale) ** 2).mean(-1)
        loss = (error * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 25 == 0 or step + 1 == steps:
            nearest = torch.cdist(projected.flatten(0, 1).detach(), table).argmin(-1).view_as(classes)
            log(step + 1, loss=loss.item(), symbols=(nearest == classes)[classes > 0].float().mean().item())


def embed(model: LlavaNextForConditionalGeneration, lessons: list[Lesson], ids: Tensor) -> Float[Tensor, "B L D"]:
    """Text embeddings with the packed, projected features of the pages' kept slots in the places of the image
    tokens."""
    images = [one.image for one in lessons if one.image is not None]
    if len(images) < len(lessons):
        raise ValueError(f"lessons must all be drawn (draw=True), got {len(lessons) - len(images)} without an image")
    cuts = [torch.from_numpy(cut(image)) for image in images]
    projected = model.model.multi_modal_projector(tower_features(model, torch.cat(cuts)))
    visual = []
    for one, image, features in zip(lessons, images, projected.split([len(part) for part in cuts]), strict=True):
        packed = pack(features, model.model.image_newline, image.width // TILE)
        visual.append(packed[torch.from_numpy(one.kept)])
    embedded = model.model.language_model.embed_tokens(ids)
    return embedded.masked_scatter((ids == model.config.image_token_id)[..., None], torch.cat(visual))


def tune(
    model: LlavaNextForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    work: Path,
    rounds: list[Round],
    warmup: int,
    seed: int,
    every: int = 20,
) -> None:
    """Projector and language model together, each grade for `at_most` steps; in every round the rate goes down anew."""
    rank, world = process_rank()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rounds[0].grades[0].rate, weight_decay=0.02, betas=(0.9, 0.95))
    path, log, start = work / "join.pt", Log(work / "log.jsonl", "join"), 0
    if state := load_state(path):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    plan = []
    for one in rounds:
        steps = [grade for grade in one.grades for _ in range(grade.at_most)]
        plan += [(one, grade, within, len(steps)) for within, grade in enumerate(steps)]
    for step in range(start, len(plan)):
        one, now, within, length = plan[step]
        if one.parts % world:
            raise ValueError(f"parts must be a multiple of the number of processes, {world}, got {one}")
        for group in optimizer.param_groups:
            group["lr"] = schedule(within, length, now.rate, warmup, one.last)
        optimizer.zero_grad()
        values: dict[str, float] = {}
        for part in range(rank, one.parts, world):
            rng = Random(f"join/{seed}/{step}/{part}")
            lessons = [now.lesson(rng, tokenizer, draw=True) for _ in range(now.batch)]
            ids, labels, positions = collate(lessons)
            kinds = [one.kind for one in lessons]
            loss, scores = answer_loss(model.model.language_model, embed(model, lessons, ids), labels, positions, kinds)
            (loss / one.parts).backward()
            values = {"length": ids.shape[1], "loss": loss.item(), **scores}
        sum_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if rank:
            continue
        if (step + 1) % every == 0:
            log(step + 1, **values)
        if (step + 1) % 50 == 0 or step + 1 == len(plan):
            save_state(path, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
