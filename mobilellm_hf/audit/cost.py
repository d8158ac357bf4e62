"""What an audit will cost on this device, measured before anything is trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console
from transformers import PreTrainedModel

from mobilellm_hf.audit.arguments import AuditArguments, AuditTrainingArguments, learning_rates
from mobilellm_hf.audit.arms import Arm, arm_steps
from mobilellm_hf.audit.rivals.regmix import MODELS_PER_SOURCE
from mobilellm_hf.independent import OwnProcess
from mobilellm_hf.influence.leave_one_out_cost import TIMED_STEPS, WARM_UP_STEPS, duration, measure_speed
from mobilellm_hf.influence.leave_one_out_rows import declared_sources


def rival_models(args: AuditArguments) -> str:
    """How many models each rival trains before the arms."""
    names = declared_sources(args.sources)
    counts = {
        "regmix": f"{MODELS_PER_SOURCE} a source" if names is None else str(MODELS_PER_SOURCE * len(names)),
        "mixmin": "1 a source" if names is None else str(len(names)),
        "doremi": "2",
        "doge": "1",
    }
    return ", ".join(f"{name} {counts[name]}" for name in args.arms if name in counts)


def estimate(
    args: AuditArguments,
    training: AuditTrainingArguments,
    build_model: Callable[[int], PreTrainedModel],
    console: Console,
    process: OwnProcess,
) -> None:
    """Prints how long the arms would take on this device."""
    speed = measure_speed(build_model, training, args.seq_length)
    rates = learning_rates(args, training)
    models = (1 + args.comparisons()) * len(args.seeds) * len(rates) * (1 if args.teacher is None else 2)
    longest = arm_steps(Arm("longest", "baseline", {}), training.max_steps, args.curation_share)
    probe_rows = sum(
        len(declared_sources(entries) or entries) * (args.rows_per_probe or 0)
        for name, entries in args.probes().items() if not name.startswith("tuning ")
    )  # fmt: skip
    a_model = speed.step * longest + 2 * speed.probe_row * probe_rows
    tokens = training.global_batch() * args.seq_length
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, threads: {torch.get_num_threads()}"
    shared = f", or {duration(models * a_model / process.count)} on {process.count} that do not slow each other down"
    rivals = rival_models(args) if args.scores is None else ""
    for line in (
        f"{models} models (arms: {1 + args.comparisons()}, seeds: {len(args.seeds)}, learning rates: {len(rates)}) of "
        f"at most {longest * tokens / 1e6:,.2g} M training tokens",
        f"{device}: {tokens / speed.step:,.0f} tokens a second, measured on {TIMED_STEPS} steps after {WARM_UP_STEPS} "
        "warm-up; random tokens, without reading data or saving",
        f"At most {duration(a_model)} a model, {duration(models * a_model)} for all on one device"
        + shared * (process.count > 1),
        *([f"Before them rivals train models to find their weights: {rivals}"] * bool(rivals)),
    ):
        console.print(line, soft_wrap=True, highlight=False)
