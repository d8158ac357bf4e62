"""Before anything imports huggingface_hub or tokenizers: the tests touch no network and fork no tokenizer threads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
