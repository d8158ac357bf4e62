"""The files in which other tools take a mixture, and the card that says where its weights come from.

    write_export(export, Path("runs/export"), rows=None)

The folder gets interleave.py and interleave.json for `datasets.interleave_datasets`, trl.yaml (a config of
`trl.DatasetMixtureConfig`), ms_swift.sh, llamafactory.yaml with dataset_info.json, and README.md.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mobilellm_hf.data.local_files import looks_local
from mobilellm_hf.data.weights_card import card
from mobilellm_hf.data.weights_export import WeightsExport
from mobilellm_hf.workspace import write_whole


def write_export(export: WeightsExport, folder: Path, rows: int | None = None) -> None:
    """All files. rows: of the whole mixture; with it ms-swift is told counts, else probabilities."""
    files = {
        "interleave.py": interleave_script(export),
        "interleave.json": json.dumps(interleave_document(export), indent=2) + "\n",
        "trl.yaml": _dump({"datasets": trl_datasets(export)}, TRL_NOTE),
        "ms_swift.sh": ms_swift_script(export, rows),
        "llamafactory.yaml": _dump(llamafactory_arguments(export), LLAMAFACTORY_NOTE),
        "dataset_info.json": json.dumps(llamafactory_info(export), indent=2) + "\n",
        "README.md": card(export),
    }
    for name, text in files.items():
        write_whole(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))


TRL_NOTE = """\
# For recipes that take trl.DatasetMixtureConfig, such as `trl sft --config trl.yaml`. A fraction is of the rows, made
# from shares of tokens. TRL takes the first rows of each data set, as many as the smallest allows, and streams none.
"""
LLAMAFACTORY_NOTE = """\
# To be added to the arguments of `llamafactory-cli train`; dataset_dir is the folder of dataset_info.json. The
# probabilities are of rows, made from shares of tokens. The mixture ends when one of the data sets is through.
"""
SCRIPT = '''"""Rows of {count} data sets whose tokens are in the shares that README.md lists.

    from interleave import load
    rows = load(seed=0)                  # streaming=True reads them as it goes
"""

from datasets import interleave_datasets, load_dataset

# name: (arguments of load_dataset, column with the text, probability of a row)
PARTS = {parts}


def load(seed=0, streaming=False, stopping_strategy="first_exhausted"):
    """Rows of one column, `text`. The mixture ends with the first data set that is through, or repeats it until all
    are (`stopping_strategy="all_exhausted"`); its shares are those of README.md in both cases."""
    sources = []
    for arguments, column, _ in PARTS.values():
        rows = load_dataset(**arguments, streaming=streaming).select_columns([column])
        sources.append(rows if column == "text" else rows.rename_column(column, "text"))
    probabilities = [probability for *_, probability in PARTS.values()]
    return interleave_datasets(sources, probabilities, seed=seed, stopping_strategy=stopping_strategy)


if __name__ == "__main__":
    for row in load(streaming=True).take(5):
        print(row["text"][:100])
'''


def _dump(document: Mapping[str, Any], note: str) -> str:
    return note + yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def interleave_script(export: WeightsExport) -> str:
    """A module that imports nothing but `datasets`."""
    lines = [
        f"    {name!r}: ({location.arguments()!r}, {location.column!r}, {probability!r}),"
        for name, location, probability in export.parts()
    ]
    return SCRIPT.format(count=len(lines), parts="\n".join(["{", *lines, "}"]))


def interleave_document(export: WeightsExport) -> dict[str, Any]:
    """The arguments of `interleave_datasets`, and what each of the data sets is."""
    parts = export.parts()
    return {
        "datasets": [{"source": name, **location.arguments()} for name, location, _ in parts],
        "probabilities": [probability for *_, probability in parts],
        "stopping_strategy": "first_exhausted",
        "shares_of_tokens": {source.name: source.share for source in export.sources},
    }


def trl_datasets(export: WeightsExport) -> list[dict[str, Any]]:
    """Fields of `trl.scripts.utils.DatasetConfig`."""
    return [
        {**location.arguments(), "columns": [location.column], "fraction": probability}
        for _, location, probability in export.parts()
    ]


def ms_swift_script(export: WeightsExport, rows: int | None = None) -> str:
    """A command line of `swift pt`: `--dataset 'path:subset#count'`, or `--interleave_prob`."""
    parts = export.parts()
    names = [
        location.path + (f":{location.name}" if location.name else "") + (f"#{round(p * rows)}" if rows else "")
        for _, location, p in parts
    ]
    lines = [
        "#!/bin/sh",
        "# ./ms_swift.sh --model MODEL ...; rows are drawn by probabilities made from shares of tokens.",
        "exec swift pt --use_hf true \\",
        *(f"    {'--dataset ' if number == 0 else ''}{shlex.quote(name)} \\" for number, name in enumerate(names)),
    ]
    if not rows:
        lines += [
            "    --interleave_prob " + " ".join(f"{p:.10g}" for *_, p in parts) + " \\",
            "    --stopping_strategy first_exhausted \\",
        ]
    return "\n".join([*lines, '    "$@"', ""])


def llamafactory_arguments(export: WeightsExport) -> dict[str, Any]:
    """Of its `DataArguments`."""
    parts = export.parts()
    return {
        "dataset_dir": ".",
        "dataset": ",".join(name for name, *_ in parts),
        "mix_strategy": "interleave_under",
        "interleave_probs": ",".join(f"{probability:.10g}" for *_, probability in parts),
    }


def llamafactory_info(export: WeightsExport) -> dict[str, Any]:
    """`dataset_info.json`: text for pre-training is the column that is called `prompt`."""
    found = {}
    for name, location, _ in export.parts():
        local = looks_local(location.path)
        entry = {"file_name": str(Path(location.path).resolve())} if local else {"hf_hub_url": location.path}
        if location.name:
            entry["subset"] = location.name
        if location.split != "train":
            entry["split"] = location.split
        found[name] = {**entry, "columns": {"prompt": location.column}}
    return found
