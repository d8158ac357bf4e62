"""The card beside exported weights: what they are, how sure, from what scores, and under which licences."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import mobilellm_hf
from mobilellm_hf.data import catalog
from mobilellm_hf.data.weights_export import ExportedSource, WeightsExport

# What of `scored` is worth a line of its own; the rest is in the mixture's file.
SETTINGS = (
    "curvature", "exclude", "rank", "seq_length", "rows_per_source", "rows_per_probe", "mixture_capabilities", "floor",
    "bootstraps", "probe_folds", "fold_rows", "other_seeds", "seed", "mobilellm_hf",
)  # fmt: skip


def card(export: WeightsExport) -> str:
    """Markdown."""
    digest = hashlib.sha256(export.file.read_bytes()).hexdigest()
    changed = datetime.fromtimestamp(export.file.stat().st_mtime, timezone.utc)
    parts = [
        "# Mixture weights",
        f"Exported by mobilellm_hf {mobilellm_hf.__version__} on {datetime.now(timezone.utc):%Y-%m-%d} from "
        f"`{export.file.name}` of {changed:%Y-%m-%d %H:%M} UTC (SHA-256 `{digest}`).",
        "Shares are of tokens. Every tool here draws rows, so the files have the probabilities of rows, which are "
        "shares of tokens divided by the mean tokens of a row, over the sum of the same. They hold for the tokenizer "
        "that counted, and for rows that are read whole.",
        _table(export),
        *_notes(export),
        "## How sure they are",
        _certainty(export.document),
        "## What they come from",
        _provenance(export.document),
        "## The files",
        "`interleave.py` runs with `datasets` alone; `trl.yaml` is a config of `trl.DatasetMixtureConfig`. "
        "`ms_swift.sh`, `llamafactory.yaml` and `dataset_info.json` have the fields that ms-swift and LlamaFactory "
        "document, and were not run: look at what they say they have read.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(export: WeightsExport) -> str:
    found = export.document.get("uncertainty") or {}
    columns = ["source", "data set", "share of tokens"]
    if found:
        columns += ["by equation (5)", "95% interval", "proportional"]
    columns += ["tokens a row", "share of rows", "licence"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for source in export.sources:
        cells = [source.name, "<br>".join(_place(source)), f"{source.share:.2%}"]
        if found:
            unshrunk, (low, high) = found.get("unshrunk"), found["intervals_of_unshrunk"][source.name]
            cells += ["none" if unshrunk is None else f"{unshrunk[source.name]:.2%}", f"{low:.1%} to {high:.1%}"]
            cells.append(f"{found['proportional'][source.name]:.2%}")
        cells += [
            f"{source.tokens_per_row:,.1f} ({source.tokens_from})",
            f"{source.probability:.2%}",
            _licence(source),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _place(source: ExportedSource) -> list[str]:
    return [f"{place.path}{f', {place.name}' if place.name else ''}, {place.split}" for place in source.locations]


def _licence(source: ExportedSource) -> str:
    """As the catalog has it, by the source's name or by its data set."""
    spec = catalog.SOURCES.get(source.name)
    paths = {place.path for place in source.locations}
    if spec is None or spec.hub_id not in paths:
        spec = next((other for other in catalog.SOURCES.values() if other.hub_id in paths), None)
    if spec is None:
        return "not known here"
    return spec.license or "none named"


def _notes(export: WeightsExport) -> list[str]:
    notes = []
    if export.left_out:
        notes.append(f"Left out, since their weight is 0: {', '.join(export.left_out)}.")
    if several := [source.name for source in export.sources if len(source.locations) > 1]:
        notes.append(f"In several places, among which their share is divided equally: {', '.join(several)}.")
    places = [(source.name, place) for source in export.sources for place in source.locations]
    if files := sorted({name for name, place in places if place.data_files is not None}):
        notes.append(
            f"Of {', '.join(files)} files are chosen (data_files), which ms-swift and LlamaFactory have no field for: "
            "download them, and put the folder in the data set's place."
        )
    if splits := sorted({name for name, place in places if place.split != "train"}):
        notes.append(f"ms-swift has no field for a split, which {', '.join(splits)} need.")
    if columns := sorted({name for name, place in places if place.column != "text"}):
        notes.append(
            f"The text of {', '.join(columns)} is in a column that is not called `text`; `interleave.py` renames it, "
            "and TRL and ms-swift must be told."
        )
    return notes


def _certainty(document: Mapping[str, Any]) -> str:
    found = document.get("uncertainty")
    if not found:
        return "Nothing was resampled: the file has no intervals, and nobody knows how sure the weights are."
    units = ", ".join(f"{count} {level}" for level, count in found["resampled"].items())
    noise = ", ".join(f"{level} {share:.0%}" for level, share in found["share_of_noise"].items())
    return (
        f"{found['verdict'][0].upper()}{found['verdict'][1:]}. The weights are {document['weights_are']}.\n\n"
        f"{found['formula'][0].upper()}{found['formula'][1:]}. Here the factor is "
        f"{found['shrinkage']['factor']:.3f}. Resampled were {units} (the fewest of any source or capability); their "
        f"shares of the noise are {noise}."
    )


def _provenance(document: Mapping[str, Any]) -> str:
    scored = document.get("scored")
    if not isinstance(scored, Mapping):
        return "The file does not say what was scored, with what, or when."
    lines = ["Influence (equations 2 to 5 of MobileLLM-R1, arXiv 2509.24945) of every source on the probes, by"]
    digests = scored.get("weights_sha256_or_commit", {})
    lines += [
        f"- checkpoint {label} of step {step:,}, weights `{digests.get(label, 'unknown')}`"
        for label, step in scored.get("steps", {}).items()
    ]
    for key, value in scored.items():
        if key.startswith("probe_") and key.endswith("_sha256"):
            lines.append(f"- probe {key.removeprefix('probe_').removesuffix('_sha256')}, rows `{value}`")
    lines += [f"- scored rows `{scored['rows_sha256']}`"] if "rows_sha256" in scored else []
    lines += [f"- {name}: {scored[name]}" for name in SETTINGS if scored.get(name) not in (None, [], {})]
    return "\n".join(lines)
