"""kronfluence's EK-FAC scores end to end, by its own interface: what our scores with its factors are held to."""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch.nn.attention import SDPBackend, sdpa_kernel


class NextToken(Task):
    def nll(self, batch, model, sample: bool) -> torch.Tensor:
        """(rows,) summed NLL."""
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        logits, labels = model(**inputs, use_cache=False).logits[:, :-1].float(), batch["labels"][:, 1:]
        if sample:
            drawn = torch.multinomial(logits.detach().flatten(0, 1).softmax(-1), 1).view(labels.shape)
            labels = torch.where(labels == -100, labels, drawn)
        return F.cross_entropy(logits.mT, labels, reduction="none").sum(1)

    def compute_train_loss(self, batch, model, sample=False):
        return self.nll(batch, model, sample).sum()

    def compute_measurement(self, batch, model):
        return (self.nll(batch, model, False) / (batch["labels"][:, 1:] != -100).sum(1)).mean()

    def get_influence_tracked_modules(self):
        return [f"model.layers.{i}.{name}" for i in range(2) for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )]  # fmt: skip


def kronfluence_scores(model, fitted: Dataset, probe: Dataset, dataset: Dataset, folder: Path) -> torch.Tensor:
    """(N,) scores of mean NLL against the mean of the probe's samples, each of mean NLL."""
    columns = ["input_ids", "labels", "position_ids"]
    fitted, probe, dataset = (part.select_columns(columns).with_format("torch") for part in (fitted, probe, dataset))
    task = NextToken()
    with sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng():
        torch.manual_seed(0)
        tracked = prepare_model(copy.deepcopy(model), task)
        analyzer = Analyzer("reference", tracked, task, cpu=True, disable_tqdm=True, output_dir=str(folder))
        analyzer.fit_all_factors(
            "factors", fitted, per_device_batch_size=8, factor_args=FactorArguments(strategy="ekfac")
        )
        analyzer.compute_pairwise_scores(
            "scores", "factors", query_dataset=probe, train_dataset=dataset, per_device_query_batch_size=len(probe),
            per_device_train_batch_size=8,
            score_args=ScoreArguments(aggregate_query_gradients=True, damping_factor=None),
        )  # fmt: skip
        scores = analyzer.load_pairwise_scores("scores")["all_modules"][0]
    tokens = torch.tensor([sum(label != -100 for label in row[1:]) for row in dataset.with_format(None)["labels"]])
    return scores / tokens
