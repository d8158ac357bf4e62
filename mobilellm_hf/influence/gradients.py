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

from mobilellm_hf.modeling import MobileLLMForCausalLM


def count_predicted_tokens(labels: torch.Tensor) -> int:
    """Tokens that the shifted loss predicts. labels: (batch, tokens), -100 where nothing is predicted."""
    return int((labels[:, 1:] != -100).sum())


def summed_nll(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum over the batch's predicted tokens of their negative log-likelihood (nats), a differentiable scalar."""
    # Spares our own class the full logits; other causal LMs do not know the argument.
    options = {"return_logits": False} if isinstance(model, MobileLLMForCausalLM) else {}
    return model(**batch, **options, use_cache=False, num_items_in_batch=1).loss


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
    columns = [name for name in ("input_ids", "labels", "position_ids") if name in dataset.column_names]
    batches = dataset.select_columns(columns).with_format("torch", device=model.device)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float) for name, p in parameters.items()}
    was_training, tokens = model.training, 0
    model.eval()
    # The math kernel: the fused ones' backward passes are less exact than the products taken here can bear.
    with sdpa_kernel(SDPBackend.MATH):
        for batch in batches.iter(batch_size):
            tokens += count_predicted_tokens(batch["labels"])
            gradients = torch.autograd.grad(summed_nll(model, batch), list(parameters.values()))
            for accumulated, gradient in zip(total.values(), gradients, strict=True):
                accumulated += gradient
            if on_batch is not None:
                on_batch(len(batch["labels"]))
    model.train(was_training)
    if tokens == 0:
        raise ValueError("the data set has no predicted token: every label is -100 or every row has one token")
    for name, value in total.items():
        if not value.isfinite().all():
            raise ValueError(f"the gradient of {name} is not finite; check the model's weights for NaN")
    return {name: value / tokens for name, value in total.items()}
