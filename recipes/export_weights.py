# /// script
# dependencies = ["mobilellm_hf"]
# ///
"""Writes a mixture's weights as datasets.interleave_datasets, TRL, ms-swift and LlamaFactory take them, with a card.

    python recipes/export_weights.py --mixture runs/influence/mixture.yaml --output runs/export --config places.yaml
    python recipes/export_weights.py --mixture mixture.yaml --output runs/export --tokenizer org/model

Our weights are shares of tokens and these tools draw rows, so what they are given is divided by the mean tokens of a
row: counted with a tokenizer, given, or the paper's. Where a source is, the mixture's file says if the recipe that
scored it was given corpora; else `places.yaml` does:

    datasets:
      code: {path: org/code, name: python, split: train, column: content}
      math: {path: copies/math.jsonl}
    tokens_per_row: {code: 812.5}
"""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import mobilellm_hf  # noqa: F401  # isort: skip  # first: it keeps torchao quiet, which transformers imports

from datasets import load_dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from mobilellm_hf.data.weights_export import Location, WeightsExport, read_export
from mobilellm_hf.data.weights_formats import write_export
from mobilellm_hf.launch import launch, option


@dataclass
class ExportWeightsArguments:
    mixture: str = field(metadata={"help": "YAML file with a key weights, such as runs/influence/mixture.yaml"})
    output: str = field(metadata={"help": "folder of the files; those of the same names are replaced"})
    datasets: dict = option(
        "YAML only: source -> {path, name, data_files, split, column}, or a list of such, where the mixture's file "
        "does not say it",
        dict,
    )
    tokens_per_row: dict = option("YAML only: source -> mean tokens of a row, instead of counting", dict)
    tokenizer: str | None = option("folder or Hub id; counts the tokens of some rows of each source")
    measured_rows: int = option("rows of each source whose tokens are counted, the first ones", 1_000)
    rows: int | None = option("of the whole mixture: ms-swift is then told counts instead of probabilities")

    def check(self) -> None:
        for name in ("measured_rows", "rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


def run(args: ExportWeightsArguments, console: Console) -> None:
    args.check()
    measure = None
    if args.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        measure = lambda place: mean_tokens(place, tokenizer, args.measured_rows)  # noqa: E731
    export = read_export(args.mixture, args.datasets, args.tokens_per_row, measure)
    write_export(export, Path(args.output), args.rows)
    console.print(shares_table(export))
    console.print(f"{args.output}: interleave.py, trl.yaml, ms_swift.sh, llamafactory.yaml; README.md is their card")


def mean_tokens(place: Location, tokenizer, count: int) -> float:
    """Of the first rows of a data set, without special tokens."""
    try:
        rows = list(islice(load_dataset(**place.arguments(), streaming=True), count))
        texts = [row[place.column] for row in rows]
    except KeyError as error:
        raise ValueError(f"{place.path} has no column {error}: give column in datasets") from error
    if not texts:
        raise ValueError(f"{place.path} has no rows to count the tokens of")
    return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) / len(texts)


def shares_table(export: WeightsExport) -> Table:
    table = Table("source", "share of tokens", "tokens a row", "share of rows")
    for source in export.sources:
        mean = f"{source.tokens_per_row:,.1f} ({source.tokens_from})"
        table.add_row(source.name, f"{source.share:.2%}", mean, f"{source.probability:.2%}")
    return table


if __name__ == "__main__":
    launch(__doc__, (ExportWeightsArguments,), run)
