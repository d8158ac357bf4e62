"""Text of three sources, a tokenizer and YAML files for tiny stages, made on the spot."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import yaml

from mobilellm_hf.data.tokenization import train_tokenizer

ROOT = Path(__file__).parents[2]
WORDS = {
    "code": "def return self value for index in range list print if else name import".split(),
    "math": "the sum of three and four is seven equals plus minus times two five".split(),
    "noise": "qx zv kw jj xx qz vw kk zz wq".split(),
}


def sentence(source: str, chance: random.Random) -> str:
    """code and math have an order that can be learnt; noise has none."""
    words, start = WORDS[source], chance.randrange(20)
    if source == "noise":
        return " ".join(chance.choice(words) for _ in range(60))
    return " ".join(words[(start + step) % len(words)] for step in range(60)) + f" {chance.randrange(10_000)}"


def make_project(folder: Path) -> Path:
    """texts/*.jsonl, probes/*.jsonl, a tokenizer, and the YAML files of a pre-training and a mid-training."""
    chance = random.Random(0)
    for split, count in (("texts", 120), ("probes", 12)):
        (folder / split).mkdir(parents=True)
        for source in WORDS:
            lines = [json.dumps({"text": sentence(source, chance)}) for _ in range(count)]
            (folder / split / f"{source}.jsonl").write_text("\n".join(lines))
    texts = [sentence(source, chance) for source in WORDS for _ in range(30)]
    train_tokenizer(texts, 320, show_progress=False).save_pretrained(folder / "tokenizer")
    common = {
        "sources": [{"name": f"{folder}/texts/{source}.jsonl", "weight": 1 / 3} for source in WORDS],
        "probes": {source: [{"name": f"{folder}/probes/{source}.jsonl"}] for source in ("code", "math")},
        "seq_length": 32,
        "max_steps": 24,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "save_steps": 6,
        "logging_steps": 2,
        "use_cpu": True,
        "monitor_every": 6,
        "block_size": 16,
        "max_epochs": 100,
        "delay_steps": 2,
        "model_name": "tiny",
    }
    shape = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64,
    )  # fmt: skip
    pretrain = common | {
        "stage": "pretrain", "tokenizer": f"{folder}/tokenizer", "model_config": shape,
        "output_dir": f"{folder}/pretrain", "warmup_steps": 2,
    }  # fmt: skip
    midtrain = common | {
        "model": f"{folder}/pretrain/tiny-pretrain", "output_dir": f"{folder}/midtrain", "resample_every": 6,
        "teacher": f"{folder}/pretrain/tiny-pretrain", "teacher_dtype": "float32", "candidates_per_source": 20,
        "allow_overlap": True,
    }  # fmt: skip
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(pretrain))
    (folder / "midtrain.yaml").write_text(yaml.safe_dump(midtrain))
    return folder


def command(recipe: str, config: Path, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), "--config", str(config), *options]


def run(recipe: str, config: Path, *options: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(recipe, config, *options), capture_output=True, text=True, timeout=300, env=environment
    )
