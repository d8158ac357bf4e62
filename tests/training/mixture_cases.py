"""A small model, rows of three sources and a run of the stock Trainer that the tests of live mixtures share."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.data.mixture import MixtureDataset

SHAPE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
)  # fmt: skip
WEIGHTS = {"easy": 0.4, "random": 0.4, "other": 0.2}
CAPABILITIES = ("easy", "other")


def build(kind: str = "mobilellm") -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE))
    return MobileLLMForCausalLM(MobileLLMConfig(**SHAPE))


def token_rows(source: str, count: int, seed: int) -> list[list[int]]:
    """easy: counting up; other: down by three; random: nothing to learn. Probes start at multiples of four."""
    random = np.random.default_rng(seed)
    probe = seed >= 90
    starts = random.choice([number for number in range(3, 64) if (number % 4 == 0) == probe], size=(count, 1))
    steps = {"easy": 1, "other": -3}
    if source == "random":
        return random.integers(3, 64, size=(count, 12)).tolist()
    return ((starts + steps[source] * np.arange(12) - 3) % 61 + 3).tolist()


def rows(sizes: dict[str, int], seed: int = 0) -> Dataset:
    names = [name for name, count in sizes.items() for _ in range(count)]
    ids = [
        row
        for number, (name, count) in enumerate(sizes.items())
        for row in token_rows(name, count, 10 * seed + number)
    ]
    labels = [[-100, *row[1:7], -100, *row[8:]] for row in ids]
    positions = [[*range(7), *range(5)]] * len(ids)
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "position_ids": positions, "source": names})


def probes() -> dict[str, Dataset]:
    return {name: rows({name: 6}, seed=9) for name in CAPABILITIES}


def training_rows() -> Dataset:
    return rows({"easy": 60, "random": 60, "other": 40})


def mixture(draws: int = 160, **options) -> MixtureDataset:
    return MixtureDataset(training_rows(), WEIGHTS, draws, **(dict(block_size=8, max_epochs=100) | options))


def arguments(folder: str | Path, **options) -> TrainingArguments:
    defaults = dict(
        max_steps=20, per_device_train_batch_size=8, logging_steps=1, report_to="none", disable_tqdm=True,
        use_cpu=True, save_steps=5, learning_rate=3e-3, train_sampling_strategy="sequential",
        remove_unused_columns=False, lr_scheduler_type="constant",
    )  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **(defaults | options))


class Reader(TrainerCallback):
    """Notes the first six ids of every row the model trains on; they tell rows apart."""

    def __init__(self):
        self.read: list[list[int]] = []
        self._handle = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model = model.module if hasattr(model, "module") else model
        self._handle = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model, args, kwargs):
        if model.training and "input_ids" in kwargs:
            self.read += kwargs["input_ids"][:, :6].tolist()

    def on_train_end(self, args, state, control, **kwargs):
        self._handle.remove()


class StopAt(TrainerCallback):
    """Ends a run early; what it leaves is what a kill after that step leaves."""

    def __init__(self, step: int | None):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def train(folder, callback, model=None, resume=None, stop_at=None, **options) -> tuple[Trainer, list[list[int]]]:
    reader = Reader()
    model = build() if model is None else model
    callbacks = [callback, reader, StopAt(stop_at)]
    trainer = Trainer(model, arguments(folder, **options), train_dataset=callback.mixture, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, reader.read


def drawn(mixture: MixtureDataset) -> list[list[int]]:
    return [row["input_ids"][:6].tolist() for row in mixture.__getitems__(list(range(len(mixture))))]
