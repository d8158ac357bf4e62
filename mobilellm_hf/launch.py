"""What recipes do around their work: the command line, one process's voice, and errors in a line."""

import sys
import time
from collections.abc import Callable
from dataclasses import field
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from datasets import disable_progress_bars
from rich.console import Console
from transformers import logging as transformers_logging
from trl import TrlParser

SECONDS_FOR_THE_FIRST = 5


def option(text: str, default: Any = None) -> Any:
    """A field of a dataclass for `launch`: an option of the command line with its help.

    Args:
        text: what `--help` says.
        default: the value, or a callable that makes it, as `list` does.
    """
    if callable(default):
        return field(default_factory=default, metadata={"help": text})
    return field(default=default, metadata={"help": text})


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
        state.destroy_process_group()  # else Gloo's threads, still running at the end, abort a process now and then
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on where it stopped", style="bold yellow")
        sys.exit(130)
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        if not state.is_main_process:
            # What all of them find the first one says, and the launcher ends the others at once.
            time.sleep(SECONDS_FOR_THE_FIRST)
            console = Console(stderr=True)
        console.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(2)
