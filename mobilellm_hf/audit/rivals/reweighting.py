"""A loss that is weighted by source while a model trains, under the stock Trainer; its weights change at every step.

    class Mine(SourceReweighting):
        def update(self, model, batch):             # before the loss of a step is formed
            return new_weights                      # (sources,), shares

    train_mixture(proxy, uniform, seed, folder, callbacks=[Mine(list(proxy.sources), folder / "weights.json")])

The loss is sum_i a_i L_i / sum_i a_i, L_i the mean NLL of the batch's tokens of source i, over the sources that the
batch has. What the method finds is the mean of the weights over all steps. The weights and their sum go into
`trainer_state.json`, which the Trainer writes last, so a run that is killed goes on as if it had not been.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from mobilellm_hf.nll import COLUMNS, IGNORED_LABEL
from mobilellm_hf.training.live_mixture import add_figures, unwrap
from mobilellm_hf.workspace import write_whole

STATE_KEY = "mobilellm_hf.audit.reweighting"
WEIGHTS_FILE = "weights.json"


@dataclass(frozen=True)
class SourceBatch:
    """A batch in training.

    Attributes:
        inputs: `input_ids`, `labels` and what else the rows have, (rows, tokens) each.
        source_ids: (rows,) int64, the number of each row's source.
        nll: (rows, tokens - 1) of each next token, with its graph; 0 where nothing is predicted.
        predicted: (rows, tokens - 1) bool.
        step, learning_rate: steps that are finished, and the rate of this one.
    """

    inputs: dict[str, torch.Tensor]
    source_ids: torch.Tensor
    nll: torch.Tensor
    predicted: torch.Tensor
    step: int
    learning_rate: float

    def mean_by_source(self, values: torch.Tensor, sources: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(sources,) mean of (rows, tokens - 1) values over the predicted tokens of each, and which of them have any.

        A source without a token has the mean 0.
        """
        sums, tokens = values.new_zeros(sources), values.new_zeros(sources)
        sums = sums.index_add(0, self.source_ids, (values * self.predicted).sum(1))
        tokens = tokens.index_add(0, self.source_ids, self.predicted.sum(1).to(values.dtype))
        return sums / tokens.clamp(min=1), tokens > 0


def check_batches(training: TrainingArguments) -> None:
    """Raises a ValueError unless each step has one batch, which one device reads: it is weighed as a whole."""
    for field, count in (
        ("gradient_accumulation_steps", training.gradient_accumulation_steps),
        ("processes that train one model", training.world_size),
        ("GPUs of a process (see CUDA_VISIBLE_DEVICES)", training.n_gpu),
    ):
        if count > 1:
            raise ValueError(f"{field}: {count}, but DoReMi and DoGE weigh each batch anew and need it whole: set 1")


class SourceReweighting(TrainerCallback):
    """Puts the weighted loss in the place of the model's own; subclasses implement `update`.

    Args:
        sources: their names, in the order of the mixture that the Trainer reads.
        file: gets the weights when the last step is done.

    Attributes:
        weights: (sources,) float64, of the last step; at first all equal.
        memory: what a subclass must remember from step to step, as JSON values; saved with every checkpoint.

    Raises:
        ValueError: at the start of training, if `check_batches` finds fault or the checkpoint has no weights.
    """

    def __init__(self, sources: Sequence[str], file: Path):
        self.sources, self.file = list(sources), Path(file)
        self._handles: list[Any] = []
        self._forget()

    def _forget(self) -> None:
        self.weights = np.full(len(self.sources), 1 / len(self.sources))
        self.memory: dict[str, Any] = {}
        self._sum, self._steps = np.zeros(len(self.sources)), 0
        self._pending: dict[str, torch.Tensor] | None = None

    def update(self, model: PreTrainedModel, batch: SourceBatch) -> np.ndarray:
        """(sources,) the weights of this batch's loss, shares."""
        raise NotImplementedError

    # The Trainer's events

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        check_batches(args)
        self._forget()
        if state.global_step > 0:
            self._restore(state)
        self._store(state)
        self._detach()
        self._model = unwrap(model)
        self._handles = [
            # First of all: the number of a row's source is taken out by the hook that the mixture has there.
            self._model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            self._model.register_forward_hook(self._after),
        ]

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        self._step, self._learning_rate = state.global_step, float(lr_scheduler.get_last_lr()[0])

    def on_step_end(self, args, state, control, **kwargs):
        self._store(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and "loss" in logs:
            named = zip(self.sources, self.weights.tolist(), strict=True)
            add_figures(state, logs, {f"loss_weight/{name}": weight for name, weight in named})

    def on_train_end(self, args, state, control, **kwargs):
        self._detach()
        if state.global_step >= state.max_steps:
            found = {"mean": (self._sum / self._steps).tolist(), "last": self.weights.tolist()}
            write_whole(self.file, lambda path: path.write_text(json.dumps({"sources": self.sources} | found)))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # The loss

    def _before(self, model, args, kwargs) -> tuple[tuple, dict[str, Any]]:
        self._pending = None
        if model.training and torch.is_grad_enabled() and "source_id" in kwargs:
            kwargs = dict(kwargs)
            self._pending = {name: kwargs[name] for name in (*COLUMNS, "source_id") if kwargs.get(name) is not None}
            del kwargs["labels"]  # so that the model gives logits, and no loss of its own
        return args, kwargs

    def _after(self, model, args, outputs) -> Any:
        if self._pending is None:
            return outputs
        inputs, self._pending = self._pending, None
        source_ids, targets = inputs.pop("source_id"), inputs["labels"][:, 1:]
        logits = outputs.logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float))
        nll = torch.nn.functional.cross_entropy(logits.mT, targets, ignore_index=IGNORED_LABEL, reduction="none")
        batch = SourceBatch(inputs, source_ids, nll, targets != IGNORED_LABEL, self._step, self._learning_rate)
        self.weights = self.update(model, batch)
        self._sum += self.weights
        self._steps += 1
        losses, present = batch.mean_by_source(nll, len(self.sources))
        weights = torch.tensor(self.weights, dtype=losses.dtype, device=losses.device) * present
        outputs["loss"] = (weights * losses).sum() / weights.sum()
        return outputs

    # State

    def _store(self, state) -> None:
        state.stateful_callbacks[STATE_KEY] = {
            "sources": self.sources,
            "weights": self.weights.tolist(),
            "sum": self._sum.tolist(),
            "steps": self._steps,
            "memory": self.memory,
        }

    def _restore(self, state) -> None:
        saved = state.stateful_callbacks.get(STATE_KEY)
        if saved is None or saved["sources"] != self.sources:
            raise ValueError(
                f"the checkpoint of step {state.global_step} was not reweighted over the sources "
                f"{', '.join(self.sources)}: delete the run's folder to start again"
            )
        self.weights, self._sum = np.array(saved["weights"]), np.array(saved["sum"])
        self._steps, self.memory = saved["steps"], saved["memory"]
