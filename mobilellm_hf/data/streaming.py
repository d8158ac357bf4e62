"""Training rows packed on the fly from a stream of documents, equal to what `tokenize_and_pack` makes of them.

    documents = load_corpus("HuggingFaceTB/finemath", subset="finemath-4plus", streaming=True).shuffle(seed=0)
    stream = PackedStream(documents, tokenizer, seq_length=2048, config=model.config, repeat=True)
    next(iter(stream))["input_ids"]         # (2048,) int32; `labels` and `position_ids` beside it
    stream.rows([0, 3, 4])                  # rows by their number, as a mixture asks for them
    stream.report                           # what the last pass held, and the tail that was left over

What a row holds depends on every document before it, so row n is found by tokenizing what precedes it. That is free as
long as numbers increase; going back opens the stream again. Workers of a `DataLoader` each read the whole stream and
skip what the others take: k workers tokenize k times as much, and a run that resumes tokenizes once more what it has
read.
"""

from __future__ import annotations

import copy
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mobilellm_hf.data.packing import GROUP, PackingReport, SourcePacking, Tokenize, check_columns, check_row, cut_rows
from mobilellm_hf.data.tokenization import check_tokenizer

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DOCUMENTS_PER_BATCH = 64
WINDOW = 1_024

Row = dict[str, np.ndarray]


class PackedStream:
    """The rows of one source, packed as its documents arrive.

    Args:
        dataset: a stream of documents with the columns `text`, `source` and `domain`, all of one source. Shuffle it
            before if at all (`dataset.shuffle(seed, buffer_size=...)`): each pass then has an order of its own, which
            the seed and the number of the pass decide, as `datasets` does by `set_epoch`.
        tokenizer, seq_length, isolate_documents, parse_special_tokens, config: as for `tokenize_and_pack`.
        repeat: whether a next pass follows when the stream ends. All passes have equally many rows, and row n is row
            `n % rows` of pass `n // rows`.
        window: how many of the last rows are kept, so that going back a little opens nothing again.

    Attributes:
        report: a `PackingReport` of the last pass read to its end, None before that.
        passes: how often the stream was read to its end without going back.

    Raises:
        TypeError: the data set is not a stream.
        ValueError: as for `tokenize_and_pack`; while reading, documents of a second source or domain are found, or
            not enough tokens for one row.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        seq_length: int,
        isolate_documents: bool = True,
        config: PreTrainedConfig | None = None,
        *,
        parse_special_tokens: bool = False,
        repeat: bool = False,
        window: int = WINDOW,
    ):
        from datasets import IterableDataset

        if not isinstance(dataset, IterableDataset):
            raise TypeError(f"PackedStream reads a stream, not a {type(dataset).__name__}: load with streaming=True.")
        if config is not None:
            check_tokenizer(tokenizer, config)
        check_row(tokenizer, seq_length)
        if window < 1:
            raise ValueError(f"window={window} must be at least 1: the row just read is in it")
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.seq_length = seq_length
        self.isolate_documents = isolate_documents
        self.parse_special_tokens = parse_special_tokens
        self.repeat = repeat
        self.window = window
        self.report: PackingReport | None = None
        self._group: tuple[str, str] | None = None
        self._close()

    def _close(self) -> None:
        """Forgets where the stream stands; what is known of its length stays."""
        self.passes = 0
        self._reader: Iterator[Row] | None = None
        self._recent: deque[Row] = deque(maxlen=self.window)
        self._next = 0
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        """Without the open stream, which no other process could go on with."""
        state = self.__dict__.copy()
        for name in ("passes", "_reader", "_recent", "_next", "_process"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._close()

    @property
    def source(self) -> str:
        """What the column `source` of the documents says; the first is read for it."""
        if self._group is None:
            first = next(iter(copy.deepcopy(self.dataset).iter(1)), None)
            if first is None:
                raise ValueError("The stream has no documents.")
            check_columns(list(first))
            self._group = tuple(first[name][0] for name in GROUP)
        return self._group[0]

    def __iter__(self) -> Iterator[Row]:
        """All rows from the first document on: of one pass or, with `repeat`, without end."""
        number = 0
        yield from self._one_pass(number)
        while self.repeat:
            number += 1
            yield from self._one_pass(number)

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """The rows with these numbers, cheapest if they increase from call to call.

        Raises:
            IndexError: the stream ends before, and `repeat` is not set.
        """
        return [self._row(int(index)) for index in indices]

    def _row(self, index: int) -> Row:
        if index < 0:
            raise IndexError(f"There is no row {index}: the rows of a stream are counted from its start.")
        # A fork shares the files that its parent has open, and where each stands in them.
        if self._process != os.getpid() or index < self._next - len(self._recent):
            self._close()
        if self._reader is None:
            self._open(index)
        while self._next <= index:
            row = self._read()
            if row is None:
                raise IndexError(
                    f"{self.source} has {self._next:,} rows of {self.seq_length:,} tokens: there is no row {index}. "
                    f"Give the stream repeat=True, or draw less of it."
                )
            self._recent.append(row)
            self._next += 1
        return self._recent[index - self._next]

    def _read(self) -> Row | None:
        try:
            return next(self._reader, None)
        except BaseException:
            self._close()  # a generator that failed would say from then on that the stream has ended
            raise

    def _open(self, index: int) -> None:
        """Starts reading at the start of the pass that has the row, if passes are known to be so long, else of all."""
        first = index // self.report.sources[0].rows if self.repeat and self.report else 0
        self.passes = first
        self._next = first * self.report.sources[0].rows if first else 0
        self._reader = self._from_pass(first)

    def _from_pass(self, number: int) -> Iterator[Row]:
        while True:
            yield from self._one_pass(number)
            number += 1
            self.passes = number
            if not self.repeat:
                return

    def _one_pass(self, number: int) -> Iterator[Row]:
        """The rows of one pass; at its end the report is made."""
        columns = ("input_ids", "labels", "position_ids") if self.isolate_documents else ("input_ids", "labels")
        # What is left over from the documents so far: less than a row, and the places where documents start in it.
        tokens, starts = np.empty(0, np.int32), np.empty(0, np.int64)
        documents = total = 0
        for ids in self._tokenized(number):
            lengths = np.array([len(document) for document in ids])
            starts = np.concatenate([starts, len(tokens) + np.cumsum(lengths) - lengths])
            tokens = np.concatenate([tokens, *(np.array(document, np.int32) for document in ids)])
            documents, total = documents + len(ids), total + int(lengths.sum())
            end = len(tokens) - len(tokens) % self.seq_length
            packed = cut_rows(tokens[:end], starts[starts < end], self.seq_length, self.isolate_documents)
            for row in range(end // self.seq_length):
                yield {name: packed[name][row].astype(np.int32) for name in columns}
            tokens, starts = tokens[end:], starts[starts >= end] - end
        if self._group is None:
            raise ValueError("The stream has no documents.")
        self._finish_pass(number, SourcePacking(*self._group, documents, total, *divmod(total, self.seq_length)))

    def _tokenized(self, number: int) -> Iterator[list[list[int]]]:
        """The ids of the documents of one pass, a batch at a time."""
        tokenize = Tokenize(self.tokenizer, self.parse_special_tokens)
        # A copy, since the epoch of the original is shared with every process that was forked with it. `iter` of
        # `datasets` gives all documents in each worker of a DataLoader, where `__iter__` would share them out.
        dataset = copy.deepcopy(self.dataset)
        dataset.set_epoch(number)
        for batch in dataset.iter(DOCUMENTS_PER_BATCH):
            check_columns(list(batch))
            groups = dict.fromkeys(zip(*(batch[name] for name in GROUP), strict=True))
            self._group = self._group or next(iter(groups))
            if others := [group for group in groups if group != self._group]:
                raise ValueError(
                    f"A stream is packed as one source, and this one has {' of '.join(self._group)} and "
                    f"{' of '.join(others[0])}: load them one by one, or give load_corpus one source and domain."
                )
            yield tokenize(batch["text"])["input_ids"]

    def _finish_pass(self, number: int, line: SourcePacking) -> None:
        self.report = PackingReport(self.seq_length, (line,))
        if line.rows == 0:
            raise ValueError(
                f"The source {line.source} has only {line.tokens:,} tokens: no row of {self.seq_length:,}. Lower "
                f"seq_length or add text."
            )
        logger.info("Pass %d is read. %s", number, self.report)
