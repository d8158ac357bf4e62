"""Influence scores: how exact they are, what they cost, and whether they predict what retraining does.

    python benchmarks/influence.py                      # all but 140M: half an hour on one core
    python benchmarks/influence.py --only lds --data F  # F has gsm8k_train.jsonl, humaneval.jsonl, wikitext2_valid.txt
    python benchmarks/influence.py --only 140M          # the true shape: five minutes, 10 GB

Everything runs in turns in one process on one thread, so CPU seconds compare where wall clocks of a shared machine do
not. The unit of cost is the training step: forward and backward of the same rows by the same model, no optimizer.
Libraries are given the same weights; one that is not installed keeps its row, with the command that installs it.
"""

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from common import machine
from datasets import Dataset
from influence_cost import cost, true_shape
from influence_lds import lds
from influence_rivals import naive_scores
from rich.console import Console
from rich.table import Table

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.influence import InfluenceScorer

Gradient = dict[str, torch.Tensor]


def reference_gradients(model: MobileLLMForCausalLM, rows: Dataset) -> list[Gradient]:
    """In fp64, one row at a time, from full logits, by autograd: no code in common with what is judged by it."""
    model, result = copy.deepcopy(model).double().eval(), []
    for row in rows.with_format("torch"):
        inputs = {name: row[name][None] for name in ("input_ids", "position_ids")}
        logits, targets = model(**inputs, use_cache=False).logits[0, :-1], row["labels"][1:]
        kept = targets != -100
        nll = -logits.log_softmax(-1)[kept].gather(-1, targets[kept][:, None]).mean()
        gradients = torch.autograd.grad(nll, list(model.parameters()))
        result.append({name: g for (name, _), g in zip(model.named_parameters(), gradients, strict=True)})
    return result


def random_rows(count: int, seed: int) -> Dataset:
    """Packed rows of two documents, with labels missing at random.

    Ids are about as unequal in frequency as a text's. With uniform ones gradients have next to nothing in common, and
    the relative error of their products, autograd's own included, is three times as large.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = (300 * torch.rand((count, 48), generator=generator) ** 3).long()
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
    positions = [[*range(20), *range(28)]] * count
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist(), "position_ids": positions})


def random_model() -> MobileLLMForCausalLM:
    torch.manual_seed(0)
    config = MobileLLMConfig(
        vocab_size=300, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = MobileLLMForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # or every norm weight would be one, and an error in it unseen
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def combination(gradients: list[Gradient], weights: torch.Tensor) -> Gradient:
    return {
        name: sum(weight * gradient[name] for weight, gradient in zip(weights, gradients, strict=True))
        for name in gradients[0]
    }


def inner_product(left: Gradient, right: Gradient) -> torch.Tensor:
    return sum((left[name] * right[name]).sum() for name in left)


def training_gradients(model: MobileLLMForCausalLM, rows: Dataset) -> Gradient:
    model.zero_grad()
    model.train()(**{name: torch.tensor(rows[name][:]) for name in rows.column_names}).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def worst_probe(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm-wise relative error of a probe's scores, largest over the probes."""
    return ((found - expected).norm(dim=0) / expected.norm(dim=0)).max().item()


def worst_parameter(found: Gradient, expected: Gradient) -> float:
    return max(((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)


def exactness(args: argparse.Namespace) -> Iterator[tuple[str, str, list[list[str]]]]:
    """Scores and parameter gradients in fp32 and fp64 against the reference."""
    model, rows = random_model(), random_rows(16, seed=1)
    probes = {name: random_rows(5, seed) for seed, name in enumerate(("code", "math", "knowledge"), start=2)}
    gradients = reference_gradients(model, rows)
    fifths = torch.full((5,), 0.2, dtype=torch.double)
    means = [combination(reference_gradients(model, probe), fifths) for probe in probes.values()]
    expected = torch.stack([torch.stack([inner_product(own, mean) for mean in means]) for own in gradients])
    tokens = torch.tensor([sum(label != -100 for label in row["labels"][1:]) for row in rows], dtype=torch.double)
    trained = combination(gradients, tokens / tokens.sum())
    lines = []
    for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        model = model.to(dtype)
        scorer = InfluenceScorer(model, probes)
        plain = training_gradients(model, rows)
        with scorer.in_training_step() as influence:
            fused, taken = training_gradients(model, rows), influence.take()
        by_position = scorer.score(rows, per_token=True)
        figures = {
            "scores": worst_probe(scorer.score(rows), expected),
            "scores, summed over positions": worst_probe(torch.stack([row.sum(0) for row in by_position]), expected),
            "scores taken inside a training step": worst_probe(taken, expected),
            "(autograd's, row by row)": worst_probe(naive_scores(model, rows, scorer.directions), expected),
            "parameter gradients of that step": worst_parameter(fused, trained),
            "(of a plain training step)": worst_parameter(plain, trained),
        }
        for name, error in figures.items():
            verdict = "" if name.startswith("(") else "ok" if error <= limit else "FAILS"
            lines.append([name, str(dtype).removeprefix("torch."), f"{error:.1e}", f"{limit:.0e}", verdict])
    title = "Exactness: relative error against autograd in fp64, one row at a time"
    yield title, "largest over probes, or parameters | dtype | error | limit | ", lines


SECTIONS = {"exactness": exactness, "cost": cost, "lds": lds, "140M": true_shape}


def show(title: str, columns: str, lines: list[list[str]]) -> None:
    """Columns without an entry are left out."""
    table = Table(title=title, title_justify="left")
    filled = [any(cells) for cells in zip(*lines, strict=True)]
    for number, column in enumerate(columns.split(" | ")):
        if filled[number]:
            table.add_column(column, justify="right" if number else "left")
    for line in lines:
        table.add_row(*(cell for cell, shown in zip(line, filled, strict=True) if shown))
    Console(width=140).print(table)


def sections(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(SECTIONS):
        raise argparse.ArgumentTypeError(f"no section {sorted(unknown)[0]!r}; there are {', '.join(SECTIONS)}")
    return names


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--only", type=sections, default="exactness,cost,lds", help=f"sections to run, of {', '.join(SECTIONS)}"
    )
    parser.add_argument("--turns", type=int, default=5, help="counted turns of cost, lds and 140M")
    parser.add_argument("--batch", type=int, default=8, help="cost: rows of a batch, for every method")
    parser.add_argument("--rows", type=int, default=16, help="cost: rows that are scored")
    parser.add_argument("--train-steps", type=int, default=40, help="cost: steps that the model is trained beforehand")
    parser.add_argument("--agreement-rows", type=int, default=64, help="cost: rows for the low ranks' correlation")
    parser.add_argument("--subsets", type=int, default=40, help="lds: random halves of the data that are trained on")
    parser.add_argument("--seeds", type=int, default=2, help="lds: trainings on each half")
    parser.add_argument("--steps", type=int, help="lds: steps of a training; by default 60, or 90 with --data")
    parser.add_argument("--data", type=Path, help="lds: folder of text; without it the text is generated")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    print(machine())
    for name in args.only:
        for table in SECTIONS[name](args):
            show(*table)


if __name__ == "__main__":
    main()
