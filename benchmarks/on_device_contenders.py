"""One contender of `on_device.py` in a process of its own: loads a model, then answers commands line by line.

Each reaches a position of its context and decodes from there, again and again: thread pools of different libraries
would get into each other's way within one process. What fills the context is random: `transformers` is handed keys
and values of random numbers, a program starts at the position with what its cache holds, and llama.cpp, whose cache
nobody else can write, reads a random prompt.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CHUNK = 512  # tokens of a prompt that are read at once


class Program:
    """A .pte of `recipes/export.py`."""

    def __init__(self, path: str, threads: int, context: int):
        from mobilellm_hf.export import OnDeviceModel

        self.model = OnDeviceModel(path, threads=threads)
        self.position = 0

    def run(self, tokens: torch.Tensor, start: int) -> None:
        self.model._module.run_method("forward", (tokens, torch.arange(start, start + tokens.shape[1])))

    def reach(self, position: int) -> None:
        self.position = position

    def decode(self, tokens: torch.Tensor) -> None:
        for step, token in enumerate(tokens):
            self.run(token.view(1, 1), self.position + step)

    def prefill(self, tokens: torch.Tensor) -> None:
        for start in range(0, len(tokens), self.model.prefill):
            self.run(tokens[None, start : start + self.model.prefill], start)


class OptimumProgram(Program):
    """A .pte of Optimum's own export, whose logits are those of all tokens."""

    def __init__(self, path: str, threads: int, context: int):
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
        from executorch.extension.pybindings.portable_lib import _load_for_executorch, _unsafe_reset_threadpool
        from executorch.kernels import quantized  # noqa: F401

        _unsafe_reset_threadpool(threads)
        self.module, self.position = _load_for_executorch(f"{path}/model.pte"), 0

    def run(self, tokens: torch.Tensor, start: int) -> None:
        self.module.run_method("forward", (tokens, torch.arange(start, start + tokens.shape[1])))

    def prefill(self, tokens: torch.Tensor) -> None:
        for start in range(0, len(tokens), CHUNK):
            self.run(tokens[None, start : start + CHUNK], start)


class Transformers:
    """A model of transformers with its cache, as `generate` calls it; `compiled`: by torch.compile, a static cache."""

    def __init__(self, path: str, threads: int, context: int, dtype: str = "float32", compiled: bool = False):
        from mobilellm_hf import MobileLLMForCausalLM

        torch.set_num_threads(threads)
        self.model = MobileLLMForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        self.compiled = compiled
        self.forward: Callable[..., Any] = self.model

    @torch.no_grad()
    def reach(self, position: int) -> None:
        from transformers import DynamicCache, StaticCache

        config, self.position, self.cache = self.model.config, position, None
        gc.collect()
        shape = (1, config.num_key_value_heads, position, config.head_dim)
        if self.compiled:
            torch.compiler.reset()
            self.forward = torch.compile(self.model)
            self.cache = StaticCache(config, max_cache_len=position + 64)
        else:
            self.cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            keys, values = (torch.randn(shape, dtype=self.model.dtype) for _ in range(2))
            options = {"cache_kwargs": {"cache_position": torch.arange(position)}} if self.compiled else {}
            self.cache.update(keys, values, layer, **options)

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor) -> None:
        for step, token in enumerate(tokens):
            positions = torch.tensor([[self.position + step]])
            inputs = dict(input_ids=token.view(1, 1), position_ids=positions, logits_to_keep=1, use_cache=True)
            self.forward(past_key_values=self.cache, **inputs)
        if not self.compiled:
            self.cache.crop(-len(tokens))

    @torch.no_grad()
    def prefill(self, tokens: torch.Tensor) -> None:
        self.model(input_ids=tokens[None], use_cache=True, logits_to_keep=1)


class LlamaCpp:
    """llama.cpp through llama-cpp-python."""

    def __init__(self, path: str, threads: int, context: int, cache: str = "f16", flash_attention: bool = True):
        import llama_cpp

        kind = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}[cache]
        self.model = llama_cpp.Llama(
            path, n_ctx=context, n_batch=CHUNK, n_ubatch=CHUNK, n_threads=threads, n_threads_batch=threads,
            flash_attn=flash_attention, type_k=kind, type_v=kind, verbose=False,
        )  # fmt: skip

    def reach(self, position: int) -> None:
        if position > self.model.n_tokens:
            self.model.eval(random_tokens(position - self.model.n_tokens).tolist())
        self.position = position

    def decode(self, tokens: torch.Tensor) -> None:
        for step, token in enumerate(tokens.tolist()):
            self.model.n_tokens = self.position + step
            self.model.eval([token])
        self.model.n_tokens = self.position

    def prefill(self, tokens: torch.Tensor) -> None:
        self.model.n_tokens = 0
        self.model.eval(tokens.tolist())


KINDS = {kind.__name__: kind for kind in (Program, OptimumProgram, Transformers, LlamaCpp)}


def random_tokens(count: int) -> torch.Tensor:
    return torch.randint(1000, 100_000, (count,))


def answer(contender, command: str, argument: int) -> dict[str, float]:
    if command == "peak":
        return {"megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}
    given = argument if command == "reach" else random_tokens(argument)
    began = time.perf_counter()
    getattr(contender, command)(given)
    return {"seconds": time.perf_counter() - began}


def main() -> None:
    kind, path, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    torch.manual_seed(0)
    Path(path).stat()
    began = time.perf_counter()
    contender = KINDS[kind](path, **options)
    print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        command, argument = line.split()
        print(json.dumps(answer(contender, command, int(argument))), flush=True)


if __name__ == "__main__":
    main()
