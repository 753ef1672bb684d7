"""Columns that stay: masks of every form, caches that shrink, and the way back to full length."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from selector import select_tokens
from selector.columns import Columns, compact

KEEP = torch.tensor([[False, True, True, False, True], [False, False, True, False, True]])


def columns(right=False, width=5):
    return Columns.of(KEEP.flip(1) if right else KEEP, right, width)


@pytest.mark.parametrize("right", [False, True])
def test_kept_columns_keep_their_order_and_their_side(right):
    keep = KEEP.flip(1) if right else KEEP
    index, real = compact(keep, right)
    assert real.tolist() == ([[True] * 3, [True, True, False]] if right else [[True] * 3, [False, True, True]])
    for row in range(2):
        assert index[row][real[row]].tolist() == keep[row].nonzero().flatten().tolist()
    whole = columns(right)
    assert whole.padded
    assert not Columns.of(KEEP[:1], False, 5).padded
    for row in range(2):
        for column in range(5):
            place = int(whole.place[row, column])
            assert (place >= 0) == bool(keep[row, column])
            assert place < 0 or int(whole.index[row, place]) == column


def test_what_follows_the_prompt_stays():
    more = columns(width=7)
    assert more.index[:, -2:].tolist() == [[5, 6]] * 2
    assert bool(more.real[:, -2:].all())
    assert more.longer(7).index[:, 3:].tolist() == [[5, 6, 7, 8]] * 2  # two more tokens were decoded
    assert more.longer(7).width == 9
    short = more.longer(4)  # the last one was taken back, as assisted decoding does
    assert short.index.tolist() == more.index[:, :4].tolist()
    assert short.real.tolist() == more.real[:, :4].tolist()


def test_back_fills_with_what_stands_before():
    values = torch.tensor([[[1.0], [2.0], [3.0]], [[9.0], [4.0], [5.0]]])  # 9 is padding
    back = columns().back(values)[..., 0]
    assert back[0].tolist() == [1, 1, 2, 2, 3]
    assert back[1, 2:].tolist() == [4, 4, 5]


def test_rows_repeat_as_beams_do():
    twice = columns().repeated(4)
    assert twice.index.tolist() == [columns().index[row].tolist() for row in (0, 0, 1, 1)]
    assert torch.equal(twice.every(2).index, columns().index)
    with pytest.raises(ValueError, match="a cache of 2 rows cannot be continued by 3 rows"):
        columns().repeated(3)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_of_a_prompt(kind):
    """Entry by entry: a kept query sees a kept key where it did before; padding is no key, and no row is empty."""
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(2, 1, 5, 5, generator=generator) < 0.7
    low = torch.finfo(torch.float32).min
    mask = seen if kind == torch.bool else torch.zeros(2, 1, 5, 5).masked_fill(~seen, low)
    whole = columns()
    got = whole.queries_and_keys(mask, "sdpa")
    open_ = got if kind == torch.bool else got == 0
    for row in range(2):
        for i in range(3):
            for j in range(3):
                a, b = int(whole.index[row, i]), int(whole.index[row, j])
                if whole.real[row, i]:
                    assert bool(open_[row, 0, i, j]) == bool(seen[row, 0, a, b] & whole.real[row, j])
            if not whole.real[row, i] and kind == torch.bool:
                assert bool(open_[row, 0, i].any())


def test_masks_where_there_was_none():
    whole = columns()
    assert Columns.of(KEEP[:1], False, 5).queries_and_keys(None, "sdpa") is None
    assert torch.equal(whole.queries_and_keys(None, "flash_attention_2"), whole.real)
    causal = whole.queries_and_keys(None, "sdpa")[:, 0]
    assert causal[1].tolist() == [[True, False, False], [False, True, False], [False, True, True]]
    step = whole.longer(5).decoding(None, 2, "sdpa")[:, 0]
    assert step[1].tolist() == [[False, True, True, True, False], [False, True, True, True, True]]
    assert torch.equal(whole.decoding(None, 1, "flash_attention_2"), whole.real)
    ones = torch.ones(2, 5, dtype=torch.long)
    assert torch.equal(whole.decoding(ones, 1, "flash_attention_2"), whole.real)
    ones[0, 2] = 0
    assert whole.queries_and_keys(ones, "flash_attention_2")[0].tolist() == [True, False, True]


def flash_like(module, query, key, value, attention_mask, scaling, dropout=0.0, position_ids=None, **_):
    """What FlashAttention is given: a mask of which columns are real, or none; queries are the last columns."""
    assert position_ids is None or bool((position_ids.diff(dim=-1) <= 1).all()), "gaps would be packed sequences"
    groups = query.shape[1] // key.shape[1]
    queries, keys = query.shape[2], key.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    if attention_mask is not None:
        assert attention_mask.shape == (len(query), keys)
        seen = seen & attention_mask.bool()[:, None, None]
    scores = (query @ key.repeat_interleave(groups, 1).mT * scaling).masked_fill(~seen, -1e30)
    return (scores.softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


def test_two_dimensional_masks_serve_alike():
    """The code path of FlashAttention, with an attention of the same arguments in its place."""
    AttentionInterface.register("flash_like", flash_like)
    AttentionMaskInterface.register("flash_like", flash_attention_mask)
    family = FAMILIES[0]
    model = family.model
    for rows in ([[family.picture(0)]], [[family.picture(0)], [family.picture(1), family.picture(2)], []]):
        inputs, said = family.batch(rows), []
        for implementation in ("sdpa", "flash_like"):
            model.set_attn_implementation({"text_config": implementation})
            try:
                with torch.no_grad(), select_tokens(model, "fastv:layer=2,count=after", keep=3):
                    said.append(model.generate(**inputs, max_new_tokens=5, do_sample=False))
            finally:
                model.set_attn_implementation({"text_config": "sdpa"})
        assert torch.equal(*said)
