"""Scores of a data set on disk: checkpoint by checkpoint, in shards that are whole or absent.

A shard belongs to one process and depends on nothing but its rows, so any number of processes writes the same files,
and what is on disk is never computed again. The directions of a checkpoint (its probes' gradients after the
curvature's inverse) are on disk too while it is being scored.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from datasets import Dataset
from transformers import AutoConfig, PreTrainedConfig

from mobilellm_hf.influence.mixing import average_checkpoints
from mobilellm_hf.influence.scorer import InfluenceScorer
from mobilellm_hf.nll import COLUMNS, IGNORED_LABEL

# What may differ between the configurations of checkpoints of one training run.
INCIDENTAL = ("_name_or_path", "transformers_version", "dtype", "use_cache", "architectures", "auto_map")


@dataclass(frozen=True)
class ScoringCheckpoint:
    """A model that scores, and the capabilities whose probes it scores against (equation 3)."""

    name: str
    revision: str | None
    step: int
    capabilities: tuple[str, ...]
    label: str

    def load_config(self) -> PreTrainedConfig:
        return AutoConfig.from_pretrained(self.name, revision=self.revision)

    def digest(self) -> str:
        """What identifies the model: SHA-256 of a local folder's configuration and weights, else its Hub commit."""
        folder = Path(self.name)
        if not folder.is_dir():
            return self.load_config()._commit_hash
        files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
        if not files:
            raise ValueError(f"{folder} has no weights (*.safetensors)")
        digest = hashlib.sha256()
        for file in (folder / "config.json", *files):
            with file.open("rb") as stream:
                while chunk := stream.read(2**22):
                    digest.update(chunk)
        return digest.hexdigest()


def read_checkpoints(
    spec: Sequence[str | Mapping] | Mapping[str, Sequence[str | Mapping]], capabilities: Sequence[str]
) -> list[ScoringCheckpoint]:
    """The checkpoints of a recipe's YAML file.

    Args:
        spec: a list, each checkpoint scoring every capability, or capability -> list, as in the paper, which trains a
            model on each domain. A checkpoint is a folder, "org/name@revision", or {name, revision, step}; the step is
            read from `trainer_state.json` or the folder's name ("checkpoint-300") if it is not given.

    Raises:
        ValueError: a folder does not exist, a step cannot be told, capabilities do not match the probes, or the
            checkpoints differ in architecture; the message names the checkpoint and the field.
    """
    by_capability = spec if isinstance(spec, Mapping) else {None: spec}
    if isinstance(spec, Mapping) and set(spec) != set(capabilities):
        raise ValueError(f"checkpoints are given for {sorted(spec)}, but probes for {sorted(capabilities)}")
    found = []
    for capability, entries in by_capability.items():
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"checkpoints must be a list, or capability -> list, not {entries!r}")
        for entry in entries:
            entry = {"name": entry} if isinstance(entry, str) else entry
            if not isinstance(entry, Mapping) or "name" not in entry or set(entry) - {"name", "revision", "step"}:
                raise ValueError(
                    f"checkpoints: write a folder, org/name@revision or {{name, revision, step}}: {entry}"
                )
            name, _, revision = str(entry["name"]).partition("@")
            step = entry["step"] if "step" in entry else _step(name, alone=len(entries) == 1)
            if not (isinstance(step, int) and step > 0):
                raise ValueError(f"checkpoints: the training step of {name} must be a positive number, not {step!r}")
            served = tuple(capabilities) if capability is None else (capability,)
            label = f"{len(found):02d}-{Path(name).name}"
            found.append(ScoringCheckpoint(name, entry.get("revision") or revision or None, step, served, label))
    _check_architectures(found)
    return found


def _step(name: str, alone: bool) -> int:
    folder = Path(name)
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or name.count("/") != 1):
        raise ValueError(f"checkpoints: there is no folder {name}")
    state = folder / "trainer_state.json"
    if state.exists():
        return json.loads(state.read_text())["global_step"]
    if found := re.fullmatch(r"checkpoint-(\d+)", folder.name):
        return int(found[1])
    if alone:  # one checkpoint has the whole weight, whatever its step
        return 1
    raise ValueError(f"checkpoints: the training step of {name} cannot be told: write {{name: {name}, step: N}}")


def _check_architectures(checkpoints: Sequence[ScoringCheckpoint]) -> None:
    first = None
    for checkpoint in checkpoints:
        config = {k: v for k, v in checkpoint.load_config().to_dict().items() if k not in INCIDENTAL}
        first = config if first is None else first
        for field in sorted(set(first) | set(config)):
            if first.get(field) != config.get(field):
                raise ValueError(
                    f"checkpoints are of different architectures: {field} is {first.get(field)!r} in "
                    f"{checkpoints[0].name} and {config.get(field)!r} in {checkpoint.name}"
                )


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 of what a model reads of a data set's rows, in order."""
    digest = hashlib.sha256()
    columns = [name for name in COLUMNS if name in dataset.column_names]
    for batch in dataset.select_columns(columns).with_format("numpy").iter(1_000):
        for name in columns:
            for values in batch[name]:
                digest.update(len(values).to_bytes(4, "little") + values.astype("<i4").tobytes())
    return digest.hexdigest()


def shard_count(rows: int, rows_per_shard: int) -> int:
    return -(-rows // rows_per_shard)


def missing_shards(folder: Path, rows: int, rows_per_shard: int) -> list[int]:
    """The shards that are not on disk, or are damaged there."""
    missing = []
    for shard in range(shard_count(rows, rows_per_shard)):
        try:
            found = pyarrow.parquet.read_metadata(shard_file(folder, shard)).num_rows
        except (FileNotFoundError, pyarrow.ArrowInvalid):
            found = 0
        if found != min(rows_per_shard, rows - shard * rows_per_shard):
            missing.append(shard)
    return missing


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.parquet"


def score_shards(
    scorer: InfluenceScorer,
    dataset: Dataset,
    folder: Path,
    shards: Sequence[int],
    rows_per_shard: int,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> None:
    """Scores these shards; each is a file that is whole or absent.

    A shard is a parquet file of its rows' `row`, `source`, `tokens` (predicted) and a column for each capability.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        start = shard * rows_per_shard
        part = dataset.select(range(start, min(start + rows_per_shard, len(dataset))))
        scores = scorer.score(part, batch_size, allow_overlap=True, first_row=start, on_batch=on_batch)
        labels = part.with_format("numpy")["labels"]
        columns: dict[str, Any] = {
            "row": range(start, start + len(part)),
            "source": part["source"][:],
            "tokens": [int((row[1:] != IGNORED_LABEL).sum()) for row in labels],
        }
        columns |= {name: scores[:, number].numpy() for number, name in enumerate(scorer.capabilities)}
        partial = shard_file(folder, shard).with_suffix(".partial")
        pyarrow.parquet.write_table(pyarrow.table(columns), partial)
        os.replace(partial, shard_file(folder, shard))


def read_shards(folder: Path, rows: int, rows_per_shard: int) -> pyarrow.Table:
    """The table of all shards, in the order of the rows.

    Raises:
        ValueError: a shard is missing or damaged.
    """
    if missing := missing_shards(folder, rows, rows_per_shard):
        raise ValueError(f"{shard_file(folder, missing[0])} is missing or damaged: run again")
    shards = range(shard_count(rows, rows_per_shard))
    return pyarrow.concat_tables([pyarrow.parquet.read_table(shard_file(folder, shard)) for shard in shards])


def combine(tables: Mapping[ScoringCheckpoint, pyarrow.Table], capabilities: Sequence[str]) -> torch.Tensor:
    """Equation (4)'s inner sum: (N, C), each capability over its own checkpoints with weights proportional to step."""
    columns = []
    for name in capabilities:
        serving = [checkpoint for checkpoint in tables if name in checkpoint.capabilities]
        scores = torch.stack([torch.from_numpy(tables[checkpoint][name].to_numpy().copy()) for checkpoint in serving])
        columns.append(average_checkpoints(scores[..., None], [checkpoint.step for checkpoint in serving]))
    return torch.cat(columns, -1)
