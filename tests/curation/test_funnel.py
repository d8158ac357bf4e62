"""Counts against brute force, the picture, and the documents to read whatever is in them."""

import io

import numpy as np
import pytest
from curation_cases import documents
from rich.console import Console

from mobilellm_hf.curation.funnel import funnel, funnel_table, plot_funnel, reasons_table, write_samples
from mobilellm_hf.curation.representative import AtMost
from mobilellm_hf.curation.stages import CurationStage, Verdict, curate

ODD = ["``` a fence\n````\nin ````` it", "a lone \ud83d surrogate", "x" * 700, "text\x00with\x1b[31m escapes"]


class ByLength(CurationStage):
    """Drops short and long documents, and gives scores one of which is no number."""

    name = "length"

    def settings(self):
        return {}

    def decide(self, given):
        lengths = np.array([len(text) for text in given.documents["text"][:]])
        score = lengths.astype(np.float32)
        score[0] = np.nan
        fallen = np.where(lengths < 150, 1, np.where(lengths > 280, 2, 0)).astype(np.int8)
        return Verdict(fallen, ("short", "long"), {"score": score})


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    data = documents(90)
    return data, curate(data, [ByLength(), AtMost(7)], tmp_path_factory.mktemp("funnel"))


def shown(table) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()


def test_counts_are_those_of_the_documents(curated):
    data, result = curated
    sources, lengths = data["source"][:], [len(text) for text in data["text"]]
    names = ["code", "math", "wiki", "absent"]
    steps = funnel(result.reports, names)
    assert [step.name for step in steps] == ["documents", "length", "limit"]
    assert steps[0].kept == {name: sources.count(name) for name in names} and steps[0].fallen == {}
    within = [source for source, length in zip(sources, lengths) if 150 <= length <= 280]
    assert steps[1].kept == {name: within.count(name) for name in names}
    assert steps[1].fallen == {"short": sum(n < 150 for n in lengths), "long": sum(n > 280 for n in lengths)}
    assert steps[2].kept == {name: min(7, within.count(name)) for name in names}
    assert sum(steps[2].fallen.values()) == len(within) - len(result.documents) > 0
    assert min(steps[1].fallen.values()) > 0
    table = shown(funnel_table(steps))
    assert [line.split("│")[1:-1] for line in table.splitlines() if "absent" in line][0][1].strip() == "0"
    all_line = [line for line in table.splitlines() if " all " in line][0]
    assert [part.strip() for part in all_line.split("│")[2:-1]] == ["90", str(len(within)), str(len(result.documents))]
    reasons = shown(reasons_table(steps))
    assert "beyond 7 of its source" in reasons and reasons.index("long") != reasons.index("short")


def test_the_picture_is_made_even_of_a_source_that_is_gone(curated, tmp_path):
    steps = funnel(curated[1].reports, ["code", "math", "wiki", "absent"])
    plot_funnel(steps, tmp_path / "funnel.png")
    plot_funnel(steps, tmp_path / "funnel.partial", format="png")
    assert (tmp_path / "funnel.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "funnel.partial").stat().st_size > 10_000


def test_documents_to_read_are_kept_and_dropped_ones(curated, tmp_path):
    data, result = curated
    write_samples(data, result.reports, tmp_path / "samples.md", 2)
    text = (tmp_path / "samples.md").read_text()
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    reasons = result.reports[0].table()["reason"].to_pylist()
    counts = {reason: reasons.count(reason) for reason in ("", "short", "long")}
    assert set(heads[:3]) == {f"## length: {reason or 'kept'} ({count})" for reason, count in counts.items()}
    assert heads[3].startswith("## limit: kept") and heads[4].startswith("## limit: beyond 7 of its source (")
    samples = [line for line in text.splitlines() if line.startswith("**")]
    assert len(samples) == 10 and text.count("```text") == 10
    lengths = [len(row) for row in data["text"]]
    for head in samples:
        source, number = head.split("**")[1], int(head.split("document ")[1].split(":")[0])
        assert data[number]["source"] == source and data[number]["text"][:600] in text
        assert "no score" in head or number == 0 or f"score {lengths[number]}" in head
    write_samples(data, result.reports, tmp_path / "again.md", 2)
    assert (tmp_path / "again.md").read_text() == text
    write_samples(data, result.reports, tmp_path / "other.md", 2, seed=1)
    assert (tmp_path / "other.md").read_text() != text


def test_documents_to_read_survive_what_is_in_them(curated, tmp_path):
    data, result = curated
    odd = [row | {"text": ODD[number % 4]} for number, row in enumerate(data.to_list())]
    write_samples(odd, result.reports, tmp_path / "samples.md", 20)
    text = (tmp_path / "samples.md").read_text(encoding="utf-8")
    assert f"``````text\n{ODD[0]}\n``````\n" in text  # a longer fence than any inside
    assert "a lone \\ud83d surrogate" in text and "x" * 600 + " ...\n" in text and ODD[3] in text
