"""A teacher's top-k probabilities on disk, for training without the teacher: 194 bytes a token at k = 32.

    cache = TeacherCache.write("org/teacher", rows, "runs/teacher", top_k=32)   # again after a kill: it goes on
    rows = cache.add_row_ids(rows)
    trainer = Trainer(..., train_dataset=rows, callbacks=[DistillationCallback(TeacherCache("runs/teacher"))])

`accelerate launch` divides the writing among processes, and `TrainingArguments(remove_unused_columns=False)` lets the
row numbers through to the callback. Of every predicted token the cache holds the k likeliest ids, their
log-probabilities at T = 1 and that of "any other id", which `divergence.TopKBuckets` compares to the student's.

Log-probabilities are fp16, wrong by at most 1/2048 of their size: 0.1% for an id of probability 0.1, 0.5% for one of
1e-5. They are normalised again when read, and what remains moves a divergence by the square of that.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from mobilellm_hf.influence.scoring import fingerprint, shard_count
from mobilellm_hf.nll import IGNORED_LABEL, evaluation_batches
from mobilellm_hf.progress import StageProgress
from mobilellm_hf.training.divergence import TeacherLogits, TopKBuckets, buffer_for, chunks, log_sum_exp_
from mobilellm_hf.training.row_ids import ROW_ID
from mobilellm_hf.training.teacher import Teacher, load_teacher, model_name

MANIFEST = "teacher_cache.json"
LOWEST = float(torch.finfo(torch.half).min)


class TeacherCache:
    """A finished cache, memory-mapped: opening it reads a few kilobytes, a batch what belongs to it.

    Attributes:
        manifest: `teacher`, `teacher_weights` (a digest), `vocabulary_size`, `top_k`, `dataset` (a digest), `rows` and
            `rows_per_shard`.
        tokens: how many predicted tokens it holds.
        bytes_per_token: size on disk.

    Raises:
        ValueError: there is no cache in the folder, or it is not finished.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).exists():
            raise ValueError(f"{folder} holds no teacher cache ({MANIFEST}): make one with TeacherCache.write")
        self.manifest = json.loads((self.folder / MANIFEST).read_text())
        if missing := _missing_shards(self.folder, self.manifest):
            count = shard_count(self.manifest["rows"], self.manifest["rows_per_shard"])
            raise ValueError(
                f"{folder} is not finished: {len(missing)} of {count} shards are missing or damaged, "
                f"{_shard_file(self.folder, missing[0]).name} the first: run TeacherCache.write again, which goes on"
            )
        files = [_shard_file(self.folder, shard) for shard in range(self._shards)]
        self._open = {}
        self.tokens = sum(int(self._shard(shard)[1][-1]) for shard in range(self._shards))
        self.bytes_per_token = sum(file.stat().st_size for file in files) / max(1, self.tokens)

    @property
    def _shards(self) -> int:
        return shard_count(self.manifest["rows"], self.manifest["rows_per_shard"])

    @classmethod
    def write(
        cls,
        teacher: PreTrainedModel | str | Path,
        dataset: Dataset,
        folder: str | Path,
        top_k: int = 32,
        batch_size: int = 8,
        *,
        rows_per_shard: int = 512,
        vocabulary_size: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        on_batch: Callable[[int], None] | None = None,
    ) -> "TeacherCache":
        """Runs the teacher over `dataset`, or over what is missing of it; every process of a launch does its share.

        Args:
            teacher: a causal LM on its device (it is left in evaluation mode, without gradients), or a name or folder,
                loaded in `dtype` to this process's device.
            dataset: rows with `input_ids`, and `labels`, `position_ids` (packed rows) and `attention_mask` if there
                are any; rows may differ in length.
            top_k: how many ids a token, fewer than the vocabulary has.
            vocabulary_size: cut the teacher's distribution to so many ids and normalise it again, for a student with
                fewer ids, where only padding differs.
            on_batch: called with the number of rows of every batch, in the place of a progress bar.

        Raises:
            ValueError: the folder holds the cache of another teacher, other rows or another `top_k`; the message names
                the field and both values.
            TeacherOutOfMemoryError: the teacher does not fit.
        """
        # accelerate does not join processes on CPUs unless it is told that there is nothing else.
        state, folder = PartialState(cpu=not torch.accelerator.is_available()), Path(folder)
        name = str(teacher) if isinstance(teacher, (str, Path)) else model_name(teacher)
        manifest = {"teacher": name, "top_k": top_k, "rows": len(dataset), "rows_per_shard": rows_per_shard}
        manifest["dataset"] = fingerprint(dataset)
        _check_same(folder, manifest)
        if isinstance(teacher, (str, Path)):
            teacher = load_teacher(teacher, dtype, state.device)
        if isinstance(teacher, FSDPModule):
            raise ValueError(
                "TeacherCache.write needs a whole teacher in every process, and this one is sharded (FSDP2)"
            )
        teacher = Teacher(teacher)
        manifest["teacher_weights"] = _weights_digest(teacher.model)
        manifest["vocabulary_size"] = min(vocabulary_size or teacher.vocabulary_size, teacher.vocabulary_size)
        if not 0 < top_k < manifest["vocabulary_size"]:
            raise ValueError(f"top_k={top_k} must be between 1 and {manifest['vocabulary_size'] - 1}, the ids but one")
        _check_same(folder, manifest)
        missing = _missing_shards(folder, manifest)
        state.wait_for_everyone()  # before anybody writes a shard that another has not looked for yet
        if state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            _write_whole(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        state.wait_for_everyone()
        mine = missing[state.process_index :: state.num_processes]
        with _progress(on_batch, mine, manifest) as on_batch:
            for shard in mine:
                rows = dataset.select(_rows_of(shard, manifest))
                tensors = _top_k(teacher, rows, manifest, batch_size, on_batch)
                _write_whole(_shard_file(folder, shard), save(tensors))
        state.wait_for_everyone()
        return cls(folder)

    def add_row_ids(self, dataset: Dataset) -> Dataset:
        """`dataset` with the column `row_id`, each row's number in this cache.

        Raises:
            ValueError: these are not the cached rows.
        """
        _check_same(self.folder, {"rows": len(dataset), "dataset": fingerprint(dataset)})
        return dataset.add_column(ROW_ID, numpy.arange(len(dataset)))

    def read(self, row_ids: Sequence[int], labels: torch.Tensor) -> TopKBuckets:
        """The teacher of a batch's predicted tokens, in the order of the batch, on the device of `labels`.

        row_ids: the rows' numbers; labels: (rows, positions) of the same rows, padded anywhere.

        Raises:
            ValueError: a number is not the cache's, or a row's labels are not the cached row's.
        """
        parts = [self._read_row(int(row), row_labels) for row, row_labels in zip(row_ids, labels.cpu(), strict=True)]
        log_probabilities, tail, ids = (numpy.concatenate(arrays) for arrays in zip(*parts, strict=True))
        buckets = torch.from_numpy(numpy.concatenate((log_probabilities, tail[:, None]), 1)).to(labels.device)
        return TopKBuckets(buckets.float().log_softmax(-1), torch.from_numpy(ids.astype("i8")).to(labels.device))

    def _read_row(self, row: int, labels: torch.Tensor) -> tuple[numpy.ndarray, ...]:
        if not 0 <= row < self.manifest["rows"]:
            raise ValueError(f"row_id={row} is not one of the {self.manifest['rows']} rows of {self.folder}")
        shard, row_in_shard = divmod(row, self.manifest["rows_per_shard"])
        file, first, checksums = self._shard(shard)
        start, stop = int(first[row_in_shard]), int(first[row_in_shard + 1])
        predicted, checksum = _predicted(labels)
        if predicted != stop - start:
            raise ValueError(
                f"row {row} has {predicted} predicted tokens in the batch and {stop - start} in {self.folder}: rows "
                "must be fed as they were cached, neither cut nor masked otherwise"
            )
        if checksum != checksums[row_in_shard]:
            raise ValueError(
                f"row {row} predicts other tokens in the batch than in {self.folder}: row_id must come from the "
                "cache's add_row_ids, and rows must be fed as they were cached"
            )
        if predicted == 0:  # safetensors refuses an empty slice at a tensor's end
            return tuple(_nothing(self.manifest).values())
        return tuple(file.get_slice(name)[start:stop] for name in _nothing(self.manifest))

    def _shard(self, shard: int) -> tuple:
        """An open file, and its small tensors."""
        if shard not in self._open:
            file = safe_open(_shard_file(self.folder, shard), framework="numpy")
            self._open[shard] = (file, file.get_tensor("first"), file.get_tensor("checksums"))
        return self._open[shard]


def _predicted(labels: torch.Tensor) -> tuple[int, int]:
    """How many tokens a row's labels predict, and a checksum of them."""
    predicted = labels[1:][labels[1:] != IGNORED_LABEL]
    return len(predicted), zlib.crc32(predicted.to(torch.int32).numpy().tobytes())


def _top_k(
    teacher: Teacher, rows: Dataset, manifest: dict, batch_size: int, on_batch: Callable[[int], None] | None
) -> dict[str, numpy.ndarray]:
    """The tensors of a shard: of every predicted token, in order, and of every row where its tokens begin."""
    found = {name: [array] for name, array in _nothing(manifest).items()}
    counts, checksums = [0], []
    for batch, _ in evaluation_batches(teacher.model, rows, batch_size):
        for row_labels in batch["labels"].cpu():
            predicted, checksum = _predicted(row_labels)
            counts.append(predicted)
            checksums.append(checksum)
        with teacher.head() as (weight, bias):
            logits = TeacherLogits(teacher.states(batch), weight, bias)
            for name, array in _batch_top_k(logits, batch["labels"], manifest):
                found[name].append(array)
        if on_batch is not None:
            on_batch(len(batch["labels"]))
    tensors = {name: numpy.concatenate(arrays) for name, arrays in found.items()}
    return tensors | {"first": numpy.cumsum(counts), "checksums": numpy.array(checksums, "i8")}


@torch.no_grad()
def _batch_top_k(logits: TeacherLogits, labels: torch.Tensor, manifest: dict) -> Iterator[tuple[str, numpy.ndarray]]:
    top_k, vocabulary_size = manifest["top_k"], manifest["vocabulary_size"]
    shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:].flatten()
    kept = (shifted != IGNORED_LABEL).nonzero()[:, 0]
    parts = chunks(kept, vocabulary_size)
    precise = torch.promote_types(logits.states.dtype, torch.float)
    buffer = buffer_for(parts, logits.states, vocabulary_size, precise)
    for part in parts:
        chunk = buffer[: part.stop - part.start]
        logits.fill(kept[part], chunk)
        top, ids = chunk.topk(top_k, -1)
        tail = log_sum_exp_(chunk.scatter_(-1, ids, -torch.inf))
        buckets = torch.cat((top, tail), -1).log_softmax(-1).clamp(min=LOWEST).half().cpu().numpy()
        yield "log_probabilities", buckets[:, :-1]
        yield "tail", buckets[:, -1]
        yield "ids", ids.cpu().numpy().astype(_nothing(manifest)["ids"].dtype)


def _nothing(manifest: dict) -> dict[str, numpy.ndarray]:
    """What is cached of no tokens: the tensors' names, types and widths."""
    shape, ids = (0, manifest["top_k"]), "u2" if manifest["vocabulary_size"] <= 2**16 else "i4"
    return {
        "log_probabilities": numpy.empty(shape, "f2"),
        "tail": numpy.empty(0, "f2"),
        "ids": numpy.empty(shape, ids),
    }


def _rows_of(shard: int, manifest: dict) -> range:
    size = manifest["rows_per_shard"]
    return range(shard * size, min((shard + 1) * size, manifest["rows"]))


def _shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def _missing_shards(folder: Path, manifest: dict) -> list[int]:
    """The shards that are not on disk, or are damaged there."""
    missing = []
    for shard in range(shard_count(manifest["rows"], manifest["rows_per_shard"])):
        try:
            with safe_open(_shard_file(folder, shard), framework="numpy") as file:
                first = file.get_tensor("first")
                tokens, width = file.get_slice("ids").get_shape()
            whole = len(first) == len(_rows_of(shard, manifest)) + 1 and first[-1] == tokens
            whole = whole and width == manifest["top_k"]
        except (FileNotFoundError, SafetensorError):
            whole = False
        if not whole:
            missing.append(shard)
    return missing


def _check_same(folder: Path, manifest: dict) -> None:
    """Raises a ValueError if the folder's cache is of something else, by the name of the field."""
    if not (folder / MANIFEST).exists():
        return
    found = json.loads((folder / MANIFEST).read_text())
    for field, value in manifest.items():
        if found.get(field) != value:
            raise ValueError(
                f"{folder} holds the cache of something else: {field} is {found.get(field)!r} there and {value!r} "
                "here; use what it was made of, or another folder"
            )


def _weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 of some 64 values of each parameter: enough to tell one checkpoint from another."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].contiguous()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _write_whole(file: Path, content: bytes) -> None:
    """Writes a file that is whole or absent, whenever the process or the machine stops."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


@contextmanager
def _progress(
    on_batch: Callable[[int], None] | None, shards: Sequence[int], manifest: dict
) -> Iterator[Callable[[int], None] | None]:
    if on_batch is not None or not PartialState().is_main_process or not shards:
        yield on_batch
        return
    name = f"teacher's top {manifest['top_k']}"
    with StageProgress([name]) as progress, progress.stage(name) as stage:
        stage.expect(sum(len(_rows_of(shard, manifest)) for shard in shards))
        stage.say(f"{manifest['teacher']}, rows")
        yield stage.advance
