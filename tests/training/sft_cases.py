"""A tiny model, a file of conversations of every kind, and the settings of an SFT run on them."""

import json
from pathlib import Path

import torch

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.data.synthetic_chat import load_synthetic_chat
from mobilellm_hf.data.tokenization import train_tokenizer

ROOT = Path(__file__).parents[2]


def make_model(folder: Path) -> None:
    """A model with a context of 64 tokens and its tokenizer, which has no chat template."""
    texts = [message["content"] for row in load_synthetic_chat(count=50)["messages"] for message in row]
    tokenizer = train_tokenizer(texts, 340, show_progress=False)
    torch.manual_seed(0)
    config = MobileLLMConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    MobileLLMForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def settings(folder: Path) -> dict:
    """What the YAML file says: two synthetic sets, and a file with a row that is empty and one that is too long."""
    rows = [{"q": f"cups {n}?", "a": f"keys {n}"} for n in range(30)]
    rows += [{"q": "cups?", "a": ""}, {"q": "cups?", "a": "keys and " * 100}]
    (folder / "file.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt_column": "q", "response_column": "a", "system": ""}
    return {
        "stage": "general",
        "model": str(folder / "model"),
        "model_name": "tiny",
        "max_position_embeddings": 128,
        "rope_theta_factor": 8.0,
        "sources": [
            {"synthetic": ["addition"], "count": 40, "weight": 0.25},
            {"synthetic": ["copying"], "count": 40, "weight": 0.5},
            {"name": str(folder / "file.jsonl"), **columns, "weight": 0.25},
        ],
        "probes": {"sums": [{"synthetic": ["addition"], "split": "probe", "count": 8}]},
        "max_length": 128,
        "max_steps": 20,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "warmup_steps": 0.1,
        "save_steps": 4,
        "logging_steps": 2,
        "bf16": False,
        "activation_checkpointing": False,
        "use_cpu": True,
    }
