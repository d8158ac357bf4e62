"""Influence: how much a sample, or a source of training data, helps each capability, and the mixture that follows."""

from mobilellm_hf.influence.curvature import AdamCurvature, Curvature, DataInfCurvature, IdentityCurvature
from mobilellm_hf.influence.gradients import mean_gradient
from mobilellm_hf.influence.groups import group_influence
from mobilellm_hf.influence.mixing import average_checkpoints, group_means, joint_influence, keep_mask, mixture_weights
from mobilellm_hf.influence.ranks import rank_agreement
from mobilellm_hf.influence.scorer import InfluenceScorer

__all__ = [
    "AdamCurvature",
    "Curvature",
    "DataInfCurvature",
    "IdentityCurvature",
    "InfluenceScorer",
    "average_checkpoints",
    "group_influence",
    "group_means",
    "joint_influence",
    "keep_mask",
    "mean_gradient",
    "mixture_weights",
    "rank_agreement",
]
