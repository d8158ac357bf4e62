"""Data sets as releases: representative sets and probes, influence scores, a teacher's cached probabilities.

    release = package_data_set(Path("runs/curate"), Target("org/name", "data", "dataset"))

Parquet files become parts that `load_dataset` knows by name. What only a run that goes on needs (rows in Arrow files,
shards of a curation's scores) is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from mobilellm_hf.hub.cards import data_set_metadata, own_description
from mobilellm_hf.hub.contents import as_pictures
from mobilellm_hf.hub.files import CARD, PICKLES, ReleaseFile, read_json
from mobilellm_hf.hub.package import RECORD, Release, licenses_of, release_folder, with_card
from mobilellm_hf.hub.sources import (
    SourceFacts,
    described,
    public_name,
    public_settings,
    sources_of,
    unknown_licenses,
)
from mobilellm_hf.hub.stages import Target
from mobilellm_hf.training.teacher_cache import MANIFEST, TeacherCache

DATA = "data"
KEPT = (".parquet", ".yaml", ".jsonl", ".md")
SHARD = re.compile(r"(shard|part)-.*")
CACHE = "Probabilities of a teacher's likeliest tokens at every position, for distillation without the teacher."
SCORES = "Influence of rows of text on capabilities: the product of gradients, equation 2 of MobileLLM-R1."
CHOSEN = "Documents chosen to stand for whole corpora, step by step (section 2.1.1 of MobileLLM-R1), and probe sets."
OTHER = "Data made with `mobilellm_hf`."


@dataclass(frozen=True)
class Part:
    """Files that `load_dataset` reads together under one name."""

    name: str
    pattern: str
    rows: int
    columns: tuple[str, ...]


@dataclass(frozen=True)
class FunnelFacts:
    """Documents of all sources that a step kept, and why others fell."""

    name: str
    kept: int
    why: str


class DataSetFacts:
    """What the files of a folder say of themselves.

    Raises:
        ValueError: the folder is no finished data set of a kind that can be released.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
        self.folder = folder
        if (folder / MANIFEST).exists():
            TeacherCache(folder)  # raises if it is not finished
        elif not self.parts:
            kinds = "a curation, influence scores or a teacher cache"
            arrow = next(folder.rglob("*.arrow"), None)
            hint = "; write the Arrow files as parquet (Dataset.to_parquet), which the Hub shows" if arrow else ""
            raise ValueError(f"{folder} has no parquet file and no {MANIFEST}: give the folder of {kinds}{hint}")

    @property
    def about(self) -> str:
        if self.manifest:
            return CACHE
        if self.weights:
            return SCORES
        return CHOSEN if self.funnel else OTHER

    @cached_property
    def parts(self) -> list[Part]:
        found: dict[str, list[Path]] = {}
        for path in sorted(self.folder.rglob("*.parquet")):
            place = path.relative_to(self.folder)
            name = place.parent if SHARD.fullmatch(path.stem) else place.with_suffix("")
            found.setdefault(name.as_posix(), []).append(path)
        # What steps of a curation decided, whose names begin with a number, comes after what they chose.
        return [_part(name, found[name]) for name in sorted(found, key=lambda name: (name[0].isdigit(), name))]

    @cached_property
    def manifest(self) -> dict[str, Any] | None:
        path = self.folder / MANIFEST
        if not path.exists():
            return None
        return {name: public_name(v) if name == "teacher" else v for name, v in read_json(path).items()}

    @cached_property
    def settings(self) -> dict[str, Any] | None:
        path = self.folder / "settings.json"
        return read_json(path) if path.exists() else None

    @cached_property
    def weights(self) -> dict[str, float] | None:
        path = self.folder / "mixture.yaml"
        return yaml.safe_load(path.read_text())["weights"] if path.exists() else None

    @cached_property
    def _steps(self) -> list[dict[str, Any]]:
        path = self.folder / "funnel.json"
        return read_json(path) if path.exists() else []

    @cached_property
    def funnel(self) -> list[FunnelFacts]:
        def why(fallen: Mapping[str, int]) -> str:
            return "; ".join(f"{count:,} {reason}" for reason, count in fallen.items())

        return [FunnelFacts(step["name"], sum(step["kept"].values()), why(step["fallen"])) for step in self._steps]

    @cached_property
    def data(self) -> list[SourceFacts]:
        """The sources whose text it holds or was made from, by what the files call them."""
        named = {source.name: source for source in sources_of(self.settings or {})}
        names = [*(self._steps[-1]["kept"] if self._steps else {}), *(self.weights or {}), *named]
        return [named.get(name) or described(name) for name in dict.fromkeys(names)]

    @cached_property
    def licenses_unknown(self) -> list[str]:
        return unknown_licenses(self.data)


def _part(name: str, paths: list[Path]) -> Part:
    rows, columns = 0, ()
    for path in paths:
        try:
            file = pq.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error})") from error
        rows, columns = rows + file.metadata.num_rows, tuple(file.schema_arrow.names)
    shards = SHARD.fullmatch(paths[0].stem)
    pattern = f"{name}/*.parquet" if shards else f"{name}.parquet"
    return Part(re.sub(r"[^\w.-]+", "-", name).strip("-") or "default", pattern.removeprefix("./"), rows, columns)


def package_data_set(
    folder: str | Path, target: Target, *, license: str | None = None, staging: Path | None = None
) -> Release:
    """A data set's release.

    Args:
        folder: what `recipes/curate.py` or `recipes/score_influence.py` left, a teacher cache, or parquet files.
        license: of the whole, as the Hub calls it.

    Raises:
        ValueError: it is none of these, not finished or damaged.
    """
    folder = Path(folder)
    facts = DataSetFacts(folder)
    files, left_out = _files(folder, facts)
    if facts.settings is not None:
        document = yaml.safe_dump(public_settings(facts.settings), sort_keys=False, allow_unicode=True)
        files.append(ReleaseFile("settings.yaml", document.encode()))
    pictures, picture_files = as_pictures(sorted(folder.glob("*.png")))
    files += picture_files
    staging = staging or release_folder(folder)
    name = target.repo.split("/")[1]
    metadata = data_set_metadata(
        name, license=license, sources=sorted({source.hub_id for source in facts.data if source.hub_id}),
        parts={part.name: part.pattern for part in facts.parts}, tags=["mobilellm"],
    )  # fmt: skip
    context = {
        "target": target,
        "title": name,
        "facts": facts,
        "description": own_description(folder),
        "pictures": pictures,
        "license": license,
        "card_data": metadata.to_yaml(),
    }
    files = with_card("data_set.md", context, files, staging / RECORD)
    return Release(target, files, staging, left_out, tuple(_notes(facts, license)), licenses_of(facts.data))


def _files(folder: Path, facts: DataSetFacts) -> tuple[list[ReleaseFile], dict[str, str]]:
    files, left_out = [], {}
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder).as_posix()
        if not path.is_file() or place in (CARD, "settings.json") or path.suffix == ".png":
            continue
        if path.suffix in PICKLES:
            left_out[place] = "a pickle, which runs code where it is loaded"
        elif place == MANIFEST:
            files.append(ReleaseFile(place, _public_manifest(path)))
        elif path.suffix in KEPT or place == "funnel.json" or (facts.manifest and path.suffix == ".safetensors"):
            files.append(ReleaseFile(place, path))
        else:
            left_out[place] = "no part of the data"
    return files, left_out


def _public_manifest(path: Path) -> Path | bytes:
    """The file as it is, or without the path of a local teacher."""
    text, teacher = path.read_text(), read_json(path).get("teacher", "")
    return path if public_name(teacher) == teacher else text.replace(teacher, public_name(teacher)).encode()


def _notes(facts: DataSetFacts, license: str | None) -> Iterator[str]:
    if license is None:
        yield "no licence is named for the whole (license)"
    if facts.licenses_unknown:
        yield f"the licences of {', '.join(facts.licenses_unknown)} are not known: look before you publish"
