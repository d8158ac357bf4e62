"""Against scipy, and against every way to flip signs counted one by one."""

import itertools
import math

import numpy as np
import pytest

from mobilellm_hf.audit.statistics import (
    check_seeds,
    comparisons_possible,
    holm,
    paired_difference,
    partial_rank_correlation,
    seeds_needed,
    sign_flip_p_value,
)

stats = pytest.importorskip("scipy.stats")
DRAWS = [np.random.default_rng(seed).normal(shift, 1, count) for seed, (shift, count) in enumerate(
    [(0, 2), (0.5, 5), (-1, 6), (1, 8), (0.2, 9), (0, 10)]
)]  # fmt: skip


def counted(differences) -> float:
    means = [
        abs(np.mean(np.multiply(signs, differences))) for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return float(np.mean(np.array(means) >= abs(np.mean(differences)) - 1e-12))


@pytest.mark.parametrize("differences", DRAWS)
def test_every_way_to_flip_signs_is_counted(differences):
    found = sign_flip_p_value(differences)
    assert found == pytest.approx(counted(differences), abs=1e-12)
    peer = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True, axis=0
    )
    assert found == pytest.approx(peer.pvalue, abs=1e-12)


def test_ties_count_and_no_difference_is_certain():
    assert sign_flip_p_value([1.0, 1.0, 1.0, -1.0]) == counted([1.0, 1.0, 1.0, -1.0]) == 10 / 16
    assert sign_flip_p_value([0.0, 0.0, 0.0]) == 1.0
    assert sign_flip_p_value([0.1] * 6) == 2 / 64  # 0.1 + 0.1 + ... in another order is another float
    assert sign_flip_p_value([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]) == 2 / 128


def test_of_many_seeds_flips_are_drawn():
    differences = np.random.default_rng(3).normal(0.45, 1, 24)
    expected = stats.ttest_1samp(differences, 0).pvalue
    assert 0.005 < expected < 0.2
    assert sign_flip_p_value(differences) == pytest.approx(expected, rel=0.1)
    assert sign_flip_p_value(np.full(30, 1.0)) == pytest.approx(1 / 200_001)


@pytest.mark.parametrize("seed", range(4))
def test_the_interval_and_the_t_test_are_scipys(seed):
    rng = np.random.default_rng(seed)
    arm, other = rng.normal(1, 0.3, 7), rng.normal(1.1, 0.3, 7)
    found, peer = paired_difference(arm, other), stats.ttest_rel(arm, other)
    interval = peer.confidence_interval(0.95)
    assert found.mean == pytest.approx((arm - other).mean())
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert found.t_p_value == pytest.approx(peer.pvalue, abs=1e-12)
    assert found.p_value == counted(arm - other) and found.per_seed == tuple(arm - other)
    wide = paired_difference(arm, other, level=0.99)
    assert wide.high - wide.low > found.high - found.low


def test_what_would_be_found_is_found_four_times_in_five():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (4_000, 8))
    detectable = np.mean([paired_difference(row, np.zeros(8)).detectable for row in noise[:500]])
    share = np.mean(stats.ttest_1samp(noise + detectable, 0, axis=1).pvalue < 0.05)
    assert share == pytest.approx(0.8, abs=0.04)


def test_equal_differences_are_certain():
    found = paired_difference([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])
    assert (found.low, found.high, found.t_p_value) == (0.5, 0.5, 0.0)
    assert paired_difference([1.0, 2.0], [1.0, 2.0]).t_p_value == 1.0


@pytest.mark.parametrize(
    "arm, other, message",
    [([1.0], [2.0], "1 and 1 figures"), ([1.0, 2.0], [1.0], "2 and 1"), ([1.0, math.nan], [1.0, 1.0], "no number")],
)
def test_what_cannot_be_paired_is_refused(arm, other, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(arm, other)


def test_holm_by_its_definition():
    p_values = [0.04, 0.01, 0.03, 0.005, 0.5]
    assert holm(p_values) == pytest.approx([0.09, 0.04, 0.09, 0.025, 0.5])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == [] and holm([0.02]) == [0.02]
    rng = np.random.default_rng(0)
    for alpha in (0.01, 0.05, 0.2):  # the step-down procedure itself
        values = rng.uniform(0, 0.1, 7)
        rejected, order = set(), np.argsort(values)
        for rank, number in enumerate(order):
            if values[number] > alpha / (7 - rank):
                break
            rejected.add(int(number))
        assert {number for number, value in enumerate(holm(values)) if value <= alpha} == rejected


def test_seeds_that_a_test_needs():
    assert [seeds_needed(count) for count in (1, 3, 4, 6, 7, 10, 12, 13)] == [6, 7, 8, 8, 9, 9, 9, 10]
    assert seeds_needed(1, 0.01) == 8
    for comparisons in (1, 2, 5, 10):
        needed = seeds_needed(comparisons)
        best = holm([sign_flip_p_value(np.ones(needed))] * comparisons)
        assert best[0] <= 0.05 < holm([sign_flip_p_value(np.ones(needed - 1))] * comparisons)[0]
    assert [comparisons_possible(seeds) for seeds in (5, 6, 8, 9)] == [0, 1, 6, 12]


def test_too_few_seeds_are_refused_with_the_figures():
    check_seeds(8, 6)
    with pytest.raises(ValueError, match=r"8 do not suffice for 10 .* 2/2\^8 = 0.00781.* 0.005 \(0.05 / 10\)"):
        check_seeds(8, 10)
    with pytest.raises(ValueError, match="Take 9 seeds, or compare with 6 arms at most"):
        check_seeds(8, 10)
    with pytest.raises(ValueError, match="Take 6 seeds$"):
        check_seeds(5, 1)


def test_partial_rank_correlation_is_that_of_residuals():
    rng = np.random.default_rng(1)
    given = rng.normal(size=30).round(1)  # some tie
    predicted, found = given + rng.normal(size=30), given + rng.normal(size=30)
    ranks = [stats.rankdata(values) for values in (predicted, found, given)]
    left, right = (np.polynomial.Polynomial.fit(ranks[2], values, 1) for values in ranks[:2])
    expected = np.corrcoef(ranks[0] - left(ranks[2]), ranks[1] - right(ranks[2]))[0, 1]
    assert partial_rank_correlation(predicted, found, given) == pytest.approx(expected, abs=1e-10)
    assert stats.spearmanr(predicted, found)[0] > expected + 0.1  # what they have in common with it is gone
    assert math.isnan(partial_rank_correlation(given, found, given))
    with pytest.raises(ValueError, match="3, 3 and 3 figures: four or more"):
        partial_rank_correlation([1, 2, 3], [1, 2, 3], [3, 2, 1])
