"""Meters give the mean of the pure functions, whatever the batches and however many processes."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing
from torch.distributions import Categorical, kl_divergence

from selector.measure.meters import ANLS, Agreement, Divergence, Flips, NLLShift, SpectrumShift

FULL = ["red", "two", "blue", "green", "four"]
PRUNED = ["red", "one", "red", "Green.", "five"]
RIGHT = ["red", "two", "red", "green", "nine"]


def logits(i):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(2, 3, 11, generator=generator), torch.randint(11, (3,), generator=generator)


def filled(numbers):
    """Every meter after the samples of these numbers."""
    meters = [Agreement(), Flips(), ANLS(), Divergence(), NLLShift(), SpectrumShift()]
    for i in numbers:
        (p, q), answer = logits(i)
        meters[0].update([PRUNED[i]], [FULL[i]])
        meters[1].update([PRUNED[i]], [FULL[i]], [RIGHT[i]])
        meters[2].update([PRUNED[i]], [RIGHT[i]])
        meters[3].update(p, q)
        meters[4].update(p, q, answer)
        meters[5].update(torch.cat([p, q]), q)
    return meters


def results(meters):
    return {name: value.item() for meter in meters for name, value in meter.compute().items()}


def test_against_independent_definitions():
    found = results(filled(range(5)))
    assert found["agreement"] == 1 / 5
    flips = {name: found[name] for name in ("same", "right_to_wrong", "wrong_to_right", "wrong_to_wrong")}
    assert flips == {"same": 0.2, "right_to_wrong": 0.2, "wrong_to_right": 0.2, "wrong_to_wrong": 0.2}
    assert found["right_to_right"] == pytest.approx(0.2)  # "Green." for "green"
    assert found["anls"] == pytest.approx((1 + 0 + 1 + 5 / 6 + 0) / 5)  # "five" for "nine": half of it is wrong
    pairs = [logits(i) for i in range(5)]
    kl = [kl_divergence(Categorical(logits=p.double()), Categorical(logits=q.double())) for (p, q), _ in pairs]
    assert found["forced_kl"] == pytest.approx(torch.stack(kl).mean().item())
    assert found["first_token_kl"] == pytest.approx(torch.stack(kl)[:, 0].mean().item())
    shift = [
        (Categorical(logits=p.double()).log_prob(a) - Categorical(logits=q.double()).log_prob(a)).mean()
        for (p, q), a in pairs
    ]
    assert found["nll_shift"] == pytest.approx(torch.stack(shift).mean().item())
    ipr = [ipr_of(q) - ipr_of(torch.cat([p, q])) for (p, q), _ in pairs]
    assert found["ipr_shift"] == pytest.approx(torch.stack(ipr).mean().item())


def ipr_of(matrix):
    squares = torch.linalg.svdvals(matrix.double()).square()
    return (squares / squares.sum()).square().sum()


def test_a_whole_batch_is_its_samples_one_by_one():
    batch = Flips()
    batch.update(PRUNED, FULL, RIGHT)
    assert batch.compute() == filled(range(5))[1].compute()


def test_nothing_has_no_mean():
    with pytest.raises(ValueError, match="Agreement has no sample"), pytest.warns(UserWarning, match="before"):
        Agreement().compute()


@pytest.mark.slow
def test_two_processes_reduce_to_one(tmp_path):
    """Uneven shares: three samples here, two there."""
    torch.multiprocessing.spawn(one_process, (str(tmp_path),), nprocs=2)
    expected = results(filled(range(5)))
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(expected, rel=1e-12)


def one_process(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(results(filled(range(rank, 5, 2))), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
