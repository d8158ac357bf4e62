"""Rewards for the form of a completion, whatever it says."""

import re
from collections.abc import Sequence
from typing import Any

from mobilellm_hf.rewards.completions import Completion, answer_part, text_of
from mobilellm_hf.rewards.grading import last_boxed

# As TRL's think_format_reward has it.
THINK = re.compile(r"<think>(?!.*<think>)(.*?)</think>.*\Z", re.DOTALL)


class ThinkFormatReward:
    """1.0 for a completion that starts with one `<think>...</think>`, 0.0 for any other.

    Args:
        opened: the prompt ends in `<think>`, as chat templates of reasoning models have it, and the completion starts
            after it.

    Example:
        >>> ThinkFormatReward()(None, ["<think>One and one.</think> Two.", "Two."])
        [1.0, 0.0]
    """

    __name__ = "think_format"

    def __init__(self, *, opened: bool = False):
        self.opened = opened

    def __call__(self, prompts: Any, completions: Sequence[Completion], **columns: Any) -> list[float]:
        start = "<think>" if self.opened else ""
        return [float(THINK.match(start + text_of(completion)) is not None) for completion in completions]


class BoxedFormatReward:
    r"""1.0 for a completion whose answer, after its reasoning, has one `\boxed{...}` that is closed and not empty.

    Example:
        >>> BoxedFormatReward()(None, [r"So it is \boxed{2}.", "So it is 2.", r"\boxed{}"])
        [1.0, 0.0, 0.0]
    """

    __name__ = "boxed_format"

    def __call__(self, prompts: Any, completions: Sequence[Completion], **columns: Any) -> list[float]:
        answers = [answer_part(text_of(completion)) for completion in completions]
        return [float(answer.count("\\boxed") == 1 and bool((last_boxed(answer) or "").strip())) for answer in answers]
