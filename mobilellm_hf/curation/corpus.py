"""The documents of a curation, as one memory-mapped data set, from corpora on disk and from streams.

A stream is read once, into shards beside the rest of the run, with its place in the source after each: an interrupted
read goes on from the last whole shard. What is on disk already is not copied.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate import PartialState
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets

from mobilellm_hf.curation.scoring import Rate, key_of, sources_of
from mobilellm_hf.data.catalog import SOURCES
from mobilellm_hf.data.corpora import CorpusError, load_corpus
from mobilellm_hf.data.local_files import find_files, looks_local
from mobilellm_hf.data.rows import expand_entry
from mobilellm_hf.workspace import write_whole

COLUMNS = ("text", "source", "domain")
SCHEMA = pa.schema([(name, pa.string()) for name in COLUMNS])
FEATURES = Features({name: Value("string") for name in COLUMNS})
DOCUMENTS_PER_SHARD = 5_000


def open_documents(
    entries: Sequence[Mapping[str, Any]], folder: Path, rate: Rate, max_documents: int | None = None, seed: int = 0
) -> Dataset:
    """The documents of all entries, with `text`, `source` and `domain`. The first process reads, the others wait.

    Args:
        entries: as in a recipe's YAML, see `data.rows`; no saved rows, which are tokens.
        folder: gets the documents of streams.
        rate: follows the documents read from streams.
        max_documents: of each entry at most: a random choice, of a stream the first.

    Raises:
        CorpusError: an entry cannot be loaded, or holds no document.
        ValueError: a stream without `max_documents`, which has no end to wait for.
    """
    with PartialState().main_process_first():
        parts = []
        for arguments, most in _with_limits(entries, max_documents):
            documents = load_corpus(**arguments)
            if isinstance(documents, IterableDataset):
                if most is None:
                    raise ValueError(f"{arguments['name']} is read as a stream, which may not end: give max_documents")
                place = folder / stream_key(arguments, most)
                documents = save_stream(documents, place, most, str(arguments["name"]), rate)
            elif most is not None and len(documents) > most:
                chosen = np.random.default_rng(seed).permutation(len(documents))[:most]
                documents = documents.select(np.sort(chosen))
            parts.append(_in_form(documents))
        return concatenate_datasets(parts)


def _with_limits(
    entries: Sequence[Mapping[str, Any]], max_documents: int | None
) -> Iterator[tuple[dict[str, Any], int | None]]:
    """What `load_corpus` is called with, and its documents at most: an entry's subsets have equal shares of those."""
    for entry in entries:
        subsets = expand_entry(entry)
        for number, arguments in enumerate(subsets):
            share = None
            if max_documents is not None:
                share = (number + 1) * max_documents // len(subsets) - number * max_documents // len(subsets)
            yield arguments, share


def stream_key(arguments: Mapping[str, Any], count: int) -> str:
    """What tells a stream's documents from others'; of local files their sizes and times of change too."""
    values = {
        name: f"{value.__module__}.{value.__qualname__}" if callable(value) else value
        for name, value in arguments.items()
    }
    stats = []
    if looks_local(str(arguments["name"])):
        files = find_files(str(arguments["name"]))[1]
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return key_of(values, count, stats)


def sample_documents(
    entries: Sequence[Mapping[str, Any]], count: int, max_documents: int | None = None, seed: int = 0
) -> tuple[Dataset, dict[str, float]]:
    """`count` documents of every source, of a stream the first, and source -> the documents it has in all.

    Args:
        max_documents: of each entry at most, as for `open_documents`.

    Raises:
        ValueError: an entry is a stream that the catalog does not know the size of, and `max_documents` is None.
    """
    parts, totals = [], {}
    for entry in entries:
        for arguments, most in _with_limits([entry], max_documents):
            documents = load_corpus(**arguments)
            if isinstance(documents, IterableDataset):
                subsets = len(expand_entry(entry))
                size = SOURCES[entry["catalog"]].rows / subsets if "catalog" in entry else most
                if size is None:
                    raise ValueError(f"{arguments['name']} is a stream of unknown length: give max_documents")
                documents = Dataset.from_list(list(itertools.islice(documents, count)))
                if not len(documents):
                    raise CorpusError(_no_document(str(arguments["name"])))
            else:
                size = len(documents)
            share = min(size, most or size) / len(documents)
            codes, names = sources_of(documents)
            for number, name in enumerate(names):
                rows = np.random.default_rng(seed).permutation(np.flatnonzero(codes == number))
                totals[name] = totals.get(name, 0.0) + len(rows) * share
                parts.append(_in_form(documents.select(np.sort(rows[:count]))))
    return concatenate_datasets(parts), totals


def save_stream(stream: IterableDataset, folder: Path, count: int, name: str, rate: Rate) -> Dataset:
    """The first `count` documents of a stream, on disk; a folder that was begun is gone on with.

    Raises:
        CorpusError: the stream has no document.
    """
    saved = _SavedStream(folder)
    rate.found(saved.documents)
    if not saved.ended:
        rate.begin()
        if saved.place is not None:
            stream.load_state_dict(saved.place)
        rows = itertools.islice(stream, count - saved.documents)
        while shard := list(itertools.islice(rows, DOCUMENTS_PER_SHARD)):
            saved.append(shard, stream.state_dict())
            rate.scored(len(shard))
        saved.end()
    if not saved.documents:
        raise CorpusError(_no_document(name))
    return saved.dataset()


def _in_form(documents: Dataset) -> Dataset:
    documents = documents.select_columns(list(COLUMNS))
    return documents if documents.features == FEATURES else documents.cast(FEATURES)  # such as large_string


def _no_document(name: str) -> str:
    return f"{name} holds no document: check the split, the text column and min_characters"


class _SavedStream:
    """Shards of a stream's documents, and the place in the stream after the last of them."""

    def __init__(self, folder: Path):
        self._folder, self._file = folder, folder / "state.json"
        state = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._shards: list[int] = state.get("shards", [])
        self.place: dict | None = state.get("place")
        self.ended: bool = state.get("ended", False)

    @property
    def documents(self) -> int:
        return sum(self._shards)

    def append(self, rows: Sequence[Mapping[str, str]], place: dict) -> None:
        table = pa.Table.from_pylist([{name: row[name] for name in COLUMNS} for row in rows], SCHEMA)
        write_whole(self._shard(len(self._shards)), lambda path: _write(path, table))
        self._shards.append(len(rows))
        self.place = place
        self._save()

    def end(self) -> None:
        self.ended = True
        self._save()

    def dataset(self) -> Dataset:
        return concatenate_datasets([Dataset.from_file(str(self._shard(i))) for i in range(len(self._shards))])

    def _save(self) -> None:
        state = json.dumps({"shards": self._shards, "place": self.place, "ended": self.ended})
        write_whole(self._file, lambda path: path.write_text(state))

    def _shard(self, number: int) -> Path:
        return self._folder / f"documents-{number:05d}.arrow"


def _write(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
