"""Local corpus files: finding them, and saying what is wrong with one before hours are spent on it.

`datasets` loads files well but explains them badly: a Latin-1 byte in a JSON line loads without complaint and fails at
the row's first use, a malformed line is "row 1" of an unnamed block. So the first megabyte of every file is checked
before anything is loaded (columns, types, encoding, syntax), and if loading fails further on, the same check runs over
the whole file to name the line or the byte.
"""

from __future__ import annotations

import difflib
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import pyarrow

# What `datasets.load_dataset` calls the loader of each extension; a text format may also be compressed (".jsonl.gz").
LOADERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".py": "text",
}
COMPRESSED = (".gz", ".zst")
HEAD_BYTES = 1 << 20


class CorpusError(ValueError):
    """A corpus that cannot be used, with the file, line or column at fault and what to do about it."""


def extension(path: str | Path) -> str:
    """The extension that tells the format: ".jsonl" for "a.jsonl", "a.jsonl.gz" and "a.jsonl.zst"."""
    path = Path(str(path).lower())
    return path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix


def looks_local(name: str) -> bool:
    """Whether a corpus name means a path: it exists, is written like one, or ends in a known extension."""
    return (
        Path(name).expanduser().exists()
        or name.startswith(("/", ".", "~"))
        or glob.has_magic(name)
        or extension(name) in LOADERS
    )


def find_files(name: str, patterns: Sequence[str] | None = None) -> tuple[str, list[Path]]:
    """Resolves a file, a folder (searched with its subfolders) or a glob pattern.

    Args:
        patterns: of a folder, only the files that match one of these.

    Returns:
        The `datasets` loader for the files ("json", "parquet" or "text") and the files, sorted by name.

    Raises:
        CorpusError: nothing is there, a file is empty or of an unknown format, the formats are mixed, or a format
            needs a package that is missing.
    """
    path = Path(name).expanduser()
    if patterns is not None:
        files = _matching(path, patterns)
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and extension(file) in LOADERS)
        if not files:
            raise CorpusError(f"The folder {name} holds no corpus files. Known formats: {_formats()}.")
    elif path.exists():
        files = [path]
    elif glob.has_magic(name):
        files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
        if not files:
            raise CorpusError(f"No file matches {name}.")
    else:
        raise CorpusError(f"There is no file {name}.{_suggestion(path)}")
    loader = loader_of(name, files)
    for file in files:
        if file.stat().st_size == 0:
            raise CorpusError(f"{file} is empty. Remove it, or write it again.")
    return loader, files


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of a folder that match one of the patterns; of each there must be one."""
    if not folder.is_dir():
        raise CorpusError(f"data_files are patterns inside a folder or a Hub data set, and {folder} is no folder.")
    found = set()
    for pattern in patterns:
        matches = {file for file in folder.glob(pattern) if file.is_file()}
        if not matches:
            raise CorpusError(f"No file of the folder {folder} matches {pattern!r} of data_files.")
        found |= matches
    return sorted(found)


def loader_of(name: str, files: Sequence[str | Path]) -> str:
    """The `datasets` loader that reads all these files, or patterns of files.

    Raises:
        CorpusError: a format is unknown, they are of several, or one needs a package that is missing.
    """
    for file in files:
        if extension(file) not in LOADERS:
            raise CorpusError(
                f"{file}: files of the format {extension(file) or '(none)'} cannot be read. "
                f"Known formats: {_formats()}."
            )
    loaders = {LOADERS[extension(file)] for file in files}
    if len(loaders) > 1:
        raise CorpusError(
            f"{name} mixes the formats {', '.join(sorted(set(map(extension, files))))}. "
            f"Name one of them with a pattern, such as {name}/**/*{extension(files[0])}."
        )
    if zst := [file for file in files if str(file).lower().endswith(".zst")]:
        try:
            import zstandard  # noqa: F401
        except ImportError as error:
            raise CorpusError(
                f"{zst[0]} is compressed with Zstandard, and the package that reads it is missing: "
                f"pip install zstandard."
            ) from error
    return loaders.pop()


def _formats() -> str:
    return ", ".join(LOADERS) + "; .gz and .zst of the text formats"


def _suggestion(path: Path) -> str:
    """' Did you mean ...?' from the names in the nearest folder that exists."""
    if not path.parent.is_dir():
        return f" Nor is there a folder {path.parent}."
    names = difflib.get_close_matches(path.name, sorted(file.name for file in path.parent.iterdir()), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(str(path.parent / name) for name in names)}?" if names else ""


def check_file(path: Path, text_column: str | None, limit: int | None = HEAD_BYTES) -> None:
    """Raises for what would stop this file from being a corpus.

    Args:
        path: a file that `find_files` returned.
        text_column: the field or column that holds the text; a text file has only "text". None if the text is
            composed from several, which are then not looked for.
        limit: bytes to look at (whole lines), None for all of them. Parquet needs its footer only.

    Raises:
        CorpusError: naming the file and the line, byte offset or column.
    """
    loader = LOADERS[extension(path)]
    try:
        if loader == "parquet":
            _check_parquet(path, text_column)
        elif loader == "json":
            _check_json(path, text_column, limit)
        elif not any(line.strip() for _, line in list(_lines(path, limit))):
            raise CorpusError(f"{path} is empty. Remove it, or write it again.")
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{path} cannot be read: {error}. Check its permissions, or write it again.") from error


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file as they were before it was compressed."""
    compression = path.suffix.lower()
    if compression != ".zst":
        with gzip.open(path) if compression == ".gz" else path.open("rb") as file:
            yield file
        return
    import zstandard

    try:
        with zstandard.open(path) as file:
            yield io.BufferedReader(file)
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error


def _lines(path: Path, limit: int | None) -> Iterator[tuple[int, str]]:
    """The numbered lines of a UTF-8 file, as far as they start within `limit` bytes."""
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                place = f"byte {line[error.start]:#04x} at offset {offset + error.start}, line {number}"
                raise CorpusError(
                    f"{path} is not UTF-8: {place}. If it is Latin-1, convert it with iconv -f latin1 -t utf-8."
                ) from None
            yield number, text.removeprefix("\ufeff")
            offset += len(line)
            if limit is not None and offset >= limit:
                return


def _check_json(path: Path, text_column: str | None, limit: int | None) -> None:
    """Checks the lines of a JSON-lines file, or the parts of one array of objects."""
    seen: list[str] = []
    has_text = False
    for number, line in _lines(path, limit):
        if number == 1 and extension(path) == ".json" and line.lstrip().startswith("["):
            # One array: it has no lines to be checked one by one, and `datasets` reads it in one piece as well.
            _check_records(path, [(f"item {i}", row) for i, row in enumerate(_array(path), start=1)], text_column)
            return
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError(
                    f"{path}, line {number}: {error.msg} at column {error.colno}. The file must hold "
                    f"one JSON object a line (or, as .json, one array of objects)."
                ) from None
            has_text = _check_record(path, f"line {number}", row, text_column) or has_text
            seen += [name for name in row if name not in seen]
    if not seen and not has_text:
        raise CorpusError(f"{path} is empty. Remove it, or write it again.")
    if not has_text:
        raise CorpusError(missing_column(str(path), text_column, seen))


def _array(path: Path) -> list:
    text = "".join(line for _, line in _lines(path, None))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{path}, line {error.lineno}: {error.msg} at column {error.colno}.") from None


def _check_records(path: Path, records: Sequence[tuple[str, object]], text_column: str | None) -> None:
    checked = [_check_record(path, place, row, text_column) for place, row in records]
    if not any(checked):
        raise CorpusError(missing_column(str(path), text_column, [name for _, row in records[:1] for name in row]))


def _check_record(path: Path, place: str, row: object, text_column: str | None) -> bool:
    """Whether the record has the text column (if any is asked for); raises if it is no object, or that no string."""
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise CorpusError(f'{path}, {place} is a {kind}, not an object such as {{"{text_column or "text"}": "..."}}.')
    if text_column is None:
        return True
    if not isinstance(row.get(text_column), str | None):
        kind = type(row[text_column]).__name__
        raise CorpusError(
            f"{path}, {place}: the text column {text_column!r} holds a {kind}, not a string. "
            f"Name another with text_column."
        )
    return text_column in row


def parquet_schema(path: str | Path) -> pyarrow.Schema:
    """The schema of a local Parquet file or, by fsspec, of one behind a URL: its footer is all that is read.

    Raises:
        CorpusError: it is no Parquet file.
    """
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with fsspec.open(str(path), "rb") as file:
            return pa.parquet.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path} is not a readable parquet file: {error}") from error


def _check_parquet(path: Path, text_column: str | None) -> None:
    import pyarrow as pa

    schema = parquet_schema(path)
    if text_column is None:
        return
    if text_column not in schema.names:
        raise CorpusError(missing_column(str(path), text_column, schema.names))
    kind = schema.field(text_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise CorpusError(
            f"{path}: the text column {text_column!r} holds {kind}, not strings. Name another with text_column."
        )


def missing_column(name: str, text_column: str, columns: Sequence[str]) -> str:
    """The message for a corpus without the text column."""
    there = ", ".join(columns) or "none"
    return f"{name} has no column {text_column!r}. Its columns: {there}. Name the one with the text with text_column."
