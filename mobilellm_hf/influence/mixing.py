"""From influence scores to a data mixture: equations (4) and (5) of MobileLLM-R1."""

from collections.abc import Sequence

import torch


def average_checkpoints(scores: torch.Tensor, steps: Sequence[int]) -> torch.Tensor:
    """The inner sum of equation (4): the mean over checkpoints, each weighted by its training step.

    Args:
        scores: (checkpoints, groups, capabilities); several models' checkpoints can be scored per capability, as in
            equation (3), as long as they stand at the same steps.
        steps: training step of each checkpoint, positive.

    Returns:
        (groups, capabilities) influence. Its mean over the capabilities is the joint influence of equation (4).

    Raises:
        ValueError: the steps do not match the scores or are not positive.
    """
    if len(steps) != len(scores) or min(steps) <= 0:
        raise ValueError(f"steps must be {len(scores)} positive numbers, one per checkpoint, not {list(steps)}")
    alpha = torch.tensor(steps, dtype=scores.dtype) / sum(steps)
    return torch.einsum("t,tgc->gc", alpha, scores)


def mixture_weights(rho: torch.Tensor, groups: Sequence[str], floor: float = 0.0) -> dict[str, float]:
    """Equation (5): each group's share of the training tokens, proportional to its influence.

    Args:
        rho: (groups,) token-weighted mean joint influence of each group.
        groups: the groups' names.
        floor: share of a group whose influence is not positive; the others divide the rest among them.

    Raises:
        ValueError: no group has a positive influence, a score is not finite, or the floors leave nothing to divide.
    """
    if not rho.isfinite().all():
        bad = [name for name, value in zip(groups, rho.tolist(), strict=True) if value - value != 0]
        raise ValueError(f"the influence of {', '.join(bad)} is not finite")
    positive = rho.clamp(min=0)
    if positive.sum() == 0:
        scores = ", ".join(f"{name} {value:.3g}" for name, value in zip(groups, rho.tolist(), strict=True))
        raise ValueError(
            f"no source has a positive influence on the probes ({scores}): train the scoring model further, "
            "or check that sources and probes share a language"
        )
    floors = torch.where(rho > 0, 0.0, floor)
    if not floor >= 0 or floors.sum() >= 1:
        raise ValueError(f"floor={floor} is negative, or leaves nothing for the groups with a positive influence")
    weights = floors + positive / positive.sum() * (1 - floors.sum())
    return dict(zip(groups, weights.tolist(), strict=True))
