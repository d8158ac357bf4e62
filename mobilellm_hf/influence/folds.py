"""Influence of each source on each fold of a probe, by which the probe's samples are bootstrapped.

    table = fold_influence(folder, model, probes, samples, curvature, folds=8)     # capability -> (S, K), (K,)

A probe's gradient is the mean of its folds', and the curvature's inverse is linear, so the folds' influences average
to the probe's: to resample folds is to resample probe samples. No row is scored again. The token-weighted mean of a
source's influences is the product of two mean gradients (`gradients.py`), which takes one gradient a source and one a
fold: a forward and a backward pass over the sampled rows, and over the probes once more.

Everything is on disk meanwhile, a tensor at a time in memory for the products: (sources + 2 x folds) gradients.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors import safe_open
from transformers import PreTrainedModel

from mobilellm_hf.data.rows import sample_per_source
from mobilellm_hf.influence.curvature import Curvature
from mobilellm_hf.influence.directions import once, write_directions
from mobilellm_hf.influence.gradients import mean_gradient
from mobilellm_hf.nll import COLUMNS, IGNORED_LABEL
from mobilellm_hf.workspace import write_whole

FoldTable = dict[str, tuple[np.ndarray, np.ndarray]]


def split_into_folds(probe: Dataset, folds: int) -> list[Dataset]:
    """Disjoint parts that together are the probe's samples that predict anything.

    Neighbouring rows, which may be of one document, stay together, and each source of the probe is spread over all
    parts: they differ as new samples of the same sources would.

    Raises:
        ValueError: there are fewer than two samples.
    """
    rows = _predicting(probe)
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} of its samples predict anything, and an interval needs two")
    folds = min(folds, len(rows))
    sources = probe["source"][:] if "source" in probe.column_names else [""] * len(probe)
    order = sorted(rows, key=lambda row: sources[row])  # stable: neighbours of a source stay in order
    groups: dict[str, list[int]] = {}
    for row in order:
        groups.setdefault(sources[row], []).append(row)
    parts: list[list[int]] = [[] for _ in range(folds)]
    first = 0  # where the next source begins, so that small ones do not all fill the same parts
    for own in groups.values():
        for place, row in enumerate(own):
            parts[(first + place * min(folds, len(own)) // len(own)) % folds].append(row)
        first += min(folds, len(own))
    return [probe.select(part) for part in parts if part]


def _predicting(dataset: Dataset) -> list[int]:
    columns = [name for name in COLUMNS if name in dataset.column_names]
    found = []
    for number, row in enumerate(dataset.select_columns(columns).with_format("numpy")):
        predicted = row["labels"][1:] != IGNORED_LABEL if "labels" in row else row["input_ids"][1:] >= 0
        if "labels" not in row and "attention_mask" in row:
            predicted = predicted & (row["attention_mask"][1:] > 0) & (row["attention_mask"][:-1] > 0)
        if predicted.any():
            found.append(number)
    return found


def fold_influence(
    folder: Path,
    model: PreTrainedModel,
    probes: Mapping[str, Dataset],
    samples: Mapping[str, Dataset],
    curvature: Callable[[], Curvature],
    folds: int,
    exclude: Sequence[str] = (),
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> FoldTable:
    """capability -> (S, K) influence of each source on each fold, and (K,) samples a fold.

    To be called by all processes, each with its model; what one of them has finished is on disk and not done again.

    Args:
        folder: of scratch files.
        samples: source -> tokenized rows of it.
        curvature: makes the curvature; called by the first process once a capability.

    Raises:
        ValueError: a probe has fewer than two samples, or a gradient is not finite; the message names it.
    """
    state, files = PartialState(), []
    for number, (name, rows) in enumerate(samples.items()):
        files.append(folder / f"source-{number:03d}.safetensors")
        if number % state.num_processes == state.process_index:
            once(files[-1], lambda name=name, rows=rows: _source_gradient(model, name, rows, batch_size, on_batch))
    result = {}
    for capability, probe in probes.items():
        try:
            parts = split_into_folds(probe, folds)
        except ValueError as error:
            raise ValueError(f"probe {capability!r}: {error}") from error
        named = {f"{capability}.{number}": part for number, part in enumerate(parts)}
        directions = write_directions(
            folder, model, named, curvature, exclude, batch_size, on_batch, label=f"{capability}-in-{len(parts)}"
        )
        if state.is_main_process:
            result[capability] = _products(files, directions), np.array([len(part) for part in parts])
            for name in named:
                (folder / f"gradient-{name}.safetensors").unlink(missing_ok=True)
            directions.unlink()
        state.wait_for_everyone()
    return result


def _source_gradient(model, name: str, rows: Dataset, batch_size: int, on_batch) -> dict[str, torch.Tensor]:
    try:
        return mean_gradient(model, rows, batch_size, on_batch)
    except ValueError as error:
        raise ValueError(f"source {name!r}: {error}") from error


def _products(gradients: Sequence[Path], directions: Path) -> np.ndarray:
    """(S, K): every parameter that the directions have, one in memory at a time."""
    total = 0.0
    with safe_open(directions, "pt") as stacked:
        for parameter in stacked.keys():  # noqa: SIM118, it is no dictionary
            own = stacked.get_tensor(parameter).flatten(1).double()
            rows = []
            for file in gradients:
                with safe_open(file, "pt") as gradient:
                    rows.append(own @ gradient.get_tensor(parameter).flatten().double())
            total = total + torch.stack(rows)
    return total.numpy()


def fold_file(folder: Path, folds: int, rows: int) -> Path:
    """Where a checkpoint's scores have the influence of so many rows of each source on so many folds."""
    return folder / f"folds-{folds}-{rows}.json"


def score_folds(
    file: Path,
    scratch: Path,
    model: PreTrainedModel,
    rows: Dataset,
    scored: pyarrow.Table,
    probes: Mapping[str, Dataset],
    curvature: Callable[[], Curvature],
    sizes: tuple[int, int],
    exclude: Sequence[str],
    batch_size: int,
    seed: int,
) -> None:
    """Writes `fold_influence` of a random choice of each source's rows, of those whose scores are finite.

    To be called by all processes.

    Args:
        scored: the table of the rows' scores.
        sizes: folds of a probe, and rows of a source.
    """
    folds, count = sizes
    finite = np.stack([np.isfinite(scored[name].to_numpy()) for name in probes]).all(0)
    counted = np.flatnonzero(finite & (scored["tokens"].to_numpy() > 0))
    some = sample_per_source(rows.select(counted), count, seed)
    found = np.array(some["source"][:])
    samples = {name: some.select(np.flatnonzero(found == name)) for name in dict.fromkeys(found.tolist())}
    place = scratch / f"{folds}-{count}"
    table = fold_influence(place, model, probes, samples, curvature, folds, exclude, batch_size)
    if PartialState().is_main_process:
        save_folds(file, table, list(samples))
    PartialState().wait_for_everyone()


def save_folds(path: Path, table: FoldTable, sources: Sequence[str]) -> None:
    """As JSON, whole or absent."""
    document = {
        "sources": list(sources),
        "folds": {name: {"influence": v.tolist(), "samples": n.tolist()} for name, (v, n) in table.items()},
    }
    write_whole(path, lambda partial: partial.write_text(json.dumps(document)))


def load_folds(path: Path, sources: Sequence[str]) -> FoldTable:
    """What `save_folds` wrote, the rows in the order of these sources."""
    document = json.loads(path.read_text())
    order = [document["sources"].index(name) for name in sources]
    return {
        name: (np.array(entry["influence"])[order], np.array(entry["samples"]))
        for name, entry in document["folds"].items()
    }
