"""What a model says of every document, by any number of processes, in shards that a kill does not cost.

A shard is a range of documents and one Arrow file, whole or absent. It carries the key of what it was made from (the
documents and the scorer's settings), so that a file of another run is never taken for this one's. Files are memory
mapped: what a stage reads of them is what it asks for.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedModel

from mobilellm_hf.workspace import write_whole

OnDocuments = Callable[[int], None]


# A batch of so many tokens ends where the next row would be more than this share of padding.
LEAST_TOKENS, MOST_PADDING = 1_024, 0.1
# Files of a model's folder: configuration, weights, vocabulary and chat template.
IDENTIFYING = (".json", ".safetensors", ".bin", ".txt", ".model", ".jinja")


class DocumentScorer(Protocol):
    """Scores texts: column -> one number a text, or one vector (N, D). Loads its model when it is first asked."""

    def score(
        self, texts: Sequence[str], sources: Sequence[str], on_documents: OnDocuments | None = None
    ) -> Mapping[str, np.ndarray]: ...


def key_of(*parts: Any) -> str:
    """A hash of JSON values."""
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def model_identity(model: str | Path | PreTrainedModel, revision: str | None = None) -> str:
    """What tells a model from another: a Hub id and revision, or a hash of a folder's or a loaded model's weights.

    Of a file of weights the first and the last MiB are read: what is trained changes everywhere.
    """
    digest = blake2b(digest_size=16)
    if isinstance(model, PreTrainedModel):
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {torch.hash_tensor(tensor).item()}".encode())
        return f"{type(model).__name__} {digest.hexdigest()}"
    if not Path(model).is_dir():
        return f"{model}@{revision}"
    for file in sorted(file for file in Path(model).iterdir() if file.suffix in IDENTIFYING):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(2**20))
            stream.seek(max(0, size - 2**20))
            digest.update(stream.read(2**20))
    return f"{Path(model).name} {digest.hexdigest()}"


def load_named(auto_class: type, role: str, name: str, revision: str | None) -> Any:
    """What an Auto class makes of a model's name.

    Raises:
        ValueError: there is no such folder or Hub id; the message says what was to be loaded.
    """
    try:
        return auto_class.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        what = "no folder or Hub model that loads" if not Path(name).is_dir() else "a folder that does not load"
        raise ValueError(f"{role}: {name} is {what} ({str(error).splitlines()[0]})") from error


def documents_key(documents: Dataset) -> str:
    """A hash of all texts and sources, in order. The first process reads them, and tells the others."""
    digest = blake2b(digest_size=16)
    if PartialState().is_main_process:
        for batch in documents.select_columns(["text", "source"]).iter(1_000):
            for text, source in zip(batch["text"], batch["source"], strict=True):
                for part in (text, source):
                    encoded = part.encode("utf-8", "surrogatepass")
                    digest.update(len(encoded).to_bytes(8, "little") + encoded)
    key = [digest.hexdigest()]
    if PartialState().num_processes > 1:
        broadcast_object_list(key)
    return key[0]


def sources_of(documents: Dataset) -> tuple[np.ndarray, list[str]]:
    """(N,) int32, each document's source as a number, and the names of the sources."""
    codes: dict[str, int] = {}
    parts = []
    for batch in documents.select_columns("source").with_format("arrow").iter(100_000):
        column = batch["source"].combine_chunks().dictionary_encode()
        known = [codes.setdefault(name, len(codes)) for name in column.dictionary.to_pylist()]
        parts.append(np.asarray(known, np.int32)[column.indices.to_numpy()])
    return np.concatenate(parts), list(codes)


def length_batches(lengths: Sequence[int], batch_tokens: int | None) -> Iterator[list[int]]:
    """Indices in batches of like lengths, each of at most `batch_tokens` with its padding, or a single one.

    The longest come first: what does not fit into memory fails at once. By default an accelerator gets 16,384 tokens
    a batch. A CPU gets 1,024, for larger ones do not fit its caches and take more than half as long again.
    """
    if batch_tokens is None:
        batch_tokens = 1_024 if PartialState().device.type == "cpu" else 16_384
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch:
            longest = lengths[batch[0]]
            full = longest * (len(batch) + 1) > batch_tokens
            ragged = longest * len(batch) >= LEAST_TOKENS and lengths[index] < (1 - MOST_PADDING) * longest
            if full or ragged:
                yield batch
                batch = []
        batch.append(index)
    if batch:
        yield batch


class Rate:
    """Documents per second of all processes, of what was scored and not found on disk."""

    def __init__(self, on_documents: OnDocuments | None = None, say: Callable[[str], None] | None = None):
        self._on_documents, self._say = on_documents, say
        self._scored, self._began = 0, 0.0

    def begin(self) -> None:
        self._began = self._began or time.perf_counter()

    def found(self, documents: int) -> None:
        if self._on_documents is not None:
            self._on_documents(documents)

    def scored(self, documents: int) -> None:
        self.found(documents)
        self._scored += documents
        seconds = time.perf_counter() - self._began
        if self._say is not None and seconds > 0:
            self._say(f"{self._scored / seconds:,.0f} documents/s")


class ShardedScores:
    """The scores of a data set on disk. Columns are read one by one; vectors a few rows at a time."""

    def __init__(self, folder: Path, documents: int, per_shard: int):
        self._per_shard, self._documents = per_shard, documents
        self._files = [_shard_file(folder, number) for number in range(-(-documents // per_shard))]

    def column(self, name: str) -> np.ndarray:
        """(N,) one number a document."""
        return np.concatenate([_read(file)[name].to_numpy() for file in self._files])

    def vectors(self, name: str) -> "Vectors":
        return Vectors(self._files, name, self._documents, self._per_shard)


class Vectors:
    """(N, D) of a column of vectors, of which only the rows that are asked for are read."""

    def __init__(self, files: Sequence[Path], name: str, documents: int, per_shard: int):
        self._files, self._name, self._documents, self._per_shard = files, name, documents, per_shard

    def __len__(self) -> int:
        return self._documents

    def __getitem__(self, rows: Sequence[int] | slice) -> np.ndarray:
        rows = np.arange(self._documents)[rows]
        shards, places = np.divmod(rows, self._per_shard)
        parts = {shard: self._shard(int(shard)) for shard in np.unique(shards)}
        width = next(iter(parts.values())).shape[1] if parts else 0
        out = np.empty((len(rows), width), np.float32)
        for shard, part in parts.items():
            here = shards == shard
            out[here] = part[places[here]]
        return out

    def _shard(self, number: int) -> np.ndarray:
        column = _read(self._files[number])[self._name].combine_chunks()
        return column.flatten().to_numpy().reshape(len(column), -1)


def score_documents(
    documents: Dataset, scorer: DocumentScorer, folder: Path, key: str, per_shard: int, rate: Rate
) -> ShardedScores:
    """Scores what is not on disk yet. Processes take shards in turn, and leave together.

    Args:
        key: of the documents and of everything that decides their scores; shards of another key are made anew.
    """
    state = PartialState()
    key = key_of(key, per_shard)  # which says what range of documents a shard holds
    count = -(-len(documents) // per_shard)

    def on_documents(scored: int) -> None:
        rate.scored(scored * state.num_processes)  # which take equal shares

    for number in range(state.process_index, count, state.num_processes):
        part = range(number * per_shard, min((number + 1) * per_shard, len(documents)))
        file = _shard_file(folder, number)
        if _is_whole(file, key, len(part)):
            rate.found(len(part) * state.num_processes)
            continue
        rows = documents.select(part)
        rate.begin()
        columns = scorer.score(rows["text"][:], rows["source"][:], on_documents)
        write_whole(file, lambda path, columns=columns: _write(path, columns, key))
    state.wait_for_everyone()
    return ShardedScores(folder, len(documents), per_shard)


def _shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.arrow"


def _write(path: Path, columns: Mapping[str, np.ndarray], key: str) -> None:
    arrays = {}
    for name, values in columns.items():
        flat = pa.array(values.reshape(-1))
        arrays[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    table = pa.table(arrays).replace_schema_metadata({"key": key})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _read(file: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()


def _is_whole(file: Path, key: str, rows: int) -> bool:
    try:
        table = _read(file)
    except (OSError, pa.ArrowInvalid):  # absent, or cut short
        return False
    return (table.schema.metadata or {}).get(b"key") == key.encode() and table.num_rows == rows
