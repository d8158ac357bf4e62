"""Drawing training rows from weighted sources.

Weights are shares of tokens, not of documents; rows are packed to one length, so they are shares of rows too. A source
is read in a random order and no row of it repeats before all were seen.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Muennighoff et al. (2305.16264): up to four epochs, repeated data are worth nearly as much as new ones.
MAX_EPOCHS = 4.0


@dataclass(frozen=True)
class SourceDraw:
    """What was drawn of one source: rows, and how often the source was read for it."""

    weight: float
    rows: int
    epochs: float


def draw_rows(
    dataset: Dataset, weights: Mapping[str, float], num_rows: int, seed: int = 0
) -> tuple[Dataset, dict[str, SourceDraw]]:
    """`num_rows` rows whose sources are drawn independently with the given weights; a pure function of its arguments.

    Args:
        dataset: packed rows with the column `source`.
        weights: source -> share of the rows; they sum to 1. Sources that are not named are not drawn.

    Returns:
        The rows in training order, and what was drawn of each source.

    Raises:
        ValueError: a weight is negative, the weights do not sum to 1, or a source with a weight has no rows.
    """
    if min(weights.values()) < 0 or abs(sum(weights.values()) - 1) > 1e-6:
        raise ValueError(f"mixture weights must be shares that sum to 1, not {dict(weights)}")
    sources = np.asarray(dataset["source"][:])
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(weights), size=num_rows, p=np.array(list(weights.values())) / sum(weights.values()))
    order = np.empty(num_rows, dtype=np.int64)
    report = {}
    for index, (name, weight) in enumerate(weights.items()):
        rows, places = np.flatnonzero(sources == name), np.flatnonzero(drawn == index)
        if weight > 0 and len(rows) == 0:
            raise ValueError(f"the mixture gives {name!r} a weight of {weight:.3f}, but the data set has no row of it")
        epochs = len(places) / max(1, len(rows))
        report[name] = SourceDraw(weight, len(places), epochs)
        if epochs > MAX_EPOCHS:
            logger.warning("%s is read %.1f times; rows repeated beyond %g teach little", name, epochs, MAX_EPOCHS)
        passes = [rng.permutation(rows) for _ in range(int(np.ceil(epochs)))]
        order[places] = np.concatenate(passes)[: len(places)] if passes else []
    return dataset.select(order), report
