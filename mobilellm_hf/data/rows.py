"""Tokenized rows from a list of named sources, as recipes' YAML files write them.

- {name: "embedded:stdlib,sympy_docs", split: train}         # arguments of `load_corpus`, tokenized and packed
- {name: HuggingFaceTB/finemath, subset: finemath-4plus}
- {rows: runs/quickstart/rows, split: probe, sources: [stdlib]}    # a saved folder of packed rows, taken as it is
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets, load_from_disk
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from mobilellm_hf.data.corpora import CorpusError, load_corpus
from mobilellm_hf.data.packing import tokenize_and_pack
from mobilellm_hf.nll import COLUMNS

CORPUS_KEYS = tuple(inspect.signature(load_corpus).parameters)
ROW_KEYS = ("rows", "split", "sources")


def check_entries(label: str, entries: Sequence[Mapping[str, Any]]) -> None:
    """Raises a ValueError that names the field for an entry that is not written as above."""
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{label} must be a list of sources such as {{name: 'embedded:stdlib'}}, not {entries!r}")
    for number, entry in enumerate(entries):
        place = f"{label}[{number}]"
        if not isinstance(entry, Mapping) or ("name" in entry) == ("rows" in entry):
            raise ValueError(f"{place} must have either a name (of a corpus) or rows (a saved folder), not {entry!r}")
        allowed = CORPUS_KEYS if "name" in entry else ROW_KEYS
        if unknown := set(entry) - set(allowed):
            raise ValueError(f"{place} has the field {sorted(unknown)[0]!r}; it may have {', '.join(allowed)}")
        if "rows" in entry and not Path(entry["rows"]).is_dir():
            raise ValueError(f"{place}: there is no folder {entry['rows']}")


def load_rows(
    entries: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    seq_length: int,
    config: PreTrainedConfig,
    rows_per_source: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Rows with `input_ids`, `labels`, `source` (and `position_ids`, `attention_mask` if any), entry after entry.

    Args:
        entries: as above; saved rows need no tokenizer.
        config: of the model that will read them; a tokenizer with ids beyond its vocabulary is refused.
        rows_per_source: keep a random choice of so many rows of each source.

    Raises:
        ValueError: an entry cannot be loaded; the message names it and the remedy.
    """
    parts = [_load_saved(entry) if "rows" in entry else None for entry in entries]
    for number, entry in enumerate(entries):
        if parts[number] is None:
            if tokenizer is None:
                raise ValueError(f"{entry['name']} is text: name the tokenizer that reads it")
            documents = load_corpus(**entry)
            parts[number], _ = tokenize_and_pack(documents, tokenizer, seq_length, config=config)
    columns = [name for name in (*COLUMNS, "source") if _in_all(name, parts)]
    # Saved rows may say less about their types than packed ones do.
    numbers = {name: List(Value("int32")) for name in columns if name != "source"}
    features = Features({**numbers, "source": Value("string")})
    rows = concatenate_datasets([part.select_columns(columns).cast(features) for part in parts])
    return rows if rows_per_source is None else sample_per_source(rows, rows_per_source, seed)


def _in_all(name: str, parts: Sequence[Dataset]) -> bool:
    """Whether all parts have the column; a ValueError if some have."""
    present = [name in part.column_names for part in parts]
    if any(present) and not all(present):
        raise ValueError(f"some of the sources have the column {name!r} and others have not: pack them alike")
    return all(present)


def _load_saved(entry: Mapping[str, Any]) -> Dataset:
    folder, split = entry["rows"], entry.get("split", "train")
    dataset = load_from_disk(folder)
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise CorpusError(f"{folder} has no split {split!r}. Its splits: {', '.join(dataset)}.")
        dataset = dataset[split]
    if missing := {"input_ids", "labels", "source"} - set(dataset.column_names):
        raise CorpusError(f"{folder} has no column {sorted(missing)[0]!r}: it does not hold packed rows")
    if "sources" in entry:
        found = dataset["source"][:]
        if unknown := set(entry["sources"]) - set(found):
            present = ", ".join(sorted(set(found)))
            raise CorpusError(f"{folder} has no source {sorted(unknown)[0]!r}. Its sources: {present}.")
        dataset = dataset.select([row for row, source in enumerate(found) if source in entry["sources"]])
    return dataset


def sample_per_source(rows: Dataset, count: int, seed: int) -> Dataset:
    """A random choice of up to `count` rows of each source, in their order."""
    sources = np.asarray(rows["source"][:])
    rng = np.random.default_rng(seed)
    chosen = []
    for source in dict.fromkeys(sources.tolist()):
        places = np.flatnonzero(sources == source)
        chosen.append(np.sort(rng.permutation(places)[:count]))
    return rows.select(np.concatenate(chosen))
