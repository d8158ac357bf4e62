"""DoGE (2310.15393): weights grow where the gradient of a source points the way of the probes' gradients.

    found = doge(proxy, Path("runs/audit/rivals/doge"), seed=0)

One model reads all sources alike; at every step, with g_i the gradient of the mean NLL of the batch's rows of source i
and g_probe_j that of some rows of probe j,

    W_i = <g_i, sum_j g_probe_j>
    s_i = clip(lr W_i / mean_i ||g_i||, 0, 5 lr)                                            lr: of this step
    a <- a exp(s / 0.05) / Z

the model is trained on sum_i a_i g_i, and the mean of a over all steps is the mixture (the form of Algorithm 1 for
targets that are no source). It is the product of gradients at one model as it trains; an influence score adds the
curvature and several checkpoints to that. The paper has W_i and the update. Its code also has the mean norm, the
limits of s, and that each gradient is cut to norm 1 before the products (`max_norm`): without it, s is at its limit
for every source that helps while gradients are large, and tells them apart no more. A source that a batch lacks keeps
its last product and norm, those of another model; until it has one, its s is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from mobilellm_hf.audit.proxy import MixtureRun, Proxy, train_mixture
from mobilellm_hf.audit.rivals.common import (
    RivalWeights,
    RunsProgress,
    check_proxy,
    count_tokens,
    named_weights,
    read_json,
)
from mobilellm_hf.audit.rivals.reweighting import WEIGHTS_FILE, SourceBatch, SourceReweighting, check_batches
from mobilellm_hf.nll import COLUMNS, collate, predicted_tokens, summed_nll
from mobilellm_hf.progress import Stage

BREGMAN = 0.05
MAX_SCORE = 5.0
MAX_NORM = 1.0

Gradient = list[torch.Tensor]


def doge_update(
    weights: np.ndarray, products: np.ndarray, norms: np.ndarray, learning_rate: float, bregman: float = BREGMAN
) -> np.ndarray:
    """(sources,) the weights after a step.

    Args:
        weights: (sources,) before it.
        products: (sources,) W; norms: (sources,) ||g||. NaN for a source whose gradient is not known yet.
        bregman: mu.
    """
    mean_norm = np.nanmean(norms) + 1e-6
    scores = np.clip(learning_rate * np.nan_to_num(products) / mean_norm, 0.0, MAX_SCORE * learning_rate) / bregman
    grown = weights * np.exp(scores - scores.max())
    return grown / grown.sum()


def batch_gradient(model: PreTrainedModel, batch: dict[str, torch.Tensor], max_norm: float | None) -> Gradient | None:
    """The gradient of the batch's mean NLL by each trainable parameter, its norm cut to `max_norm`.

    None if nothing is predicted.
    """
    tokens = int(predicted_tokens(batch).sum())
    if tokens == 0:
        return None
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = list(torch.autograd.grad(summed_nll(model, batch) / tokens, parameters))
    size = norm(found)
    if max_norm is not None and size > max_norm:
        found = [part * (max_norm / size) for part in found]
    return found


def product(first: Gradient, second: Gradient) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(first, second, strict=True))


def norm(gradient: Gradient) -> float:
    return product(gradient, gradient) ** 0.5


def _plain(values: np.ndarray) -> list[float | None]:
    """For JSON, which has no NaN; `np.array(..., float)` takes it back."""
    return [None if np.isnan(value) else value for value in values.tolist()]


class DoGECallback(SourceReweighting):
    """Alignment of the sources' gradients with those of the probes.

    Args:
        probes: name -> rows.
        probe_rows: of each probe at each step; chosen anew, by the seed and the step alone.
        max_norm: to which each gradient is cut before the products; None: it is not.
    """

    def __init__(
        self,
        sources: Sequence[str],
        file: Path,
        probes: Mapping[str, Dataset],
        *,
        probe_rows: int = 4,
        bregman: float = BREGMAN,
        max_norm: float | None = MAX_NORM,
        seed: int = 0,
    ):
        super().__init__(sources, file)
        if probe_rows < 1 or not bregman > 0:
            raise ValueError(f"probe_rows={probe_rows} must be 1 or more, and bregman={bregman} positive")
        self.probes = {
            name: rows.select_columns([column for column in COLUMNS if column in rows.column_names])
            for name, rows in probes.items()
        }
        self.probe_rows, self.bregman, self.max_norm, self.seed = probe_rows, bregman, max_norm, seed

    def update(self, model: PreTrainedModel, batch: SourceBatch) -> np.ndarray:
        target = self._probe_gradient(model, batch.step)
        products, norms = (
            np.array(self.memory.get(key, [np.nan] * len(self.sources)), float) for key in ("products", "norms")
        )
        for index in batch.source_ids.unique().tolist() if target is not None else []:
            rows = {name: values[batch.source_ids == index] for name, values in batch.inputs.items()}
            found = batch_gradient(model, rows, self.max_norm)
            if found is not None:
                products[index], norms[index] = product(found, target), norm(found)
        self.memory = {"products": _plain(products), "norms": _plain(norms)}
        if np.isnan(norms).all():
            return self.weights
        return doge_update(self.weights, products, norms, batch.learning_rate, self.bregman)

    def _probe_gradient(self, model: PreTrainedModel, step: int) -> Gradient | None:
        """The sum over the probes of the gradients of some rows of each."""
        total: Gradient | None = None
        for number, rows in enumerate(self.probes.values()):
            random = np.random.default_rng([self.seed, step, number])
            chosen = random.choice(len(rows), min(self.probe_rows, len(rows)), replace=False)
            batch = collate(rows.with_format("torch", device=model.device)[np.sort(chosen)])
            found = batch_gradient(model, batch, self.max_norm)
            if found is not None:
                total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        return total


def doge(
    proxy: Proxy,
    folder: Path,
    *,
    seed: int = 0,
    probe_rows: int = 4,
    bregman: float = BREGMAN,
    max_norm: float | None = MAX_NORM,
    stage: Stage | None = None,
) -> RivalWeights:
    """Trains the model, or takes it up at its last checkpoint, and returns the mean weights.

    Args:
        folder: of the model.
        probe_rows: of each probe at each step.
        bregman: mu; max_norm: to which each gradient is cut, None: it is not.
        stage: shows its training steps.

    Raises:
        ValueError: a probe without rows, or a batch is not read whole, see `check_batches`.
    """
    check_proxy(proxy)
    check_batches(proxy.training)
    own = Path(folder) / "reweighted"
    uniform = dict.fromkeys(proxy.sources, 1 / len(proxy.sources))
    run = MixtureRun("reweighted", uniform, seed)
    progress = RunsProgress(stage, proxy, [run], Path(folder))
    callback = DoGECallback(
        list(proxy.sources), own / WEIGHTS_FILE, proxy.tuning_probes,
        probe_rows=probe_rows, bregman=bregman, max_norm=max_norm, seed=seed,
    )  # fmt: skip
    arm = train_mixture(proxy, uniform, seed, own, callbacks=[callback, *progress.callbacks(run)])
    found = read_json(own / WEIGHTS_FILE, "the weights that DoGE found")
    details = {"last_weights": named_weights(proxy, np.array(found["last"])), "reweighted_nll": arm.probe_nll}
    seen = sum(count_tokens(rows) / len(rows) * min(probe_rows, len(rows)) for rows in proxy.tuning_probes.values())
    # Each batch is read twice, for the gradients of its sources and for the step, and the probes' rows at every step.
    tokens = 2 * arm.tokens + round(proxy.training.max_steps * seen)
    return RivalWeights(named_weights(proxy, np.array(found["mean"])), tokens, details)
