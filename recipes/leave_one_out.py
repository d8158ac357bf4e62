# /// script
# dependencies = ["mobilellm_hf[plots]"]
# ///
"""Trains one model on all sources and one without each, and says what is lost (equation 1, Figure 3).

    python recipes/leave_one_out.py --config recipes/tiny/leave_one_out.yaml --dry_run
    accelerate launch recipes/leave_one_out.py --config recipes/tiny/leave_one_out.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/leave_one_out.py --config mine.yaml

`--dry_run` measures the speed and says how long it would take. With several processes (on CPUs `torchrun
--nproc_per_node 2 recipes/...`) each trains whole models on a device of its own, whichever are not done. A killed run
goes on with the same command, and finished models stay: more `seeds`, or more sources in `only`, cost only their own.
The output folder gets

    rows/                               tokenized rows of the sources and the probes
    runs/all-seed0/result.json          NLL on every probe through training, of the model of all sources
    runs/no-SOURCE-seed0/result.json    of the one without SOURCE; runs/*/checkpoint-N too, with keep_models
    leave_one_out.parquet               NLL with and without each source, by seed; equation (1) is their difference
    leave_one_out.yaml                  its mean over seeds, the 95% interval, and the settings
    heat_map.png, curves.png            Figure 3, and NLL over training tokens
"""

import copy
import dataclasses
import importlib.util
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import mobilellm_hf  # isort: skip  # first: it keeps torchao quiet, which transformers imports

import torch
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel, TrainerCallback

from mobilellm_hf.data.rows import check_entries
from mobilellm_hf.independent import OwnProcess, check_new_models, check_whole_models, launch_each
from mobilellm_hf.influence.leave_one_out import (
    LeaveOneOutRun,
    check_no_repeats,
    effects,
    finished,
    leave_one_out_runs,
    read_results,
    train_missing,
    train_run,
)
from mobilellm_hf.influence.leave_one_out_cost import TIMED_STEPS, WARM_UP_STEPS, duration, measure_speed
from mobilellm_hf.influence.leave_one_out_plots import effect_table, write_results
from mobilellm_hf.influence.leave_one_out_rows import declared_sources, prepare_rows
from mobilellm_hf.launch import option
from mobilellm_hf.modeling import MobileLLMConfig
from mobilellm_hf.modeling.configuration_mobilellm import MODEL_SIZES
from mobilellm_hf.progress import Stage, StageProgress
from mobilellm_hf.training.arguments import StageArguments, StageTrainingArguments
from mobilellm_hf.training.stage import DECISIVE, build_model
from mobilellm_hf.training.stage_data import load_tokenizer_and_config
from mobilellm_hf.workspace import Workspace


@dataclass
class LeaveOneOutArguments:
    sources: list[dict] = option(
        "YAML only: what is read, in equal shares: {name: CORPUS}, {catalog: SOURCE} or {rows: FOLDER}", list
    )
    only: list[str] | None = option("names of the sources that are left out in turn; by default each")
    seeds: list[int] = option(
        "of weights and order; each trains all models once, and several give intervals", lambda: [0]
    )
    probes: dict = option("YAML only: capability -> list of sources whose NLL is traced", dict)
    rows_per_probe: int | None = option("a random choice of so many rows of each of a probe's sources", 256)
    overlap: Literal["error", "drop", "allow"] = option(
        "what to do with rows that share documents with a probe", "error"
    )
    monitor_every: int | None = option("steps between two points of the curves; by default a twentieth")
    model_size: str | None = option(f"shape of the models: {', '.join(MODEL_SIZES)}")
    model_config: dict = option("YAML only: fields of MobileLLMConfig, instead of model_size or beside it", dict)
    attn_implementation: str | None = option("sdpa, flash_attention_2, ...; by default transformers' choice")
    tokenizer: str | None = option("folder or Hub id")
    seq_length: int = option("tokens of a packed row", 2048)
    shuffle_buffer: int = option("documents among which a stream chooses the next", 10_000)
    keep_models: bool = option("keep the last checkpoint of every model", False)
    dry_run: bool = option("measure the speed, say how long it would take, and train nothing", False)

    def stage(self) -> StageArguments:
        """What the functions of a training stage take."""
        names = ("model_size", "model_config", "attn_implementation", "tokenizer", "seq_length")
        return StageArguments(**{name: getattr(self, name) for name in names})


@dataclass
class LeaveOneOutTrainingArguments(StageTrainingArguments):
    output_dir: str = option("folder of the runs; one of other settings is refused", "runs/leave_one_out")

    def __post_init__(self):
        super().__post_init__()
        if self.seed != type(self).seed:
            raise ValueError(f"seed={self.seed}: leave one out takes seeds, a list")


def check(args: LeaveOneOutArguments, training: LeaveOneOutTrainingArguments) -> None:
    """Raises a ValueError that names the field for what can be refused before anything is loaded."""
    check_new_models(args.model_size, args.model_config, args.tokenizer)
    check_entries("sources", args.sources)
    if not args.probes or not isinstance(args.probes, dict):
        raise ValueError(f"probes is {args.probes!r}: write capability -> list of sources")
    for capability, entries in args.probes.items():
        check_entries(f"probes.{capability}", entries)
    for name in ("seq_length", "rows_per_probe", "monitor_every", "shuffle_buffer"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be positive")
    names = declared_sources(args.sources)
    # Where text must be read for the names, seeds alone can be checked.
    leave_one_out_runs(["one", "other"] if names is None else names, args.seeds, None if names is None else args.only)
    check_whole_models(training)
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the pictures at the end need matplotlib: pip install 'mobilellm_hf[plots]'")


def settings_of(args: LeaveOneOutArguments, training: LeaveOneOutTrainingArguments) -> dict[str, Any]:
    """What decides a model's curve; which models there are does not, so that there can be more of them later."""
    settings = dataclasses.asdict(args) | {name: getattr(training, name) for name in DECISIVE}
    settings["mixed_precision"] = getattr(training, "mixed_precision", None)  # which accelerate's file can say, too
    settings |= {"rows_per_step": training.global_batch(), "mobilellm_hf": mobilellm_hf.__version__}
    for name in ("seed", "seeds", "only", "keep_models", "dry_run", "attn_implementation"):
        del settings[name]
    return settings


def new_model(args: LeaveOneOutArguments, config: MobileLLMConfig, seed: int) -> PreTrainedModel:
    return build_model(args.stage(), copy.deepcopy(config), seed)  # of which the Trainer changes a field


class RunProgress(TrainerCallback):
    """Moves the one bar of all models, those that other processes have finished included."""

    def __init__(self, stage: Stage, runs: list[LeaveOneOutRun], run: LeaveOneOutRun, folder: Path, steps: int):
        self.stage, self.runs, self.folder, self.steps = stage, runs, folder, steps
        self.label = f"model {runs.index(run) + 1} of {len(runs)}: {run}"

    def on_train_begin(self, args, state, control, **kwargs):
        self.finished = finished(self.runs, self.folder)
        self.stage.reach(self.finished * self.steps + state.global_step)
        self.stage.say(self.label)

    def on_step_end(self, args, state, control, **kwargs):
        self.stage.reach(self.finished * self.steps + state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.finished = finished(self.runs, self.folder)
        if logs and "loss" in logs:
            self.stage.say(f"{self.label}, loss {logs['loss']:.3f}")


def train_all(
    runs: list[LeaveOneOutRun],
    folder: Path,
    args: LeaveOneOutArguments,
    training: LeaveOneOutTrainingArguments,
    config: MobileLLMConfig,
    sources: dict[str, Dataset],
    probes: dict[str, Dataset],
    stage: Stage,
) -> None:
    stage.expect(len(runs) * training.max_steps)
    if before := finished(runs, folder):
        stage.say(f"{before} models finished in an earlier run")

    def train(run: LeaveOneOutRun) -> None:
        train_run(
            run, partial(new_model, args, config), sources, probes, training, folder,
            monitor_every=args.monitor_every, keep_models=args.keep_models,
            callbacks=[RunProgress(stage, runs, run, folder, training.max_steps)],
        )  # fmt: skip

    def wait(others: list[LeaveOneOutRun]) -> None:
        stage.reach((len(runs) - len(others)) * training.max_steps)
        stage.say(f"waiting for {len(others)} models of other processes, first {others[0]}")

    train_missing(runs, folder, train, wait)
    stage.say(f"{len(runs)} models, {before} of them finished in an earlier run" if before else f"{len(runs)} models")


def estimate(
    args: LeaveOneOutArguments, training: LeaveOneOutTrainingArguments, console: Console, processes: int
) -> None:
    """Prints how long all models would take on this device."""
    _, config = load_tokenizer_and_config(args.stage())
    names = declared_sources(args.sources)
    sources = names or [f"source {number}" for number in range(len(args.sources))]
    runs = leave_one_out_runs(sources, args.seeds, args.only if names else None)
    speed = measure_speed(partial(new_model, args, config), training, args.seq_length)
    tokens = training.global_batch() * args.seq_length
    every = args.monitor_every or max(1, training.max_steps // 20)
    points = 1 + -(-training.max_steps // every)
    probe_rows = sum(len(declared_sources(part) or part) for part in args.probes.values()) * (args.rows_per_probe or 0)
    steps_take, probes_take = speed.step * training.max_steps, speed.probe_row * points * probe_rows
    total = len(runs) * (steps_take + probes_take)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, threads: {torch.get_num_threads()}"
    measured = f"at most {probe_rows:,} rows" if args.rows_per_probe else "rows that are not counted here"
    guess = "" if names else ", if each entry is one"
    shared = f", or {duration(total / processes)} on {processes} that do not slow each other down" * (processes > 1)
    for line in (
        f"{len(runs)} models ({len(sources)} sources{guess}; seeds: {len(args.seeds)}) of "
        f"{training.max_steps * tokens / 1e6:,.1f} M training tokens",
        f"{device}: {tokens / speed.step:,.0f} tokens a second, measured on {TIMED_STEPS} steps after {WARM_UP_STEPS} "
        "warm-up; random tokens, without reading data or saving",
        f"A model: {duration(steps_take)} of training, {duration(probes_take)} for {points} points of its curves "
        f"({measured})",
        f"All: {duration(total)} on one device{shared}",
        "The paper's took 50 GPU hours a data set, 400 in total (appendix D.3)",
    ):
        console.print(line, soft_wrap=True, highlight=False)


def run(
    args: LeaveOneOutArguments, training: LeaveOneOutTrainingArguments, console: Console, process: OwnProcess
) -> None:
    if args.dry_run:
        if process.number == 0:
            estimate(args, training, console, process.count)
        return
    workspace = Workspace(Path(training.output_dir), settings_of(args, training))
    folder = workspace.folder / "runs"
    with StageProgress(["rows", "models", "results"], console) as progress:
        with progress.stage("rows") as stage:
            tokenizer, config = load_tokenizer_and_config(args.stage())
            draws = training.max_steps * training.global_batch()

            def runs_of(sources: dict[str, Dataset]) -> list[LeaveOneOutRun]:
                runs = leave_one_out_runs(list(sources), args.seeds, args.only)
                check_no_repeats(runs, sources, draws)
                return runs

            sources, probes = prepare_rows(
                workspace, args.sources, args.probes, tokenizer, args.seq_length, config, draws,
                rows_per_probe=args.rows_per_probe, overlap=args.overlap, shuffle_buffer=args.shuffle_buffer,
                check=runs_of, stage=stage,
            )  # fmt: skip
            runs = runs_of(sources)  # of which there may be more than when the rows were prepared
        with progress.stage("models") as stage:
            train_all(runs, folder, args, training, config, sources, probes, stage)
        if process.number > 0:
            return
        with progress.stage("results"):
            results = read_results(runs, folder)
            write_results(workspace.folder, results, workspace.settings)
    console.print(effect_table(effects(results)))
    console.print(
        "Relative to the other sources, which fill the place of the one left out; one budget, one model size.",
        style="dim",
    )
    console.print(f"{workspace.folder}: heat_map.png, curves.png, leave_one_out.parquet and .yaml", soft_wrap=True)


if __name__ == "__main__":
    launch_each(__doc__, (LeaveOneOutArguments, LeaveOneOutTrainingArguments), check, run)
