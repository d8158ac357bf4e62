"""The model that is evaluated, as lm-eval and as the sampler want it.

    evaluated = load_model("runs/sft/MobileLLM-R1-140M", batch_size=None)
    evaluated.lm                                # an lm-eval LM: likelihoods, greedy completions
    evaluated.sampler, evaluated.tokenizer      # for `sampled_tasks`

Another kind of model takes part by an `Evaluated` of its own, with an lm-eval `LM`. It says what it answers through
`lm.cache_hook.add_partial`, as all of lm-eval's models do.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from huggingface_hub import try_to_load_from_cache
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from mobilellm_hf.curation.scoring import load_named, model_identity
from mobilellm_hf.data.tokenization import check_tokenizer
from mobilellm_hf.evaluation.samplers import CompletionSampler, ModelSampler

MOST_ROWS = 64
# A CPU does likelihoods fastest in batches that its caches hold.
CPU_TOKENS = 1_024
# Of the memory that is free, what a batch may take: on a CPU nothing says when it was too much.
CPU_SHARE, ACCELERATOR_SHARE = 0.25, 0.8


@dataclass
class Evaluated:
    """A model and all that tells it from others.

    Attributes:
        name: folder or Hub id.
        identity: changes with the weights.
        context: tokens of prompt and completion together.
        sampler: that sampled tasks ask; None where there is but an LM, which then does lm-eval's tasks only.
        settings: what else decides its answers, as JSON.
    """

    name: str
    identity: str
    parameters: int
    context: int
    lm: LM
    sampler: CompletionSampler | None
    tokenizer: PreTrainedTokenizerBase
    settings: Mapping[str, Any] = field(default_factory=dict)


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Raises a ValueError that says what was to be loaded, as does `load_context`."""
    return load_named(AutoTokenizer, "tokenizer", name, revision)


def load_context(name: str, revision: str | None = None) -> int:
    """Tokens of a model's context."""
    config = load_named(AutoConfig, "model", name, revision)
    return config.get_text_config(decoder=True).max_position_embeddings


def load_model(
    name: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    batch_size: int | None = None,
) -> Evaluated:
    """Loads a model onto this process's device.

    Args:
        dtype: "auto" takes that of the file, and float32 on a CPU.
        batch_size: of `make_lm`.

    Raises:
        ValueError: it cannot be loaded, or does not fit the tokenizer.
    """
    device = PartialState().device
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    load = functools.partial(AutoModelForCausalLM.from_pretrained, dtype=dtype, **options)
    model = load_named(types.SimpleNamespace(from_pretrained=load), "model", name, revision).to(device).eval()
    check_tokenizer(tokenizer, model.config)
    return Evaluated(
        name=name,
        identity=_identity(name, revision, model),
        parameters=model.num_parameters(),
        context=model.config.get_text_config(decoder=True).max_position_embeddings,
        lm=make_lm(model, tokenizer, batch_size),
        sampler=ModelSampler(model),
        tokenizer=tokenizer,
        settings={"dtype": str(model.dtype).removeprefix("torch.")},
    )


def _identity(name: str, revision: str | None, model: PreTrainedModel) -> str:
    """A Hub model is told by its commit, since what a branch names changes; by its weights where none is known."""
    if Path(name).is_dir():
        return model_identity(name)
    file = try_to_load_from_cache(name, CONFIG_NAME, revision=revision)  # where loading just put it
    return model_identity(name, Path(file).parent.name) if isinstance(file, str) else model_identity(model)


def make_lm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | None = None) -> LM:
    """lm-eval's own `hf` model around ours. Likelihoods are computed and summed in float32 whatever the model's dtype.

    Args:
        batch_size: rows of a batch; by default as many as `batch_size_for` finds for what is asked.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or 1, softmax_dtype="float32")
    lm.fixed_batch_size = batch_size is not None
    return lm


def batch_size_for(model: PreTrainedModel, tokens: int, generates: bool) -> int:
    """Rows that the memory holds, 64 at most.

    Args:
        tokens: of the longest row, with what is generated.
        generates: keys and values are kept, and logits of the last token only; otherwise logits of all tokens, three
            times over in 4 bytes each.
    """
    config = model.config.get_text_config(decoder=True)
    on_cpu = model.device.type == "cpu"
    if generates:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        row = 2 * config.num_hidden_layers * heads * width * tokens * model.dtype.itemsize + 12 * config.vocab_size
    else:
        row = 12 * config.vocab_size * tokens
    free = psutil.virtual_memory().available if on_cpu else torch.accelerator.get_memory_info()[0]
    rows = int((CPU_SHARE if on_cpu else ACCELERATOR_SHARE) * free / row)
    if on_cpu and not generates:
        rows = min(rows, CPU_TOKENS // tokens)
    return max(1, min(MOST_ROWS, rows))
