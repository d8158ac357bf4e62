"""Do the scores rank training sets as retraining does? The linear datamodeling score, for benchmarks/influence.py.

Models are trained on random halves of a small data set; LDS is the rank correlation, over the halves, of a probe's
loss after training with the sum of the scores of what was trained on. The retraining is done once, so every method
is judged by the same models, and differences between methods by the same resampled halves.

Two settings: generated text with noise and wrong arithmetic in it (what is harmful is known), and documents from
files (nothing is made up but the noise, which is documents with their tokens in random order).
"""

import argparse
import json
import random
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from common import Measurement, measure_in_turns, ratio
from datasets import Dataset
from influence_rivals import (
    NOT_BLOCK_LINEAR,
    bergson_projected_scores,
    kronfluence_scores,
    less_scores,
    missing,
    quiet,
    trak_scores,
)
from rich.console import Console
from rich.progress import Progress
from transformers import get_linear_schedule_with_warmup

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.data.tokenization import train_tokenizer
from mobilellm_hf.influence import AdamCurvature, DataInfCurvature, InfluenceScorer
from mobilellm_hf.influence.ekfac import EKFACCurvature
from mobilellm_hf.influence.validation import half_subsets, spearman, subset_outcomes

KINDS = {"math": 60, "code": 50, "knowledge": 60, "wrong": 30, "noise": 40}
PROBE_ROWS = 24
TRAINING = dict(steps=60, batch_size=32, learning_rate=2e-3)
BATCH = 32
RESAMPLES = 1000
ADAM, IDENTITY, LINEAR = "ours, Adam", "ours, identity", "ours, identity, block Linear only"
EKFAC, ADAM_EMBEDDING = "kronfluence, EK-FAC", "ours, Adam, embedding and head only"
Method = Callable[[], torch.Tensor]


@dataclass
class Setting:
    """A small data set, the kind of each row, and its probes."""

    label: str
    vocabulary: int
    rows: Dataset
    kinds: list[str]
    probes: dict[str, Dataset]
    training: dict[str, float]

    def model(self, seed: int) -> MobileLLMForCausalLM:
        torch.manual_seed(seed)
        config = MobileLLMConfig(
            vocab_size=self.vocabulary, hidden_size=64, intermediate_size=176, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return MobileLLMForCausalLM(config)

    def trained(self) -> tuple[MobileLLMForCausalLM, torch.optim.Optimizer]:
        """A model of all rows, trained as `subset_outcomes` trains on halves, and its optimizer."""
        model = self.model(seed=0).train()
        steps, size = self.training["steps"], self.training["batch_size"]
        optimizer = torch.optim.AdamW(model.parameters(), self.training["learning_rate"], weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        ids = torch.tensor(self.rows["input_ids"][:])
        order = torch.cat([torch.randperm(len(ids)) for _ in range(-(-steps * size // len(ids)))])
        for chosen in order[: steps * size].view(steps, size):
            optimizer.zero_grad()
            model(input_ids=ids[chosen], labels=ids[chosen]).loss.backward()
            optimizer.step()
            schedule.step()
        return model.eval(), optimizer


def to_dataset(rows: torch.Tensor) -> Dataset:
    return Dataset.from_dict({"input_ids": rows.tolist()})


def generated_setting(length: int = 64) -> Setting:
    """Characters: sums, loops and facts, and among them wrong sums and noise."""
    draw = random.Random(0)
    names = [f"{first}{second}" for first in "ABCDEF" for second in "uvwxyz"]
    facts = [f"{name} is {draw.choice('klmnpqrst')}{draw.choice('aeiou')}{draw.choice('bdfgz')}. " for name in names]

    def sentence(kind: str, index: int) -> str:
        if kind == "code":
            name = draw.choice("xyz")
            return f"for {name} in r({draw.randint(1, 9)}): p({name})\n"
        if kind == "knowledge":
            return facts[(3 * index + draw.randrange(3)) % len(facts)]
        if kind == "noise":
            return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(8))
        left, right = draw.randint(0, 19), draw.randint(0, 19)
        return f"{left}+{right}={left + right if kind == 'math' else draw.randint(0, 38)};"

    def row(kind: str, index: int) -> list[int]:
        text = ""
        while len(text) < length:
            text += sentence(kind, index)
        return [ord(character) for character in text[:length]]

    kinds = [kind for kind, count in KINDS.items() for _ in range(count)]
    rows = torch.tensor([row(kind, index) for index, kind in enumerate(kinds)])
    probes = {kind: [row(kind, index) for index in range(PROBE_ROWS)] for kind in ("math", "code", "knowledge")}
    probes = {kind: to_dataset(torch.tensor(values)) for kind, values in probes.items()}
    return Setting("generated text", 128, to_dataset(rows), kinds, probes, dict(TRAINING))


def text_setting(folder: Path, length: int = 64, vocabulary: int = 512) -> Setting:
    """The starts of GSM8K's problems, HumanEval's functions and WikiText-2's articles, and 40 of them shuffled."""
    problems, functions = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("gsm8k_train.jsonl", "humaneval.jsonl")
    )
    articles = re.split(r"\n (?== [^=]+ = \n)", (folder / "wikitext2_valid.txt").read_text())
    paragraphs = [line for article in articles for line in article.splitlines() if len(line) > 6 * length]
    documents = {
        "math": [f"{problem['question']}\n{problem['answer']}" for problem in problems],
        "code": [function["prompt"] + function["canonical_solution"] for function in functions],
        "knowledge": paragraphs,
    }
    texts = [text for texts in documents.values() for text in texts[:500]]
    tokenizer = train_tokenizer(texts, vocabulary, show_progress=False)
    generator, rows, kinds, probes = torch.Generator().manual_seed(0), [], [], {}
    for kind, found in documents.items():
        ids = [ids[:length] for ids in tokenizer(found[:1000])["input_ids"] if len(ids) >= length]
        ids = torch.tensor(ids)[torch.randperm(len(ids), generator=generator)]
        probes[kind] = to_dataset(ids[:PROBE_ROWS])
        rows.append(ids[PROBE_ROWS : PROBE_ROWS + KINDS[kind] + 10])
        kinds += [kind] * len(rows[-1])
    clean = torch.cat(rows)
    noise = clean[torch.randperm(len(clean), generator=generator)[: KINDS["noise"]]]
    noise = torch.stack([row[torch.randperm(length, generator=generator)] for row in noise])
    rows, kinds = torch.cat([clean, noise]), kinds + ["noise"] * len(noise)
    training = TRAINING | {"steps": 90}
    return Setting("GSM8K, HumanEval, WikiText-2", len(tokenizer), to_dataset(rows), kinds, probes, training)


def outcomes(setting: Setting, halves: torch.Tensor, seeds: int) -> torch.Tensor:
    """(seeds, halves, probes) mean NLL after training on each half."""
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("retraining", total=seeds * len(halves))
        return torch.stack([
            subset_outcomes(
                setting.model, setting.rows, setting.probes, halves, seeds=(seed,), **setting.training,
                on_model=lambda *_: progress.advance(task),
            )
            for seed in range(seeds)
        ])  # fmt: skip


def resampled_lds(scores: torch.Tensor, halves: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """(resamples, probes) LDS of bootstrap samples of the halves, the first of which are the halves themselves.

    The samples are the same for every method, so that two methods are compared sample by sample.
    """
    draws = torch.randint(len(halves), (RESAMPLES, len(halves)), generator=torch.Generator().manual_seed(0))
    draws = torch.cat([torch.arange(len(halves))[None], draws])
    predicted, quality = (halves.double() @ scores.double()).mT, -losses.mT
    return spearman(predicted[:, draws], quality[:, draws]).mT


def auc(better: torch.Tensor, worse: torch.Tensor) -> str:
    """How often the better of a pair has the higher score."""
    return f"{(better[:, None] > worse[None]).double().mean():.2f}" if len(worse) else ""


def quality(setting: Setting, scores: torch.Tensor) -> list[str]:
    """AUC of telling noise from the rest, and wrong sums from right ones; the share that a rule `sum > 0` rejects."""
    total = scores.sum(1)
    kind = {name: torch.tensor([other == name for other in setting.kinds]) for name in KINDS}
    clean = kind["math"] | kind["code"] | kind["knowledge"]
    math = scores[:, list(setting.probes).index("math")]
    return [
        auc(total[clean], total[kind["noise"]]),
        auc(math[kind["math"]], math[kind["wrong"]]),
        f"{(total <= 0).double().mean():.0%}",
    ]


def lds_methods(setting: Setting, model: MobileLLMForCausalLM, optimizer) -> dict[str, Method | str]:
    """Every method from the weights to the scores, or what has to be installed for it."""
    rows, probes, batch = setting.rows, setting.probes, BATCH

    def ours(curvature=lambda: "identity", **options) -> torch.Tensor:
        scorer = InfluenceScorer(model, probes, curvature(), batch_size=PROBE_ROWS, **options)
        return scorer.score(rows, batch, allow_overlap=True)

    def adam() -> AdamCurvature:
        return AdamCurvature.from_optimizer(optimizer, model)

    def of_library(library: str, method: Method) -> Method | str:
        return missing(library) or method

    kronfluence = partial(kronfluence_scores, model, rows, probes, batch=batch)
    return {
        "random": lambda: torch.randn(len(rows), len(probes), generator=torch.Generator().manual_seed(0)),
        IDENTITY: ours,
        LINEAR: lambda: ours(exclude=NOT_BLOCK_LINEAR),
        ADAM: lambda: ours(adam),
        ADAM_EMBEDDING: lambda: ours(adam, exclude=["model.layers.*", "model.norm.*"]),
        "ours, Adam, block Linear only": lambda: ours(adam, exclude=NOT_BLOCK_LINEAR),
        "ours, DataInf, embedding and final": lambda: ours(lambda: DataInfCurvature(model, rows)),
        "ours, DataInf, all": lambda: ours(lambda: DataInfCurvature(model, rows, "all")),
        "ours with kronfluence's EK-FAC factors": of_library(
            "kronfluence", lambda: ours(lambda: EKFACCurvature(model, rows, batch))
        ),
        "kronfluence, identity": of_library("kronfluence", lambda: kronfluence("identity")),
        EKFAC: of_library("kronfluence", lambda: kronfluence("ekfac")),
        "bergson, projected to 16 x 16": of_library(
            "bergson", lambda: bergson_projected_scores(model, rows, probes, batch)
        ),
        "TRAK, 2,048 numbers": lambda: trak_scores(model, rows, probes),
        "LESS, 2,048 numbers": lambda: less_scores(model, rows, probes, adam()),
    }


def lds(args: argparse.Namespace) -> Iterator[tuple[str, str, list[list[str]]]]:
    setting = generated_setting() if args.data is None else text_setting(args.data)
    setting.training["steps"] = args.steps or setting.training["steps"]
    halves = half_subsets(len(setting.rows), args.subsets, seed=0)
    losses = outcomes(setting, halves, args.seeds)
    methods, scores = lds_methods(setting, *setting.trained()), {}

    def keeping(name: str, method: Method) -> Callable[[], None]:
        return lambda: scores.update({name: method()})

    with quiet():
        runs = {name: keeping(name, method) for name, method in methods.items() if callable(method)}
        results = measure_in_turns(runs, args.turns)
    resampled = {name: resampled_lds(found, halves, losses.mean(0)) for name, found in scores.items()}
    title = f"LDS, {setting.label}: {len(setting.rows)} rows, {args.subsets} halves x {args.seeds} seeds"
    columns = f"method | mean LDS | s.e. | {' '.join(setting.probes)} | AUC noise | AUC wrong | rejected"
    lines = [
        [name, *figures(setting, scores[name], resampled[name], results[name], ratio(results, name, ADAM))]
        if name in scores
        else [name, *[""] * 8, method]
        for name, method in methods.items()
    ]
    yield f"{title}, {setting.training['steps']} steps", f"{columns} | CPU s | to Adam's | ", lines
    yield "LDS: claims and limits", "figure | found | s.e. | claimed | ", claims(losses, resampled, results)


def figures(
    setting: Setting, scores: torch.Tensor, resampled: torch.Tensor, measured: Measurement, to_adam: float
) -> list[str]:
    means = resampled.mean(1)
    probes = " ".join(f"{value:.2f}" for value in resampled[0].tolist())
    seconds = f"{statistics.median(measured.cpu):.2f}"
    return [
        f"{means[0]:.3f}",
        f"{means[1:].std():.3f}",
        probes,
        *quality(setting, scores),
        seconds,
        f"{to_adam:.2f}",
        "",
    ]


def claims(losses: torch.Tensor, resampled: dict, results: dict) -> list[list[str]]:
    """Differences between methods on the same halves, and how well one seed's outcomes rank another's."""
    lines = []
    pairs = (
        (ADAM, EKFAC, ">= 0"), (ADAM_EMBEDDING, EKFAC, ""), (ADAM, IDENTITY, ""), (IDENTITY, LINEAR, ""),
    )  # fmt: skip
    for better, worse, claimed in pairs:
        if worse in resampled:
            difference = (resampled[better] - resampled[worse]).mean(1)
            found = [f"{difference[0]:+.3f}", f"{difference[1:].std():.3f}", claimed]
            verdict = ("ok" if difference[0] >= 0 else "FAILS") if claimed else ""
            lines.append([f"LDS, {better!r} minus {worse!r}", *found, verdict])
    if EKFAC in results:
        share = 1 / ratio(results, EKFAC, ADAM)
        verdict = "ok" if share <= 0.1 else "FAILS"
        lines.append([f"CPU, {ADAM!r} over {EKFAC!r}", f"{share:.3f}", "", "<= 0.1", verdict])
    for seed in range(1, len(losses)):
        values = spearman(losses[0].mT, losses[seed].mT).tolist()
        lines.append(
            [f"rank correlation of seeds 0 and {seed}", " ".join(f"{value:.2f}" for value in values), *[""] * 3]
        )
    return lines
