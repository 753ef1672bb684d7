"""The shipped selector: made for the shipped tower, and better than random at what it is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from selector.base import TokenSelector
from selector.budget import Budget
from selector.methods.random import Random
from selector.tasks.generated import documents
from selector.tokens import VisualTokens
from training.encoders import LlavaNextEncoder
from training.testbed.symbols import cut_labels, page_labels

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
SELECTOR, MODEL = CHECKPOINTS / "selector-llava-next-tiny-reconstruction", CHECKPOINTS / "llava-next-tiny"
REAL = CHECKPOINTS / "selector-llava-next-tiny-real"


@pytest.fixture(scope="module")
def encoder():
    return LlavaNextEncoder(str(MODEL))


@pytest.mark.parametrize("selector", [SELECTOR, REAL], ids=lambda path: path.name)
def test_it_was_trained_on_the_shipped_tower(encoder, selector):
    config = json.loads((selector / "config.json").read_text())
    assert config["metadata"]["encoder"]["fingerprint"] == encoder.fingerprint()


@pytest.mark.parametrize(("selector", "better"), [(SELECTOR, (50, 25, 10)), (REAL, (50,))], ids=["generated", "real"])
def test_its_card_shows_a_ranking_that_beats_random_where_enough_is_kept(selector, better):
    """Not where little is kept: what is hardest to rebuild represents little else. The card shows that too."""
    seen = json.loads((selector / "config.json").read_text())["metadata"]["validation"]
    card = (selector / "README.md").read_text()
    for share in (50, 25, 10):
        assert share not in better or seen[f"rec_learned_{share}"] < seen[f"rec_random_{share}"]
        assert f"{seen[f'rec_learned_{share}']:.3f}" in card


def test_the_card_of_the_real_one_credits_its_images():
    card = (REAL / "README.md").read_text()
    for source in ("ICDAR2019-SROIE train | CC BY 4.0", "BSD-3-Clause", "COCO 2017", "Caltech-101 | CC BY 4.0"):
        assert source in card
    assert "University of Washington" in card


def test_it_keeps_the_text_of_held_out_pages(encoder):
    rankers = {"learned": TokenSelector.from_pretrained(SELECTOR).eval(), "random": Random(seed=0)}
    kept, total = dict.fromkeys(rankers, 0), 0
    for index in range(8):
        page = documents.page("test", 11, index)
        labels = cut_labels(*page_labels(page.marks, page.image.size))
        text = torch.from_numpy(labels)[:, 0].flatten() > 0
        features = encoder(encoder.preprocess(page.image))
        count = features.shape[0] * features.shape[1]
        tokens = VisualTokens(
            features,
            encoder.grid,
            torch.zeros(len(features), dtype=torch.long),
            torch.arange(count)[None],
            projected=encoder.project(features),
        )
        total += int(text.sum())
        for name, ranker in rankers.items():
            with torch.no_grad():
                mask = ranker(tokens, Budget(0.25, newlines="none"))
            kept[name] += int((mask.flatten() & text).sum())
    assert kept["learned"] > 0.95 * total
    assert kept["random"] < 0.4 * total
