"""Models and rows that the influence tests share, and the slow truth: every sample's own gradient, by autograd."""

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM

SHAPE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
)  # fmt: skip


def build(kind: str = "mobilellm", **fields) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = SHAPE | fields
    model = {
        "mobilellm": lambda: MobileLLMForCausalLM(MobileLLMConfig(**shape)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape)),
        "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**shape, attention_bias=True, mlp_bias=True)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8)),
    }[kind]()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # or a norm's gradient would be that of a constant, and no bias be seen
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def rows(count: int, seed: int, packed: bool = True) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (count, 16), generator=generator)
    labels = ids.clone()
    labels[:, 5:9] = -100
    labels[0] = -100  # a sample that predicts nothing weighs nothing
    columns = {"input_ids": ids.tolist(), "labels": labels.tolist(), "source": ["s"] * count}
    if packed:
        columns["position_ids"] = [[*range(7), *range(9)]] * count
    return Dataset.from_dict(columns)


def ragged_rows(lengths: list[int], seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def sample_gradients(model: torch.nn.Module, dataset: Dataset) -> list[dict[str, torch.Tensor]]:
    """Each row's fp64 gradient of its mean NLL, from full logits, one row at a time."""
    model, gradients = model.double().eval(), []
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for row in dataset.with_format("torch"):
        inputs = {key: row[key][None] for key in ("input_ids", "position_ids", "attention_mask") if key in row}
        logits, targets = model(**inputs, use_cache=False).logits[0, :-1], row["labels"][1:]
        kept = targets != -100
        nll = -logits.double().log_softmax(-1)[kept].gather(-1, targets[kept][:, None]).sum() / max(1, kept.sum())
        gradients.append(dict(zip(parameters, torch.autograd.grad(nll, list(parameters.values())), strict=True)))
    return gradients


def predicting(dataset: Dataset) -> Dataset:
    return dataset.filter(lambda row: any(label != -100 for label in row["labels"][1:]))


def probe_gradient(model: torch.nn.Module, dataset: Dataset) -> dict[str, torch.Tensor]:
    """The mean over the samples that predict anything."""
    gradients = sample_gradients(model, predicting(dataset))
    return {name: sum(gradient[name] for gradient in gradients) / len(gradients) for name in gradients[0]}


def brute_force_scores(model: torch.nn.Module, dataset: Dataset, directions: list[dict]) -> torch.Tensor:
    """(N, C) inner products in fp64 over the parameters that the directions have."""
    gradients = sample_gradients(model, dataset)
    return torch.tensor(
        [[sum((gradient[name] * d[name]).sum() for name in d) for d in directions] for gradient in gradients],
        dtype=torch.float64,
    )


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()
