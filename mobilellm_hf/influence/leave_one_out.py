"""Leave one out (equation 1, Figure 3): how much worse is a capability without a source? Models are trained to see.

    runs = leave_one_out_runs(["web", "code", "math"], seeds=[0, 1, 2])     # all, and without each: 4 x 3 models
    check_no_repeats(runs, sources, draws=max_steps * batch_size)
    train_missing(runs, folder, lambda run: train_run(run, build_model, sources, probes, arguments, folder))
    effect = effects(read_results(runs, folder))
    effect.delta, effect.low, effect.high                                   # (sources, capabilities), nats per token

Every model has the same budget of tokens, in equal shares of the sources that it reads, and reads no row twice. With
one left out, the others fill its place: so an effect is positive if a source helps more than the others do on average.
Models of one seed start alike and read the rows of each source in the same order, so the effect is a paired
difference. `recipes/leave_one_out.py` does all of it from a YAML file; `validation.py` has a quick version in memory.

Any number of processes may work through the runs of a folder together, started by one launcher or each by hand. They
agree by `flock`, which the kernel releases when a process ends, however it does: what a kill leaves undone, another
process or the next start takes up at its last checkpoint. That holds on one machine, and on file systems that pass
locks on to others, such as NFSv4.
"""

from __future__ import annotations

import copy
import fcntl
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import set_seed

from mobilellm_hf.data.mixture import MixtureDataset
from mobilellm_hf.influence.student_t import student_t_quantile
from mobilellm_hf.training.live_mixture import MixtureCallback, draws_per_step
from mobilellm_hf.training.monitors import ProbeNLLCallback, StopOnNonFiniteLoss, probe_history
from mobilellm_hf.workspace import Workspace, write_whole

BLOCK_SIZE = 64


@dataclass(frozen=True)
class LeaveOneOutRun:
    """One model to train: on all sources (`left_out` is None) or on all but one."""

    left_out: str | None
    seed: int

    @property
    def name(self) -> str:
        """Of its folder: all-seed0, no-starcoder-seed0."""
        return f"{'all' if self.left_out is None else f'no-{self.left_out}'}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{'all sources' if self.left_out is None else f'without {self.left_out}'}, seed {self.seed}"


@dataclass(frozen=True)
class LeaveOneOutResult:
    """What a finished run leaves.

    Attributes:
        tokens_per_step: training tokens of a step.
        rows: source -> rows that were read of it.
        curves: capability -> [(step, NLL in nats per token), ...], before the first step, and to the last.
    """

    run: LeaveOneOutRun
    tokens_per_step: int
    rows: dict[str, int]
    curves: dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class LeaveOneOutEffect:
    """Equation (1): the NLL of each capability without a source, minus that with all; > 0 means that the source helps.

    Attributes:
        sources, capabilities, seeds: names of the dimensions G, C and S.
        nll_all, nll_without: (S, C) and (S, G, C) float64, at the end of training, nats per token.
        per_seed: (S, G, C) their difference.
        delta: (G, C) its mean over seeds.
        low, high: (G, C) the 95% confidence interval of the mean (Student's t over seeds); NaN with one seed.
    """

    sources: list[str]
    capabilities: list[str]
    seeds: list[int]
    nll_all: torch.Tensor
    nll_without: torch.Tensor
    per_seed: torch.Tensor
    delta: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @property
    def beyond_noise(self) -> torch.Tensor:
        """(G, C) bool: the interval excludes 0. Of many cells, one in twenty does so without any effect."""
        return (self.low > 0) | (self.high < 0)


def leave_one_out_runs(
    sources: Sequence[str], seeds: Sequence[int], only: Sequence[str] | None = None
) -> list[LeaveOneOutRun]:
    """The (G + 1) x S runs, one seed after the other, so that the first finished ones are a whole experiment.

    Args:
        only: the sources that are left out in turn; by default each. All are read in any case.

    Raises:
        ValueError: fewer than two sources, no seed or one twice, or `only` names no source; the message names it.
    """
    if len(set(sources)) < 2:
        raise ValueError(f"sources: there is only {', '.join(sources) or 'none'}: with one left out, nothing is left")
    if unknown := sorted(set(only or ()) - set(sources)):
        raise ValueError(f"only: there is no source {unknown[0]!r}. The sources are {', '.join(sources)}")
    if only is not None and not only:
        raise ValueError("only: no source is named; without the field, each is left out in turn")
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"seeds={list(seeds)} must be one or more different whole numbers from 0 to 2**32 - 1")
    left_out = [None, *(name for name in sources if only is None or name in only)]
    return [LeaveOneOutRun(name, seed) for seed in seeds for name in left_out]


def equal_shares(
    run: LeaveOneOutRun, sources: Mapping[str, Dataset], draws: int, block_size: int = BLOCK_SIZE
) -> MixtureDataset:
    """What a run reads: rows of the sources that it has, in equal shares of tokens, none of them twice.

    The rows of a source come in an order that its place in `sources` and the seed decide, whichever run reads them.

    Raises:
        ValueError: the rows of a source do not suffice, see `check_no_repeats`.
    """
    check_no_repeats([run], sources, draws, block_size)
    return _mixture(run, sources, draws, block_size, max_epochs=1.0, on_max_epochs="limit")


def _mixture(run: LeaveOneOutRun, sources, draws: int, block_size: int, **limit) -> MixtureDataset:
    read = [name for name in sources if name != run.left_out]
    whole_blocks = -(-draws // block_size) * block_size  # in which alone shares are exact, and limits looked for
    weights = dict.fromkeys(read, 1 / len(read))
    return MixtureDataset(sources, weights, whole_blocks, seed=run.seed, block_size=block_size, **limit)


def check_no_repeats(
    runs: Sequence[LeaveOneOutRun], sources: Mapping[str, Dataset], draws: int, block_size: int = BLOCK_SIZE
) -> None:
    """Raises a ValueError that names the source whose rows do not suffice for one of the runs, and the remedies.

    Args:
        sources: name -> packed rows.
        draws: rows that a model reads: steps x batch x accumulation.
    """
    needed: dict[str, int] = dict.fromkeys(sources, 0)
    for run in runs:
        mixture = _mixture(run, sources, draws, block_size, max_epochs=math.inf)
        for name, draw in mixture.report().items():
            needed[name] = max(needed[name], draw.rows)
    if short := [name for name in sources if needed[name] > len(sources[name])]:
        name = min(short, key=lambda name: len(sources[name]) / needed[name])
        rest = f" Nor do those of {', '.join(other for other in short if other != name)}." if short[1:] else ""
        have, length = len(sources[name]), mixture.tokens_per_row[mixture.sources.index(name)]
        raise ValueError(
            f"sources: the {have:,} rows ({have * length:,.0f} tokens) of {name} do not suffice: in equal shares a "
            f"model would read {needed[name]:,} ({needed[name] * length:,.0f} tokens), some of them twice.{rest} "
            f"Lower max_steps or the batch to {math.floor(100 * have / needed[name])}% of what they are, give it more "
            "text, or take it out of sources"
        )


def train_run(
    run: LeaveOneOutRun,
    build_model: Callable[[int], PreTrainedModel],
    sources: Mapping[str, Dataset],
    probes: Mapping[str, Dataset],
    training: TrainingArguments,
    folder: str | Path,
    *,
    monitor_every: int | None = None,
    block_size: int = BLOCK_SIZE,
    keep_models: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> LeaveOneOutResult:
    """Trains a run's model with the stock Trainer, or takes it up at its last checkpoint; leaves `result.json`.

    Args:
        build_model: seed -> a new model. Torch is seeded already.
        sources: name -> packed rows, those of the source that is left out too.
        probes: capability -> rows whose NLL is traced.
        training: as a mixture needs them: `max_steps`, train_sampling_strategy="sequential",
            remove_unused_columns=False. Its seed and output_dir are replaced by the run's.
        folder: of all runs; this one's is `folder / run.name`.
        monitor_every: steps between two points of the curves, besides the first and the last; by default a twentieth.
        keep_models: whether the last checkpoint stays when the run is finished.

    Raises:
        ValueError: the rows of a source do not suffice, or the arguments do not do for a mixture.
        NonFiniteLossError: the loss or a probe's NLL is no number.
    """
    folder = Path(folder)
    draws = training.max_steps * draws_per_step(training)
    mixture = equal_shares(run, sources, draws, block_size)
    every = monitor_every or max(1, training.max_steps // 20)
    trainer, curves = train_on(mixture, build_model, probes, training, folder / run.name, run.seed, every, callbacks)
    rows = {name: draw.rows for name, draw in mixture.report(draws).items()}
    length = float(mixture.tokens_per_row.mean())
    result = LeaveOneOutResult(run, round(draws_per_step(training) * length), rows, curves)
    write_whole(result_file(run, folder), lambda path: path.write_text(_to_json(result)))
    trainer.accelerator.free_memory()  # the next model needs it
    if not keep_models:
        delete_checkpoints(folder / run.name)
    return result


def train_on(
    mixture: MixtureDataset,
    build_model: Callable[[int], PreTrainedModel],
    probes: Mapping[str, Dataset],
    training: TrainingArguments,
    folder: Path,
    seed: int,
    monitor_every: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Trainer, dict[str, list[tuple[int, float]]]]:
    """The stock Trainer after it has trained a model on a mixture whose weights stay, from its last checkpoint on.

    Args:
        folder: of this model alone; its checkpoints are in it.
        seed, training, build_model: as for `train_run`.

    Returns:
        The trainer, and probe -> [(step, NLL in nats per token), ...], before the first step, and to the last.
    """
    training = copy.copy(training)
    training.output_dir, training.seed, training.run_name = str(folder), seed, folder.name
    watch = ProbeNLLCallback(dict(probes), monitor_every, training.per_device_eval_batch_size)
    # Its weights never change, so whatever workers fetch ahead is right.
    reading = MixtureCallback(mixture, delay_steps=1_000_000, source_loss=False)
    set_seed(seed)
    used = [reading, watch, StopOnNonFiniteLoss(), *callbacks]
    trainer = Trainer(build_model(seed), training, train_dataset=mixture, callbacks=used)
    trainer.remove_callback(PrinterCallback)
    last = Workspace(folder.parent, {}).last_checkpoint(folder.name)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    found = probe_history(trainer.state.log_history)
    return trainer, {name: found[name] for name in probes}


def delete_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def result_file(run: LeaveOneOutRun, folder: str | Path) -> Path:
    return Path(folder) / run.name / "result.json"


def finished(runs: Sequence[LeaveOneOutRun], folder: str | Path) -> int:
    """How many of these runs have a result."""
    return sum(result_file(run, folder).exists() for run in runs)


def _to_json(result: LeaveOneOutResult) -> str:
    run = {"left_out": result.run.left_out, "seed": result.run.seed}
    return json.dumps(run | {name: value for name, value in vars(result).items() if name != "run"})


def read_results(runs: Sequence[LeaveOneOutRun], folder: str | Path) -> list[LeaveOneOutResult]:
    """What these runs have left.

    Raises:
        ValueError: one is not finished or its file is damaged; the message names it.
    """
    results = []
    for run in runs:
        file = result_file(run, folder)
        try:
            found = json.loads(file.read_text())
            curves = {name: [(step, nll) for step, nll in curve] for name, curve in found["curves"].items()}
            results.append(LeaveOneOutResult(run, found["tokens_per_step"], found["rows"], curves))
        except FileNotFoundError as error:
            raise ValueError(f"{file} is missing: the run on {run} is not finished") from error
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete it, and the model is trained again") from error
    return results


@contextmanager
def lock(file: str | Path, wait: bool = True) -> Iterator[bool]:
    """Whether this process has the file to itself until the end of the block; False only without `wait`."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:  # NFS locks files for writing only if they are open for it
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        try:
            yield mine
        finally:
            if mine:  # not only by closing it: a DataLoader's workers may have it open, too
                fcntl.flock(stream, fcntl.LOCK_UN)


def train_missing(
    runs: Sequence[LeaveOneOutRun],
    folder: str | Path,
    train: Callable[[LeaveOneOutRun], object],
    on_wait: Callable[[list[LeaveOneOutRun]], None] | None = None,
    poll_seconds: float = 1.0,
) -> None:
    """Calls `train` for every run without a result that no other process is at, until all runs have a result.

    A run is claimed by a lock on a file in its folder. While others train what is left, this waits, and takes over
    what a process that dies leaves.

    Args:
        train: leaves the run's `result.json`, as `train_run` does.
        on_wait: called with the runs that others are at, again and again while waiting (progress displays).
    """
    while missing := [run for run in runs if not result_file(run, folder).exists()]:
        claimed = False
        for run in missing:
            with lock(Path(folder) / run.name / "lock", wait=False) as mine:
                if mine:
                    claimed = True
                    if not result_file(run, folder).exists():  # which another process may have left meanwhile
                        train(run)
        if not claimed:
            if on_wait is not None:
                on_wait(missing)
            time.sleep(poll_seconds)


def effects(results: Sequence[LeaveOneOutResult]) -> LeaveOneOutEffect:
    """Equation (1) at the end of training, with its interval over seeds; sources and seeds in the order of `results`.

    Raises:
        ValueError: a run is missing for one of the seeds or has other probes, or an NLL is not finite; the
            message names the run.
    """
    names = list(results[0].curves)
    for result in results:
        if set(result.curves) != set(names):
            raise ValueError(f"the run on {result.run} has the probes {sorted(result.curves)}, not {sorted(names)}")
    # By name: a checkpoint sorts what it keeps, so that runs that were taken up again have another order.
    final = {result.run: [result.curves[name][-1][1] for name in names] for result in results}
    sources = list(dict.fromkeys(run.left_out for run in final if run.left_out is not None))
    seeds = list(dict.fromkeys(run.seed for run in final))
    for run in (LeaveOneOutRun(source, seed) for seed in seeds for source in (None, *sources)):
        if not all(map(math.isfinite, final.get(run, [math.nan]))):
            raise ValueError(f"the run on {run} is missing, or its NLL is not finite: {final.get(run)}")
    with_all = torch.tensor([final[LeaveOneOutRun(None, seed)] for seed in seeds], dtype=torch.float64)
    without = torch.tensor(
        [[final[LeaveOneOutRun(source, seed)] for source in sources] for seed in seeds], dtype=torch.float64
    )
    per_seed = without - with_all[:, None]
    delta, half = per_seed.mean(0), torch.full(per_seed.shape[1:], math.nan, dtype=torch.float64)
    if len(seeds) > 1:
        half = student_t_quantile(len(seeds) - 1) * per_seed.std(0) / math.sqrt(len(seeds))
    return LeaveOneOutEffect(sources, names, seeds, with_all, without, per_seed, delta, delta - half, delta + half)
