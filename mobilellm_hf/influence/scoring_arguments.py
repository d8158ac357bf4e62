"""What the YAML file of a scoring run says, and what of it is refused before a model is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mobilellm_hf.data.rows import check_entries
from mobilellm_hf.influence.bootstrap import DRAWS, RhoDraws
from mobilellm_hf.influence.scoring import ScoringCheckpoint, read_checkpoints
from mobilellm_hf.launch import option

BOOTSTRAP = "bootstrap.npz"
# Where a run is, how its work is cut up, and what is made of the scores: other values find the same scores.
NOT_OF_THE_SCORES = (
    "output_dir", "batch_size", "mixture_capabilities", "floor", "samples_shown", "bootstraps", "probe_folds",
    "fold_rows", "shrinkage", "source_tokens", "other_seeds",
)  # fmt: skip


@dataclass
class ScoreInfluenceArguments:
    output_dir: str = option("folder of the scores; one of other settings is refused", "runs/influence")
    checkpoints: list[dict] = option(
        "YAML only: models that score, a list for all capabilities or capability -> list: folders, "
        "'org/name@revision' or {name, revision, step}",
        list,
    )
    sources: list[dict] = option(
        "YAML only: what is scored: {name: CORPUS}, {catalog: SOURCE} or {rows: FOLDER}", list
    )
    probes: dict = option("YAML only: capability -> list of such sources", dict)
    tokenizer: str | None = option("folder or Hub id; by default that of the first checkpoint")
    seq_length: int = option("tokens of a packed row", 2048)
    rows_per_source: int | None = option("score a random choice of each source's rows")
    rows_per_probe: int | None = option("the same of each source of a probe")
    overlap: Literal["error", "drop", "allow"] = option(
        "what to do with rows that share documents with a probe", "error"
    )
    curvature: Literal["identity", "adam", "datainf", "ekfac"] = option(
        "H of equation (2); adam reads the checkpoint's optimizer.pt", "identity"
    )
    curvature_rows: int = option("rows on which datainf and ekfac are fitted", 128)
    datainf_layers: Literal["embedding_and_final", "all"] = option("the paper's layers, or all", "embedding_and_final")
    exclude: list[str] | None = option("patterns of names of parameters that do not count: 'model.embed_tokens.*'")
    rank: int | None = option("approximate the probe directions by matrices of this rank; the agreement is printed")
    dtype: Literal["float32", "bfloat16"] = option("of the weights", "float32")
    batch_size: int = option("rows of a batch, per process", 8)
    rows_per_shard: int = option("rows of a file: what a kill can cost a process", 256)
    mixture_capabilities: list[str] | None = option("capabilities whose mean decides the mixture; by default all")
    floor: float = option("share of a source whose influence is not positive", 0.0)
    bootstraps: int = option("resamplings, for the weights' intervals and their shrinkage; 0: neither", DRAWS)
    probe_folds: int = option(
        "disjoint parts of each probe, which are resampled as its samples; 0: these are not. For each "
        "checkpoint it takes a training step's time on fold_rows rows of each source and on the probes' rows, and "
        "meanwhile disk for (sources + 2 x probe_folds) gradients and memory for probe_folds of them",
        8,
    )
    fold_rows: int = option("rows of each source that the parts of a probe are tried on", 32)
    shrinkage: Literal["empirical_bayes", "none"] = option(
        "weights shrunk towards the proportional mix by how much of the sources' differences is noise, "
        "all the way if none can be told apart; or those of equation (5), as in the paper",
        "empirical_bayes",
    )
    source_tokens: dict = option(
        "YAML only: source -> tokens that there are of it, for the proportional mix; by default counted, "
        "but a stream has no end to count to",
        dict,
    )
    other_seeds: list[str] = option(
        "output folders of this recipe with models of other seeds and the same sources: their mean "
        "decides the mixture, and the spread between seeds counts too",
        list,
    )
    samples_shown: int = option("samples at each end of each list in samples.md", 5)
    seed: int = option("seed of the random choices", 0)


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
        other = RhoDraws.load(Path(folder) / BOOTSTRAP)
        if other.seed != args.seed:
            raise ValueError(
                f"other_seeds: {folder} was resampled by seed={other.seed}, not {args.seed}: give both the same"
            )
    if unknown := set(args.mixture_capabilities or ()) - set(args.probes):
        raise ValueError(f"mixture_capabilities has {sorted(unknown)[0]!r}, for which there is no probe")
    checkpoints = read_checkpoints(args.checkpoints, list(args.probes))
    if args.curvature == "adam":
        for checkpoint in checkpoints:
            if not (Path(checkpoint.name) / "optimizer.pt").exists():
                raise ValueError(f"curvature adam: {checkpoint.name} has no optimizer.pt")
    return checkpoints
