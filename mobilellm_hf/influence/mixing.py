"""From influence scores to what is read next: the mixture and the rejection of equations (4) to (6) of MobileLLM-R1.

A score that is not finite (a sample whose gradient overflowed) counts nowhere: not in a mean, and it is not kept.
"""

from collections.abc import Sequence

import torch


def average_checkpoints(scores: torch.Tensor, steps: Sequence[int]) -> torch.Tensor:
    """The inner sum of equation (4): the mean over checkpoints, each weighted by its training step.

    Args:
        scores: (checkpoints, samples or groups, capabilities); several models' checkpoints can be scored per
            capability, as in equation (3), as long as they stand at the same steps.
        steps: training step of each checkpoint, positive.

    Returns:
        (samples or groups, capabilities) influence.

    Raises:
        ValueError: the steps do not match the scores or are not positive.
    """
    if len(steps) != len(scores) or min(steps) <= 0:
        raise ValueError(f"steps must be {len(scores)} positive numbers, one per checkpoint, not {list(steps)}")
    alpha = torch.tensor(steps, dtype=scores.dtype) / sum(steps)
    return torch.einsum("t,tgc->gc", alpha, scores)


def joint_influence(
    scores: torch.Tensor, capabilities: Sequence[str], subset: Sequence[str] | None = None
) -> torch.Tensor:
    """The outer sum of equation (4): the uniform mean over the capabilities, or over a subset of them.

    Args:
        scores: (samples or groups, capabilities).
        capabilities: the names of the columns.
        subset: which of them count; all by default.

    Returns:
        (samples or groups,) joint influence.

    Raises:
        ValueError: the names do not fit the scores, or the subset names a capability that was not scored.
    """
    if len(capabilities) != scores.shape[-1]:
        raise ValueError(f"{len(capabilities)} capabilities for scores with {scores.shape[-1]} columns")
    chosen = list(capabilities if subset is None else subset)
    if not chosen or set(chosen) - set(capabilities):
        raise ValueError(f"subset={chosen} must name one or more of {', '.join(capabilities)}")
    return scores[:, [list(capabilities).index(name) for name in chosen]].mean(-1)


def group_means(
    influence: torch.Tensor, tokens: torch.Tensor, groups: Sequence[str]
) -> tuple[list[str], torch.Tensor]:
    """rho of equation (5): the mean influence of each group, a sample weighing by its number of tokens.

    Args:
        influence: (samples,) joint influence of each.
        tokens: (samples,) predicted tokens of each.
        groups: the group of each sample.

    Returns:
        The groups in order of appearance, and (groups,) rho, per token.

    Raises:
        ValueError: a group has no sample with a finite score and a predicted token.
    """
    names = list(dict.fromkeys(groups))
    member = torch.tensor([names.index(group) for group in groups])
    counted = influence.isfinite() & (tokens > 0)
    weight = torch.where(counted, tokens, 0).to(influence.dtype)
    zeros = influence.new_zeros(len(names))
    totals = zeros.index_add(0, member, weight)
    if empty := [name for name, total in zip(names, totals.tolist(), strict=True) if total == 0]:
        raise ValueError(f"no sample of {', '.join(empty)} has a finite score: look at its data, or leave it out")
    return names, zeros.index_add(0, member, torch.where(counted, influence, 0.0) * weight) / totals


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


def keep_mask(scores: torch.Tensor, capabilities: Sequence[str], rule: str = "mean") -> torch.Tensor:
    """Equation (6): which samples stay, those with a positive influence.

    Args:
        scores: (samples, capabilities).
        capabilities: the names of the columns.
        rule: "mean" over the capabilities, "any" of them, or the name of one.

    Returns:
        (samples,) bool; False where a score that the rule needs is not finite.

    Raises:
        ValueError: the rule is none of these.
    """
    if rule == "any":
        return ((scores > 0) & scores.isfinite()).any(-1)
    if rule == "mean":
        return _positive(joint_influence(scores, capabilities))
    if rule not in capabilities:
        raise ValueError(f"rule={rule!r} must be 'mean', 'any' or one of {', '.join(capabilities)}")
    return _positive(joint_influence(scores, capabilities, [rule]))


def _positive(influence: torch.Tensor) -> torch.Tensor:
    return (influence > 0) & influence.isfinite()
