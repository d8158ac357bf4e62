"""Exact mean gradients over a data set, for every parameter: embedding, head and norms included.

Only one gradient per data set is ever stored. Where a mixture is wanted rather than a score for every sample, that is
all it takes: the token-weighted mean of per-sample influences (equation 5 of MobileLLM-R1) is the inner product of two
mean gradients, because a sample's token count times its mean-NLL gradient is its summed-NLL gradient.
"""

from collections.abc import Callable

import torch
from datasets import Dataset
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from mobilellm_hf.nll import evaluation_batches, summed_nll


def mean_gradient(
    model: PreTrainedModel, dataset: Dataset, batch_size: int = 8, on_batch: Callable[[int], None] | None = None
) -> dict[str, torch.Tensor]:
    """Gradient of the mean token NLL over `dataset`, one fp32 tensor per trainable parameter, tied weights once.

    A mean over tokens, not over samples: a sample weighs by its length. Batches are summed in fp32 whatever the
    weights' dtype, and `.grad` is left alone.

    Args:
        model: any causal LM of transformers.
        dataset: rows with `input_ids`, `labels` and, for packed rows, `position_ids`, all of one length.
        on_batch: called with the number of rows of each batch when it is done (progress bars).

    Raises:
        ValueError: the data set has no predicted token, or the gradient is not finite (the parameter is named).
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float) for name, p in parameters.items()}
    tokens = 0
    # The math kernel: the fused ones' backward passes are less exact than the products taken here can bear.
    with sdpa_kernel(SDPBackend.MATH):
        for batch, predicted in evaluation_batches(model, dataset, batch_size):
            tokens += predicted
            gradients = torch.autograd.grad(summed_nll(model, batch), list(parameters.values()))
            for accumulated, gradient in zip(total.values(), gradients, strict=True):
                accumulated += gradient
            if on_batch is not None:
                on_batch(len(batch["labels"]))
    for name, value in total.items():
        if not value.isfinite().all():
            raise ValueError(f"the gradient of {name} is not finite; check the model's weights for NaN")
    return {name: value / tokens for name, value in total.items()}
