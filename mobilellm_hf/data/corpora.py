"""One name for a source of text: the embedded corpus, a Hub data set, or local files.

    load_corpus("embedded")                                     every source of the embedded corpus
    load_corpus("embedded:stdlib,sympy_docs", split="probe")    two of them, another split
    load_corpus("HuggingFaceTB/finemath", subset="finemath-4plus", domain="math", streaming=True)
    load_corpus("allenai/peS2o", data_files=["data/v2/train-*.json.gz"], streaming=True)
    load_corpus("openai/gsm8k", subset="main", text_of=question_and_answer)     a function of a row
    load_corpus("notes/**/*.jsonl", text_column="body", domain="knowledge")
    load_corpus("out/curated")                                  a folder written by `Dataset.save_to_disk`

Whatever the name, the rows have three string columns: `text`, `source` (which the mixture weighs and the scores are
summed over) and `domain` ("code", "math", "knowledge" or a name of one's own). `datasets` does the loading; what is
added here is what a long run needs beforehand: an error that names the file, the line or the column, and the remedy.
"""

from __future__ import annotations

import glob
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from mobilellm_hf.data.documents import MIN_CHARACTERS, drop_empty_and_repeated, is_long_enough, split_by_hash
from mobilellm_hf.data.local_files import (
    CorpusError,
    check_file,
    find_files,
    loader_of,
    looks_local,
    missing_column,
    parquet_schema,
)

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

__all__ = ["CorpusError", "load_corpus", "split_by_hash"]

logger = logging.getLogger(__name__)

STRINGS = ("string", "large_string", "str")
UNKNOWN_DOMAIN = "unknown"

TextOf = Callable[[Mapping[str, Any]], str | None]
# The column of the text, and what composes it instead.
Text = tuple[str, TextOf | None]


class _Columns:
    """Makes the three columns of a corpus; a class, so that it pickles and `datasets` can cache by its fields."""

    def __init__(self, name: str, text_column: str, text_of: TextOf | None, fixed: dict[str, str | None]):
        self.name = name
        self.text_column = text_column
        self.text_of = text_of
        self.fixed = fixed

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list[str]]:
        texts = [text or "" for text in (self._compose(batch, indices) if self.text_of else batch[self.text_column])]
        labels = {name: batch[name] if value is None else [value] * len(texts) for name, value in self.fixed.items()}
        return {"text": texts, **labels}

    def _compose(self, batch: dict[str, list], indices: list[int]) -> Iterator[str | None]:
        for place, index in enumerate(indices):
            row = {name: values[place] for name, values in batch.items()}
            try:
                text = self.text_of(row)
            except Exception as error:  # of whatever kind: it is the user's function
                reason = f"raised {type(error).__name__}: {error}"
                raise CorpusError(f"{self._where(index, row)} {reason}") from error
            if not isinstance(text, str | None):
                raise CorpusError(f"{self._where(index, row)} returned a {type(text).__name__}, not a string.")
            yield text

    def _where(self, index: int, row: dict) -> str:
        return f"{self.name}, row {index} (columns: {', '.join(row)}): text_of"


def load_corpus(
    name: str,
    *,
    text_column: str = "text",
    source: str | None = None,
    domain: str | None = None,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    data_files: Sequence[str] | None = None,
    text_of: TextOf | None = None,
    streaming: bool = False,
    sample_by: str = "document",
    min_characters: int = MIN_CHARACTERS,
) -> Dataset | IterableDataset:
    """Loads one corpus as rows of `text`, `source` and `domain`, without nearly empty and repeated rows.

    Args:
        name: "embedded" or "embedded:NAME,NAME"; a local file, folder or glob pattern (.jsonl, .json, .parquet, .txt,
            .md, .py; the text formats also as .gz and .zst), or a folder of `save_to_disk`; else a data set's id on
            the Hub.
        text_column: the column with the text (of the embedded corpus always "text").
        source: what the column `source` says. By default the data's own if it has both `source` and `domain` as string
            columns, as this package writes them, else the last part of the name.
        domain: the same for `domain`, else "unknown".
        split: of the embedded corpus ("train", "probe", "test"), of a Hub data set (also "train[:1%]"), or of a saved
            `DatasetDict`. Plain files have none: "train" is all of them.
        subset: configuration of a Hub data set.
        revision: branch, tag or commit of a Hub data set.
        data_files: patterns of files in the Hub data set's repository (or in a local folder), or URLs, where no
            configuration names them. Their extensions say what they are; of Parquet only the columns needed are read.
        text_of: makes the text of a row from several of its columns, in place of `text_column`. A row for which it
            returns None is dropped. It must pickle, as a function at the top level of a module does.
        streaming: return an `IterableDataset` that reads as it goes. It drops nearly empty rows but not repetitions,
            which only a look at all rows finds, and of local files it checks the first megabyte only.
        sample_by: what is a document in a text file: the whole file ("document"), a "paragraph" or a "line".
        min_characters: rows with fewer characters that are not white space are dropped. Lower it for short answers.

    Raises:
        CorpusError: a `ValueError` that names the file, line, byte or column at fault, and the remedy.
    """
    _check_arguments(name, subset, data_files, text_of)
    text = (text_column, text_of)
    labels = (source, domain)
    if name.split(":")[0] == "embedded":
        return _finish(_load_embedded(name, split, streaming), name, ("text", text_of), labels, min_characters)
    if not looks_local(name):
        what = "data_files" if data_files else f"the subset ({subset})"
        remedy = (
            f"There is no such local file either. Check the name, {what}, the split ({split}) "
            f"and the connection (HF_HUB_OFFLINE must not be 1 unless the data set is in the cache)."
        )
        with _explained(f"the Hub data set {name}", remedy):
            if data_files:
                dataset = _load_hub_files(name, data_files, revision, text, split, streaming, sample_by)
            else:
                dataset = _load_hub(name, split, subset, revision, streaming)
            return _finish(dataset, name, text, labels, min_characters)
    path = Path(name).expanduser()
    if data_files is None and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        with _explained(f"the saved data set {name}", "Write it again with save_to_disk."):
            dataset = _load_saved(path, split, streaming)
            return _finish(dataset, name, text, labels, min_characters)
    loader, files = find_files(name, data_files)
    checked_column = None if text_of else text_column
    for file in files:
        check_file(file, checked_column)
    with _explained(name, "Check the file with another program.", files, checked_column):
        # Resolved and escaped, since `datasets` reads a path as a pattern relative to the working directory.
        paths = [glob.escape(str(file.resolve())) for file in files]
        dataset = _load_files(loader, paths, files[0], text, split, streaming, sample_by)
        return _finish(dataset, name, text, labels, min_characters)


def _check_arguments(name: str, subset: str | None, data_files: Sequence[str] | None, text_of: TextOf | None) -> None:
    """Refuses arguments that exclude each other or cannot be what they are said to be."""
    if data_files is not None:
        if isinstance(data_files, str) or not data_files:
            raise CorpusError(f"data_files must be a list of patterns or URLs, not {data_files!r}.")
        if name.split(":")[0] == "embedded":
            raise CorpusError("The embedded corpus has no data_files: leave them out.")
        if subset is not None:
            raise CorpusError(f"{name}: give data_files or a subset ({subset}), not both: each says which files.")
    if text_of is not None:
        if not callable(text_of):
            raise CorpusError(f"text_of must be a function from a row to its text, not {text_of!r}.")
        try:
            pickle.dumps(text_of)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise CorpusError(f"text_of must pickle: define it at the top level of a module ({error}).") from error


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


def _load_hub_files(
    name: str,
    data_files: Sequence[str],
    revision: str | None,
    text: Text,
    split: str,
    streaming: bool,
    sample_by: str,
) -> Dataset | IterableDataset:
    """Files of a repository on the Hub, by pattern, or of anywhere, by URL."""
    root = f"hf://datasets/{name}@{quote(revision or 'main', safe='')}"
    loader = loader_of(name, data_files)
    urls = [file if "://" in file else f"{root}/{file}" for file in data_files]
    first = [_first_file(url) for url in urls][0]
    return _load_files(loader, urls, first, text, split, streaming, sample_by)


def _first_file(url: str) -> str:
    """The first file, as a URL, that a URL matches, which may be a pattern."""
    import fsspec

    if not glob.has_magic(url):
        return url
    fs, path = fsspec.url_to_fs(url)
    try:
        found = sorted(fs.glob(path))
    except FileNotFoundError:  # not even the folder
        found = []
    if not found:
        raise CorpusError(f"No file matches {url}. Check the name, the revision and the pattern.")
    return fs.unstrip_protocol(found[0])


def _load_files(
    loader: str,
    data_files: list[str],
    first: str | Path,
    text: Text,
    split: str,
    streaming: bool,
    sample_by: str,
) -> Dataset | IterableDataset:
    """Files of one format. first: one of them, whose columns, if it is Parquet, stand for those of all."""
    from datasets import load_dataset

    text_column, text_of = text
    options: dict[str, Any] = {"sample_by": sample_by} if loader == "text" else {}
    if loader == "parquet" and text_of is None:
        there = parquet_schema(first).names
        if text_column not in there:
            raise CorpusError(missing_column(str(first), text_column, there))
        options["columns"] = [name for name in there if name in {text_column, "source", "domain"}]
    return load_dataset(loader, data_files=data_files, split=split, streaming=streaming, **options)


def _choose_split(corpus: DatasetDict, name: str, split: str) -> Dataset:
    if split not in corpus:
        raise CorpusError(f"{name} has no split {split!r}. Its splits: {', '.join(corpus)}.")
    return corpus[split]


@contextmanager
def _explained(what: str, remedy: str, files: Sequence[Path] = (), text_column: str | None = "text") -> Iterator[None]:
    """Turns a failure to load into a `CorpusError`, after a search of the whole files for the line at fault."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except CorpusError:
        raise
    except (OSError, ValueError, ImportError, StopIteration, DatasetsError) as error:
        for file in files:
            check_file(file, text_column, limit=None)
        reason = str(error.__cause__ or error).rstrip(".") or "it holds no rows"
        if "zstd" in reason or "zstandard" in reason:
            remedy = "Its files are compressed with Zstandard: pip install zstandard."
        raise CorpusError(f"Could not load {what}: {reason}. {remedy}") from error


def _finish(
    dataset: Dataset | IterableDataset,
    name: str,
    text: Text,
    labels: tuple[str | None, str | None],
    min_characters: int,
) -> Dataset | IterableDataset:
    """Checks the columns of what was loaded, brings them into the common form and drops what is not worth keeping."""
    from datasets import IterableDataset

    (text_column, text_of), (source, domain) = text, labels
    kinds = _column_kinds(dataset, name)
    if text_of is None and text_column not in kinds:
        raise CorpusError(missing_column(name, text_column, list(kinds)))
    if text_of is None and kinds[text_column] not in STRINGS:
        raise CorpusError(
            f"The text column {text_column!r} of {name} holds {kinds[text_column]}, not strings. "
            f"Name another with text_column."
        )
    if not (kinds.get("source") in STRINGS and kinds.get("domain") in STRINGS):
        source, domain = source or short_name(name), domain or UNKNOWN_DOMAIN
    to_columns = _Columns(name, text_column, text_of, {"source": source, "domain": domain})
    rows = dataset.map(to_columns, batched=True, with_indices=True, remove_columns=list(kinds))
    if isinstance(rows, IterableDataset):
        return rows.filter(is_long_enough, input_columns="text", fn_kwargs={"min_characters": min_characters})
    kept = drop_empty_and_repeated(rows, min_characters)
    if len(kept) == 0:
        raise CorpusError(
            f"Nothing is left of {name}: none of its {len(rows)} rows has {min_characters} characters "
            f"in {'what text_of returns' if text_of else repr(text_column)}. Lower min_characters, or name another "
            f"text_column."
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


def short_name(name: str) -> str:
    """The last part of a path or id, without wildcards and extensions: "out/fine-math.jsonl.gz" gives "fine-math"."""
    parts = [part for part in Path(name).parts if not glob.has_magic(part)]
    return parts[-1].split(".")[0] or parts[-1] if parts else name
