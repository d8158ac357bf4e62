"""What every arm of an audit trains, and every rival that finds its weights first: small models on one mixture each.

    proxy = Proxy(build_model, sources, tuning_probes, training, tokens_per_source(sources), proportional(sources))
    arm = train_mixture(proxy, {"code": 0.3, "math": 0.7}, seed=0, folder=Path("runs/audit/arms/mine-seed0"))
    arm.probe_nll["math"], arm.tokens                                   # nats per token, and what it cost

    runs = [MixtureRun(f"swarm-{number}", weights, seed=0) for number, weights in enumerate(swarm)]
    arms = train_mixtures(proxy, runs, Path("runs/audit/rivals/regmix"))    # shared with other processes

Models of one seed start alike and read the rows of each source in the same order. No source is read more often than
`max_epochs`, whatever its weight: what it cannot give the others give. A killed run goes on at its last checkpoint,
and a finished one is read from its `result.json`. Trained with the means of `influence/leave_one_out.py`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from mobilellm_hf.data.mixture import MAX_EPOCHS, MixtureDataset
from mobilellm_hf.influence.leave_one_out import (
    BLOCK_SIZE,
    delete_checkpoints,
    lock,
    result_file,
    train_missing,
    train_on,
)
from mobilellm_hf.training.live_mixture import draws_per_step
from mobilellm_hf.training.monitors import NonFiniteLossError
from mobilellm_hf.workspace import write_whole

Keep = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Proxy:
    """The experiment that all mixtures share.

    Attributes:
        build_model: seed -> a new model; torch is seeded already.
        sources: name -> packed rows (`input_ids`, and `labels`, `position_ids` if any).
        tuning_probes: name -> rows that a method may look at for its weights. No final probe shares text with them.
        training: of a model: max_steps, batch, learning rate; train_sampling_strategy="sequential",
            remove_unused_columns=False, as a mixture needs them. Its seed and output_dir are replaced.
        tokens_per_source: name -> tokens of its rows; of a stream, of those that were kept.
        proportional: name -> share of the tokens that there are, |D_j| over the sum; they sum to 1.
        max_epochs: how often a source may be read, in every arm.
    """

    build_model: Callable[[int], PreTrainedModel]
    sources: Mapping[str, Dataset]
    tuning_probes: Mapping[str, Dataset]
    training: TrainingArguments
    tokens_per_source: Mapping[str, int]
    proportional: Mapping[str, float]
    max_epochs: float = MAX_EPOCHS

    def with_learning_rate(self, learning_rate: float) -> Proxy:
        """The same experiment at another peak, the end of its schedule in proportion."""
        training = copy.copy(self.training)
        options = dict(training.lr_scheduler_kwargs or {})
        if "lr_end" in options:
            options["lr_end"] *= learning_rate / training.learning_rate
        training.learning_rate, training.lr_scheduler_kwargs = learning_rate, options
        return replace(self, training=training)


@dataclass(frozen=True)
class MixtureRun:
    """One model to train.

    Attributes:
        name: of its folder.
        weights: source -> share of the tokens; sources that it does not name are not read.
        steps, learning_rate: by default the proxy's max_steps and learning rate.
        keep: source -> (rows,) bool, which of them may be read; all rows of sources that it does not name.
    """

    name: str
    weights: Mapping[str, float]
    seed: int
    steps: int | None = None
    learning_rate: float | None = None
    keep: Keep | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class TrainedArm:
    """What a finished run leaves.

    Attributes:
        probe_nll: probe -> NLL of the trained model, nats per token.
        rows, epochs, tokens: source -> rows that were read of it, and how often that is all of it; tokens of all.
        model_folder: None unless the model was to be kept.
    """

    probe_nll: dict[str, float]
    rows: dict[str, int]
    tokens: int
    model_folder: Path | None
    epochs: dict[str, float]


def tokens_per_source(sources: Mapping[str, Dataset]) -> dict[str, int]:
    """source -> tokens of all of its rows."""
    return {name: sum(map(len, rows["input_ids"])) for name, rows in sources.items()}


def proportional(sources: Mapping[str, Dataset], source_tokens: Mapping[str, float] | None = None) -> dict[str, float]:
    """source -> its share of the tokens that there are.

    Args:
        source_tokens: source -> tokens that there are of it, where the rows are not all of them.
    """
    tokens = tokens_per_source(sources) | dict(source_tokens or {})
    total = sum(tokens.values())
    return {name: count / total for name, count in tokens.items()}


def build_mixture(proxy: Proxy, run: MixtureRun) -> MixtureDataset:
    """What a run reads.

    Raises:
        ValueError: the weights are no shares, or all sources together do not suffice within `max_epochs`.
    """
    draws = (run.steps or proxy.training.max_steps) * draws_per_step(proxy.training)
    whole_blocks = -(-draws // BLOCK_SIZE) * BLOCK_SIZE  # in which alone shares are exact, and limits looked for
    sources = dict(proxy.sources)
    for name, kept in (run.keep or {}).items():
        sources[name] = sources[name].select(np.flatnonzero(kept))
    return MixtureDataset(
        sources, run.weights, whole_blocks, seed=run.seed, block_size=BLOCK_SIZE, max_epochs=proxy.max_epochs,
        on_max_epochs="limit",
    )  # fmt: skip


def train_mixture(
    proxy: Proxy,
    weights: Mapping[str, float],
    seed: int,
    folder: Path,
    *,
    steps: int | None = None,
    probes: Mapping[str, Dataset] | None = None,
    keep_model: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    keep: Keep | None = None,
) -> TrainedArm:
    """Trains one model, or reads what an earlier call has left; waits while another process is at it.

    Args:
        weights: source -> share of the tokens.
        folder: of this model alone.
        steps: by default the proxy's max_steps.
        probes: what it is measured on at the end; by default the proxy's tuning probes.
        keep_model: leave the model in `folder / "model"`.
        keep: source -> (rows,) bool, which of them may be read.

    Raises:
        ValueError: the weights are no shares, the rows do not suffice, or the folder is of another run.
        NonFiniteLossError: the loss or a probe's NLL is no number.
    """
    folder = Path(folder)
    run = MixtureRun(folder.name, dict(weights), seed, steps, keep=keep)
    with lock(folder / "lock"):
        if keep_model and not (folder / "model").exists():
            result_file(run, folder.parent).unlink(missing_ok=True)
        if not result_file(run, folder.parent).exists():
            _train(proxy, run, folder.parent, probes, keep_model, callbacks)
    return read_arm(proxy, run, folder.parent)


def train_mixtures(
    proxy: Proxy,
    runs: Sequence[MixtureRun],
    folder: Path,
    *,
    probes: Mapping[str, Dataset] | None = None,
    keep_model: bool = False,
    callbacks: Callable[[MixtureRun], Sequence[TrainerCallback]] = lambda run: (),
    on_wait: Callable[[list[MixtureRun]], None] | None = None,
) -> list[TrainedArm]:
    """`train_mixture` of each run, in `folder / run.name`; any number of processes share them, each run trained once.

    Args:
        callbacks: run -> callbacks of its Trainer.
        on_wait: called with the runs that others are at, again and again while waiting.
    """
    folder = Path(folder)
    train_missing(
        runs, folder, lambda run: _train(proxy, run, folder, probes, keep_model, callbacks(run)), on_wait=on_wait
    )
    return [read_arm(proxy, run, folder) for run in runs]


def _train(proxy: Proxy, run: MixtureRun, folder: Path, probes, keep_model: bool, callbacks) -> None:
    """Leaves `result.json`; the caller has the folder to itself."""
    own, mixture = folder / run.name, build_mixture(proxy, run)
    if run.learning_rate is not None:
        proxy = proxy.with_learning_rate(run.learning_rate)
    training = copy.copy(proxy.training)
    training.max_steps = run.steps or training.max_steps
    probes = proxy.tuning_probes if probes is None else probes
    trainer, curves = train_on(
        mixture, proxy.build_model, probes, training, own, run.seed, training.max_steps, callbacks
    )
    final = {name: curve[-1][1] for name, curve in curves.items()}
    if not all(map(math.isfinite, final.values())):
        raise NonFiniteLossError(f"{own}: the trained model's NLL is {final}: lower the learning rate")
    if keep_model:
        for name in ("model", "model.partial"):
            shutil.rmtree(own / name, ignore_errors=True)
        trainer.save_model(own / "model.partial")
        (own / "model.partial").rename(own / "model")
    drawn = mixture.report(training.max_steps * draws_per_step(training))
    result = _identity(proxy, run) | {
        "probe_nll": final,
        "rows": {name: draw.rows for name, draw in drawn.items()},
        "epochs": {name: round(draw.epochs, 3) for name, draw in drawn.items()},
        "tokens": sum(draw.tokens for draw in drawn.values()),
    }
    write_whole(result_file(run, folder), lambda path: path.write_text(json.dumps(result)))
    trainer.accelerator.free_memory()  # the next model needs it
    delete_checkpoints(own)


def _identity(proxy: Proxy, run: MixtureRun) -> dict[str, Any]:
    """What of a run its result depends on, the proxy's data and model aside."""
    digest = hashlib.sha256()
    for name in sorted(run.keep or {}):
        digest.update(name.encode() + np.asarray(run.keep[name], dtype=bool).tobytes())
    return {
        "weights": {name: float(weight) for name, weight in run.weights.items()},
        "seed": run.seed,
        "steps": run.steps or proxy.training.max_steps,
        "learning_rate": run.learning_rate or proxy.training.learning_rate,
        "keep": digest.hexdigest() if run.keep else None,
    }


def read_arm(proxy: Proxy, run: MixtureRun, folder: Path) -> TrainedArm:
    """What a finished run has left in `folder / run.name`.

    Raises:
        ValueError: it is not finished, its file is damaged, or it is of other weights or settings.
    """
    file = result_file(run, folder)
    try:
        found = json.loads(file.read_text())
        for name, value in _identity(proxy, run).items():
            if found[name] != value:
                raise ValueError(
                    f"{file} is of a run with {name}={found[name]!r}, not {value!r}: give another folder, or delete it"
                )
        model = file.parent / "model"
        kept = model if model.exists() else None
        return TrainedArm(found["probe_nll"], found["rows"], found["tokens"], kept, found["epochs"])
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing: the run {run.name} is not finished") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): delete it, and the model is trained again") from error
