"""Equations (4) and (5), worked by hand."""

import pytest
import torch

from mobilellm_hf.influence import average_checkpoints, mixture_weights


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
