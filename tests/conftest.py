"""Before anything imports huggingface_hub or tokenizers: the tests touch no network and fork no tokenizer threads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# On AMD's processors MKL rounds sums otherwise where a tensor lies elsewhere in memory, and tests compare to the bit.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
