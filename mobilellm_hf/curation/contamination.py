"""Documents that contain what models are tested on: found by n-grams of words, named by benchmark and item.

    benchmarks = load_benchmarks(["gsm8k", {"name": "ours", "path": "items.jsonl", "columns": ["question"]}])
    found = find_contamination(documents, benchmarks, num_proc=8)
    clean = documents.select((~found.contaminated).nonzero()[0])
    print(contamination_report(found, benchmarks))

A document falls if it shares 13 words in a row with an item, the rule of GPT-3 (arXiv 2005.14165, appendix C). One
shared span is enough, since the question alone, in a long document, gives an item away. Items of 8 to 12 words are
looked for as a whole; shorter ones are found only in documents that are nothing else.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mobilellm_hf.data.local_files import CorpusError, check_file, find_files
from mobilellm_hf.data.ngrams import N, NgramIndex

if TYPE_CHECKING:
    from datasets import Dataset

LOCAL_KEYS = ("name", "path", "columns", "split")


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is on the Hub, and the columns that make up an item's text. Lists of strings count too."""

    hub_id: str
    columns: tuple[str, ...]
    subset: str | None = None
    split: str = "test"
    revision: str | None = None


_CHOICES = ("question", "choices.text")
# Those of Tables 8 and 9. Ids, splits and columns are those by which public evaluation code reads them; none was
# loaded here. Of BoolQ the passages are left out: they are Wikipedia, which is a corpus of its own.
BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", ("question", "answer"), "main"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", ("problem", "solution")),
    "aime24": Benchmark("math-ai/aime24", ("problem",)),
    "aime25": Benchmark("math-ai/aime25", ("problem",)),
    "humaneval": Benchmark("openai/openai_humaneval", ("prompt", "canonical_solution")),
    "mbpp": Benchmark("google-research-datasets/mbpp", ("text", "code"), "full"),
    # A copy in Parquet: the original's loading script is refused by datasets 4 and later.
    "livecodebench": Benchmark("lighteval/code_generation_lite", ("question_content",), "release_v6"),
    "mmlu": Benchmark("cais/mmlu", ("question", "choices"), "all"),
    "arc_easy": Benchmark("allenai/ai2_arc", _CHOICES, "ARC-Easy"),
    "arc_challenge": Benchmark("allenai/ai2_arc", _CHOICES, "ARC-Challenge"),
    "boolq": Benchmark("google/boolq", ("question",), split="validation"),
    "piqa": Benchmark("baber/piqa", ("goal", "sol1", "sol2"), split="validation"),
    # The Hub's own conversion to Parquet, for the same reason.
    "siqa": Benchmark(
        "allenai/social_i_qa",
        ("context", "question", "answerA", "answerB", "answerC"),
        split="validation",
        revision="refs/convert/parquet",
    ),
    "hellaswag": Benchmark("Rowan/hellaswag", ("ctx", "endings"), split="validation"),
    "openbookqa": Benchmark("allenai/openbookqa", ("question_stem", "choices.text"), "main"),
    "winogrande": Benchmark("allenai/winogrande", ("sentence", "option1", "option2"), "winogrande_xl", "validation"),
}


@dataclass(frozen=True)
class Benchmarks:
    """Name -> the texts of its items."""

    items: Mapping[str, Sequence[str]]

    def digest(self) -> str:
        """What identifies them: equal if and only if names and texts are."""
        found = hashlib.blake2b(digest_size=16)
        for name, texts in self.items.items():
            found.update(json.dumps([name, *texts]).encode())
        return found.hexdigest()


def load_benchmarks(entries: Sequence[str | Mapping[str, Any]]) -> Benchmarks:
    """Loads benchmarks by name from the Hub, or from local copies.

    Args:
        entries: names from `BENCHMARKS`, or `{name, path, columns}`: a file, folder or pattern (.jsonl, .json,
            .parquet, .txt) and the columns that make up an item. For a name in `BENCHMARKS` the columns may be left
            out. A column in another is written "choices.text".

    Raises:
        CorpusError: an entry is not written so, a benchmark is unknown, or a file, column or text is missing.
    """
    items: dict[str, list[str]] = {}
    for entry in entries:
        given = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(given, Mapping) or "name" not in given or set(given) - set(LOCAL_KEYS):
            raise CorpusError(f"a benchmark is a name or has the fields {', '.join(LOCAL_KEYS)}, unlike {entry!r}")
        name, known = given["name"], BENCHMARKS.get(given["name"])
        if name in items:
            raise CorpusError(f"the benchmark {name} is named twice")
        if "path" not in given and known is None:
            close = difflib.get_close_matches(str(name), BENCHMARKS, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise CorpusError(
                f"There is no benchmark {name!r}.{hint} There are {', '.join(BENCHMARKS)}; give others a path."
            )
        columns = given.get("columns") or (known.columns if known else None)
        if not columns:
            raise CorpusError(f"the benchmark {name} needs columns: those that make up an item's text")
        columns = [columns] if isinstance(columns, str) else list(columns)
        dataset, place = _load_local(given["path"]) if "path" in given else _load_hub(name, known, given.get("split"))
        items[name] = list(_texts(dataset, place, columns))
        if not any(text.strip() for text in items[name]):
            raise CorpusError(f"{place}: no item has any text in {', '.join(columns)}")
    return Benchmarks(items)


def _load_local(path: str) -> tuple[Dataset, str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    loader, files = find_files(str(path))
    for file in files:
        check_file(file, None)
    try:
        return load_dataset(loader, data_files=[str(file.resolve()) for file in files], split="train"), str(path)
    except (OSError, ValueError, DatasetsError) as error:
        for file in files:
            check_file(file, None, limit=None)
        raise CorpusError(f"{path} could not be read: {error.__cause__ or error}") from error


def _load_hub(name: str, benchmark: Benchmark, split: str | None) -> tuple[Dataset, str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(
            benchmark.hub_id, benchmark.subset, split=split or benchmark.split, revision=benchmark.revision
        )
    except (OSError, ValueError, DatasetsError) as error:
        raise CorpusError(
            f"The benchmark {name} could not be loaded from {benchmark.hub_id} on the Hub: {error}. Check the "
            f"connection (HF_HUB_OFFLINE must not be 1), or give a local copy: {{name: {name}, path: items.jsonl}}."
        ) from error
    return dataset, benchmark.hub_id


def _texts(dataset: Dataset, place: str, columns: Sequence[str]) -> Iterator[str]:
    for column in columns:
        if column.split(".")[0] not in dataset.column_names:
            raise CorpusError(f"{place} has no column {column!r}. Its columns: {', '.join(dataset.column_names)}.")
    for row in dataset:
        parts: list[str] = []
        for column in columns:
            value: Any = row
            for key in column.split("."):
                if not isinstance(value, Mapping) or key not in value:
                    raise CorpusError(f"{place}: the column {column!r} has no {key!r} in {value!r}")
                value = value[key]
            parts += map(str, value) if isinstance(value, list) else [] if value is None else [str(value)]
        yield "\n".join(parts)


@dataclass(frozen=True)
class Contamination:
    """What N documents share with benchmarks.

    Attributes:
        benchmark: (N,) of str, the benchmark that covers most of the document; "" for a clean one.
        item: (N,) int64, the first of its items that the document shares a span with, else -1.
        coverage: (N,) float32, the share of the document's n-grams that occur in that benchmark. It is 0 where only
            an item of fewer than n words occurs.
        hits: benchmark -> the documents, and the items, of every pair that shares a span; both (pairs,) int64.
    """

    benchmark: np.ndarray
    item: np.ndarray
    coverage: np.ndarray
    hits: dict[str, tuple[np.ndarray, np.ndarray]]

    @property
    def contaminated(self) -> np.ndarray:
        """(N,) bool."""
        return self.item >= 0


class _Finder:
    """A class, so that it pickles."""

    def __init__(self, index: NgramIndex, min_coverage: float):
        self.index, self.min_coverage = index, min_coverage

    def __call__(self, texts: list[str]) -> dict[str, list]:
        columns: dict[str, list] = {"benchmarks": [], "items": [], "coverages": []}
        for text in texts:
            found = self.index.matches(text)
            hits = [(name, item) for name, item in found.items if found.coverage[name] >= self.min_coverage]
            columns["benchmarks"].append([name for name, _ in hits])
            columns["items"].append([item for _, item in hits])
            columns["coverages"].append([found.coverage[name] for name, _ in hits])
        return columns


def find_contamination(
    documents: Dataset,
    benchmarks: Benchmarks,
    n: int = N,
    num_proc: int | None = None,
    min_coverage: float = 0.0,
) -> Contamination:
    """Which benchmark and item each document shares an n-gram with.

    Args:
        documents: with a column `text`.
        n: words in a row. GPT-3 took 8 to 13, by the length of a benchmark's items; fewer find more by chance.
        num_proc: processes of `datasets.map`, which also keeps what they find on disk.
        min_coverage: the least share of a document's n-grams that must occur in a benchmark; 0 asks for one.
    """
    from datasets import Features, List, Value

    finder = _Finder(NgramIndex.build(benchmarks.items, n), min_coverage)
    features = {"benchmarks": Value("string"), "items": Value("int64"), "coverages": Value("float32")}
    shared = documents.select_columns("text").map(
        finder,
        input_columns="text",
        batched=True,
        remove_columns="text",
        num_proc=num_proc,
        features=Features({name: List(kind) for name, kind in features.items()}),
        desc="Looking for benchmarks",
    )
    count = len(documents)
    found = Contamination(np.full(count, "", object), np.full(count, -1, np.int64), np.zeros(count, np.float32), {})
    hits: dict[str, list[tuple[int, int]]] = {name: [] for name in benchmarks.items}
    for document, row in enumerate(shared):
        for name, item in zip(row["benchmarks"], row["items"], strict=True):
            hits[name].append((document, item))
        if row["items"]:
            best = int(np.argmax(row["coverages"]))
            found.benchmark[document], found.item[document] = row["benchmarks"][best], row["items"][best]
            found.coverage[document] = row["coverages"][best]
    for name, pairs in hits.items():
        found.hits[name] = tuple(np.array(pairs, np.int64).reshape(-1, 2).T)
    return found


def contamination_report(found: Contamination, benchmarks: Benchmarks) -> dict[str, dict[str, int]]:
    """Benchmark -> `documents` that share a span with it, `items_found` in documents, and `items` in all."""
    return {
        name: {
            "documents": len(np.unique(found.hits[name][0])),
            "items_found": len(np.unique(found.hits[name][1])),
            "items": len(texts),
        }
        for name, texts in benchmarks.items.items()
    }
