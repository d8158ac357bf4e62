"""What may be said in public of where text and models come from: Hub ids and licences, and of this machine nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from mobilellm_hf.data.catalog_sources import SOURCES
from mobilellm_hf.data.embedded_sources import SOURCES as EMBEDDED

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
ABSOLUTE = re.compile(r"(?<![\w./~-])~?/(?:[^\s,;/]+/)+([^\s,;/]+)/?")
FILE = re.compile(r"\.(jsonl?|parquet|arrow|csv|txt|md|py|yaml|gz|zst)$")
# Where a path in a text says who works here, and where.
ROOTS = (
    "home root Users mnt media data tmp work workspace scratch var opt srv private gpfs lustre nfs fsx content kaggle "
    "shared projects volumes storage"
).split()
# None begins inside a word, an address or a path; but the n of an escaped line break, as JSON has it, is no word.
PLACE = (
    r"(?:file://|(?<=\\[ntr])|(?<![\w./~-]))"
    rf"(?:/(?:{'|'.join(ROOTS)})/[\w.@+-]+|~/[\w.@+-]+|[A-Z]:\\{{1,2}}[\w.]+)"
)
WHOLE_PLACE = re.compile(PLACE + r"""[^\s"'`<>()\[\]{},;|]*""")
BY_RULES = "made by rules"
OF_ITS_PACKAGES = "those of the Python packages it is read from"


@dataclass(frozen=True)
class SourceFacts:
    """A line of the table of training data. What no file says is None."""

    name: str
    hub_id: str | None = None
    license: str | None = None
    share: float | None = None
    weight: float | None = None
    rows: int | None = None
    tokens: int | None = None
    epochs: float | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)


def described(name: str) -> SourceFacts:
    """A source by its name alone: the catalog's or the embedded corpus's, where one of them has it."""
    if spec := SOURCES.get(name):
        return SourceFacts(name, spec.hub_id, spec.license)
    if name.startswith("synthetic"):
        return SourceFacts(name, license=BY_RULES)
    return SourceFacts(name, license=OF_ITS_PACKAGES if name in EMBEDDED else None)


def sources_of(settings: Mapping[str, Any]) -> Iterator[SourceFacts]:
    """The sources that a run's settings name, as far as they say what they are."""
    for entry in settings.get("sources") or ():
        if "catalog" in entry:
            yield described(entry["catalog"])
        elif "synthetic" in entry:
            yield from (SourceFacts(task, license=BY_RULES) for task in entry["synthetic"])
        elif (name := entry.get("name", "")) and is_hub_id(name):
            yield SourceFacts(entry.get("source", name.split("/")[1]), hub_id=name)


def is_hub_id(name: str) -> bool:
    """Whether it is written as one, and can be no path: neither by its ending nor by a folder that it begins with."""
    return HUB_ID.fullmatch(name) is not None and not FILE.search(name) and not Path(Path(name).parts[0]).is_dir()


def public_name(name: str) -> str:
    """A Hub id as it is; of a folder of this machine the last part."""
    return name if is_hub_id(name) else Path(name).name


def public_settings(value: Any) -> Any:
    """Settings without absolute paths, also inside of `domain:path`: of each the last part stays.

    Relative ones say nothing of this machine.
    """
    if isinstance(value, Mapping):
        return {name: public_settings(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [public_settings(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if PureWindowsPath(value).drive:
        return PureWindowsPath(value).name
    path = value.removeprefix("file://")
    if path.startswith("~") or Path(path).is_absolute():
        return Path(path).name
    return value if "://" in value else ABSOLUTE.sub(r"\1", value)


def without_places(text: str) -> str:
    """A text with each path of a machine's user shown by its name alone."""
    return WHOLE_PLACE.sub(lambda match: re.split(r"[/\\]+", match[0].rstrip("/\\"))[-1], text)


def unknown_licenses(sources: Iterable[SourceFacts]) -> list[str]:
    return [source.name for source in sources if source.license in (None, "unknown")]
