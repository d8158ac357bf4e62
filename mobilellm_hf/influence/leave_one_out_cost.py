"""What leave-one-out will cost on this device, measured before anything is trained."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from mobilellm_hf.training.live_mixture import draws_per_step
from mobilellm_hf.training.monitors import ProbeNLLCallback

TIMED_STEPS, WARM_UP_STEPS = 3, 1


@dataclass(frozen=True)
class MeasuredSpeed:
    """Seconds of a training step, and of a row of a probe."""

    step: float
    probe_row: float


class _StepClock(TrainerCallback):
    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(_now())


def _now() -> float:
    """Seconds, when the device has done its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def measure_speed(
    build_model: Callable[[int], PreTrainedModel], training: TrainingArguments, seq_length: int
) -> MeasuredSpeed:
    """Of the stock Trainer, on 3 steps after 1 warm-up; random tokens stand for data, and nothing is saved."""
    steps, per_step = WARM_UP_STEPS + TIMED_STEPS, draws_per_step(training)
    training, clock = copy.copy(training), _StepClock()
    training.max_steps, training.save_strategy = steps, SaveStrategy.NO
    training.logging_strategy = IntervalStrategy.NO
    model = build_model(0)
    rows = [
        {"input_ids": ids, "labels": ids, "position_ids": torch.arange(seq_length)}
        for ids in torch.randint(model.config.vocab_size, (steps * per_step, seq_length))
    ]
    with tempfile.TemporaryDirectory() as folder:
        training.output_dir = folder
        trainer = Trainer(model, training, train_dataset=rows, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    batch = training.per_device_eval_batch_size
    probe = ProbeNLLCallback({"probe": Dataset.from_list([rows[0]] * batch)}, 1, batch)
    probe.measure(trainer.model)
    start = _now()
    probe.measure(trainer.model)
    step = (clock.times[-1] - clock.times[WARM_UP_STEPS - 1]) / TIMED_STEPS
    return MeasuredSpeed(step, (_now() - start) / batch)


def duration(seconds: float) -> str:
    """25 s, 3.4 min, 51 h"""
    amount, unit = next(
        (seconds / size, unit) for size, unit in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= size or size == 1
    )
    return f"{amount:,.1f} {unit}" if amount < 10 else f"{amount:,.0f} {unit}"
