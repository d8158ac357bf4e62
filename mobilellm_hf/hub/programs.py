"""A program for ExecuTorch in a release, and what may be said of it: what `export.json` beside it says.

program = Program(Path("runs/device"), model)       # the folder that recipes/export.py wrote, or its .pte
program.files(whole=True), program.facts
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from mobilellm_hf.curation.scoring import model_identity
from mobilellm_hf.export.program import PROGRAM, REPORT
from mobilellm_hf.export.runtime import FILE_IDENTIFIER
from mobilellm_hf.hub.files import CONFIG, CONFIGS, TOKENIZER, ReleaseFile, read_json
from mobilellm_hf.hub.sources import public_settings

NEEDED = ("context", "prefill", "kv_cache", "quantization", "layers", "bytes", "versions", "model", "identity")
# Of a configuration, what an exported program shares with the model that it was made from.
NETWORK = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "layer_repeats", "rope_parameters", "tie_word_embeddings", "use_qk_norm",
)  # fmt: skip


class Program:
    """An exported program, in the folder that the export left.

    Args:
        path: the folder, or the .pte in it.
        model: folder of the model that it was made from.

    Raises:
        ValueError: it is none, its folder is not whole, or it is of other weights, or another network or tokenizer.
    """

    def __init__(self, path: Path, model: Path):
        self.path = path / PROGRAM if path.is_dir() else path
        self.folder = self.path.parent
        if not self.path.is_file() or not _is_program(self.path):
            raise ValueError(
                f"pte: {self.path} is no .pte file that ExecuTorch loads: give what recipes/export.py wrote"
            )
        for name in (REPORT, CONFIG, "tokenizer.json", "tokenizer_config.json"):
            if not (self.folder / name).is_file():
                raise ValueError(
                    f"pte: {self.folder} has no {name}, beside {self.path.name}: give the folder that "
                    "recipes/export.py wrote"
                )
        self._check_model(model)

    def _check_model(self, model: Path) -> None:
        ours, theirs = read_json(self.folder / CONFIG), read_json(model / CONFIG)
        for name in NETWORK:
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"pte: {self.folder} is no export of {model}: {name} is {ours.get(name)}, not {theirs.get(name)}"
                )
        vocabularies = [read_json(folder / "tokenizer.json")["model"] for folder in (self.folder, model)]
        if vocabularies[0] != vocabularies[1]:
            raise ValueError(f"pte: {self.folder} is no export of {model}: their tokenizers differ")
        # Without the folders' names: a model that was moved is the same.
        exported, released = self.report["identity"], model_identity(model)
        if exported.split()[-1] != released.split()[-1]:
            raise ValueError(
                f"pte: {self.folder} was exported from {self.report['model']} ({exported}), and not "
                f"from {model} as it is now ({released}): export {model}"
            )

    @cached_property
    def report(self) -> dict[str, Any]:
        report = read_json(self.folder / REPORT)
        if missing := [name for name in NEEDED if name not in report]:
            raise ValueError(f"{self.folder / REPORT} does not say {missing[0]}: export it again")
        return report

    @cached_property
    def file(self) -> ReleaseFile:
        """The program, under the name that `OnDeviceModel` looks for."""
        return ReleaseFile(PROGRAM, self.path)

    def files(self, alone: bool) -> list[ReleaseFile]:
        """The program and its report; `alone`, where no model is beside it, its configuration and tokenizer too."""
        document = json.dumps(public_settings(self.report), indent=2) + "\n"
        found = [self.file, ReleaseFile(REPORT, document.encode())]
        for path in sorted(self.folder.iterdir()) if alone else ():
            if path.name in (*CONFIGS, *TOKENIZER) or path.suffix == ".py":
                found.append(ReleaseFile(path.name, path))
        return found

    @cached_property
    def unties(self) -> bool:
        """Whether it holds a matrix for the embedding and another one for the head, whatever the model has."""
        return not self.report["quantization"].get("one_table", False)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a card's table says of it."""
        report = self.report
        layers = Counter(report["layers"].values())
        bits = {name: decimal(size) for name, size in report["bytes"].items()}
        return {
            "file": f"{PROGRAM}, {decimal(self.path.stat().st_size)}",
            "Linear layers": _scheme(report["quantization"]["linear"], report["quantization"]["group_size"]),
            "layers (scheme/inputs that share a scale)": ", ".join(f"{n} {name}" for name, n in layers.items()),
            "of the file": ", ".join(f"{name} {size}" for name, size in bits.items()),
            "context, in tokens": report["context"],
            "tokens of a prompt taken at once": report["prefill"],
            "keys and values": report["kv_cache"],
            "exported with": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        }


def _is_program(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(8)[4:6] == FILE_IDENTIFIER


def _scheme(linear: str, group_size: int | None) -> str:
    return linear if group_size is None else f"{linear}, groups of {group_size}"
