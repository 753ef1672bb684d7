"""Greedy choices, batched over groups: the highest value, again and again; also lazily, and the farthest point.

A greedy choice hangs on comparisons: near ties decide every later pick. So all numbers are taken and rounded as
`selector.numerics` says, and on one machine a batch equals its members one by one, to the bit. Compared with float64
throughout, the choice differs only between tokens that lie closer together than that rounding.

Shapes: G groups, M members (padded), K steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LAZY_WIDTH, LAZY_ROUNDS = 32, 32
"""Members whose value is computed anew in each round of `lazily`, and rounds between two looks at who is done."""


def greedy(
    value: Float[Tensor, "G M"],
    mask: Bool[Tensor, "G M"],
    steps: int,
    update: Callable[[Tensor], Tensor],
    futile: Callable[[], bool] = lambda: False,
) -> Int[Tensor, "G M"]:
    """Takes the member of highest value, `steps` times.

    Args:
        value: values before the first pick.
        mask: members that exist.
        steps: picks, the same for all groups.
        update: called with the pick ``[G]`` of each group, returns the values ``[G, M]`` after it.
        futile: asked every `LAZY_ROUNDS` steps; with True the rest is not picked.

    Returns:
        ``[G, M]`` the step at which each member was picked, `steps` for the others. A member is never picked twice.
    """
    taken, step_of = ~mask, torch.full(value.shape, steps, dtype=torch.long, device=value.device)
    for step in range(steps):
        pick = value.masked_fill(taken, -torch.inf).argmax(1)

        # A group that has run out picks a member again: the earlier step holds.
        step_of.scatter_reduce_(1, pick[:, None], torch.full_like(pick[:, None], step), "amin")
        taken.scatter_(1, pick[:, None], True)

        # Asked only now and then, since a GPU would have to halt for the answer.
        if step % LAZY_ROUNDS == LAZY_ROUNDS - 1 and futile():
            break

        # Nobody asks for the values after the last pick, and they may be costly.
        if step + 1 < steps:
            value = update(pick)
    return step_of


def lazily(
    bound: Float[Tensor, "G M"],
    gain: Callable[[Tensor], Tensor],
    chosen: Callable[[Tensor, Tensor], None],
    mask: Bool[Tensor, "G M"],
    steps: int,
) -> Int[Tensor, "G M"]:
    """What `greedy` takes, for values that only fall as others are picked: lazy evaluation (Minoux 1978).

    An earlier value then bounds the present one, and only members whose bound is among the highest are looked at again:
    `LAZY_WIDTH` of them per round. A member is picked in the round in which its present value is the highest of all.

    Args:
        bound: the values before the first pick.
        gain: present values ``[G, B]`` of the members ``[G, B]``.
        chosen: called with a candidate ``[G]`` of each group, and with the groups ``[G]`` in which it is picked.
        mask: members that exist.
        steps: picks, the same for all groups.

    Returns:
        As `greedy`.
    """
    taken, fresh, bound = ~mask, mask.clone(), bound.masked_fill(~mask, -torch.inf)
    step_of = torch.full(bound.shape, steps, dtype=torch.long, device=bound.device)
    done, group = torch.zeros_like(step_of[:, 0]), torch.arange(len(bound), device=bound.device)
    goal, width = mask.sum(1).clamp(max=steps), min(LAZY_WIDTH, bound.shape[1])

    # How far each group is, is asked for once in so many rounds: on a GPU the question would halt every one of them.
    while bool((done < goal).any()):
        for _ in range(LAZY_ROUNDS):
            # A fresh value that no bound exceeds is the maximum: its member is picked, in groups that need one.
            pick = bound.argmax(1)
            sure = fresh[group, pick] & (done < goal)
            at = step_of[group, pick]
            step_of[group, pick] = torch.where(sure, done, at)
            taken[group, pick] |= sure
            chosen(pick, sure)
            done = done + sure

            # After a pick all other values are out of date; the highest of them are computed anew.
            fresh = fresh & ~sure[:, None]
            bound = bound.masked_fill(taken, -torch.inf)
            stale = bound.masked_fill(fresh, -torch.inf).topk(width, dim=1).indices
            present = gain(stale).masked_fill(taken.gather(1, stale), -torch.inf)
            bound = bound.scatter(1, stale, present)
            fresh = fresh.scatter(1, stale, True)
    return step_of


def farthest(
    start: Float[Tensor, "G M"],
    distance: Callable[[Tensor], Tensor],
    mask: Bool[Tensor, "G M"],
    steps: int,
) -> Int[Tensor, "G M"]:
    """Farthest-point order: first the highest `start`, then repeatedly the member farthest from all picked.

    Args:
        start: values of which the highest decides the first pick.
        distance: called with the pick ``[G]``, returns the distance ``[G, M]`` of every member to it.
        mask: members that exist.
        steps: picks, the same for all groups.

    Returns:
        As `greedy`.
    """
    # The distance to a set is the least one: a running minimum serves for all picks.
    nearest = torch.full_like(start, torch.inf)

    def update(pick: Tensor) -> Tensor:
        nonlocal nearest
        nearest = torch.minimum(nearest, distance(pick))
        return nearest

    return greedy(start, mask, steps, update)
