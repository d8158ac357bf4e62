"""MixMin (2502.10510): a model of each source alone, and the mixture of their predictions that suits the probes best.

    found = mixmin(proxy, Path("runs/audit/rivals/mixmin"), seed=0)
    found.details["optimality_gap"]             # what other weights could gain at most, nats per token

The weights minimise -mean_x (1/|x|) log sum_k w_k p_k(x): x are the documents of the probes, |x| their predicted
tokens, p_k(x) the probability that the model of source k gives all of x. Were the models as good as their data allow,
that would be the loss of a model trained on the mixture; and it is convex, so the best weights can be had exactly.

The authors' code descends by w <- w exp(-gradient) / Z, 100 times or until no entry of the gradient is above 1e-4. But
the gradient is a mean over 1/|x|: with documents of a thousand tokens those steps of size 1 end far from the optimum.
Here each step is as large as still lowers the loss (see `simplex.py`), and `optimality_gap` says what is left to gain.
Several probes weigh alike, each by the mean over its documents. The paper caps no repetition; a source that cannot
give a whole run within `max_epochs` trains its model for fewer steps.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from mobilellm_hf.audit.proxy import MixtureRun, Proxy, train_mixtures
from mobilellm_hf.audit.rivals.common import (
    RivalWeights,
    RunsProgress,
    check_proxy,
    named_weights,
    probe_tokens,
)
from mobilellm_hf.audit.rivals.simplex import Minimum, minimise
from mobilellm_hf.influence.leave_one_out import BLOCK_SIZE, lock
from mobilellm_hf.nll import IGNORED_LABEL, evaluation_batches
from mobilellm_hf.progress import Stage
from mobilellm_hf.training.live_mixture import draws_per_step
from mobilellm_hf.workspace import write_whole

MAX_STEPS = 100
SCORES = "log_probs.npz"


@torch.no_grad()
def document_log_probs(model: PreTrainedModel, rows: Dataset, batch_size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """The log-probability of each document, and how many tokens of it are predicted.

    Args:
        rows: as for `mean_nll`; where `position_ids` start again, another document begins.

    Returns:
        (documents,) float64 in nats, and (documents,) int64; documents that predict nothing are left out.
    """
    found, lengths = [], []
    for batch, _ in evaluation_batches(model, rows, batch_size):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits, targets = model(**inputs, use_cache=False).logits[:, :-1].float(), batch["labels"][:, 1:]
        nll = torch.nn.functional.cross_entropy(logits.mT, targets, ignore_index=IGNORED_LABEL, reduction="none")
        starts = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        starts[:, 0] = True
        if "position_ids" in batch:
            starts |= batch["position_ids"] == 0
        document = (starts.flatten().cumsum(0) - 1).view(starts.shape)[:, 1:].flatten()
        sums = torch.zeros(2, int(starts.sum()), dtype=torch.float64, device=nll.device)
        sums[0].index_add_(0, document, -nll.flatten().double())
        sums[1].index_add_(0, document, (targets != IGNORED_LABEL).flatten().double())
        log_probs, counts = sums[:, sums[1] > 0].cpu().numpy()
        found.append(log_probs)
        lengths.append(counts.astype(np.int64))
    return np.concatenate(found), np.concatenate(lengths)


def best_ensemble(
    log_probs: Mapping[str, np.ndarray], lengths: Mapping[str, np.ndarray], max_steps: int = MAX_STEPS
) -> Minimum:
    """The weights of the least -mean_x (1/|x|) log sum_k w_k p_k(x), the mean over the probes of their means.

    Args:
        log_probs: probe -> (models, documents).
        lengths: probe -> (documents,) predicted tokens.
    """
    scores = np.concatenate(list(log_probs.values()), axis=1)
    factors = np.concatenate([1 / (len(lengths) * len(counts) * counts) for counts in lengths.values()])

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mixed = np.logaddexp.reduce(np.log(np.maximum(weights, 1e-300))[:, None] + scores, axis=0)
        return -float(factors @ mixed), -np.exp(scores - mixed) @ factors

    models = len(scores)
    return minimise(objective, np.full(models, 1 / models), max_steps=max_steps)


def mixmin(
    proxy: Proxy,
    folder: Path,
    *,
    seed: int = 0,
    max_steps: int = MAX_STEPS,
    stage: Stage | None = None,
) -> RivalWeights:
    """Trains a model of each source, or what is missing, and finds the mixture; processes share the models.

    Args:
        folder: of the models. Each is deleted once the probes' documents are scored, which stay in `log_probs.npz`.
        max_steps: of the minimisation.
        stage: shows the training steps of the models.

    Raises:
        ValueError: a probe without rows, or a source of too few rows to train on.
    """
    check_proxy(proxy)
    folder = Path(folder)
    runs = [
        MixtureRun(f"only-{source}", {source: 1.0}, seed, steps=steps_within_cap(proxy, source))
        for source in proxy.sources
    ]
    progress = RunsProgress(stage, proxy, runs, folder)
    arms = train_mixtures(proxy, runs, folder, keep_model=True, callbacks=progress.callbacks, on_wait=progress.on_wait)
    scores = [_scores(proxy, folder / run.name) for run in runs]
    lengths = {name: scores[0][f"lengths/{name}"] for name in proxy.tuning_probes}
    log_probs = {name: np.stack([score[f"log_probs/{name}"] for score in scores]) for name in proxy.tuning_probes}
    found = best_ensemble(log_probs, lengths, max_steps)
    details = {
        "ensemble_nll": found.value,
        "optimality_gap": found.gap,
        "descent_steps": found.steps,
        "training_steps": {source: run.steps for source, run in zip(proxy.sources, runs, strict=True)},
        "nll_of_one_source": {source: arm.probe_nll for source, arm in zip(proxy.sources, arms, strict=True)},
    }
    tokens = sum(arm.tokens for arm in arms) + len(arms) * probe_tokens(proxy)
    return RivalWeights(named_weights(proxy, found.weights), tokens, details)


def steps_within_cap(proxy: Proxy, source: str) -> int:
    """Steps of a model that reads one source alone: the proxy's, or as many as `max_epochs` passes over it give.

    Raises:
        ValueError: not one.
    """
    rows, per_step = len(proxy.sources[source]), draws_per_step(proxy.training)
    # A mixture is laid out in whole blocks.
    draws = math.floor(proxy.max_epochs * rows) // BLOCK_SIZE * BLOCK_SIZE
    if draws < per_step:
        raise ValueError(
            f"the {rows} rows of {source} do not suffice to train a model on {source} alone: read "
            f"{proxy.max_epochs:g} times they are fewer than a batch of {per_step} (and a block of {BLOCK_SIZE})"
        )
    return min(proxy.training.max_steps, draws // per_step)


def _scores(proxy: Proxy, folder: Path) -> dict[str, np.ndarray]:
    """What the model of a finished run says of the probes' documents; it is taken once, and the model then deleted."""
    file, model_folder = folder / SCORES, folder / "model"
    with lock(folder / "lock"):
        if not file.exists():
            if not model_folder.exists():
                raise ValueError(f"{model_folder} is missing: delete {folder}, and the model is trained again")
            model = AutoModelForCausalLM.from_pretrained(model_folder).to(proxy.training.device)
            arrays = {}
            for name, rows in proxy.tuning_probes.items():
                found = document_log_probs(model, rows, proxy.training.per_device_eval_batch_size)
                arrays[f"log_probs/{name}"], arrays[f"lengths/{name}"] = found
            write_whole(file, lambda path: _save(path, arrays))
        shutil.rmtree(model_folder, ignore_errors=True)
    with np.load(file) as found:
        return dict(found)


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as stream:  # `np.savez` would give a path another ending
        np.savez(stream, **arrays)
