"""Reading a weighted mixture, and resuming it: `MixtureDataset` against `datasets.interleave_datasets`.

    python benchmarks/mixture.py                      # five minutes on two cores, half a GB of temporary files
    python benchmarks/mixture.py --only resume --rows 5000
    pip install --no-deps torchdata                   # for the lines of StatefulDataLoader

All read the same packed rows from disk, in fourteen sources with the shares of Table 5's second phase, into the
Trainer's `default_data_collator`. The ids are generated, since speed does not depend on them. CPU seconds are those of
the process and its workers together. Contenders read in turns, each its own loader, which stays open in between.
"lists" is what `interleave_datasets` gives a Trainer unless its format is set.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import torch
from accelerate import skip_first_batches
from common import Measurement, machine, ratio
from datasets import Dataset, DatasetDict, disable_progress_bars, interleave_datasets, load_from_disk
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import default_data_collator

from mobilellm_hf.data.catalog import mixture as catalog_mixture
from mobilellm_hf.data.mixture import MixtureDataset

try:
    from torchdata.stateful_dataloader import StatefulDataLoader
except ImportError:
    StatefulDataLoader = None

OURS = "MixtureDataset"
MISSING = "pip install --no-deps torchdata"
FAR = 10_000_000
WEIGHTS = catalog_mixture("pretraining", 2)
LAYOUTS = [("map-style", kind) for kind in ("lists", "torch", "numpy")] + [
    ("iterable", kind) for kind in ("torch", "numpy")
]
# Batches that are read before a loader is timed: enough for every worker's first ones, and for open files.
WARM_UP = 16

Build = Callable[[], Any]


def write_rows(folder: Path, rows: int, seq_length: int) -> None:
    """As `tokenize_and_pack` makes them: three lists of int32 a row."""
    random = np.random.default_rng(0)
    parts = {}
    for name in WEIGHTS:
        count = max(1, rows // len(WEIGHTS))
        offsets = pyarrow.array(np.arange(count + 1, dtype=np.int32) * seq_length)
        ids = random.integers(0, 128_256, count * seq_length, dtype=np.int32)
        positions = np.tile(np.arange(seq_length, dtype=np.int32), count)
        columns = {"input_ids": ids, "labels": ids, "position_ids": positions}
        lists = {key: pyarrow.ListArray.from_arrays(offsets, pyarrow.array(value)) for key, value in columns.items()}
        parts[name] = Dataset(pyarrow.table(lists))
    DatasetDict(parts).save_to_disk(folder)


def ours(sources: DatasetDict, num_draws: int = 2 * FAR) -> MixtureDataset:
    return MixtureDataset(dict(sources), WEIGHTS, num_draws)


def interleaved(sources: DatasetDict, layout: str, kind: str):
    """Without an end that would come during the benchmark; its rows as Python lists, NumPy arrays or tensors."""
    parts = [part.to_iterable_dataset(num_shards=2) if layout == "iterable" else part for part in sources.values()]
    shares = list(WEIGHTS.values())
    joined = interleave_datasets(parts, probabilities=shares, seed=0, stopping_strategy="all_exhausted")
    return joined.with_format(None if kind == "lists" else kind)


def contenders(sources: DatasetDict) -> dict[str, tuple[Build, type | None]]:
    """name -> what makes the data set, and its loader (None if that is not installed)."""
    found: dict[str, tuple[Build, type | None]] = {OURS: (partial(ours, sources), DataLoader)}
    for layout, kind in LAYOUTS:
        build = partial(interleaved, sources, layout, kind)
        found[f"interleave, {layout}, {kind}"] = (build, DataLoader)
        if kind == "numpy":
            found[f"interleave, {layout}, {kind}, StatefulDataLoader"] = (build, StatefulDataLoader)
    return found


# Throughput


def cpu_seconds(batches: Iterator) -> float:
    """Of this process and the loader's workers."""
    workers = [psutil.Process(worker.pid).cpu_times() for worker in getattr(batches, "_workers", [])]
    return time.process_time() + sum(times.user + times.system for times in workers)


def throughput(sources: DatasetDict, batch: int, batches: int, turns: int, workers: int, console: Console) -> None:
    loaders: dict[str, Iterator] = {}
    absent = []
    for name, (build, loader) in contenders(sources).items():
        if loader is None:
            absent.append(name)
            continue
        loaders[name] = iter(loader(build(), batch, num_workers=workers, collate_fn=default_data_collator))
        take(loaders[name], WARM_UP)
    results = {name: Measurement() for name in loaders}
    for turn in range(turns):
        for name, iterator in loaders.items():
            console.print(f"{workers} workers, turn {turn + 1} of {turns}: {name}", end="\033[K\r")
            cpu, wall = cpu_seconds(iterator), time.perf_counter()
            take(iterator, batches)
            results[name].cpu.append(cpu_seconds(iterator) - cpu)
            results[name].wall.append(time.perf_counter() - wall)
    loaders.clear()
    title = f"Reading, {workers} workers, batches of {batch}: medians of {turns} turns of {batch * batches:,} rows"
    table = Table(title=title)
    for column in ("", "rows a CPU s", "rows a wall s", "ours, times as fast (CPU)", "(wall)"):
        table.add_column(column, justify="right" if column else "left")
    for name, result in results.items():
        speeds = [batch * batches / statistics.median(times) for times in (result.cpu, result.wall)]
        ratios = [ratio(results, name, OURS, figure) for figure in ("cpu", "wall")]
        table.add_row(name, *(f"{speed:,.0f}" for speed in speeds), *(f"{value:.2f}" for value in ratios))
    for name in absent:
        table.add_row(name, MISSING)
    Console(width=120).print(table)


def take(iterator: Iterator, count: int) -> None:
    for _ in range(count):
        next(iterator)


# Resuming


def changed_state(sources: DatasetDict) -> dict:
    """The state of a mixture whose weights have changed four times, twice with rows rejected."""
    mixture = ours(sources)
    for number in range(1, 5):
        shift = WEIGHTS["fineweb_edu"] * number / 10
        weights = WEIGHTS | {"fineweb_edu": WEIGHTS["fineweb_edu"] - shift, "wiki": WEIGHTS["wiki"] + shift}
        keep = np.random.default_rng(number).random(mixture.num_rows) > 0.2 if number % 2 else None
        mixture.set_weights(weights, from_draw=FAR * number // 5, keep=keep)
    return mixture.state_dict()


def our_ways(sources: DatasetDict, batch: int) -> dict[str, Callable[[int], Callable[[], Any]]]:
    state = changed_state(sources)

    def restored() -> MixtureDataset:
        mixture = ours(sources)
        mixture.load_state_dict(state)
        return mixture

    def direct(draw: int) -> DataLoader:
        rest = range(draw, 2 * FAR)
        return DataLoader(restored(), batch, sampler=rest, collate_fn=default_data_collator)

    def as_trainer(draw: int) -> DataLoader:
        loader = DataLoader(restored(), batch, collate_fn=default_data_collator)
        return skip_first_batches(loader, draw // batch)

    ways = {f"{OURS}, from the draw on": direct, f"{OURS}, as the Trainer: skip_first_batches": as_trainer}
    return {name: partial(partial, way) for name, way in ways.items()}


def their_ways(sources: DatasetDict, layout: str, batch: int) -> dict[str, Callable[[int], Callable[[], Any]]]:
    def build() -> Any:
        return interleaved(sources, layout, "numpy")

    def stateful(draw: int) -> Callable[[], Any]:
        loader = StatefulDataLoader(build(), batch, collate_fn=default_data_collator)
        take(iter(loader), draw // batch)
        state = loader.state_dict()

        def resume() -> Any:
            fresh = StatefulDataLoader(build(), batch, collate_fn=default_data_collator)
            fresh.load_state_dict(state)
            return fresh

        return resume

    def skipping(draw: int) -> Callable[[], Any]:
        return lambda: skip_first_batches(DataLoader(build(), batch, collate_fn=default_data_collator), draw // batch)

    return {
        f"interleave, {layout}, as the Trainer: skip_first_batches": skipping,
        f"interleave, {layout}, StatefulDataLoader.load_state_dict": stateful if StatefulDataLoader else None,
    }


def seconds_to_first_batch(resume: Callable[[], Any], turns: int) -> float:
    """Median CPU seconds from nothing but files to the first batch."""
    times = []
    for _ in range(turns):
        start = time.process_time()
        take(iter(resume()), 1)
        times.append(time.process_time() - start)
    return statistics.median(times)


def resuming(sources: DatasetDict, batch: int, draws: tuple[int, int], turns: int, console: Console) -> None:
    """The rivals must have read as far as they resume, so they are timed at two draws near the start."""
    ways = our_ways(sources, batch) | their_ways(sources, "map-style", batch) | their_ways(sources, "iterable", batch)
    table = Table(title="Resuming: CPU seconds from opening the rows to the first batch")
    for column in ("", *(f"at draw {draw:,}" for draw in (*draws, FAR))):
        table.add_column(column, justify="right" if column else "left")
    for name, way in ways.items():
        if way is None:
            table.add_row(name, MISSING)
            continue
        console.print(f"resuming: {name}", end="\033[K\r")
        near, further = (seconds_to_first_batch(way(draw), turns) for draw in draws)
        if name.startswith(OURS):
            far = f"{seconds_to_first_batch(way(FAR), turns):.2f}"
        elif further > 2 * near:
            far = f"{further + (further - near) / (draws[1] - draws[0]) * (FAR - draws[1]):,.0f} (by these two)"
        else:
            far = "does not grow so far"
        table.add_row(name, f"{near:.2f}", f"{further:.2f}", far)
    Console(width=120).print(table)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000, help="packed rows on disk, all sources together")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=16, help="rows of a batch; Table 4 has 16")
    parser.add_argument("--batches", type=int, default=256, help="that each contender reads in a turn")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="of the loader; a table each")
    parser.add_argument("--turns", type=int, default=5, help="whose median is shown")
    parser.add_argument("--resume-draws", type=int, nargs=2, default=[4_000, 16_000], help="for all but ours")
    parser.add_argument("--only", default="throughput,resume", help="comma-separated: throughput, resume")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.disable(logging.WARNING)  # so few rows are read many times, which the mixture would say
    console = Console(stderr=True)
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), args.rows, args.seq_length)
        sources = load_from_disk(folder)
        if "throughput" in args.only:
            for workers in args.workers:
                throughput(sources, args.batch, args.batches, args.turns, workers, console)
        if "resume" in args.only:
            resuming(sources, args.batch, tuple(args.resume_draws), args.turns, console)


if __name__ == "__main__":
    main()
