"""Stage 3, the join: tower and reader become one LLaVA-NeXT.

First the projector is fitted so that a patch's projected feature is the reader's embedding of the symbol under it, then
projector and language model are tuned together on pixels, with the tower frozen at first and learning too in the end.
Both use the lessons of the reader.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaNextForConditionalGeneration, PreTrainedTokenizerFast

from training.testbed import tiles
from training.testbed.lessons import Lesson, by_length, collate
from training.testbed.muon import Muon, matrices_apart
from training.testbed.reader import Grade, Reader, answer_loss, shares_right
from training.testbed.state import Log, load_state, process_rank, save_state, schedule, sum_gradients
from training.testbed.symbols import GRID, TILE, cut
from training.testbed.tower import DenseTower, dense_loss, feature_layer


@dataclass(frozen=True)
class Round:
    """Lessons over which the rate goes down once, from each grade's own to `last` times that.

    Attributes:
        grades: one after the other, each for `at_most` steps.
        last: share of the rate at the end of the round.
        parts: batches that a step averages; as many processes under torchrun share them.
        tower: the tower's rate as a share of the others'; where it is not 0, the tower learns from the answers and
            goes on learning densely.

    >>> grade = Grade({"documents": 1.0}, batch=8, rate=1e-3, until=2.0, at_most=500)
    >>> one = Round([grade, grade], last=0.1, tower=0.3)
    >>> sum(grade.at_most for grade in one.grades), one.tower * grade.rate  # steps, and the tower's rate
    (1000, 0.0003)
    """

    grades: list[Grade]
    last: float = 0.05
    parts: int = 1
    tower: float = 0.0


def transplant(model: LlavaNextForConditionalGeneration, tower: CLIPVisionModel, reader: Reader) -> None:
    """Puts the two trained halves into the model and freezes the tower.

    Args:
        model: a fresh model of the same sizes; changed in place.
        tower: the trained tower.
        reader: the trained reader.
    """
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(reader.language.state_dict())
    # The output layer shares the embeddings that were just loaded.
    model.tie_weights()

    with torch.no_grad():
        model.model.image_newline.copy_(reader.newline)
    model.model.vision_tower.requires_grad_(False)


def pack(projected: Float[Tensor, "T N D"], newline: Float[Tensor, " D"], columns: int) -> Float[Tensor, "S D"]:
    """The slots of one page without padding: base tile, then the tiles as one grid, a newline behind every row.

    As LLaVA-NeXT packs them, for pages that fill their tiles.

    Args:
        projected: features of the page's tiles, the base tile first.
        newline: the feature that ends a row.
        columns: tiles side by side.
    """
    width = projected.shape[-1]
    # From [tile row, tile column, row, column] to the rows of the whole page.
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
    """Fits the projector by regression onto the embeddings of the symbols under the patches.

    So the language model can read pages before the joint tuning begins. The log says how often the right symbol is the
    nearest.

    Args:
        model: with both halves in place; its projector is changed.
        reader: whose embeddings are aimed at.
        work: folder of the log.
        shares: share of every task among the tiles (see `tiles.batch`).
        steps: number of steps.
        batch: tiles per step.
        rate: highest learning rate.
        seed: seed of the tiles.
    """
    projector, log = model.model.multi_modal_projector, Log(work / "log.jsonl", "projector")
    rank, _ = process_rank()

    # Without the newline, which no patch shows. Errors are measured in standard deviations of the embeddings.
    table = reader.table()[:-1].detach()
    scale = table.std()

    optimizer = torch.optim.AdamW(projector.parameters(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        pixels, labels = (
            torch.from_numpy(part) for part in tiles.batch(Random(f"projector/{seed}/{step}"), batch, shares)
        )

        with torch.no_grad():
            # Without CLS, which LLaVA-NeXT drops.
            features = feature_layer(model.model.vision_tower, pixels)[:, 1:]

        classes, centres = labels.flatten(2).unbind(1)
        wanted = table[classes] + centres[..., None] * reader.centre.detach()
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, steps, rate, 10)

        # Background is most of a page and all alike, so it weighs less.
        projected = projector(features)
        weight = torch.where(classes > 0, 1.0, 0.3)
        error = (((projected - wanted) / scale) ** 2).mean(-1)
        loss = (error * weight).sum() / weight.sum()

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # Every process fits the same projector on the same tiles, so one of them logs.
        if rank == 0 and ((step + 1) % 25 == 0 or step + 1 == steps):
            nearest = torch.cdist(projected.flatten(0, 1).detach(), table).argmin(-1).view_as(classes)
            log(step + 1, loss=loss.item(), symbols=(nearest == classes)[classes > 0].float().mean().item())


def embed(
    model: LlavaNextForConditionalGeneration, lessons: list[Lesson], ids: Tensor, features: Float[Tensor, "T N D"]
) -> Float[Tensor, "B L D"]:
    """Text embeddings, with the packed and projected features of the kept slots in the places of the image tokens.

    Args:
        model: with its projector.
        lessons: a batch; a lesson may have no page.
        ids: tokens, as `collate` gives them.
        features: patches of all tiles of all pages, one after the other.

    Raises:
        ValueError: a lesson's page was not drawn.
    """
    projected = model.model.multi_modal_projector(features)
    shown = [one for one in lessons if len(one.tiles)]
    # An empty start: a batch of comparisons alone has no page, and `cat` needs a tensor.
    visual = [projected[:0].flatten(0, 1)]
    for one, part in zip(shown, projected.split([len(one.tiles) for one in shown]), strict=True):
        packed = pack(part, model.model.image_newline, page_of(one).width // TILE)
        visual.append(packed[torch.from_numpy(one.kept)])

    embedded = model.model.language_model.embed_tokens(ids)
    return embedded.masked_scatter((ids == model.config.image_token_id)[..., None], torch.cat(visual))


def page_of(lesson: Lesson) -> Image.Image:
    """The lesson's page.

    Raises:
        ValueError: it was not drawn.
    """
    if lesson.image is None:
        raise ValueError("lessons must be drawn (draw=True), got one without an image")
    return lesson.image


def accumulate_gradients(
    model: LlavaNextForConditionalGeneration, dense: DenseTower, lessons: list[Lesson], learns: bool, weight: float
) -> dict[str, float]:
    """Adds the gradients of one batch, and returns its scores.

    Args:
        model: the whole model.
        dense: the tower's training heads; their own tower is not used.
        lessons: the batch, drawn.
        learns: whether the tower learns too: from the answers, and densely from what lies under its patches.
        weight: factor on the gradients; steps of several batches average them by it.

    Returns:
        The loss of the answers, the length of the longest lesson, and shares predicted or classified correctly.
    """
    # Dense losses of the groups are weighted by their tiles, as those of the answers are by their tokens.
    tiles_of_all = sum(len(one.tiles) for one in lessons)
    values, hits = {"loss": 0.0, "length": float(max(len(one.ids) for one in lessons))}, Counter()
    for part, share in by_length(lessons):
        pages = [torch.from_numpy(cut(page_of(one))) for one in part if len(one.tiles)]
        # A group of comparisons has no page, so no features.
        features = torch.zeros(0, GRID * GRID, model.model.vision_tower.config.hidden_size)
        if pages:
            # Where the tower does not learn, its activations need not be kept.
            with torch.set_grad_enabled(learns):
                features = feature_layer(model.model.vision_tower, torch.cat(pages))[:, 1:]

        ids, labels, positions = collate(part)
        embedded = embed(model, part, ids, features)
        loss, of_part = answer_loss(model.model.language_model, embedded, labels, positions, [one.kind for one in part])
        loss = share * loss
        values["loss"], hits = values["loss"] + loss.item(), hits + of_part

        if learns and pages:
            seen = torch.cat([torch.from_numpy(one.tiles) for one in part])
            patches, scores = dense_loss(*dense.patch_logits(features), seen, objects=1.5, centres=4.0)
            loss, values = loss + patches * len(seen) / tiles_of_all, values | scores

        # Group by group: gradients add up, and each group's activations are freed.
        (loss * weight).backward()
    return values | shares_right(hits)


def optimizer_of(model: LlavaNextForConditionalGeneration, dense: DenseTower, rate: float, tower: float) -> Muon:
    """The optimizer of projector and language model and, unless its rate is 0, of the tower and its heads.

    Args:
        model: the whole model.
        dense: the tower's training heads.
        rate: learning rate of projector and language model.
        tower: the tower's rate as a share of that; 0 freezes it.
    """
    of_tower = [(f"tower.{name}", p) for name, p in model.model.vision_tower.named_parameters()]
    of_tower += [(name, p) for name, p in dense.named_parameters() if name.startswith(("norm.", "classes.", "centre."))]

    for _, parameter in of_tower:
        parameter.requires_grad_(tower > 0)

    # The tower is part of the model: without this it would be in both sets of groups.
    known = {id(parameter) for _, parameter in of_tower}
    others = matrices_apart((name, p) for name, p in model.named_parameters() if id(p) not in known)
    groups = [group | {"share": 1.0} for group in others]
    groups += [group | {"share": tower} for group in matrices_apart(of_tower)] if tower else []
    return Muon(groups, rate, weight_decay=0.02, betas=(0.9, 0.95))


def tune(
    model: LlavaNextForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    work: Path,
    rounds: list[Round],
    warmup: int,
    seed: int,
    every: int = 20,
) -> None:
    """Tunes projector and language model together, and the tower where a round says so.

    Each grade runs for `at_most` steps; in every round optimizer and rate begin anew.

    Args:
        model: with the projector fitted; changed in place.
        tokenizer: the testbed's.
        work: folder of the state, the log and the tower's heads; training goes on from there.
        rounds: one after the other.
        warmup: steps in which the rate rises, in every round.
        seed: seed of the lessons.
        every: steps from one line of the log to the next.

    Raises:
        ValueError: a round's parts cannot be shared evenly among the processes.
    """
    rank, world = process_rank()
    model.model.vision_tower.set_attn_implementation("eager")  # on CPUs faster than sdpa for so few patches

    path, log, start = work / "join.pt", Log(work / "log.jsonl", "join"), 0

    # The heads as stage 1 left them; those of the join's own state replace them on resuming.
    dense = DenseTower(model.model.vision_tower.config)
    dense.load_state_dict(load_state(work / "tower.pt")["model"])  # pyright: ignore[reportOptionalSubscript]
    if state := load_state(path):
        model.load_state_dict(state["model"])
        # Not strict: the heads are saved without their own copy of the tower, which is not used.
        dense.load_state_dict(state["heads"], strict=False)
        start = state["step"]

    # A flat list of steps, so that a number is all that is needed to go on.
    plan = []
    for one in rounds:
        steps = [grade for grade in one.grades for _ in range(grade.at_most)]
        plan += [(one, grade, within, len(steps)) for within, grade in enumerate(steps)]

    optimizer: Muon | None = None
    for step in range(start, len(plan)):
        one, now, within, length = plan[step]
        if one.parts % world:
            raise ValueError(f"parts must be a multiple of the number of processes, {world}, got {one}")

        # The state of an optimizer is loaded in the middle of its round only: a new round begins without moments.
        if optimizer is None or within == 0:
            optimizer = optimizer_of(model, dense, now.rate, one.tower)
            if state and step == start and within:
                optimizer.load_state_dict(state["optimizer"])

        for group in optimizer.param_groups:
            group["lr"] = group["share"] * schedule(within, length, now.rate, warmup, one.last)

        optimizer.zero_grad()
        values: dict[str, float] = {}
        # Lessons are drawn from step and part, so neither a resumed run nor another number of processes changes them.
        for part in range(rank, one.parts, world):
            rng = Random(f"join/{seed}/{step}/{part}")
            lessons = [now.lesson(rng, tokenizer, draw=True) for _ in range(now.batch)]
            log.count(world * sum(len(one.ids) for one in lessons))
            values = accumulate_gradients(model, dense, lessons, learns=one.tower > 0, weight=1 / one.parts)

        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        sum_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

        if rank:
            continue

        if (step + 1) % every == 0:
            log(step + 1, **values)
        if (step + 1) % 50 == 0 or step + 1 == len(plan):
            heads = {name: value for name, value in dense.state_dict().items() if not name.startswith("tower.")}
            parts = {"model": model.state_dict(), "heads": heads, "optimizer": optimizer.state_dict()}
            save_state(path, step=step + 1, **parts)
