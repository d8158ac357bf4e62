"""Students, teachers and rows that the distillation tests share, and the loss written out from all the logits."""

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM

SHAPE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
STUDENTS = ("mobilellm", "llama")


def build(kind: str, seed: int = 0, **fields) -> torch.nn.Module:
    """A model whose distributions are far from uniform. gemma2 caps its logits."""
    classes = {
        "mobilellm": (MobileLLMForCausalLM, MobileLLMConfig),
        "llama": (LlamaForCausalLM, LlamaConfig),
        "gemma2": (Gemma2ForCausalLM, Gemma2Config),
    }
    model_class, config_class = classes[kind]
    extra = dict(head_dim=8, final_logit_softcapping=2.0) if kind == "gemma2" else {}
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SHAPE, **extra, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model


def build_teacher(kind: str = "llama", **fields) -> torch.nn.Module:
    """Of another width than the students, with other weights."""
    return build(kind, seed=9, **{"hidden_size": 48, **fields})


def packed_rows(count: int, seed: int = 0) -> Dataset:
    """Two documents a row, without labels where one begins and at a few other places: unequal numbers a row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (count, 12), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    labels[:, 5] = -100
    positions = [[*range(5), *range(7)]] * count
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist(), "position_ids": positions})


def padded_rows(count: int, seed: int = 0) -> Dataset:
    """Rows of lengths 5 to 12, padded on the right (even ones) and on the left (odd ones)."""
    generator = torch.Generator().manual_seed(seed)
    columns = {"input_ids": [], "labels": [], "attention_mask": []}
    for number in range(count):
        length = int(torch.randint(5, 13, (), generator=generator))
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        padding = 12 - length
        labels = [-100, *ids[1:]]  # or padding on the left would predict the first token
        for name, values, fill in (
            ("input_ids", ids, 0),
            ("labels", labels, -100),
            ("attention_mask", [1] * length, 0),
        ):
            columns[name].append(values + [fill] * padding if number % 2 == 0 else [fill] * padding + values)
    return Dataset.from_dict(columns)


def arguments(folder, **options) -> TrainingArguments:
    defaults = dict(
        max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1, report_to="none",
        disable_tqdm=True, use_cpu=True, save_strategy="no", learning_rate=0.1, lr_scheduler_type="constant",
        optim="sgd", max_grad_norm=0.0, train_sampling_strategy="sequential",
    )  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def lone_documents(row: dict) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each of a row's documents, without padding: what a model must see, one document at a time."""
    mask = row.get("attention_mask") or [1] * len(row["input_ids"])
    kept = [place for place, one in enumerate(mask) if one]
    ids, labels = ([row[name][place] for place in kept] for name in ("input_ids", "labels"))
    positions = row.get("position_ids") or list(range(len(ids)))
    starts = [place for place, position in enumerate(positions) if position == 0] + [len(ids)]
    return [(ids[a:b], labels[a:b]) for a, b in zip(starts, starts[1:])]


def summed_parts(student, teacher, rows, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, int]:
    """KL, NLL (differentiable sums) and number of predicted tokens, one document at a time from all its logits."""
    kl, nll, tokens = 0.0, 0.0, 0
    for row in rows:
        for ids, labels in lone_documents(row):
            inputs, targets = torch.tensor([ids]), torch.tensor(labels)[1:]
            kept = targets != -100
            logits = student(inputs, use_cache=False).logits[0, :-1][kept]
            with torch.no_grad():
                teacher_logits = teacher(inputs, use_cache=False).logits[0, :-1][kept]
            student_log = (logits / temperature).log_softmax(-1)
            teacher_log = (teacher_logits / temperature).log_softmax(-1)
            kl = kl + (teacher_log.exp() * (teacher_log - student_log)).sum()
            nll = nll + F.cross_entropy(logits, targets[kept], reduction="sum")
            tokens += int(kept.sum())
    return kl, nll, tokens


def distance(value: torch.Tensor, true: torch.Tensor) -> float:
    return ((value.double() - true.double()).norm() / true.double().norm()).item()
