"""A small audit of three sources of made-up words, as a YAML file that a user would write."""

import json
import random
from pathlib import Path

import yaml
from trl import TrlParser

from mobilellm_hf.audit.arguments import AuditArguments, AuditTrainingArguments
from mobilellm_hf.data.tokenization import train_tokenizer

SOURCES = ["code", "math", "noise"]
LETTERS = {"code": "abcdefg", "math": "hijklmn", "noise": "opqrstu"}


def texts(source: str, count: int, seed: int) -> list[str]:
    """Words of a source's own letters; in code and math a letter follows the one before it."""
    chance, letters = random.Random(f"{source}{seed}"), LETTERS[source]
    found = []
    for _ in range(count):
        starts = [chance.randrange(7) for _ in range(40)]
        step = 1 if source != "noise" else 0
        words = ["".join(letters[(start + step * place) % 7] for place in range(4)) for start in starts]
        if source == "noise":
            words = ["".join(chance.choices(letters, k=4)) for _ in starts]
        found.append(" ".join(words))
    return found


def build_project(folder: Path) -> Path:
    """Texts to train on, to tune by and to decide by, a tokenizer, a mixture and audit.yaml; returns the folder."""
    for name, count, seed in (("train", 60, 0), ("tuning", 6, 1), ("final", 6, 2)):
        for source in SOURCES:
            (folder / name).mkdir(exist_ok=True)
            lines = [json.dumps({"text": text}) for text in texts(source, count, seed)]
            (folder / name / f"{source}.jsonl").write_text("\n".join(lines))
    every = [text for source in SOURCES for text in texts(source, 20, 3)]
    train_tokenizer(every, 300, show_progress=False).save_pretrained(folder / "tokenizer")
    shape = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64,
    )  # fmt: skip
    settings = {
        "mixture": f"{folder}/mine.json", "output_dir": f"{folder}/one", "model_config": shape,
        "tokenizer": f"{folder}/tokenizer", "seq_length": 32, "overlap": "allow", "rows_per_probe": 8,
        "sources": [{"name": f"{folder}/train/{source}.jsonl"} for source in SOURCES],
        "tuning_probes": {"code": [{"name": f"{folder}/tuning/code.jsonl"}]},
        "final_probes": {"code": [{"name": f"{folder}/final/code.jsonl"}]},
        "unscored_domains": {"math": [{"name": f"{folder}/final/math.jsonl"}]},
        "arms": ["uniform"], "seeds": [0, 1], "alpha": 0.5, "learning_rates": [2.0e-2, 1.0e-2],
        "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 2.0e-2, "save_steps": 4,
        "logging_steps": 4, "use_cpu": True,
    }  # fmt: skip
    (folder / "mine.json").write_text(json.dumps({"code": 0.8, "math": 0.2}))
    (folder / "audit.yaml").write_text(yaml.safe_dump(settings))
    return folder


def arguments(project: Path, *options: str):
    parser = TrlParser((AuditArguments, AuditTrainingArguments))
    return parser.parse_args_and_config(["--config", str(project / "audit.yaml"), *options])[:2]
