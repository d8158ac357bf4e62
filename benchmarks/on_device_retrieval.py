"""Does a cache in bfloat16 lose what stands far back? Associative recall at length, by a model trained for it.

    python benchmarks/on_device_retrieval.py --folder runs/on_device_retrieval      # eleven minutes on a busy core

A text is noise with pairs of a key and a value strewn in. At its end the keys are asked for in another order, and each
is followed by its value: multi-query associative recall (Arora et al., 2023, arXiv 2312.04927). A MobileLLM of two
layers learns to go on with what it has read before, from texts of 64 tokens the second half of which repeats the first
one; then to recall, from texts of 64 tokens and from texts twice as long, again and again, up to `--length`. What it
has learned of a length is saved, and a killed run goes on from there. Then programs with either cache read held-out
texts and are asked key by key, as they decode.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from common import machine
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.data.tokenization import train_tokenizer
from mobilellm_hf.export import OnDeviceModel

RECIPE = Path(__file__).parents[1] / "recipes/export.py"
SHORTEST, ASKED_TOO = 64, 512  # tokens: of the first texts, and of those that are asked beside the longest
# Ids below 512 are the tokenizer's and stand for noise.
NOISE, KEYS, VALUES = 512, 256, 64
SHAPE = dict(
    vocab_size=NOISE + KEYS + VALUES, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=64,
)  # fmt: skip
TOKENS_A_STEP, RATE, WARMUP = 2048, 3e-3, 100
LEARNED, SMOOTHING, MOST_STEPS = 0.95, 0.95, 3000
PROGRAMS = {
    "fp32, cache fp32": ["--quantize", "none", "--kv_cache", "float32"],
    "fp32, cache bf16": ["--quantize", "none"],
    "8da4w, cache fp32": ["--kv_cache", "float32"],
    "8da4w, cache bf16": [],
}


def make_texts(count: int, length: int, seed: int) -> tuple[torch.Tensor, int, torch.Tensor]:
    """(texts (count, length), where the questions begin, how far back each answer stands (count, pairs))."""
    random = torch.Generator().manual_seed(seed)
    pairs = min(KEYS, length // 8)
    body = length - 2 * pairs
    texts = torch.randint(NOISE, (count, length), generator=random)
    keys = NOISE + torch.rand(count, KEYS, generator=random).argsort(1)[:, :pairs]
    values = NOISE + KEYS + torch.randint(VALUES, (count, pairs), generator=random)
    places = 2 * torch.rand(count, body // 2, generator=random).argsort(1)[:, :pairs]
    texts.scatter_(1, places, keys).scatter_(1, places + 1, values)
    asked = torch.rand(count, pairs, generator=random).argsort(1)
    texts[:, body::2], texts[:, body + 1 :: 2] = keys.gather(1, asked), values.gather(1, asked)
    return texts, body, torch.arange(body, length, 2) - places.gather(1, asked)


def make_repetitions(count: int, seed: int) -> torch.Tensor:
    """(count, 64): half of it random, the other half the same from another place on."""
    random, half = torch.Generator().manual_seed(seed), SHORTEST // 2
    first = torch.randint(NOISE, NOISE + KEYS + VALUES, (count, half), generator=random)
    places = torch.arange(half) + torch.randint(half, (count, 1), generator=random)
    return torch.cat((first, first.gather(1, places % half)), dim=1)


def train(model: MobileLLMForCausalLM, length: int | None, console: Console) -> None:
    """Until it knows 95 of 100 answers in texts of `length`, or in repetitions."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.95), weight_decay=0.01)
    name, known, step = f"{length:,} tokens" if length else "repetition", 0.0, 0
    with console.status("") as status:
        while known < LEARNED and step < MOST_STEPS:
            optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARMUP)
            count, stride = max(1, TOKENS_A_STEP // (length or SHORTEST)), 2 if length else 1
            if length:
                texts, begin, _ = make_texts(count, length, seed=1 + step)
            else:
                texts, begin = make_repetitions(count, seed=step), SHORTEST // 2
            logits, wanted = model(texts).logits[:, begin:-1:stride], texts[:, begin + 1 :: stride]
            F.cross_entropy(logits.flatten(0, 1), wanted.flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            right = (logits.argmax(-1) == wanted).double().mean().item()
            known, step = SMOOTHING * known + (1 - SMOOTHING) * right, step + 1
            status.update(f"{name}, step {step:,}: knows {known:.0%}")
    console.print(f"{name}, {step:,} steps: knows {known:.1%}", style="dim")


def trained(args: argparse.Namespace, console: Console) -> Path:
    """The folder of the model that knows `--length`."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a small vocabulary for noise"] * 9, 300, show_progress=False)
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model = MobileLLMForCausalLM(MobileLLMConfig(**SHAPE, max_position_embeddings=args.length, **ends))
    doublings = range((args.length // SHORTEST).bit_length())
    for length in (None, *(SHORTEST << doubling for doubling in doublings)):
        folder = args.folder / f"model-{length or 'repetition'}"
        if folder.exists():
            model = MobileLLMForCausalLM.from_pretrained(folder, max_position_embeddings=args.length)
        else:
            train(model, length, console)
            for part in (model, tokenizer):
                part.save_pretrained(folder)
    return folder


def answers(program: OnDeviceModel, text: list[int], body: int) -> torch.Tensor:
    """Log-probabilities (pairs, vocabulary) of what follows each key."""
    program.logits(text[:body])
    rows = []
    for place in range(body, len(text), 2):
        rows.append(program.logits(text[place : place + 1], place).log_softmax(-1))
        program.logits(text[place + 1 : place + 2], place + 1)
    return torch.stack(rows)


def ask(program: OnDeviceModel, length: int, count: int, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(is right, nats, tokens back) of every answer."""
    texts, body, back = make_texts(count, length, seed=0)
    found = torch.stack([answers(program, text, body) for text in track(texts.tolist(), name, transient=True)])
    wanted = texts[:, body + 1 :: 2]
    nats = -found.gather(-1, wanted[..., None])[..., 0]
    return (found.argmax(-1) == wanted).double(), nats, back


def compare(model: Path, args: argparse.Namespace) -> Table:
    lengths = sorted({ASKED_TOO, args.length})
    columns = [f"{length:,}: {what}" for length in lengths for what in ("right", "far half", "nats")]
    table = Table("", *columns, title=f"Values recalled, {args.texts} texts of each length")
    for name, options in PROGRAMS.items():
        path = model.with_name(f"{model.name}-" + name.replace(", ", "-").replace(" ", "-"))
        if not path.exists():
            subprocess.run([sys.executable, RECIPE, "--model", model, "--output", path, *options], check=True)
        program, cells = OnDeviceModel(path), []
        for length in lengths:
            right, nats, back = ask(program, length, args.texts, f"{name}, {length:,}")
            far = right[back > back.double().median()]
            cells += [f"{right.mean():.2%}", f"{far.mean():.2%}", f"{nats.mean():.4f}"]
        table.add_row(name, *cells)
    return table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where models and programs are made, and found")
    parser.add_argument("--length", type=int, default=4096, help="tokens of the longest texts: 64 times a power of 2")
    parser.add_argument("--texts", type=int, default=8, help="held-out texts of each length")
    args = parser.parse_args()
    if args.length < ASKED_TOO or args.length & (args.length - 1):
        parser.error(f"--length={args.length} must be a power of 2, {ASKED_TOO} or more")
    return args


def main() -> None:
    args, console = parse_args(), Console(width=140)
    console.print(machine(), soft_wrap=True)
    console.print(compare(trained(args, console), args))


if __name__ == "__main__":
    main()
