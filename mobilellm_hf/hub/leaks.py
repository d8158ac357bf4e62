"""A look through everything that is about to become public: tokens, private keys, paths of this machine.

    scan(files, token=get_token())        # [Finding("training/settings.yaml", 12, "a path of this machine, ...")]

Keys are known by their issuers' prefixes and lengths and by nothing vaguer, so that source code and tokenized text
give no false alarm; the token that the release itself is sent with is looked for as it is. A finding never repeats a
secret. Of safetensors the header is read, of parquet files every string and what their footer says; of other files
every byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mobilellm_hf.hub.files import ReleaseFile
from mobilellm_hf.hub.sources import PLACE

CHUNK = 2**24
LONGEST = 2**12  # of what a pattern matches; chunks overlap by so much
SECRETS = {
    "a Hugging Face token": rb"hf_[A-Za-z0-9]{30,}|hf_(?:jwt|oauth)_+[\w.-]{30,}|api_org_[A-Za-z0-9]{30,}",
    "a GitHub token": rb"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,}",
    "a GitLab token": rb"glpat-[A-Za-z0-9_-]{20,}",
    "an AWS access key": rb"(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google API key": rb"AIza[A-Za-z0-9_-]{35}\b",
    "an OpenAI or Anthropic key": rb"sk-(?:proj-|ant-|svcacct-)?[A-Za-z0-9_-]{32,}",
    "a Slack token": rb"xox[abposr]-[A-Za-z0-9-]{20,}",
    "a W&B key": rb"(?i:wandb|api_key)[^\n]{0,40}\b[0-9a-f]{40}\b",
    "a password in a URL": rb"[a-z][a-z0-9+.-]{1,20}://[^/\s:@'\"<>{}]{1,80}:[^/\s:@'\"<>{}]{3,80}@[\w.-]+",
    "a private key": rb"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----",
}
# None begins inside a word; but the n of an escaped line break, as JSON has it, is no part of one.
BEGINNING = rb"(?:(?<![A-Za-z0-9])|(?<=\\[ntr]))"
PATTERN = re.compile(BEGINNING + b"(?:" + b"|".join(b"(%s)" % pattern for pattern in SECRETS.values()) + b")")
# Files that a path of this machine has no place in: a model's vocabulary and its samples may hold any text.
CONFIGS = (".json", ".jsonl", ".yaml", ".yml", ".md", ".jinja", ".html")
NOT_CONFIGS = ("tokenizer.json", "vocab.json", "samples.md")


@dataclass(frozen=True)
class Finding:
    """Something that must not be published: the file, the line (of a parquet file the row), and what it is."""

    path: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


def scan(files: Sequence[ReleaseFile], token: str | None = None) -> list[Finding]:
    """Every finding in the files, the first of each kind in each file.

    Args:
        token: the user's own.
    """
    kinds = list(SECRETS)
    pattern, place = PATTERN, _places()
    if token:
        kinds.append("the token of this session")
        pattern = re.compile(b"%s|(%s)" % (PATTERN.pattern, re.escape(token.encode())))
    found = []
    for file in files:
        looks_like_config = file.path.endswith(CONFIGS) and Path(file.path).name not in NOT_CONFIGS
        seen: dict[str, Finding] = {}
        for line, text in _texts(file):
            for match in pattern.finditer(text):
                what = kinds[match.lastindex - 1]
                seen.setdefault(what, Finding(file.path, line + text.count(b"\n", 0, match.start()), what))
            if looks_like_config and "path" not in seen and (match := place.search(text)):
                what = f"a path of this machine, {match[0].decode(errors='replace')}..."
                seen["path"] = Finding(file.path, line + text.count(b"\n", 0, match.start()), what)
        found += seen.values()
    return found


def _places() -> re.Pattern[bytes]:
    """Paths that say who works where; the home and the current folder, wherever they are."""
    own = [str(folder) for folder in (Path.home(), Path.cwd()) if len(folder.parts) > 2]
    return re.compile("|".join([PLACE, *map(re.escape, own)]).encode())


def _texts(file: ReleaseFile) -> Iterator[tuple[int, bytes]]:
    """Pieces of a file and the number of each one's first line, from 1."""
    if file.path.endswith(".safetensors"):
        with file.open() as stream:
            yield 1, stream.read(int.from_bytes(stream.read(8), "little"))
    elif file.path.endswith(".parquet"):
        with file.open() as stream:
            yield from _rows(pq.ParquetFile(stream))
    else:
        with file.open() as stream:
            yield from _chunks(iter(lambda: stream.read(CHUNK), b""))


def _rows(file: pq.ParquetFile) -> Iterator[tuple[int, bytes]]:
    yield 1, b"\0".join((file.metadata.metadata or {}).values()).replace(b"\n", b"\0")
    row, names = 1, [field.name for field in file.schema_arrow if not pa.types.is_primitive(field.type)]
    for batch in file.iter_batches(1_000, columns=names) if names else ():
        for values in batch.to_pylist():
            yield row, b"\0".join(_strings(values)).replace(b"\n", b"\0")
            row += 1


def _strings(value: Any) -> Iterator[bytes]:
    if isinstance(value, str | bytes):
        yield value if isinstance(value, bytes) else value.encode()
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(inner)


def _chunks(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    line, kept = 1, b""
    for chunk in chunks:
        text = kept + chunk
        yield line, text
        kept = text[-LONGEST:]
        line += text.count(b"\n", 0, len(text) - len(kept))
