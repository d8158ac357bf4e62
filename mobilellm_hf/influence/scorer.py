"""Influence of every sample on every capability probe, equation (2) of MobileLLM-R1, at the cost of a training step.

    scorer = InfluenceScorer(model, probes={"code": code, "math": math, "knowledge": knowledge})
    scores = scorer.score(dataset, batch_size=8)         # (samples, 3), positive = helpful

The score of sample x on probe c is the inner product of two gradients of mean NLL, over every parameter: that of x
and, after the curvature's inverse, the mean over the probe's samples. Exact, not sketched: no projection, no dropped
layer. Positive means that a training step on x lowers the probe's loss (the paper prints the opposite sign in its
equation (2), which contradicts its own (6), "keep I > 0").
"""

import fnmatch
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import pyarrow
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from mobilellm_hf.influence.curvature import Curvature, IdentityCurvature
from mobilellm_hf.influence.fused import FusedInfluence
from mobilellm_hf.influence.gradients import exact_attention, mean_gradient
from mobilellm_hf.influence.inner_products import LowRank
from mobilellm_hf.influence.overlap import refuse_overlap
from mobilellm_hf.influence.products import GradientProducts, flag_not_finite
from mobilellm_hf.nll import evaluation_batches, predicted_tokens, summed_nll

logger = logging.getLogger(__name__)


class InfluenceScorer:
    """Scores samples by what a training step on them does to the loss on each probe.

    Args:
        model: a causal LM of Linear, Embedding and RMSNorm modules; adapters (LoRA) on a frozen base count alone.
        probes: capability -> tokenized rows (`input_ids`, and `labels`, `position_ids`, `attention_mask` if any).
        curvature: "identity", or a `Curvature` made from a checkpoint or from data (see `influence.curvature`).
        exclude: patterns of parameter names that do not count, such as "model.embed_tokens.*".
        rank: approximate every matrix of the directions by one of this rank. Takes a third of the cost away;
            `rank_agreement` tells what it does to the scores.
        batch_size: rows of a batch when the probes' gradients are taken.
        average: whether a probe is the mean over its "samples" (equation 3) or over its "tokens".
        on_batch: called with the number of probe rows of each batch when it is done (progress bars).

    Attributes:
        capabilities: the probes' names, the columns of every result.
        directions: parameter name -> (C, *shape), what the samples' gradients are multiplied with.

    Raises:
        ValueError: a probe is empty, has ids beyond the model's vocabulary or a gradient that is not finite; the
            message names it. `UnsupportedModuleError` (a ValueError) if a module cannot be treated exactly.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        probes: Mapping[str, Dataset],
        curvature: Literal["identity"] | Curvature = "identity",
        *,
        exclude: Sequence[str] = (),
        rank: int | None = None,
        batch_size: int = 8,
        average: Literal["samples", "tokens"] = "samples",
        on_batch: Callable[[int], None] | None = None,
    ):
        if not probes:
            raise ValueError("no probe is given: probes maps capabilities to data sets")
        curvature = IdentityCurvature() if curvature == "identity" else curvature
        if isinstance(curvature, str):
            raise ValueError(f"curvature={curvature!r}: only 'identity' needs no data; make the others beforehand")
        self.model, self.probes = model, dict(probes)
        self.capabilities = list(probes)
        check_parameters(model)
        gradients = []
        for name, dataset in self.probes.items():
            check_rows(f"probe {name!r}", dataset, model)
            try:
                gradients.append(mean_gradient(model, dataset, batch_size, on_batch, average))
            except ValueError as error:
                raise ValueError(f"probe {name!r}: {error}") from error
        kept = exclude_parameters(gradients[0], exclude)
        stacked = {name: torch.stack([gradient[name] for gradient in gradients]) for name in kept}
        del gradients
        self.directions = curvature.precondition(stacked)
        if rank is not None:
            self.directions = low_rank_directions(self.directions, rank)
        GradientProducts(model, self.directions)  # refuses what it cannot treat before anything is scored

    @classmethod
    def from_directions(
        cls, model: PreTrainedModel, directions: Mapping[str, torch.Tensor], capabilities: Sequence[str]
    ) -> "InfluenceScorer":
        """A scorer with directions that were computed before, parameter name -> (C, *shape)."""
        scorer = cls.__new__(cls)
        scorer.model, scorer.probes, scorer.capabilities = model, {}, list(capabilities)
        scorer.directions = dict(directions)
        check_parameters(model)
        GradientProducts(model, scorer.directions)
        return scorer

    def score(
        self,
        dataset: Dataset,
        batch_size: int = 8,
        *,
        per_token: bool = False,
        allow_overlap: bool = False,
        first_row: int = 0,
        on_batch: Callable[[int], None] | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """The influence of every row on every probe.

        Rows of different lengths are batched by length. The model's mode and its `.grad` are left alone.

        Args:
            dataset: tokenized rows, as the probes.
            per_token: return each position's share instead, whose sum is the sample's score. A position is where a
                weight was applied, so the shares of a document in a packed row sum to the document's score. Costs one
                more product of every layer per probe.
            allow_overlap: score rows that share documents with a probe, which is an error otherwise: they would be
                found helpful for being the probe.
            first_row: the number of the data set's first row, where it is a part of another, for warnings.
            on_batch: called with the number of rows of each batch when it is done (progress bars).

        Returns:
            (N, C) float64 tensor, on the CPU; with `per_token` a list of N tensors (positions, C). A row whose
            gradient is not finite scores NaN, with a warning that names it; the others are not touched by it.

        Raises:
            ValueError: the data set is empty, has ids beyond the vocabulary, or shares documents with a probe (the
                message says which).
        """
        check_rows("the scored data set", dataset, self.model)
        if not allow_overlap:
            refuse_overlap(
                dataset, self.probes, "Take them out of the probes or of the data, or pass allow_overlap=True."
            )
        lengths = torch.tensor(_row_lengths(dataset))
        order = lengths.argsort(stable=True, descending=True)
        parts = []
        products = GradientProducts(self.model, self.directions, per_token)
        with products, exact_attention(self.model.device):
            for batch, _ in evaluation_batches(self.model, dataset.select(order.tolist()), batch_size):
                parts.append(_batch_scores(self.model, products, batch))
                if on_batch is not None:
                    on_batch(len(parts[-1]))
        rows = [row for part in parts for row in part]
        rows = [rows[place] for place in order.argsort().tolist()]
        if bad := [first_row + number for number, row in enumerate(rows) if row.isnan().any()]:
            logger.warning("the gradient of row(s) %s is not finite: scored NaN", _some(bad))
        if per_token:
            return [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]
        return torch.stack(rows)

    @contextmanager
    def in_training_step(self) -> Iterator[FusedInfluence]:
        """Takes the scores of what the model is trained on, inside its training steps, at little more than their cost.

        The directions are those of the checkpoint at which this scorer was made. Gradient accumulation, checkpointing
        and DDP work as without it: on every rank the scores are those of its own samples.

        Example:
            >>> with scorer.in_training_step() as influence:
            ...     model(**batch).loss.backward()
            ...     scores = influence.take()  # (rows of the batch, C)
        """
        with FusedInfluence(self.model, self.directions) as fused:
            yield fused


def _batch_scores(model: PreTrainedModel, products: GradientProducts, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, C), or (B, S, C), on the CPU."""
    products.begin(*batch["labels"].shape)
    try:
        torch.autograd.grad(summed_nll(model, batch), products.anchor)
    except RuntimeError as error:
        if "not have been used in the graph" in str(error):
            raise RuntimeError(
                "the loss does not depend on the model's input embeddings as `get_input_embeddings` has them: this "
                "model cannot be scored"
            ) from error
        if "checkpoint" in str(error).lower():
            raise RuntimeError(
                "reentrant gradient checkpointing allows no partial backward pass: call "
                "model.gradient_checkpointing_enable({'use_reentrant': False})"
            ) from error
        raise
    tokens = predicted_tokens(batch).clamp(min=1).to(products.products.device)
    return flag_not_finite(products.products / tokens.view(-1, *[1] * (products.products.dim() - 1))).cpu()


def low_rank_directions(directions: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor | LowRank]:
    """Every matrix among the directions as `LowRank`, where that saves work.

    Raises:
        ValueError: the rank is not positive.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} must be positive")
    return {
        name: LowRank.fit(value, rank) if value.dim() == 3 and 2 * rank < min(value.shape[1:]) else value
        for name, value in directions.items()
    }


def exclude_parameters(names: Iterable[str], exclude: Sequence[str]) -> list[str]:
    """The names that match none of the patterns.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left.
    """
    names = list(names)
    for pattern in exclude:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"exclude: no parameter matches {pattern!r}; the first are {', '.join(names[:3])}")
    kept = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in exclude)]
    if not kept:
        raise ValueError(f"exclude={list(exclude)} leaves no parameter")
    return kept


def check_rows(label: str, dataset: Dataset, model: PreTrainedModel | PreTrainedConfig) -> None:
    """Raises a ValueError that names `label` for a data set without rows, without ids or with ids beyond the model."""
    if len(dataset) == 0:
        raise ValueError(f"{label} is empty")
    if "input_ids" not in dataset.column_names:
        raise ValueError(f"{label} has the columns {dataset.column_names}, not input_ids: tokenize it first")
    embeddings = None if isinstance(model, PreTrainedConfig) else model.get_input_embeddings()
    vocabulary = model.vocab_size if embeddings is None else embeddings.num_embeddings
    for start, column in _columns_of_ids(dataset):
        ids = column.flatten()
        limits = pc.min_max(ids).as_py()
        if len(ids) and not 0 <= limits["min"] <= limits["max"] < vocabulary:
            bad = next(i for i, row in enumerate(column) if any(not 0 <= n < vocabulary for n in row.as_py()))
            found = next(n for n in column[bad].as_py() if not 0 <= n < vocabulary)
            raise ValueError(
                f"{label}, row {start + bad}, has the token id {found}, but the model's vocabulary has {vocabulary}: "
                "it was tokenized for another model"
            )


def _columns_of_ids(dataset: Dataset) -> Iterator[tuple[int, pyarrow.Array]]:
    """(first row, `input_ids`) of a thousand rows at a time, as Arrow lists: never as Python objects."""
    start = 0
    for table in dataset.select_columns("input_ids").with_format("arrow").iter(1_000):
        for chunk in table["input_ids"].chunks:
            yield start, chunk
            start += len(chunk)


def _row_lengths(dataset: Dataset) -> list[int]:
    return [length for _, column in _columns_of_ids(dataset) for length in pc.list_value_length(column).to_pylist()]


def check_parameters(model: PreTrainedModel) -> None:
    """Raises a ValueError that names the first parameter that is sharded or offloaded."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(f"{name} is sharded (FSDP or tensor parallelism): score with whole models, one a process")
        if parameter.is_meta:
            raise ValueError(f"{name} is offloaded: load the model without device_map")


def _some(rows: Sequence[int], shown: int = 8) -> str:
    return ", ".join(map(str, rows[:shown])) + (f" and {len(rows) - shown} more" if len(rows) > shown else "")
