"""The rows that leave-one-out's models read and are measured on, from lists of sources as a YAML file writes them."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value, load_from_disk
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from mobilellm_hf.data.row_table import rows_by_source
from mobilellm_hf.data.rows import expand_entry, load_rows, load_sources
from mobilellm_hf.data.source_weights import one_source
from mobilellm_hf.data.streaming import PackedStream
from mobilellm_hf.influence.leave_one_out import BLOCK_SIZE, lock
from mobilellm_hf.influence.overlap import find_overlap, refuse_overlap
from mobilellm_hf.influence.scorer import check_rows
from mobilellm_hf.progress import Stage
from mobilellm_hf.training.stage_data import check_columns
from mobilellm_hf.workspace import Workspace

Entries = Sequence[Mapping[str, Any]]

# Rows of a stream that are looked at together.
PART = 4096


def declared_sources(entries: Entries) -> list[str] | None:
    """The names of the sources, as far as entries and folders of rows tell; None if text must be read for them."""
    names: list[str] = []
    for entry in entries:
        if "rows" in entry:
            data = load_from_disk(entry["rows"])
            if isinstance(data, DatasetDict):
                data = data.get(entry.get("split", "train"))
            if data is None or "source" not in data.column_names:
                return None  # which loading them will say better
            names += entry.get("sources") or rows_by_source(data)
        elif "source" in entry or "catalog" in entry:
            names.append(one_source("this entry", entry))
        elif entry["name"].startswith("embedded:"):
            names += entry["name"].partition(":")[2].split(",")
        else:
            return None
    return list(dict.fromkeys(names))


def streamed_sources(entries: Entries) -> list[str]:
    """The names of the sources that are read as streams, whose sizes nobody knows."""
    streams = [entry for entry in entries if any(given.get("streaming") for given in expand_entry(entry))]
    names = [declared_sources([entry]) or [one_source("sources", entry)] for entry in streams]
    return list(dict.fromkeys(itertools.chain.from_iterable(names)))


def prepare_rows(
    workspace: Workspace,
    sources: Entries,
    probes: Mapping[str, Entries],
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    config: PreTrainedConfig,
    draws: int,
    *,
    rows_per_stream: int | None = None,
    rows_per_probe: int | None = None,
    overlap: str = "error",
    shuffle_buffer: int = 0,
    check: Callable[[dict[str, Dataset]], None] = lambda sources: None,
    stage: Stage,
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """source -> rows and capability -> rows: tokenized once, by the first process that comes, and kept in `rows/`.

    Args:
        draws: rows that a model reads.
        rows_per_stream: kept of each stream, if it has so many before it repeats; by default its share of the draws
            where the others have as much and one is left out. A mixture may give one source all of them.
        rows_per_probe: a random choice of so many rows of each of a probe's sources.
        overlap: what happens to rows that share documents with a probe: "error", "drop" or "allow".
        check: called with the sources before they are kept. If it raises, the folder is still free for other settings.

    Raises:
        ValueError: an entry cannot be loaded, there are fewer than two sources, or rows are malformed or shared with
            a probe; the message names which.
    """

    def build(path: Path) -> None:
        loaded = load_sources(sources, tokenizer, seq_length, config, shuffle_buffer)
        measured = {
            name: load_rows(entries, tokenizer, seq_length, config, rows_per_probe) for name, entries in probes.items()
        }
        if len(loaded) < 2:
            raise ValueError(f"sources: there is only {', '.join(loaded)}: with one left out, nothing is left")
        # Shares are met to the nearest row, in whole blocks.
        needed = rows_per_stream or -(-(draws + BLOCK_SIZE) // (len(loaded) - 1)) + 1
        stage.expect(needed * max(1, sum(isinstance(part, PackedStream) for part in loaded.values())))
        avoid = partial(_overlapping, probes=measured, overlap=overlap)
        with tempfile.TemporaryDirectory(dir=workspace.folder) as scratch:
            found = {
                name: _take(part, needed, scratch, avoid, stage) if isinstance(part, PackedStream) else part
                for name, part in loaded.items()
            }
            parts = {f"source {name}": part for name, part in found.items()}
            for label, part in (parts | {f"probe {name}": part for name, part in measured.items()}).items():
                check_columns(label, part)
                check_rows(label, part, config)
            for name, part in found.items():
                if not isinstance(loaded[name], PackedStream) and (bad := avoid(name, part)):
                    found[name] = part.select([row for row in range(len(part)) if row not in bad])
            check(found)
            parts = {f"source {name}": part for name, part in found.items()}
            DatasetDict(parts | {f"probe {name}": part for name, part in measured.items()}).save_to_disk(path)

    workspace.folder.mkdir(parents=True, exist_ok=True)
    with lock(workspace.folder / "rows.lock"):
        saved = load_from_disk(workspace.once("rows", build))
    found = {name.removeprefix("source "): part for name, part in saved.items() if name.startswith("source ")}
    tokens = sum(map(len, found.values())) * seq_length
    stage.say(f"{len(found)} sources, {tokens / 1e6:,.1f} M tokens in rows of {seq_length}")
    return found, {name: saved[f"probe {name}"] for name in probes}


def _take(stream: PackedStream, count: int, scratch: str, avoid: Callable, stage: Stage) -> Dataset:
    """The first rows of a stream that are not to be avoided, or all of its first pass; on disk, being many."""

    def rows() -> Iterator[dict[str, Any]]:
        stage.say(stream.source)
        ahead, left = _first_pass(stream), count
        while left and (part := list(itertools.islice(ahead, min(left, PART)))):
            bad = avoid(stream.source, Dataset.from_list([{"input_ids": row["input_ids"]} for row in part]))
            kept = [{**row, "source": stream.source} for number, row in enumerate(part) if number not in bad]
            yield from kept
            left -= len(kept)
            stage.advance(len(kept))
        if left == count:
            raise ValueError(f"sources: every row of {stream.source} shares documents with the probes")

    columns = {name: List(Value("int32")) for name in ("input_ids", "labels", "position_ids")}
    features = Features(columns | {"source": Value("string")})
    try:
        return Dataset.from_generator(rows, features=features, cache_dir=scratch, fingerprint=stream.source)
    except DatasetGenerationError as error:  # which hides what went wrong
        raise error.__cause__ or error from None


def _first_pass(stream: PackedStream) -> Iterator[dict[str, Any]]:
    for row in stream:
        if stream.report:  # which is there after a pass: what follows repeats
            return
        yield row


def _overlapping(name: str, rows: Dataset, probes: Mapping[str, Dataset], overlap: str) -> Collection[int]:
    """The rows of a source that are to be left away."""
    if overlap == "error":
        try:
            refuse_overlap(rows, probes, "Name other splits or sources, or set overlap: drop.", what="the source")
        except ValueError as error:
            raise ValueError(f"sources: {name}: {error}") from error
    return find_overlap(rows, probes) if overlap == "drop" else ()
