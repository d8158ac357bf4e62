"""What recipes do around their work: the command line, one process's voice, and errors in a line."""

import sys
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import PartialState
from datasets import disable_progress_bars
from rich.console import Console
from transformers import logging as transformers_logging
from trl import TrlParser


def launch(description: str, classes: tuple[type, ...], run: Callable[..., object]) -> None:
    """Parses `--config FILE` and the fields of the classes, and calls `run` with an instance of each and a console.

    Ends the process with status 2 after an error that the user can mend, and 130 after Ctrl-C.
    """
    parser = TrlParser(dataclass_types=classes, description=description.split("\n\n")[0])
    parser.add_argument("--config", metavar="FILE", help="YAML with these fields; the command line overrides it")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    # Without cpu=True, processes that torchrun starts on a machine without a GPU would not know of each other.
    # They wait for each other as long as one of them prepares the data, or the slowest one's share may take.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    console = Console(quiet=not state.is_main_process)
    try:
        arguments = parser.parse_args_and_config()
        run(*arguments[: len(classes)], console)
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on where it stopped", style="bold yellow")
        sys.exit(130)
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        # What is wrong with the configuration every process finds; one of them says it.
        console.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(2)
