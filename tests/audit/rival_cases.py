"""A tiny proxy of three sources, one of which is what the probe asks for, that the tests of all rivals share."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.audit.proxy import Proxy, proportional, tokens_per_source

VOCABULARY = 200
STEPS = {"up": 1, "down": -3}


def build_model(seed: int, **fields) -> MobileLLMForCausalLM:
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return MobileLLMForCausalLM(MobileLLMConfig(**(shape | fields)))


def rows(name: str, count: int, seed: int) -> Dataset:
    """Rows of two documents, of 9 and 7 tokens: counting up, counting down by three, or noise."""
    random = np.random.default_rng([seed, *name.encode()])
    if name == "noise":
        ids = random.integers(3, VOCABULARY, (count, 16))
    else:
        starts = random.integers(0, VOCABULARY - 3, (count, 2))
        places = np.concatenate([np.arange(9), np.arange(7)])
        ids = (np.repeat(starts, (9, 7), axis=1) + STEPS[name] * places) % (VOCABULARY - 3) + 3
    labels = ids.copy()
    labels[:, [0, 9]] = -100
    positions = [[*range(9), *range(7)]] * count
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist(), "position_ids": positions})


def arguments(folder: Path, **options) -> TrainingArguments:
    defaults = dict(
        max_steps=30, per_device_train_batch_size=8, learning_rate=1e-2, lr_scheduler_type="constant", save_steps=10,
        logging_steps=1, logging_nan_inf_filter=False, train_sampling_strategy="sequential",
        remove_unused_columns=False, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **(defaults | options))


def make_proxy(folder: Path, sizes: dict[str, int] | None = None, probe: str = "up", **options) -> Proxy:
    sources = {name: rows(name, count, 0) for name, count in (sizes or {"noise": 100, "up": 100, "down": 100}).items()}
    probes = {probe: rows(probe, 12, 1)}
    arguments_ = arguments(folder, **options)
    return Proxy(build_model, sources, probes, arguments_, tokens_per_source(sources), proportional(sources))


class FakeStage:
    """What a `Stage` was told."""

    def __init__(self):
        self.total, self.reached, self.note = 0, [], ""

    def expect(self, total: int) -> None:
        self.total = total

    def reach(self, completed: int) -> None:
        self.reached.append(completed)

    def say(self, note: str) -> None:
        self.note = note


class Interrupted(Exception):
    pass


class InterruptAt(TrainerCallback):
    """Ends a run by an exception in the middle, as a killed process would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interrupted


class StopAt(TrainerCallback):
    """Ends a run early, as a callback may."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step
