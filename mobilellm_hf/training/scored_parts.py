"""The scores of a round in parts on disk, so that a kill in the middle of a long round loses one part of it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from mobilellm_hf.data.mixture import MixtureDataset
from mobilellm_hf.influence.scorer import InfluenceScorer
from mobilellm_hf.workspace import write_whole

ROWS_PER_PART = 1024


class ScoredParts:
    """One process's share of a round.

    Args:
        folder: where parts are kept until the round is over.
        label: what tells this round and this process's share from others.
        scorer: a part that another model, or another probe, has scored is scored again.
    """

    def __init__(self, folder: Path, label: str, scorer: InfluenceScorer):
        self.folder, self.label, self.scorer = folder, label, scorer
        norms = [value.double().norm() for value in scorer.directions.values()]
        self._model = torch.stack(norms).cpu()

    def score(self, mixture: MixtureDataset, rows: np.ndarray, batch_size: int) -> torch.Tensor:
        """(N, C) scores of the rows with these `row_id`; what is on disk is not scored again."""
        parts = [torch.empty(0, len(self.scorer.capabilities), dtype=torch.float64)]
        for file, ids in self._parts(rows):
            found = self._read(file, ids)
            if found is None:
                found = self._score(mixture.select(ids), batch_size)
                saved = {"rows": torch.from_numpy(ids), "model": self._model, "scores": found}
                write_whole(file, lambda path, saved=saved: torch.save(saved, path))
            parts.append(found)
        return torch.cat(parts)

    def _score(self, rows: Dataset, batch_size: int) -> torch.Tensor:
        return self.scorer.score(rows, batch_size, allow_overlap=True)

    def remove(self) -> None:
        """To be called when the round is over."""
        for file in self.folder.glob(f"scored-{self.label}-*.pt"):
            file.unlink(missing_ok=True)

    def _parts(self, rows: np.ndarray) -> Iterator[tuple[Path, np.ndarray]]:
        for number, start in enumerate(range(0, len(rows), ROWS_PER_PART)):
            yield self.folder / f"scored-{self.label}-{number:06d}.pt", rows[start : start + ROWS_PER_PART]

    def _read(self, file: Path, ids: np.ndarray) -> torch.Tensor | None:
        if not file.exists():
            return None
        saved = torch.load(file)
        same = torch.equal(saved["rows"], torch.from_numpy(ids)) and torch.equal(saved["model"], self._model)
        return saved["scores"] if same else None
