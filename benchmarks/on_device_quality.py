"""What export and quantization cost a trained model: perplexity, and how often the likeliest token stays the same.

    python benchmarks/on_device_quality.py --model runs/quickstart/model --folder runs/on_device_quality

The same texts go through the model in eager, the model quantized in eager, and programs with the quantization and the
cache of each row. A program is asked token by token, as it is when it generates, so what its cache holds counts. The
texts are held-out documents of the embedded corpus, as many tokens each as `--length` says, joined where none is so
long.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from mobilellm_hf import MobileLLMForCausalLM
from mobilellm_hf.curation.scoring import model_identity
from mobilellm_hf.data.corpora import load_corpus
from mobilellm_hf.export import OnDeviceModel, Quantization

RECIPE = Path(__file__).parents[1] / "recipes/export.py"
EAGER, QUANTIZED = "eager, fp32", "eager, 8da4w"
# name -> options of the export, and what it is to agree with
PROGRAMS = {
    "program, fp32, cache fp32": (["--quantize", "none", "--kv_cache", "float32"], EAGER),
    "program, fp32, cache bf16": (["--quantize", "none"], EAGER),
    "program, 8da4w, cache fp32": (["--kv_cache", "float32"], QUANTIZED),
    "program, 8da4w, cache bf16": ([], QUANTIZED),
}
Predict = Callable[[list[int]], torch.Tensor]  # (tokens, vocabulary) logits


def in_eager(model: MobileLLMForCausalLM) -> Predict:
    @torch.no_grad()
    def predict(tokens: list[int]) -> torch.Tensor:
        return model(torch.tensor([tokens])).logits[0].float()

    return predict


def on_device(model: OnDeviceModel) -> Predict:
    def predict(tokens: list[int]) -> torch.Tensor:
        return torch.stack([model.logits([token], position) for position, token in enumerate(tokens)])

    return predict


def contenders(args: argparse.Namespace) -> Iterator[tuple[str, str, Predict]]:
    """(name, what it is to agree with, logits), one after the other, so that memory holds one."""
    yield EAGER, EAGER, in_eager(MobileLLMForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval())
    model = MobileLLMForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    Quantization.for_config("8da4w", model.config).apply(model)
    yield QUANTIZED, EAGER, in_eager(model)
    source = args.folder / "model"
    for name, (options, reference) in PROGRAMS.items():
        path = args.folder / name.replace(", ", "-").replace(" ", "-")
        if not path.exists():
            subprocess.run([sys.executable, RECIPE, "--model", source, "--output", path, *options], check=True)
        yield name, reference, on_device(OnDeviceModel(path))


def compare(args: argparse.Namespace, texts: list[list[int]]) -> Table:
    table = Table("", "perplexity", "against it", "same likeliest token", "is to agree with", title=f"{args.model}")
    likeliest: dict[str, torch.Tensor] = {}
    perplexity: dict[str, float] = {}
    for name, reference, predict in contenders(args):
        losses, tokens = [], []
        for text in track(texts, name, transient=True):
            logits = predict(text[:-1])
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:]), reduction="none"))
            tokens.append(logits.argmax(-1))
        likeliest[name], perplexity[name] = torch.cat(tokens), math.exp(torch.cat(losses).mean())
        more = perplexity[name] / perplexity[reference] - 1
        same = (likeliest[name] == likeliest[reference]).double().mean()
        table.add_row(name, f"{perplexity[name]:.4f}", f"{more:+.3%}", f"{same:.2%}", reference)
    return table


def held_out(tokenizer, count: int, length: int) -> list[list[int]]:
    """Beginnings of documents; where too few are so long, pieces of documents that follow one another."""
    corpus = load_corpus("embedded:stdlib,sympy_docs,numpy_docs,python_reference", split="test")
    documents = [tokenizer(text)["input_ids"] for text in corpus["text"]]
    texts = [tokens[:length] for tokens in documents if len(tokens) >= length]
    if len(texts) < count:
        joined = [token for tokens in documents for token in tokens]
        texts = [joined[start : start + length] for start in range(0, len(joined) - length + 1, length)]
    if len(texts) < count:
        raise ValueError(f"there are only {len(texts)} held-out texts of {length} tokens: lower --texts or --length")
    return texts[:: len(texts) // count][:count]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--tokenizer", help="folder; by default that of the model")
    parser.add_argument("--folder", type=Path, required=True, help="where programs are made, and found again")
    parser.add_argument("--texts", type=int, default=64, help="held-out documents")
    parser.add_argument("--length", type=int, default=128, help="tokens of each")
    args = parser.parse_args()
    # What was made of other weights stays apart.
    args.folder /= model_identity(args.model).replace(" ", "-").replace("/", "--")
    return args


def main() -> None:
    args = parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    source = args.folder / "model"
    if not source.exists():
        MobileLLMForCausalLM.from_pretrained(args.model).save_pretrained(source)
        tokenizer.save_pretrained(source)
    console = Console(width=120)
    console.print(machine(), soft_wrap=True)
    texts = held_out(tokenizer, args.texts, args.length)
    console.print(compare(args, texts))
    console.print(f"{sum(map(len, texts)):,} tokens of {len(texts)} documents", style="dim")


if __name__ == "__main__":
    main()
