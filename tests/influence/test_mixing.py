"""Equations (4) to (6), worked by hand."""

import pytest
import torch

from mobilellm_hf.influence import average_checkpoints, group_means, joint_influence, keep_mask, mixture_weights


def test_checkpoints_are_weighted_by_their_step():
    scores = torch.tensor([[[1.0, 3.0]], [[5.0, 7.0]]], dtype=torch.float64)  # 2 checkpoints, 1 group, 2 capabilities
    assert average_checkpoints(scores, [10, 30]).tolist()[0] == pytest.approx(
        [0.25 * 1 + 0.75 * 5, 0.25 * 3 + 0.75 * 7]
    )


@pytest.mark.parametrize("steps", [[1], [1, 0], [1, 2, 3]])
def test_average_checkpoints_refuses_steps_that_do_not_fit(steps):
    with pytest.raises(ValueError, match="2 positive numbers"):
        average_checkpoints(torch.zeros(2, 1, 1), steps)


def test_weights_are_proportional_to_positive_influence():
    weights = mixture_weights(torch.tensor([3.0, 1.0, -2.0]), ["a", "b", "c"])
    assert weights == pytest.approx({"a": 0.75, "b": 0.25, "c": 0.0})


def test_a_floor_is_given_to_groups_without_influence_and_taken_from_the_rest():
    weights = mixture_weights(torch.tensor([3.0, 1.0, -2.0, 0.0]), ["a", "b", "c", "d"], floor=0.1)
    assert weights == pytest.approx({"a": 0.6, "b": 0.2, "c": 0.1, "d": 0.1})


def test_bad_scores_are_refused_by_the_names_of_the_groups():
    with pytest.raises(ValueError, match=r"no source has a positive influence.*a -1.*b 0"):
        mixture_weights(torch.tensor([-1.0, 0.0]), ["a", "b"])
    with pytest.raises(ValueError, match="influence of b, c is not finite"):
        mixture_weights(torch.tensor([1.0, float("nan"), float("inf")]), ["a", "b", "c"])
    with pytest.raises(ValueError, match="floor=0.5"):
        mixture_weights(torch.tensor([1.0, -1.0, -1.0]), ["a", "b", "c"], floor=0.5)


SCORES = torch.tensor([[1.0, -4.0], [-3.0, 5.0], [-1.0, -2.0], [float("nan"), 1.0]], dtype=torch.float64)


def test_joint_influence_is_the_mean_of_any_subset():
    assert joint_influence(SCORES, ["code", "math"]).tolist()[:3] == [-1.5, 1.0, -1.5]
    assert joint_influence(SCORES, ["code", "math"], ["math"]).tolist() == [-4.0, 5.0, -2.0, 1.0]
    for subset in ([], ["code", "maths"]):
        with pytest.raises(ValueError, match="must name one or more of code, math"):
            joint_influence(SCORES, ["code", "math"], subset)
    with pytest.raises(ValueError, match="1 capabilities for scores with 2 columns"):
        joint_influence(SCORES, ["code"])


def test_samples_are_kept_by_the_mean_by_any_or_by_one_capability():
    names = ["code", "math"]
    assert keep_mask(SCORES, names).tolist() == [False, True, False, False]
    assert keep_mask(SCORES, names, "any").tolist() == [True, True, False, True]
    assert keep_mask(SCORES, names, "code").tolist() == [True, False, False, False]
    assert keep_mask(SCORES, names, "math").tolist() == [False, True, False, True]
    edges = torch.tensor([[0.0, 0.0], [float("inf"), 1.0], [1.0, float("nan")]])
    assert keep_mask(edges, names).tolist() == [False, False, False]
    assert keep_mask(edges, names, "any").tolist() == [False, True, True]
    assert keep_mask(edges, names, "code").tolist() == [False, False, True]
    with pytest.raises(ValueError, match="rule='maths' must be 'mean', 'any' or one of code, math"):
        keep_mask(SCORES, names, "maths")


def test_a_groups_mean_weighs_by_tokens_and_leaves_out_what_is_not_finite():
    influence = torch.tensor([2.0, 5.0, float("nan"), -1.0, 7.0], dtype=torch.float64)
    tokens = torch.tensor([10, 30, 1000, 5, 0])
    names, rho = group_means(influence, tokens, ["b", "b", "b", "a", "a"])
    assert names == ["b", "a"]
    assert rho.tolist() == pytest.approx([(2 * 10 + 5 * 30) / 40, -1.0])
    with pytest.raises(ValueError, match="no sample of c has a finite score"):
        group_means(influence[:3], tokens[:3], ["b", "b", "c"])
