"""How fast a training is, and what each way of making it faster gains: `selector-train bench`.

Each variant is a short `fit` in a process of its own with one thread, at the geometry of LLaVA-NeXT 7B's tower (CLIP
ViT-L/14 at 336 pixels, 576 patches per tile) with random weights, so that nothing is downloaded, and with selector and
reconstructor as in ``configs/train/llava-next.yaml``. The variants take
turns, `--repeats` times, and the fastest run of each counts: whatever else runs on the machine can only slow one down.
Ratios are between runs of one call, by wall time, and of whole trainings by CPU time too. That is less disturbed by
other programs, but two processes that wait for each other take no CPU time while they do: there it is an upper bound.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from selector.files import write_json

CACHED, TWO = "--data.cache_dir={room}/cache", ("--trainer.strategy=ddp", "--trainer.devices=2")
VARIANTS: dict[str, tuple[str, ...]] = {
    "on the fly": (),
    "on the fly, encoder in bfloat16": ("--model.encoder.dtype=bfloat16",),
    "on the fly, two processes": TWO,
    "from disk": (CACHED,),
    "from disk, bf16-mixed": (CACHED, "--trainer.precision=bf16-mixed"),
    "from disk, compiled": (CACHED, "--model.compile=true"),
    "from disk, two processes": (CACHED, *TWO),
}
"""Flags of `fit` by what they change."""
RATIOS = {
    "features from disk / on the fly": ("from disk", "on the fly", ("loader", "encoder")),
    "training from disk / on the fly": ("from disk", "on the fly", ("whole",)),
    "encoder in bfloat16 / float32": ("on the fly, encoder in bfloat16", "on the fly", ("encoder",)),
    "training with that encoder / float32": ("on the fly, encoder in bfloat16", "on the fly", ("whole",)),
    "training in bf16-mixed / float32": ("from disk, bf16-mixed", "from disk", ("whole",)),
    "training compiled / not": ("from disk, compiled", "from disk", ("whole",)),
    "two processes / one, on the fly": ("on the fly, two processes", "on the fly", ("whole",)),
    "two processes / one, from disk": ("from disk, two processes", "from disk", ("whole",)),
}
"""Which variant is how many times as fast as which other one, by the time in these parts."""
WARMUP = 2
INSTRUCTIONS = ("avx512f", "avx512_bf16", "amx_bf16")


def flags_of(variant: str, encoder: str, room: Path, steps: Mapping[str, int]) -> list[str]:
    """The arguments of `selector-train` for a variant.

    Args:
        variant: a name in `VARIANTS`.
        encoder: a timm model, built with random weights.
        room: folder for the run and the cache.
        steps: timed steps ``"on the fly"`` and ``"from disk"``, which are much faster.
    """
    timed = next(count for name, count in steps.items() if variant.startswith(name))
    return [
        "fit",
        "--model.encoder=training.encoders.TimmEncoder",
        f"--model.encoder.name={encoder}",
        "--model.encoder.pretrained=false",
        "--model.encoder.layer=-2",
        *("--model.width=320", "--model.heads=5", "--model.statistics_batches=1"),
        *("--data.generated=documents", "--data.generated_train=16", "--data.generated_val=1", "--data.batch_size=4"),
        *("--trainer.accelerator=cpu", "--trainer.max_epochs=-1", f"--trainer.max_steps={WARMUP + timed}"),
        *("--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"),
        *("--trainer.enable_model_summary=false", f"--root={room}/runs", "--name=bench"),
        *(flag.format(room=room) for flag in VARIANTS[variant]),
    ]


def run_one(flags: Sequence[str], out: Path) -> None:
    """Trains, in this process, and writes what the parts took; every process of a distributed run calls it."""
    from training.cli import run

    ran = run([*flags])
    profiler = cast("Any", ran.trainer).profiler  # Lightning's annotations lack it
    if ran.trainer.is_global_zero:
        parts = {row.part: {"seconds": round(row.seconds, 4), "tokens": row.tokens} for row in profiler.rows()}
        cpu = round(profiler.cpu_seconds, 4)
        measured = {"steps": profiler.steps, "processes": ran.trainer.world_size, "cpu_seconds": cpu}
        write_json(out, measured | {"parts": parts})


def measure(variant: str, encoder: str, room: Path, steps: Mapping[str, int]) -> dict[str, Any]:
    """One run of a variant in a process of its own, with one thread.

    Raises:
        RuntimeError: the training failed, with the end of what it printed.
    """
    out = room / "measured.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "training.bench", "--one", str(out), *flags_of(variant, encoder, room, steps)]
    load = os.getloadavg()[0]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not out.is_file():
        raise RuntimeError(f"the variant {variant!r} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return {"variant": variant, "load": round(load, 2)} | json.loads(out.read_text(encoding="utf-8"))


def seconds_per_token(row: Mapping[str, Any], parts: Sequence[str] = ("whole",)) -> float:
    """Wall time in these parts per token trained on, over all processes.

    >>> row = {"processes": 2, "parts": {"loader": {"seconds": 1.0}, "whole": {"seconds": 5.0, "tokens": 10}}}
    >>> seconds_per_token(row), seconds_per_token(row, ["loader"])
    (0.25, 0.05)
    """
    return sum(row["parts"][part]["seconds"] for part in parts) / (row["parts"]["whole"]["tokens"] * row["processes"])


def fastest(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest run of each variant, in the order of `VARIANTS`."""
    return [
        min((run for run in runs if run["variant"] == variant), key=seconds_per_token)
        for variant in VARIANTS
        if any(run["variant"] == variant for run in runs)
    ]


def cpu_per_token(row: Mapping[str, Any]) -> float:
    """CPU seconds of one process per token trained on, over as many tokens as all processes train on meanwhile."""
    return row["cpu_seconds"] / (row["parts"]["whole"]["tokens"] * row["processes"])


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times as fast, by the name in `RATIOS`; those whose variants were both measured.

    Returns:
        Per name ``"wall"``, and for whole trainings ``"cpu"``.
    """
    by_name = {row["variant"]: row for row in rows}
    values: dict[str, dict[str, float]] = {}
    for name, (fast, slow, parts) in RATIOS.items():
        if not {fast, slow} <= by_name.keys():
            continue
        pair = by_name[slow], by_name[fast]
        wall = [seconds_per_token(row, parts) for row in pair]
        values[name] = {"wall": round(wall[0] / wall[1], 2)}
        if parts == ("whole",):
            values[name]["cpu"] = round(cpu_per_token(pair[0]) / cpu_per_token(pair[1]), 2)
    return values


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: load before the run, tokens per second of all processes, CPU time, and the parts' shares of it."""
    names = list(dict.fromkeys(part for row in rows for part in row["parts"]))
    names.remove("whole")
    lines = [
        "| | load before | tokens/s | CPU s per 1,000 tokens | " + " | ".join(names) + " |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for row in rows:
        whole = row["parts"]["whole"]
        cpu = 1000 * row["cpu_seconds"] / whole["tokens"]  # of one process, for its own tokens
        shares = [f"{100 * row['parts'][name]['seconds'] / whole['seconds']:.0f}%" for name in names]
        cells = [row["variant"], f"{row['load']:.1f}", f"{1 / seconds_per_token(row):,.0f}", f"{cpu:.2f}", *shares]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio_table(values: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown of `ratios`."""
    lines = ["| times as fast | by wall time | by CPU time |", "|---|---|---|"]
    for name, value in values.items():
        times = [f"{value[clock]:,.{2 if value[clock] < 100 else 0}f}" for clock in value]
        lines.append(f"| {name} | {' | '.join([*times, ''][:2])} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    # Linux alone tells model and instructions there; elsewhere both stay as good as unknown.
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    flags = set(text.split())
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "torch": str(torch.__version__),
        "threads": "1 per process",
    }


def main(arguments: list[str]) -> int:
    """Entry point of ``selector-train bench``.

    Args:
        arguments: those behind the command.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="selector-train bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/training.json"), help="where the figures go")
    parser.add_argument("--encoder", default="vit_large_patch14_clip_336", help="a timm model, with random weights")
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS], default=[*VARIANTS], metavar="NAME")
    parser.add_argument("--steps", type=int, nargs=2, default=(2, 10), help="timed steps: on the fly, and from disk")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each variant; the fastest counts")
    options = parser.parse_args(arguments)
    if min(*options.steps, options.repeats) < 1:
        raise ValueError(f"--steps and --repeats must be at least 1, got {options.steps} and {options.repeats}")

    steps: dict[str, int] = dict(zip(("on the fly", "from disk"), options.steps, strict=True))
    runs = []
    with tempfile.TemporaryDirectory() as room:
        for number in range(options.repeats):
            for variant in options.variants:
                try:
                    runs.append(measure(variant, options.encoder, Path(room), steps))
                except RuntimeError as error:
                    print(f"selector-train: error: {error}", file=sys.stderr)
                    return 1
                speed = 1 / seconds_per_token(runs[-1])
                print(f"run {number + 1}, {variant}: {speed:,.0f} tokens/s (load {runs[-1]['load']})", flush=True)

    rows = fastest(runs)
    results = {"machine": machine(), "encoder": options.encoder, "repeats": options.repeats, "rows": rows}
    write_json(options.out, results | {"ratios": ratios(rows)})
    print(f"\n{table(rows)}\n\n{ratio_table(ratios(rows))}\n\n{options.out}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        run_one(sys.argv[3:], Path(sys.argv[2]))
    else:
        sys.exit(main(sys.argv[1:]))
