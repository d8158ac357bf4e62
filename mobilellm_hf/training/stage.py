"""One stage of training from a YAML file: rows, mixture, model, callbacks, the stock Trainer, and what is left of it.

    recipes/pretrain.py and recipes/midtrain.py call `run_stage`.

The output folder gets

    rows/                           tokenized rows of every source that is no stream
    checkpoint-N/                   of the Trainer; the newest whole one is where the same command goes on
    mixture/                        rounds of influence resampling: scores, kept rows, histograms.png
    MobileLLM-R1-SIZE-STAGE/        the model and its tokenizer, named as the official repositories
    training.png, log.jsonl         what was logged: loss, probes, RankMe, mixture, speed
    mixture.yaml                    what was drawn of each source, and the last weights
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import set_seed

import mobilellm_hf
from mobilellm_hf.data.mixture import MixtureDataset
from mobilellm_hf.modeling import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.progress import Stage, StageProgress, StageProgressCallback
from mobilellm_hf.training.arguments import DTYPES, StageArguments, StageTrainingArguments
from mobilellm_hf.training.distillation import DistillationCallback
from mobilellm_hf.training.live_mixture import MixtureCallback
from mobilellm_hf.training.monitors import ProbeNLLCallback, StopOnNonFiniteLoss, add_before_trackers, probe_history
from mobilellm_hf.training.plots import plot_training
from mobilellm_hf.training.rank_me import RankMeCallback
from mobilellm_hf.training.resampling import InfluenceResamplingCallback, PhaseEndedError
from mobilellm_hf.training.stage_data import build_mixture, build_rows, load_tokenizer_and_config, write_cache
from mobilellm_hf.training.tables import draws_table
from mobilellm_hf.training.teacher_cache import TeacherCache
from mobilellm_hf.training.throughput import ThroughputCallback
from mobilellm_hf.workspace import Workspace

# Of the Trainer's arguments, those that decide the weights that come out.
DECISIVE = (
    "learning_rate", "final_learning_rate", "max_steps", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "optim", "seed", "bf16", "fp16",
)  # fmt: skip


@dataclasses.dataclass
class StageResult:
    """What a stage leaves.

    Attributes:
        model: folder of the model and its tokenizer.
        log_history: of the Trainer.
        mixture: as it was at the end.
        ended: why influence resampling ended the stage before its last step; else empty.
    """

    model: Path
    log_history: list[dict]
    mixture: MixtureDataset
    ended: str


def run_stage(
    args: StageArguments,
    training: StageTrainingArguments,
    console: Console,
    callbacks: Sequence[TrainerCallback] = (),
) -> StageResult:
    """Trains a stage, or takes it up where it was interrupted.

    Args:
        callbacks: beside those of the arguments, which see an event first.

    Raises:
        ValueError: the arguments do not fit each other, the data or the folder; the message names the field.
    """
    args.check()
    if args.resamples() and (training.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"):
        raise ValueError(
            "influence resampling (resample_at_start, resample_every) scores with whole models, and FSDP shards them: "
            "launch with recipes/accelerate/ddp.yaml or multi_node.yaml"
        )
    workspace = Workspace(Path(training.output_dir), _settings(args, training))
    cached = args.teacher_cache is not None and args.teacher is not None
    names = ["rows", *(["teacher cache"] if cached else []), "training", "results"]
    with StageProgress(names, console) as progress:
        with progress.stage("rows") as stage:
            tokenizer, config = load_tokenizer_and_config(args)
            sources, probes = build_rows(workspace, args, tokenizer, config, stage)
            mixture = build_mixture(args, training, sources)
        if cached:
            with progress.stage("teacher cache") as stage:
                write_cache(args, mixture, training, config.vocab_size, stage)
        with progress.stage("training") as stage:
            trainer = train(workspace, args, training, config, mixture, probes, stage, callbacks)
        with progress.stage("results"):
            result = write_results(workspace, args, training, trainer, tokenizer, mixture)
    report(console, training, trainer, mixture, result)
    return result


def _settings(args: StageArguments, training: StageTrainingArguments) -> dict[str, Any]:
    settings = dataclasses.asdict(args) | {name: getattr(training, name) for name in DECISIVE}
    settings["mixed_precision"] = getattr(training, "mixed_precision", None)  # which accelerate's file can say, too
    settings |= {"rows_per_step": training.global_batch(), "mobilellm_hf": mobilellm_hf.__version__}
    # Which decide nothing, or only whether a run goes on.
    undecisive = ("monitor_every", "rank_me", "shard_teacher", "attn_implementation", "sign_check", "sign_check_steps")
    for name in undecisive:
        del settings[name]
    return json.loads(json.dumps(settings, default=str))


def build_model(
    args: StageArguments, config: MobileLLMConfig, seed: int, dtype: torch.dtype = torch.float32
) -> MobileLLMForCausalLM:
    """The model of the stage before, or a new one: normal weights of std 0.02 (Table 3's models), norms of one."""
    options = {} if args.attn_implementation is None else {"attn_implementation": args.attn_implementation}
    if args.model is not None:
        return MobileLLMForCausalLM.from_pretrained(args.model, dtype=dtype, **options)
    set_seed(seed)
    if options:
        config._attn_implementation = args.attn_implementation
    return MobileLLMForCausalLM(config)


def build_callbacks(
    args: StageArguments, training: StageTrainingArguments, mixture: MixtureDataset, probes: dict[str, Dataset]
) -> list:
    """In the order in which they must see an event: what decides first, then what watches."""
    callbacks: list = []
    if args.distils():
        teacher = TeacherCache(args.teacher_cache) if args.teacher_cache else args.teacher
        callbacks.append(
            DistillationCallback(
                teacher,
                args.temperature,
                args.alpha,
                vocabulary=args.vocabulary,
                dtype=DTYPES[args.teacher_dtype],
                shard_teacher=args.shard_teacher,
            )  # fmt: skip
        )
    if not args.resamples():
        callbacks.append(MixtureCallback(mixture, args.delay_steps))
    else:
        callbacks.append(
            InfluenceResamplingCallback(
                mixture,
                probes,
                args.resample_every,
                args.curvature,
                None if args.reject == "none" else args.reject,
                at_start=args.resample_at_start,
                rule=args.reject_rule,
                reweigh=args.reweigh,
                candidates_per_source=args.candidates_per_source,
                scores=args.influence_scores,
                floor=args.floor,
                min_positive=args.min_positive,
                min_spread=args.min_spread,
                allow_overlap=args.allow_overlap,
                sign_check=None if args.sign_check == "off" else args.sign_check,
                sign_check_steps=args.sign_check_steps,
                seed=training.seed,
                batch_size=training.per_device_train_batch_size,
                delay_steps=args.delay_steps,
            )  # fmt: skip
        )
    every = args.monitor_every or max(1, training.max_steps // 20)
    if probes:
        callbacks.append(ProbeNLLCallback(probes, every, training.per_device_eval_batch_size))
        if args.rank_me:
            first = next(iter(probes.values()))
            callbacks.append(RankMeCallback(first, every, batch_size=training.per_device_eval_batch_size))
    return [*callbacks, ThroughputCallback(args.seq_length), StopOnNonFiniteLoss()]


def train(
    workspace: Workspace,
    args: StageArguments,
    training: StageTrainingArguments,
    config: MobileLLMConfig,
    mixture: MixtureDataset,
    probes: dict[str, Dataset],
    stage: Stage,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trainer:
    with PartialState().main_process_first():  # the others find it clean
        last = workspace.last_checkpoint(".")
    model = build_model(args, config, training.seed)
    trainer = Trainer(model, training, train_dataset=mixture)
    add_before_trackers(trainer, *build_callbacks(args, training, mixture, probes), *callbacks)
    trainer.add_callback(StageProgressCallback(stage))
    trainer.remove_callback(PrinterCallback)
    with explained_write_errors(workspace):
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except PhaseEndedError as error:  # what the Trainer has loaded stays: the checkpoint of the end, or the start
            stage.say(str(error))
    return trainer


@contextmanager
def explained_write_errors(workspace: Workspace) -> Iterator[None]:
    """A disk that is full has a different error in every library that writes; this one says what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        full = full or isinstance(error, SafetensorError) or "inline_container" in str(error)
        if not full:
            raise
        free = shutil.disk_usage(workspace.folder).free / 2**30
        whole = workspace.last_checkpoint(".")
        raise OSError(
            f"a checkpoint could not be written to {workspace.folder}, where {free:.1f} GiB are free ({error}). "
            f"The last whole one is {whole}: make room, and the same command goes on from there"
        ) from error


def write_results(
    workspace: Workspace,
    args: StageArguments,
    training: StageTrainingArguments,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    mixture: MixtureDataset,
) -> StageResult:
    """The model's folder, the log, its picture and what was drawn."""
    folder = workspace.folder / args.released_name()
    partial = folder.with_name(folder.name + ".partial")
    model: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = True  # which training had turned off
    trainer.save_model(str(partial))
    resampling = next((c for c in trainer.callback_handler.callbacks if hasattr(c, "rounds")), None)
    ended = resampling.rounds[-1].ended if resampling is not None and resampling.rounds else ""
    if trainer.is_world_process_zero():
        finish_model(partial, folder, tokenizer)
        log = trainer.state.log_history
        (workspace.folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
        draws = max(1, trainer.state.global_step * training.global_batch())
        document = yaml.safe_dump(mixture_document(mixture, draws), sort_keys=False)
        (workspace.folder / "mixture.yaml").write_text(document)
        if trainer.state.global_step > 0:
            plot_training(log, workspace.folder / "training.png", training.global_batch() * args.seq_length)
    trainer.accelerator.wait_for_everyone()
    return StageResult(folder, trainer.state.log_history, mixture, ended)


def finish_model(partial: Path, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes a saved model's folder whole, and puts it in the place of an earlier one."""
    tokenizer.save_pretrained(partial)
    (partial / "training_args.bin").unlink(missing_ok=True)
    AutoConfig.from_pretrained(partial)  # as a user will, which is the last thing to be sure of
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def mixture_document(mixture: MixtureDataset, draws: int) -> dict[str, Any]:
    """The last weights, and per source what the draws took: as `mixture.yaml` has it."""
    drawn = mixture.report(draws)
    return {
        "weights": mixture.weights,
        "drawn": {name: {"rows": d.rows, "tokens": d.tokens, "epochs": d.epochs} for name, d in drawn.items()},
    }


def report(
    console: Console, training: StageTrainingArguments, trainer: Trainer, mixture: MixtureDataset, result: StageResult
) -> None:
    steps = trainer.state.global_step
    console.print(draws_table({"this stage": mixture.report(steps * training.global_batch())}))
    if curves := probe_history(result.log_history):
        table = Table("probe", "before", "after", "difference", title="NLL of the probes, nats per token")
        for name, curve in curves.items():
            before, after = curve[0][1], curve[-1][1]
            table.add_row(name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
        console.print(table)
    if result.ended:
        console.print(f"Ended at step {steps:,} of {training.max_steps:,}: {result.ended}.", style="yellow")
    console.print(f"{result.model}: the model; beside it training.png, log.jsonl and mixture.yaml", soft_wrap=True)
