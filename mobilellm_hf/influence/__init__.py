"""Influence: how much each source of training data helps each capability, and the mixture that follows from it."""

from mobilellm_hf.influence.gradients import mean_gradient
from mobilellm_hf.influence.mixing import average_checkpoints, mixture_weights
from mobilellm_hf.influence.scoring import group_influence

__all__ = ["average_checkpoints", "group_influence", "mean_gradient", "mixture_weights"]
