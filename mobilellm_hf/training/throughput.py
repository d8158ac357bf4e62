"""Tokens per second and MFU of a training run, from the time that steps take and nothing else.

    trainer.add_callback(ThroughputCallback(seq_length=2048))       # packed rows of one length
    trainer.add_callback(ThroughputCallback())                      # any rows, with include_num_input_tokens_seen

A step is timed from its first forward to the end of its optimizer step, so evaluation, probes, saving, a new mixture
and waiting for data do not count. On an accelerator the times are those of its own clock (events in its stream): the
host's would end a step when the work is queued, not when it is done, and waiting for the work would slow it down.

Tokens are counted in one of two ways. Packed rows all have `seq_length` tokens, so a step has batch x accumulation x
processes x seq_length of them; that is exact but for a last, smaller batch of an epoch, and costs nothing. Rows of
different lengths can only be counted as they pass, which the Trainer does itself if it is told to
(`include_num_input_tokens_seen="non_padding"`, or "all"), at a gather over all processes for every batch.

FLOPs per token are 6 N + 12 L H Q T (PaLM, 2204.02311, appendix B): N the weights of all matrices that a token is
multiplied with, of a block applied r times r times, the head's too, tied or not, while the look-up of an embedding
costs nothing; L layers, H heads of size Q, T tokens of a row. Attention counts as if it was not causal and documents
of a row saw each other, as is usual, and recomputation (gradient checkpointing) does not count.
"""

from __future__ import annotations

import time

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

# Dense bf16 (fp16 of the T4, which has no bf16), from NVIDIA's data sheets; part of the device's name -> FLOP/s. The
# first that fits counts, so a longer name stands before one that it holds.
PEAK_FLOPS = {
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
}


def flops_per_token(model: PreTrainedModel, seq_length: int) -> float:
    """FLOPs of forward and backward per token, in rows of `seq_length` tokens: 6 N + 12 L H Q T."""
    config = model.config.get_text_config()
    repeats = getattr(config, "layer_repeats", 1)
    head = model.get_output_embeddings()
    weights = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weights += module.in_features * module.out_features * (1 if module is head else repeats)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * seq_length
    return 6 * weights + attention


def device_peak_flops(device: torch.device) -> float | None:
    """The peak of a known GPU in dense bf16, in FLOP/s; None of any other device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if _names(part, name)), None)


def _names(part: str, device_name: str) -> bool:
    """Whether the words of a part are among those of a device's name: "L4" is in "NVIDIA L4", not in "NVIDIA L40"."""
    words = set(device_name.replace("-", " ").split())
    return set(part.split()) <= words


class ThroughputCallback(TrainerCallback):
    """Logs `tokens_per_second` (of all processes together) and `mfu` (of each device, 0 to 1) with each training log.

    Both are averages over the steps since the log before.

    Args:
        seq_length: tokens of a row, if all have equally many. None: the Trainer counts.
        peak_flops: FLOP/s of one device; by default looked up, and without it there is no `mfu`.

    Raises:
        ValueError: at the start of training, if there is no seq_length and the Trainer does not count.
    """

    def __init__(self, seq_length: int | None = None, peak_flops: float | None = None):
        self.seq_length = seq_length
        self.peak_flops = peak_flops

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.seq_length is None and args.include_num_input_tokens_seen == "no":
            raise ValueError(
                "ThroughputCallback cannot count tokens: give it the seq_length of packed rows, or set "
                "include_num_input_tokens_seen to non_padding in the TrainingArguments"
            )
        if self.peak_flops is None:
            self.peak_flops = device_peak_flops(args.device)
        self._events = torch.accelerator.is_available() and args.device.type != "cpu"
        self._started = None
        self._restart(state)

    def _restart(self, state) -> None:
        self._spans = []
        self._tokens_before = state.num_input_tokens_seen

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = self._now()

    def on_optimizer_step(self, args, state, control, **kwargs):
        # Not at the step's end, where other callbacks evaluate, some of them before this one.
        if self._started is not None:
            self._spans.append((self._started, self._now()))
            self._started = None

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if logs is None or "loss" not in logs or not self._spans:
            return
        seconds = sum(self._seconds(*span) for span in self._spans)
        tokens = self._tokens(args, state)
        if seconds > 0 and tokens > 0:
            figures = {"tokens_per_second": tokens / seconds}
            if self.peak_flops:
                length = self.seq_length or self._mean_length(args, state, tokens)
                per_device = figures["tokens_per_second"] / args.world_size
                figures["mfu"] = per_device * flops_per_token(model, length) / self.peak_flops
            logs.update(figures)
            # What is logged was copied into the history before callbacks are called.
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(figures)
        self._restart(state)

    def _tokens(self, args: TrainingArguments, state) -> int:
        """Tokens of all processes in the steps since the last log."""
        if self.seq_length is None:
            return state.num_input_tokens_seen - self._tokens_before
        return len(self._spans) * self._rows_per_step(args, state) * self.seq_length

    def _rows_per_step(self, args: TrainingArguments, state) -> int:
        # The state's, since auto_find_batch_size changes it.
        per_process = state.train_batch_size or args.train_batch_size
        return per_process * args.gradient_accumulation_steps * args.world_size

    def _mean_length(self, args: TrainingArguments, state, tokens: int) -> float:
        return tokens / (len(self._spans) * self._rows_per_step(args, state))

    def _now(self):
        if not self._events:
            return time.perf_counter()
        event = torch.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start, end) -> float:
        if not self._events:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3
