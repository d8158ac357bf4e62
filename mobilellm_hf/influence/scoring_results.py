"""The files of a scoring run that a person looks at: the mixture with its intervals, pictures, samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml
from datasets import Dataset
from rich.console import Console

from mobilellm_hf.influence.bootstrap import RhoDraws, bootstrap_scores, combine_seeds
from mobilellm_hf.influence.folds import fold_file, load_folds
from mobilellm_hf.influence.plots import plot_histograms, plot_influence
from mobilellm_hf.influence.report import SourceInfluence, examples, influence_table, mixture_document, summarize
from mobilellm_hf.influence.scoring import ScoringCheckpoint, combine
from mobilellm_hf.influence.scoring_arguments import BOOTSTRAP, ScoreInfluenceArguments
from mobilellm_hf.influence.uncertainty import UncertainWeights, proportional_mix, uncertain_weights
from mobilellm_hf.workspace import Workspace


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
    uncertain = resample(workspace, tables, args, settings) if args.bootstraps else None
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


def resample(
    workspace: Workspace, tables: dict, args: ScoreInfluenceArguments, settings: dict[str, Any]
) -> UncertainWeights:
    """The weights with their intervals; leaves what another seed's mixture needs of this one."""
    names, folds = args.mixture_capabilities or list(args.probes), {}
    if args.probe_folds:
        sources = list(dict.fromkeys(next(iter(tables.values()))["source"].to_pylist()))
        for checkpoint in tables:
            folder = workspace.folder / "scores" / checkpoint.label
            folds[checkpoint] = load_folds(fold_file(folder, args.probe_folds, args.fold_rows), sources)
    data = json.dumps({name: value for name, value in settings.items() if name.endswith("_sha256")})
    run = bootstrap_scores(tables, folds, names, args.bootstraps, args.seed, data)
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


def say_results(
    summary: list[SourceInfluence],
    uncertain: UncertainWeights | None,
    args: ScoreInfluenceArguments,
    folder: Path,
    console: Console,
) -> None:
    console.print(influence_table(summary, list(args.probes)))
    if none := [line.source for line in summary if line.joint <= 0]:
        share = f"get the floor, {args.floor:.1%} each" if args.floor else "get nothing by equation (5)"
        console.print(f"Not helpful on average, so they {share}: {', '.join(none)}.", style="yellow")
    if uncertain is not None:
        say_uncertainty(uncertain, args, console)
    console.print(f"{folder}: mixture.yaml, influence.parquet, two pictures, samples.md", soft_wrap=True)


def say_uncertainty(found: UncertainWeights, args: ScoreInfluenceArguments, console: Console) -> None:
    verdict = found.verdict()
    console.print(verdict[0].upper() + verdict[1:] + ".", markup=False)
    shares = ", ".join(f"{level} {share:.0%} ({found.units[level]})" for level, share in found.by_level.items())
    console.print(f"Of the noise (units resampled): {shares}.", markup=False)
    if args.shrinkage == "none":
        console.print("The weights are those of equation (5) all the same (shrinkage: none).", style="yellow")
