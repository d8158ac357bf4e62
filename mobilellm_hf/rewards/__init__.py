"""Rewards for TRL's `GRPOTrainer`: small classes that pickle, each with an example in its docstring.

    from mobilellm_hf.rewards import AccuracyReward, CodeReward, SafeReward, ThinkFormatReward

    rewards = [AccuracyReward("answer"), ThinkFormatReward(), SafeReward(my_reward)]
    GRPOTrainer(model, rewards, args, train_dataset=dataset).train()

`grading` has the comparison of answers without a trainer, `sandbox` runs code that nobody has looked at.
"""

from mobilellm_hf.rewards.accuracy import AccuracyReward
from mobilellm_hf.rewards.code_tests import CodeReward
from mobilellm_hf.rewards.formats import BoxedFormatReward, ThinkFormatReward
from mobilellm_hf.rewards.length import CosineLengthReward, LengthReward
from mobilellm_hf.rewards.safe import SafeReward

__all__ = [
    "AccuracyReward",
    "BoxedFormatReward",
    "CodeReward",
    "CosineLengthReward",
    "LengthReward",
    "SafeReward",
    "ThinkFormatReward",
]
