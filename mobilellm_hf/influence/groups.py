"""Influence of whole sources (groups) on capability probes, equations (2) and (3) without a score for every sample.

Positive means helpful: a training step on the group lowers the probe's loss to first order. The paper prints the
opposite sign in its equation (2), which contradicts its own (6), "keep I > 0".
"""

from collections.abc import Callable

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from mobilellm_hf.influence.curvature import Curvature
from mobilellm_hf.influence.gradients import mean_gradient


def group_influence(
    model: PreTrainedModel,
    groups: dict[str, Dataset],
    probes: dict[str, Dataset],
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
    curvature: Curvature | None = None,
) -> torch.Tensor:
    """rho of every group on every probe: the token-weighted mean influence of the group's samples, exact.

    Costs one gradient per group and per probe set, an ordinary gradient's cost where scores of single samples are not
    wanted, and holds one gradient per probe set. A probe is the mean over its samples.

    Returns:
        (groups, probes) float64 tensor, rows and columns in the order of the two dictionaries.

    Raises:
        ValueError: a data set is empty or its gradient is not finite; the message names the data set.
    """
    gradients = [
        _named_gradient(f"probe {name!r}", model, probes[name], batch_size, on_batch, "samples") for name in probes
    ]
    directions = {name: torch.stack([gradient[name] for gradient in gradients]) for name in gradients[0]}
    if curvature is not None:
        directions = curvature.precondition(directions)
    scores = torch.empty(len(groups), len(probes), dtype=torch.float64)
    for row, name in enumerate(groups):
        gradient = _named_gradient(f"source {name!r}", model, groups[name], batch_size, on_batch, "tokens")
        for column in range(len(probes)):
            scores[row, column] = sum(_inner(gradient[key], directions[key][column]) for key in directions)
    return scores


def _inner(left: torch.Tensor, right: torch.Tensor) -> float:
    # On the CPU, since not every accelerator has fp64.
    return torch.linalg.vecdot(*(side.flatten().to("cpu", torch.float64) for side in (left, right))).item()


def _named_gradient(label: str, model, dataset, batch_size, on_batch, average) -> dict[str, torch.Tensor]:
    if len(dataset) == 0:
        raise ValueError(f"{label} is empty")
    try:
        return mean_gradient(model, dataset, batch_size, on_batch, average)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
