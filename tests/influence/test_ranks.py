"""Rank correlation against scipy, ties and gaps included."""

import pytest
import torch

from mobilellm_hf.influence.ranks import rank_agreement, spearman


def test_spearman_gives_ties_the_mean_of_their_ranks():
    left, right = torch.tensor([1.0, 2, 2, 3]), torch.tensor([1.0, 2, 3, 4])
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5 / sqrt(4.5 * 5).
    assert spearman(left, right).item() == pytest.approx(4.5 / 22.5**0.5)
    assert spearman(left, torch.ones(4)).isnan()
    stats = pytest.importorskip("scipy.stats")
    values = torch.randint(6, (2, 5, 30), generator=torch.Generator().manual_seed(0)).double()
    expected = [stats.spearmanr(*pair).statistic for pair in zip(*values, strict=True)]
    assert spearman(*values).tolist() == pytest.approx(expected)


def test_rank_agreement_is_by_column_and_leaves_out_what_is_not_finite():
    exact = torch.tensor([[1.0, 4.0], [2.0, 3.0], [3.0, 2.0], [4.0, 1.0], [float("nan"), 9.0], [5.0, 0.0]])
    approximate = exact.clone()
    approximate[:, 1] = -exact[:, 1]
    approximate[5, 0] = float("inf")
    assert rank_agreement(approximate, exact).tolist() == pytest.approx([1.0, -1.0])
