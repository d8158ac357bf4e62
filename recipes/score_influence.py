# /// script
# dependencies = ["mobilellm_hf[plots]"]
# ///
"""Scores every row of a data set for its influence on capability probes, and makes a mixture of its sources.

    accelerate launch recipes/score_influence.py --config recipes/tiny/score_influence.yaml
    accelerate launch recipes/score_influence.py --config mine.yaml --curvature adam --output_dir runs/adam

Any number of processes shares the work (one GPU each; on CPUs `torchrun --nproc_per_node 2 recipes/...`), with equal
results. What a killed run has scored stays; the same command goes on. The output folder gets

    scores/CHECKPOINT/shard-*.parquet   a row's influence on each capability (equations 2 and 3)
    influence.parquet                   the checkpoints together (equation 4)
    mixture.yaml                        a weight for each source (equation 5) with its 95% interval, shrunk towards the
                                        proportional mix as far as resampling says; with figures and settings
    bootstrap.npz                       what resampling does to each source's influence, for a mixture of several seeds
    histograms.png, heat_map.png        Figure 5, and source x capability
    samples.md                          the most and the least helpful samples, to read
"""

import dataclasses
import functools
import json
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import mobilellm_hf  # isort: skip  # first: it keeps torchao quiet, which transformers imports

import pyarrow
import pyarrow.parquet
import torch
import yaml
from accelerate import PartialState
from datasets import Dataset, DatasetDict, disable_progress_bars, load_from_disk
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import logging as transformers_logging
from trl import TrlParser

from mobilellm_hf.data.rows import check_entries, expand_entry, load_rows, sample_per_source
from mobilellm_hf.influence import Curvature, InfluenceScorer, rank_agreement
from mobilellm_hf.influence.bootstrap import DRAWS, RhoDraws, bootstrap_scores, combine_seeds
from mobilellm_hf.influence.directions import build_directions, make_curvature
from mobilellm_hf.influence.folds import fold_file, load_folds, score_folds, split_into_folds
from mobilellm_hf.influence.overlap import find_overlap, refuse_overlap
from mobilellm_hf.influence.plots import plot_histograms, plot_influence
from mobilellm_hf.influence.report import SourceInfluence, examples, influence_table, mixture_document, summarize
from mobilellm_hf.influence.scorer import check_rows, low_rank_directions
from mobilellm_hf.influence.scoring import (
    ScoringCheckpoint,
    combine,
    fingerprint,
    missing_shards,
    read_checkpoints,
    read_shards,
    score_shards,
)
from mobilellm_hf.influence.uncertainty import UncertainWeights, proportional_mix, uncertain_weights
from mobilellm_hf.progress import Stage, StageProgress
from mobilellm_hf.workspace import Workspace

RANK_CHECK_ROWS = 64
BOOTSTRAP = "bootstrap.npz"
# Where a run is, how its work is cut up, and what is made of the scores: other values find the same scores.
NOT_OF_THE_SCORES = (
    "output_dir", "batch_size", "mixture_capabilities", "floor", "samples_shown", "bootstraps", "probe_folds",
    "fold_rows", "shrinkage", "source_tokens", "other_seeds",
)  # fmt: skip


@dataclass
class ScoreInfluenceArguments:
    output_dir: str = field(metadata={"help": "folder of the scores; one of other settings is refused"})
    checkpoints: list[dict] = field(
        default_factory=list,
        metadata={
            "help": "YAML only: models that score, a list for all capabilities or capability -> list: folders, "
            "'org/name@revision' or {name, revision, step}"
        },
    )
    sources: list[dict] = field(
        default_factory=list,
        metadata={"help": "YAML only: what is scored: {name: CORPUS}, {catalog: SOURCE} or {rows: FOLDER}"},
    )
    probes: dict = field(default_factory=dict, metadata={"help": "YAML only: capability -> list of such sources"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "folder or Hub id; by default that of the first checkpoint"}
    )
    seq_length: int = field(default=2048, metadata={"help": "tokens of a packed row"})
    rows_per_source: int | None = field(default=None, metadata={"help": "score a random choice of each source's rows"})
    rows_per_probe: int | None = field(default=None, metadata={"help": "the same of each source of a probe"})
    overlap: Literal["error", "drop", "allow"] = field(
        default="error", metadata={"help": "what to do with rows that share documents with a probe"}
    )
    curvature: Literal["identity", "adam", "datainf", "ekfac"] = field(
        default="identity", metadata={"help": "H of equation (2); adam reads the checkpoint's optimizer.pt"}
    )
    curvature_rows: int = field(default=128, metadata={"help": "rows on which datainf and ekfac are fitted"})
    datainf_layers: Literal["embedding_and_final", "all"] = field(
        default="embedding_and_final", metadata={"help": "the paper's layers, or all"}
    )
    exclude: list[str] | None = field(
        default=None,
        metadata={"help": "patterns of names of parameters that do not count: 'model.embed_tokens.*'"},
    )
    rank: int | None = field(
        default=None,
        metadata={"help": "approximate the probe directions by matrices of this rank; the agreement is printed"},
    )
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "of the weights"})
    batch_size: int = field(default=8, metadata={"help": "rows of a batch, per process"})
    rows_per_shard: int = field(default=256, metadata={"help": "rows of a file: what a kill can cost a process"})
    mixture_capabilities: list[str] | None = field(
        default=None, metadata={"help": "capabilities whose mean decides the mixture; by default all"}
    )
    floor: float = field(default=0.0, metadata={"help": "share of a source whose influence is not positive"})
    bootstraps: int = field(
        default=DRAWS,
        metadata={"help": "resamplings, for the weights' intervals and their shrinkage; 0: neither"},
    )
    probe_folds: int = field(
        default=8,
        metadata={
            "help": "disjoint parts of each probe, which are resampled as its samples; 0: these are not. For each "
            "checkpoint it takes a training step's time on fold_rows rows of each source and on the probes' rows, and "
            "meanwhile disk for (sources + 2 x probe_folds) gradients and memory for probe_folds of them"
        },
    )
    fold_rows: int = field(default=32, metadata={"help": "rows of each source that the parts of a probe are tried on"})
    shrinkage: Literal["empirical_bayes", "none"] = field(
        default="empirical_bayes",
        metadata={
            "help": "weights shrunk towards the proportional mix by how much of the sources' differences is noise, "
            "all the way if none can be told apart; or those of equation (5), as in the paper"
        },
    )
    source_tokens: dict = field(
        default_factory=dict,
        metadata={
            "help": "YAML only: source -> tokens that there are of it, for the proportional mix; by default counted, "
            "but a stream has no end to count to"
        },
    )
    other_seeds: list[str] = field(
        default_factory=list,
        metadata={
            "help": "output folders of this recipe with models of other seeds and the same sources: their mean "
            "decides the mixture, and the spread between seeds counts too"
        },
    )
    samples_shown: int = field(default=5, metadata={"help": "samples at each end of each list in samples.md"})
    seed: int = field(default=0, metadata={"help": "seed of the random choices"})


def check(args: ScoreInfluenceArguments) -> list[ScoringCheckpoint]:
    """Everything that can be refused before a model is loaded."""
    if not args.probes or not isinstance(args.probes, dict):
        raise ValueError(f"probes is {args.probes!r}: write capability -> list of sources")
    for capability in args.probes:
        if capability in ("row", "source", "tokens", "joint") or not re.fullmatch(r"[\w.-]+", str(capability)):
            raise ValueError(f"probes: {capability!r} cannot be a capability's name: it names a file and a column")
    if not 0 <= args.floor < 1:
        raise ValueError(f"floor={args.floor} must be a share, 0 or more and less than 1")
    check_entries("sources", args.sources)
    for capability, entries in args.probes.items():
        check_entries(f"probes.{capability}", entries)
    for name in (
        "seq_length",
        "rows_per_source",
        "rows_per_probe",
        "curvature_rows",
        "batch_size",
        "rows_per_shard",
        "rank",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be positive")
    for name in ("bootstraps", "probe_folds"):
        if getattr(args, name) < 0 or getattr(args, name) == 1:
            raise ValueError(f"{name}={getattr(args, name)}: nothing varies in one; 2 or more, or 0 to leave it out")
    if args.fold_rows < 1:
        raise ValueError(f"fold_rows={args.fold_rows} must be positive")
    for name, tokens in args.source_tokens.items():
        if isinstance(tokens, bool) or not isinstance(tokens, int | float) or not tokens > 0:
            raise ValueError(f"source_tokens: {name} has {tokens!r}, which is no number of tokens")
    if args.other_seeds and not args.bootstraps:
        raise ValueError("other_seeds are a level of the bootstrap: set bootstraps, as for them")
    for folder in args.other_seeds:
        RhoDraws.load(Path(folder) / BOOTSTRAP)
    if unknown := set(args.mixture_capabilities or ()) - set(args.probes):
        raise ValueError(f"mixture_capabilities has {sorted(unknown)[0]!r}, for which there is no probe")
    checkpoints = read_checkpoints(args.checkpoints, list(args.probes))
    if args.curvature == "adam":
        for checkpoint in checkpoints:
            if not (Path(checkpoint.name) / "optimizer.pt").exists():
                raise ValueError(f"curvature adam: {checkpoint.name} has no optimizer.pt")
    return checkpoints


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


def write_results(
    workspace: Workspace, tables: dict, rows: Dataset, tokenizer, args, settings: dict[str, Any]
) -> tuple[list[SourceInfluence], UncertainWeights | None]:
    """The files of the output folder that a person looks at; returns the summary by source."""
    names, folder = list(args.probes), workspace.folder
    for name in ("mixture.yaml", "heat_map.png", "histograms.png"):  # of an earlier floor, should this one fail
        (folder / name).unlink(missing_ok=True)
    scores = combine(tables, names)
    first = next(iter(tables.values()))
    tokens, sources = torch.from_numpy(first["tokens"].to_numpy().copy()), first["source"].to_pylist()
    columns = {"row": first["row"], "source": first["source"], "tokens": first["tokens"]}
    columns |= {name: scores[:, number].numpy() for number, name in enumerate(names)}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "influence.parquet")
    (folder / "samples.md").write_text(examples(scores, rows, names, tokenizer, args.samples_shown))
    uncertain = resample(workspace, tables, args) if args.bootstraps else None
    shrink = args.shrinkage == "empirical_bayes"
    summary = summarize(
        scores, tokens, sources, names, args.mixture_capabilities, args.floor, uncertain, shrink=shrink
    )
    document = mixture_document(summary, settings, uncertain, shrink)
    (folder / "mixture.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    matrix = torch.tensor([[line.influence[name] for name in names] for line in summary])
    weights = document["weights"]
    plot_influence(matrix, list(weights), names, weights, folder / "heat_map.png", uncertain)
    plot_histograms(histogram_groups(tables, names), names, folder / "histograms.png")
    return summary, uncertain


def resample(workspace: Workspace, tables: dict, args: ScoreInfluenceArguments) -> UncertainWeights:
    """The weights with their intervals; leaves what another seed's mixture needs of this one."""
    names, folds = args.mixture_capabilities or list(args.probes), {}
    if args.probe_folds:
        sources = list(dict.fromkeys(next(iter(tables.values()))["source"].to_pylist()))
        for checkpoint in tables:
            folder = workspace.folder / "scores" / checkpoint.label
            folds[checkpoint] = load_folds(fold_file(folder, args.probe_folds, args.fold_rows), sources)
    run = bootstrap_scores(tables, folds, names, args.bootstraps, args.seed)
    run.save(workspace.folder / BOOTSTRAP)
    runs = [run, *(RhoDraws.load(Path(folder) / BOOTSTRAP) for folder in args.other_seeds)]
    file = workspace.folder / "rows" / "row_counts.json"
    counts = json.loads(file.read_text()) if file.exists() else {}
    first = next(iter(tables.values()))
    mix = proportional_mix(first["source"].to_pylist(), first["tokens"].to_pylist(), counts, args.source_tokens)
    return uncertain_weights(combine_seeds(runs, args.seed), mix, args.floor)


def histogram_groups(tables: dict[ScoringCheckpoint, pyarrow.Table], names: list[str]) -> dict[str, torch.Tensor]:
    """Scores by training step: of each capability its own model's where every capability has one."""
    by_step: dict[str, dict[str, torch.Tensor]] = {}
    for checkpoint, table in sorted(tables.items(), key=lambda item: item[0].step):
        part = by_step.setdefault(f"step {checkpoint.step:,}", {})
        part.update({name: torch.from_numpy(table[name].to_numpy().copy()) for name in checkpoint.capabilities})
    nothing = torch.full((len(next(iter(tables.values()))),), torch.nan, dtype=torch.float64)
    return {step: torch.stack([part.get(name, nothing) for name in names], -1) for step, part in by_step.items()}


def run(args: ScoreInfluenceArguments, checkpoints: list[ScoringCheckpoint], console: Console) -> None:
    state = PartialState()
    settings = dataclasses.asdict(args) | {
        "weights_sha256_or_commit": {checkpoint.label: checkpoint.digest() for checkpoint in checkpoints},
        "mobilellm_hf": mobilellm_hf.__version__,
    }
    for name in NOT_OF_THE_SCORES:
        del settings[name]
    workspace = Workspace(Path(args.output_dir), settings)
    stages = ["rows", *(checkpoint.label for checkpoint in checkpoints), "results"]
    with StageProgress(stages, console) as progress:
        with progress.stage("rows") as stage:
            rows, probes, tokenizer = build_rows(workspace, args, checkpoints, stage)
        tables = {}
        for checkpoint in checkpoints:
            with progress.stage(checkpoint.label) as stage:
                stage.expect(len(rows))
                tables[checkpoint] = score_checkpoint(workspace, checkpoint, rows, probes, args, stage)
        if not state.is_main_process:
            return
        names = list(args.probes)
        with progress.stage("results"):
            data = {"rows_sha256": fingerprint(rows)}
            data |= {f"probe_{name}_sha256": fingerprint(probe) for name, probe in probes.items()}
            choice = {"floor": args.floor, "mixture_capabilities": args.mixture_capabilities or names}
            choice |= {name: getattr(args, name) for name in ("bootstraps", "probe_folds", "fold_rows", "shrinkage")}
            choice |= {"other_seeds": args.other_seeds, "source_tokens": args.source_tokens}
            record = settings | choice | data | {"steps": {c.label: c.step for c in checkpoints}}
            for file in sorted(workspace.folder.glob("directions/*/agreement.txt")):
                record |= {f"rank_agreement_{file.parent.name}": file.read_text()}
            summary, uncertain = write_results(workspace, tables, rows, tokenizer, args, record)
    console.print(influence_table(summary, names))
    if none := [line.source for line in summary if line.joint <= 0]:
        share = f"get the floor, {args.floor:.1%} each" if args.floor else "get nothing by equation (5)"
        console.print(f"Not helpful on average, so they {share}: {', '.join(none)}.", style="yellow")
    if uncertain is not None:
        say_uncertainty(uncertain, args, console)
    console.print(f"{workspace.folder}: mixture.yaml, influence.parquet, two pictures, samples.md", soft_wrap=True)


def say_uncertainty(found: UncertainWeights, args: ScoreInfluenceArguments, console: Console) -> None:
    verdict = found.verdict()
    console.print(verdict[0].upper() + verdict[1:] + ".", markup=False)
    shares = ", ".join(f"{level} {share:.0%} ({found.units[level]})" for level, share in found.by_level.items())
    console.print(f"Of the noise (units resampled): {shares}.", markup=False)
    if args.shrinkage == "none":
        console.print("The weights are those of equation (5) all the same (shrinkage: none).", style="yellow")


def main() -> None:
    parser = TrlParser(dataclass_types=(ScoreInfluenceArguments,), description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", metavar="FILE", help="YAML with these fields; the command line overrides it")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    # Without cpu=True, processes that torchrun starts on a machine without a GPU would not know of each other.
    # They wait for each other as long as the slowest one's shards, or the fit of a curvature, may take.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    main_process = state.is_main_process
    console = Console(quiet=not main_process)
    checked = False
    try:
        args = parser.parse_args_and_config()[0]
        checkpoints = check(args)
        checked = True
        run(args, checkpoints, console)
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on where it stopped", style="bold yellow")
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        # What is wrong with the configuration every process finds; one of them says it.
        if main_process or checked:
            Console().print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
