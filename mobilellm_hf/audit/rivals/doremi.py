"""DoReMi (2305.10429): weights that a model which must do well on its worst source would want; no probe is looked at.

    found = doremi(proxy, Path("runs/audit/rivals/doremi"), seed=0)

A reference model is trained on the proportional mix p. A second one reads all sources alike and has its loss weighted
by them: a_i grows where its loss is above the reference's,

    lambda_i = mean over the batch's tokens of source i of max(l(token) - l_ref(token), 0)
    a <- (1 - c) a exp(eta lambda) / Z + c / m                                              eta = 1, c = 1e-3

and the mean of a over all steps is the mixture (Algorithm 1). What the paper leaves open is as in the authors' code: a
step's weights are those after its update, the loss is divided by the weights of the sources that the batch has, and a
source that it lacks keeps its last lambda. Of a source's loss the paper takes the mean over its tokens, as here; the
code takes a weighted mean over all tokens, which differs by chance only where sources are read alike. Several rounds,
each with a reference on the weights of the last, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mobilellm_hf.audit.proxy import MixtureRun, Proxy, train_mixture
from mobilellm_hf.audit.rivals.common import RivalWeights, RunsProgress, check_proxy, named_weights, read_json
from mobilellm_hf.audit.rivals.reweighting import WEIGHTS_FILE, SourceBatch, SourceReweighting, check_batches
from mobilellm_hf.nll import IGNORED_LABEL
from mobilellm_hf.progress import Stage

STEP_SIZE = 1.0
SMOOTHING = 1e-3


def doremi_update(
    weights: np.ndarray, excess: np.ndarray, step_size: float = STEP_SIZE, smoothing: float = SMOOTHING
) -> np.ndarray:
    """(sources,) the weights after a step, given those before and each source's excess loss (lambda)."""
    scores = step_size * excess
    grown = weights * np.exp(scores - scores.max())
    return (1 - smoothing) * grown / grown.sum() + smoothing / len(weights)


class DoReMiCallback(SourceReweighting):
    """Group DRO against a reference model.

    Args:
        reference: a model, or its folder, which is loaded when training begins.
        step_size, smoothing: eta and c.
    """

    def __init__(
        self,
        sources: Sequence[str],
        file: Path,
        reference: PreTrainedModel | Path,
        step_size: float = STEP_SIZE,
        smoothing: float = SMOOTHING,
    ):
        super().__init__(sources, file)
        if not step_size > 0 or not 0 <= smoothing < 1:
            raise ValueError(
                f"step_size={step_size} must be positive, and smoothing={smoothing} at least 0 and below 1"
            )
        self.reference, self.step_size, self.smoothing = reference, step_size, smoothing

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        if not isinstance(self.reference, PreTrainedModel):
            self.reference = AutoModelForCausalLM.from_pretrained(self.reference)
        self.reference.to(self._model.device).eval()

    def update(self, model: PreTrainedModel, batch: SourceBatch) -> np.ndarray:
        above = (batch.nll.detach() - self._reference_nll(batch.inputs)).clamp(min=0).double()
        means, present = batch.mean_by_source(above, len(self.sources))
        last = np.array(self.memory.get("excess", np.zeros(len(self.sources))))
        excess = np.where(present.cpu().numpy(), means.cpu().numpy(), last)
        self.memory["excess"] = excess.tolist()
        return doremi_update(self.weights, excess, self.step_size, self.smoothing)

    @torch.no_grad()
    def _reference_nll(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(rows, tokens - 1)"""
        logits = self.reference(**{name: value for name, value in inputs.items() if name != "labels"}).logits[:, :-1]
        targets = inputs["labels"][:, 1:]
        return torch.nn.functional.cross_entropy(
            logits.float().mT, targets, ignore_index=IGNORED_LABEL, reduction="none"
        )


def doremi(
    proxy: Proxy,
    folder: Path,
    *,
    seed: int = 0,
    step_size: float = STEP_SIZE,
    smoothing: float = SMOOTHING,
    stage: Stage | None = None,
) -> RivalWeights:
    """Trains the reference and the reweighted model, or what is missing, and returns the mean weights.

    Args:
        folder: of the two models; killed ones go on at their last checkpoint.
        seed: of both models, which start alike.
        step_size, smoothing: eta and c.
        stage: shows the training steps of both.

    Raises:
        ValueError: the sources or their shares do not fit, or a batch is not read whole, see `check_batches`.
    """
    check_proxy(proxy, probes=False)
    check_batches(proxy.training)
    folder = Path(folder)
    shares = {name: float(proxy.proportional[name]) for name in proxy.sources}
    uniform = dict.fromkeys(proxy.sources, 1 / len(proxy.sources))
    runs = [MixtureRun("reference", shares, seed), MixtureRun("reweighted", uniform, seed)]
    progress = RunsProgress(stage, proxy, runs, folder)
    reference = train_mixture(
        proxy, shares, seed, folder / "reference", keep_model=True, callbacks=progress.callbacks(runs[0])
    )
    own = folder / "reweighted"
    callback = DoReMiCallback(list(proxy.sources), own / WEIGHTS_FILE, reference.model_folder, step_size, smoothing)
    reweighted = train_mixture(proxy, uniform, seed, own, callbacks=[callback, *progress.callbacks(runs[1])])
    found = read_json(own / WEIGHTS_FILE, "the weights that DoReMi found")
    details = {
        "last_weights": named_weights(proxy, np.array(found["last"])),
        "reference_nll": reference.probe_nll,
        "reweighted_nll": reweighted.probe_nll,
    }
    # The reference has seen, forward, what the second model was trained on.
    tokens = reference.tokens + 2 * reweighted.tokens
    return RivalWeights(named_weights(proxy, np.array(found["mean"])), tokens, details)
