"""Entropic descent against scipy's SLSQP; projections against a generic solver; the gap that is claimed is one."""

import numpy as np
import pytest

from mobilellm_hf.audit.rivals.simplex import cap_weights, minimise

optimize = pytest.importorskip("scipy.optimize")
SUM_TO_1 = {"type": "eq", "fun": lambda w: w.sum() - 1}


def slsqp(function, caps: np.ndarray) -> np.ndarray:
    start = caps / caps.sum()
    options = {"ftol": 1e-15, "maxiter": 1_000}
    bounds = [(1e-12, cap) for cap in caps]
    return optimize.minimize(function, start, bounds=bounds, constraints=SUM_TO_1, method="SLSQP", options=options).x


@pytest.mark.parametrize("seed", range(6))
def test_capped_weights_are_the_closest_in_kl(seed):
    random = np.random.default_rng(seed)
    weights, caps = random.dirichlet(np.full(5, 0.5)), random.uniform(0.15, 0.5, 5)
    capped = cap_weights(weights, caps)
    assert capped.sum() == pytest.approx(1) and (capped <= caps + 1e-12).all()
    expected = slsqp(lambda w: (w * np.log(w / weights)).sum(), caps)
    np.testing.assert_allclose(capped, expected, atol=1e-5)


def test_capped_weights_keep_what_fits_and_fill_up_what_was_nothing():
    np.testing.assert_allclose(cap_weights(np.array([0.2, 0.8]), np.array([0.5, 0.9])), [0.2, 0.8])
    np.testing.assert_allclose(cap_weights(np.array([1.0, 0.0, 0.0]), np.array([0.4, 1.0, 1.0])), [0.4, 0.3, 0.3])
    np.testing.assert_allclose(cap_weights(np.array([0.5, 0.5]), np.array([0.0, 1.0])), [0, 1])
    with pytest.raises(ValueError, match="sum to 0.700"):
        cap_weights(np.array([0.5, 0.5]), np.array([0.3, 0.4]))


def quadratic(seed: int, sources: int = 6):
    random = np.random.default_rng(seed)
    root, target = random.normal(size=(sources, sources)), random.normal(size=sources)
    matrix = root @ root.T

    def function(weights):
        away = weights - target
        return float(away @ matrix @ away), 2 * matrix @ away

    return function


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("largest", [1.0, 0.3])
def test_the_minimum_is_that_of_a_generic_solver(seed, largest):
    function, caps = quadratic(seed), np.full(6, largest)
    found = minimise(function, np.full(6, 1 / 6), caps, max_steps=3_000, tolerance=1e-7)
    assert found.weights.sum() == pytest.approx(1) and (found.weights <= largest + 1e-12).all()
    assert found.value == pytest.approx(function(found.weights)[0])
    assert found.value == pytest.approx(function(slsqp(lambda w: function(w)[0], caps))[0], abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_gap_bounds_what_is_left_wherever_it_ends(seed):
    function, caps = quadratic(seed), np.full(6, 0.4)
    best = minimise(function, np.full(6, 1 / 6), caps, max_steps=3_000, tolerance=1e-8).value
    gaps = []
    for steps in (0, 1, 3, 10, 30):
        found = minimise(function, np.full(6, 1 / 6), caps, max_steps=steps)
        assert found.steps <= steps and found.value - best <= found.gap + 1e-8
        gaps.append(found.gap)
    assert gaps[-1] < gaps[0] / 10


def test_every_step_lowers_the_value_and_it_ends_at_the_tolerance():
    function = quadratic(3)
    values = [minimise(function, np.full(6, 1 / 6), max_steps=steps).value for steps in range(12)]
    assert all(after <= before + 1e-12 for before, after in zip(values, values[1:]))
    found = minimise(function, np.full(6, 1 / 6), max_steps=1_000, tolerance=1e-3)
    assert found.gap <= 1e-3 and found.steps < 1_000
    flat = minimise(lambda w: (0.0, np.zeros(3)), np.array([0.2, 0.3, 0.5]))
    np.testing.assert_allclose(flat.weights, [0.2, 0.3, 0.5])
    assert flat.steps == 0


def test_steps_grow_where_the_gradient_is_small():
    def small(weights):
        value, gradient = quadratic(3)(weights)
        return value * 1e-4, gradient * 1e-4

    found = minimise(small, np.full(6, 1 / 6), max_steps=60, tolerance=1e-7)
    assert found.gap <= 1e-7 and found.steps < 60


def test_a_source_without_room_gets_nothing():
    found = minimise(quadratic(1, 3), np.full(3, 1 / 3), np.array([0.0, 0.7, 0.7]))
    assert found.weights[0] == 0 and found.weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(
        minimise(quadratic(1, 3), np.full(3, 1 / 3), np.array([0.5, 0.25, 0.25])).weights[0], 0.5
    )


def test_no_step_takes_a_source_to_nothing():
    steep = np.array([0.0, 1e4, 0.0])
    assert 0 < minimise(lambda w: (float(steep @ w), steep), np.full(3, 1 / 3), max_steps=1).weights[1] < 1e-9


def test_a_source_that_an_early_step_took_to_nothing_comes_back():
    """The start is a vertex but for rounding, and the optimum is at another."""
    target = np.array([0.0, 1.0])
    found = minimise(lambda w: (float(((w - target) ** 2).sum()), 2 * (w - target)), np.array([1.0, 1e-12]))
    np.testing.assert_allclose(found.weights, target, atol=1e-3)
