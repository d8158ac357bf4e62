"""The negative log-likelihood that scores and monitors share: of packed rows, in evaluation mode, by tokens."""

from collections.abc import Iterator

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from mobilellm_hf.modeling import MobileLLMForCausalLM


def evaluation_batches(
    model: PreTrainedModel, dataset: Dataset, batch_size: int
) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """Batches of `dataset` on the model's device, each with its number of predicted tokens.

    The model is in evaluation mode meanwhile, and in its former mode afterwards.

    Args:
        dataset: rows with `input_ids`, `labels` and, for packed rows, `position_ids`, all of one length.

    Raises:
        ValueError: after the last batch, if no token was predicted.
    """
    columns = [name for name in ("input_ids", "labels", "position_ids") if name in dataset.column_names]
    was_training, tokens = model.training, 0
    model.eval()
    try:
        for batch in dataset.select_columns(columns).with_format("torch", device=model.device).iter(batch_size):
            predicted = int((batch["labels"][:, 1:] != -100).sum())
            tokens += predicted
            yield batch, predicted
    finally:
        model.train(was_training)
    if tokens == 0:
        raise ValueError("the data set has no predicted token: every label is -100 or every row has one token")


def summed_nll(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum over the batch's predicted tokens of their negative log-likelihood (nats), a differentiable scalar."""
    # Spares our own class the full logits; other causal LMs do not know the argument.
    options = {"return_logits": False} if isinstance(model, MobileLLMForCausalLM) else {}
    return model(**batch, **options, use_cache=False, num_items_in_batch=1).loss


@torch.no_grad()
def mean_nll(model: PreTrainedModel, dataset: Dataset, batch_size: int = 16) -> float:
    """Mean negative log-likelihood of the predicted tokens of `dataset`, in nats per token.

    Args:
        dataset: rows with `input_ids`, `labels` and, for packed rows, `position_ids`, all of one length.

    Raises:
        ValueError: no token is predicted.
    """
    total = tokens = 0
    for batch, predicted in evaluation_batches(model, dataset, batch_size):
        total += summed_nll(model, batch).item()
        tokens += predicted
    return total / tokens
