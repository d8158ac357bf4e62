"""Tokenized rows of a `datasets.Dataset` as tensors, straight from its memory-mapped Arrow buffers.

A row costs microseconds: no Python list is made of its tokens, and nothing is copied but the row itself.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

import numpy as np
import pyarrow
import pyarrow.compute as pc
import torch

from mobilellm_hf.nll import COLUMNS, IGNORED_LABEL

if TYPE_CHECKING:
    from datasets import Dataset


class RowTable:
    """Args:
        dataset: map-style, with `input_ids` and whatever else of `COLUMNS` there is, lists of integers.

    Raises:
        ValueError: `input_ids` is missing, or a column is no list of integers; the message names it.
    """

    def __init__(self, dataset: Dataset):
        if "input_ids" not in dataset.column_names:
            raise ValueError(f"the rows have the columns {dataset.column_names}, not input_ids: tokenize them first")
        self.dataset = dataset
        self.columns = [name for name in COLUMNS if name in dataset.column_names]
        for name in self.columns:
            kind = dataset.data.schema.field(name).type
            if not (_is_list(kind) and pyarrow.types.is_integer(kind.value_type)):
                raise ValueError(f"the column {name!r} is {kind}, not lists of integers: tokenize the rows first")
        self._open()

    def __getstate__(self):
        return {"dataset": self.dataset, "columns": self.columns}

    def __setstate__(self, state) -> None:
        vars(self).update(state)
        self._open()

    def _open(self) -> None:
        data = self.dataset.data
        chunks = data.column("input_ids").chunks
        self._starts = np.cumsum([0, *map(len, chunks)])
        self._first: list[int] = self._starts.tolist()  # a row at a time is found faster among plain numbers
        self._buffers = {name: [_buffers(chunk) for chunk in data.column(name).chunks] for name in self.columns}
        indices = self.dataset._indices  # of a data set that was shuffled, filtered or selected from
        self._indices = None if indices is None else indices.column(0).to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, numbers: np.ndarray) -> list[dict[str, torch.Tensor]]:
        """Each row's columns as (tokens,) int64 tensors; `labels` are the ids where the data set has none."""
        return [self.row(number) for number in numbers.tolist()]

    def row(self, number: int) -> dict[str, torch.Tensor]:
        """One row, as `rows` gives several."""
        place = number if self._indices is None else int(self._indices[number])
        chunk = bisect_right(self._first, place) - 1
        place -= self._first[chunk]
        row = {}
        for name, buffers in self._buffers.items():
            values, offsets = buffers[chunk]
            row[name] = torch.from_numpy(values[offsets[place] : offsets[place + 1]].astype(np.int64))
        if "labels" not in row:
            row["labels"] = row["input_ids"].clone()
        return row

    def predicted_tokens(self, numbers: np.ndarray) -> np.ndarray:
        """(rows,) how many labels of each row are predicted: all but the first and those that are -100."""
        rows = (self.row(number) for number in numbers.tolist())  # one at a time: all of them may not fit
        return np.array([int((row["labels"][1:] != IGNORED_LABEL).sum()) for row in rows], dtype=np.int64)

    def mean_tokens(self, numbers: np.ndarray | range) -> float:
        """Mean number of tokens of these rows; of many, of an even choice of ten thousand."""
        chosen = np.asarray(numbers)[:: max(1, len(numbers) // 10_000)]
        places = chosen if self._indices is None else self._indices[chosen]
        chunks = np.searchsorted(self._starts, places, side="right") - 1
        offsets = [buffers[1] for buffers in self._buffers["input_ids"]]
        within = places - self._starts[chunks]
        lengths = [
            offsets[chunk][place + 1] - offsets[chunk][place]
            for chunk, place in zip(chunks.tolist(), within.tolist(), strict=True)
        ]
        return float(np.mean(lengths))


def _is_list(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _buffers(chunk: pyarrow.Array) -> tuple[np.ndarray, memoryview | range]:
    """(values, offsets): row i of the chunk is values[offsets[i] : offsets[i + 1]]; no copy."""
    if pyarrow.types.is_fixed_size_list(chunk.type):
        width = chunk.type.list_size
        return chunk.values[chunk.offset * width :].to_numpy(), range(0, (len(chunk) + 1) * width, width)
    return chunk.values.to_numpy(), memoryview(chunk.offsets.to_numpy())  # whose elements are plain numbers


def rows_by_source(dataset: Dataset) -> dict[str, np.ndarray | range]:
    """source -> the numbers of its rows, sources in the order in which they come; a range where rows are together.

    Raises:
        ValueError: the data set has no column `source`.
    """
    if "source" not in dataset.column_names:
        raise ValueError(f"the rows have the columns {dataset.column_names}, not source, which a mixture weighs")
    column = dataset.select_columns("source").with_format("arrow")
    names: dict[str, list[np.ndarray]] = {}
    start = 0
    for table in column.iter(100_000):
        for chunk in table["source"].chunks:
            encoded = pc.dictionary_encode(chunk)
            codes = encoded.indices.to_numpy()
            for code, name in enumerate(encoded.dictionary.to_pylist()):
                names.setdefault(name, []).append(np.flatnonzero(codes == code) + start)
            start += len(chunk)
    return {name: _as_range(np.concatenate(parts)) for name, parts in names.items()}


def _as_range(numbers: np.ndarray) -> np.ndarray | range:
    first, last = int(numbers[0]), int(numbers[-1])
    return range(first, last + 1) if last - first + 1 == len(numbers) else numbers
