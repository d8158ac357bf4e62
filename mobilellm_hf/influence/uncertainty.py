"""How sure a mixture by influence is: an interval for every weight, and shrinkage where sources cannot be told apart.

    found = uncertain_weights(bootstrap_rho(...), proportional={"code": 0.2, "math": 0.8})
    found.weights, found.intervals, found.shrinkage.factor, found.verdict()

Shrinkage is empirical Bayes. With rho_s the influence of source s, e its errors under resampling (`bootstrap.py`), and
both centred over the sources (what all have in common tells none apart),

    Q = sum_s (rho_s - mean rho)^2      N = E_b sum_s (e_bs - mean_s e_bs)^2      p = P_b(sum_s (e_bs - ...)^2 >= Q)
    B = 1 if p > 0.05, else min(1, N / Q)       weights = (1 - B) * equation (5) + B * proportional to tokens

N / Q is the method-of-moments estimate (DerSimonian & Laird 1986) of noise / (noise + signal), the factor of James and
Stein's estimator; the test makes it total where rho differs by no more than its noise would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mobilellm_hf.influence.bootstrap import LEVEL, RhoDraws
from mobilellm_hf.influence.mixing import mixture_weights


def proportional_mix(
    sources: Sequence[str], tokens: Sequence[int], counts: Mapping[str, int], given: Mapping[str, float]
) -> dict[str, float]:
    """source -> share of the tokens that there are.

    Args:
        sources, tokens: of each row that was scored.
        counts: source -> rows that there are, which have the mean tokens of those that were scored; the scored ones
            are taken for all where it says nothing.
        given: source -> tokens that there are, instead.

    Raises:
        ValueError: `given` names an unknown source, or not all of those that `counts` leaves out.
    """
    rows, scored = Counter(sources), Counter()
    for source, count in zip(sources, tokens, strict=True):
        scored[source] += count
    if unknown := sorted(set(given) - set(rows)):
        raise ValueError(f"source_tokens names {unknown[0]!r}; the sources are {', '.join(rows)}")
    if given and (missing := [name for name in rows if name not in counts and name not in given]):
        raise ValueError(f"source_tokens says nothing of {', '.join(missing)}, whose size is unknown: add it")
    there = {name: given.get(name, scored[name] * counts.get(name, rows[name]) / rows[name]) for name in rows}
    total = sum(there.values())
    return {name: count / total for name, count in there.items()}


@dataclass(frozen=True)
class Shrinkage:
    """How far the weights go towards the proportional mix: 1 all the way. The formula heads this module.

    Attributes:
        signal: Q, how much rho differs between the sources, squared.
        noise: N, how much it would by resampling alone.
        p_value: of rho being equal for all sources.
    """

    factor: float
    signal: float
    noise: float
    p_value: float


def shrinkage(rho: np.ndarray, errors: np.ndarray) -> Shrinkage:
    """rho: (S,); errors: (draws, S)."""
    signal = float(((rho - rho.mean()) ** 2).sum())
    null = ((errors - errors.mean(1, keepdims=True)) ** 2).sum(1)
    p_value = (1 + int((null >= signal).sum())) / (1 + len(null))
    noise = float(null.mean())
    factor = 1.0 if p_value > LEVEL or signal == 0 else min(1.0, noise / signal)
    return Shrinkage(factor, signal, noise, p_value)


@dataclass(frozen=True)
class UncertainWeights:
    """A mixture and how sure it is; every mapping is by source.

    Attributes:
        weights: shrunk; they sum to 1.
        unshrunk: of equation (5), as in the paper; None if no source has a positive influence.
        proportional: what they are shrunk towards.
        intervals: 95% percentile intervals of the unshrunk weights.
        rho_intervals: the same of rho.
        by_level: level -> its share of the variance that blurs the differences between sources.
        undecided: share of the draws in which no source had a positive influence; they count as proportional.
    """

    weights: dict[str, float]
    unshrunk: dict[str, float] | None
    proportional: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    rho_intervals: dict[str, tuple[float, float]]
    shrinkage: Shrinkage
    units: dict[str, int]
    by_level: dict[str, float]
    undecided: float

    def verdict(self) -> str:
        found = self.shrinkage
        if found.factor == 1:
            return (
                f"no evidence: keep the baseline. The sources' influence differs by no more than its noise "
                f"(p = {found.p_value:.2g}), so the weights are proportional to tokens"
            )
        return (
            f"the sources differ in influence (p = {found.p_value:.2g}); noise is {found.factor:.0%} of what they "
            f"differ by, so the weights go {found.factor:.0%} of the way to the proportional mix"
        )


def uncertain_weights(run: RhoDraws, proportional: Mapping[str, float], floor: float = 0.0) -> UncertainWeights:
    """The mixture of equation (5) with its intervals, shrunk.

    Args:
        proportional: source -> share of the tokens that there are; they sum to 1.
        floor: as for `mixture_weights`.

    Raises:
        ValueError: as `mixture_weights`, if the sources can be told apart and none has a positive influence; or the
            proportional mix is of other sources.
    """
    if set(proportional) != set(run.sources):
        raise ValueError(
            f"the proportional mix is of {', '.join(proportional)}, the scores of {', '.join(run.sources)}"
        )
    target = np.array([proportional[name] for name in run.sources])
    errors, found = run.total(), shrinkage(run.rho, run.total())
    unshrunk = None
    if found.factor < 1 or (run.rho > 0).any():
        unshrunk = mixture_weights(torch.from_numpy(run.rho), run.sources, floor)
    drawn, undecided = _drawn_weights(run.rho + errors, target, floor)
    middle = target if unshrunk is None else np.array(list(unshrunk.values()))
    weights = (1 - found.factor) * middle + found.factor * target
    variances = {level: _centred_variance(values) for level, values in run.errors.items()}
    whole = sum(variances.values()) or 1.0
    return UncertainWeights(
        weights=dict(zip(run.sources, weights.tolist(), strict=True)),
        unshrunk=unshrunk,
        proportional={name: proportional[name] for name in run.sources},
        intervals=_percentiles(run.sources, drawn),
        rho_intervals=_percentiles(run.sources, run.rho + errors),
        shrinkage=found,
        units=run.units,
        by_level={level: value / whole for level, value in variances.items()},
        undecided=undecided,
    )


def _drawn_weights(rho: np.ndarray, target: np.ndarray, floor: float) -> tuple[np.ndarray, float]:
    """(draws, S) equation (5) of every draw, the target where nothing is positive, and the share of those."""
    positive = rho.clip(min=0)
    total = positive.sum(1, keepdims=True)
    floors = np.where(rho > 0, 0.0, floor)
    shares = floors + np.divide(positive, total, where=total > 0, out=np.zeros_like(rho)) * (
        1 - floors.sum(1, keepdims=True)
    ).clip(min=0)
    return np.where(total > 0, shares, target), float((total == 0).mean())


def _centred_variance(errors: np.ndarray) -> float:
    return float(((errors - errors.mean(1, keepdims=True)) ** 2).sum(1).mean())


def _percentiles(sources: Sequence[str], values: np.ndarray) -> dict[str, tuple[float, float]]:
    low, high = np.quantile(values, [LEVEL / 2, 1 - LEVEL / 2], axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(sources)}
