"""The negative log-likelihood that scores and monitors share: of tokenized rows, in evaluation mode."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mobilellm_hf.modeling import MobileLLMForCausalLM

IGNORED_LABEL = -100
COLUMNS = ("input_ids", "labels", "position_ids", "attention_mask")


def collate(rows: dict[str, list[torch.Tensor] | torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of any lengths as one batch, padded on the right, where causal attention needs no mask.

    Without `labels` every token is predicted that is not masked. A mask that hides nothing but the ends of rows is
    dropped: causal attention never looks there, and with a mask transformers would not tell packed documents apart.

    Raises:
        ValueError: packed rows with padding in front or in between.
    """
    batch = {}
    for name, values in rows.items():
        padding = IGNORED_LABEL if name == "labels" else 0
        batch[name] = values if torch.is_tensor(values) else pad_sequence(list(values), True, padding)
    if "labels" not in batch:
        lengths = torch.tensor([len(ids) for ids in rows["input_ids"]], device=batch["input_ids"].device)
        past_end = torch.arange(batch["input_ids"].shape[1], device=lengths.device) >= lengths[:, None]
        hidden = past_end | (batch["attention_mask"] == 0) if "attention_mask" in batch else past_end
        hidden[:, 1:] |= hidden[:, :-1].clone()  # nor is anything predicted from padding
        batch["labels"] = batch["input_ids"].masked_fill(hidden, IGNORED_LABEL)
    if "attention_mask" in batch:
        padded_in_front = bool((batch["attention_mask"].diff(dim=1) > 0).any())
        positions = batch.get("position_ids")
        if padded_in_front and positions is not None and bool((positions[:, 1:] == 0).any()):
            raise ValueError("packed rows (position_ids that start again) cannot be padded in front: pad their ends")
        if not padded_in_front:
            del batch["attention_mask"]
    return batch


def predicted_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(rows,) number of predicted tokens of each row."""
    return (batch["labels"][:, 1:] != IGNORED_LABEL).sum(1)


def evaluation_batches(
    model: PreTrainedModel, dataset: Dataset, batch_size: int
) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """Batches of `dataset` on the model's device, each with its number of predicted tokens.

    The model is in evaluation mode meanwhile, and in its former mode afterwards. Gradient checkpointing stays on.

    Args:
        dataset: rows with `input_ids`, and `labels`, `position_ids` (packed rows) and `attention_mask` if there are
            any; rows may differ in length.

    """
    columns = [name for name in COLUMNS if name in dataset.column_names]
    was_training = model.training
    model.eval()
    for module in model.modules():
        # Layers check their own mode; what is random in them (dropout) belongs to their submodules.
        if isinstance(module, GradientCheckpointingLayer) and getattr(module, "gradient_checkpointing", False):
            module.training = True
    try:
        for rows in dataset.select_columns(columns).with_format("torch", device=model.device).iter(batch_size):
            batch = collate(rows)
            yield batch, int(predicted_tokens(batch).sum())
    finally:
        model.train(was_training)


def check_predicted(count: int) -> None:
    """Raises a ValueError if a whole data set predicted nothing."""
    if count == 0:
        raise ValueError("the data set has no predicted token: every label is -100 or every row has one token")


def summed_nll(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], row_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum over the batch's predicted tokens of their negative log-likelihood (nats), a differentiable scalar.

    row_weights: (rows,) a factor for each row's sum.
    """
    if isinstance(model, MobileLLMForCausalLM) and not model.loss_needs_logits():  # which spares us the logits
        options = {} if row_weights is None else {"token_weights": row_weights[:, None].expand(batch["labels"].shape)}
        return model(**batch, **options, return_logits=False, use_cache=False, num_items_in_batch=1).loss
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float))
    nll = F.cross_entropy(logits.mT, batch["labels"][:, 1:], ignore_index=IGNORED_LABEL, reduction="none").sum(1)
    return (nll if row_weights is None else nll * row_weights).sum()


@torch.no_grad()
def mean_nll(model: PreTrainedModel, dataset: Dataset, batch_size: int = 16) -> float:
    """Mean negative log-likelihood of the predicted tokens of `dataset`, in nats per token.

    Args:
        dataset: as for `evaluation_batches`.

    Raises:
        ValueError: no token is predicted.
    """
    total = tokens = 0
    for batch, predicted in evaluation_batches(model, dataset, batch_size):
        total += summed_nll(model, batch).item()
        tokens += predicted
    check_predicted(tokens)
    return total / tokens
