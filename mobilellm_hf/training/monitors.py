"""What is watched during training: NLL on each capability's probe set, and a loss that is no number."""

import math

from datasets import Dataset
from transformers import IntervalStrategy, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from mobilellm_hf.nll import mean_nll

PROBE_PREFIX = "probe_nll/"


class ProbeNLLCallback(TrainerCallback):
    """Logs the NLL on every probe set before the first step, every `every` steps and after the last.

    The figures go to the trainer's log history as `probe_nll/<name>`, which is saved with every checkpoint, so that
    they survive a resume; `probe_history` reads them back.

    Example:
        >>> trainer.add_callback(ProbeNLLCallback({"code": code_rows, "math": math_rows}, every=100))
    """

    def __init__(self, probes: dict[str, Dataset], every: int, batch_size: int = 16):
        self.probes = probes
        self.every = every
        self.batch_size = batch_size

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self._record(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._record(state, model)

    def _record(self, state, model) -> None:
        figures = {PROBE_PREFIX + name: mean_nll(model, rows, self.batch_size) for name, rows in self.probes.items()}
        state.log_history.append({"step": state.global_step, **figures})


def probe_history(log_history: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """probe name -> [(step, NLL), ...] from a trainer's log history."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in log_history:
        for key, value in entry.items():
            if key.startswith(PROBE_PREFIX):
                curves.setdefault(key.removeprefix(PROBE_PREFIX), []).append((entry["step"], value))
    return curves


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
