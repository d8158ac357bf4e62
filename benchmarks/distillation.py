"""The distillation loss against its rivals, and what a teacher's top-k cache loses.

    python benchmarks/distillation.py                              # both tables; a quarter of an hour on one core
    python benchmarks/distillation.py --only speed --turns 5
    python benchmarks/distillation.py --only cache

Speed: KL(teacher || student), summed, and its gradients by the student's hidden states and head, from random hidden
states. All contenders compute the same numbers (the last column says how nearly), except those from a cache, which has
a lower bound of them. Liger's kernels come with `pip install liger-kernel`; what cannot run says why.

Cache: two small models are trained on SymPy's docstrings, the teacher wider, deeper and for longer, and the student's
loss and gradient from caches of several k are compared with those from the teacher itself, on text that neither read.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Measurement, machine, measure_in_turns, ratio
from rich.console import Console
from rich.table import Table
from torch import nn

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.data.corpora import load_corpus
from mobilellm_hf.data.packing import tokenize_and_pack
from mobilellm_hf.data.tokenization import train_tokenizer
from mobilellm_hf.nll import evaluation_batches, summed_nll
from mobilellm_hf.training.divergence import DistillationLoss, LinearDistillation, TeacherLogits, TopKBuckets
from mobilellm_hf.training.teacher import Teacher
from mobilellm_hf.training.teacher_cache import TeacherCache

CACHED_K = 32
OURS, CACHED = "ours", f"ours, cached, k={CACHED_K}"
SIZES = (8, 32, 128)


class Head:
    """Hidden states and heads of a student and a teacher; the labels are needed by Liger alone."""

    def __init__(self, args: argparse.Namespace):
        generator = torch.Generator().manual_seed(0)

        def draw(rows: int, width: int, scale: float) -> torch.Tensor:
            drawn = scale * torch.randn(rows, width, generator=generator)
            return drawn.to(args.device, getattr(torch, args.dtype))

        self.hidden = draw(args.tokens, args.hidden, 1.0).requires_grad_()
        self.weight = draw(args.vocab, args.hidden, 2 * args.hidden**-0.5).requires_grad_()
        self.teacher_hidden = draw(args.tokens, args.teacher_hidden, 1.0)
        self.teacher_weight = draw(args.vocab, args.teacher_hidden, 2 * args.teacher_hidden**-0.5)
        self.labels = torch.randint(args.vocab, (args.tokens,), generator=generator).to(args.device)

    @torch.no_grad()
    def buckets(self, k: int) -> TopKBuckets:
        logs, ids = [], []
        for hidden in self.teacher_hidden.split(64):
            logits = (hidden @ self.teacher_weight.mT).float()
            top, top_ids = logits.topk(k, -1)
            tail = logits.scatter_(-1, top_ids, -torch.inf).logsumexp(-1, keepdim=True)
            logs.append(torch.cat((top, tail), -1).log_softmax(-1))
            ids.append(top_ids)
        return TopKBuckets(torch.cat(logs), torch.cat(ids))


def naive(head: Head) -> torch.Tensor:
    logits = head.hidden @ head.weight.mT
    with torch.no_grad():
        teacher_logits = head.teacher_hidden @ head.teacher_weight.mT
    student_log, teacher_log = (each.float().log_softmax(-1) for each in (logits, teacher_logits))
    return F.kl_div(student_log, teacher_log, log_target=True, reduction="sum")


def trl(head: Head) -> torch.Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    teacher = (head.teacher_hidden, head.teacher_weight, None)
    return ChunkedDivergenceFunction.apply(head.hidden, head.weight, None, *teacher, 0.0)[0].sum()


def liger_chunked(head: Head) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
    mean = loss(head.hidden, head.weight, head.teacher_hidden, head.teacher_weight, head.labels)
    return mean * len(head.hidden)


def liger_triton(head: Head) -> torch.Tensor:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0)
    return loss(head.hidden, head.weight, head.teacher_hidden, head.teacher_weight) * len(head.hidden)


def ours(head: Head, targets: TopKBuckets | None = None) -> torch.Tensor:
    targets = targets or TeacherLogits(head.teacher_hidden, head.teacher_weight)
    loss = DistillationLoss(temperature=1.0, alpha=1.0)
    return LinearDistillation.apply(head.hidden, head.weight, head.labels, None, -100, None, loss, targets)


def gradients(loss: Callable[[Head], torch.Tensor], head: Head) -> tuple[torch.Tensor, ...]:
    total = loss(head)
    return total.detach(), *torch.autograd.grad(total, (head.hidden, head.weight))


def contenders(head: Head) -> dict[str, Callable[[Head], torch.Tensor]]:
    buckets = head.buckets(CACHED_K)
    return {
        "naive: both models' logits": naive,
        "TRL ChunkedDivergenceFunction": trl,
        "Liger chunked_loss (torch)": liger_chunked,
        "Liger LigerFusedLinearJSD (Triton)": liger_triton,
        OURS: ours,
        CACHED: lambda head: ours(head, buckets),
    }


def peak_alone(args: argparse.Namespace, name: str) -> int:
    """Bytes at the peak of a second run in a process of its own, where no other contender has left the heap larger."""
    torch.set_num_threads(args.threads)
    head = Head(args)
    loss = contenders(head)[name]
    return measure_in_turns({name: lambda: gradients(loss, head)}, turns=1, warmup=1)[name].peak[0]


def speed(args: argparse.Namespace) -> None:
    head = Head(args)
    losses = contenders(head)
    runs, failed, errors = {}, {}, {}
    true = gradients(naive, head)
    for name, loss in losses.items():
        try:
            found = gradients(loss, head)
        except Exception as error:  # a rival that does not run here keeps its row, with the reason
            failed[name] = f"{type(error).__name__}: {error}".split("\n")[0]
            continue
        errors[name] = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(found, true))
        runs[name] = lambda loss=loss: gradients(loss, head)
    del true, found
    results = measure_in_turns(runs, args.turns, warmup=0)  # they have all just run
    for name, result in results.items():
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            result.peak = [pool.submit(peak_alone, args, name).result()] * args.turns
    shape = f"{args.tokens:,} tokens, vocabulary {args.vocab:,}"
    title = f"KL and gradients, {shape}, hidden {args.hidden} (teacher {args.teacher_hidden}), {args.dtype}"
    print_speed(title, results, failed, errors, list(losses))


def print_speed(title: str, results: dict[str, Measurement], failed: dict, errors: dict, names: list[str]) -> None:
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for column in ("CPU s", "wall s", "peak MiB", "CPU ratio to ours", "wall ratio", "memory ratio", "off by"):
        table.add_column(column, justify="right")
    for name in names:
        if name in failed:
            table.add_row(name, *["-"] * 7)
            continue
        figures = (results[name].cpu, results[name].wall, results[name].peak)
        cpu, wall, peak = (statistics.median(figure) for figure in figures)
        ratios = [f"{ratio(results, name, OURS, figure):.2f}" for figure in ("cpu", "wall", "peak")]
        error = "a bound" if name == CACHED else f"{errors[name]:.0e}"
        table.add_row(name, f"{cpu:.2f}", f"{wall:.2f}", f"{peak / 2**20:.0f}", *ratios, error)
    console = Console(width=140)
    console.print(table)
    for name, reason in failed.items():
        console.print(f"{name} does not run here: {reason}", markup=False)


def pretrain(model: MobileLLMForCausalLM, rows, steps: int, batch_size: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    model.train()
    for step in range(steps):
        start = step * batch_size % (len(rows) - batch_size)
        batch = rows[start : start + batch_size]
        loss = summed_nll(model, batch) / (batch["labels"][:, 1:] != -100).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def student_gradient(student: MobileLLMForCausalLM, batch: dict, targets) -> tuple[float, torch.Tensor]:
    """KL summed over the batch, and its gradient by all of the student's parameters."""
    hidden = student.model(batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state.flatten(0, 1)
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].flatten()
    loss = DistillationLoss(temperature=1.0, alpha=1.0)
    total = LinearDistillation.apply(hidden, student.lm_head.weight, labels, None, -100, None, loss, targets)
    grads = torch.autograd.grad(total, list(student.parameters()))
    return total.item(), nn.utils.parameters_to_vector(grads)


def cache_error(args: argparse.Namespace) -> None:
    corpus = load_corpus("embedded:sympy_docs")
    tokenizer = train_tokenizer(corpus["text"], vocab_size=args.cache_vocab)
    models = []
    for width, layers in ((192, 4), (96, 2)):
        torch.manual_seed(0)
        config = MobileLLMConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 96,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        models.append(MobileLLMForCausalLM(config).to(args.device))
    teacher, student = models
    rows, _ = tokenize_and_pack(corpus, tokenizer, seq_length=128, config=student.config)
    rows = rows.shuffle(seed=0).select_columns(["input_ids", "labels", "position_ids"])
    held_out, rows = rows.select(range(32)), rows.select(range(32, len(rows)))
    for model, steps in ((teacher, args.cache_steps), (student, args.cache_steps // 4)):
        with Console(stderr=True).status(f"training for {steps} steps"):
            pretrain(model, rows.with_format("torch", device=args.device), steps, 16)
    _, tokens = batch_of(student, held_out)
    with torch.no_grad():
        nll = [summed_nll(model.eval(), batch_of(model, held_out)[0]).item() / tokens for model in models]
    title = (
        f"Loss and gradient from a cache, {tokens:,} tokens of SymPy's docstrings, vocabulary {len(tokenizer):,}: "
        f"NLL of the teacher {nll[0]:.2f}, of the student {nll[1]:.2f}"
    )
    print_cache(title, cache_rows(teacher, student, held_out))


def batch_of(model: MobileLLMForCausalLM, rows) -> tuple[dict, int]:
    """All rows as one batch, and its predicted tokens."""
    return next(evaluation_batches(model, rows, len(rows)))


def cache_rows(teacher: MobileLLMForCausalLM, student: MobileLLMForCausalLM, rows):
    """Of every k: the cache, KL, the whole KL, the cosine of the gradients, and what fp16 changes of the KL."""
    batch, _ = batch_of(student, rows)
    whole = Teacher(teacher)
    with whole.head() as (weight, bias):
        states = whole.states(batch)
        true, gradient = student_gradient(student, batch, TeacherLogits(states, weight, bias))
        kept = (F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].flatten() != -100).nonzero()[:, 0]
        logits = states[kept] @ weight.mT
    for k in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            cache = TeacherCache.write(teacher, rows, Path(folder), top_k=k, on_batch=lambda count: None)
            targets = cache.read(range(len(rows)), batch["labels"])
        found, cached_gradient = student_gradient(student, batch, targets)
        tail = logits.scatter(-1, targets.ids, -torch.inf).logsumexp(-1, keepdim=True)
        buckets = torch.cat((logits.gather(-1, targets.ids), tail), -1).log_softmax(-1)
        unrounded, _ = student_gradient(student, batch, TopKBuckets(buckets, targets.ids))
        cosine = F.cosine_similarity(gradient, cached_gradient, dim=0).item()
        mass = 1 - buckets[:, -1].exp().mean().item()
        yield k, cache.bytes_per_token, mass, found / len(kept), true / len(kept), cosine, abs(found / unrounded - 1)


def print_cache(title: str, rows) -> None:
    table = Table(title=title)
    for column in ("k", "bytes a token", "teacher's mass in the top k", "KL", "of the whole", "gradient's cosine"):
        table.add_column(column, justify="right")
    table.add_column("KL moved by fp16", justify="right")
    for k, size, mass, kl, whole, cosine, rounding in rows:
        cells = (f"{size:.0f}", f"{mass:.1%}", f"{kl:.4f}", f"{kl / whole:.1%}", f"{cosine:.4f}", f"{rounding:.0e}")
        table.add_row(str(k), *cells)
    table.add_row("all", "", "100.0%", f"{whole:.4f}", "100.0%", "1.0000", "")
    Console(width=140).print(table)


def parse_args() -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--only", default="speed,cache", help="which tables, separated by commas")
    parser.add_argument("--tokens", type=int, default=16_384 if device == "cuda" else 4_096, help="of a batch")
    parser.add_argument("--vocab", type=int, default=128_256, help="vocabulary of both models")
    parser.add_argument("--hidden", type=int, default=576, help="the student's width: the 140M model's")
    parser.add_argument("--teacher-hidden", type=int, default=1024, help="the teacher's width")
    parser.add_argument("--dtype", default="bfloat16" if device == "cuda" else "float32", help="of states and heads")
    parser.add_argument("--turns", type=int, default=3, help="counted turns")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--cache-steps", type=int, default=400, help="the cache's teacher trains so long")
    parser.add_argument("--cache-vocab", type=int, default=8_192, help="vocabulary of the cache's models")
    parser.add_argument("--device", default=device)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    tables = {"speed": speed, "cache": cache_error}
    for name in args.only.split(","):
        if name not in tables:
            raise SystemExit(f"--only: {name} is not one of {', '.join(tables)}")
        tables[name](args)


if __name__ == "__main__":
    main()
