"""What a stage reads: its tokenizer, its rows on disk, its mixture, and a teacher's probabilities of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from mobilellm_hf.data.catalog import STREAMED_ROWS, find
from mobilellm_hf.data.mixture import MixtureDataset
from mobilellm_hf.data.rows import load_rows, load_sources
from mobilellm_hf.data.source_weights import source_weights
from mobilellm_hf.data.streaming import PackedStream
from mobilellm_hf.data.tokenization import check_tokenizer
from mobilellm_hf.influence.scorer import check_rows
from mobilellm_hf.influence.scoring import fingerprint
from mobilellm_hf.modeling import MobileLLMConfig
from mobilellm_hf.nll import COLUMNS
from mobilellm_hf.progress import Stage
from mobilellm_hf.training.arguments import DTYPES, StageArguments, StageTrainingArguments
from mobilellm_hf.training.teacher_cache import TeacherCache
from mobilellm_hf.workspace import Workspace


def load_tokenizer_and_config(args: StageArguments) -> tuple[PreTrainedTokenizerBase, MobileLLMConfig]:
    """The tokenizer, and the configuration of the model that will be trained.

    Raises:
        ValueError: one of the two cannot be loaded, or they do not fit; the message names the field.
    """
    name = args.tokenizer or args.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer: none could be loaded from {name} ({error})") from error
    if args.model is not None:
        try:
            config = MobileLLMConfig.from_pretrained(args.model)
        except OSError as error:
            raise ValueError(f"model: there is none at {args.model} ({error})") from error
    else:
        fields = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        } | args.model_config
        config = MobileLLMConfig.for_size(args.model_size, **fields) if args.model_size else MobileLLMConfig(**fields)
    check_tokenizer(tokenizer, config)
    if args.seq_length > config.max_position_embeddings:
        raise ValueError(
            f"seq_length={args.seq_length} is beyond the model's max_position_embeddings="
            f"{config.max_position_embeddings}"
        )
    return tokenizer, config


def build_rows(
    workspace: Workspace,
    args: StageArguments,
    tokenizer: PreTrainedTokenizerBase,
    config: MobileLLMConfig,
    stage: Stage,
) -> tuple[dict[str, Dataset | PackedStream], dict[str, Dataset]]:
    """source -> rows or stream, and capability -> rows; what is no stream is tokenized once and kept on disk."""
    streaming = [entry for entry in args.sources if _streams(entry)]
    still = [entry for entry in args.sources if not _streams(entry)]

    def build(path: Path) -> None:
        found = load_sources(still, tokenizer, args.seq_length, config) if still else {}
        parts = {f"source {name}": part for name, part in found.items()}
        for name, entries in args.probes.items():
            rows = load_rows(entries, tokenizer, args.seq_length, config, args.rows_per_probe)
            parts[f"probe {name}"] = rows
        for label, part in parts.items():
            check_columns(label, part)
            check_rows(label, part, config)
        DatasetDict(parts).save_to_disk(path)

    with PartialState().main_process_first():
        saved = load_from_disk(workspace.once("rows", build)) if still or args.probes else {}
    sources = {name.removeprefix("source "): part for name, part in saved.items() if name.startswith("source ")}
    probes = {name: saved[f"probe {name}"] for name in args.probes}
    if streaming:
        sources |= load_sources(streaming, tokenizer, args.seq_length, config, args.shuffle_buffer)
    rows = sum(len(part) for part in sources.values() if isinstance(part, Dataset))
    stage.say(f"{len(sources)} sources, {rows * args.seq_length / 1e6:,.1f} M tokens in rows of {args.seq_length}")
    return sources, probes


def check_columns(label: str, rows: Dataset) -> None:
    """Raises a ValueError that names the first row whose columns are not of one length.

    Saved rows can come from anywhere; those that are packed here are right.
    """
    columns = [name for name in COLUMNS if name in rows.column_names]
    start = 0
    for table in rows.select_columns(columns).with_format("arrow").iter(10_000):
        lengths = {name: pc.list_value_length(table[name].combine_chunks()).to_numpy() for name in columns}
        for name in columns[1:]:
            if len(bad := np.flatnonzero(lengths[name] != lengths["input_ids"])):
                row = int(bad[0])
                raise ValueError(
                    f"{label}, row {start + row}, has {lengths['input_ids'][row]} input_ids and {lengths[name][row]} "
                    f"{name}: tokenize the data again"
                )
        start += len(table)


def _streams(entry: dict) -> bool:
    if "catalog" in entry and "name" not in entry:
        return entry.get("streaming", find(entry["catalog"]).rows >= STREAMED_ROWS)
    return bool(entry.get("streaming", False))


def build_mixture(
    args: StageArguments, training: StageTrainingArguments, sources: dict[str, Dataset | PackedStream]
) -> MixtureDataset:
    return MixtureDataset(
        sources,
        source_weights(args.sources, args.weights, list(sources)),
        training.max_steps * training.global_batch(),
        seed=training.seed,
        block_size=args.block_size,
        max_epochs=args.max_epochs,
        on_max_epochs=args.on_max_epochs,
        keep_folder=Path(training.output_dir) / "mixture",
    )


def write_cache(
    args: StageArguments,
    mixture: MixtureDataset,
    training: StageTrainingArguments,
    vocabulary_size: int,
    stage: Stage,
) -> None:
    """The teacher's probabilities of every row of the mixture, or what is missing of them."""
    if mixture.streams:
        raise ValueError(f"teacher_cache: {mixture.streams[0]} is a stream, whose rows cannot be cached")
    rows = mixture.select(range(mixture.num_rows))
    if (cache := _finished_cache(args, rows)) is not None:
        stage.say(f"finished in an earlier run, {cache.bytes_per_token:.0f} bytes a token")
        return
    shared = args.vocabulary == "shared_prefix"
    teacher = AutoConfig.from_pretrained(args.teacher).get_text_config().vocab_size
    if teacher != vocabulary_size and not (shared and teacher > vocabulary_size):
        raise ValueError(
            f"teacher: {args.teacher} has {teacher} ids and the student {vocabulary_size}: take a teacher of the same "
            "tokenizer; vocabulary: shared_prefix if it has more only by padding"
        )
    stage.expect(len(rows))
    cache = TeacherCache.write(
        args.teacher, rows, args.teacher_cache, args.teacher_top_k, training.per_device_train_batch_size,
        vocabulary_size=vocabulary_size, dtype=DTYPES[args.teacher_dtype], on_batch=stage.advance,
    )  # fmt: skip
    stage.say(f"{cache.tokens / 1e6:.1f} M tokens, {cache.bytes_per_token:.0f} bytes each")


def _finished_cache(args: StageArguments, rows: Dataset) -> TeacherCache | None:
    """The cache, if it is whole and of these rows and this teacher: then the teacher need not be loaded."""
    try:
        cache = TeacherCache(args.teacher_cache)
    except ValueError:
        return None
    wanted = {"teacher": str(args.teacher), "top_k": args.teacher_top_k, "dataset": fingerprint(rows)}
    return cache if all(cache.manifest.get(name) == value for name, value in wanted.items()) else None
