"""The arms of an audit: the mixture that is asked about, and what it must be better than to be worth its cost.

    audited = load_weights("runs/influence/mixture.yaml", proxy.sources)
    arms = build_arms(audited, proxy.proportional, seeds=range(9), curation_share=0.176)
    runs = arm_runs(proxy, arms, range(9), [3e-3, 1.5e-3], curation_share=0.176)    # a MixtureRun each

    baselines   uniform; proportional to tokens; to the square root of tokens
    placebos    permuted, the audited weights dealt out to the sources at random; random, drawn from Dirichlet(1);
                similarity, weights by likeness to the probes alone
    rivals      weights that RegMix, MixMin, DoReMi or DoGE found, and of other tools

A placebo is drawn anew for every seed: so its figures stand for any permutation and any random mixture, and the test
counts their spread. All arms cost equally many tokens, what finding their weights cost included: an arm that cost
nothing to find trains longer, uniform by 17.6% against the paper's (whose curation took 6,800 GPU hours, beside the
38,600 of its training).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from mobilellm_hf.audit.proxy import MixtureRun, Proxy, build_mixture
from mobilellm_hf.data.source_weights import source_weights
from mobilellm_hf.training.live_mixture import draws_per_step

AUDITED = "mixture"
BASELINES = ("uniform", "proportional", "sqrt_tokens")
PLACEBOS = ("permuted", "random", "similarity")
# GPU hours of the paper that found the weights, over those of the training (28,000 + 10,000 + 600).
CURATION_SHARE = 6_800 / 38_600
# A share that the cap on repetition lowers by more is noted.
CUT_NOTED = 0.02
# Epochs that no source of a single row reaches.
NO_CAP = 1e9
# Permutations that are tried for one that changes the weights.
TRIES = 100

Weights = dict[str, float]


@dataclass(frozen=True)
class Arm:
    """A mixture to train, once a seed.

    Attributes:
        weights: seed -> source -> share of the tokens; alike for all seeds but of placebos.
        curation: what finding the weights cost, as a share of the training that they are for.
        details: what is worth noting of how they were found.
    """

    name: str
    kind: Literal["audited", "baseline", "placebo", "rival"]
    weights: Mapping[int, Weights]
    curation: float = 0.0
    details: Mapping[str, Any] | None = None


def load_weights(file: str | Path, sources: Sequence[str]) -> Weights:
    """Source -> share of the tokens, from a YAML or JSON file of name: weight, or one with a key `weights`.

    Args:
        sources: the names that there are. One without a weight gets 0.

    Raises:
        ValueError: the file cannot be read, its weights do not sum to 1 (or to 100, as percentages), or one is of a
            source that is not there; the message names the file and the source.
    """
    path = Path(file)
    try:
        document = _parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if isinstance(document, Mapping) and isinstance(document.get("weights"), Mapping):
        document = document["weights"]
    if not isinstance(document, Mapping) or not document:
        raise ValueError(f"{path} holds no weights: write source: share, or the same under a key weights")
    return check_weights(document, sources, str(path))


def _parse(text: str) -> Any:
    try:  # as JSON first: YAML would take its 1e-05 for a text
        return json.loads(text)
    except json.JSONDecodeError:
        return yaml.safe_load(text)


def check_weights(weights: Mapping[str, Any], sources: Sequence[str], place: str) -> Weights:
    """The weights as shares of every source; a ValueError that begins with `place` if they are none."""
    try:
        shares = source_weights([], dict(weights), list(sources))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return {name: shares.get(name, 0.0) for name in sources}


def baseline(name: str, tokens: Mapping[str, int]) -> Weights:
    """One of `BASELINES`.

    Args:
        tokens: source -> how many there are, or its share of them.
    """
    power = {"uniform": 0.0, "proportional": 1.0, "sqrt_tokens": 0.5}[name]
    values = {source: count**power for source, count in tokens.items()}
    total = math.fsum(values.values())
    return {source: value / total for source, value in values.items()}


def permuted(weights: Weights, seed: int) -> Weights:
    """The same weights, dealt out to the sources at random, and not as they are.

    Raises:
        ValueError: all weights are equal, so that there is no other way.
    """
    names, values = list(weights), np.array(list(weights.values()))
    if np.allclose(values, values[0]):
        raise ValueError("permuted: the weights of the mixture are all equal, so there is nothing to permute")
    rng = np.random.default_rng([seed, 0])
    orders = (rng.permutation(len(values)) for _ in range(TRIES))
    order = next(order for order in orders if not np.allclose(values[order], values))
    return dict(zip(names, values[order].tolist(), strict=True))


def random_weights(sources: Sequence[str], seed: int) -> Weights:
    """Drawn from Dirichlet(1): every mixture is as likely as any other."""
    drawn = np.random.default_rng([seed, 1]).dirichlet(np.ones(len(sources)))
    return dict(zip(sources, drawn.tolist(), strict=True))


def build_arms(
    audited: Weights,
    tokens: Mapping[str, int],
    seeds: Sequence[int],
    names: Sequence[str] = (*BASELINES, "permuted", "random"),
    found: Sequence[Arm] = (),
    curation_share: float = CURATION_SHARE,
) -> list[Arm]:
    """The audited mixture first, then baselines and placebos by name, then what others have found.

    Args:
        tokens: source -> how many there are, or its share of them.
        found: arms whose weights had to be found first: similarity, rivals, other tools'.
        curation_share: what finding the audited weights cost.

    Raises:
        ValueError: a name is none of the baselines and placebos, is there twice, or there is no such placebo.
    """
    sources = list(tokens)
    arms = [Arm(AUDITED, "audited", dict.fromkeys(seeds, audited), curation_share)]
    for name in names:
        if name in BASELINES:
            arms.append(Arm(name, "baseline", dict.fromkeys(seeds, baseline(name, tokens))))
        elif name == "permuted":
            arms.append(Arm(name, "placebo", {seed: permuted(audited, seed) for seed in seeds}))
        elif name == "random":
            arms.append(Arm(name, "placebo", {seed: random_weights(sources, seed) for seed in seeds}))
        else:
            raise ValueError(f"arms: there is no arm {name!r}; there are {', '.join((*BASELINES, *PLACEBOS))}")
    arms += found
    every = [arm.name for arm in arms]
    if twice := sorted({name for name in every if every.count(name) > 1}):
        raise ValueError(f"arms: {twice[0]} is there twice")
    return arms


def arm_steps(arm: Arm, max_steps: int, curation_share: float) -> int:
    """Training steps of an arm, so that with its curation it costs what the audited mixture costs with its own.

    The audited mixture trains max_steps, for max_steps x (1 + curation_share) in all.

    Raises:
        ValueError: its curation is no share.
    """
    if not 0 <= arm.curation < math.inf:
        raise ValueError(f"{arm.name}: its curation is {arm.curation}; it must be a share, 0 or more")
    return max(1, round(max_steps * (1 + curation_share) / (1 + arm.curation)))


def arm_runs(
    proxy: Proxy,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    learning_rates: Sequence[float],
    curation_share: float = CURATION_SHARE,
) -> dict[tuple[str, float, int], MixtureRun]:
    """(arm, learning rate, seed) -> the run, seed by seed, so that the first finished ones are a whole experiment.

    A run's name has a digest of its weights and steps: in one folder, the audit of another mixture finds the baselines
    trained already.

    Raises:
        ValueError: a mixture cannot be read within the cap on repetition; the message names the arm.
    """
    runs = {}
    for seed in seeds:
        for arm in arms:
            steps = arm_steps(arm, proxy.training.max_steps, curation_share)
            weights = arm.weights[seed]
            decided = json.dumps([sorted(weights.items()), steps])
            name = f"{arm.name}-{hashlib.sha256(decided.encode()).hexdigest()[:8]}-seed{seed}"
            try:
                build_mixture(proxy, MixtureRun(name, weights, seed, steps))
            except ValueError as error:
                raise ValueError(
                    f"{arm.name} cannot be trained with seed {seed}: {error}. Lower max_steps, give the sources more "
                    f"text, or raise max_epochs ({proxy.max_epochs:g})"
                ) from error
            for rate in learning_rates:
                runs[arm.name, rate, seed] = MixtureRun(f"{name}-lr{rate:g}", weights, seed, steps, rate)
    return runs


def training_notes(
    proxy: Proxy,
    arms: Sequence[Arm],
    runs: Mapping[tuple[str, float, int], MixtureRun],
    spent: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """What the arms were charged for curation, and where the cap on repetition changed what they read.

    Args:
        runs: (arm, learning rate, seed) -> run, as they were trained.
        spent: arm -> "rows", of each seed source -> how many were read.
    """
    notes = []
    if charged := [f"{arm.name} {arm.curation:.1%}" for arm in arms if arm.curation]:
        free = [arm.name for arm in arms if not arm.curation]
        notes.append(
            f"Charged for curation, as a share of the training: {', '.join(charged)}"
            + f"; {', '.join(free)} nothing, so that they trained longer" * bool(free)
            + "."
        )
    of_seed = {(arm, seed): run for (arm, _, seed), run in runs.items()}
    for arm in arms:
        rows = spent[arm.name]["rows"]
        cut = [part for seed, read in rows.items() for part in _cut(proxy, of_seed[arm.name, seed], read)]
        if cut:
            lost, source, asked = max(cut)
            notes.append(
                f"The cap on repetition changed {arm.name}: {source} gave {asked - lost:.1%} of the rows, instead of "
                f"{asked:.1%}."
            )
    return notes


def _cut(proxy: Proxy, run: MixtureRun, read: Mapping[str, int]) -> list[tuple[float, str, float]]:
    """The share of the rows that a source lost, its name, and the share that it would have given without a cap."""
    draws = (run.steps or proxy.training.max_steps) * draws_per_step(proxy.training)
    uncapped = build_mixture(replace(proxy, max_epochs=NO_CAP), run).report(draws)
    asked = {name: drawn.rows / draws for name, drawn in uncapped.items()}
    lost = {name: share - read.get(name, 0) / draws for name, share in asked.items()}
    return [(lost[name], name, asked[name]) for name in lost if lost[name] > CUT_NOTED]
