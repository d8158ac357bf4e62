"""Inner products of every sample's gradient with C directions, one layer at a time, in exact arithmetic.

The gradient of a Linear's weight for one sample is `output_grad.T @ inputs`, a sum over its tokens. Forming it for
every sample of a batch costs as much as the batch's own weight gradient, and its products with any number of
directions are then nearly free; so nothing is saved by cleverer algebra for more than one direction. What costs is
memory traffic: the matrices are therefore formed a block of rows at a time, for all samples at once, and a block is
used while it is still in the cache. That also bounds the memory of a head with a vocabulary of 128,256.

Shapes: B samples, S positions, I inputs, O outputs, C directions. Results are fp64 sums of products taken in fp32 at
least (fp64 for fp64 weights).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Elements of the per-sample matrices that exist at once (8 MiB in fp32).
BLOCK_ELEMENTS = 2**21


@dataclass(frozen=True)
class LowRank:
    """C matrices (O, I) as `left[c] @ right.T`, with right: (I, r) common to all and left: (C, O, r)."""

    left: torch.Tensor
    right: torch.Tensor

    @staticmethod
    def fit(directions: torch.Tensor, rank: int) -> "LowRank":
        """The truncated SVD of the C matrices stacked. directions: (C, O, I)."""
        count, outputs, inputs = directions.shape
        # Seeded, since svd_lowrank draws, and the caller's generator is left alone.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(directions.reshape(-1, inputs), q=min(rank + 8, inputs), niter=3)
        left = (u * s)[:, :rank].reshape(count, outputs, -1)
        return LowRank(left.contiguous(), v[:, :rank].contiguous())


def precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float))


def linear_products(
    directions: torch.Tensor | LowRank,
    inputs: torch.Tensor,
    output_grad: torch.Tensor,
    per_token: bool = False,
    weight_grad: torch.Tensor | None = None,
) -> torch.Tensor:
    """Of a Linear's weight. directions: (C, O, I); inputs: (B, S, I); output_grad: (B, S, O).

    Args:
        weight_grad: (O, I), to which the gradient summed over the batch is added: it comes with the samples' own.

    Returns:
        (B, C), or (B, S, C) with `per_token`.
    """
    inputs, output_grad = precise(inputs), precise(output_grad)
    if weight_grad is not None and (per_token or isinstance(directions, LowRank)):
        weight_grad += output_grad.flatten(0, 1).mT @ inputs.flatten(0, 1)
    if isinstance(directions, LowRank):
        return _low_rank_products(directions, inputs, output_grad, per_token)
    if per_token or (len(directions) == 1 and weight_grad is None):
        return _ghost_products(directions, inputs, output_grad, per_token)
    samples, width = len(inputs), inputs.shape[-1]
    outputs = output_grad.shape[-1]
    block = min(outputs, max(1, BLOCK_ELEMENTS // (samples * width)))
    buffer = inputs.new_empty(samples * block * width)
    result = inputs.new_zeros(len(directions), samples, dtype=torch.float64)
    ones = inputs.new_ones(1, samples)
    for start in range(0, outputs, block):
        part = output_grad[..., start : start + block].mT
        gradients = buffer[: part[..., 0].numel() * width].view(samples, -1, width)
        torch.bmm(part, inputs, out=gradients)
        # Row by row of the weight: as one product with inner dimension rows x inputs it is twice as slow.
        rows = directions[:, start : start + block].transpose(0, 1)
        result += torch.bmm(rows, gradients.permute(1, 2, 0)).sum(0, dtype=torch.float64)
        if weight_grad is not None:  # the sum over samples, without a temporary
            weight_grad[start : start + block].view(1, -1).addmm_(ones, gradients.flatten(1))
    return result.mT


def _ghost_products(directions, inputs, output_grad, per_token: bool) -> torch.Tensor:
    """Without a per-sample matrix, at one product of the layer for every direction."""
    columns = []
    for direction in directions:
        if direction.shape[0] <= direction.shape[1]:
            products = (inputs @ direction.mT).mul_(output_grad)
        else:
            products = (output_grad @ direction).mul_(inputs)
        columns.append(products.sum(-1, dtype=torch.float64))
    result = torch.stack(columns, -1)
    return result if per_token else result.sum(1)


def _low_rank_products(directions: LowRank, inputs, output_grad, per_token: bool) -> torch.Tensor:
    projected = inputs @ directions.right
    columns = [(output_grad @ left).mul_(projected).sum(-1, dtype=torch.float64) for left in directions.left]
    result = torch.stack(columns, -1)
    return result if per_token else result.sum(1)


def embedding_products(
    directions: torch.Tensor | LowRank,
    ids: torch.Tensor,
    output_grad: torch.Tensor,
    padding_idx: int | None,
    per_token: bool,
) -> torch.Tensor:
    """Of an Embedding's weight. directions: (C, vocabulary, width); ids: (B, S); output_grad: (B, S, width)."""
    output_grad = precise(output_grad)
    if isinstance(directions, LowRank):
        output_grad, directions = output_grad @ directions.right, directions.left
    columns = [(F.embedding(ids, direction) * output_grad).sum(-1, dtype=torch.float64) for direction in directions]
    result = torch.stack(columns, -1)
    if padding_idx is not None:  # autograd gives that row no gradient
        result = result.masked_fill((ids == padding_idx)[..., None], 0.0)
    return result if per_token else result.sum(1)


def norm_products(
    directions: torch.Tensor, inputs: torch.Tensor, output_grad: torch.Tensor, eps: float, per_token: bool
) -> torch.Tensor:
    """Of an RMSNorm's weight. directions: (C, width); inputs and output_grad: (B, S, width)."""
    inputs, output_grad = precise(inputs), precise(output_grad)
    scale = torch.rsqrt(inputs.pow(2).mean(-1) + eps)
    gradients = output_grad * inputs
    if per_token:
        return (gradients @ directions.mT).double() * scale[..., None]
    return (torch.einsum("bsd,bs->bd", gradients, scale) @ directions.mT).double()


def bias_products(directions: torch.Tensor, output_grad: torch.Tensor, per_token: bool) -> torch.Tensor:
    """Of a Linear's bias. directions: (C, O); output_grad: (B, S, O)."""
    output_grad = precise(output_grad)
    return ((output_grad if per_token else output_grad.sum(1)) @ directions.mT).double()
