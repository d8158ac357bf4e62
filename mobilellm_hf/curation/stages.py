"""The steps of a curation: each maps a data set to a smaller one, and says why every document fell that did.

    kept = QualityClassifier("HuggingFaceFW/fineweb-edu-classifier", threshold=4.0)(documents)
    result = curate(documents, [quality, ask_llm, deduplication], "runs/curate")

A step that `curate` runs leaves a folder with its scores in shards and with `decisions.parquet`: a line a document
that reached it. What is finished there is never done again; what would come out otherwise (other documents, other
settings, another step before) has another key, and is.
"""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
from accelerate import PartialState
from datasets import Dataset

from mobilellm_hf.curation.scoring import (
    DocumentScorer,
    Rate,
    ShardedScores,
    documents_key,
    key_of,
    score_documents,
    sources_of,
)
from mobilellm_hf.workspace import write_whole

KEPT = ""
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)


class AllRejectedError(ValueError):
    """A step kept no document."""


@dataclass
class Verdict:
    """What a step says of its N documents.

    Attributes:
        fallen: (N,) int8, 0 for a document that stays, else 1 + the number of its reason.
        reasons: why documents fall, each as a few words.
        columns: further columns of `decisions.parquet`, each (N,): the score, first of all.
        references: columns of numbers of documents, -1 for none.
    """

    fallen: np.ndarray
    reasons: tuple[str, ...]
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    references: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def kept(self) -> np.ndarray:
        """(N,) bool."""
        return self.fallen == 0


@dataclass(frozen=True)
class StageInput:
    """What a step gets.

    Attributes:
        documents: N of them, with `text` and `source`.
        folder: for what is worth keeping on the way, such as shards of scores.
        documents_key: of the documents.
        key: of the documents and the step's settings.
        rate: follows the progress.
        scores: (N,) of the last step that gave scores, the higher the better; zeros if none did.
    """

    documents: Dataset
    folder: Path
    documents_key: str
    key: str
    rate: Rate
    scores: np.ndarray

    def scores_of(self, scorer: DocumentScorer, settings: dict[str, Any], per_shard: int) -> ShardedScores:
        """What a model says of every document, in shards in the folder.

        Args:
            settings: what decides the scores; where the threshold lies does not, and can be moved without a new pass.
        """
        key = key_of(self.documents_key, settings)
        return score_documents(self.documents, scorer, self.folder, key, per_shard, self.rate)


class CurationStage(ABC):
    """One step. Subclasses say what decides their verdict (`settings`) and give it (`decide`).

    Attributes:
        name: of the step's folder and of its line in the funnel.
    """

    name: str

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that decides the verdict, as JSON values."""

    @abstractmethod
    def decide(self, given: StageInput) -> Verdict:
        """The verdict. All processes call it; that of the first one counts."""

    def check(self) -> None:  # noqa: B027 - most steps have nothing to check
        """Raises a ValueError for what can be told before any document is read."""

    def release(self) -> None:  # noqa: B027 - most steps hold no model
        """Frees what was loaded."""

    def __call__(self, documents: Dataset, folder: str | Path | None = None) -> Dataset:
        """The documents that stay.

        Args:
            documents: with the columns `text` and `source`.
            folder: gets the decisions, and lets an interrupted step go on; by default nothing is left on disk.

        Raises:
            AllRejectedError: none stays.
        """
        if folder is not None:
            return curate(documents, [self], folder).documents
        with tempfile.TemporaryDirectory() as temporary:
            return curate(documents, [self], temporary).documents


@dataclass(frozen=True)
class StageReport:
    """Where a step's decisions are: a line a document that reached it, with its source and why it fell."""

    name: str
    decisions: Path

    def columns(self) -> list[str]:
        return pyarrow.parquet.read_schema(self.decisions).names

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Columns of the decisions: `document` (its number in what `curate` was given), `source`, `reason`, ..."""
        return pyarrow.parquet.read_table(self.decisions, columns=None if columns is None else list(columns))


@dataclass(frozen=True)
class Curation:
    """What `curate` returns.

    Attributes:
        documents: M that stay.
        numbers: (M,) their places in what was given.
        scores: (M,) of the last step that gave scores.
        reports: one a step.
    """

    documents: Dataset
    numbers: np.ndarray
    scores: np.ndarray
    reports: tuple[StageReport, ...]


def curate(
    documents: Dataset,
    stages: Sequence[CurationStage],
    folder: str | Path,
    on_stage: Callable[[CurationStage, int], Rate] | None = None,
) -> Curation:
    """Runs the steps in turn, each on what the one before has left.

    Args:
        documents: with the columns `text` and `source`; memory mapped, however many there are.
        folder: gets a subfolder a step. The same call goes on where an interrupted one stopped.
        on_stage: called before each step with the number of documents that reach it; returns who follows them.

    Raises:
        ValueError: there are no documents, or a column is missing.
        AllRejectedError: a step kept none; says which, and where its scores lie.
    """
    if missing := {"text", "source"} - set(documents.column_names):
        raise ValueError(f"documents have no column {min(missing)!r}; their columns: {documents.column_names}")
    if len(documents) == 0:
        raise ValueError("there are no documents to curate: every corpus is empty")
    for name in ("text", "source"):
        if nulls := documents.data.column(name).null_count:
            raise ValueError(f"documents: the column {name!r} is empty in {nulls:,} of them: drop those first")
    if twice := [stage.name for stage in stages if [s.name for s in stages].count(stage.name) > 1]:
        raise ValueError(f"two steps are called {twice[0]!r}: give one of them another name")
    for stage in stages:
        stage.check()
    numbers, scores = np.arange(len(documents)), np.zeros(len(documents), np.float32)
    key, reports = documents_key(documents), []
    for place, stage in enumerate(stages, 1):
        part = documents if len(numbers) == len(documents) else documents.select(numbers)
        rate = Rate() if on_stage is None else on_stage(stage, len(part))
        before, key = key, key_of(key, stage.settings())
        given = StageInput(part, Path(folder) / f"{place}-{stage.name}", before, key, rate, scores[numbers])
        report = _run(stage, given, numbers)
        kept = pa.compute.equal(report.table(["reason"])["reason"], KEPT).to_numpy()
        if "score" in report.columns():
            scores[numbers] = report.table(["score"])["score"].to_numpy()
        numbers = numbers[kept]
        reports.append(report)
    return Curation(documents.select(numbers), numbers, scores[numbers], tuple(reports))


def _run(stage: CurationStage, given: StageInput, numbers: np.ndarray) -> StageReport:
    file, state = given.folder / "decisions.parquet", PartialState()
    finished = _key_of_file(file) == given.key
    state.wait_for_everyone()  # nobody looks when somebody writes
    if finished:
        given.rate.found(len(numbers))
        return StageReport(stage.name, file)
    verdict = stage.decide(given)
    stage.release()
    if state.is_main_process and verdict.kept.any():
        write_whole(file, lambda path: _write_decisions(path, verdict, given, numbers))
    state.wait_for_everyone()
    if _key_of_file(file) != given.key:
        raise AllRejectedError(_all_rejected(stage, verdict))
    return StageReport(stage.name, file)


def _write_decisions(path: Path, verdict: Verdict, given: StageInput, numbers: np.ndarray) -> None:
    # With the last number standing for none, as -1 does in Python.
    with_none = np.append(numbers, -1)
    columns: Mapping[str, Any] = {
        "document": numbers,
        "source": pa.DictionaryArray.from_arrays(*sources_of(given.documents)),
        "reason": pa.DictionaryArray.from_arrays(pa.array(verdict.fallen), [KEPT, *verdict.reasons]),
        **verdict.columns,
        **{name: with_none[values] for name, values in verdict.references.items()},
    }
    pyarrow.parquet.write_table(pa.table(columns).replace_schema_metadata({"key": given.key}), path)


def _key_of_file(file: Path) -> str | None:
    try:
        metadata = pyarrow.parquet.read_schema(file).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return None
    return metadata.get(b"key", b"").decode()


def quantiles(scores: np.ndarray) -> str:
    """Those of the finite scores, as words."""
    values = np.nanquantile(scores, QUANTILES)
    return ", ".join(f"{q:.0%} {v:.4g}" for q, v in zip(QUANTILES, values, strict=True))


def _all_rejected(stage: CurationStage, verdict: Verdict) -> str:
    counts = np.bincount(verdict.fallen, minlength=len(verdict.reasons) + 1)[1:]
    why = ", ".join(f"{count:,} {reason}" for count, reason in zip(counts, verdict.reasons, strict=True) if count)
    message = f"the step {stage.name!r} kept none of {len(verdict.fallen):,} documents ({why})"
    if "score" in verdict.columns and np.isfinite(verdict.columns["score"]).any():
        message += f". Quantiles of the score: {quantiles(verdict.columns['score'])}"
    return f"{message}. Lower its threshold, or leave the step out; its settings: {stage.settings()}"


def top_of_each_source(scores: np.ndarray, sources: np.ndarray, share: float) -> np.ndarray:
    """(N,) bool: the best `share` of every source, at least one; of equal scores the first. NaN is never kept.

    Args:
        scores: (N,)
        sources: (N,) the number of each document's source.
    """
    kept = np.zeros(len(scores), bool)
    for number in np.unique(sources):
        rows = np.flatnonzero((sources == number) & ~np.isnan(scores))
        best = rows[np.argsort(-scores[rows], kind="stable")]
        kept[best[: int(np.ceil(round(share * len(rows), 9)))]] = True
    return kept


def map_texts(
    documents: Dataset, function: Callable[[list[str]], Mapping[str, Sequence]], num_proc: int | None
) -> dict[str, np.ndarray]:
    """Columns of what a function says of batches of texts, by `datasets` with `num_proc` processes; flat in memory."""
    texts = documents.select_columns("text")
    said = texts.map(function, input_columns="text", batched=True, num_proc=num_proc, remove_columns="text")
    return {name: said.with_format("numpy")[name][:] for name in said.column_names}
