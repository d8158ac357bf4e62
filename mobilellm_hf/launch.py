"""What every training recipe does around its stage: the command line, one process's voice, and errors in a line."""

import sys
from datetime import timedelta

import torch
from accelerate import PartialState
from datasets import disable_progress_bars
from rich.console import Console
from transformers import logging as transformers_logging
from trl import TrlParser

from mobilellm_hf.training.arguments import StageArguments, StageTrainingArguments
from mobilellm_hf.training.stage import run_stage


def launch(description: str, stage: type[StageArguments], training: type[StageTrainingArguments]) -> None:
    """Parses `--config FILE` and the fields of both classes, and runs the stage.

    Ends the process with status 2 after an error that the user can mend, and 130 after Ctrl-C.
    """
    parser = TrlParser(dataclass_types=(stage, training), description=description.split("\n\n")[0])
    parser.add_argument("--config", metavar="FILE", help="YAML with these fields; the command line overrides it")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    # Without cpu=True, processes that torchrun starts on a machine without a GPU would not know of each other.
    # They wait for each other as long as one of them tokenizes the data.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    console = Console(quiet=not state.is_main_process)
    try:
        arguments, training_arguments = parser.parse_args_and_config()[:2]
        run_stage(arguments, training_arguments, console)
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on from the last checkpoint", style="bold yellow")
        sys.exit(130)
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        console.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(2)
