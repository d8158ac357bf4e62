"""A model as small as the kernels of a device allow, and its export."""

import functools
import json
from pathlib import Path

import torch
from rich.console import Console

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.data.chat import attach_chat_template
from mobilellm_hf.data.synthetic_chat import load_synthetic_chat
from mobilellm_hf.data.tokenization import train_tokenizer
from mobilellm_hf.export.arguments import ExportArguments
from mobilellm_hf.export.exporter import run_export

CONTEXT = 128


@functools.cache
def tokenizer():
    texts = [message["content"] for row in load_synthetic_chat(count=50)["messages"] for message in row]
    return attach_chat_template(train_tokenizer(texts, 340, show_progress=False))


def tiny_config(**fields) -> MobileLLMConfig:
    shape = dict(
        vocab_size=352, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT, bos_token_id=tokenizer().bos_token_id,
        eos_token_id=[tokenizer().eos_token_id, tokenizer().convert_tokens_to_ids("<|eot_id|>")],
        pad_token_id=tokenizer().pad_token_id,
    )  # fmt: skip
    return MobileLLMConfig(**{**shape, **fields})


def tiny_model(seed: int = 0, **fields) -> MobileLLMForCausalLM:
    """With weights three times as large as usual, so that logits differ clearly from token to token."""
    torch.manual_seed(seed)
    return MobileLLMForCausalLM(tiny_config(initializer_range=0.06, **fields)).eval()


def save_model(folder: Path, **fields) -> Path:
    tiny_model(**fields).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def export(model: Path, output: Path, **options) -> Path:
    return run_export(ExportArguments(str(model), str(output), **options), Console(quiet=True))


def report(folder: Path) -> dict:
    return json.loads((folder / "export.json").read_text())


@torch.no_grad()
def eager_logits(model: MobileLLMForCausalLM, token_ids: list[int]) -> torch.Tensor:
    """(tokens, vocabulary), all at once and without a cache."""
    return model(torch.tensor([token_ids]), use_cache=False).logits[0].float()


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
