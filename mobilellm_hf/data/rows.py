"""Tokenized rows from a list of named sources, as recipes' YAML files write them.

- {name: "embedded:stdlib,sympy_docs", split: train}         # arguments of `load_corpus`, tokenized and packed
- {catalog: open_web_math}                                    # a source of the paper's, all its subsets
- {catalog: finemath, split: "train[:1%]", streaming: false, weight: 0.4}
- {catalog: finemath, exclude: runs/curate/probes}            # without the documents that a file of these probes holds
- {rows: runs/quickstart/rows, split: probe, sources: [stdlib]}    # a saved folder of packed rows, taken as it is

`load_rows` makes one data set of them; `load_sources` keeps the sources apart, as a mixture takes them, and reads
those with `streaming: true` as they are needed. The shares of a mixture are the business of `source_weights.py`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_from_disk,
)
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from mobilellm_hf.data import catalog
from mobilellm_hf.data.corpora import CorpusError, load_corpus
from mobilellm_hf.data.local_files import find_files
from mobilellm_hf.data.ngrams import SharedText, leave_out
from mobilellm_hf.data.packing import tokenize_and_pack
from mobilellm_hf.data.row_table import rows_by_source
from mobilellm_hf.data.source_weights import WEIGHT_KEYS, check_weight, one_source
from mobilellm_hf.data.streaming import PackedStream
from mobilellm_hf.nll import COLUMNS

CORPUS_KEYS = tuple(inspect.signature(load_corpus).parameters)
ROW_KEYS = ("rows", "split", "sources")
EXCLUDE = "exclude"
TEXT_KEYS = (*CORPUS_KEYS, EXCLUDE)


def check_entries(label: str, entries: Sequence[Mapping[str, Any]], weights: bool = False) -> None:
    """Raises a ValueError that names the field for an entry that is not written as above.

    Args:
        weights: whether entries may have a `weight`, or of the catalog a `stage` and `phase`; see `source_weights`.
    """
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{label} must be a list of sources such as {{name: 'embedded:stdlib'}}, not {entries!r}")
    for number, entry in enumerate(entries):
        place = f"{label}[{number}]"
        _check_fields(place, entry, weights)
        if "rows" in entry and not Path(entry["rows"]).is_dir():
            raise ValueError(f"{place}: there is no folder {entry['rows']}")
        if weights:
            check_weight(place, entry)
        try:
            expand_entry(entry)
            _excluded(entry)
        except CorpusError as error:
            raise ValueError(f"{place}: {error}") from error


def _check_fields(place: str, entry: Mapping[str, Any], weights: bool) -> None:
    kinds = [kind for kind in ("catalog", "rows", "name") if isinstance(entry, Mapping) and kind in entry]
    if len(kinds) != 1 and kinds != ["catalog", "name"]:
        raise ValueError(
            f"{place} must have either a name (of a corpus) or rows (a saved folder) or catalog (the paper's source), "
            f"not {entry!r}"
        )
    allowed = {"catalog": ("catalog", *TEXT_KEYS), "rows": ROW_KEYS, "name": TEXT_KEYS}[kinds[0]]
    if weights:
        allowed += WEIGHT_KEYS if kinds[0] == "catalog" else WEIGHT_KEYS[:1]
    if unknown := set(entry) - set(allowed):
        name = min(unknown)
        close = difflib.get_close_matches(name, allowed, n=1)
        hint = f". Did you mean {close[0]}?" if close else ""
        raise ValueError(f"{place} has the field {name!r}; it may have {', '.join(allowed)}{hint}")


def expand_entry(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `load_corpus` is called with, once for each subset of a source of the catalog; or a folder of rows."""
    given = {name: value for name, value in entry.items() if name not in ("catalog", EXCLUDE, *WEIGHT_KEYS)}
    if "catalog" in entry:
        return catalog.entries(entry["catalog"], **given)
    if "weight" in entry and "name" in entry:
        given["source"] = one_source("this entry", entry)
    return [given]


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
        rows_per_source: keep a random choice of so many rows of each source. Of a stream the first are taken, since
            no others are known.

    Raises:
        ValueError: an entry cannot be loaded, or is a stream and `rows_per_source` is None; the message names it and
            the remedy.
    """
    parts = []
    for part in _load_parts(entries, tokenizer, seq_length, config):
        if isinstance(part, PackedStream):
            if rows_per_source is None:
                raise ValueError(
                    f"{part.source} is read as a stream, which has no end to wait for: give the number of rows "
                    f"to take of each source, or streaming: false and a part of it, such as split: 'train[:1%]'"
                )
            part = _first_rows(part, rows_per_source)
        parts.append(part)
    rows = _concatenate(parts)
    return rows if rows_per_source is None else sample_per_source(rows, rows_per_source, seed)


def load_sources(
    entries: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    seq_length: int,
    config: PreTrainedConfig,
    shuffle_buffer: int = 0,
    seed: int = 0,
) -> dict[str, Dataset | PackedStream]:
    """source -> its rows: a stream for the entries with `streaming: true`, else a data set.

    Streams repeat without end. Several entries of one source, such as the subsets of a source of the catalog, become
    one stream that takes their documents in turn.

    Args:
        entries, tokenizer, seq_length, config: as for `load_rows`.
        shuffle_buffer: documents among which a stream chooses the next one at random; 0 leaves its order.

    Raises:
        ValueError: as for `load_rows`, or a source is given both as a stream and as rows.
    """
    parts = list(_load_parts(entries, tokenizer, seq_length, config, shuffle_buffer, seed))
    sources: dict[str, Dataset | PackedStream] = {}
    if tables := [part for part in parts if not isinstance(part, PackedStream)]:
        rows = _concatenate(tables)
        sources = {name: rows.select(numbers) for name, numbers in rows_by_source(rows).items()}
    for part in parts:
        if isinstance(part, PackedStream):
            if part.source in sources:
                raise ValueError(f"{part.source} is given both as a stream and as rows: choose one by streaming")
            sources[part.source] = part
    return sources


def _load_parts(
    entries: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    seq_length: int,
    config: PreTrainedConfig,
    shuffle_buffer: int = 0,
    seed: int = 0,
) -> Iterator[Dataset | PackedStream]:
    """The rows of each entry; after them a stream for each source of those that stream."""
    streams: dict[str, list[IterableDataset]] = {}
    excluded: dict[tuple[str, ...], SharedText] = {}
    for arguments, names in [(given, _excluded(entry)) for entry in entries for given in expand_entry(entry)]:
        if "rows" in arguments:
            yield _load_saved(arguments)
            continue
        if tokenizer is None:
            raise ValueError(f"{arguments['name']} is text: name the tokenizer that reads it")
        documents = load_corpus(**arguments)
        if names:
            if names not in excluded:
                excluded[names] = _load_excluded(names)
            documents = leave_out(documents, excluded[names], arguments["name"])
            if isinstance(documents, Dataset) and not len(documents):
                raise CorpusError(f"nothing is left of {arguments['name']}: {', '.join(names)} holds all of it")
        if isinstance(documents, Dataset):
            yield tokenize_and_pack(documents, tokenizer, seq_length, config=config)[0]
        else:
            source = PackedStream(documents, tokenizer, seq_length, config=config).source
            streams.setdefault(source, []).append(documents)
    for parts in streams.values():
        documents = parts[0]
        if len(parts) > 1:
            documents = interleave_datasets(parts, stopping_strategy="all_exhausted_without_replacement")
        if shuffle_buffer:
            documents = documents.shuffle(seed=seed, buffer_size=shuffle_buffer)
        yield PackedStream(documents, tokenizer, seq_length, config=config, repeat=True)


def _excluded(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The files and folders of `exclude`; there must be such."""
    names = entry.get(EXCLUDE, ())
    names = (names,) if isinstance(names, str) else names
    if EXCLUDE in entry and not (names and isinstance(names, list | tuple) and all(isinstance(n, str) for n in names)):
        raise CorpusError(f"exclude must be a folder or file of texts, or a list of them, not {entry[EXCLUDE]!r}")
    for name in names:
        if not Path(name).is_dir():
            find_files(name)
    return tuple(names)


def _load_excluded(names: Sequence[str]) -> SharedText:
    """Each file is a probe set, and so is a folder of `save_to_disk`."""
    sets = {}
    for name in names:
        folder = Path(name).expanduser()
        saved = any((folder / file).exists() for file in ("state.json", "dataset_dict.json"))
        for file in [folder] if saved else find_files(name)[1]:
            sets[str(file.resolve())] = file
    return SharedText({key: load_corpus(str(file), min_characters=1)["text"] for key, file in sets.items()})


def _first_rows(stream: PackedStream, count: int) -> Dataset:
    """The first rows of a stream, or all those of its first pass."""
    rows = []
    for row in stream:
        if len(rows) == count or stream.report:
            break
        rows.append({**row, "source": stream.source})
    return Dataset.from_list(rows)


def _concatenate(parts: Sequence[Dataset]) -> Dataset:
    columns = [name for name in (*COLUMNS, "source") if _in_all(name, parts)]
    # Saved rows may say less about their types than packed ones do.
    numbers = {name: List(Value("int32")) for name in columns if name != "source"}
    features = Features({**numbers, "source": Value("string")})
    return concatenate_datasets([part.select_columns(columns).cast(features) for part in parts])


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
