"""Documents to rows of a fixed length, with nothing lost and nothing padded.

Per source, documents follow each other as one stream of tokens (`bos`, text, `eos`), and the stream is cut into rows.
Three things differ from the usual "concatenate and chunk" map:

- **No tail per batch.** A row belongs to the batch of documents in which it starts, and reads on into the next batch
  for its end. So rows do not depend on batch size or process count, `datasets` can cache and parallelise the map, and
  the only tokens left over are the last, incomplete row of each source, which the report counts.
- **Rows never mix sources**, since a row is what the mixture draws and the influence scores weigh.
- **Attention can stay inside a document**: `position_ids` restart at 0 where a document starts, by which transformers
  recognises packed documents (when no attention mask is given and no cache is used: rows have no mask on purpose).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mobilellm_hf.data.tokenization import check_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
GROUP = ("source", "domain")


@dataclass(frozen=True)
class SourcePacking:
    """What packing made of one source: `tokens = rows * seq_length + tail_tokens`, `bos` and `eos` included."""

    source: str
    domain: str
    documents: int
    tokens: int
    rows: int
    tail_tokens: int


@dataclass(frozen=True)
class PackingReport:
    """What packing made of each source."""

    seq_length: int
    sources: tuple[SourcePacking, ...]

    @property
    def tail_tokens(self) -> int:
        return sum(source.tail_tokens for source in self.sources)

    def __str__(self) -> str:
        return "\n".join(
            f"{line.source}: {line.documents:,} documents, {line.tokens:,} tokens in {line.rows:,} rows of "
            f"{self.seq_length:,}, {line.tail_tokens:,} tokens left over"
            for line in self.sources
        )


def tokenize_and_pack(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    *,
    isolate_documents: bool = True,
    parse_special_tokens: bool = False,
    config: PreTrainedConfig | None = None,
    num_proc: int | None = None,
    batch_size: int = 1_000,
) -> tuple[Dataset, PackingReport]:
    """Tokenizes a corpus and cuts it into training rows.

    Args:
        dataset: map-style, with the columns `text`, `source` and `domain`.
        tokenizer: needs an `eos_token`; `bos` is put in front only if it has one.
        seq_length: tokens of a row, at least 2.
        isolate_documents: whether attention and loss stop at a document's start. If not, rows have no `position_ids`,
            and a document's first token is predicted from the document before.
        parse_special_tokens: whether a text that spells `<|eot_id|>` means that token. Text from the world should not
            be able to end a turn, so by default it is read letter by letter; set it for texts made by a chat template.
        config: of the model that will read the rows; checked first, so that no id is beyond its vocabulary.
        num_proc: processes of `datasets.map`.
        batch_size: documents a call; it changes speed and memory, not the rows.

    Returns:
        The rows, source by source, with the columns
        `input_ids` (seq_length ints),
        `labels` (seq_length ints, not shifted: the model shifts; -100 at a document's first token),
        `position_ids` (seq_length ints; 0 at a document's first token, and at the start of every row: a document that
        continues from the row before starts again, as it cannot see that row anyway),
        `source` and `domain`; and a report of what each source gave.

    Raises:
        TypeError: the data set is a stream or a dictionary of splits.
        ValueError: the tokenizer's vocabulary exceeds the model's, there are no rows, a column is missing, the
            tokenizer has no `eos_token`, `seq_length` is below 2, or no source has enough tokens for one row.
    """
    if config is not None:
        check_tokenizer(tokenizer, config)
    _check(dataset, tokenizer, seq_length)
    dataset, groups = _order_by_group(dataset)
    tokenized = _tokenize(dataset, tokenizer, parse_special_tokens, num_proc, batch_size)
    lengths = tokenized.with_format("numpy")["length"][:]
    report = _report(groups, lengths, seq_length)
    for line in report.sources:
        if line.rows == 0:
            logger.warning("The source %s has only %d tokens: no row of %d.", line.source, line.tokens, seq_length)
    if not any(line.rows for line in report.sources):
        raise ValueError(f"No source has the {seq_length} tokens of one row; lower seq_length or add text.\n{report}")
    rows = _pack(tokenized, groups, lengths, seq_length, isolate_documents, num_proc, batch_size)
    logger.info("Packed.\n%s", report)
    return rows, report


def _check(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, seq_length: int) -> None:
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"Packing needs one map-style data set, not a {type(dataset).__name__}: choose a split, and "
            f"load without streaming."
        )
    check_columns(dataset.column_names)
    if len(dataset) == 0:
        raise ValueError("There are no documents to pack.")
    check_row(tokenizer, seq_length)


def check_columns(columns: Sequence[str]) -> None:
    """Raises a ValueError that names a column which documents need and do not have."""
    missing = [name for name in ("text", *GROUP) if name not in columns]
    if missing:
        raise ValueError(
            f"Packing needs the column(s) {', '.join(missing)}; the data set has {list(columns)}. "
            f"load_corpus makes them."
        )


def check_row(tokenizer: PreTrainedTokenizerBase, seq_length: int) -> None:
    """Raises a ValueError for a tokenizer that ends no document, or a length that predicts nothing."""
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no eos_token, which marks where a document ends; set tokenizer.eos_token.")
    if seq_length < 2:
        raise ValueError(f"seq_length must be at least 2, to predict one token from another; it is {seq_length}.")


@dataclass(frozen=True)
class _Group:
    """The documents [start, end) of one source (and domain)."""

    source: str
    domain: str
    start: int
    end: int


def _order_by_group(dataset: Dataset) -> tuple[Dataset, list[_Group]]:
    """Brings the documents of each source together, sources and documents in the order they came in."""
    members: dict[tuple[str, str], list[int]] = {}
    for row, key in enumerate(zip(*(dataset[name][:] for name in GROUP), strict=True)):
        members.setdefault(key, []).append(row)
    order = np.concatenate([np.array(rows) for rows in members.values()])
    if not np.array_equal(order, np.arange(len(order))):
        dataset = dataset.select(order)
    ends = np.cumsum([len(rows) for rows in members.values()], dtype=int)
    starts = [0, *ends[:-1].tolist()]
    return dataset, [_Group(*key, start, end) for key, start, end in zip(members, starts, ends.tolist(), strict=True)]


class Tokenize:
    """Texts to token ids, `bos` in front and `eos` behind; a class, so that it pickles and `datasets` can cache."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, parse_special_tokens: bool):
        self.tokenizer = tokenizer
        self.parse_special_tokens = parse_special_tokens

    def __call__(self, texts: list[str]) -> dict[str, list]:
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=not self.parse_special_tokens,
            return_attention_mask=False,
            verbose=False,
        )
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        prefix = [] if bos is None else [bos]
        input_ids = [[*prefix, *ids, eos] for ids in encoded["input_ids"]]
        return {"input_ids": input_ids, "length": [len(ids) for ids in input_ids]}


def _tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    parse_special_tokens: bool,
    num_proc: int | None,
    batch_size: int,
) -> Dataset:
    from datasets import Features, List, Value

    return dataset.map(
        Tokenize(tokenizer, parse_special_tokens),
        batched=True,
        batch_size=batch_size,
        input_columns="text",
        remove_columns=dataset.column_names,
        features=Features({"input_ids": List(Value("int32")), "length": Value("int64")}),
        num_proc=num_proc,
        desc="Tokenizing",
    )


def _report(groups: Iterable[_Group], lengths: np.ndarray, seq_length: int) -> PackingReport:
    lines = []
    for group in groups:
        tokens = int(lengths[group.start : group.end].sum())
        rows, tail = divmod(tokens, seq_length)
        lines.append(SourcePacking(group.source, group.domain, group.end - group.start, tokens, rows, tail))
    return PackingReport(seq_length, tuple(lines))


class _Pack:
    """The rows that start in a batch of documents; they may end in documents beyond it."""

    def __init__(self, tokenized: Dataset, groups: list[_Group], lengths: np.ndarray, seq_length: int, isolate: bool):
        self.tokenized = tokenized
        self.groups = groups
        self.ends = np.cumsum(lengths)
        self.starts = self.ends - lengths
        self.seq_length = seq_length
        self.isolate = isolate

    def __call__(self, _: list[int], indices: list[int]) -> dict[str, list]:
        columns: dict[str, list] = {name: [] for name in _features(self.seq_length, self.isolate)}
        for group in self.groups:
            first, last = max(indices[0], group.start), min(indices[-1] + 1, group.end)
            start, end = self._span(group, first, last) if first < last else (0, 0)
            if start < end:
                for name, rows in self._rows(first, start, end).items():
                    columns[name].extend(rows)
                count = (end - start) // self.seq_length
                columns["source"].extend([group.source] * count)
                columns["domain"].extend([group.domain] * count)
        return columns

    def _span(self, group: _Group, first: int, last: int) -> tuple[int, int]:
        """The tokens [start, end) of the complete rows of a group that start in its documents [first, last)."""
        origin = self.starts[group.start]
        first_row = -(-(self.starts[first] - origin) // self.seq_length)
        end_row = -(-(self.ends[last - 1] - origin) // self.seq_length)
        complete = (self.ends[group.end - 1] - origin) // self.seq_length
        return origin + first_row * self.seq_length, origin + min(end_row, complete) * self.seq_length

    def _rows(self, first: int, start: int, end: int) -> dict[str, np.ndarray]:
        """The tokens [start, end), which begin in document `first` or after, as arrays of (rows, seq_length)."""
        import pyarrow.compute as pc

        stop = int(np.searchsorted(self.ends, end)) + 1
        tokens = pc.list_flatten(self.tokenized[first:stop]["input_ids"]).to_numpy()
        tokens = tokens[start - self.starts[first] : end - self.starts[first]]
        document_starts = self.starts[first:stop] - start
        document_starts = document_starts[(document_starts >= 0) & (document_starts < len(tokens))]
        return cut_rows(tokens, document_starts, self.seq_length, self.isolate)


def cut_rows(
    tokens: np.ndarray, document_starts: np.ndarray, seq_length: int, isolate_documents: bool
) -> dict[str, np.ndarray]:
    """A stream of tokens, whose length is a multiple of seq_length, as arrays of (rows, seq_length).

    Args:
        document_starts: where in the stream documents start, increasing.

    Returns:
        `input_ids` and `labels`, and `position_ids` if documents are isolated, as `tokenize_and_pack` describes them.
    """
    labels = tokens
    columns = {}
    if isolate_documents:
        labels = tokens.copy()
        labels[document_starts] = IGNORED_LABEL
        columns["position_ids"] = _positions(document_starts, len(tokens), seq_length)
    columns.update(input_ids=tokens, labels=labels)
    return {name: values.reshape(-1, seq_length) for name, values in columns.items()}


def _positions(document_starts: np.ndarray, count: int, seq_length: int) -> np.ndarray:
    """Distance of each of `count` tokens to the start of its document or of its row, whichever is nearer."""
    restart = np.zeros(count, dtype=np.int32)
    restart[document_starts] = document_starts
    restart[::seq_length] = np.arange(0, count, seq_length)
    return np.arange(count, dtype=np.int32) - np.maximum.accumulate(restart)


def _features(seq_length: int, isolate: bool) -> Features:
    from datasets import Features, List, Value

    # 32 bits hold any id, and half of what a billion tokens take in 64.
    names = ("input_ids", "labels", "position_ids") if isolate else ("input_ids", "labels")
    numbers = {name: List(Value("int32"), length=seq_length) for name in names}
    return Features({**numbers, **{name: Value("string") for name in GROUP}})


def _pack(
    tokenized: Dataset,
    groups: list[_Group],
    lengths: np.ndarray,
    seq_length: int,
    isolate: bool,
    num_proc: int | None,
    batch_size: int,
) -> Dataset:
    ids = tokenized.select_columns("input_ids").with_format("arrow")
    return tokenized.select_columns("length").map(
        _Pack(ids, groups, lengths, seq_length, isolate),
        batched=True,
        batch_size=batch_size,
        with_indices=True,
        input_columns="length",
        remove_columns="length",
        features=_features(seq_length, isolate),
        num_proc=num_proc,
        desc="Packing",
    )
