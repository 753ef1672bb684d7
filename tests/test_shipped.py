"""The shipped checkpoints, as a user meets them: they load, answer, and their real features rank as float64 says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import references
import torch

from selector import Budget, Random, SVDPrune, TokenSelector, prune_inputs, select_tokens
from selector.groups import Groups
from selector.measure.answering import prepare
from selector.measure.evidence import evidence, model_canvas
from selector.models import encode
from selector.spectrum import leverage_scores
from selector.tasks.generated import documents

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
PAGES = [documents.page("test", 99, index) for index in range(12)]


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(CHECKPOINTS / "llava-next-tiny").eval()


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(CHECKPOINTS / "llava-next-tiny", backend="pil")


@pytest.fixture(scope="module")
def encoded(model, processor):
    inputs = [prepare(processor, page.image, page.turns[0].question, model.device) for page in PAGES]
    with torch.no_grad():
        return [(each, encode(model, each, {"features", "projected"})) for each in inputs]


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("field", ["features", "projected"])
def test_leverage_of_real_features_picks_the_tokens_of_a_float64_svd(encoded, center, field):
    """At least 99% of the top K, K = 16 ... 288, over a dozen pages."""
    same = wanted = 0
    for _, each in encoded:
        image = Groups.of(each.tokens, "image")
        matrix, real = image.gather(getattr(each.tokens, field)), image.mask
        scores = leverage_scores(matrix, energy=0.9, center=center, mask=real).scores[0][real[0]]
        want, _ = references.leverage(matrix[0][real[0]], energy=0.9, center=center)
        for keep in (16, 32, 64, 144, 288):
            same += len(set(scores.topk(keep).indices.tolist()) & set(np.argsort(-want)[:keep].tolist()))
            wanted += keep
    assert same >= 0.99 * wanted


def test_the_model_reads(model, processor):
    """Half of a dozen pages at least; chance is one in a thousand. The card has the measured accuracy."""
    right = 0
    for page in PAGES:
        inputs = prepare(processor, page.image, page.turns[0].question, model.device)
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        right += processor.decode(ids, skip_special_tokens=True).strip() == page.turns[0].answer
    assert right >= len(PAGES) / 2


def test_the_learned_selector_keeps_the_answers(model, encoded):
    """Share of the answers' area under kept hi-res patches at a quarter of the tokens: far above random's."""
    learned = TokenSelector.from_pretrained(CHECKPOINTS / "selector-llava-next-tiny")
    shares: dict[str, list[float]] = {"learned": [], "random": []}
    for (inputs, each), page in zip(encoded, PAGES, strict=True):
        where = model_canvas(model.config, (page.image.height, page.image.width), each.tokens.grid).rectangles()
        for name, selector in (("learned", learned), ("random", Random())):
            pruned = prune_inputs(model, inputs, selector, Budget(0.25), encoded=each)
            found = evidence(pruned.tokens.tiles_of(pruned.keep), where, page.turns[0].boxes)
            shares[name].append(found[0])
    assert np.mean(shares["learned"]) > np.mean(shares["random"]) + 0.3


def test_keep_all_is_the_identity_on_the_trained_model(model, encoded):
    inputs, _ = encoded[0]
    with torch.no_grad():
        want = model(**inputs).logits
        with select_tokens(model, SVDPrune(), keep=1.0):
            assert torch.equal(model(**inputs).logits, want)
