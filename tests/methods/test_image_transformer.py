"""The learned selector that reads the question: its match at low rank, and in parts."""

from __future__ import annotations

import pytest
import torch
from visual_tokens import anyres

from selector.methods import image_transformer
from selector.methods.image_transformer import ImageTransformer

TOKENS = anyres()
DIM = TOKENS.projected.shape[-1]


def reader(rank: int | None) -> ImageTransformer:
    torch.manual_seed(0)
    return ImageTransformer(DIM, "projected", width=16, heads=2, question_dim=DIM, match_rank=rank).eval()


def test_the_match_starts_at_the_plain_cosine_whatever_its_rank():
    full, low = reader(None), reader(2)
    shared = {name: value for name, value in full.state_dict().items() if "match.space" not in name}
    missing = low.load_state_dict(shared, strict=False).missing_keys
    assert {name.split(".")[-2] for name in missing} == {"up", "down"}
    torch.testing.assert_close(low.score(TOKENS), full.score(TOKENS))


@pytest.mark.parametrize("rank", [1, 3, DIM])
def test_a_match_of_low_rank_is_that_of_the_whole_map(rank):
    full, low = reader(None), reader(rank)
    with torch.no_grad():
        low.match.space.up.weight.normal_()
        change = low.match.space.up.weight @ low.match.space.down.weight
        full.match.space.weight.copy_(torch.eye(DIM) + change)
    shared = {name: value for name, value in low.state_dict().items() if "match.space" not in name}
    full.load_state_dict(shared, strict=False)
    assert torch.linalg.matrix_rank(change) == rank
    torch.testing.assert_close(low.score(TOKENS), full.score(TOKENS), atol=1e-5, rtol=1e-4)


def test_a_low_rank_has_few_weights():
    weights = {rank: sum(each.numel() for each in reader(rank).match.space.parameters()) for rank in (None, 2)}
    assert weights == {None: DIM * DIM, 2: 2 * 2 * DIM}


@pytest.mark.parametrize("part", [1, 3, 1000])
def test_patches_are_matched_in_parts_as_at_once(part, monkeypatch):
    selector = reader(2)
    with torch.no_grad():
        selector.match.space.up.weight.normal_()
    whole = selector.score(TOKENS)
    monkeypatch.setattr(image_transformer, "MATCHED", part)
    torch.testing.assert_close(selector.score(TOKENS), whole)
