"""What is watched during training: figures taken at regular steps, and a loss that is no number.

    trainer.add_callback(ProbeNLLCallback({"code": code_rows, "math": math_rows}, every=100))
    add_before_trackers(trainer, RankMeCallback(code_rows, every=100))       # W&B, TensorBoard see its figures too

Figures go to the trainer's log history, which is saved with every checkpoint, so they survive a resume. Several
processes share the work and get the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from datasets import Dataset
from transformers import IntervalStrategy, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from mobilellm_hf.nll import COLUMNS, check_predicted, collate, predicted_tokens, summed_nll

PROBE_PREFIX = "probe_nll/"

Batch = dict[str, torch.Tensor]


class PeriodicMonitor(TrainerCallback):
    """Figures of the model before the first step, every `every` steps and after the last.

    They are appended to the log history at once, and asked to be logged: at the training log of the same step they are
    put into `logs` too, where callbacks that come later (progress displays; trackers, after `add_before_trackers`) see
    them. The figures before the first step are in the history only, since nothing is logged there.

    Subclasses implement `measure`. Every process calls it at the same steps.
    """

    def __init__(self, every: int):
        if every < 1:
            raise ValueError(f"every={every} must be a number of steps, 1 or more")
        self.every = every
        self._unlogged: tuple[int, dict[str, float]] | None = None

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """name -> figure."""
        raise NotImplementedError

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self._record(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        last = state.global_step == state.max_steps or control.should_training_stop
        if state.global_step % self.every == 0 or last:
            self._unlogged = (state.global_step, self._record(state, model))
            control.should_log = control.should_log or args.logging_strategy != IntervalStrategy.NO

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._unlogged is not None and logs is not None:
            step, figures = self._unlogged
            self._unlogged = None
            if step == state.global_step:
                logs.update(figures)

    def _record(self, state, model) -> dict[str, float]:
        figures = self.measure(model)
        state.log_history.append({"step": state.global_step, **figures})
        return figures


class ProbeNLLCallback(PeriodicMonitor):
    """Logs the NLL (nats per token) on every probe set, as `probe_nll/<name>`; `probe_history` reads it back.

    Args:
        probes: name -> rows, as `mean_nll` takes them. They are collated once and kept in memory.
        every: steps between two evaluations, besides those before the first step and after the last.
        batch_size: rows of a batch, per process.

    Raises:
        ValueError: at the first evaluation, if a probe has no predicted token.

    Example:
        >>> trainer.add_callback(ProbeNLLCallback({"code": code_rows, "math": math_rows}, every=100))
    """

    def __init__(self, probes: dict[str, Dataset], every: int, batch_size: int = 16):
        super().__init__(every)
        self.probes = probes
        self.batch_size = batch_size
        self._batches: dict[str, list[tuple[Batch, float]]] = {}

    @torch.no_grad()
    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        if not self._batches:
            self._batches = {name: own_batches(rows, self.batch_size) for name, rows in self.probes.items()}
        sums = []
        with evaluation_mode(model):
            for batches in self._batches.values():
                nll = tokens = 0.0
                for batch, weight in batches:
                    on_device = {name: values.to(model.device) for name, values in batch.items()}
                    nll += weight * summed_nll(model, on_device).item()
                    tokens += weight * predicted_tokens(batch).sum().item()
                sums.append((nll, tokens))
        totals = sum_over_processes(torch.tensor(sums, dtype=torch.float64))
        for tokens in totals[:, 1].tolist():
            check_predicted(int(tokens))
        return {PROBE_PREFIX + name: nll / tokens for name, (nll, tokens) in zip(self.probes, totals.tolist())}


def probe_history(log_history: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """probe name -> [(step, NLL), ...] from a trainer's log history."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in log_history:
        for key, value in entry.items():
            if key.startswith(PROBE_PREFIX):
                curves.setdefault(key.removeprefix(PROBE_PREFIX), []).append((entry["step"], value))
    return curves


def add_before_trackers(trainer: Trainer, *callbacks: TrainerCallback) -> None:
    """Adds callbacks in front of those that the trainer has, so that trackers see what they put into the logs."""
    for callback in reversed(callbacks):
        trainer.callback_handler.callbacks.insert(0, callback)


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode, and in its former mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def own_batches(rows: Dataset, batch_size: int) -> list[tuple[Batch, float]]:
    """This process's batches of a data set, collated, on the CPU, each with a weight of 1.

    Every process gets equally many, as models that are sharded over processes need: those that would have one less
    repeat one with a weight of 0. Which rows make a batch does not depend on the number of processes.
    """
    state = PartialState()
    columns = [name for name in COLUMNS if name in rows.column_names]
    rows = rows.select_columns(columns).with_format("torch")
    count = -(-len(rows) // batch_size)
    batches = []
    for turn in range(-(-count // state.num_processes)):
        number = turn * state.num_processes + state.process_index
        start = min(number, count - 1) * batch_size
        batches.append((collate(rows[start : start + batch_size]), float(number < count)))
    return batches


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The sum of a CPU tensor over all processes, in each of them."""
    state = PartialState()
    if state.num_processes == 1:
        return values
    return reduce(values.to(state.device), "sum").cpu()


class NonFiniteLossError(FloatingPointError):
    """The training loss or the gradient norm became NaN or infinite."""


class StopOnNonFiniteLoss(TrainerCallback):
    """Ends training with an error at the first logged loss or gradient norm that is NaN or infinite.

    The Trainer would log 0 in its place and go on (`logging_nan_inf_filter`), and save the ruined weights. Whatever is
    saved must have been logged before, so `save_steps` must be a multiple of `logging_steps`; with `logging_steps=1`
    training stops within the step.

    Raises:
        ValueError: at the start of training, if the arguments would hide a NaN or save it unseen.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if args.logging_nan_inf_filter:
            raise ValueError("StopOnNonFiniteLoss sees no NaN while logging_nan_inf_filter is True: set it to False")
        saves = state.save_steps if args.save_strategy == SaveStrategy.STEPS else state.max_steps
        if args.logging_strategy != IntervalStrategy.STEPS or saves % state.logging_steps:
            raise ValueError(
                f"StopOnNonFiniteLoss sees only what is logged: logging_steps={state.logging_steps} must divide "
                f"the {saves} steps between two checkpoints, or weights could be saved that nobody looked at"
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "grad_norm"):
            if not math.isfinite((logs or {}).get(name, 0.0)):
                raise NonFiniteLossError(
                    f"{name} is {logs[name]} at step {state.global_step}: lower the learning rate "
                    f"({args.learning_rate:g}) or raise warmup_steps, and resume from the last checkpoint in "
                    f"{args.output_dir}"
                )
