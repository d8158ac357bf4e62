"""One contender of `on_device.py` in a process of its own: loads a model, then answers commands line by line.

Each reaches a position of its context and decodes from there, again and again: thread pools of different libraries
would get into each other's way within one process. What fills the context is random: `transformers` is handed keys
and values of random numbers, a program starts at the position with what its cache holds, and llama.cpp, whose cache
nobody else can write, reads a random prompt.
"""

from __future__ import annotations

import gc
import importlib
import json
import resource
import sys
import time
from pathlib import Path

import torch

CHUNK = 512  # tokens of a prompt that are read at once
ROOM = 64  # tokens that can be decoded from a position
RUNTIME = (
    "executorch.extension.llm.custom_ops.custom_ops", "executorch.extension.pybindings.portable_lib",
    "executorch.kernels.quantized",
)  # fmt: skip


class Program:
    """A .pte of `recipes/export.py`."""

    needs: tuple[str, ...] = ("mobilellm_hf.export",)  # imported before loading is timed

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

    needs = RUNTIME

    def __init__(self, path: str, threads: int, context: int):
        from executorch.extension.pybindings.portable_lib import _load_for_executorch, _unsafe_reset_threadpool

        _unsafe_reset_threadpool(threads)
        self.module, self.position = _load_for_executorch(f"{path}/model.pte"), 0

    def run(self, tokens: torch.Tensor, start: int) -> None:
        self.module.run_method("forward", (tokens, torch.arange(start, start + tokens.shape[1])))

    def prefill(self, tokens: torch.Tensor) -> None:
        for start in range(0, len(tokens), CHUNK):
            self.run(tokens[None, start : start + CHUNK], start)


class Transformers:
    """A model of transformers with its cache, as `generate` calls it."""

    needs = ("mobilellm_hf", "transformers.models.auto")

    def __init__(self, path: str, threads: int, context: int, dtype: str = "float32"):
        from mobilellm_hf import MobileLLMForCausalLM

        torch.set_num_threads(threads)
        self.model = MobileLLMForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()

    @torch.no_grad()
    def reach(self, position: int) -> None:
        config, self.position, self.cache = self.model.config, position, None
        gc.collect()
        self.cache = self.new_cache(position)
        shape = (1, config.num_key_value_heads, position, config.head_dim)
        for layer in range(config.num_hidden_layers):
            keys, values = (torch.randn(shape, dtype=self.model.dtype) for _ in range(2))
            self.cache.update(keys, values, layer)

    def new_cache(self, position: int):
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor) -> None:
        for step, token in enumerate(tokens):
            self.step(token.view(1, 1), torch.tensor([[self.position + step]]))
        self.go_back(len(tokens))

    def step(self, token: torch.Tensor, positions: torch.Tensor) -> None:
        self.model(input_ids=token, position_ids=positions, past_key_values=self.cache)

    def go_back(self, tokens: int) -> None:
        self.cache.crop(-tokens)

    @torch.no_grad()
    def prefill(self, tokens: torch.Tensor) -> None:
        self.model(input_ids=tokens[None], use_cache=True, logits_to_keep=1)


class Compiled(Transformers):
    """The same by torch.compile with a static cache of just the tokens that are read, compiled at every position."""

    def new_cache(self, position: int):
        from transformers import StaticCache

        torch.compiler.reset()
        self.forward = torch.compile(self.model)
        return StaticCache(self.model.config, max_cache_len=position + ROOM)

    def step(self, token: torch.Tensor, positions: torch.Tensor) -> None:
        self.forward(input_ids=token, position_ids=positions, past_key_values=self.cache)

    def go_back(self, tokens: int) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.position)


class TransformersProgram(Transformers):
    """What transformers' own exporter makes of the model: its static cache goes in and comes out at every token."""

    needs = ("mobilellm_hf", "transformers.exporters.base", *RUNTIME)

    def __init__(self, path: str, threads: int, context: int):
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from transformers.exporters.base import ExportedModel

        _unsafe_reset_threadpool(threads)
        self.model = ExportedModel.from_pretrained(path)

    def new_cache(self, position: int):
        from transformers import StaticCache

        return StaticCache(self.model.config, max_cache_len=self.model.config.max_position_embeddings)

    def step(self, token: torch.Tensor, positions: torch.Tensor) -> None:
        outputs = self.model(input_ids=token, position_ids=positions, past_key_values=self.cache)
        self.cache = outputs.past_key_values

    def go_back(self, tokens: int) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.position)

    def prefill(self, tokens: torch.Tensor) -> None:
        self.reach(0)
        self.decode(tokens)


class LlamaCpp:
    """llama.cpp through llama-cpp-python."""

    needs = ("llama_cpp",)

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


KINDS = {
    kind.__name__: kind for kind in (Program, OptimumProgram, Transformers, Compiled, TransformersProgram, LlamaCpp)
}


def random_tokens(count: int) -> torch.Tensor:
    return torch.randint(1000, 100_000, (count,))


def peak_megabytes() -> float:
    """Resident, at its highest, of this process alone: `ru_maxrss` of a child begins with its parent's."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)
    kibibytes = next(line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kibibytes) * 1024 / 1e6


def answer(contender, command: str, argument: int) -> dict[str, float]:
    if command == "peak":
        return {"megabytes": peak_megabytes()}
    given = argument if command == "reach" else random_tokens(argument)
    began = time.perf_counter()
    getattr(contender, command)(given)
    return {"seconds": time.perf_counter() - began}


def main() -> None:
    kind, path, options = KINDS[sys.argv[1]], sys.argv[2], json.loads(sys.argv[3])
    torch.manual_seed(0)
    for module in kind.needs:
        importlib.import_module(module)
    began = time.perf_counter()
    contender = kind(path, **options)
    contender.prefill(random_tokens(1))  # a file that is mapped is read when it is used
    print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        command, argument = line.split()
        print(json.dumps(answer(contender, command, int(argument))), flush=True)


if __name__ == "__main__":
    main()
