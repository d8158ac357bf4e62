"""CPU seconds and peak memory of influence scores in training steps, for benchmarks/influence.py.

A model of 28 million parameters is trained a little on the embedded corpus, so that the probes' gradients have the
spectrum of real ones (which is what a low rank lives on). Then every method scores the same rows against the same
three probes. The probes' gradients are taken beforehand; kronfluence takes them itself, and its parts are listed.
"""

import argparse
import ctypes
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from common import Measurement, measure_in_turns, ratio
from datasets import Dataset
from influence_rivals import (
    NOT_BLOCK_LINEAR,
    CountSketch,
    bergson_scores,
    kronfluence_scores,
    missing,
    naive_scores,
)
from rich.console import Console
from rich.progress import track

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.data.embedded import load_embedded_corpus
from mobilellm_hf.data.packing import tokenize_and_pack
from mobilellm_hf.data.tokenization import train_tokenizer
from mobilellm_hf.influence import InfluenceScorer, rank_agreement
from mobilellm_hf.influence.inner_products import LowRank
from mobilellm_hf.influence.scorer import low_rank_directions

STEP, EKFAC = "training step", "kronfluence, EK-FAC, C=3"
PROBE_ROWS = 4
LENGTH = 256
ALL, LINEAR = "all", "block Linear"
COLUMNS = "method | parameters | CPU s | in steps | peak MiB | in steps | "


@dataclass
class Contender:
    """What is timed, which parameters it covers, and what it holds between turns besides the model."""

    run: Callable[[], torch.Tensor | None]
    covers: str = ALL
    held: dict[str, torch.Tensor | LowRank] = field(default_factory=dict)
    library: str | None = None
    parts: list[dict[str, float]] = field(default_factory=list)  # CPU seconds by part, if the run tells them
    scores: torch.Tensor | None = None
    note: str = ""

    def __call__(self) -> None:
        self.scores = self.run()


def trained_model(args: argparse.Namespace) -> tuple[MobileLLMForCausalLM, Dataset, Dataset]:
    """The model, rows that it has not read, and rows of the probe split."""
    corpus = load_embedded_corpus(max_bytes_per_source=300_000)
    tokenizer = train_tokenizer(corpus["train"]["text"], 8192, show_progress=False)
    rows, probes = (
        tokenize_and_pack(corpus[split], tokenizer, LENGTH, isolate_documents=False)[0].shuffle(seed=0)
        for split in ("train", "probe")
    )
    torch.manual_seed(0)
    config = MobileLLMConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = MobileLLMForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    read = torch.tensor(rows["input_ids"][: args.train_steps * args.batch])
    for batch in track(read.split(args.batch), "training the model", console=Console(stderr=True)):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), rows.select(range(len(read), len(rows))).select_columns("input_ids"), probes


def rows_by(column: str, rows: Dataset, count: int) -> dict[str, Dataset]:
    """The first rows of every domain or source."""
    values = rows[column][:]
    places = {value: [i for i, other in enumerate(values) if other == value] for value in sorted(set(values))}
    return {value: rows.select(found[:count]).select_columns("input_ids") for value, found in places.items()}


def training_step(
    model: MobileLLMForCausalLM, rows: Dataset, batch_size: int, scorer: InfluenceScorer | None = None
) -> Callable[[], torch.Tensor | None]:
    """Forward and backward of the rows; with a scorer, the scores are taken on the way."""
    batches = torch.tensor(rows["input_ids"][:]).split(batch_size)

    def backward() -> None:
        for batch in batches:
            model.zero_grad(set_to_none=True)
            model(input_ids=batch, labels=batch).loss.backward()

    def run() -> torch.Tensor | None:
        model.train()
        try:
            if scorer is None:
                return backward()
            with scorer.in_training_step() as influence:
                backward()
                return influence.take()
        finally:
            model.zero_grad(set_to_none=True)
            model.eval()

    return run


def ours(scorer: InfluenceScorer, rows: Dataset, batch_size: int, **options) -> Contender:
    return Contender(partial(scorer.score, rows, batch_size, **options), held=scorer.directions)


def low_rank(scorer: InfluenceScorer, rank: int) -> InfluenceScorer:
    return InfluenceScorer.from_directions(
        scorer.model, low_rank_directions(scorer.directions, rank), scorer.capabilities
    )


def baselines(scorer: InfluenceScorer, rows: Dataset) -> dict[str, Contender]:
    sketch = CountSketch(scorer.model)
    return {
        "autograd, row by row, C=3": Contender(
            partial(naive_scores, scorer.model, rows, scorer.directions), held=scorer.directions
        ),
        "TRAK, LESS: 2,048 numbers a row": Contender(partial(sketch, rows), held=sketch.buckets),
    }


def libraries(scorer: InfluenceScorer, rows: Dataset, batch_size: int) -> dict[str, Contender]:
    bergson = partial(bergson_scores, scorer.model, rows, scorer.directions, batch_size)
    contenders = {"bergson, C=3": Contender(bergson, LINEAR, scorer.directions, "bergson")}
    for kind, name in (("identity", "kronfluence, identity, C=3"), ("ekfac", EKFAC)):
        parts = []
        run = partial(kronfluence_scores, scorer.model, rows, scorer.probes, kind, batch_size, parts)
        contenders[name] = Contender(run, LINEAR, library="kronfluence", parts=parts)
    return contenders


def nbytes(values: Iterable[torch.Tensor | LowRank]) -> int:
    tensors = (part for value in values for part in ([value] if torch.is_tensor(value) else [value.left, value.right]))
    return sum(tensor.nbytes for tensor in tensors)


def measure(model: MobileLLMForCausalLM, contenders: dict[str, Contender], turns: int) -> dict[str, Measurement | str]:
    """Figures of each contender, or what has to be installed for it. CPU seconds leave out the parts before scoring.

    Memory is measured in the first turn, which warms up. The C library keeps freed memory for the next allocation,
    and what it kept would not count as taken: it is told to return it, which costs time and is not done in the others.
    """
    results = {name: missing(contender.library) for name, contender in contenders.items() if contender.library}
    present = {name: contender for name, contender in contenders.items() if not results.get(name)}
    weights, trim = nbytes(model.parameters()), ctypes.CDLL(None).malloc_trim
    first = {name: lambda contender=contender: (contender(), trim(0)) for name, contender in present.items()}
    trim(0)
    held = {name: weights + nbytes(contender.held.values()) for name, contender in present.items()}
    memory = measure_in_turns(first, turns=1, warmup=0, resident=held)
    timed = measure_in_turns(present, turns, warmup=0)
    for name, contender in present.items():
        cpu = [part["score"] for part in contender.parts[-turns:]] or timed[name].cpu
        results[name] = Measurement(cpu, timed[name].wall, memory[name].peak * turns)
    return results


def to_lines(contenders: dict[str, Contender], results: dict[str, Measurement | str]) -> list[list[str]]:
    lines = []
    for name, contender in contenders.items():
        result = results[name]
        if isinstance(result, str):
            lines.append([name, contender.covers, *[""] * 4, result])
            continue
        cpu, peak = statistics.median(result.cpu), result.peak[0] / 2**20
        in_steps = [f"{ratio(results, name, STEP, figure):.2f}" for figure in ("cpu", "peak")]
        figures = [f"{cpu:.2f}", in_steps[0], f"{peak:.0f}", in_steps[1]]
        before = [f"{part} {contender.parts[-1][part]:.1f} s" for part in ("fit", "probes") if contender.parts]
        lines.append([name, contender.covers, *figures, "; ".join(filter(None, [", ".join(before), contender.note]))])
    return lines


def annotate(
    contenders: dict[str, Contender],
    scorers: dict[str, InfluenceScorer],
    rows: Dataset,
    more: Dataset,
    batch_size: int,
) -> None:
    """How far a library's exact scores are from ours, and how a low rank's correlate with the exact ones."""
    exact = scorers["ours, C=3"]
    linear = InfluenceScorer(exact.model, exact.probes, exclude=NOT_BLOCK_LINEAR).score(rows, batch_size)
    expected = exact.score(more, batch_size)
    for name, contender in contenders.items():
        if contender.library and contender.scores is not None and name != EKFAC:
            difference = (contender.scores - linear).norm() / linear.norm()
            contender.note = f"differs from ours on the same by {difference:.0e}"
        elif "rank" in name:
            found = rank_agreement(scorers[name].score(more, batch_size), expected)
            contender.note = "Spearman to exact " + " ".join(f"{value:.4f}" for value in found.tolist())


def cost(args: argparse.Namespace) -> Iterator[tuple[str, str, list[list[str]]]]:
    model, unread, probe_rows = trained_model(args)
    rows = unread.select(range(args.rows))
    exact = InfluenceScorer(model, rows_by("domain", probe_rows, PROBE_ROWS))
    ten = InfluenceScorer(model, rows_by("source", probe_rows, 1))
    scorers = {
        "ours, C=1": InfluenceScorer(model, dict(list(exact.probes.items())[:1])),
        "ours, C=3": exact,
        f"ours, C={len(ten.capabilities)}": ten,
        **{f"ours, rank {rank}, C=3": low_rank(exact, rank) for rank in (16, 32)},
    }
    step = Contender(training_step(model, rows, args.batch))
    fused = Contender(training_step(model, rows, args.batch, exact), held=exact.directions)
    contenders = {
        STEP: step,
        **{name: ours(scorer, rows, args.batch) for name, scorer in scorers.items()},
        "ours, in a training step, C=3": fused,
        "ours, every position, C=3": ours(exact, rows, args.batch, per_token=True),
        **baselines(exact, rows),
    }
    # In turns of their own, as they are slow: a training step is then never far from what is compared with it.
    slow = {STEP: step, **libraries(exact, rows, args.batch)}
    results = [(group, measure(model, group, args.turns)) for group in (contenders, slow)]
    annotate(contenders | slow, scorers, rows, unread.select(range(args.agreement_rows)), args.batch)
    title = f"Cost: {args.rows} rows of {LENGTH} tokens in batches of {args.batch}, fp32, {args.turns} turns"
    yield title, COLUMNS, [line for group, found in results for line in to_lines(group, found)]


def true_shape(args: argparse.Namespace) -> Iterator[tuple[str, str, list[list[str]]]]:
    """The 140M shape with random directions, whose cost is that of any others."""
    torch.manual_seed(0)
    model = MobileLLMForCausalLM(MobileLLMConfig.for_size("140M")).eval()
    rows = Dataset.from_dict({"input_ids": torch.randint(0, 128_000, (8, 512)).tolist()})
    directions = {name: torch.randn(3, *parameter.shape) for name, parameter in model.named_parameters()}
    exact = InfluenceScorer.from_directions(model, directions, ("code", "math", "knowledge"))
    contenders = {
        STEP: Contender(training_step(model, rows, 8)),
        "ours, C=3": ours(exact, rows, 8),
        "ours, in a training step, C=3": Contender(training_step(model, rows, 8, exact), held=directions),
        "ours, rank 16, C=3": ours(low_rank(exact, 16), rows, 8),
    }
    for name in ("ours, C=3", "ours, in a training step, C=3"):
        contenders[name].note = "limits: 1.15 CPU, 1.50 memory"
    results = measure(model, contenders, args.turns)
    yield "Cost at the 140M shape: 8 x 512 tokens, vocabulary 128,256, fp32", COLUMNS, to_lines(contenders, results)
