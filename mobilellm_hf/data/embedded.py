"""The embedded corpus: real text in three domains that is on the machine already. No download, nothing redistributed.

It is what the quickstart, the tests and the benchmarks train on and score. Its sources differ in worth on purpose
(see `embedded_sources.py`), and its rows are a function of the installed versions alone: not of the file system's
order, nor of PYTHONHASHSEED. The split is decided per file or module, so the test split is unseen files.

    python -m mobilellm_hf.data.embedded                              # the table of sizes
    python -m mobilellm_hf.data.embedded --sources stdlib sympy_docs
"""

from __future__ import annotations

import argparse
import io
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mobilellm_hf.data.documents import MAX_CHARACTERS, FirstSeen, cut_document, split_by_hash, stable_hash
from mobilellm_hf.data.embedded_sources import SOURCES, SourceSpec

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

__all__ = ["MAX_BYTES_PER_SOURCE", "SOURCES", "SourceSpec", "describe_corpus", "load_embedded_corpus"]

logger = logging.getLogger(__name__)

MAX_BYTES_PER_SOURCE = 1_500_000
# No module fills more than this share of a source's bytes, or two pieces if that is more: it falls into one split as a
# whole, and a split of a tenth must not be a single file (torch's licence file alone is a third of a megabyte).
MAX_MODULE_SHARE = 0.02


def load_embedded_corpus(
    sources: Sequence[str] | None = None,
    max_bytes_per_source: int = MAX_BYTES_PER_SOURCE,
    seed: int = 0,
) -> DatasetDict:
    """Reads the embedded corpus, or some of its sources.

    Documents are cut to a few thousand characters at line boundaries; nearly empty ones (fewer than 64 characters that
    are not white space) and repetitions, within and across the sources asked for, are dropped.

    Args:
        sources: names from `SOURCES`; all of them by default.
        max_bytes_per_source: UTF-8 bytes kept of a source at most. A source that has more is sampled by module.
        seed: decides that sample, and the figures of the synthetic source.

    Returns:
        The splits "train", "probe" and "test" (about 80, 10 and 10% of each source's rows, by whole modules), with the
        columns `text`, `source` and `domain`.

    Raises:
        ValueError: a name is no source, or `max_bytes_per_source` leaves a source too few modules to split.
        FileNotFoundError: a source that was asked for by name is not on this machine. In the default selection such a
            source is left out with a warning.
    """
    return embedded_rows(sources, max_bytes_per_source, seed, splits=True).remove_columns("module")


def embedded_rows(
    sources: Sequence[str] | None = None,
    max_bytes_per_source: int = MAX_BYTES_PER_SOURCE,
    seed: int = 0,
    splits: bool = False,
) -> Dataset | DatasetDict:
    """`load_embedded_corpus` with the column `module` (which file a row is from), before or after the split."""
    from datasets import Dataset

    unknown = [name for name in sources or () if name not in SOURCES]
    if unknown:
        raise ValueError(f"No embedded source is called {', '.join(unknown)}. There are: {', '.join(SOURCES)}.")
    rows: list[dict[str, str]] = []
    keep = FirstSeen()
    for spec in SOURCES.values():
        if sources is not None and spec.name not in sources:
            continue
        before = len(rows)
        rows += _source_rows(spec, max_bytes_per_source, seed, keep)
        if len(rows) == before:
            problem = f"The embedded source {spec.name} ({spec.description}) is not installed on this machine"
            if sources is not None:
                raise FileNotFoundError(f"{problem}. Leave it out of `sources`.")
            logger.warning("%s: it is left out.", problem)
    dataset = Dataset.from_list(rows)
    return split_by_hash(dataset, key=("source", "module"), within="source") if splits else dataset


def _source_rows(spec: SourceSpec, max_bytes: int, seed: int, keep: FirstSeen) -> Iterator[dict[str, str]]:
    """The rows of one source up to `max_bytes`, module by module in the order of the modules' hashes."""
    modules = spec.modules(seed)
    left = max_bytes
    for module in sorted(modules, key=lambda name: (stable_hash(seed, spec.name, name), name)):
        left_in_module = max(int(max_bytes * MAX_MODULE_SHARE), 2 * MAX_CHARACTERS)
        for piece in itertools.chain.from_iterable(map(cut_document, modules[module]())):
            size = len(piece.encode("utf-8"))
            if size > left:
                return
            if size > left_in_module:
                break
            if keep(piece):
                left -= size
                left_in_module -= size
                yield {"text": piece, "source": spec.name, "domain": spec.domain, "module": module}


def describe_corpus(corpus: DatasetDict) -> str:
    """A table of what a corpus holds, one line per source: domain, documents in each split, bytes, and what it is.

    Args:
        corpus: splits with the columns `text`, `source` and `domain`; it need not be the embedded corpus.
    """
    from rich.console import Console
    from rich.table import Table

    counts: dict[tuple[str, str], dict[str, int]] = {}
    size: dict[tuple[str, str], int] = {}
    for split, dataset in corpus.items():
        for text, source, domain in zip(*(dataset[name][:] for name in ("text", "source", "domain")), strict=True):
            line = counts.setdefault((domain, source), dict.fromkeys(corpus, 0))
            line[split] += 1
            size[domain, source] = size.get((domain, source), 0) + len(text.encode("utf-8"))

    table = Table("source", "domain", show_footer=True)
    table.columns[0].footer = "all"
    for split in corpus:
        table.add_column(split, justify="right", footer=f"{corpus[split].num_rows:,}")
    table.add_column("bytes", justify="right", footer=f"{sum(size.values()):,}")
    table.add_column("what it is")
    for (domain, source), line in counts.items():
        what = SOURCES[source].description if source in SOURCES else ""
        table.add_row(source, domain, *(f"{number:,}" for number in line.values()), f"{size[domain, source]:,}", what)
    console = Console(file=io.StringIO(), width=119)
    console.print(table)
    return console.file.getvalue().rstrip("\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mobilellm_hf.data.embedded",
        description="Reads the embedded corpus from what is installed and prints how much of it there is.",
    )
    parser.add_argument("--sources", nargs="+", metavar="NAME", help=f"only these of: {', '.join(SOURCES)}")
    parser.add_argument(
        "--max-bytes-per-source",
        type=int,
        default=MAX_BYTES_PER_SOURCE,
        metavar="N",
        help="UTF-8 bytes kept of a source at most, a sample by module (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="decides that sample (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        corpus = load_embedded_corpus(options.sources, options.max_bytes_per_source, options.seed)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    print(describe_corpus(corpus))


if __name__ == "__main__":
    main()
