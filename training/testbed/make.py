"""From scratch to a checkpoint: tower, reader, join, evaluate. Every stage resumes where it was stopped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml

from selector.files import write_text
from training.testbed.card import card
from training.testbed.curves import draw_curves
from training.testbed.evaluate import evaluate
from training.testbed.join import Round, fit_projector, transplant, tune
from training.testbed.model import build_model, reader_config
from training.testbed.reader import Grade, train_reader
from training.testbed.state import process_rank, stage_seconds, stage_speeds
from training.testbed.tower import Phase, tower_config, train_tower
from training.testbed.vocabulary import build_processor

Stage = Literal["tower", "reader", "join", "evaluate"]


@dataclass(frozen=True)
class TowerPlan:
    """The vision model and its dense pre-training.

    Attributes:
        width: features per token.
        layers: number of layers.
        heads: attention heads per layer.
        batch: tiles per part of a step.
        warmup: steps in which the rate rises.
        phases: what is learnt when.
        seed: seed of weights and tiles.

    >>> phases = [Phase(steps=800, rate=1e-3, last=1e-4, shares={}), Phase(steps=200, rate=1e-4, last=0.0, shares={})]
    >>> plan = TowerPlan(width=160, layers=4, heads=4, batch=32, warmup=50, phases=phases)
    >>> sum(phase.steps for phase in plan.phases), tower_config(plan.width, plan.layers, plan.heads).intermediate_size
    (1000, 640)
    """

    width: int
    layers: int
    heads: int
    batch: int
    warmup: int
    phases: list[Phase]
    seed: int = 0


@dataclass(frozen=True)
class ReaderPlan:
    """The language model and its curriculum on symbolic pages.

    Attributes:
        width: features per token, the same as the projector's output.
        layers: number of layers.
        heads: attention heads per layer.
        inner: features within the MLP.
        warmup: steps in which the rate rises.
        grades: the curriculum.
        seed: seed of weights and lessons.

    >>> grades = [Grade({"scenes": 1.0}, batch=16, rate=1e-3, until=0.95, at_most=2000)]
    >>> plan = ReaderPlan(width=192, layers=4, heads=4, inner=512, warmup=50, grades=grades)
    >>> config = reader_config(build_processor().tokenizer, plan.width, plan.layers, plan.heads, plan.inner)
    >>> config.vocab_size, config.hidden_size
    (202, 192)
    """

    width: int
    layers: int
    heads: int
    inner: int
    warmup: int
    grades: list[Grade]
    seed: int = 0


@dataclass(frozen=True)
class JoinPlan:
    """The projector's fit and the joint tuning on pixels.

    Attributes:
        projector_shares: share of every task among the tiles (see `tiles.batch`).
        projector_steps: number of steps.
        projector_batch: tiles per step.
        projector_rate: highest learning rate.
        warmup: steps of each round in which the rate rises.
        rounds: the joint tuning.
        seed: seed of tiles and lessons.

    >>> rounds = [Round([Grade({"documents": 1.0}, batch=8, rate=1e-3, until=2.0, at_most=500)], tower=0.1)]
    >>> sizes = {"projector_steps": 300, "projector_batch": 16, "projector_rate": 1e-3}
    >>> plan = JoinPlan(projector_shares={"documents": 0.5, "scenes": 0.5}, **sizes, warmup=20, rounds=rounds)
    >>> plan.projector_steps + sum(grade.at_most for one in plan.rounds for grade in one.grades)
    800
    """

    projector_shares: dict[str, float]
    projector_steps: int
    projector_batch: int
    projector_rate: float
    warmup: int
    rounds: list[Round]
    seed: int = 0


@dataclass(frozen=True)
class EvaluationPlan:
    """How the finished checkpoint is measured.

    Attributes:
        count: held-out questions per task.
        seed: number of the held-out stream.
        batch: questions per call of `generate`.

    >>> write_plan(Path("plan.yaml"), notes="", evaluation=EvaluationPlan(count=100))
    >>> yaml.safe_load(Path("plan.yaml").read_text())["evaluation"]
    {'count': 100, 'seed': 0, 'batch': 16}
    """

    count: int = 1000
    seed: int = 0
    batch: int = 16


def write_plan(path: Path, notes: str, **plans: TowerPlan | ReaderPlan | JoinPlan | EvaluationPlan) -> None:
    """The settings as YAML that the command line reads again.

    Args:
        path: the file.
        notes: see `make`.
        plans: by the name of their argument of `make`.
    """
    # Through JSON, so that what occurs twice is written out twice instead of as a YAML alias.
    plain = json.loads(json.dumps({"notes": notes} | {name: asdict(plan) for name, plan in plans.items()}))
    write_text(path, yaml.safe_dump(plain, sort_keys=False))


def make(
    out: Path,
    tower: TowerPlan,
    reader: ReaderPlan,
    join: JoinPlan,
    evaluation: EvaluationPlan,
    work: Path = Path("runs/testbed"),
    threads: int = 1,
    until: Stage = "evaluate",
    notes: str = "",
) -> None:
    """Makes the checkpoint `out`.

    Args:
        out: the folder of the finished checkpoint.
        tower: the vision model and its dense pre-training.
        reader: the language model and its curriculum on symbolic pages.
        join: the projector's fit and the joint tuning on pixels.
        evaluation: how many held-out questions, of which stream.
        work: where states, logs and the tower are kept; a second call goes on from there.
        threads: CPU threads; the tower and the reader can be trained at the same time by two calls, one
            `--until tower`.
        until: the last stage to run.
        notes: what the card should say about how these weights were made, besides the figures.
    """
    torch.set_num_threads(threads)
    processor = build_processor()
    tokenizer = processor.tokenizer

    vision = tower_config(tower.width, tower.layers, tower.heads)
    trained_tower = train_tower(vision, work, tower.phases, tower.batch, tower.warmup, tower.seed)
    if until == "tower":
        return

    text = reader_config(tokenizer, reader.width, reader.layers, reader.heads, reader.inner)
    trained_reader = train_reader(text, tokenizer, work, reader.grades, reader.warmup, reader.seed)
    if until == "reader":
        return

    model = build_model(tokenizer, vision, text)
    transplant(model, trained_tower, trained_reader)

    # The join's state holds the projector, so it is fitted before the first step only.
    if not (work / "join.pt").exists():
        fit_projector(
            model,
            trained_reader,
            work,
            join.projector_shares,
            join.projector_steps,
            join.projector_batch,
            join.projector_rate,
            join.seed,
        )

    tune(model, tokenizer, work, join.rounds, join.warmup, join.seed)

    # Under torchrun every process trains, and the first one writes.
    if process_rank()[0]:
        return

    model.requires_grad_(True).save_pretrained(out)
    processor.save_pretrained(out)

    if until == "join":
        return

    write_plan(out / "made-with.yaml", notes, tower=tower, reader=reader, join=join, evaluation=evaluation)
    # The log goes with the checkpoint, so that the card's curves can be drawn again.
    write_text(out / "log.jsonl", (work / "log.jsonl").read_text())
    draw_curves(out / "log.jsonl", out / "curves.png")

    results = evaluate(out, evaluation.count, evaluation.seed, evaluation.batch)
    # Besides the scores, what the card says about how the weights were made.
    results["wall_seconds"] = stage_seconds(work / "log.jsonl")
    results["tokens_per_s"] = stage_speeds(work / "log.jsonl")
    results["notes"] = notes
    results["parameters"] = sum(p.numel() for p in model.parameters())
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(out / "README.md", card(results))
