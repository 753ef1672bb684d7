"""`selector-train export --results`: a comparison's figures of the selector in its card, and of no other selector."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from selector import GumbelSelector, cli
from selector.hub import _beside
from selector.report.summary import summarize
from training.cli import main


def trained(path, seed):
    """A checkpoint as `selector-train fit` writes it, of an untrained selector for the tiny tower."""
    torch.manual_seed(seed)
    selector = GumbelSelector(dim=32, num_patches=16, heads=2)
    about = {
        "class": "GumbelSelector", "init_args": selector.init_args, "encoder": {"name": "tiny", "fingerprint": "0"},
        "data": "nothing", "objective": "none", "steps": 0, "tokens_per_s": 1.0, "validation": {},
    }  # fmt: skip
    state = {f"selector.{name}": tensor for name, tensor in selector.state_dict().items()}
    torch.save({"selector": about, "state_dict": state}, path)
    return str(path)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(checkpoint, its export, the run of a comparison in which it took part)."""
    from conftest import build_model

    folder = tmp_path_factory.mktemp("results")
    for part in build_model("clip", "llama"):
        part.save_pretrained(folder / "model")
    checkpoint, out, run = trained(folder / "best.ckpt", 0), folder / "mine", folder / "run"
    assert main(["export", checkpoint, str(out)]) == 0
    arguments = ["--model", folder / "model", "--tasks", "documents", "scenes", "--samples", 3, "--keep", 4, 0.5]
    limits = ["--max-new-tokens", 2, "--repeats", 1]
    assert cli.main(list(map(str, ["compare", *arguments, *limits, "--selectors", out, "random", "--out", run]))) == 0
    return checkpoint, out, run


@pytest.fixture
def again(compared, tmp_path):
    """``again(*more)`` -> (exit code, the folder that it was exported to)."""
    checkpoint, out, run = compared
    copy = tmp_path / "mine"
    shutil.copytree(out, copy)
    return lambda *more: (main(["export", checkpoint, str(copy), "--results", str(run), *map(str, more)]), copy)


def test_the_card_has_the_figures_of_the_run(compared, again, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "kept-tokens.png")
    code, folder = again("--pictures", tmp_path / "kept-tokens.png")
    assert code == 0
    card = (folder / "README.md").read_text()
    rows = {(r["task"], r["selector"], r["keep"]): r for r in summarize(compared[2])["rows"]}

    # The table.
    assert "| task | selector | all tokens | 4 | 0.5 |" in card
    for task in ("documents", "scenes"):
        for name, shown in (("mine", "this one"), ("random", "random")):
            cells = []
            for key in ((task, "full", None), (task, name, "4"), (task, name, "0.5")):
                low, high = rows[key]["accuracy_interval"]
                same = f" ({100 * rows[key]['agreement']:.0f})" if key[2] else ""
                cells.append(f"{100 * rows[key]['accuracy']:.0f} [{100 * low:.0f}, {100 * high:.0f}]{same}")
            assert f"| {task} (exact match) | {shown} | {' | '.join(cells)} |" in card
    assert "`selector compare` on model, 3 samples per task, seed 0" in card
    assert str(tmp_path) not in card

    # The metadata, by the hub's own parser.
    data = ModelCard(card).data
    assert data.model_name == "mine"
    results = {(r.dataset_name, r.metric_type, r.metric_args["keep"]): r for r in data.eval_results}
    assert len(results) == 2 * 2 * 2
    for (task, kind, keep), result in results.items():
        row = rows[task, "mine", keep]
        value = row["accuracy"] if kind == "accuracy" else row["agreement"]
        assert result.metric_value == pytest.approx(value, abs=1e-4)
        assert result.metric_args["visual_tokens"] == pytest.approx(row["tokens"], abs=0.1)
        assert result.metric_args["model"] == "model"

    # The pictures: whole images, and what a push would take along.
    assert [path.name for path in _beside(card, folder)] == ["results.png", "kept-tokens.png"]
    with Image.open(folder / "results.png") as picture:
        assert picture.width > 300


def test_results_of_other_weights_are_refused(compared, tmp_path, capsys):
    """The same class, arguments and label, trained again."""
    other = trained(tmp_path / "other.ckpt", 1)
    assert main(["export", other, str(tmp_path / "mine"), "--results", str(compared[2])]) == 2
    assert "none in" in (error := capsys.readouterr().err)
    assert "has its weights: full, blind, mine, random" in error
    assert not (tmp_path / "mine").exists()


def test_an_unfinished_run_is_refused(compared, again, tmp_path, capsys):
    _, folder = again()
    run = tmp_path / "run"
    shutil.copytree(compared[2], run)
    plan = json.loads((run / "run.json").read_text())
    row = next(row for row in plan["rows"] if row["label"] == "mine")
    path = run / row["key"] / "predictions.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:2]) + "\n")
    assert main(["export", compared[0], str(folder), "--results", str(run)]) == 2
    assert "results must be of a finished run, documents in" in (error := capsys.readouterr().err)
    assert "2 to 3 of 3 samples" in error


def test_mistakes_are_named(compared, again, tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "results.png")
    for more, message in (
        (["--pictures", tmp_path / "results.png"], "pictures must have names of their own without spaces, other than"),
        (["--pictures", tmp_path / "none.png"], "pictures must be image files, there is no"),
    ):
        assert again(*more)[0] == 2
        assert message in capsys.readouterr().err
    assert main(["export", compared[0], str(tmp_path / "x"), "--results", str(tmp_path / "none")]) == 2
    assert "run must be a folder that `selector compare` wrote" in capsys.readouterr().err
