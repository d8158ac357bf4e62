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
    mixture.yaml                        a weight for each source (equation 5), with figures and settings
    histograms.png, heat_map.png        Figure 5, and source x capability
    samples.md                          the most and the least helpful samples, to read
"""

import dataclasses
import re
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

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

import mobilellm_hf
from mobilellm_hf.data.rows import check_entries, load_rows
from mobilellm_hf.influence import Curvature, InfluenceScorer, rank_agreement
from mobilellm_hf.influence.directions import build_directions, make_curvature
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
from mobilellm_hf.progress import Stage, StageProgress
from mobilellm_hf.workspace import Workspace

RANK_CHECK_ROWS = 64


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
        rows = load_rows(args.sources, tokenizer, args.seq_length, config, args.rows_per_source, args.seed)
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
        DatasetDict({"rows": rows, **{f"probe {name}": part for name, part in probes.items()}}).save_to_disk(path)

    with PartialState().main_process_first():
        data = load_from_disk(workspace.once("rows", build))
    probes = {name: data[f"probe {name}"] for name in args.probes}
    sizes = ", ".join(f"{name} {len(part):,}" for name, part in probes.items())
    stage.say(f"{len(data['rows']):,} rows of {len(set(data['rows']['source'][:]))} sources; probes: {sizes}")
    return data["rows"], probes, tokenizer


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
    stage.advance(len(rows) - args.rows_per_shard * len(missing))
    state.wait_for_everyone()  # before anybody writes a shard that another has not looked for yet
    if missing:
        model = load_model(checkpoint, args)

        def curvature() -> Curvature:
            sample = rows.shuffle(seed=args.seed).select(range(min(args.curvature_rows, len(rows))))
            return make_curvature(args.curvature, model, checkpoint.name, sample, args.batch_size, args.datainf_layers)

        own = {name: probes[name] for name in checkpoint.capabilities}
        stage.say("gradients of the probes")
        directions = build_directions(scratch, model, own, curvature, args.exclude or (), args.batch_size)
        stage.say("")

        scorer = exact = InfluenceScorer.from_directions(model, directions, checkpoint.capabilities)
        if args.rank:
            approximate = low_rank_directions(directions, args.rank)
            scorer = InfluenceScorer.from_directions(model, approximate, checkpoint.capabilities)
            if state.is_main_process:
                agreement = compare_rank(scorer, exact, rows, args)
                (scratch / "agreement.txt").write_text(agreement)
                stage.say(agreement)
        own = missing[state.process_index :: state.num_processes]
        score_shards(
            scorer, rows, folder, own, args.rows_per_shard, args.batch_size,
            lambda count: stage.advance(count * state.num_processes),
        )  # fmt: skip
        state.wait_for_everyone()
    if state.is_main_process:
        table = read_shards(folder, len(rows), args.rows_per_shard)
        for file in scratch.glob("*.safetensors"):  # of use only while scoring, and large
            file.unlink()
    state.wait_for_everyone()
    return table if state.is_main_process else None


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
) -> list[SourceInfluence]:
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
    summary = summarize(scores, tokens, sources, names, args.mixture_capabilities, args.floor)
    document = mixture_document(summary, settings)
    (folder / "mixture.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    matrix = torch.tensor([[line.influence[name] for name in names] for line in summary])
    weights = document["weights"]
    plot_influence(matrix, list(weights), names, weights, folder / "heat_map.png")
    plot_histograms(histogram_groups(tables, names), names, folder / "histograms.png")
    return summary


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
    # Where it is and how the work is cut up among batches decides nothing.
    for name in ("output_dir", "batch_size", "mixture_capabilities", "floor", "samples_shown"):
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
            record = settings | choice | data | {"steps": {c.label: c.step for c in checkpoints}}
            for file in sorted(workspace.folder.glob("directions/*/agreement.txt")):
                record |= {f"rank_agreement_{file.parent.name}": file.read_text()}
            summary = write_results(workspace, tables, rows, tokenizer, args, record)
    console.print(influence_table(summary, names))
    if none := [line.source for line in summary if line.joint <= 0]:
        share = f"get the floor, {args.floor:.1%} each" if args.floor else "get nothing of the mixture"
        console.print(f"Not helpful on average, so they {share}: {', '.join(none)}.", style="yellow")
    console.print(f"{workspace.folder}: mixture.yaml, influence.parquet, two pictures, samples.md", soft_wrap=True)


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
