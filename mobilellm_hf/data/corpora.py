"""One name for a source of text: the embedded corpus, a Hub data set, or local files.

    load_corpus("embedded")                                     every source of the embedded corpus
    load_corpus("embedded:stdlib,sympy_docs", split="probe")    two of them, another split
    load_corpus("HuggingFaceTB/finemath", subset="finemath-4plus", domain="math", streaming=True)
    load_corpus("notes/**/*.jsonl", text_column="body", domain="knowledge")
    load_corpus("out/curated")                                  a folder written by `Dataset.save_to_disk`

Whatever the name, the rows have three string columns: `text`, `source` (which the mixture weighs and the scores are
summed over) and `domain` ("code", "math", "knowledge" or a name of one's own). `datasets` does the loading; what is
added here is what a long run needs beforehand: an error that names the file, the line or the column, and the remedy.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mobilellm_hf.data.documents import MIN_CHARACTERS, drop_empty_and_repeated, is_long_enough, split_by_hash
from mobilellm_hf.data.local_files import CorpusError, check_file, find_files, looks_local, missing_column

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

__all__ = ["CorpusError", "load_corpus", "split_by_hash"]

logger = logging.getLogger(__name__)

STRINGS = ("string", "large_string", "str")
UNKNOWN_DOMAIN = "unknown"


class _Columns:
    """Makes the three columns of a corpus; a class, so that it pickles and `datasets` can cache by its fields."""

    def __init__(self, text_column: str, fixed: dict[str, str | None]):
        self.text_column = text_column
        self.fixed = fixed

    def __call__(self, batch: dict[str, list]) -> dict[str, list[str]]:
        texts = [text or "" for text in batch[self.text_column]]
        labels = {name: batch[name] if value is None else [value] * len(texts) for name, value in self.fixed.items()}
        return {"text": texts, **labels}


def load_corpus(
    name: str,
    *,
    text_column: str = "text",
    source: str | None = None,
    domain: str | None = None,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    sample_by: str = "document",
    min_characters: int = MIN_CHARACTERS,
) -> Dataset | IterableDataset:
    """Loads one corpus as rows of `text`, `source` and `domain`, without nearly empty and repeated rows.

    Args:
        name: "embedded" or "embedded:NAME,NAME"; a local file, folder or glob pattern (.jsonl, .json, .parquet, .txt,
            .md, .py; the text formats also as .gz), or a folder of `save_to_disk`; else a data set's id on the Hub.
        text_column: the column with the text (of the embedded corpus always "text").
        source: what the column `source` says. By default the data's own if it has both `source` and `domain` as string
            columns, as this package writes them, else the last part of the name.
        domain: the same for `domain`, else "unknown".
        split: of the embedded corpus ("train", "probe", "test"), of a Hub data set (also "train[:1%]"), or of a saved
            `DatasetDict`. Plain files have none: "train" is all of them.
        subset: configuration of a Hub data set.
        revision: branch, tag or commit of a Hub data set.
        streaming: return an `IterableDataset` that reads as it goes. It drops nearly empty rows but not repetitions,
            which only a look at all rows finds, and of local files it checks the first megabyte only.
        sample_by: what is a document in a text file: the whole file ("document"), a "paragraph" or a "line".
        min_characters: rows with fewer characters that are not white space are dropped. Lower it for short answers.

    Raises:
        CorpusError: a `ValueError` that names the file, line, byte or column at fault, and the remedy.
    """
    if name.split(":")[0] == "embedded":
        return _finish(_load_embedded(name, split, streaming), name, "text", source, domain, min_characters)
    if not looks_local(name):
        remedy = (
            f"There is no such local file either. Check the name, the subset ({subset}), the split ({split}) "
            f"and the connection (HF_HUB_OFFLINE must not be 1 unless the data set is in the cache)."
        )
        with _explained(f"the Hub data set {name}", remedy):
            dataset = _load_hub(name, split, subset, revision, streaming)
            return _finish(dataset, name, text_column, source, domain, min_characters)
    path = Path(name).expanduser()
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        with _explained(f"the saved data set {name}", "Write it again with save_to_disk."):
            dataset = _load_saved(path, split, streaming)
            return _finish(dataset, name, text_column, source, domain, min_characters)
    loader, files = find_files(name)
    for file in files:
        check_file(file, text_column)
    with _explained(name, "Check the file with another program.", files, text_column):
        dataset = _load_files(loader, files, split, streaming, sample_by)
        return _finish(dataset, name, text_column, source, domain, min_characters)


def _load_embedded(name: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    from mobilellm_hf.data.embedded import load_embedded_corpus

    _, _, chosen = name.partition(":")
    try:
        corpus = load_embedded_corpus(chosen.split(",") if chosen else None)
    except (ValueError, FileNotFoundError) as error:
        raise CorpusError(str(error)) from error
    dataset = _choose_split(corpus, name, split)
    return dataset.to_iterable_dataset() if streaming else dataset


def _load_hub(
    name: str, split: str, subset: str | None, revision: str | None, streaming: bool
) -> Dataset | IterableDataset:
    from datasets import load_dataset

    return load_dataset(name, subset, split=split, revision=revision, streaming=streaming)


def _load_saved(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        dataset = _choose_split(dataset, str(path), split)
    return dataset.to_iterable_dataset() if streaming else dataset


def _load_files(
    loader: str, files: list[Path], split: str, streaming: bool, sample_by: str
) -> Dataset | IterableDataset:
    from datasets import load_dataset

    options = {"sample_by": sample_by} if loader == "text" else {}
    # Resolved and escaped, since `datasets` reads a path as a pattern relative to the working directory.
    data_files = [glob.escape(str(file.resolve())) for file in files]
    return load_dataset(loader, data_files=data_files, split=split, streaming=streaming, **options)


def _choose_split(corpus: DatasetDict, name: str, split: str) -> Dataset:
    if split not in corpus:
        raise CorpusError(f"{name} has no split {split!r}. Its splits: {', '.join(corpus)}.")
    return corpus[split]


@contextmanager
def _explained(what: str, remedy: str, files: Sequence[Path] = (), text_column: str = "text") -> Iterator[None]:
    """Turns a failure to load into a `CorpusError`, after a search of the whole files for the line at fault."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except CorpusError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        for file in files:
            check_file(file, text_column, limit=None)
        reason = str(error.__cause__ or error).rstrip(".")
        raise CorpusError(f"Could not load {what}: {reason}. {remedy}") from error


def _finish(
    dataset: Dataset | IterableDataset,
    name: str,
    text_column: str,
    source: str | None,
    domain: str | None,
    min_characters: int,
) -> Dataset | IterableDataset:
    """Checks the columns of what was loaded, brings them into the common form and drops what is not worth keeping."""
    from datasets import IterableDataset

    kinds = _column_kinds(dataset, name)
    if text_column not in kinds:
        raise CorpusError(missing_column(name, text_column, list(kinds)))
    if kinds[text_column] not in STRINGS:
        raise CorpusError(
            f"The text column {text_column!r} of {name} holds {kinds[text_column]}, not strings. "
            f"Name another with text_column."
        )
    if not (kinds.get("source") in STRINGS and kinds.get("domain") in STRINGS):
        source, domain = source or _short_name(name), domain or UNKNOWN_DOMAIN
    to_columns = _Columns(text_column, {"source": source, "domain": domain})
    rows = dataset.map(to_columns, batched=True, remove_columns=list(kinds))
    if isinstance(rows, IterableDataset):
        return rows.filter(is_long_enough, input_columns="text", fn_kwargs={"min_characters": min_characters})
    kept = drop_empty_and_repeated(rows, min_characters)
    if len(kept) == 0:
        raise CorpusError(
            f"Nothing is left of {name}: none of its {len(rows)} rows has {min_characters} characters "
            f"in {text_column!r}. Lower min_characters, or name another text_column."
        )
    if len(kept) < len(rows):
        logger.info("%s: %d of %d rows were nearly empty or repeated.", name, len(rows) - len(kept), len(rows))
    return kept


def _column_kinds(dataset: Dataset | IterableDataset, name: str) -> dict[str, str]:
    """The type of each column as a word; a stream whose types are not declared is judged by its first row."""
    if dataset.features is not None:
        return {column: getattr(feature, "dtype", str(feature)) for column, feature in dataset.features.items()}
    first = next(iter(dataset), None)
    if first is None:
        raise CorpusError(f"{name} has no rows.")
    return {column: "string" if value is None else type(value).__name__ for column, value in first.items()}


def _short_name(name: str) -> str:
    """The last part of a path or id, without wildcards and extensions: "out/fine-math.jsonl.gz" gives "fine-math"."""
    parts = [part for part in Path(name).parts if not glob.has_magic(part)]
    return parts[-1].split(".")[0] or parts[-1] if parts else name
