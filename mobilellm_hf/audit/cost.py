"""What an audit will cost on this device, measured before anything is trained, its rivals and its teacher included."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mobilellm_hf.audit.arguments import AuditArguments, AuditTrainingArguments, learning_rates
from mobilellm_hf.audit.arms import Arm, arm_steps
from mobilellm_hf.audit.rivals.regmix import MODELS_PER_SOURCE
from mobilellm_hf.independent import OwnProcess
from mobilellm_hf.influence.leave_one_out_cost import TIMED_STEPS, WARM_UP_STEPS, duration, measure_speed
from mobilellm_hf.influence.leave_one_out_rows import declared_sources


def rival_models(args: AuditArguments) -> dict[str, int]:
    """rival -> how many models it trains before the arms, each of max_steps steps.

    Where text must be read to know the sources, each entry counts as one.
    """
    sources = len(declared_sources(args.sources) or args.sources)
    counts = {"regmix": MODELS_PER_SOURCE * sources, "mixmin": sources, "doremi": 2, "doge": 1}
    return {name: counts[name] for name in args.arms if name in counts} if args.scores is None else {}


def teacher_step(args: AuditArguments, step: float, model: PreTrainedModel) -> float:
    """Seconds of the teacher's forward pass in a training step: a third of a step of a model of its size.

    Args:
        step: seconds of a training step of `model`.
    """
    config = AutoConfig.from_pretrained(args.teacher)
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(config)
    return step / 3 * teacher.num_parameters() / model.num_parameters()


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
    models = (1 + args.comparisons()) * len(args.seeds) * len(rates)
    longest = arm_steps(Arm("longest", "baseline", {}), training.max_steps, args.curation_share)
    probe_rows = sum(
        len(declared_sources(entries) or entries) * (args.rows_per_probe or 0)
        for name, entries in args.probes().items() if not name.startswith("tuning ")
    )  # fmt: skip
    a_model = speed.step * longest + 2 * speed.probe_row * probe_rows
    taught = 0.0 if args.teacher is None else a_model + teacher_step(args, speed.step, build_model(0)) * longest
    rivals = rival_models(args)
    found = speed.step * training.max_steps * sum(rivals.values())
    total = models * (a_model + taught) + found
    tokens = training.global_batch() * args.seq_length
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, threads: {torch.get_num_threads()}"
    shared = f", or {duration(total / process.count)} on {process.count} that do not slow each other down"
    design = f"arms: {1 + args.comparisons()}, seeds: {len(args.seeds)}, learning rates: {len(rates)}"
    for line in (
        f"{models * (1 + bool(taught))} models ({design}) of at most {longest * tokens / 1e6:,.2g} M training tokens",
        f"{device}: {tokens / speed.step:,.0f} tokens a second, measured on {TIMED_STEPS} steps after {WARM_UP_STEPS} "
        "warm-up; random tokens, without reading data or saving",
        *_of_rivals(rivals, found),
        f"At most {duration(a_model)} a model"
        + (f", {duration(taught)} by the teacher, whose forward pass is reckoned by its parameters" * bool(taught))
        + f", {duration(total)} for all on one device"
        + shared * (process.count > 1),
    ):
        console.print(line, soft_wrap=True, highlight=False)


def _of_rivals(rivals: Mapping[str, int], seconds: float) -> list[str]:
    if not rivals:
        return []
    each = ", ".join(f"{name} {count}" for name, count in rivals.items())
    slower = " and more, since DoGE takes a gradient of each source" * ("doge" in rivals)
    return [
        f"Before them rivals train {sum(rivals.values())} models to find their weights, for {duration(seconds)}"
        f"{slower}: {each}"
    ]
