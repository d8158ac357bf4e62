"""The hierarchy of section 2.1.1: from raw corpora to at most ten thousand documents a source that stand for it.

    text -> quality classifier -> Ask-LLM -> Ask-LLM with the domain's prompt -> benchmarks -> deduplication

Every step is a `CurationStage` of its own; `hierarchy` puts them in the paper's order. What is not in the paper: the
first step, which drops what is no text before a model reads it, and the step that drops what benchmarks contain.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from accelerate import PartialState

from mobilellm_hf.curation.contamination import Benchmarks, contamination_report, find_contamination
from mobilellm_hf.curation.deduplication import THRESHOLD, Embedder, deduplicate
from mobilellm_hf.curation.scoring import OnDocuments, sources_of
from mobilellm_hf.curation.stages import CurationStage, StageInput, Verdict
from mobilellm_hf.data.ngrams import N
from mobilellm_hf.workspace import write_whole

PER_SOURCE = 10_000
COMBINED = "combined"


class SemanticDeduplication(CurationStage):
    """Keeps one of every set of documents that mean the same, in whichever sources they are, and `per_source` at most.

    The documents of all sources are visited together, the best of each first, so that of two alike the better judged
    one stays and no source is favoured by the order in which it is named.

    Args:
        threshold: cosine of two documents' embeddings from which on they are alike; see `deduplication`.
        per_source: documents of a source that stay at most; None for all.
    """

    def __init__(
        self,
        embedder: Embedder,
        threshold: float = THRESHOLD,
        per_source: int | None = PER_SOURCE,
        *,
        name: str = "deduplication",
        per_shard: int = 1_024,
    ):
        self.embedder, self.threshold, self.per_source = embedder, threshold, per_source
        self.name, self.per_shard = name, per_shard

    def settings(self) -> dict[str, Any]:
        limits = {"threshold": self.threshold, "per_source": self.per_source}
        return {"name": self.name, **self.embedder.settings(), **limits}

    def check(self) -> None:
        self.embedder.check()

    def release(self) -> None:
        self.embedder.release()

    def score(
        self, texts: Sequence[str], sources: Sequence[str], on_documents: OnDocuments | None = None
    ) -> dict[str, np.ndarray]:
        """`vector` (N, D) float16 and `truncated` (N,) bool."""
        vectors, truncated = self.embedder.embed(texts, on_documents)
        return {"vector": vectors.astype(np.float16), "truncated": truncated}

    def decide(self, given: StageInput) -> Verdict:
        scores = given.scores_of(self, self.embedder.settings(), self.per_shard)
        count = len(given.documents)
        sources, _ = sources_of(given.documents)
        if not PartialState().is_main_process:  # whose comparisons count
            return Verdict(np.zeros(count, np.int8), ())
        found = deduplicate(
            scores.vectors("vector"),
            self.threshold,
            order=best_of_each_first(given.scores, sources),
            groups=sources,
            group_limit=self.per_source,
        )
        fallen = np.where(found.kept, 0, np.where(found.over_limit, 2, 1)).astype(np.int8)
        alike = f"like another document (cosine {self.threshold:g} or more)"
        reasons = (alike, f"beyond {self.per_source} of its source")
        columns = {"similarity": found.similarity, "truncated": scores.column("truncated")}
        return Verdict(fallen, reasons, columns, {"like": found.duplicate_of})


def best_of_each_first(scores: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """(N,) the order in which the best document of every source comes first, then the second best of every source."""
    rank = np.empty(len(scores), np.int64)
    for number in np.unique(sources):
        rows = np.flatnonzero(sources == number)
        rank[rows[np.argsort(-scores[rows], kind="stable")]] = np.arange(len(rows))
    return np.lexsort((sources, rank))


class Decontamination(CurationStage):
    """Drops documents that share an n-gram of words with an item of a benchmark.

    Leaves `benchmarks.json` in the step's folder: documents and items found, benchmark by benchmark.

    Args:
        n: words.
        num_proc: processes; the work is `datasets`'.
    """

    def __init__(self, benchmarks: Benchmarks, n: int = N, *, num_proc: int | None = None, name: str = "benchmarks"):
        self.benchmarks, self.n, self.num_proc, self.name = benchmarks, n, num_proc, name

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "n": self.n, "benchmarks": self.benchmarks.digest()}

    def decide(self, given: StageInput) -> Verdict:
        with PartialState().main_process_first():  # the others find it in `datasets`' cache
            found = find_contamination(given.documents, self.benchmarks, self.n, self.num_proc)
        given.rate.found(len(given.documents))
        if PartialState().is_main_process:
            report = json.dumps(contamination_report(found, self.benchmarks), indent=2)
            write_whole(given.folder / "benchmarks.json", lambda path: path.write_text(report))
        columns = {"benchmark": found.benchmark, "item": found.item, "coverage": found.coverage}
        return Verdict(found.contaminated.astype(np.int8), (f"shares {self.n} words with a benchmark",), columns)


class AtMost(CurationStage):
    """Keeps the best documents of each source, at most so many; for a hierarchy without deduplication."""

    def __init__(self, per_source: int = PER_SOURCE, *, name: str = "limit"):
        self.per_source, self.name = per_source, name

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "per_source": self.per_source}

    def decide(self, given: StageInput) -> Verdict:
        sources, _ = sources_of(given.documents)
        fallen = np.ones(len(sources), np.int8)
        for number in np.unique(sources):
            rows = np.flatnonzero(sources == number)
            fallen[rows[np.argsort(-given.scores[rows], kind="stable")][: self.per_source]] = 0
        given.rate.found(len(fallen))
        return Verdict(fallen, (f"beyond {self.per_source:,} of its source",))


def domain_prompts(composition: Mapping[str, Sequence[str]], sources: Sequence[str]) -> dict[str, str]:
    """source -> its domain prompt: the capability's that it serves, or the combined one if it serves several or none.

    Args:
        composition: capability -> sources of its probe set.
    """
    served = {source: [c for c, names in composition.items() if source in names] for source in sources}
    return {source: capabilities[0] if len(capabilities) == 1 else COMBINED for source, capabilities in served.items()}
