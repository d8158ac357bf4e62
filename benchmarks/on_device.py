"""Table 10 on this machine: decoding, prefill, file, memory and load time of a shape on a device and elsewhere.

    python benchmarks/on_device.py --folder runs/on_device                      # 140M to 32k, 40 minutes on two cores
    python benchmarks/on_device.py --folder runs/on_device --contenders ours llama.cpp --positions 1024 8192
    pip install llama-cpp-python gguf                                           # for the contenders of llama.cpp

Weights are random. Each contender lives in a process of its own and is asked in turn: at every position all decode
some tokens for a warm-up, then three times. Ratios are taken turn by turn, and their medians are shown; a ratio above
1 says that ours is the faster one. Models are made once for a size and a context, and found again. A contender that
ends drops out, and its last words are shown.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import machine
from on_device_contenders import ROOM
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.data.tokenization import train_tokenizer
from mobilellm_hf.modeling import MODEL_SIZES

OURS = "ours"
WORKER = Path(__file__).with_name("on_device_contenders.py")
# Optimum plans memory for the logits of every token of the context: 16.8 GB at 32,768. What transformers exports
# copies its whole cache twice a token.
FIXED_CONTEXT = 2048
LLAMA = ("llama_cpp", "gguf")
SHAPE = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
LAST_WORDS = 400  # characters of what a contender that ends wrote to standard error
console = Console(width=140)


@dataclass(frozen=True)
class Contender:
    """`file` is made by `make` in the folder of the models; `longest`: the last position that it is asked for.

    `prefills`: whether its prefill is timed. `needs`: modules without which it is left out.
    """

    kind: str
    file: str
    make: Callable[[Path, argparse.Namespace], None]
    options: dict = field(default_factory=dict)
    longest: int = 1 << 30
    prefills: bool = True
    needs: tuple[str, ...] = ()

    def is_possible(self) -> bool:
        return all(importlib.util.find_spec(name) for name in self.needs)


def make_model(path: Path, args: argparse.Namespace) -> None:
    tokenizer = train_tokenizer(["a small vocabulary for a shape"] * 9, 300, show_progress=False)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    config = MobileLLMConfig.for_size(args.size, max_position_embeddings=args.context, **ends)
    MobileLLMForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def export(**options: str) -> Callable[[Path, argparse.Namespace], None]:
    """Ours, as the recipe has it."""

    def make(path: Path, args: argparse.Namespace) -> None:
        flags = [word for name, value in options.items() for word in (f"--{name}", value)]
        model = path.with_name("model")
        recipe = Path(__file__).parents[1] / "recipes/export.py"
        command = [sys.executable, recipe, "--model", model, "--output", path, "--max_seq_len", str(args.context)]
        subprocess.run([*command, *flags], check=True)

    return make


def make_optimum(path: Path, args: argparse.Namespace) -> None:
    """Optimum's own way of a Llama of this shape (without norms of query and key), its custom cache left out."""
    config, llama = MobileLLMConfig.from_pretrained(path.with_name("model")), path.with_name("llama")
    shape = {name: getattr(config, name) for name in SHAPE.split()}
    model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=FIXED_CONTEXT, tie_word_embeddings=True))
    model.save_pretrained(llama)
    command = f"export executorch --model {llama} --task text-generation --recipe xnnpack --output_dir {path}"
    options = f"--use_custom_sdpa --qlinear 8da4w --qembedding 4w --max_seq_len {FIXED_CONTEXT}"
    subprocess.run([Path(sys.executable).with_name("optimum-cli"), *command.split(), *options.split()], check=True)


def make_exporter(path: Path, args: argparse.Namespace) -> None:
    """One token and a static cache of transformers, in fp32, by its own exporter."""
    from transformers.exporters import ExecutorchConfig, ExecutorchExporter

    source = path.with_name("model")
    config = MobileLLMConfig.from_pretrained(source, max_position_embeddings=FIXED_CONTEXT)
    cache = StaticCache(config, max_cache_len=FIXED_CONTEXT)
    cache.early_initialization(1, config.num_key_value_heads, config.head_dim, torch.float32, torch.device("cpu"))
    zero = torch.zeros(1, 1, dtype=torch.long)
    inputs = {"input_ids": zero, "position_ids": zero, "past_key_values": cache}
    model = MobileLLMForCausalLM.from_pretrained(source, config=config, dtype=torch.float32)
    ExecutorchExporter().export(model, inputs, config=ExecutorchConfig()).save_pretrained(path)


def make_gguf(path: Path, args: argparse.Namespace) -> None:
    from on_device_gguf import write_gguf

    write_gguf(MobileLLMConfig.from_pretrained(path.with_name("model")), path)


def model_is_there(path: Path, args: argparse.Namespace) -> None:
    """Every other file is made of it, so it comes first."""


CONTENDERS = {
    OURS: Contender("Program", "8da4w", export(quantize="8da4w")),
    "ours, cache fp32": Contender("Program", "8da4w-fp32", export(quantize="8da4w", kv_cache="float32")),
    "transformers fp32": Contender("Transformers", "model", model_is_there),
    "transformers bf16": Contender("Transformers", "model", model_is_there, {"dtype": "bfloat16"}),
    "torch.compile fp32": Contender("Compiled", "model", model_is_there, prefills=False),
    "Optimum": Contender("OptimumProgram", "optimum", make_optimum, longest=FIXED_CONTEXT - ROOM),
    "transformers' exporter": Contender(
        "TransformersProgram", "exporter", make_exporter, longest=FIXED_CONTEXT - ROOM, prefills=False
    ),
    "llama.cpp": Contender("LlamaCpp", "q4_0.gguf", make_gguf, needs=LLAMA),
    "llama.cpp, q8_0": Contender("LlamaCpp", "q4_0.gguf", make_gguf, {"cache": "q8_0"}, needs=LLAMA),
    "llama.cpp, no flash": Contender("LlamaCpp", "q4_0.gguf", make_gguf, {"flash_attention": False}, needs=LLAMA),
}


class Ended(RuntimeError):
    """A contender's process is no more; the message has its last words."""


class Worker:
    """A contender's process."""

    def __init__(self, contender: Contender, path: Path, args: argparse.Namespace):
        options = json.dumps(contender.options | {"threads": args.threads, "context": args.context})
        # Programs bring threads of their own; those of OpenMP beside them take their cores away.
        threads = "1" if contender.kind.endswith("Program") else str(args.threads)
        # A pipe that nobody reads would fill up; the file lives as long as the worker.
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, WORKER, contender.kind, path, options], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.errors, env=os.environ | {"OMP_NUM_THREADS": threads},
        )  # fmt: skip
        self.load_seconds = self._read()

    def ask(self, command: str, argument: int = 0) -> float:
        """Seconds, or megabytes of `peak`.

        Raises:
            Ended: there is no answer, nor will there be one.
        """
        try:
            self.process.stdin.write(f"{command} {argument}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended after its last answer, which reading tells
        return self._read()

    def _read(self) -> float:
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            raise Ended(f"it ended with {status}: ...{self.errors.read().strip()[-LAST_WORDS:]}")
        return next(iter(json.loads(line).values()))


def in_turns(
    workers: dict[str, Worker], names: list[str], what: str, command: str, argument: int, turns: range
) -> dict[str, list[float]]:
    """contender -> seconds of every turn from 0 on; one that ends drops out here and of `workers`."""
    seconds: dict[str, list[float]] = {name: [] for name in names if name in workers}
    with console.status("") as status:
        for turn in turns:
            for name in list(seconds):
                status.update(f"{what}: {name}")
                try:
                    took = workers[name].ask(command, argument)
                except Ended as ended:
                    console.print(f"{name} drops out at {what}: {ended}", style="yellow", markup=False)
                    del seconds[name], workers[name]
                    continue
                seconds[name] += [took] if turn >= 0 else []
                time.sleep(0.05)  # in which its threads stop to wait for more
    return seconds


def measure(workers: dict[str, Worker], args: argparse.Namespace) -> tuple[dict, dict]:
    """contender -> seconds of each turn: of decoding at each position, of prefill."""
    counted = range(-1, args.turns)  # after a warm-up
    prefilling = [name for name in workers if CONTENDERS[name].prefills]
    prefilled = in_turns(workers, prefilling, "prefill", "prefill", args.prefill, counted)
    decoded: dict[int, dict[str, list[float]]] = {}
    for position in sorted(args.positions):
        there = [name for name in workers if position <= CONTENDERS[name].longest]
        in_turns(workers, there, f"the way to {position:,}", "reach", position, range(1))
        decoded[position] = in_turns(workers, there, f"{position:,}", "decode", args.tokens, counted)
        console.print(f"{position:,} done", style="dim")
    return decoded, prefilled


def against_ours(seconds: dict[str, list[float]], name: str) -> float:
    return statistics.median(theirs / own for theirs, own in zip(seconds[name], seconds[OURS], strict=True))


def speed_table(decoded: dict, prefilled: dict, names: list[str], args: argparse.Namespace) -> Table:
    positions = list(decoded)
    columns = [*(f"at {position:,}" for position in positions), f"prefill {args.prefill:,}"]
    table = Table("", *columns, title=f"{args.size}: tokens/s, and how many times as fast ours is")
    for name in names:
        cells = []
        for seconds, tokens in [*((decoded[at], args.tokens) for at in positions), (prefilled, args.prefill)]:
            if name not in seconds:
                cells.append("")
                continue
            speed = tokens / statistics.median(seconds[name])
            times = f"  {against_ours(seconds, name):.2f}" if OURS in seconds else ""
            cells.append(f"{speed:,.1f}{times}")
        table.add_row(name, *cells)
    return table


def size_table(workers: dict[str, Worker], folder: Path) -> Table:
    title = "File, resident memory at its highest, time to load and to take one token"
    table = Table("", "file MB", "peak MB", "load s", title=title)
    for name, worker in workers.items():
        file = folder / CONTENDERS[name].file
        files = [file] if file.is_file() else [*file.glob("model.pte"), *file.glob("*.safetensors")]
        size = sum(part.stat().st_size for part in files)
        table.add_row(name, f"{size / 1e6:.1f}", f"{worker.ask('peak'):,.0f}", f"{worker.load_seconds:.2f}")
    return table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where models are made, and found again")
    parser.add_argument("--size", default="140M", choices=list(MODEL_SIZES), help="MobileLLM-R1 size")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME",
                        help=", ".join(CONTENDERS))  # fmt: skip
    parser.add_argument("--positions", type=int, nargs="+", default=[1024 * 2**step for step in range(6)])
    parser.add_argument("--context", type=int, default=32_768 + 32, help="tokens that caches are made for")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded in a turn")
    parser.add_argument("--prefill", type=int, default=1024, help="tokens of the prompt that is timed")
    parser.add_argument("--turns", type=int, default=3, help="counted turns")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each contender")
    args = parser.parse_args()
    if args.tokens > ROOM or max(*args.positions, args.prefill) + args.tokens > args.context:
        parser.error(f"--tokens is at most {ROOM}, and must fit the --context after --positions and --prefill")
    return args


def start(name: str, folder: Path, args: argparse.Namespace) -> Worker | None:
    """Makes what the contender needs and loads it; None, and a line that says why, where that fails."""
    contender = CONTENDERS[name]
    path, partial = folder / contender.file, folder / f"{contender.file}.making"
    try:
        if not contender.is_possible():
            raise Ended(f"it needs {' and '.join(contender.needs)}")
        if not path.exists():
            console.print(f"making {path}", style="dim")
            shutil.rmtree(partial, ignore_errors=True)
            contender.make(partial, args)
            partial.rename(path)
        return Worker(contender, path, args)
    except (Ended, OSError, subprocess.CalledProcessError) as error:
        console.print(f"{name} is left out: {error}", style="yellow", markup=False)
        return None


def main() -> None:
    args = parse_args()
    folder = args.folder / f"{args.size}-{args.context}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        make_model(folder / "model.making", args)
        (folder / "model.making").rename(folder / "model")
    workers = {name: worker for name in args.contenders if (worker := start(name, folder, args))}
    names = list(workers)
    console.print(machine(), soft_wrap=True)
    decoded, prefilled = measure(workers, args)
    console.print(speed_table(decoded, prefilled, names, args))
    console.print(size_table(workers, folder))


if __name__ == "__main__":
    main()
