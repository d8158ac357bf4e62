"""Exact mean gradients over a data set, for every parameter: embedding, head and norms included.

Only one gradient per data set is ever stored. Where a mixture is wanted rather than a score for every sample, that is
all it takes: the token-weighted mean of per-sample influences (equation 5 of MobileLLM-R1) is the inner product of two
mean gradients, because a sample's token count times its mean-NLL gradient is its summed-NLL gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from datasets import Dataset
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from mobilellm_hf.nll import check_predicted, evaluation_batches, predicted_tokens, summed_nll


@contextmanager
def exact_attention(device: torch.device) -> Iterator[None]:
    """Attention whose backward pass is as exact as the products taken here need it.

    On an accelerator only the math kernel is; the CPU's fused one is too, and costs less.
    """
    with nullcontext() if device.type == "cpu" else sdpa_kernel(SDPBackend.MATH):
        yield


def mean_gradient(
    model: PreTrainedModel,
    dataset: Dataset,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
    average: Literal["tokens", "samples"] = "tokens",
) -> dict[str, torch.Tensor]:
    """Gradient of the mean NLL over `dataset`, one tensor (fp32, or fp64) per trainable parameter, tied weights once.

    Batches are summed in fp32 at least, whatever the weights' dtype, and `.grad` is left alone.

    Args:
        model: any causal LM of transformers.
        dataset: rows with `input_ids`, and `labels`, `position_ids` (packed rows), `attention_mask` if there are any.
        on_batch: called with the number of rows of each batch when it is done (progress bars).
        average: over "tokens", by which a sample weighs by its length (the sources of equation 5), or over "samples",
            each the mean of its tokens (the probes of equation 3). A sample that predicts nothing does not count.

    Raises:
        ValueError: the data set has no predicted token, or the gradient is not finite (the parameter is named).
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("the model has no trainable parameter: every one is frozen")
    total = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float)) for name, p in parameters.items()
    }
    count = 0
    with exact_attention(model.device):
        for batch, predicted in evaluation_batches(model, dataset, batch_size):
            weights = None
            if average == "samples":
                tokens = predicted_tokens(batch)
                predicted, weights = int((tokens > 0).sum()), 1 / tokens.clamp(min=1).double()
            count += predicted
            gradients = torch.autograd.grad(summed_nll(model, batch, weights), list(parameters.values()))
            for accumulated, gradient in zip(total.values(), gradients, strict=True):
                accumulated += gradient
            if on_batch is not None:
                on_batch(len(batch["labels"]))
    check_predicted(count)
    for name, value in total.items():
        if not value.isfinite().all():
            raise ValueError(f"the gradient of {name} is not finite; check the model's weights for NaN")
        value /= count
    return total
