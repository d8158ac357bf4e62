"""Recipes whose processes share work without a group: each trains whole models, on a device of its own.

    launch_each(__doc__, (AuditArguments, AuditTrainingArguments), check, run)

Where a launcher (`accelerate launch`, `torchrun`) starts several processes, each begins anew without what the launcher
said of a group. Started by hand, one by one, they work together all the same: what they share is the folder.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from datasets import disable_progress_bars
from rich.console import Console
from transformers import TrainingArguments
from transformers import logging as transformers_logging
from trl import TrlParser

from mobilellm_hf.launch import SECONDS_FOR_THE_FIRST
from mobilellm_hf.modeling.configuration_mobilellm import MODEL_SIZES

# Which of the launcher's processes this one is: number/count.
PLACE = "MOBILELLM_HF_INDEPENDENT_PROCESS"
# What a launcher says to processes that are to train one model together.
GROUP_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


@dataclass(frozen=True)
class OwnProcess:
    """The number of this process, and how many the launcher has started."""

    number: int
    count: int


def own_process() -> OwnProcess:
    """This process among those that a launcher has started, each on its own from here on.

    A process that the launcher meant to train with others, or that sees several GPUs, becomes the same command with
    one GPU in sight and nothing of the group in its environment. Libraries look for both as early as on import, so
    the process begins anew instead of changing its environment; it stays the launcher's child.
    """
    if place := os.environ.get(PLACE):
        return OwnProcess(*map(int, place.split("/")))
    gpus = torch.cuda.device_count()
    if "RANK" not in os.environ and gpus <= 1:
        return OwnProcess(0, 1)
    number, count, local = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    changed = {PLACE: f"{number}/{count}"}
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = [str(gpu) for gpu in range(gpus)] if visible is None else visible.split(",")[:gpus]
        changed["CUDA_VISIBLE_DEVICES"] = names[local % len(names)]
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in GROUP_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    sys.stdout.flush()
    os.execve(sys.executable, sys.orig_argv, kept | changed)


def check_new_models(model_size: str | None, model_config: dict, tokenizer: str | None) -> None:
    """Raises a ValueError that names the field unless new models can be made."""
    if model_size is None and not model_config:
        raise ValueError(
            f"give model_size ({', '.join(MODEL_SIZES)}) or model_config: models are trained from scratch"
        )
    if model_size is not None and model_size not in MODEL_SIZES:
        raise ValueError(f"model_size={model_size!r} must be one of {', '.join(MODEL_SIZES)}")
    if tokenizer is None:
        raise ValueError("new models need a tokenizer: a folder, or a Hub id such as meta-llama/Llama-3.2-1B")


def check_whole_models(training: TrainingArguments) -> None:
    """Raises a ValueError unless each model is trained by one process on one device."""
    if training.fsdp or "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED")):
        raise ValueError("every process trains whole models: launch with recipes/accelerate/single.yaml or ddp.yaml")
    if training.world_size > 1 or training.n_gpu > 1:
        raise ValueError(
            f"every model is trained by one process on one device, not {training.world_size} on {training.n_gpu}: "
            "launch with accelerate launch or torchrun"
        )


def launch_each(
    description: str, classes: tuple[type, ...], check: Callable[..., None], run: Callable[..., object]
) -> None:
    """Parses `--config FILE` and the fields of the classes; calls `check` with an instance of each, then `run`.

    Ends the process with status 2 after an error that the user can mend, and 130 after Ctrl-C.

    Args:
        check: raises what is wrong with the configuration.
        run: called with the instances, a console, which only the first process's is heard of, and its `OwnProcess`.
    """
    process = own_process()
    parser = TrlParser(dataclass_types=classes, description=description.split("\n\n")[0])
    parser.add_argument("--config", metavar="FILE", help="YAML with these fields; the command line overrides it")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    console = Console(quiet=process.number > 0)
    try:
        arguments = parser.parse_args_and_config()[: len(classes)]
        check(*arguments)
        run(*arguments, console, process)
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on where it stopped", style="bold yellow")
        sys.exit(130)
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        if process.number:
            # What all of them find the first one says, and the launcher ends the others at once.
            time.sleep(SECONDS_FOR_THE_FIRST)
        Console().print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(2)
