"""A mixture's weights as other tools take them: `datasets.interleave_datasets`, TRL, ms-swift and LlamaFactory.

    export = read_export("runs/influence/mixture.yaml", datasets={"code": {"path": "org/code"}}, tokens_per_row={...})
    write_export(export, Path("runs/export"))          # of `weights_formats.py`

Our weights are shares of tokens; all of these tools draw rows, and a row of one source may be ten times as long as
that of another. So a row's probability is the share of tokens divided by the source's mean tokens a row, over the sum
of the same for all sources. The means are given, measured with a tokenizer, or the paper's figures of the catalog.
Sources of weight 0 are left out.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mobilellm_hf.data import catalog
from mobilellm_hf.data.local_files import CorpusError
from mobilellm_hf.data.rows import expand_entry
from mobilellm_hf.data.source_weights import one_source, source_weights

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


@dataclass(frozen=True)
class Location:
    """Where rows are, in the words of `datasets.load_dataset`.

    Attributes:
        path: an id on the Hub, a folder, or a local file.
        name: configuration on the Hub.
        column: that with the text.
    """

    path: str
    name: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    column: str = "text"

    def arguments(self) -> dict[str, Any]:
        """Of `load_dataset`: a local file by its loader."""
        loader = LOADERS.get(Path(self.path).suffix) if self.data_files is None else None
        if loader is not None:
            return {"path": loader, "data_files": self.path, "split": self.split}
        found = {"path": self.path, "name": self.name, "data_files": self.data_files, "split": self.split}
        return {key: value for key, value in found.items() if value is not None}


@dataclass(frozen=True)
class ExportedSource:
    """A source with a weight. share: of the tokens; probability: that a row is one of its."""

    name: str
    share: float
    tokens_per_row: float
    tokens_from: str
    probability: float
    locations: list[Location]


@dataclass(frozen=True)
class WeightsExport:
    """What is exported: the sources, and all that the mixture's file says. file: where it was read."""

    sources: list[ExportedSource]
    left_out: list[str]
    document: dict[str, Any]
    file: Path

    def parts(self) -> list[tuple[str, Location, float]]:
        """(name, location, probability of a row); a source in several places is divided equally among them.

        Names are of letters, digits, "_", "-" and "." and are distinct: of those that would be alike, the later ones
        are numbered.
        """
        found, taken = [], set()
        for source in self.sources:
            count = len(source.locations)
            for number, location in enumerate(source.locations):
                name = source.name if count == 1 else f"{source.name}_{location.name or number}"
                plain = re.sub(r"[^\w.-]+", "_", name)
                versions = (plain if again == 1 else f"{plain}_{again}" for again in itertools.count(1))
                taken.add(own := next(version for version in versions if version not in taken))
                found.append((own, location, source.probability / count))
        return found


def read_export(
    mixture: str | Path,
    datasets: Mapping[str, Mapping[str, Any]] | None = None,
    tokens_per_row: Mapping[str, float] | None = None,
    measure: Callable[[Location], float] | None = None,
) -> WeightsExport:
    """The weights of a file, and where each source is.

    Args:
        mixture: a YAML file with a key `weights`, as `recipes/score_influence.py` leaves it; what it says about what
            was scored tells where the sources are, as far as they are corpora.
        datasets: source -> the fields of a `Location`, or a list of such.
        tokens_per_row: source -> mean tokens of a row; else `measure`, else the catalog's figures are asked.

    Raises:
        ValueError: the weights are no shares, a source's place or mean tokens are unknown, or one is named that has no
            weight. The message names it and the remedy.
    """
    file, given, means = Path(mixture), dict(datasets or {}), dict(tokens_per_row or {})
    document = _read(file)
    shares = source_weights([], file, list(document["weights"]))
    for label, names in (("datasets", given), ("tokens_per_row", means)):
        if unknown := sorted(set(names) - set(shares)):
            raise ValueError(f"{label} names {unknown[0]!r}; {file} has weights for {', '.join(shares)}")
    used = {name: share for name, share in shares.items() if share > 0}
    entries = _scored_entries(document)
    places = {name: _locations(name, given.get(name), entries.get(name)) for name in used}
    tokens = {name: _tokens_per_row(name, means.get(name), places[name], measure) for name in used}
    total = sum(share / tokens[name][0] for name, share in used.items())
    sources = [
        ExportedSource(name, share, *tokens[name], share / tokens[name][0] / total, places[name])
        for name, share in used.items()
    ]
    return WeightsExport(sources, [name for name in shares if name not in used], document, file)


def _read(file: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"mixture: {file} cannot be read: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("weights"), dict) or not document["weights"]:
        raise ValueError(f"mixture: {file} has no key weights with source -> share")
    return document


def _scored_entries(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """source -> the entry of the recipe's YAML that it came from, as far as one entry is one source."""
    scored = document.get("scored")
    entries = scored.get("sources") if isinstance(scored, Mapping) else None
    found = {}
    for entry in entries or []:
        try:
            found[one_source("this entry", entry)] = entry
        except (ValueError, KeyError):  # several at once: to be told by the user
            continue
    return found


def _locations(name: str, given: Any, entry: Mapping[str, Any] | None) -> list[Location]:
    remedy = (
        f"datasets has no place of {name!r}: in the file of --config write, under datasets, {name}: {{path: a Hub id, "
        "folder or file, name: CONFIGURATION, split: train, column: text}, all but the path as needed"
    )
    if given is not None:
        places = given if isinstance(given, list) else [given]
        fields = set(Location.__dataclass_fields__)
        for place in places:
            if not isinstance(place, Mapping) or "path" not in place or set(place) - fields:
                raise ValueError(f"datasets: {name} is {place!r}; it may have path and {', '.join(fields - {'path'})}")
        return [Location(**place) for place in places]
    if entry is None and name in catalog.SOURCES:
        entry = {"catalog": name}
    if entry is None:
        raise ValueError(remedy)
    if "rows" in entry or str(entry.get("name", "")).startswith("embedded"):
        raise ValueError(f"{remedy}. Its rows are of this package's own, which other tools do not read")
    try:
        found = expand_entry(entry)
    except CorpusError as error:
        raise ValueError(f"{remedy}. {error}") from error
    if any("text_of" in arguments for arguments in found):
        raise ValueError(
            f"{remedy}. Its text is composed of several columns, which other tools do not do: save it first"
        )
    names = {"name": "path", "subset": "name", "data_files": "data_files", "split": "split", "text_column": "column"}
    return [Location(**{names[key]: value for key, value in a.items() if key in names}) for a in found]


def _tokens_per_row(
    name: str, given: float | None, places: list[Location], measure: Callable[[Location], float] | None
) -> tuple[float, str]:
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < math.inf:
            raise ValueError(f"tokens_per_row: {name} has {given!r}, which is no number of tokens")
        return float(given), "given"
    if measure is not None:
        return sum(measure(place) for place in places) / len(places), "measured"
    spec = catalog.SOURCES.get(name)
    if spec is not None and spec.tokens is not None:
        return spec.tokens * 1e9 / spec.rows, "the paper's tables"
    raise ValueError(
        f"nobody knows how many tokens a row of {name!r} has, by which its share of tokens becomes a share of rows: "
        f"give tokenizer, to measure it, or tokens_per_row: {{{name}: MEAN}}"
    )
