"""FLOPs against those that torch counts, and tokens per second against a known number of tokens and a known time."""

import time

import pytest
import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.training import throughput
from mobilellm_hf.training.throughput import PEAK_FLOPS, ThroughputCallback, flops_per_token

LENGTH = 64
STEP = 0.05


def build(**fields) -> MobileLLMForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return MobileLLMForCausalLM._from_config(MobileLLMConfig(**{**sizes, **fields}), attn_implementation="eager")


@pytest.mark.parametrize("fields", [{}, {"layer_repeats": 2}, {"tie_word_embeddings": False}, {"vocab_size": 4096}])
def test_flops_are_those_that_torch_counts(fields):
    model = build(**fields)
    ids = torch.randint(3, 256, (2, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, return_logits=True).loss.backward()
    assert flops_per_token(model, LENGTH) == pytest.approx(counter.get_total_flops() / ids.numel(), rel=0.03)


def test_flops_of_another_model_and_by_hand():
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                                         num_attention_heads=4, num_key_value_heads=2))  # fmt: skip
    matrices = 3 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) + 32 * 100
    assert flops_per_token(llama, 10) == 6 * matrices + 12 * 3 * 4 * 8 * 10


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA L40", None), ("NVIDIA TITAN V", None),
    ],
)  # fmt: skip
def test_peaks_of_known_devices(monkeypatch, name, peak):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    assert throughput.device_peak_flops(torch.device("cuda")) == peak
    assert throughput.device_peak_flops(torch.device("cpu")) is None
    assert all(1e13 < value < 1e16 for value in PEAK_FLOPS.values())


class Slow(TrainerCallback):
    """What must not count, before and behind the callback that measures; and a forward of a known time, at least."""

    slept = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        began = time.perf_counter()
        time.sleep(4 * STEP)
        Slow.slept += time.perf_counter() - began

    on_save = on_step_end


def slow_forward(module, args, output):
    time.sleep(STEP)


def train(folder, callback, lengths=(8,), model=None, **options):
    ids = [[5] * lengths[n % len(lengths)] for n in range(24)]
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    defaults = dict(max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
                    report_to="none", disable_tqdm=True, save_steps=1, logging_steps=1)  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    model = model or build(num_hidden_layers=1)
    model.register_forward_hook(slow_forward)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Slow(), callback, Slow()])
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], model


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_tokens_per_second_count_steps_and_nothing_else(tmp_path, logging_steps):
    began, slept = time.perf_counter(), Slow.slept
    logged, model = train(tmp_path, ThroughputCallback(8, peak_flops=1e9), logging_steps=logging_steps)
    working = time.perf_counter() - began - (Slow.slept - slept)
    assert len(logged) == 3 // logging_steps
    tokens = 2 * 2 * 8  # of a step: two forwards, in which two rows of eight tokens pass
    assert sum(logging_steps * tokens / entry["tokens_per_second"] for entry in logged) < working
    for entry in logged:
        assert entry["tokens_per_second"] < tokens / (2 * STEP)
        assert entry["mfu"] == pytest.approx(entry["tokens_per_second"] * flops_per_token(model, 8) / 1e9)


def test_the_trainers_own_count(tmp_path):
    packed, _ = train(tmp_path / "a", ThroughputCallback(8))
    counted, _ = train(tmp_path / "b", ThroughputCallback(), include_num_input_tokens_seen="all", lengths=(8,))
    assert "mfu" not in packed[0]  # nobody knows the peak of this CPU
    assert counted[-1]["tokens_per_second"] == pytest.approx(packed[-1]["tokens_per_second"], rel=0.4)
    with pytest.raises(
        ValueError, match="cannot count tokens: give it the seq_length .* include_num_input_tokens_seen"
    ):
        train(tmp_path / "c", ThroughputCallback())


def test_a_resumed_run_starts_counting_anew(tmp_path):
    options = dict(include_num_input_tokens_seen="all", save_steps=2)
    train(tmp_path, ThroughputCallback(), **options, max_steps=2)
    ids = [[5] * 8 for _ in range(24)]
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, use_cpu=True,
                                  gradient_accumulation_steps=2, report_to="none", disable_tqdm=True, logging_steps=1,
                                  include_num_input_tokens_seen="all")  # fmt: skip
    model = build(num_hidden_layers=1)
    model.register_forward_hook(slow_forward)
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[ThroughputCallback()])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["step"] == 3 and last["tokens_per_second"] < 2 * 2 * 8 / (2 * STEP)
