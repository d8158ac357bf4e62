"""Probe sets of the capabilities, composed of representative sets, and kept apart from what models train on.

    probes, report = compose_probes(representative)         # source -> its representative set
    shared = shared_with_training(training, probes)
    training = keep_out(training, probes)                    # a data set or a stream

What is scored against a probe that contains it is found helpful for being the probe. So documents that a probe set
holds are left out of the training data: those that are equal but for white space, and those more than half of whose
13-grams of words occur in one probe set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mobilellm_hf.data.ngrams import N, SharedText, leave_out

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

_EVERYWHERE = ["cosmopedia", "natural_reasoning", "pes2o"]
# Section 2.1.1, in the catalog's names: a source that serves several capabilities is in the probe set of each.
PROBE_SOURCES: dict[str, list[str]] = {
    "code": ["starcoder", "stackexchange", "nemotron_code", *_EVERYWHERE],
    "math": ["open_web_math", "finemath", "algebraic_stack", "nemotron_math", *_EVERYWHERE],
    "knowledge": ["fineweb_edu", "wiki", "arxiv", "nemotron_science", *_EVERYWHERE],
}


@dataclass
class ProbeReport:
    """What probe sets are made of: capability -> source -> a count.

    Attributes:
        tokens: empty if no tokenizer was given.
        missing: capability -> sources of the composition that there was nothing of.
    """

    documents: dict[str, dict[str, int]] = field(default_factory=dict)
    characters: dict[str, dict[str, int]] = field(default_factory=dict)
    tokens: dict[str, dict[str, int]] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)


def compose_probes(
    representative: Mapping[str, Dataset],
    composition: Mapping[str, Sequence[str]] = PROBE_SOURCES,
    *,
    missing: str = "error",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[dict[str, Dataset], ProbeReport]:
    """Capability -> the union of its sources' representative sets, in the composition's order, and what is in it.

    Args:
        representative: source -> documents with a column `text`; those the composition does not name are left out.
        composition: capability -> sources.
        missing: "error", or "skip" to go without sources that `representative` lacks or has no documents of.
        tokenizer: counts tokens for the report, without special ones.

    Raises:
        ValueError: sources are missing, a capability is left without documents, or `missing` is neither word.
    """
    from datasets import concatenate_datasets

    if missing not in ("error", "skip"):
        raise ValueError(f"missing must be error or skip, not {missing!r}")
    present = {source for source, documents in representative.items() if len(documents)}
    absent = sorted({source for names in composition.values() for source in names} - present)
    if absent and missing == "error":
        raise ValueError(
            f"there are no representative documents of {', '.join(absent)}, which the probe sets are to have. There "
            f"are some of {', '.join(sorted(present)) or 'no source'}: give another composition, or missing='skip'"
        )
    sizes = {source: _sizes(representative[source], tokenizer) for source in sorted(present - set(absent))}
    probes, report = {}, ProbeReport()
    for capability, names in composition.items():
        sources = [source for source in dict.fromkeys(names) if source in present]
        if not sources:
            raise ValueError(f"the probe set of {capability} is empty: there is nothing of {', '.join(names)}")
        probes[capability] = concatenate_datasets([representative[source] for source in sources])
        report.missing[capability] = [source for source in names if source not in present]
        report.documents[capability] = {source: len(representative[source]) for source in sources}
        report.characters[capability] = {source: sizes[source][0] for source in sources}
        if tokenizer is not None:
            report.tokens[capability] = {source: sizes[source][1] for source in sources}
    return probes, report


def _sizes(documents: Dataset, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, int]:
    """Characters and tokens."""
    characters = tokens = 0
    for batch in documents.select_columns("text").iter(1_000):
        characters += sum(map(len, batch["text"]))
        if tokenizer is not None:
            tokens += sum(map(len, tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]))
    return characters, tokens


@dataclass(frozen=True)
class SharedDocuments:
    """Training documents that probe sets hold.

    Attributes:
        counts: capability -> documents of its probe set found in the training data.
        mask: (N,) bool, whether any probe set holds the document.
    """

    counts: dict[str, int]
    mask: np.ndarray


class _Finder:
    """A class, so that it pickles."""

    def __init__(self, shared: SharedText):
        self.shared = shared

    def __call__(self, texts: list[str]) -> dict[str, list[list[str]]]:
        return {"probes": [self.shared(text) for text in texts]}


def shared_with_training(
    training: Dataset, probes: Mapping[str, Dataset], n: int = N, num_proc: int | None = None
) -> SharedDocuments:
    """Which training documents a probe set holds, as the module's docstring says.

    Args:
        training: with a column `text`.
        probes: capability -> documents with a column `text`.
        n: words of an n-gram.
        num_proc: processes of `datasets.map`.
    """
    from datasets import Features, List, Value

    found = training.select_columns("text").map(
        _Finder(_shared_text(probes, n)),
        input_columns="text",
        batched=True,
        remove_columns="text",
        num_proc=num_proc,
        features=Features({"probes": List(Value("string"))}),
        desc="Looking for probes",
    )
    counts, mask = dict.fromkeys(probes, 0), np.zeros(len(training), bool)
    for row, names in enumerate(found["probes"]):
        mask[row] = bool(names)
        for name in names:
            counts[name] += 1
    return SharedDocuments(counts, mask)


def keep_out(
    training: Dataset | IterableDataset, probes: Mapping[str, Dataset], n: int = N, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """The training data without the documents that a probe set holds; the number left out is logged.

    Args:
        training, probes, n: as for `shared_with_training`; a stream is filtered as it is read.
        num_proc: processes, of a data set.
    """
    return leave_out(training, _shared_text(probes, n), "the training data", num_proc)


def _shared_text(probes: Mapping[str, Dataset], n: int) -> SharedText:
    return SharedText({name: probe["text"] for name, probe in probes.items()}, n)
