"""Rewards for the length of a completion, in tokens, as published."""

import math
from collections.abc import Callable, Sequence
from typing import Any


class LengthReward:
    """0 up to `limit - buffer` tokens, then falling evenly to -1 at `limit`, and -1 beyond.

    The soft overlong punishment of DAPO (2503.14476, equation 13). Add it to a reward for being right.

    Args:
        limit: most tokens, as `max_completion_length` of the trainer.
        buffer: tokens before the limit in which it falls.

    Raises:
        ValueError: `buffer` is not between 0 and `limit`.

    Example:
        >>> LengthReward(limit=100, buffer=20)(None, ["..."] * 3, completion_ids=[[0] * 80, [0] * 90, [0] * 101])
        [0.0, -0.5, -1.0]
    """

    __name__ = "length"

    def __init__(self, limit: int, buffer: int):
        if not 0 <= buffer <= limit:
            raise ValueError(f"buffer={buffer} must be between 0 and limit={limit}")
        self.limit, self.buffer = limit, buffer

    def __call__(
        self, prompts: Any, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        return [self._of(len(ids)) for ids in completion_ids]

    def _of(self, length: int) -> float:
        excess = length - (self.limit - self.buffer)
        if length > self.limit:
            return -1.0
        return -excess / self.buffer if excess > 0 else 0.0


class CosineLengthReward:
    """A reward for being right that favours short right answers, and long attempts among wrong ones.

    From `right[0]` (of no length) to `right[1]` (at `limit`) where `reward` is above `threshold`, from `wrong[0]` to
    `wrong[1]` elsewhere, along half a cosine: 2502.03373, appendix C.1. None where `reward` is None.

    Args:
        reward: says what is right, such as `AccuracyReward()`.
        limit: tokens at which the cosine ends.

    Raises:
        ValueError: `limit` is not positive.

    Example:
        >>> reward = CosineLengthReward(AccuracyReward("answer"), limit=100)
        >>> reward(None, [r"\\boxed{1}", r"\\boxed{2}"], answer=["1", "1"], completion_ids=[[0] * 50] * 2)
        [0.75, -0.75]
    """

    def __init__(
        self,
        reward: Callable[..., list[float | None]],
        limit: int,
        *,
        right: tuple[float, float] = (1.0, 0.5),
        wrong: tuple[float, float] = (-1.0, -0.5),
        threshold: float = 0.5,
    ):
        if limit < 1:
            raise ValueError(f"limit={limit} must be a number of tokens, 1 or more")
        self.reward, self.limit, self.right, self.wrong, self.threshold = reward, limit, right, wrong, threshold
        self.__name__ = f"cosine_{getattr(reward, '__name__', type(reward).__name__)}"

    def __call__(
        self, prompts: Any, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float | None]:
        values = self.reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        return [self._of(value, len(ids)) for value, ids in zip(values, completion_ids, strict=True)]

    def _of(self, value: float | None, length: int) -> float | None:
        if value is None:
            return None
        start, end = self.right if value > self.threshold else self.wrong
        return end + (start - end) * (1 + math.cos(math.pi * min(1.0, length / self.limit))) / 2
