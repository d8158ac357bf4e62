"""What a rival returns, what it checks before it trains anything, and how far it is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback

from mobilellm_hf.audit.proxy import MixtureRun, Proxy
from mobilellm_hf.influence.leave_one_out import result_file
from mobilellm_hf.nll import IGNORED_LABEL
from mobilellm_hf.progress import Stage
from mobilellm_hf.training.live_mixture import draws_per_step


@dataclass(frozen=True)
class RivalWeights:
    """The mixture that a method has found.

    Attributes:
        weights: source -> share of the tokens; they sum to 1.
        tokens: that models were trained on, and those that were only passed forward, to find them.
        details: figures of the method, as plain JSON values.
    """

    weights: dict[str, float]
    tokens: int
    details: dict[str, Any]


def named_weights(proxy: Proxy, weights: np.ndarray) -> dict[str, float]:
    """source -> weight, of an array in the order of the proxy's sources; rounding is taken out of the sum."""
    weights = np.asarray(weights, dtype=float)
    return dict(zip(proxy.sources, (weights / weights.sum()).tolist(), strict=True))


def proportional_weights(proxy: Proxy) -> np.ndarray:
    """(sources,) in the order of the proxy's sources."""
    return np.array([proxy.proportional[name] for name in proxy.sources], dtype=float)


def check_proxy(proxy: Proxy, probes: bool = True) -> None:
    """Raises a ValueError that names what a rival cannot do with.

    Args:
        probes: whether the method looks at the tuning probes.
    """
    if len(proxy.sources) < 2:
        raise ValueError(f"sources: a mixture needs two or more, not {', '.join(proxy.sources) or 'none'}")
    for field in ("tokens_per_source", "proportional"):
        if set(getattr(proxy, field)) != set(proxy.sources):
            raise ValueError(
                f"{field} names {', '.join(sorted(getattr(proxy, field))) or 'nothing'}; "
                f"the sources are {', '.join(sorted(proxy.sources))}"
            )
    shares = proportional_weights(proxy)
    if not (np.isfinite(shares).all() and (shares > 0).all() and abs(shares.sum() - 1) < 1e-6):
        raise ValueError(f"proportional must be positive shares that sum to 1, not {dict(proxy.proportional)}")
    if empty := [name for name, rows in proxy.sources.items() if len(rows) == 0]:
        raise ValueError(f"the source {empty[0]!r} has no rows: take it out, or give it text")
    if probes:
        _check_probes(proxy)


def _check_probes(proxy: Proxy) -> None:
    if not proxy.tuning_probes:
        raise ValueError("tuning_probes: there is none, and this method finds its weights by them")
    for name, rows in proxy.tuning_probes.items():
        if len(rows) == 0:
            raise ValueError(f"the tuning probe {name!r} has no rows: give it text")
        if "labels" in rows.column_names:
            predicted = any(label != IGNORED_LABEL for labels in rows["labels"] for label in labels[1:])
        else:
            predicted = any(len(ids) > 1 for ids in rows["input_ids"])
        if not predicted:
            raise ValueError(f"the tuning probe {name!r} has no predicted token: every label is {IGNORED_LABEL}")


def probe_tokens(proxy: Proxy) -> int:
    """Of one pass over all tuning probes."""
    return sum(count_tokens(rows) for rows in proxy.tuning_probes.values())


def count_tokens(rows: Dataset) -> int:
    return sum(map(len, rows["input_ids"]))


def run_tokens(proxy: Proxy) -> int:
    """That a model of `max_steps` steps is trained on, by the mean length of all rows."""
    rows = sum(len(source) for source in proxy.sources.values())
    length = sum(proxy.tokens_per_source.values()) / rows
    return round(proxy.training.max_steps * draws_per_step(proxy.training) * length)


def repetition_caps(proxy: Proxy, target_tokens: int | None) -> np.ndarray:
    """(sources,) the largest weight that reads no source more than `max_epochs` times.

    Args:
        target_tokens: T, of the training that the weights are for; by default a proxy's own.

    Raises:
        ValueError: T is more than all sources can give.
    """
    target = run_tokens(proxy) if target_tokens is None else target_tokens
    if target < 1:
        raise ValueError(f"target_tokens={target} must be the tokens of the training that the weights are for")
    available = np.array([proxy.tokens_per_source[name] for name in proxy.sources], dtype=float)
    caps = proxy.max_epochs * available / target
    if caps.sum() < 1:
        raise ValueError(
            f"a training of {target:,} tokens reads the {available.sum():,.0f} tokens of all sources more than "
            f"{proxy.max_epochs:g} times: add data, raise max_epochs, or train on at most "
            f"{math.floor(proxy.max_epochs * available.sum()):,} tokens"
        )
    return caps


def read_json(file: Path, what: str) -> dict[str, Any]:
    """The file of a finished run.

    Raises:
        ValueError: it is missing or damaged; the message says what to delete.
    """
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file}, {what}, is missing or damaged ({error}): delete {file.parent}, and the model is trained again"
        ) from error


class RunsProgress:
    """Moves a stage's bar over the steps of several models, whichever process trains them.

    Example:
        >>> progress = RunsProgress(stage, proxy, runs, folder)
        >>> train_mixtures(proxy, runs, folder, callbacks=progress.callbacks, on_wait=progress.on_wait)
    """

    def __init__(self, stage: Stage | None, proxy: Proxy, runs: Sequence[MixtureRun], folder: Path):
        self.stage, self._runs, self._folder = stage, runs, folder
        self._steps = {run.name: run.steps or proxy.training.max_steps for run in runs}
        if stage is not None:
            stage.expect(sum(self._steps.values()))
            self.reach(0)

    def reach(self, steps: int) -> None:
        """Of the model in training; those of finished ones are counted here."""
        if self.stage is not None:
            finished = [run for run in self._runs if result_file(run, self._folder).exists()]
            self.stage.reach(sum(self._steps[run.name] for run in finished) + steps)
            self.stage.say(f"{len(finished)} of {len(self._runs)} models")

    def callbacks(self, run: MixtureRun) -> list[TrainerCallback]:
        return [] if self.stage is None else [_StepProgress(self)]

    def on_wait(self, missing: Sequence[MixtureRun]) -> None:
        self.reach(0)


class _StepProgress(TrainerCallback):
    def __init__(self, progress: RunsProgress):
        self._progress = progress

    def on_step_end(self, args, state, control, **kwargs):
        self._progress.reach(state.global_step)
