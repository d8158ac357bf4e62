"""What the command line or the YAML file of an export says."""

from __future__ import annotations

from dataclasses import dataclass, field

from mobilellm_hf.export.quantization import EMBEDDINGS, SCHEMES
from mobilellm_hf.launch import option

CACHE_DTYPES = ("bfloat16", "float32")
MAX_SEQ_LEN = 32_768


@dataclass
class ExportArguments:
    model: str = field(metadata={"help": "folder or Hub id of a mobilellm or llama4_text model with its tokenizer"})
    output: str = field(metadata={"help": "folder that gets model.pte, the tokenizer and the configuration"})
    max_seq_len: int | None = option("positions of the KV cache; by default the model's context, 32,768 at most")
    prefill: int = option("tokens of a prompt that are taken at once; memory grows with it", 512)
    quantize: str = option(f"of Linear layers: {', '.join(SCHEMES)}", "8da4w")
    group_size: int | None = option("inputs that share a scale in 8da4w; by default 128 where it divides, else 32")
    group_fall_back: bool = option("a Linear that the group does not divide gets 8 bits and a scale a row", False)
    embedding: str | None = option(f"{', '.join(EMBEDDINGS)}; by default 4w beside quantized layers, else none")
    embedding_group_size: int | None = option(
        "columns of the embedding that share a scale, 0: a row; by default it is one table with the head it is tied to"
    )
    kv_cache: str = option(f"dtype of keys and values: {' or '.join(CACHE_DTYPES)}", "bfloat16")

    def check(self) -> None:
        """Raises a ValueError for what can be told before anything is loaded; the message names the field."""
        for name in ("max_seq_len", "prefill"):
            if (value := getattr(self, name)) is not None and value < 2:
                raise ValueError(f"{name}={value} must be 2 or more")
        if self.kv_cache not in CACHE_DTYPES:
            raise ValueError(f"kv_cache={self.kv_cache!r} must be {' or '.join(CACHE_DTYPES)}")
