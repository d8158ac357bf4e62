"""What a `MixtureDataset` needs of a training run: its state in every checkpoint, and the loss of each source.

    mixture = MixtureDataset(rows, weights, num_draws=max_steps * 64)
    arguments = TrainingArguments(..., train_sampling_strategy="sequential", remove_unused_columns=False)
    Trainer(model, arguments, train_dataset=mixture, callbacks=[MixtureCallback(mixture)])

The state goes into `trainer_state.json`, which the Trainer writes last, so a checkpoint has it or is none.
"""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments

from mobilellm_hf.data.mixture import MixtureDataset
from mobilellm_hf.modeling import MobileLLMForCausalLM
from mobilellm_hf.nll import IGNORED_LABEL
from mobilellm_hf.training.row_ids import RowIds

logger = logging.getLogger(__name__)

STATE_KEY = "mobilellm_hf.mixture"
# Batches that are on their way at the end of a step: each worker's, and one that accelerate looks ahead.
LOOKAHEAD = 2


class MixtureCallback(TrainerCallback):
    """Saves and restores the mixture, checks that it is read as it is meant to be, and logs what it gives.

    Logged with every training loss: `mixture/<source>`, the share of the tokens by which the last step was drawn, and
    `loss/<source>`, the mean NLL (nats per token) of its tokens since the last log, over all ranks. The latter needs
    `remove_unused_columns=False`; a model other than ours pays for it with a second softmax over its logits.

    Args:
        mixture: the Trainer's `train_dataset`.
        delay_steps: a change of the mixture applies so many steps after it was decided. It must cover the batches
            that workers have fetched ahead; one number for any count of workers keeps the order the same.
        source_loss: whether to log the loss of each source.
    """

    def __init__(self, mixture: MixtureDataset, delay_steps: int = 16, source_loss: bool = True):
        if delay_steps < 1:
            raise ValueError(f"delay_steps={delay_steps} must be positive")
        self.mixture, self.delay_steps, self.source_loss = mixture, delay_steps, source_loss
        self._losses: SourceLosses | None = None

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        self._check_reading(args, state, train_dataloader)
        if self.mixture.keep_folder is None:
            self.mixture.keep_folder = Path(args.output_dir) / "mixture"
        if state.global_step > 0:
            self._restore(args, state)
        else:
            self.mixture.restart()
        self._store(state)
        self._detach()
        if self.source_loss and args.remove_unused_columns:
            logger.warning("no loss per source: the Trainer drops what it needs unless remove_unused_columns=False")
        self.mixture.emit_ids = not args.remove_unused_columns
        if self.mixture.emit_ids:
            self._losses = SourceLosses(unwrap(model), self.mixture, self.source_loss)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "loss" not in logs:
            return
        weights = self.mixture.weights_at(state.global_step * draws_per_step(args) - 1)
        figures = {f"mixture/{name}": weight for name, weight in weights.items()}
        if self._losses is not None and self.source_loss:
            figures |= {f"loss/{name}": value for name, value in self._losses.take().items()}
        add_figures(state, logs, figures)

    def on_train_end(self, args, state, control, **kwargs):
        self._detach()

    def _detach(self) -> None:
        if self._losses is not None:
            self._losses.detach()
            self._losses = None

    def _store(self, state: TrainerState) -> None:
        state.stateful_callbacks[STATE_KEY] = self.mixture.state_dict()

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        saved = state.stateful_callbacks.get(STATE_KEY)
        if saved is None:
            raise ValueError(
                f"the checkpoint of step {state.global_step} was trained without this mixture: load its weights with "
                "from_pretrained and start a new run"
            )
        self.mixture.load_state_dict(saved)

    def _check_reading(self, args: TrainingArguments, state: TrainerState, dataloader: DataLoader) -> None:
        """Raises a ValueError unless draw i is the i-th row that is trained on, and no draw is read twice."""
        if getattr(dataloader, "dataset", None) is not self.mixture:
            raise ValueError("the callback's mixture is not the Trainer's train_dataset")
        if args.train_sampling_strategy != "sequential":
            raise ValueError(
                f"a mixture is read in order: set train_sampling_strategy='sequential', not "
                f"{args.train_sampling_strategy!r}"
            )
        if args.ignore_data_skip:
            raise ValueError("with ignore_data_skip=True a resumed run would read the mixture from the start again")
        if args.accelerator_config.split_batches:
            raise ValueError("accelerator_config: split_batches=True is not supported with a mixture")
        per_step = draws_per_step(args)
        if state.max_steps * per_step > len(self.mixture):
            raise ValueError(
                f"{state.max_steps} steps of {per_step} rows need a mixture of "
                f"num_draws={state.max_steps * per_step}, not {len(self.mixture)}"
            )
        workers = args.dataloader_num_workers
        ahead = LOOKAHEAD + workers * (args.dataloader_prefetch_factor or 2) * (workers > 0)
        if ahead > self.delay_steps * args.gradient_accumulation_steps:
            raise ValueError(
                f"{workers} workers fetch {ahead} batches ahead, more than delay_steps={self.delay_steps} covers: "
                f"set delay_steps={-(-ahead // args.gradient_accumulation_steps)} or use fewer workers"
            )


def draws_per_step(args: TrainingArguments) -> int:
    """Rows of an optimizer step, over all ranks."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def add_figures(state: TrainerState, logs: dict[str, float], figures: dict[str, float]) -> None:
    """Into the log event at hand: for the callbacks that come later, and for the history that checkpoints keep."""
    logs.update(figures)
    if state.log_history:
        state.log_history[-1].update(figures)


def unwrap(model: torch.nn.Module) -> PreTrainedModel:
    return model.module if hasattr(model, "module") else model


class SourceLosses:
    """Sums each source's NLL while a model trains; hooks on its forward.

    Args:
        model: the unwrapped student. Our own class leaves each token's NLL as it computes its loss; of another the
            logits are looked at again.
        mixture: whose rows come with `source_id` and `row_id`.
        record: if not, the two are only taken out of the model's arguments.
    """

    def __init__(self, model: PreTrainedModel, mixture: MixtureDataset, record: bool):
        self.names, self.record = mixture.sources, record
        self.source_ids = self._buffer = None
        self._sums = torch.zeros(2, len(self.names), dtype=torch.float64)
        inner = next((module for module in model.modules() if isinstance(module, MobileLLMForCausalLM)), None)
        self._inner = inner
        self._row_ids = RowIds.attach(model)  # which takes that key out
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._row_ids.detach()

    def _before(self, module, args, kwargs) -> tuple[Any, Any]:
        self.source_ids, self._buffer = kwargs.pop("source_id", None), None
        labels = kwargs.get("labels")
        watched = self.record and self.source_ids is not None and labels is not None and torch.is_grad_enabled()
        if not watched:
            self.source_ids = None
        elif self._inner is not None and self._inner.training and not self._inner.loss_needs_logits():
            self._buffer = torch.zeros(labels.shape, device=labels.device)
            kwargs["token_nll"] = self._buffer
        return args, kwargs

    @torch.no_grad()
    def _after(self, module, args, kwargs, outputs) -> None:
        if self.source_ids is None:
            return
        labels = kwargs["labels"][:, 1:]
        kept = labels != IGNORED_LABEL
        nll = self._nll_of(outputs.logits, labels) if self._buffer is None else self._buffer.sum(1)
        self._sums = self._sums.to(labels.device)
        self._sums[0].index_add_(0, self.source_ids, nll.double())
        self._sums[1].index_add_(0, self.source_ids, kept.sum(1).double())
        self.source_ids = self._buffer = None

    def _nll_of(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(rows,) summed NLL, a row at a time: of full logits, another fp32 copy would not fit."""
        rows = [
            torch.nn.functional.cross_entropy(
                row.float(), targets.to(row.device), ignore_index=IGNORED_LABEL, reduction="sum"
            )
            for row, targets in zip(logits[:, :-1], labels, strict=True)
        ]
        return torch.stack(rows)

    def take(self) -> dict[str, float]:
        """source -> mean NLL per token since the last call, over all ranks; sources that gave no token are absent."""
        sums, self._sums = self._sums.clone(), torch.zeros_like(self._sums)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        total, tokens = sums.tolist()
        return {name: value / count for name, value, count in zip(self.names, total, tokens, strict=True) if count > 0}
