"""What every benchmark needs: turn-by-turn timing, peak memory, a table with ratios, and the machine it ran on.

Contenders run in turns (A B C A B C ...) in one process, so that a slow minute of a shared machine hits all of them.
CPU seconds are the figure to quote there; ratios are taken turn by turn and their median is shown.
"""

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


@dataclass
class Measurement:
    """Figures of one contender, one entry a turn: CPU seconds, wall seconds, peak bytes."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)


def measure_in_turns(
    contenders: dict[str, Callable[[], object]], turns: int, warmup: int = 1, resident: dict[str, int] | None = None
) -> dict[str, Measurement]:
    """Calls every contender once a turn; the first `warmup` turns are not counted. Shows what is running.

    `resident`: bytes that a contender holds between turns (weights, optimizer state), counted into its peak.
    """
    results = {name: Measurement() for name in contenders}
    with Console(stderr=True).status("") as status:
        for turn in range(-warmup, turns):
            for name, run in contenders.items():
                status.update(f"{name}: {'warm-up' if turn < 0 else f'turn {turn + 1} of {turns}'}")
                cpu, wall, peak = _measure(run)
                if turn >= 0:
                    results[name].cpu.append(cpu)
                    results[name].wall.append(wall)
                    results[name].peak.append(peak + (resident or {}).get(name, 0))
    return results


def _measure(run: Callable[[], object]) -> tuple[float, float, int]:
    gc.collect()
    resting = _reset_peak_memory()
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return cpu, wall, _peak_memory() - resting


def _reset_peak_memory() -> int:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM, the peak resident set
    return _status_bytes("VmRSS")


def _peak_memory() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def ratio(results: dict[str, Measurement], baseline: str, ours: str, figure: str = "cpu") -> float:
    """Median over turns of baseline / ours: above 1, ours is the better one."""
    pairs = zip(getattr(results[baseline], figure), getattr(results[ours], figure), strict=True)
    return statistics.median(theirs / own for theirs, own in pairs)


def print_table(title: str, results: dict[str, Measurement], ours: str) -> None:
    table = Table(title=title)
    for column in ("", "CPU s", "wall s", "peak MiB", "CPU ratio to ours", "wall ratio", "memory ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name, result in results.items():
        ratios = [f"{ratio(results, name, ours, figure):.3f}" for figure in ("cpu", "wall", "peak")]
        cpu, wall, peak = (statistics.median(values) for values in (result.cpu, result.wall, result.peak))
        table.add_row(name, f"{cpu:.3f}", f"{wall:.3f}", f"{peak / 2**20:.0f}", *ratios)
    Console(width=120).print(table)


def machine() -> str:
    """One line: processor, threads, GPU and the versions that matter."""
    import transformers

    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{processor}, {torch.get_num_threads()} threads{gpu}; python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
