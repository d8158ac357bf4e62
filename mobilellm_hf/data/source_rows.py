"""The rows of a mixture's sources: where each is, whatever way they were given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from mobilellm_hf.data.row_table import RowTable, rows_by_source
from mobilellm_hf.data.streaming import PackedStream

if TYPE_CHECKING:
    from datasets import Dataset


class SourceRows:
    """Rows by source, and by `row_id`: their number in `rows`; where those were given by source, one after the other.

    Args:
        rows: packed rows with a column `source`; or source -> its rows, which may be a `PackedStream`.

    Attributes:
        sources: their names, in order.
        tokens_per_row: (sources,) mean length of a row.
        num_rows: of all sources that are no streams.
    """

    def __init__(self, rows: Dataset | Mapping[str, Dataset | PackedStream]):
        by_source = isinstance(rows, Mapping)
        tables = {name: part for name, part in rows.items() if not isinstance(part, PackedStream)} if by_source else {}
        self._streams = {name: part for name, part in rows.items() if name not in tables} if by_source else {}
        if by_source:
            self._tables = {name: RowTable(part) for name, part in tables.items()}
            offsets = np.cumsum([0, *(len(table) for table in self._tables.values())]).tolist()
            self._rows = {name: range(len(table)) for name, table in self._tables.items()}
            self._offsets = dict(zip(self._tables, offsets))
            self.num_rows = offsets[-1]
        else:
            table, self._rows = RowTable(rows), rows_by_source(rows)
            self._tables = dict.fromkeys(self._rows, table)
            self._offsets, self.num_rows = dict.fromkeys(self._rows, 0), len(rows)
        self.sources: list[str] = list(rows) if by_source else list(self._rows)
        self.tokens_per_row = np.array([self._mean_tokens(name) for name in self.sources])

    def _mean_tokens(self, name: str) -> float:
        if name in self._streams:
            return float(self._streams[name].seq_length)
        return self._tables[name].mean_tokens(self._rows[name]) if len(self._rows[name]) else 1.0

    @property
    def streams(self) -> list[str]:
        """The sources that are streams."""
        return list(self._streams)

    def fetch_row(self, name: str, row: int) -> dict[str, torch.Tensor]:
        """(tokens,) int64 tensors by column; row: its number within the source."""
        if name in self._streams:
            found = self._streams[name].rows([row])[0]
            return {key: torch.from_numpy(value.astype(np.int64)) for key, value in found.items()}
        return self._tables[name].row(self._rows[name][row])

    def _numbers(self, name: str, rows: np.ndarray) -> np.ndarray:
        numbers = self._rows[name]
        return rows + numbers.start if isinstance(numbers, range) else numbers[rows]

    def row_ids(self, sources: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(draws,) int64: the number of each row in `rows`; where those were given by source, one after the other."""
        result = np.full(len(rows), -1, dtype=np.int64)
        for index in np.unique(sources).tolist():
            name, chosen = self.sources[index], sources == index
            if name not in self._streams:
                result[chosen] = self._numbers(name, rows[chosen]) + self._offsets[name]
        return result

    def source_of(self, row_ids: np.ndarray) -> np.ndarray:
        """(rows,) the source of each row, as its number in `sources`."""
        result = np.full(self.num_rows, -1, dtype=np.int16)
        for index, name in enumerate(self.sources):
            if name not in self._streams:
                result[self.rows_of(name)] = index
        return result[row_ids]

    def rows_of(self, source: str) -> np.ndarray:
        """The `row_id` of each row of a source; none of a stream."""
        return np.asarray(self._rows.get(source, range(0))) + self._offsets.get(source, 0)

    def predicted_tokens(self, row_ids: np.ndarray) -> np.ndarray:
        """(rows,) predicted tokens of each row."""
        result, sources = np.zeros(len(row_ids), dtype=np.int64), self.source_of(row_ids)
        for index in np.unique(sources).tolist():
            name, chosen = self.sources[index], sources == index
            result[chosen] = self._tables[name].predicted_tokens(row_ids[chosen] - self._offsets[name])
        return result

    def select(self, row_ids: np.ndarray) -> Dataset:
        """These rows, in this order, with the columns that a model reads."""
        from datasets import concatenate_datasets

        tables = list({id(table): table for table in self._tables.values()}.values())
        joined = concatenate_datasets([table.dataset.select_columns(table.columns) for table in tables])
        return joined.select(row_ids)
