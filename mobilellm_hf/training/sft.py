"""Supervised fine-tuning from a YAML file: conversations, their mixture, the context that grows, TRL's SFTTrainer.

    recipes/sft.py calls `run_sft`.

TRL is used as it is: it packs, computes the loss in chunks and trains. Rows come to it with their labels, made and
counted beforehand by `chat_rows`, so no conversation is cut without anyone knowing and the probes measure the same
tokens. Which conversations are read, in which order, is a function of the seed: a run that is killed and goes on ends,
on CPUs, with the same weights to the bit.

The output folder gets

    rows/                           tokenized conversations that do not stream, `train` and a split for each probe
    checkpoint-N/                   of the Trainer; the newest whole one is where the same command goes on
    MobileLLM-R1-SIZE(-tulu3)/      the model and its tokenizer with the chat template; of LoRA, merged
    adapter/                        of LoRA, the adapters
    training.png, log.jsonl         what was logged: loss, token accuracy, NLL of the probes, speed
    conversations.yaml              of each set what was dropped, and why, and what share of an epoch it has
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import ModelConfig, SFTTrainer, get_peft_config

import mobilellm_hf
from mobilellm_hf.data.chat_report import ChatReport
from mobilellm_hf.modeling import MobileLLMConfig
from mobilellm_hf.progress import Stage, StageProgress, StageProgressCallback, StagesWithin
from mobilellm_hf.training.monitors import ProbeNLLCallback, StopOnNonFiniteLoss, add_before_trackers, probe_history
from mobilellm_hf.training.plots import plot_training
from mobilellm_hf.training.sft_arguments import SFTArguments, SFTTrainingArguments
from mobilellm_hf.training.sft_data import build_rows, fit_context, load_model, load_tokenizer_and_config, mix
from mobilellm_hf.training.stage import explained_write_errors, finish_model
from mobilellm_hf.training.throughput import ThroughputCallback
from mobilellm_hf.workspace import Workspace

# Of TRL's arguments, those that decide the weights that come out.
DECISIVE = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "num_train_epochs", "max_steps", "warmup_steps",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "seed", "bf16", "fp16",
    "max_length", "packing", "packing_strategy", "assistant_only_loss", "loss_type", "eos_token", "shuffle_dataset",
    "neftune_noise_alpha", "label_smoothing_factor",
)  # fmt: skip


@dataclasses.dataclass
class SFTResult:
    """What a stage leaves.

    Attributes:
        model: folder of the model and its tokenizer.
        log_history: of the Trainer.
        report: what became of each set; None of streams.
    """

    model: Path
    log_history: list[dict]
    report: ChatReport | None


def run_sft(
    args: SFTArguments,
    training: SFTTrainingArguments,
    console: Console,
    progress: StageProgress | StagesWithin | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> SFTResult:
    """Fine-tunes a model, or takes it up where it was interrupted.

    Args:
        progress: where its stages are shown; by default on the console.
        callbacks: beside those of the arguments, which see an event first.

    Raises:
        ValueError: the arguments do not fit each other, the data or the folder; the message names the field.
    """
    _check(args, training)
    workspace = Workspace(Path(training.output_dir), _settings(args, training))
    with progress or StageProgress(["conversations", "training", "results"], console) as progress:
        with progress.stage("conversations") as stage:
            tokenizer, config = load_tokenizer_and_config(args)
            fit_context(tokenizer, config, args, training)
            rows, probes, report = build_rows(workspace, args, training, tokenizer, config, stage)
            mixed = mix(rows, args, training)
        with progress.stage("training") as stage:
            trainer = train(workspace, args, training, config, tokenizer, mixed, probes, stage, callbacks)
        with progress.stage("results"):
            result = write_results(workspace, args, trainer, mixed, report)
    _show(console, result)
    return result


def _check(args: SFTArguments, training: SFTTrainingArguments) -> None:
    args.check()
    if args.streams() and training.max_steps <= 0:
        raise ValueError("max_steps must be given: a stream has no length, so there are no epochs to count")
    if args.streams() and len(args.sources) > 1 and not args.is_weighted():
        raise ValueError("sources: streams are mixed by weights, since none is read whole: give each a weight")
    if args.use_peft and (training.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"):
        raise ValueError("use_peft merges adapters into a whole model, and FSDP shards it: launch with ddp.yaml")


def _settings(args: SFTArguments, training: SFTTrainingArguments) -> dict[str, Any]:
    settings = dataclasses.asdict(args) | {name: getattr(training, name) for name in DECISIVE}
    settings["mixed_precision"] = getattr(training, "mixed_precision", None)  # which accelerate's file can say, too
    settings |= {"rows_per_step": training.global_batch(), "mobilellm_hf": mobilellm_hf.__version__}
    for name in ("monitor_every", "attn_implementation"):  # which decide nothing
        del settings[name]
    return json.loads(json.dumps(settings, default=str))


def train(
    workspace: Workspace,
    args: SFTArguments,
    training: SFTTrainingArguments,
    config: MobileLLMConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset | IterableDataset,
    probes: dict[str, Dataset],
    stage: Stage,
    callbacks: Sequence[TrainerCallback] = (),
) -> SFTTrainer:
    with PartialState().main_process_first():  # the others find it clean
        last = workspace.last_checkpoint(".")
    given = copy.copy(training)
    given.assistant_only_loss = False  # the rows have their labels, and no messages to find answers in
    trainer = SFTTrainer(
        load_model(args, config),
        given,
        train_dataset=rows.select_columns(["input_ids", "labels"]),
        processing_class=tokenizer,
        peft_config=_peft_config(args),
    )
    add_before_trackers(trainer, *_watching(args, training, trainer, probes), *callbacks)
    trainer.add_callback(StageProgressCallback(stage))
    trainer.remove_callback(PrinterCallback)
    with explained_write_errors(workspace):
        workspace.claim()
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    return trainer


def _peft_config(args: SFTArguments):
    names = ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
    return get_peft_config(ModelConfig(**{name: getattr(args, name) for name in names}))


def _watching(
    args: SFTArguments, training: SFTTrainingArguments, trainer: SFTTrainer, probes: dict[str, Dataset]
) -> list:
    watching = [ThroughputCallback(), StopOnNonFiniteLoss()]
    if probes:
        every = args.monitor_every or max(1, _steps(trainer, training) // 20)
        watching.insert(0, ProbeNLLCallback(probes, every, training.per_device_eval_batch_size))
    return watching


def _steps(trainer: SFTTrainer, training: SFTTrainingArguments) -> int:
    if training.max_steps > 0:
        return training.max_steps
    return math.ceil(len(trainer.train_dataset) / training.global_batch() * training.num_train_epochs)


def write_results(
    workspace: Workspace,
    args: SFTArguments,
    trainer: SFTTrainer,
    rows: Dataset | IterableDataset,
    report: ChatReport | None,
) -> SFTResult:
    """The model's folder, the log, its picture, and what became of the conversations."""
    folder = workspace.folder / args.released_name()
    partial = folder.with_name(folder.name + ".partial")
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = True  # which training had turned off
    if not args.use_peft:
        trainer.save_model(str(partial))
    if trainer.is_world_process_zero():
        if args.use_peft:
            model.save_pretrained(workspace.folder / "adapter")
            model.merge_and_unload().save_pretrained(partial)
        finish_model(partial, folder, trainer.processing_class)
        log = trainer.state.log_history
        (workspace.folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
        plot_training(log, workspace.folder / "training.png")
        if report is not None:
            document = yaml.safe_dump(conversations_document(rows, report), sort_keys=False)
            (workspace.folder / "conversations.yaml").write_text(document)
    trainer.accelerator.wait_for_everyone()
    return SFTResult(folder, trainer.state.log_history, report)


def conversations_document(rows: Dataset, report: ChatReport) -> list[dict[str, Any]]:
    """Per set what `ChatSet` says, and `read`: its conversations in an epoch, which may be fewer or repeated."""
    read = Counter(rows["source"][:])
    return [entry | {"read": read[entry["source"]]} for entry in report.to_list()]


def _show(console: Console, result: SFTResult) -> None:
    for entry in result.report.sets if result.report else ():
        console.print(str(entry), markup=False, soft_wrap=True)
    if curves := probe_history(result.log_history):
        table = Table("probe", "before", "after", "difference", title="NLL of the probes' answers, nats per token")
        for name, curve in curves.items():
            before, after = curve[0][1], curve[-1][1]
            table.add_row(name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
        console.print(table)
    files = "training.png, log.jsonl and conversations.yaml"
    console.print(f"{result.model}: the model; beside it {files}", soft_wrap=True)
