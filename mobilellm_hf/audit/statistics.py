"""What a handful of seeds can say: paired differences, exact sign flips, Holm, and the seeds that a test needs.

    found = paired_difference(mixture, baseline)        # one figure a seed each, lower is better
    found.mean, found.low, found.high                   # Student's t interval over seeds
    found.p_value                                       # exact: of all 2**S ways to flip the signs
    holm([found.p_value, ...])                          # adjusted for the number of comparisons
    seeds_needed(comparisons=10)                        # 9: fewer could not reach 0.05, whatever they found

The sign-flip test assumes only that a seed's difference is as likely to be d as -d if neither mixture is better. Its
smallest p-value is 2 / 2**S, and so a number of seeds, with a number of comparisons, decides what can be found at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mobilellm_hf.influence.student_t import LEVEL, student_t_p_value, student_t_quantile

ALPHA = 0.05
# Up to so many seeds every way to flip the signs is tried, a million; beyond, so many at random.
EXACT_SEEDS, RANDOM_FLIPS = 20, 200_000
POWER = 0.8


@dataclass(frozen=True)
class PairedDifference:
    """Figures of one arm minus those of another, seed by seed; below 0 the first has the lower ones.

    Attributes:
        per_seed: (S,) differences.
        mean, low, high: their mean, and its 95% interval by Student's t.
        p_value: two-sided, of the exact sign-flip test.
        t_p_value: two-sided, of the paired t-test.
        detectable: the true difference that this one t-test at 5% would find with a chance of 80%, given the spread
            over seeds; where several are tested and corrected for, it takes more.
    """

    per_seed: tuple[float, ...]
    mean: float
    low: float
    high: float
    p_value: float
    t_p_value: float
    detectable: float


def paired_difference(arm: Sequence[float], other: Sequence[float], level: float = LEVEL) -> PairedDifference:
    """The difference of two arms whose figures are paired by seed.

    Raises:
        ValueError: they do not have equally many figures, fewer than two, or one is no number.
    """
    if len(arm) != len(other) or len(arm) < 2:
        raise ValueError(f"{len(arm)} and {len(other)} figures: pairs of two or more seeds are needed")
    differences = np.asarray(arm, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    if not np.isfinite(differences).all():
        raise ValueError(f"a figure is no number: {list(arm)}, {list(other)}")
    degrees, mean = len(differences) - 1, float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    half = student_t_quantile(degrees, level) * error
    # Without any spread a difference is certain, or there is none.
    t_p_value = student_t_p_value(mean / error, degrees) if error else float(mean == 0)
    # One-sided at the power: the quantile of a two-sided level of 2 * power - 1.
    detectable = half + student_t_quantile(degrees, 2 * POWER - 1) * error
    p_value = sign_flip_p_value(differences)
    return PairedDifference(
        tuple(differences.tolist()), mean, mean - half, mean + half, p_value, t_p_value, detectable
    )


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """Two-sided: the share of all ways to flip signs whose mean is as far from 0 as the one found, or farther.

    Of more than 20 differences it is estimated from random flips, the one found among them.
    """
    values = np.abs(np.asarray(differences, dtype=np.float64))
    found = abs(float(np.sum(differences)))
    if len(values) <= EXACT_SEEDS:
        sums = np.zeros(1)
        for value in values[1:]:  # the first sign stays: the other half mirrors this one
            sums = np.concatenate([sums + value, sums - value])
        sums = np.abs(sums + values[0])
        reached = sums >= found * (1 - 1e-12)
        return float(reached.mean())
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (RANDOM_FLIPS, len(values)))
    reached = np.abs(signs @ values) >= found * (1 - 1e-12)
    return float((1 + reached.sum()) / (1 + RANDOM_FLIPS))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm, 1979): calling those significant that are alpha or less errs with a chance of alpha."""
    order = sorted(range(len(p_values)), key=lambda number: p_values[number])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = highest
    return adjusted


def seeds_needed(comparisons: int = 1, alpha: float = ALPHA) -> int:
    """The fewest seeds with which the exact two-sided test can find anything among so many comparisons, however large.

    The smallest p-value is 2 / 2**S, and Holm multiplies the first one by the number of comparisons: 6 seeds for one
    at 0.05, 9 for ten.
    """
    return next(seeds for seeds in range(2, 64) if comparisons * 2 / 2**seeds <= alpha)


def comparisons_possible(seeds: int, alpha: float = ALPHA) -> int:
    """The most comparisons among which so many seeds can find anything; 0 if they cannot in a single one."""
    return math.floor(alpha * 2**seeds / 2 * (1 + 1e-12))


def check_seeds(seeds: int, comparisons: int, alpha: float = ALPHA) -> None:
    """Raises a ValueError with the figures unless so many seeds can find anything among so many comparisons."""
    needed = seeds_needed(comparisons, alpha)
    if seeds >= needed:
        return
    possible = comparisons_possible(seeds, alpha)
    fewer = f", or compare with {possible} arm{'s' * (possible > 1)} at most" if possible else ""
    count = f"{comparisons} comparison{'s' * (comparisons > 1)}"
    raise ValueError(
        f"seeds: {seeds} do not suffice for {count}. The smallest p-value that an exact two-sided sign test can have "
        f"is 2/2^{seeds} = {2 / 2**seeds:.3g}; Holm's correction asks for {alpha / comparisons:.3g} ({alpha:g} / "
        f"{comparisons}). Take {needed} seeds{fewer}"
    )


def partial_rank_correlation(predicted: Sequence[float], found: Sequence[float], given: Sequence[float]) -> float:
    """Spearman's correlation of two figures with that of a third taken out of both; NaN where nothing is left.

    Of predicted and found gains, given a source's own weight: whether a prediction knows more than that a source
    helps its own kind.

    Raises:
        ValueError: they differ in length, or are fewer than four.
    """
    if not len(predicted) == len(found) == len(given) or len(predicted) < 4:
        raise ValueError(f"{len(predicted)}, {len(found)} and {len(given)} figures: four or more of each are needed")
    ranks = np.stack([_ranks(values) for values in (predicted, found, given)])
    (_, pf, pg), (_, _, fg), _ = np.corrcoef(ranks)
    rest = (1 - pg**2) * (1 - fg**2)
    return float((pf - pg * fg) / math.sqrt(rest)) if rest > 1e-12 else math.nan


def _ranks(values: Sequence[float]) -> np.ndarray:
    """1 for the smallest; ties have the mean of their ranks."""
    array = np.asarray(values, dtype=np.float64)
    ordered = np.sort(array)
    return (np.searchsorted(ordered, array) + np.searchsorted(ordered, array, side="right") + 1) / 2
