"""A scoring run: rows, then the shards of every checkpoint, shared among any number of processes, then the results.

    run_scoring(args, Console())

`recipes/score_influence.py` does it from a YAML file and says what the output folder gets.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, load_from_disk
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import mobilellm_hf
from mobilellm_hf.data.rows import expand_entry, load_rows, sample_per_source
from mobilellm_hf.influence.curvature import Curvature
from mobilellm_hf.influence.directions import build_directions, make_curvature
from mobilellm_hf.influence.folds import fold_file, score_folds, split_into_folds
from mobilellm_hf.influence.overlap import find_overlap, refuse_overlap
from mobilellm_hf.influence.ranks import rank_agreement
from mobilellm_hf.influence.scorer import InfluenceScorer, check_rows, low_rank_directions
from mobilellm_hf.influence.scoring import ScoringCheckpoint, fingerprint, missing_shards, read_shards, score_shards
from mobilellm_hf.influence.scoring_arguments import NOT_OF_THE_SCORES, ScoreInfluenceArguments, check
from mobilellm_hf.influence.scoring_results import say_results, write_results
from mobilellm_hf.progress import Stage, StageProgress
from mobilellm_hf.workspace import Workspace

RANK_CHECK_ROWS = 64


def settings_of(args: ScoreInfluenceArguments, checkpoints: list[ScoringCheckpoint]) -> dict[str, Any]:
    """What decides the scores."""
    settings = dataclasses.asdict(args) | {
        "weights_sha256_or_commit": {checkpoint.label: checkpoint.digest() for checkpoint in checkpoints},
        "mobilellm_hf": mobilellm_hf.__version__,
    }
    for name in NOT_OF_THE_SCORES:
        del settings[name]
    return settings


def record_of(
    args: ScoreInfluenceArguments,
    workspace: Workspace,
    checkpoints: list[ScoringCheckpoint],
    rows: Dataset,
    probes: dict,
) -> dict[str, Any]:
    """What mixture.yaml says of how it came about."""
    record = workspace.settings | {
        name: getattr(args, name)
        for name in ("floor", "bootstraps", "probe_folds", "fold_rows", "shrinkage", "other_seeds", "source_tokens")
    }
    record |= {"mixture_capabilities": args.mixture_capabilities or list(probes), "rows_sha256": fingerprint(rows)}
    record |= {f"probe_{name}_sha256": fingerprint(probe) for name, probe in probes.items()}
    record |= {"steps": {checkpoint.label: checkpoint.step for checkpoint in checkpoints}}
    for file in sorted(workspace.folder.glob("directions/*/agreement.txt")):
        record |= {f"rank_agreement_{file.parent.name}": file.read_text()}
    return record


def run_scoring(args: ScoreInfluenceArguments, console: Console) -> None:
    """All of it, or what an earlier run has left of it.

    Raises:
        ValueError: the settings or the data cannot be scored, or the output folder has the scores of other settings.
    """
    checkpoints = check(args)
    workspace = Workspace(Path(args.output_dir), settings_of(args, checkpoints))
    stages = ["rows", *(checkpoint.label for checkpoint in checkpoints), "results"]
    with StageProgress(stages, console) as progress:
        with progress.stage("rows") as stage:
            rows, probes, tokenizer = build_rows(workspace, args, checkpoints, stage)
        tables = {}
        for checkpoint in checkpoints:
            with progress.stage(checkpoint.label) as stage:
                stage.expect(len(rows))
                tables[checkpoint] = score_checkpoint(workspace, checkpoint, rows, probes, args, stage)
        if not PartialState().is_main_process:
            return
        with progress.stage("results"):
            record = record_of(args, workspace, checkpoints, rows, probes)
            found = write_results(workspace, tables, rows, tokenizer, args, record)
    say_results(*found, args, workspace.folder, console)


def load_tokenizer(args: ScoreInfluenceArguments, checkpoints: list[ScoringCheckpoint]):
    """The tokenizer, or None if only saved rows are scored and the checkpoint has none."""
    needed = any("rows" not in entry for entries in (args.sources, *args.probes.values()) for entry in entries)
    name, revision = args.tokenizer, None
    if name is None:
        name, revision = checkpoints[0].name, checkpoints[0].revision
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        if needed or args.tokenizer:
            raise ValueError(f"no tokenizer could be loaded from {name}: set tokenizer ({error})") from error
        return None


def build_rows(
    workspace: Workspace, args: ScoreInfluenceArguments, checkpoints: list[ScoringCheckpoint], stage: Stage
) -> tuple[Dataset, dict[str, Dataset], PreTrainedTokenizerBase | None]:
    tokenizer = load_tokenizer(args, checkpoints)
    config = checkpoints[0].load_config()

    def build(path: Path) -> None:
        rows, counts = load_scored_rows(args, tokenizer, config)
        probes = {
            name: load_rows(entries, tokenizer, args.seq_length, config, args.rows_per_probe, args.seed)
            for name, entries in args.probes.items()
        }
        for label, part in {"sources": rows, **{f"probes.{name}": part for name, part in probes.items()}}.items():
            check_rows(label, part, config)
        if args.overlap == "error":
            refuse_overlap(rows, probes, "Name other splits or sources, or set overlap: drop.")
        elif args.overlap == "drop":
            found = find_overlap(rows, probes)
            rows = rows.select([row for row in range(len(rows)) if row not in found])
            check_rows("sources, without the rows that share documents with a probe,", rows, config)
        check_resampling(args, rows, probes)
        DatasetDict({"rows": rows, **{f"probe {name}": part for name, part in probes.items()}}).save_to_disk(path)
        (path / "row_counts.json").write_text(json.dumps(counts))

    with PartialState().main_process_first():
        data = load_from_disk(workspace.once("rows", build))
    probes = {name: data[f"probe {name}"] for name in args.probes}
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in probes.items())
    stage.say(f"{len(data['rows']):,} rows of {len(set(data['rows']['source'][:]))} sources; probes: {sizes}")
    return data["rows"], probes, tokenizer


def load_scored_rows(args: ScoreInfluenceArguments, tokenizer, config) -> tuple[Dataset, dict[str, int]]:
    """The rows to be scored, and how many there are of each source in all; of streams nobody knows."""
    streams = any(given.get("streaming") for entry in args.sources for given in expand_entry(entry))
    limit = args.rows_per_source if streams else None
    rows = load_rows(args.sources, tokenizer, args.seq_length, config, limit, args.seed)
    counts = {} if streams else dict(Counter(rows["source"][:]))
    if args.rows_per_source is not None and not streams:
        rows = sample_per_source(rows, args.rows_per_source, args.seed)
    return rows, counts


def check_resampling(args: ScoreInfluenceArguments, rows: Dataset, probes: dict[str, Dataset]) -> None:
    """Raises a ValueError for what would leave the bootstrap nothing to vary, before hours of scoring."""
    few = [name for name, count in Counter(rows["source"][:]).items() if count < 2]
    if args.bootstraps and few:
        raise ValueError(f"{few[0]} has one row, and an interval needs two: leave it out, or set bootstraps: 0")
    for name, probe in probes.items() if args.bootstraps and args.probe_folds else ():
        try:
            split_into_folds(probe, args.probe_folds)
        except ValueError as error:
            raise ValueError(f"probes.{name}: {error}; give it more, or set probe_folds: 0") from error


def load_model(checkpoint: ScoringCheckpoint, args: ScoreInfluenceArguments) -> PreTrainedModel:
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.name, revision=checkpoint.revision, dtype=dtype)
    return model.to(PartialState().device)


def score_checkpoint(
    workspace: Workspace, checkpoint: ScoringCheckpoint, rows: Dataset, probes: dict, args, stage: Stage
) -> pyarrow.Table:
    """The table of one checkpoint's scores, of all shards of all processes."""
    state, folder = PartialState(), workspace.folder / "scores" / checkpoint.label
    scratch = workspace.folder / "directions" / checkpoint.label
    missing = missing_shards(folder, len(rows), args.rows_per_shard)
    folds = fold_file(folder, args.probe_folds, args.fold_rows)
    without_folds = args.bootstraps and args.probe_folds and not folds.exists()
    stage.advance(len(rows) - args.rows_per_shard * len(missing))
    state.wait_for_everyone()  # before anybody writes a shard that another has not looked for yet
    if missing or without_folds:
        model = load_model(checkpoint, args)

        @functools.cache
        def curvature() -> Curvature:
            sample = rows.shuffle(seed=args.seed).select(range(min(args.curvature_rows, len(rows))))
            return make_curvature(args.curvature, model, checkpoint.name, sample, args.batch_size, args.datainf_layers)

        own = {name: probes[name] for name in checkpoint.capabilities}
        if missing:
            score_missing(model, scratch, folder, missing, checkpoint, rows, own, curvature, args, stage)
        if without_folds:
            note = stage.note
            stage.say("parts of the probes")
            score_folds(
                folds, scratch / "folds", model, rows, read_shards(folder, len(rows), args.rows_per_shard), own,
                curvature, (args.probe_folds, args.fold_rows), args.exclude or (), args.batch_size, args.seed,
            )  # fmt: skip
            stage.say(note)
    if state.is_main_process:
        table = read_shards(folder, len(rows), args.rows_per_shard)
        for file in scratch.glob("*.safetensors"):  # of use only while scoring, and large
            file.unlink()
        shutil.rmtree(scratch / "folds", ignore_errors=True)
    state.wait_for_everyone()
    return table if state.is_main_process else None


def score_missing(
    model: PreTrainedModel, scratch: Path, folder: Path, missing: list[int], checkpoint: ScoringCheckpoint,
    rows: Dataset, probes: dict[str, Dataset], curvature, args: ScoreInfluenceArguments, stage: Stage,
) -> None:  # fmt: skip
    """Scores the shards that are missing, each process its share of them."""
    state = PartialState()
    stage.say("gradients of the probes")
    directions = build_directions(scratch, model, probes, curvature, args.exclude or (), args.batch_size)
    stage.say("")
    scorer = exact = InfluenceScorer.from_directions(model, directions, checkpoint.capabilities)
    if args.rank:
        approximate = low_rank_directions(directions, args.rank)
        scorer = InfluenceScorer.from_directions(model, approximate, checkpoint.capabilities)
        if state.is_main_process:
            agreement = compare_rank(scorer, exact, rows, args)
            (scratch / "agreement.txt").write_text(agreement)
            stage.say(agreement)
    score_shards(
        scorer, rows, folder, missing[state.process_index :: state.num_processes], args.rows_per_shard,
        args.batch_size, lambda count: stage.advance(count * state.num_processes),
    )  # fmt: skip
    state.wait_for_everyone()


def compare_rank(approximate: InfluenceScorer, exact: InfluenceScorer, rows: Dataset, args) -> str:
    """The rank correlation of approximate and exact scores on a few rows, beside their cost."""
    sample = rows.shuffle(seed=args.seed).select(range(min(RANK_CHECK_ROWS, len(rows))))
    scores, seconds = [], []
    for scorer in (approximate, exact):
        start = time.process_time()
        scores.append(scorer.score(sample, args.batch_size, allow_overlap=True))
        seconds.append(time.process_time() - start)
    agreement = rank_agreement(*scores).tolist()
    figures = ", ".join(f"{name} {value:.3f}" for name, value in zip(exact.capabilities, agreement, strict=True))
    return f"rank {args.rank}: {seconds[0] / seconds[1]:.2f} of the exact scores' time, rank correlation {figures}"
