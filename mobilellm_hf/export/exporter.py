"""A model's folder to a folder that runs on a device: quantized, lowered to XNNPACK, read back (Appendix C).

    recipes/export.py calls `run_export`.

The output folder gets

    model.pte                       the program, for XNNPACK and ExecuTorch's llama operators
    tokenizer.json, ...             the tokenizer with its chat template, as ExecuTorch's llama runner reads it
    config.json, ...                the model's configuration
    export.json                     the settings, the versions, what every layer became, the size of every part, and
                                    which weights it was made of

It is written under another name first: it is whole or absent.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from rich.console import Console
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

import mobilellm_hf
from mobilellm_hf.curation.scoring import model_identity
from mobilellm_hf.data.tokenization import check_tokenizer
from mobilellm_hf.export.arguments import MAX_SEQ_LEN, ExportArguments
from mobilellm_hf.export.graph import OnDeviceGraph
from mobilellm_hf.export.program import (
    PROGRAM,
    REPORT,
    StoredWeight,
    lower,
    metadata,
    read_operators,
    read_weights,
    write_program,
)
from mobilellm_hf.export.quantization import Quantization, QuantizedLayer, read_back
from mobilellm_hf.export.requirements import need_executorch
from mobilellm_hf.export.size import cache_bytes, check_disk, check_room, shared_bytes, size_table, stored_bytes
from mobilellm_hf.modeling import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.progress import Stage, StageProgress, StagesWithin

VERSIONED = ("executorch", "torch", "torchao", "transformers")
# RoPE types whose angles depend on how long the text is, which a graph cannot decide.
DYNAMIC_ROPE = ("dynamic", "longrope")
EMBEDDING_OPERATORS = {"4w": "quantized_decomposed::embedding_4bit", "8w": "quantized_decomposed::embedding_byte"}


@dataclass(frozen=True)
class Source:
    """What is exported: a model that fits the arguments, and what is decided for it.

    Attributes:
        identity: of the weights, before quantization changes them.
        parts: bytes of every part as it will be stored.
        parameters: their count.
    """

    model: MobileLLMForCausalLM
    tokenizer: PreTrainedTokenizerBase
    quantization: Quantization
    context: int
    cache_dtype: torch.dtype
    identity: str
    parts: dict[str, int]
    parameters: int


def run_export(args: ExportArguments, console: Console, progress: StageProgress | StagesWithin | None = None) -> Path:
    """Exports and returns the output folder.

    Raises:
        ValueError: the arguments fit neither each other nor the model; the message names the field.
        MemoryError, OSError: there is less memory or disk than the export takes.
        ImportError: ExecuTorch is missing; the message says how to install it.
    """
    args.check()
    need_executorch()
    folder, stages = Path(args.output), ["model", "quantization", "program", "results"]
    with whole_folder(folder) as partial, progress or StageProgress(stages, console) as progress:
        with progress.stage("model") as stage:
            source = load_source(args, stage)
        with progress.stage("quantization") as stage:
            layers = source.quantization.apply(source.model)
            stage.say(summary_of(layers))
        with progress.stage("program") as stage:
            graph, program = build_program(source, args.prefill)
            cache = cache_bytes(graph.config, source.context, source.cache_dtype)
            stage.say(f"context {source.context:,}, cache {cache / 1e6:.0f} MB")
        with progress.stage("results"):
            stored_once = write_program(program, partial / PROGRAM)
            verify(partial / PROGRAM, graph, shared_bytes(graph.config, source.quantization) - stored_once)
            for part in (source.tokenizer, graph.config, source.model.generation_config):
                part.save_pretrained(partial)
            report = report_of(args, source, layers, graph.prefill)
            (partial / REPORT).write_text(json.dumps(report, indent=2))
    console.print(size_table(source.parts, folder / PROGRAM))
    console.print(f"{folder}: {PROGRAM}, tokenizer and {REPORT}", soft_wrap=True)
    return folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside this one, which gets its name when all is done and goes away when anything fails.

    Raises:
        ValueError: the name is taken or cannot be written; before anything is computed.
    """
    here, final = Path.cwd(), folder.resolve()
    if final in (here, *here.parents):
        raise ValueError(f"output={folder} is where you are: give a folder of its own")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"output={folder} exists and is not empty: delete it, or give another folder")
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"output={folder} cannot be written: {error}") from error
    try:
        yield partial
        if final.exists():
            final.rmdir()
        os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_source(args: ExportArguments, stage: Stage) -> Source:
    """Loads what fits; what does not is refused before the weights are read, as `run_export` tells."""
    config = load_config(args.model)
    context, cache_dtype = context_of(args, config), getattr(torch, args.kv_cache)
    quantization = Quantization.for_config(
        args.quantize, config, group_size=args.group_size, embedding=args.embedding,
        embedding_group_size=args.embedding_group_size, fall_back=args.group_fall_back,
    )  # fmt: skip
    tokenizer = load_tokenizer(args.model, config)
    memory = check_room(args.model, config, quantization, context, cache_dtype)
    vocabulary = tokenizer.backend_tokenizer.to_str(pretty=True)  # tokenizer.json
    check_disk(Path(args.output), config, quantization, len(vocabulary.encode()))
    model = MobileLLMForCausalLM.from_pretrained(args.model, config=config, dtype=torch.float32)
    identity, parts = identity_of(args.model, model), stored_bytes(model, quantization)
    parameters = model.num_parameters()
    stage.say(f"{parameters:,} parameters, up to {memory / 1e9:.1f} GB of memory")
    return Source(model, tokenizer, quantization, context, cache_dtype, identity, parts, parameters)


def build_program(source: Source, prefill: int):
    """The graph of a quantized model, and what it is lowered to."""
    graph = OnDeviceGraph(source.model, source.context, prefill, source.cache_dtype)
    eos = source.model.generation_config.eos_token_id
    return graph, lower(graph, metadata(graph.config, source.context, graph.prefill, eos))


def load_config(name: str) -> MobileLLMConfig:
    """Of a mobilellm or llama4_text model.

    Raises:
        ValueError: it is none, or has a RoPE that cannot be exported.
    """
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise ValueError(f"model={name} is not a model: it has no config.json")
    if Path(name).is_file():
        raise ValueError(f"model={name} is a file: give the folder that it is in")
    if Path(name, PROGRAM).is_file():
        raise ValueError(f"model={name} is an exported program: give the model that it was made of")
    try:
        config = MobileLLMConfig.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"model={name} is no folder here, and could not be had from the Hub: {error}") from error
    rope_type = config.rope_parameters["rope_type"]
    if rope_type in DYNAMIC_ROPE:
        raise ValueError(f"model={name}: rope_type={rope_type!r} cannot be exported, since a graph cannot decide it")
    return config


def context_of(args: ExportArguments, config: MobileLLMConfig) -> int:
    longest = config.max_position_embeddings
    if args.max_seq_len is None:
        return min(longest, MAX_SEQ_LEN)
    if args.max_seq_len > longest:
        raise ValueError(
            f"max_seq_len={args.max_seq_len:,} is beyond the {longest:,} positions that {args.model} was made for "
            "(max_position_embeddings)"
        )
    return args.max_seq_len


def load_tokenizer(name: str, config: MobileLLMConfig) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"model={name} has no tokenizer that loads: {error}") from error
    check_tokenizer(tokenizer, config)
    return tokenizer


def identity_of(name: str, model: MobileLLMForCausalLM) -> str:
    """Of a folder's weights, by which a release knows them again; of a Hub id its commit, as a branch moves on.

    Args:
        model: what was loaded, which tells where the cache knows no commit.
    """
    if Path(name).is_dir():
        return model_identity(name)
    file = try_to_load_from_cache(name, CONFIG_NAME)  # where loading just put it
    return model_identity(name, Path(file).parent.name) if isinstance(file, str) else model_identity(model)


def summary_of(layers: Mapping[str, QuantizedLayer]) -> str:
    """How many layers became what: '46 8da4w in groups of 32, 1 4w in groups of 576'."""
    counts = Counter((layer.scheme, layer.group_size) for layer in layers.values())
    return ", ".join(
        f"{count} {scheme}" + (f" in groups of {size}" if size else "") for (scheme, size), count in counts.items()
    )


def verify(path: Path, graph: OnDeviceGraph, stored_twice: int = 0) -> None:
    """Raises a RuntimeError unless the file has the graph's quantized Linear layers and embedding, and no others.

    Args:
        stored_twice: bytes that embedding and head were to share, and were not found to.
    """
    datatypes = {"8da4w": "qbint4", "8da8w": "qcint8"}
    layers = [read_back(module.weight) for module in graph.modules() if isinstance(module, nn.Linear)]
    wanted = Counter(
        StoredWeight(datatypes[layer.scheme], layer.group_size, layer.shape)
        for layer in layers
        if layer.scheme in datatypes
    )
    found = Counter(read_weights(path))
    if wanted != found:
        missing, extra = wanted - found, found - wanted
        raise RuntimeError(f"{path} is not what was asked for: it lacks {dict(missing)} and has {dict(extra)}")
    scheme = read_back(graph.embed_tokens.weight).scheme
    operator = EMBEDDING_OPERATORS.get(scheme, "aten::embedding")
    operators = {name.partition(".")[0] for name in read_operators(path) if "embedding" in name}
    if operators != {operator}:
        raise RuntimeError(f"{path} is not what was asked for: its embedding runs {operators}, not {operator}")
    if stored_twice > 0:
        raise RuntimeError(f"{path} is not what was asked for: embedding and head, one table, are in it as two")


def report_of(
    args: ExportArguments, source: Source, layers: Mapping[str, QuantizedLayer], prefill: int
) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    return {
        "model": args.model,
        "identity": source.identity,
        "parameters": source.parameters,
        "context": source.context,
        "prefill": prefill,
        "kv_cache": args.kv_cache,
        "quantization": dataclasses.asdict(source.quantization),
        "layers": {name: f"{layer.scheme}/{layer.group_size}" for name, layer in layers.items()},
        "bytes": source.parts,
        "versions": {"mobilellm_hf": mobilellm_hf.__version__, **versions},
    }
