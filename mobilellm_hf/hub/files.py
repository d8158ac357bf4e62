"""What a release holds: files of a model's folder that belong to it, and a reason for each that does not.

    files, left_out = model_files(Path("runs/140M/midtrain-stage1/MobileLLM-R1-140M-midtrain-stage1"))

Weights are safetensors and nothing else: a pickle runs code where it is loaded. A file stays where it is until it is
sent; what is written for the release alone (the card, the settings) is bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError, safe_open

CHUNK = 2**22
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
WEIGHTS = ".safetensors"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
CONFIGS = (CONFIG, "generation_config.json", INDEX)
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
CARD = "README.md"


@dataclass(frozen=True)
class ReleaseFile:
    """A file of a release: its place in the repository, and where its bytes come from."""

    path: str
    source: Path | bytes

    def open(self) -> io.BufferedIOBase:
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source.open("rb")

    @cached_property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @cached_property
    def digests(self) -> tuple[str, str]:
        """SHA-256, which names a large file on the Hub, and git's SHA-1, which names any other."""
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % self.size)
        with self.open() as stream:
            while chunk := stream.read(CHUNK):
                sha256.update(chunk)
                git.update(chunk)
        return sha256.hexdigest(), git.hexdigest()

    def read(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


def model_files(folder: Path) -> tuple[list[ReleaseFile], dict[str, str]]:
    """What a release takes of a model's folder, and of every other file why it does not.

    Raises:
        ValueError: it is no whole folder of a MobileLLM; the message names the file and the remedy.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    files, left_out, weights = [], {}, weight_files(folder)
    for path in sorted(folder.iterdir()):
        if path.name == INDEX and SINGLE in weights or path.suffix == WEIGHTS and path.name not in weights:
            left_out[path.name] = "transformers does not load it"
        elif path.name in (*CONFIGS, *TOKENIZER) or path.suffix in (WEIGHTS, ".py"):
            files.append(ReleaseFile(path.name, path))
        elif path.suffix in PICKLES:
            left_out[path.name] = "a pickle, which runs code where it is loaded"
        elif path.name != CARD and path.suffix != ".png":  # which the card takes up
            left_out[path.name] = "no part of a model"
    _check(folder, {file.path for file in files}, left_out)
    return files, left_out


def weight_files(folder: Path) -> list[str]:
    """Those that transformers loads: `model.safetensors`, or else what the index names."""
    if (folder / SINGLE).exists():
        return [SINGLE]
    index = folder / INDEX
    return sorted(set(read_json(index)["weight_map"].values())) if index.exists() else []


def _check(folder: Path, names: set[str], left_out: dict[str, str]) -> None:
    if CONFIG not in names:
        raise ValueError(f"{folder} has no config.json: it is no folder of a model")
    config = read_json(folder / CONFIG)
    if config.get("model_type") != "mobilellm":
        raise ValueError(
            f"{folder}/config.json: model_type is {config.get('model_type')!r}, not mobilellm. "
            "MobileLLMForCausalLM.from_pretrained(...).save_pretrained(...) writes it as such, if it is that network"
        )
    weights = weight_files(folder)
    if not weights:
        pickled = [name for name in left_out if name.startswith("pytorch_model")]
        found = f", but {pickled[0]}, a pickle" if pickled else ""
        raise ValueError(f"{folder} has no {SINGLE}{found}: load it and call save_pretrained, and release that")
    code = {reference.split(".")[0] + ".py" for reference in config.get("auto_map", {}).values()}
    if not code or not code <= names:
        missing = f"{', '.join(sorted(code - names))} is missing" if code else "config.json has no auto_map"
        raise ValueError(
            f"{folder}: {missing}, so nobody without this package could load it. save_pretrained of a "
            "MobileLLMForCausalLM writes both"
        )
    if "tokenizer.json" not in names or "tokenizer_config.json" not in names:
        raise ValueError(f"{folder} has no tokenizer: call tokenizer.save_pretrained({str(folder)!r})")
    if missing := [name for name in weights if name not in names]:
        raise ValueError(f"{folder}: {INDEX} names {missing[0]}, which is not there: the folder is not whole")
    for name in weights:
        tensor_sizes(folder / name)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_json_lines(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def tensor_sizes(path: Path) -> dict[str, int]:
    """Name -> number of elements, from the header alone.

    Raises:
        ValueError: the file is damaged or cut short.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error})") from error
    sizes = {}
    for name, shape in shapes.items():
        sizes[name] = 1
        for length in shape:
            sizes[name] *= length
    return sizes


def files_table(files: Sequence[ReleaseFile], left_out: Iterable[tuple[str, str]] = ()) -> Table:
    """Paths and sizes, for a person to look through before anything is sent."""
    table = Table("file", title="What is released", caption=f"{len(files)} files", show_footer=True)
    table.columns[0].footer = "all"
    table.add_column("size", justify="right", footer=decimal(sum(file.size for file in files)))
    for file in files:
        table.add_row(escape(file.path), decimal(file.size))
    for name, reason in left_out:
        table.add_row(f"[dim]{escape(name)}: left out, {reason}[/dim]", "")
    return table
