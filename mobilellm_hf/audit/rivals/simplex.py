"""Convex functions of mixture weights, minimised by entropic descent (exponentiated gradient), and how far they are.

    found = minimise(lambda w: (value, gradient), start=np.full(5, 1 / 5), caps=np.full(5, 0.4))
    found.weights, found.gap                    # no weights within the caps are better by more than the gap

A step is w <- w exp(-step x gradient) / Z, brought back under the caps by Bregman's projection, which keeps the ratios
of all weights that are under theirs. Its size doubles, and is halved until the function falls as the step promised
(Beck and Teboulle 2003). Since the function is convex, it lies above its tangent, and the tangent's least value within
the caps bounds what is left to gain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Weights stay above it, so that a source which an early step took to nothing can come back.
LEAST_WEIGHT = 1e-12
LEAST_STEP = 1e-12


@dataclass(frozen=True)
class Minimum:
    """Where a minimisation ended.

    Attributes:
        weights: (sources,) they sum to 1.
        gap: the value is no more than this above the least one.
        steps: descent steps that were taken.
    """

    weights: np.ndarray
    value: float
    gap: float
    steps: int


def cap_weights(weights: np.ndarray, caps: np.ndarray) -> np.ndarray:
    """The shares under the caps that are closest to `weights` (in KL): what is above gives to the rest, in proportion.

    Args:
        weights: (sources,) at least 0; their sum does not matter.
        caps: (sources,) at least 0.

    Raises:
        ValueError: the caps sum to less than 1.
    """
    return _cap_logs(np.log(np.maximum(weights, 1e-200)), np.asarray(caps, dtype=float))


def _cap_logs(logs: np.ndarray, caps: np.ndarray) -> np.ndarray:
    """`cap_weights` of weights that are given by their logarithms."""
    if caps.sum() < 1:
        raise ValueError(f"the caps sum to {caps.sum():.3f}: there are no weights under them that sum to 1")
    capped = caps <= 0
    while not capped.all():
        free = np.exp(logs - logs[~capped].max()) * ~capped
        weights = np.where(capped, caps, free * (1 - caps[capped].sum()) / free.sum())
        over = weights > caps
        if not over.any():
            return weights
        capped |= over
    return caps / caps.sum()


def minimise(
    function: Callable[[np.ndarray], tuple[float, np.ndarray]],
    start: np.ndarray,
    caps: np.ndarray | None = None,
    *,
    max_steps: int = 2_000,
    tolerance: float = 1e-8,
) -> Minimum:
    """The least value of a convex function of weights that sum to 1, each at most its cap.

    Args:
        function: (sources,) weights -> its value and its gradient, (sources,).
        start: (sources,) positive.
        caps: (sources,) by default none.
        max_steps: after which it ends, however large the gap.
        tolerance: the gap at which it ends.

    Raises:
        ValueError: the caps sum to less than 1.
    """
    caps = np.ones(len(start)) if caps is None else np.minimum(caps, 1.0)
    weights, step = cap_weights(start, caps), 1.0
    value, gradient = function(weights)
    for number in range(max_steps):
        gap = _gap(gradient, weights, caps)
        if gap <= tolerance:
            return Minimum(weights, value, gap, number)
        while True:
            new = _moved(weights, gradient, caps, step)
            new_value, new_gradient = function(new)
            if new_value <= value + float(gradient @ (new - weights)) + _divergence(new, weights) / step:
                break
            step /= 2
            if step < LEAST_STEP:  # what is left is rounding
                return Minimum(weights, value, gap, number)
        weights, value, gradient, step = new, new_value, new_gradient, 2 * step
    return Minimum(weights, value, _gap(gradient, weights, caps), max_steps)


def _moved(weights: np.ndarray, gradient: np.ndarray, caps: np.ndarray, step: float) -> np.ndarray:
    with np.errstate(divide="ignore"):  # what has a cap of 0 stays 0
        logs = np.where(weights > 0, np.log(weights) - step * gradient, -np.inf)
    return np.maximum(_cap_logs(logs, caps), np.minimum(caps, LEAST_WEIGHT))


def _divergence(new: np.ndarray, weights: np.ndarray) -> float:
    """KL(new || weights), term by term at least 0, so that no rounding of their sums is taken for it."""
    moved = np.divide(new - weights, weights, out=np.zeros_like(new), where=weights > 0)
    return float(weights @ ((1 + moved) * np.log1p(moved) - moved))


def _gap(gradient: np.ndarray, weights: np.ndarray, caps: np.ndarray) -> float:
    """<gradient, weights - v> for the v under the caps that makes it largest: the cheapest sources, filled up."""
    order = np.argsort(gradient, kind="stable")
    filled = np.minimum(np.cumsum(caps[order]), 1.0)
    best = np.empty(len(weights))
    best[order] = np.diff(filled, prepend=0.0)
    return max(0.0, float(gradient @ (weights - best)))
