"""What a curation would cost, from a sample: documents a second of each model, times the documents that reach it.

Appendix D.3 of the paper counts 200 GPU hours for its representative sets, 6,800 for all that chooses data.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from rich.table import Table

from mobilellm_hf.curation.ask_llm import AskLLM
from mobilellm_hf.curation.quality import QualityClassifier
from mobilellm_hf.curation.scoring import OnDocuments
from mobilellm_hf.curation.stages import CurationStage

PAPER_HOURS = 200  # appendix D.3: hierarchical rejection sampling
WARM_UP = 4


@dataclass(frozen=True)
class StageCost:
    """Of one step: documents that reach it, those it scores a second on one device, the hours that takes, and what
    it leaves of each source."""

    name: str
    documents: float
    per_second: float
    left: Mapping[str, float]

    @property
    def hours(self) -> float:
        return self.documents / self.per_second / 3600


def estimate(
    stage: CurationStage, sample: Dataset, reaching: Mapping[str, float], on_documents: OnDocuments | None = None
) -> StageCost:
    """The cost of a step that runs a model, measured on a sample.

    What share a threshold keeps is measured too, source by source; a share that is a setting is taken as it is.

    Args:
        sample: documents of every source, a few dozen each; all of them are scored.
        reaching: source -> documents that reach the step.
    """
    texts, sources = sample["text"][:], np.asarray(sample["source"][:])
    stage.score(texts[:WARM_UP], sources[:WARM_UP].tolist())
    _synchronize()
    began = time.perf_counter()
    scores = stage.score(texts, sources.tolist(), on_documents)
    _synchronize()
    seconds = time.perf_counter() - began
    stage.release()
    left = {source: _kept(stage, count, scores, sources == source) for source, count in reaching.items()}
    return StageCost(stage.name, sum(reaching.values()), len(texts) / seconds, left)


def _kept(stage: CurationStage, reaching: float, scores: Mapping[str, np.ndarray], rows: np.ndarray) -> float:
    """How many of a source's documents a step leaves."""
    if isinstance(stage, AskLLM):
        return reaching * stage.top
    if isinstance(stage, QualityClassifier):
        # With one more of each kind, so that a source of which a small sample keeps none is not counted as nothing.
        return reaching * ((scores["score"][rows] > stage.threshold).sum() + 1) / (rows.sum() + 2)
    return min(reaching, stage.per_source or reaching)


def _synchronize() -> None:
    if PartialState().device.type == "cuda":
        torch.cuda.synchronize()


def _duration(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def cost_table(costs: Sequence[StageCost], device: str) -> Table:
    """A line a step, and the sum beside the paper's."""
    table = Table("step", title=f"Estimated cost on one {device}, from a sample", show_footer=True)
    table.columns[0].footer = f"all (the paper: {PAPER_HOURS} GPU hours)"
    for name in ("documents", "documents/s", "time"):
        table.add_column(name, justify="right")
    table.columns[3].footer = _duration(sum(cost.hours for cost in costs))
    for cost in costs:
        table.add_row(cost.name, f"{cost.documents:,.0f}", f"{cost.per_second:,.1f}", _duration(cost.hours))
    return table
