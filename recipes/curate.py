# /// script
# dependencies = ["mobilellm_hf[plots,curation]"]
# ///
"""Curates corpora to small sets that stand for them, and composes capability probes of these (section 2.1.1).

    accelerate launch recipes/curate.py --config recipes/tiny/curate.yaml
    accelerate launch recipes/curate.py --config recipes/paper/curate.yaml --dry_run 64
    accelerate launch --num_processes 8 recipes/curate.py --config recipes/paper/curate.yaml

Quality classifier, Ask-LLM, Ask-LLM with the domain's prompt, benchmarks, deduplication, at most 10,000 a source. Any
number of processes shares the work (on CPUs `torchrun --nproc_per_node 2 recipes/...`); what a killed run has scored
stays; the same command goes on. `--dry_run N` scores N documents of each source and estimates the hours of all. The
output folder gets

    1-text/ ... decisions.parquet       a line a document that reached the step: score, kept or not, why not
    representative/SOURCE.parquet       the documents that stay, with their scores
    probes/CAPABILITY.parquet           the probe sets: unions of these
    funnel.json, funnel.png             how many documents each step kept, per source
    shared_with_training.json           documents of `training` that a probe holds
    samples.md                          documents that each step kept and dropped, to read
"""

import dataclasses
import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from mobilellm_hf.curation.arguments import CurateArguments
from mobilellm_hf.curation.corpus import open_documents, sample_documents
from mobilellm_hf.curation.estimate import cost_table, estimate
from mobilellm_hf.curation.funnel import (
    funnel,
    funnel_table,
    lost_sources,
    plot_funnel,
    reasons_table,
    truncated_documents,
    write_samples,
)
from mobilellm_hf.curation.probes import ProbeReport, compose_probes, shared_with_training
from mobilellm_hf.curation.scoring import Rate, sources_of
from mobilellm_hf.curation.stages import Curation, CurationStage, curate
from mobilellm_hf.launch import launch
from mobilellm_hf.progress import Stage, StageProgress
from mobilellm_hf.workspace import write_whole


class Display:
    """Shows each step of a curation as a stage, and at its end how many documents it kept."""

    def __init__(self, progress: StageProgress):
        self._progress, self._open = progress, ExitStack()
        self._stage: Stage | None = None
        self._reached = 0

    def __call__(self, stage: CurationStage, documents: int) -> Rate:
        self.close(documents)
        self._stage, self._reached = self._open.enter_context(self._progress.stage(stage.name)), documents
        self._stage.expect(documents)
        return Rate(self._stage.advance, self._stage.say)

    def close(self, kept: int) -> None:
        if self._stage is not None:
            speed = f", {self._stage.note}" if self._stage.note else ""
            self._stage.say(f"{kept:,} of {self._reached:,} kept{speed}")
        self._open.close()


def run(args: CurateArguments, console: Console) -> None:
    args.check()
    if args.dry_run:
        dry_run(args, console)
        return
    folder, main = Path(args.output_dir), PartialState().is_main_process
    args.check_models()
    with StageProgress(["documents"], console) as progress, progress.stage("documents") as stage:
        rate = Rate(stage.advance, stage.say)
        documents = open_documents(args.sources, folder / "documents", rate, args.max_documents, args.seed)
        sources = sources_of(documents)[1]
        stage.say(f"{len(documents):,} of {len(sources)} sources")
    steps = args.stages(sources)
    training = None
    if args.training:  # here, where all processes are
        training = open_documents(args.training, folder / "training", Rate(), args.max_documents, args.seed)
    with StageProgress([*(step.name for step in steps), "results"], console) as progress:
        display = Display(progress)
        result = curate(documents, steps, folder, display)
        display.close(len(result.documents))
        with progress.stage("results"):
            if main:
                reports = write_results(args, documents, result, sources, training, folder, console)
    if main:
        for report in reports:
            console.print(report)
        console.print(f"{folder}: representative/, probes/, funnel.png, samples.md", soft_wrap=True)


def write_results(
    args: CurateArguments,
    documents: Dataset,
    result: Curation,
    sources: list[str],
    training: Dataset | None,
    folder: Path,
    console: Console,
) -> list[Table]:
    """The files that a person or another recipe reads; returns tables about the probes, to be printed."""
    steps = funnel(result.reports, sources)
    console.print(funnel_table(steps))
    console.print(reasons_table(steps))
    for line in truncated_documents(steps):
        console.print(line, style="dim", markup=False, soft_wrap=True)
    write_whole(folder / "funnel.json", lambda path: path.write_text(json.dumps(list(map(dataclasses.asdict, steps)))))
    write_whole(folder / "funnel.png", lambda path: plot_funnel(steps, path, format="png"))
    write_samples(documents, result.reports, folder / "samples.md", args.samples_shown, args.seed)
    kept = with_scores(result)
    codes, names = sources_of(kept)
    representative = {name: kept.select(np.flatnonzero(codes == number)) for number, name in enumerate(names)}
    write_parts(folder / "representative", representative)
    for line in lost_sources(result.reports, steps):
        console.print(line, style="yellow", markup=False, soft_wrap=True)
    probes, report = compose_probes(representative, args.composition(sources), missing="skip")
    write_parts(folder / "probes", probes)
    tables = [probe_table(report)]
    if training is not None:
        tables.append(training_table(args, training, probes, folder))
    return tables


def write_parts(folder: Path, parts: dict[str, Dataset]) -> None:
    """A file a part, and no other."""
    for file in folder.glob("*.parquet"):  # of an earlier composition
        if file.stem not in parts:
            file.unlink()
    for name, part in parts.items():
        write_whole(folder / f"{name}.parquet", lambda path, part=part: part.to_parquet(path))


def with_scores(result: Curation) -> Dataset:
    """The documents that stay with their number, and the score of each step that gave one."""
    kept = result.documents.flatten_indices().add_column("document", result.numbers)
    for report in result.reports:
        table = report.table()
        if "score" in table.column_names:
            places = np.searchsorted(table["document"].to_numpy(), result.numbers)
            kept = kept.add_column(report.name.replace("-", "_"), table["score"].to_numpy()[places])
    return kept


def probe_table(report: ProbeReport) -> Table:
    table = Table("probe", "documents", "characters", "of each source", title="Probe sets")
    for capability, counts in report.documents.items():
        sizes = sum(report.characters[capability].values())
        each = ", ".join(f"{source} {count:,}" for source, count in counts.items())
        if missing := report.missing[capability]:
            each += f"; nothing of {', '.join(missing)}"
        table.add_row(capability, f"{sum(counts.values()):,}", f"{sizes:,}", each)
    return table


def training_table(args: CurateArguments, training: Dataset, probes: dict[str, Dataset], folder: Path) -> Table:
    """What the training corpora and the probe sets share."""
    shared = shared_with_training(training, probes, num_proc=args.num_proc)
    found = json.dumps({"documents_read": len(training), "found": shared.counts}, indent=2)
    write_whole(folder / "shared_with_training.json", lambda path: path.write_text(found))
    remedy = f"exclude: {folder / 'probes'} in a source of a recipe leaves them out"
    table = Table(
        "probe", "documents", "found in training", title="What training shares with the probes", caption=remedy
    )
    for capability, count in shared.counts.items():
        table.add_row(capability, f"{len(probes[capability]):,}", f"{count:,} of {len(training):,}")
    return table


def dry_run(args: CurateArguments, console: Console) -> None:
    """Estimates the cost from a sample, in one process."""
    if not PartialState().is_main_process:
        return
    sample, totals = sample_documents(args.sources, args.dry_run, args.max_documents, args.seed)
    device = PartialState().device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} process"
    steps = [step for step in args.stages(list(totals)) if hasattr(step, "score")]
    with StageProgress([step.name for step in steps], console) as progress:
        costs = []
        for step in steps:
            with progress.stage(step.name) as stage:
                stage.expect(len(sample))
                costs.append(estimate(step, sample, totals, stage.advance))
                totals = costs[-1].left
    console.print(cost_table(costs, name))


if __name__ == "__main__":
    launch(__doc__, (CurateArguments,), run)
