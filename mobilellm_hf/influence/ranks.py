"""Rank correlation, by which scores are compared with other scores and with what retraining did."""

import torch


def spearman(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Rank correlation over the last dimension; ties have the mean of their ranks, and a constant correlates NaN."""
    ranks = []
    for values in (left.contiguous(), right.contiguous()):
        ordered = values.sort(-1).values
        # First rank of those that tie plus the last: twice their mean, which correlates like the mean.
        rank = (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)).double()
        ranks.append(rank - rank.mean(-1, keepdim=True))
    return (ranks[0] * ranks[1]).sum(-1) / (ranks[0].norm(dim=-1) * ranks[1].norm(dim=-1))


def rank_agreement(approximate: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """(C,) Spearman rank correlation of two (N, C) score tensors, rows that are not finite left out."""
    kept = approximate.isfinite().all(1) & exact.isfinite().all(1)
    return spearman(approximate[kept].mT, exact[kept].mT)
