"""A whole audit: rows, the weights of rivals, the arms, and what follows from them.

    run_audit(args, training, Console(), OwnProcess(0, 1))

`recipes/audit.py` does it from a YAML file. Every stage goes on where an earlier run stopped, and any number of
processes may be at it together.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from mobilellm_hf.audit.arguments import (
    DRAWN,
    FINDERS,
    GROUPS,
    AuditArguments,
    AuditTrainingArguments,
    check_names,
    learning_rates,
    read_weights,
)
from mobilellm_hf.audit.arms import Arm, arm_runs, arm_steps, build_arms, load_weights, training_notes
from mobilellm_hf.audit.cost import estimate
from mobilellm_hf.audit.outcomes import Comparison, Outcomes, ProbeSize, compare, probe_size, read_outcomes
from mobilellm_hf.audit.plots import plot_forest
from mobilellm_hf.audit.proxy import MixtureRun, Proxy, proportional, tokens_per_source, train_mixtures
from mobilellm_hf.audit.rejection import (
    REJECTION,
    RejectionArm,
    load_scores,
    rejection_arms,
    rejection_runs,
    row_losses,
)
from mobilellm_hf.audit.report import comparison_table, write_results
from mobilellm_hf.audit.rivals.common import RunsProgress
from mobilellm_hf.audit.settings import ARM_FIELDS, UNSHARED, settings_of, teacher_digest
from mobilellm_hf.audit.verdict import MIXTURE, Verdict, verdict
from mobilellm_hf.data.rows import expand_entry, load_rows
from mobilellm_hf.independent import OwnProcess
from mobilellm_hf.influence.leave_one_out import BLOCK_SIZE, finished
from mobilellm_hf.influence.leave_one_out_rows import prepare_rows
from mobilellm_hf.influence.overlap import refuse_overlap
from mobilellm_hf.modeling import MobileLLMConfig
from mobilellm_hf.progress import Stage, StageProgress
from mobilellm_hf.training.distillation import DistillationCallback
from mobilellm_hf.training.stage import build_model
from mobilellm_hf.training.stage_data import load_tokenizer_and_config
from mobilellm_hf.workspace import Workspace, write_whole

# Of the models that rivals train, none of which is to start as an arm does.
RIVAL_SEED = 1_000_000


def new_model(args: AuditArguments, config: MobileLLMConfig, seed: int) -> PreTrainedModel:
    return build_model(args.stage(), copy.deepcopy(config), seed)  # of which the Trainer changes a field


def refuse_shared_probes(args: AuditArguments, tokenizer: PreTrainedTokenizerBase, config: MobileLLMConfig) -> None:
    """Raises a ValueError that names the final probe or unscored domain with rows of a tuning probe.

    Methods may have been tuned on any of its rows, so all of them are looked at; of streams the first.
    """
    load = partial(load_rows, tokenizer=tokenizer, seq_length=args.seq_length, config=config)
    tuning = {}
    for name, entries in args.tuning_probes.items():
        streams = [entry for entry in entries if any(given.get("streaming") for given in expand_entry(entry))]
        if still := [entry for entry in entries if entry not in streams]:
            tuning[f"tuning_probes.{name}"] = load(still)
        if streams:
            tuning[f"tuning_probes.{name}, streamed"] = load(streams, rows_per_source=args.rows_per_probe)
    for field in ("final_probes", "unscored_domains"):
        for name, entries in getattr(args, field).items():
            decisive = load(entries, rows_per_source=args.rows_per_probe)
            remedy = "Take other text: what methods were tuned on decides nothing."
            refuse_overlap(decisive, tuning, remedy, what=f"{field}.{name}")


def make_rows(
    args: AuditArguments, training: AuditTrainingArguments, workspace: Workspace, stage: Stage
) -> tuple[Proxy, dict[str, Dataset], PreTrainedTokenizerBase]:
    """The proxy, and the final probes and unscored domains. Of a stream as many rows are kept as a model reads.

    The proxy's own counts are of the rows at hand; what is proportional to tokens follows `source_tokens`, too.
    """
    tokenizer, config = load_tokenizer_and_config(args.stage())
    if not (workspace.folder / "rows").exists():
        refuse_shared_probes(args, tokenizer, config)
    longest = arm_steps(Arm("longest", "baseline", {}), training.max_steps, args.curation_share)
    draws = longest * training.global_batch()
    sources, probes = prepare_rows(
        workspace, args.sources, args.probes(), tokenizer, args.seq_length, config, draws,
        rows_per_stream=draws + BLOCK_SIZE, rows_per_probe=args.rows_per_probe, overlap=args.overlap,
        shuffle_buffer=args.shuffle_buffer, check=lambda found: check_names(args, list(found)), stage=stage,
    )  # fmt: skip
    of_group = {
        group: {name.removeprefix(f"{group} "): rows for name, rows in probes.items() if name.startswith(f"{group} ")}
        for group in GROUPS
    }
    proxy = Proxy(
        partial(new_model, args, config), sources, of_group["tuning"], training, tokens_per_source(sources),
        proportional(sources, args.source_tokens), args.max_epochs,
    )  # fmt: skip
    return proxy, of_group["final"] | of_group["unscored"], tokenizer


def find_weights(args: AuditArguments, proxy: Proxy, folder: Path, stage: Stage) -> list[Arm]:
    """The arms whose weights must be found first, each charged what that cost."""
    arms = []
    model_tokens = proxy.training.max_steps * proxy.training.global_batch() * args.seq_length
    for name in (name for name in args.arms if name in FINDERS):
        trains = {} if name == "similarity" else {"folder": folder / name, "seed": RIVAL_SEED, "stage": stage}
        found = FINDERS[name](proxy, **trains)
        curation = found.tokens / model_tokens * args.proxy_share
        kind = "placebo" if name == "similarity" else "rival"
        details = dict(found.details) | {"tokens": found.tokens}
        arms.append(Arm(name, kind, dict.fromkeys(args.seeds, found.weights), curation, details))
    stage.say(", ".join(f"{arm.name} {arm.curation:.1%}" for arm in arms) or "none to be found")
    return arms


def make_arms(args: AuditArguments, proxy: Proxy, folder: Path, stage: Stage) -> list[Arm]:
    """All arms; what can be refused of them is refused before rivals train in `folder`."""
    audited, others = read_weights(args, list(proxy.sources))
    of_tools = [
        Arm(name, "rival", dict.fromkeys(args.seeds, weights), args.curation_share) for name, weights in others.items()
    ]
    drawn = [name for name in args.arms if name in DRAWN]
    build = partial(build_arms, audited, proxy.proportional, args.seeds, drawn)
    arm_runs(proxy, build(of_tools, args.curation_share), args.seeds, [1.0], args.curation_share)
    return build([*find_weights(args, proxy, folder, stage), *of_tools], args.curation_share)


def train_arms(
    proxy: Proxy,
    probes: Mapping[str, Dataset],
    runs: Mapping[tuple[str, float, int], MixtureRun],
    folder: Path,
    stage: Stage,
    teacher: str | None = None,
) -> None:
    """What is missing of the runs, with a display; by a teacher, if there is one."""
    missing = list(runs.values())
    before = finished(missing, folder)
    progress = RunsProgress(stage, proxy, missing, folder)

    def callbacks(run: MixtureRun) -> list[TrainerCallback]:
        return [*([] if teacher is None else [DistillationCallback(teacher)]), *progress.callbacks(run)]

    train_mixtures(proxy, missing, folder, probes=probes, callbacks=callbacks, on_wait=progress.on_wait)
    stage.say(f"{len(runs)} models" + f", {before} of them finished in an earlier run" * bool(before))


def run_audit(args: AuditArguments, training: AuditTrainingArguments, console: Console, process: OwnProcess) -> None:
    """Of a mixture; of a rejection, if there are `scores`."""
    tokenizer, config = load_tokenizer_and_config(args.stage())
    if process.number == 0:
        estimate(args, training, partial(new_model, args, config), console, process)
    if args.dry_run:
        return
    workspace = Workspace(Path(training.output_dir), settings_of(args, training, tokenizer))
    work = audit_mixture if args.scores is None else audit_rejection
    work(args, training, workspace, console, process)


def audit_mixture(
    args: AuditArguments,
    training: AuditTrainingArguments,
    workspace: Workspace,
    console: Console,
    process: OwnProcess,
) -> None:
    with StageProgress(["rows", "weights", "models", "results"], console) as progress:
        with progress.stage("rows") as stage:
            proxy, probes, tokenizer = make_rows(args, training, workspace, stage)
        with progress.stage("weights") as stage:
            arms = make_arms(args, proxy, workspace.folder / "rivals", stage)
        with progress.stage("models") as stage:
            rates = learning_rates(args, training)
            runs = arm_runs(proxy, arms, args.seeds, rates, args.curation_share)
            train_arms(proxy, probes, runs, workspace.folder / "arms", stage)
        if process.number:
            return
        with progress.stage("results"):
            sizes = {name: probe_size(rows, tokenizer) for name, rows in probes.items()}
            found = conclude(args, proxy, arms, runs, workspace, "arms", sizes, MIXTURE)
    say(*found, console)
    console.print(f"{workspace.folder}: results.json, forest.png", soft_wrap=True)


def audit_rejection(
    args: AuditArguments,
    training: AuditTrainingArguments,
    workspace: Workspace,
    console: Console,
    process: OwnProcess,
) -> None:
    """With plain cross-entropy, and then, given a teacher, with distillation; a folder of results each."""
    objectives = {"rejection": None}
    if args.teacher is not None:
        objectives[f"rejection-by-{teacher_digest(args.teacher)}"] = args.teacher
    with StageProgress(["rows", "scores", "models", "results"], console) as progress:
        with progress.stage("rows") as stage:
            proxy, probes, tokenizer = make_rows(args, training, workspace, stage)
        with progress.stage("scores") as stage:
            arms = make_rejection_arms(args, proxy)
            runs = rejection_runs(proxy, arms, args.seeds, learning_rates(args, training))
            stage.say(", ".join(arm.name for arm in arms))
        with progress.stage("models") as stage:
            for folder, teacher in objectives.items():
                train_arms(proxy, probes, runs, workspace.folder / folder, stage, teacher)
        if process.number:
            return
        with progress.stage("results"):
            sizes = {name: probe_size(rows, tokenizer) for name, rows in probes.items()}
            found = {
                folder: conclude(args, proxy, arms, runs, workspace, folder, sizes, REJECTION) for folder in objectives
            }
    for (folder, teacher), parts in zip(objectives.items(), found.values(), strict=True):
        console.print("Plain cross-entropy" if teacher is None else f"Distilled from {teacher}", style="bold")
        say(*parts, console)
        console.print(f"{workspace.folder / folder}: results.json, forest.png", soft_wrap=True)


def make_rejection_arms(args: AuditArguments, proxy: Proxy) -> list[RejectionArm]:
    weights = proxy.proportional if args.mixture is None else load_weights(args.mixture, list(proxy.sources))
    scores = load_scores(args.scores, proxy.sources, args.score_rule)
    other = None if args.other_scores is None else load_scores(args.other_scores, proxy.sources, args.score_rule)
    losses = None
    if args.loss_model is not None:
        model = AutoModelForCausalLM.from_pretrained(args.loss_model)
        losses = row_losses(model.to(PartialState().device), proxy.sources)
    return rejection_arms(proxy, dict(weights), scores, args.seeds, losses, other, args.curation_share)


def conclude(
    args: AuditArguments,
    proxy: Proxy,
    arms: Sequence[Arm],
    runs: Mapping[tuple[str, float, int], MixtureRun],
    workspace: Workspace,
    name: str,
    sizes: Mapping[str, ProbeSize],
    subject: str,
) -> tuple[Outcomes, list[Comparison], Verdict]:
    """Compares what is in a subfolder; writes results.json and forest.png there, of a mixture beside its arms.

    They are of the latest audit; in `results/` beside them those of every mixture, or of all scores, stay.
    """
    outcomes, spent = read_outcomes(
        proxy, arms, runs, workspace.folder / name, sizes, list(args.final_probes), list(args.unscored_domains)
    )
    comparisons = compare(outcomes, args.alpha)
    conclusion = verdict(outcomes, comparisons, training_notes(proxy, arms, runs, spent), subject)
    settings = workspace.settings | {field: getattr(args, field) for field in (*ARM_FIELDS, *UNSHARED)}
    folder = workspace.folder if subject == MIXTURE else workspace.folder / name
    own = folder / "results" / results_name(args, arms[0], runs)
    write_results(own, outcomes, comparisons, conclusion, settings, spent)
    save_picture(own / "forest.png", partial(plot_forest, outcomes, comparisons))
    for file in ("results.json", "forest.png"):
        write_whole(folder / file, partial(shutil.copyfile, own / file))
    return outcomes, comparisons, conclusion


def results_name(args: AuditArguments, audited: Arm, runs: Mapping[tuple[str, float, int], MixtureRun]) -> str:
    """The file that is audited, and the digest that the names of its arms have, of weights, steps and kept rows."""
    name = next(run.name for (arm, _, _), run in runs.items() if arm == audited.name)
    digest = name.removeprefix(f"{audited.name}-").partition("-")[0]
    return f"{Path(args.mixture if args.scores is None else args.scores).stem}-{digest}"


def say(outcomes: Outcomes, comparisons: Sequence[Comparison], conclusion: Verdict, console: Console) -> None:
    console.print(comparison_table(outcomes, comparisons))
    console.print(conclusion.headline, style="bold", soft_wrap=True)
    for line in conclusion.lines:
        console.print(f"- {line}", soft_wrap=True, highlight=False, markup=False)


def save_picture(file: Path, plot: Callable[[Path], object]) -> None:
    """Whole or absent. A picture's format follows from the end of its name, which an unfinished file's has not."""
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        plot(Path(scratch) / file.name)
        os.replace(Path(scratch) / file.name, file)
