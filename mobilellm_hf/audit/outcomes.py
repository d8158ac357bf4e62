"""From trained arms to what is compared: bits per byte on final probes, and the audited mixture against each arm.

    bits = probe_size(rows, tokenizer).bits_per_byte(arm.probe_nll["math"])
    outcomes, spent = read_outcomes(proxy, arms, runs, folder, sizes, ["code", "math"], ["poems"])
    for comparison in compare(outcomes):
        comparison.other, comparison.learning_rate, comparison.result, comparison.final.mean, comparison.worst

One figure decides: the mean over the final probes, against every other arm, corrected for their number by Holm. That
of the domains which nobody scored has a correction of its own. The worst domain is picked among all of them after
the fact: its interval is as wide as it looks, and it is no test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from mobilellm_hf.audit.arms import Arm
from mobilellm_hf.audit.proxy import MixtureRun, Proxy, read_arm
from mobilellm_hf.audit.statistics import ALPHA, PairedDifference, holm, paired_difference
from mobilellm_hf.nll import IGNORED_LABEL

BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"


@dataclass(frozen=True)
class ProbeSize:
    """How many tokens of a probe are predicted, and the bytes of their text."""

    tokens: int
    bytes: int

    def bits_per_byte(self, nll: float) -> float:
        """nll: nats per token."""
        return nll * self.tokens / (self.bytes * math.log(2))


def probe_size(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> ProbeSize:
    """Of packed rows. Special tokens are predicted, but are no text; a character cut by a row's end counts 3 bytes.

    Raises:
        ValueError: nothing is predicted, or what is predicted is no text.
    """
    tokens = size = 0
    labels = "labels" if "labels" in rows.column_names else "input_ids"
    for values in rows[labels]:
        predicted = [label for label in values[1:] if label != IGNORED_LABEL]
        tokens += len(predicted)
        size += len(tokenizer.decode(predicted, skip_special_tokens=True).encode())
    if not size:
        raise ValueError(f"{tokens} tokens of {size} bytes: there is no text to be predicted")
    return ProbeSize(tokens, size)


@dataclass(frozen=True)
class Outcomes:
    """What all arms have left.

    Attributes:
        arms: the audited one first.
        final, unscored: names of the probes, which together are the last dimension of `bits`.
        bits: (A, L, S, P) bits per byte.
    """

    arms: Sequence[Arm]
    learning_rates: Sequence[float]
    seeds: Sequence[int]
    final: Sequence[str]
    unscored: Sequence[str]
    bits: np.ndarray

    @property
    def probes(self) -> list[str]:
        return [*self.final, *self.unscored]


def read_outcomes(
    proxy: Proxy,
    arms: Sequence[Arm],
    runs: Mapping[tuple[str, float, int], MixtureRun],
    folder: Path,
    sizes: Mapping[str, ProbeSize],
    final: Sequence[str],
    unscored: Sequence[str],
) -> tuple[Outcomes, dict[str, dict[str, Any]]]:
    """What the finished runs in a folder have left, and arm -> steps, tokens, and rows and epochs by seed and source.

    Args:
        runs: (arm, learning rate, seed) -> run.

    Raises:
        ValueError: a run is not finished, or its file is damaged.
    """
    rates, seeds = (list(dict.fromkeys(key[place] for key in runs)) for place in (1, 2))
    probes, spent = [*final, *unscored], {}
    bits = np.zeros((len(arms), len(rates), len(seeds), len(probes)))
    for place in np.ndindex(bits.shape[:3]):
        arm, rate, seed = arms[place[0]].name, rates[place[1]], seeds[place[2]]
        run = runs[arm, rate, seed]
        found = read_arm(proxy, run, folder)
        bits[place] = [sizes[name].bits_per_byte(found.probe_nll[name]) for name in probes]
        own = spent.setdefault(arm, {"steps": run.steps, "tokens": found.tokens, "rows": {}, "epochs": {}})
        own["rows"][seed], own["epochs"][seed] = found.rows, found.epochs
    return Outcomes(arms, rates, seeds, final, unscored, bits), spent


@dataclass(frozen=True)
class Comparison:
    """The audited mixture minus another arm at one learning rate, in bits per byte: below 0 the mixture is better.

    Attributes:
        other, kind: the arm's.
        final, unscored: the mean over these probes; `unscored` is None if there are none.
        p_value, unscored_p_value: adjusted by Holm for the number of arms.
        per_probe: by name.
        result: "better", "worse" or "undecided", of `final`.
        unscored_result: the same of `unscored`.
    """

    other: str
    kind: str
    learning_rate: float
    final: PairedDifference
    p_value: float
    unscored: PairedDifference | None
    unscored_p_value: float
    per_probe: dict[str, PairedDifference]
    alpha: float = ALPHA

    @property
    def result(self) -> str:
        return _result(self.final, self.p_value, self.alpha)

    @property
    def unscored_result(self) -> str:
        return UNDECIDED if self.unscored is None else _result(self.unscored, self.unscored_p_value, self.alpha)

    @property
    def worst(self) -> str:
        """The probe on which the mixture does worst against this arm."""
        return max(self.per_probe, key=lambda name: self.per_probe[name].mean)


def _result(difference: PairedDifference, p_value: float, alpha: float) -> str:
    if p_value > alpha:
        return UNDECIDED
    return BETTER if difference.mean < 0 else WORSE


def compare(outcomes: Outcomes, alpha: float = ALPHA) -> list[Comparison]:
    """Every other arm at every learning rate, in their order."""
    found = []
    count = len(outcomes.final)
    for place, learning_rate in enumerate(outcomes.learning_rates):
        bits = outcomes.bits[:, place]  # (A, S, P)
        final = _against_all(bits, lambda of_arm: of_arm[:, :count].mean(1))
        unscored = _against_all(bits, lambda of_arm: of_arm[:, count:].mean(1)) if outcomes.unscored else None
        adjusted = holm([difference.p_value for difference in final])
        unscored_adjusted = holm([difference.p_value for difference in unscored or ()])
        for number, arm in enumerate(outcomes.arms[1:]):
            per_probe = {
                name: paired_difference(bits[0, :, probe], bits[number + 1, :, probe])
                for probe, name in enumerate(outcomes.probes)
            }
            found.append(
                Comparison(
                    arm.name, arm.kind, learning_rate, final[number], adjusted[number],
                    unscored[number] if unscored else None, unscored_adjusted[number] if unscored else math.nan,
                    per_probe, alpha,
                )
            )  # fmt: skip
    return found


def _against_all(bits: np.ndarray, figure: Callable[[np.ndarray], np.ndarray]) -> list[PairedDifference]:
    """bits: (A, S, P); figure: (S, P) -> (S,)."""
    audited = figure(bits[0])
    return [paired_difference(audited, figure(other)) for other in bits[1:]]
