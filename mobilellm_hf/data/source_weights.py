"""What share of the tokens each source of a mixture is to have, in one of the ways in which a YAML file can say it.

Each entry of the list of sources says its own, a source of the catalog by a phase of the paper if it likes:

    sources:
      - {name: "embedded:stdlib", weight: 0.9}
      - {catalog: wiki, stage: pretraining, phase: 1}       # 0.0503, as Table 5 prints it

or none does, and `weights` says it for all:

    weights: runs/influence/mixture.yaml                    # a file with a key `weights`, as recipes write it
    weights: {catalog: [pretraining, 1]}                    # all sources of a phase of the paper
    weights: {stdlib: 90, sympy_docs: 10}                   # shares, or percentages
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from mobilellm_hf.data.catalog import find, mixture
from mobilellm_hf.data.corpora import short_name

logger = logging.getLogger(__name__)

WEIGHT_KEYS = ("weight", "stage", "phase")
TOLERANCE = 1e-6


def source_weights(
    entries: Sequence[Mapping[str, Any]],
    weights: str | Path | Mapping[str, Any] | None = None,
    sources: Iterable[str] | None = None,
) -> dict[str, float]:
    """source -> share of the tokens; they sum to 1.

    Args:
        entries: the list of sources, as `check_entries(..., weights=True)` accepts it.
        weights: what the YAML file says under `weights`; None if every entry has its own.
        sources: the names that the loaded rows have. By default those that the entries say, if all of them do.

    Raises:
        ValueError: an entry has no weight, both ways are used, the weights are no shares that sum to 1 and no
            percentages that sum to 100, or one is of a source that is not there. The message names it.
    """
    shares = _of_entries(entries) if weights is None else _of_document(entries, weights)
    shares = _normalised(shares)
    names = _declared(entries) if sources is None else list(sources)
    if names is not None:
        for name, share in shares.items():
            if share > 0 and name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"Did you mean {close[0]}?" if close else f"The sources are {', '.join(names)}."
                raise ValueError(
                    f"weights: {name!r} is to have a share of {share:.3g}, and there is no such source. {hint}"
                )
        if unread := [name for name in names if not shares.get(name)]:
            logger.warning("No weight, so nothing is read of %s", ", ".join(unread))
    return shares


def check_weight(place: str, entry: Mapping[str, Any]) -> None:
    """Raises a ValueError that names the field, unless an entry's weight is one or it has none."""
    weight = entry.get("weight")
    if weight is not None:
        _check_number(f"{place}: weight", weight)
        one_source(place, entry)
    if ("stage" in entry) != ("phase" in entry) or (weight is not None and "stage" in entry):
        raise ValueError(f"{place}: give a weight, or stage and phase, by which the paper's table says it")
    if "stage" in entry:
        find(entry["catalog"])
        _of_catalog(place, entry)


def one_source(place: str, entry: Mapping[str, Any]) -> str:
    """The one source that an entry is; its rows say so, if it has a weight.

    Raises:
        ValueError: it is several, which cannot share a weight.
    """
    if "source" in entry:
        return entry["source"]
    if "catalog" in entry:
        return entry["catalog"]
    if "rows" in entry:
        chosen, remedy = entry.get("sources", []), "name one of them with sources: [NAME]"
    else:
        kind, _, names = entry["name"].partition(":")
        if kind != "embedded":
            return short_name(entry["name"])
        chosen, remedy = names.split(",") if names else [], "write embedded:NAME, or one name for all as source"
    if len(chosen) != 1:
        raise ValueError(f"{place}: a weight is of one source, and this may be several: {remedy}")
    return chosen[0]


def _check_number(what: str, weight: Any) -> None:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError(f"{what} is {weight!r}: it must be a number, 0 or more")


def _of_catalog(place: str, entry: Mapping[str, Any]) -> float:
    shares = mixture(entry["stage"], entry["phase"])
    if entry["catalog"] not in shares:
        raise ValueError(
            f"{place}: {entry['catalog']} is not in phase {entry['phase']} of {entry['stage']}: give a weight"
        )
    return shares[entry["catalog"]]


def _of_entries(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The weights that the entries say; those of one source add up."""
    shares: dict[str, float] = {}
    for number, entry in enumerate(entries):
        place = f"sources[{number}]"
        check_weight(place, entry)
        if "weight" not in entry and "stage" not in entry:
            remedy = "a weight, or stage and phase of the paper's table" if "catalog" in entry else "a weight"
            raise ValueError(f"{place} has no weight: give every source {remedy}, or give weights for all")
        weight = entry["weight"] if "weight" in entry else _of_catalog(place, entry)
        name = one_source(place, entry)
        shares[name] = shares.get(name, 0) + weight
    return shares


def _of_document(entries: Sequence[Mapping[str, Any]], weights: str | Path | Mapping[str, Any]) -> dict[str, float]:
    for number, entry in enumerate(entries):
        if own := set(WEIGHT_KEYS) & set(entry):
            raise ValueError(f"sources[{number}] has {min(own)}, and there are weights for all: give one or the other")
    if isinstance(weights, str | Path):
        try:
            document = yaml.safe_load(Path(weights).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"weights: {weights} cannot be read: {error}") from error
        if not isinstance(document, Mapping) or not isinstance(document.get("weights"), Mapping):
            raise ValueError(f"weights: {weights} has no key weights with source -> share")
        shares, place = document["weights"], f"weights of {weights}"
    elif isinstance(weights, Mapping) and weights:
        shares, place = weights, "weights"
    else:
        raise ValueError(f"weights is {weights!r}: write a file, {{catalog: [STAGE, PHASE]}} or source -> share")
    if set(shares) == {"catalog"} and isinstance(shares["catalog"], list):
        if len(shares["catalog"]) != 2:
            raise ValueError(
                f"{place}: catalog is {shares['catalog']!r}; write [STAGE, PHASE], such as [pretraining, 1]"
            )
        return mixture(*shares["catalog"])
    for name, share in shares.items():
        _check_number(f"{place}: {name}", share)
    return dict(shares)


def _normalised(shares: dict[str, float]) -> dict[str, float]:
    """Shares of 1; percentages become shares, if their last decimals can have rounded off what is missing of 100."""
    total = math.fsum(shares.values())
    if abs(total - 1) <= TOLERANCE:
        return shares
    decimals = max(-Decimal(str(share)).as_tuple().exponent for share in shares.values())
    if abs(total - 100) > len(shares) * 0.5 * 10.0**-decimals + TOLERANCE:
        figures = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise ValueError(f"weights must sum to 1, or to 100 as percentages; they sum to {total:.6g}: {figures}")
    logger.warning("The weights are read as percentages; they sum to %.6g and are divided by that.", total)
    return {name: share / total for name, share in shares.items()}


def _declared(entries: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The names of the sources as far as entries say them; None if one leaves it to the data."""
    names: list[str] = []
    for entry in entries:
        if "source" in entry or "catalog" in entry or "weight" in entry:
            names.append(one_source("this entry", entry))
        elif "rows" in entry and "sources" in entry:
            names += entry["sources"]
        elif entry.get("name", "").startswith("embedded:"):
            names += entry["name"].partition(":")[2].split(",")
        else:
            return None
    return list(dict.fromkeys(names))
