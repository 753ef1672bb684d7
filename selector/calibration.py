"""Calibration: what makes ``keep="auto:0.2"`` a fifth of the visual tokens on average, and not of every image.

A threshold on the score lets an image of text keep more than a flat one. Which threshold keeps which share depends on
the selector, the model and the images, so it is found once, on a calibration set, and stored in the selector's
checkpoint. The share is one of sums: measured tokens of all images (newlines by their policy, and at least one patch of
every image) over all their tokens. The tables of a comparison print the same ratio, so an ``auto`` budget and a fixed
share compare there at equal tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from selector.budget import Budget, Newlines
from selector.tokens import VisualTokens

if TYPE_CHECKING:
    from selector.base import RankSelector

TOLERANCE = 0.01
"""How far the measured share may be off, relative to the share: 0.2 is met by 0.198 to 0.202."""
COMMAND = "selector calibrate"
"""What error messages tell a user to run."""


@dataclass(frozen=True)
class CalibratedShare:
    """One calibrated share.

    Attributes:
        share: what was asked for, in (0, 1).
        newlines: the policy under which newline tokens were counted.
        threshold: patches that score above it stay.
        measured: the share of all visual tokens that it keeps on the calibration set.

    Raises:
        ValueError: a share out of (0, 1), an unknown policy, or a number that is not finite.

    Example:
        >>> from selector import load_selector
        >>> tokens = VisualTokens.from_features(torch.arange(10.0).view(1, 10, 1))
        >>> calibrate(load_selector("norm"), [tokens], shares=[0.2]).points  # patches of length 8 and 9 stay
        (CalibratedShare(share=0.2, newlines='kept_rows', threshold=7.5, measured=0.2),)
    """

    share: float
    newlines: Newlines
    threshold: float
    measured: float

    def __post_init__(self) -> None:
        # The budget that will ask for this point checks the share and the policy.
        Budget(f"auto:{self.share}", newlines=self.newlines)
        for name in ("threshold", "measured"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} of a calibrated share must be finite, got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, stored: Any) -> CalibratedShare:
        """A calibrated share from plain values, as JSON gives them.

        Raises:
            ValueError: anything missing, left over, of another type or out of range.
        """
        # Strict about types too: an int for a threshold would compare, and print, in another way.
        if not isinstance(stored, Mapping) or set(stored) != set(cls.__dataclass_fields__):
            raise ValueError(f"a calibrated share must hold {', '.join(cls.__dataclass_fields__)}, got {stored!r}")
        for name in ("share", "threshold", "measured"):
            if not isinstance(stored[name], float):
                raise ValueError(f"{name} of a calibrated share must be a float, got {stored[name]!r}")
        if stored["newlines"] not in get_args(Newlines):
            raise ValueError(f"newlines must be one of {get_args(Newlines)}, got {stored['newlines']!r}")
        return cls(**stored)


@dataclass(frozen=True)
class Calibration:
    """Thresholds by share and newline policy, and what they were found on.

    Attributes:
        points: each (share, newlines) once.
        about: the calibration set in words and numbers, for whoever reads the checkpoint.

    Raises:
        ValueError: no points, or one share twice under one policy.

    Example:
        >>> known = Calibration((CalibratedShare(share=0.2, newlines="kept_rows", threshold=1.5, measured=0.2),))
        >>> known.threshold(Budget("auto:0.2"))
        1.5
    """

    points: tuple[CalibratedShare, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen = [(point.share, point.newlines) for point in self.points]
        twice = next((pair for i, pair in enumerate(seen) if pair in seen[:i]), None)
        if twice is not None or not seen:
            raise ValueError(f"a calibration must hold each share once for a newline policy, got {twice or 'none'}")

    def threshold(self, budget: Budget) -> float:
        """The threshold of an ``auto`` budget.

        Raises:
            ValueError: that share was not calibrated under that newline policy; it is never interpolated.
        """
        # By text: `Budget` spells every share as Python prints the float, so equal shares are equal texts.
        for point in self.points:
            if str(budget) == f"auto:{point.share}" and budget.newlines == point.newlines:
                return point.threshold

        # The error lists what there is, by policy in the order of the points.
        known = [
            f"{', '.join(str(point.share) for point in self.points if point.newlines == policy)} with newlines={policy}"
            for policy in dict.fromkeys(point.newlines for point in self.points)
        ]
        raise ValueError(
            f"keep={str(budget)!r} with newlines={budget.newlines} is not calibrated: the shares that are, are "
            f"{'; '.join(known)}; `{COMMAND}` finds others"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``config.json``."""
        return {"points": [asdict(point) for point in self.points], "about": dict(self.about)}

    @classmethod
    def from_dict(cls, stored: Any) -> Calibration:
        """The inverse of `to_dict`.

        Raises:
            ValueError: anything missing, left over or out of range.
        """
        if not isinstance(stored, Mapping) or set(stored) != {"points", "about"}:
            raise ValueError(f"a calibration must hold points and about, got {stored!r}")
        if not isinstance(stored["points"], list) or not isinstance(stored["about"], Mapping):
            raise ValueError(f"a calibration must hold a list of points and a mapping about, got {stored!r}")
        return cls(tuple(CalibratedShare.from_dict(point) for point in stored["points"]), dict(stored["about"]))


@dataclass(frozen=True)
class _Scored:
    """Scores of a batch and the tokens they are of, without the features, so that a whole set fits into memory."""

    scores: Float[Tensor, "T N"]
    tokens: VisualTokens


def calibrate(
    selector: RankSelector,
    batches: Iterable[VisualTokens],
    shares: Sequence[float],
    newlines: Sequence[Newlines] = ("kept_rows",),
    tolerance: float = TOLERANCE,
    about: Mapping[str, Any] | None = None,
) -> Calibration:
    """Finds for every share the score threshold that keeps it on average; assign the result to `selector.calibration`.

    The number of measured tokens is a falling step function of the threshold, in steps of one patch (and its row's
    newline); bisection over the gaps between neighbouring scores finds the step nearest to the share. The threshold is
    the middle of its gap, so that rounding in another batch or on another device does not change what is kept. How the
    set is split into batches does not matter.

    Args:
        selector: one whose ranking is the same for every budget.
        batches: the calibration set, encoded; of each batch only scores and geometry are kept.
        shares: of all visual tokens, in (0, 1), each once.
        newlines: policies to calibrate for, each with thresholds of its own.
        tolerance: how far the measured share may be off, relative to the share, in [0, 1).
        about: what to store beside the thresholds; the numbers of images and tokens and the tolerance are added.

    Returns:
        A threshold for every pair of share and policy.

    Raises:
        ValueError: no images, a selector that chooses sets of a fixed size instead of scoring, or a share that no
            threshold meets within the tolerance (scores are tied, or what always stays is more).
    """
    wanted = [Budget(f"auto:{float(share)}", newlines=policy) for policy in newlines for share in shares]
    if not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(f"shares and newlines must each hold different values, got {shares!r} and {newlines!r}")

    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")

    # Any of the budgets will do: the ranking is the same for all.
    scored = [_scored(selector, tokens, wanted[0]) for tokens in batches]
    if not scored:
        raise ValueError("batches must hold at least one image, got none")

    cuts = _cuts(scored)
    points = [_point(scored, cuts, budget, tolerance) for budget in wanted]

    numbers = {
        "images": sum(each.tokens.num_images for each in scored),
        "tokens": _total(scored),
        "tolerance": tolerance,
    }
    return Calibration(tuple(points), dict(about or {}) | numbers)


def _scored(selector: RankSelector, tokens: VisualTokens, budget: Budget) -> _Scored:
    """Scores and geometry of a batch, without its features, which are nearly all of its memory."""
    with torch.no_grad():
        scores = selector.ranking(tokens, budget).float()
    if not bool(torch.isfinite(scores[tokens.valid]).all()):
        raise ValueError("scores must be finite: got NaN or infinity for a visual token")

    # Features of width 0: a budget reads their shape alone.
    bare = VisualTokens(tokens.features.new_zeros(*scores.shape, 0), tokens.grid, tokens.image, tokens.slots)
    return _Scored(scores, bare)


def _cuts(scored: Sequence[_Scored]) -> Float[Tensor, "C"]:
    """A threshold below all scores, one between each two neighbouring scores, and one that none exceeds; ascending."""
    # Only these can differ in what they keep: a patch stays when its score exceeds the threshold.
    levels = torch.cat([each.scores[each.tokens.valid].cpu() for each in scored]).unique()
    low, high = levels[:-1], levels[1:]
    middle = ((low.double() + high.double()) / 2).float()
    middle = torch.where(middle < high, middle, low)  # neighbours in float32: nothing lies between them
    below = torch.nextafter(levels[:1], torch.tensor(-torch.inf))
    return torch.cat([below, middle, levels[-1:]])


def _point(scored: Sequence[_Scored], cuts: Float[Tensor, "C"], budget: Budget, tolerance: float) -> CalibratedShare:
    """The cut whose measured share is nearest, by bisection.

    Raises:
        ValueError: it misses the share by more than the tolerance.
    """
    share = float(str(budget).partition(":")[2])
    total = _total(scored)

    def measured(i: int) -> float:
        rule = replace(budget, keep=f"threshold:{float(cuts[i])!r}")
        return sum(int(rule.select(each.scores, each.tokens).sum()) for each in scored) / total

    # Each look at a cut selects on the whole set, so bisection: a dozen or two of them, not one per cut.
    low, high = 0, len(cuts) - 1
    while high - low > 1:  # measured(low) is above the share and measured(high) is not, unless an end is nearest
        middle = (low + high) // 2
        low, high = (middle, high) if measured(middle) > share else (low, middle)

    # The steps on both sides of the share.
    ends = {i: measured(i) for i in (low, high)}
    best = min(ends, key=lambda i: abs(ends[i] - share))
    if abs(ends[best] - share) > tolerance * share:
        most, least = ends[low], ends[high]
        raise ValueError(
            f"share {share} with newlines={budget.newlines} cannot be met within {100 * tolerance:g}%: the nearest "
            f"thresholds keep {most:.4g} and {least:.4g} of the visual tokens (scores are tied there, the images are "
            "too few, or what always stays, a patch of every image and newlines by their policy, is more)"
        )
    return CalibratedShare(share, budget.newlines, float(cuts[best]), ends[best])


def _total(scored: Sequence[_Scored]) -> int:
    """Visual tokens of all images before any selection."""
    return sum(int(each.tokens.lengths.sum()) for each in scored)


def attach(selector: Any, stored: Any) -> None:
    """Puts the calibrations of a ``config.json`` where they belong.

    Args:
        selector: a module, of which parts may be selectors that rank (Mix, Merge).
        stored: calibrations by module name; "" is the selector itself.

    Raises:
        ValueError: one belongs to no ranking part of this selector, or is broken.
    """
    parts = dict(selector.named_modules())
    if not isinstance(stored, Mapping):
        raise ValueError(f"calibration must map names of modules to thresholds, got {stored!r}")
    for name, table in stored.items():
        # Also False for a name that no part has.
        if not hasattr(parts.get(name), "calibration"):
            raise ValueError(f"calibration names {name!r}, no ranking part of this {type(selector).__name__}")
        parts[name].calibration = Calibration.from_dict(table)


def collect(selector: Any) -> dict[str, Any]:
    """The calibrations of a selector and of its parts, by module name, for ``config.json``."""
    tables = {name: getattr(part, "calibration", None) for name, part in selector.named_modules()}
    return {name: table.to_dict() for name, table in tables.items() if table is not None}
