"""GRPO from a YAML file: prompts whose answers can be checked, rewards by name, TRL's GRPOTrainer.

    recipes/grpo.py calls `run_grpo`.

TRL is used as it is: it generates, scores and trains. Prompts come to it checked, so that none is asked whose gold
answer nobody can parse, and laid out for the whole run: a run that is killed goes on with the prompts that an unbroken
one would have asked. A reward that raises costs its sample, which is skipped by all rewards and counted, and not the
run (`joint_rewards`).

The output folder gets

    prompts/                    those that are left, `train` and `held_out`
    checkpoint-N/               of the Trainer; the newest whole one is where the same command goes on
    MODEL_NAME/                 the model and its tokenizer with the chat template
    grpo.png, log.jsonl         rewards, length of completions, pass rate
    pass_rate.json              of the held-out prompts, before and after, with 95% intervals
    prompts.json                how many prompts there are, and how many were dropped, and why
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, DatasetDict, load_from_disk
from rich.console import Console
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOTrainer

import mobilellm_hf
from mobilellm_hf.modeling import MobileLLMConfig
from mobilellm_hf.progress import Stage, StageProgress, StageProgressCallback, StagesWithin
from mobilellm_hf.rewards import AccuracyReward, CodeReward, CosineLengthReward, SafeReward
from mobilellm_hf.training.grpo_arguments import GOLD, GRPOArguments, GRPOTrainingArguments, build_rewards
from mobilellm_hf.training.grpo_data import lay_out, save_prompts
from mobilellm_hf.training.joint_rewards import JointRewards
from mobilellm_hf.training.monitors import StopOnNonFiniteLoss, add_before_trackers
from mobilellm_hf.training.pass_rate import (
    PassRateCallback,
    pass_rate_document,
    pass_rate_table,
    pass_rates,
    plot_grpo,
)
from mobilellm_hf.training.sft_data import load_model, load_tokenizer_and_config
from mobilellm_hf.training.stage import explained_write_errors, finish_model
from mobilellm_hf.workspace import Workspace

# Of TRL's arguments, those that decide the weights that come out.
DECISIVE = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "max_steps", "warmup_steps", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "seed", "bf16", "fp16", "num_generations",
    "generation_batch_size", "num_iterations", "max_completion_length", "shuffle_dataset", "temperature", "top_p",
    "top_k", "min_p", "repetition_penalty", "generation_kwargs", "chat_template_kwargs", "beta", "epsilon",
    "epsilon_high", "delta", "reward_weights", "scale_rewards", "loss_type", "importance_sampling_level",
    "mask_truncated_completions",
)  # fmt: skip


@dataclasses.dataclass
class GRPOResult:
    """What a run leaves.

    Attributes:
        model: folder of the model and its tokenizer.
        log_history: of the Trainer.
        prompts: field -> `prompts` that are left and `dropped`, a count of the others by reason.
        skipped: reward -> kind of error -> samples for which it raised, since the run was last started.
        pass_rate: as in `pass_rate.json`; None if nothing was held out.
    """

    model: Path
    log_history: list[dict]
    prompts: dict[str, dict[str, Any]]
    skipped: dict[str, dict[str, int]]
    pass_rate: dict[str, Any] | None


class RewardProgressCallback(StageProgressCallback):
    """Moves a stage's bar with the trainer's steps and shows the last mean reward."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and logs.get("reward") is not None:
            self.stage.say(f"step {state.global_step}, mean reward {logs['reward']:.3f}")


def run_grpo(
    args: GRPOArguments,
    training: GRPOTrainingArguments,
    console: Console,
    progress: StageProgress | StagesWithin | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> GRPOResult:
    """Trains a model on its rewards, or takes it up where it was interrupted.

    Args:
        progress: where its stages are shown; by default on the console.
        callbacks: beside those of the arguments, which see an event first.

    Raises:
        ValueError: the arguments do not fit each other, the data or the folder; the message names the field.
        ImportError: a reward or TRL needs a package that is not installed.
    """
    _check(args, training)
    rewards = JointRewards(build_rewards(args.rewards, training.max_completion_length))
    workspace = Workspace(Path(training.output_dir), _settings(args, training))
    with progress or StageProgress(["prompts", "training", "results"], console) as progress:
        with progress.stage("prompts") as stage:
            tokenizer, config = load_tokenizer_and_config(args)
            prompts, counts = build_prompts(workspace, args, training, tokenizer, config, stage)
        with progress.stage("training") as stage:
            trainer = train(workspace, args, training, config, tokenizer, prompts, rewards, stage, callbacks)
        with progress.stage("results"):
            result = write_results(workspace, args, trainer, rewards, counts)
    _show(console, result)
    return result


def _check(args: GRPOArguments, training: GRPOTrainingArguments) -> None:
    args.check()
    given = training.reward_weights
    if given is not None and len(given) != len(args.rewards):
        raise ValueError(f"reward_weights has {len(given)} weights for {len(args.rewards)} rewards: give each one")
    if training.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError("fsdp: completions are generated by the whole model: launch with ddp.yaml")
    generated = training.steps_per_generation * training.num_iterations
    passes = training.save_steps * training.gradient_accumulation_steps
    if training.save_strategy == "steps" and passes % generated:
        raise ValueError(
            f"save_steps={training.save_steps} x gradient_accumulation_steps={training.gradient_accumulation_steps} "
            f"must be a multiple of the {generated} passes of a generation, or a resumed run would lose prompts"
        )


def _settings(args: GRPOArguments, training: GRPOTrainingArguments) -> dict[str, Any]:
    settings = dataclasses.asdict(args) | {name: getattr(training, name) for name in DECISIVE}
    settings["completions_per_step"] = (
        training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    )
    settings["mobilellm_hf"] = mobilellm_hf.__version__
    for name in ("measure_every", "attn_implementation"):  # which decide nothing
        del settings[name]
    return json.loads(json.dumps(settings, default=str))


def build_prompts(
    workspace: Workspace,
    args: GRPOArguments,
    training: GRPOTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    config: MobileLLMConfig,
    stage: Stage,
) -> tuple[DatasetDict, dict[str, dict[str, Any]]]:
    """`train` and `held_out`, checked and kept on disk, and what was dropped of each.

    Raises:
        ValueError: `max_prompt_length` does not fit, or a set cannot be read; see `load_prompts` and `usable`.
    """
    room = config.max_position_embeddings - training.max_completion_length
    longest = args.max_prompt_length or room
    if room <= 0 or longest > room:
        raise ValueError(
            f"max_prompt_length={longest} and max_completion_length={training.max_completion_length} are beyond the "
            f"model's max_position_embeddings={config.max_position_embeddings}: lower one of them"
        )
    with PartialState().main_process_first():
        path = workspace.once("prompts", lambda path: save_prompts(path, args, tokenizer, longest))
    counts = json.loads((path / "counts.json").read_text())
    stage.say(", ".join(f"{count['prompts']:,} {field}" for field, count in counts.items()))
    return load_from_disk(path), counts


def train(
    workspace: Workspace,
    args: GRPOArguments,
    training: GRPOTrainingArguments,
    config: MobileLLMConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: DatasetDict,
    rewards: JointRewards,
    stage: Stage,
    callbacks: Sequence[TrainerCallback] = (),
) -> GRPOTrainer:
    with PartialState().main_process_first():  # the others find it clean
        last = workspace.last_checkpoint(".")
    model = load_model(args, config)
    given = copy.copy(training)
    given.shuffle_dataset = False  # the order is laid out
    rows = lay_out(prompts["train"], training.prompts_of_the_run(), training.seed, training.shuffle_dataset)
    # TRL asks for it by the name that transformers 6 will not have.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    trainer = GRPOTrainer(model, rewards.columns(), given, train_dataset=rows, processing_class=tokenizer)
    watching = _watching(args, training, trainer, prompts.get("held_out"), rewards.given)
    add_before_trackers(trainer, *watching, *callbacks)
    trainer.add_callback(RewardProgressCallback(stage))
    trainer.remove_callback(PrinterCallback)
    with explained_write_errors(workspace):
        workspace.claim()
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    return trainer


def _watching(
    args: GRPOArguments,
    training: GRPOTrainingArguments,
    trainer: GRPOTrainer,
    held_out: Dataset | None,
    rewards: list[SafeReward],
) -> list:
    if held_out is None:
        return [StopOnNonFiniteLoss()]
    monitor = PassRateCallback(
        held_out, trainer.processing_class, judges_of(rewards), args.measure_every or training.max_steps,
        max_new_tokens=training.max_completion_length, samples=args.held_out_samples,
        temperature=training.temperature, eos_token_ids=trainer.eos_token_ids,
        batch_size=training.per_device_eval_batch_size, seed=training.seed,
    )  # fmt: skip
    return [monitor, StopOnNonFiniteLoss()]


def judges_of(rewards: list[SafeReward]) -> list[SafeReward]:
    """Those of the rewards that say what is right; `accuracy` if none does."""
    inner = [reward.reward for reward in rewards]
    inner = [reward.reward if isinstance(reward, CosineLengthReward) else reward for reward in inner]
    found = [SafeReward(reward) for reward in inner if isinstance(reward, AccuracyReward | CodeReward)]
    return found or [SafeReward(AccuracyReward(GOLD))]


def write_results(
    workspace: Workspace,
    args: GRPOArguments,
    trainer: GRPOTrainer,
    rewards: JointRewards,
    counts: dict[str, dict[str, Any]],
) -> GRPOResult:
    """The model's folder, the log, its picture, the pass rate, and what became of the prompts."""
    folder = workspace.folder / args.model_name
    partial = folder.with_name(folder.name + ".partial")
    trainer.accelerator.unwrap_model(trainer.model).config.use_cache = True  # which training had turned off
    trainer.save_model(str(partial))
    log, given = trainer.state.log_history, trainer.args
    rate = None
    if rates := pass_rates(log):
        rate = pass_rate_document(rates, args.held_out_samples, given.temperature, given.max_completion_length)
    if trainer.is_world_process_zero():
        finish_model(partial, folder, trainer.processing_class)
        _write_log(workspace.folder, log, counts, rate)
    trainer.accelerator.wait_for_everyone()
    return GRPOResult(folder, log, counts, rewards.skipped(), rate)


def _write_log(folder: Path, log: list[dict], counts: dict[str, dict], rate: dict[str, Any] | None) -> None:
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    (folder / "prompts.json").write_text(json.dumps(counts, indent=2))
    if rate is not None:
        (folder / "pass_rate.json").write_text(json.dumps(rate, indent=2))
    plot_grpo(log, folder / "grpo.png")


def _show(console: Console, result: GRPOResult) -> None:
    for field, count in result.prompts.items():
        lost = "".join(f", {number:,} dropped: {reason}" for reason, number in count["dropped"].items())
        console.print(f"{field}: {count['prompts']:,} prompts{lost}", markup=False, soft_wrap=True)
    for name, kinds in result.skipped.items():
        counted = ", ".join(f"{number:,} {kind}" for kind, number in kinds.items())
        console.print(f"the reward {name} raised, and samples were skipped: {counted}", style="yellow", markup=False)
    if result.pass_rate is not None:
        console.print(pass_rate_table(result.pass_rate))
    files = "grpo.png, log.jsonl, prompts.json" + (" and pass_rate.json" if result.pass_rate is not None else "")
    console.print(f"{result.model}: the model; beside it {files}", soft_wrap=True)
