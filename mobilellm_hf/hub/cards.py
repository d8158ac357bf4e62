"""Cards from templates (hub_cards/) and facts: the metadata that the Hub reads, sections, and HTML to look at.

    card = render("model_base.md", context, record)
    Path("card.html").write_text(to_html(card, title))

A template that asks for what is not there is an error, never an empty place. Only what `facts.py` found in files is
handed to it, so a card has no number of its own.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import DatasetCardData, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK, metadata_load
from markdown_it import MarkdownIt

import mobilellm_hf
from mobilellm_hf.evaluation.results import marks_of
from mobilellm_hf.hub.blocks import NOT_RUN, Record, code_blocks
from mobilellm_hf.hub.files import CARD
from mobilellm_hf.hub.results import cuts_of
from mobilellm_hf.hub.sources import public_settings, without_places

SHAPE = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "intermediate_size": "FFN width",
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key and value heads",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "context, in tokens",
    "tie_word_embeddings": "input and output embeddings tied",
    "dtype": "weights saved as",
}
OF_A_FOLDER = re.compile(r"<!-- of this folder -->.*?<!-- end -->\n*", re.S)
STYLE = """
body { max-width: 50rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.55 system-ui, sans-serif; color: #1f2328; }
pre { background: #f6f8fa; padding: .8rem 1rem; overflow-x: auto; border-radius: 6px; font-size: 13px; }
code { font-family: ui-monospace, monospace; } :not(pre) > code { background: #f6f8fa; padding: .1em .3em; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
thead tr:has(th:empty):not(:has(th:not(:empty))) { display: none; }
th, td { border: 1px solid #d0d7de; padding: .3rem .7rem; text-align: left; } img { max-width: 100%; }
h1, h2 { border-bottom: 1px solid #d0d7de; padding-bottom: .3rem; } details { color: #59636e; }
"""


@dataclass(frozen=True)
class Picture:
    """A picture of a release: its place in the repository and what it shows."""

    path: str
    caption: str


def templates_folder() -> Path:
    """hub_cards/ of the installed package, or of the checkout that it is imported from.

    Raises:
        ValueError: there is neither.
    """
    package = Path(mobilellm_hf.__file__).parent
    for folder in (package / "hub_cards", package.parent / "hub_cards"):
        if folder.is_dir():
            return folder
    raise ValueError(f"the templates of cards are neither in {package} nor beside it: install mobilellm_hf again")


def render(template: str, context: Mapping[str, Any], record: Record | None = None) -> str:
    """A card as Markdown with metadata, in which each block says whether it was run.

    Raises:
        ValueError: the template is wrong, or asks for what is not there.
    """
    loader = jinja2.FileSystemLoader(templates_folder())
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters |= {"cell": _cell, "linked": _linked, "literal": _literal, "public": public_settings}
    environment.filters["cuts"] = cuts_of
    environment.filters["marks"] = lambda result: marks_of([result])
    try:
        found = environment.get_template(template)
        first = found.render(**context, ran=_NotRun())
        record = record or Record()
        ran = {name: record.status(block) for name, block in code_blocks(first).items()}
        text = found.render(**context, ran=ran)
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the card's template {template} cannot be rendered: {error}") from error
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


class _NotRun(dict):
    def __missing__(self, name: str) -> str:
        return NOT_RUN


def _cell(value: Any) -> str:
    """A value as a table's cell shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and value >= 1000 else f"{value:g}"
    return " ".join(str(value).split()).replace("|", "\\|")


def _literal(text: str) -> str:
    """A text whose asterisks stay as they are."""
    return text.replace("*", "\\*")


def _linked(hub_id: str) -> str:
    return f"[{hub_id}](https://huggingface.co/datasets/{hub_id})"


def architecture(config: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    """What the table of the model shows, all of it from config.json and the weights."""
    shown = {label: config[name] for name, label in SHAPE.items() if config.get(name) is not None}
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    return {"parameters": parameters} | shown | ({"rope_theta": theta} if theta is not None else {})


def model_metadata(
    name: str,
    *,
    license: str | None,
    base_model: str | None,
    relation: str | None,
    datasets: list[str],
    tags: list[str],
    model_index: list[dict[str, Any]] | None,
    library: str = "transformers",
) -> ModelCardData:
    """What the Hub reads.

    Args:
        model_index: results of an evaluation, as it wrote them.
    """
    results = [entry | {"name": name} for entry in model_index or () if entry["results"]]
    return ModelCardData(
        library_name=library, pipeline_tag="text-generation", license=license, base_model=base_model,
        base_model_relation=relation, datasets=datasets or None, tags=tags,
        **({"model-index": results} if results else {}),
    )  # fmt: skip


def data_set_metadata(
    name: str, *, license: str | None, sources: list[str], parts: Mapping[str, str], tags: list[str]
) -> DatasetCardData:
    """What the Hub reads of a data set. parts: name -> pattern of its files."""
    configs = [{"config_name": part, "data_files": pattern} for part, pattern in parts.items()]
    return DatasetCardData(
        pretty_name=name, license=license, source_datasets=sources or None, tags=tags, configs=configs or None
    )


def description_of(card: str, pictures: Sequence[Picture] = ()) -> str:
    """The text of a card that somebody wrote, without metadata and the first heading; its headings a level lower.

    What stands between `<!-- of this folder -->` and `<!-- end -->` is left out: a release is no folder.

    Args:
        pictures: of the release, to which links to files of their names lead.
    """
    body = REGEX_YAML_BLOCK.sub("", card, count=1).strip()
    body = re.sub(r"\A# .*\n", "", OF_A_FOLDER.sub("", body)).strip()
    parts = re.split(r"(^```.*?^```$)", body, flags=re.S | re.M)
    text = "".join(part if part.startswith("```") else re.sub(r"^#", "##", part, flags=re.M) for part in parts)
    for picture in pictures:
        text = text.replace(f"]({Path(picture.path).name})", f"]({picture.path})")
    return text


def own_description(folder: Path, pictures: Sequence[Picture] = ()) -> str:
    """What the README.md of a model or a data set says of it, without paths of this machine."""
    own = folder / CARD
    return without_places(description_of(own.read_text(), pictures)) if own.exists() else ""


def license_of(card: Path) -> str | None:
    """What the metadata of a card that somebody wrote say; None if they say nothing, or there is no card.

    Raises:
        ValueError: its metadata are no YAML.
    """
    try:
        metadata = metadata_load(card) if card.exists() else None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata of {card} cannot be read: {error}") from error
    return (metadata or {}).get("license")


def to_html(card: str, title: str) -> str:
    """A page that shows a card much as the Hub does; its pictures are where the card says, relative to the page."""
    found = REGEX_YAML_BLOCK.match(card)
    metadata = found.group(2).strip() if found else ""
    body = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(REGEX_YAML_BLOCK.sub("", card, count=1))
    return (
        f"<!doctype html>\n<html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>\n"
        f"<style>{STYLE}</style>\n"
        f"<details open><summary>metadata</summary><pre>{html.escape(metadata)}</pre></details>\n{body}</html>\n"
    )
