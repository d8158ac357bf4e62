"""The catalog against values typed from the paper, and its entries against `load_corpus`; nothing reaches the Hub."""

import inspect
import json
import math
import pickle
import subprocess
import sys

import pytest
from datasets import Dataset

from mobilellm_hf.data import catalog
from mobilellm_hf.data.catalog import SOURCES, check_printed, describe, entries, entry, find, main, mixture, printed
from mobilellm_hf.data.catalog_sources import BENCHMARK_ROWS, DOMAINS, PHASES
from mobilellm_hf.data.corpora import CorpusError, load_corpus
from mobilellm_hf.data.local_files import loader_of

ALL_PHASES = [(stage, phase) for stage, phases in PHASES.items() for phase in phases]
CHAT = {"tulu3", "open_math_reasoning", "open_science_reasoning", "open_code_reasoning"}
# Typed from Tables 5, 6 and 7: rows, tokens in billions, stage and percentages of its phases.
IN_THE_PAPER = {
    "starcoder": (206_640_114, 263.8, "pretraining", (10.66, 0.52)),
    "fineweb_edu": (1_279_107_432, 1300, "pretraining", (63.75, 54.83)),
    "algebraic_stack": (3_404_331, 12.6, "pretraining", (2.25, 1.26)),
    "nemotron_science": (708_920, 2, "pretraining", (None, 0.03)),
    "natural_reasoning": (1_145_824, 1.8, "pretraining", (None, 3.18)),
    "pes2o": (38_800_000, 50, "pretraining", (None, 0.08)),
    "dolmino_dclm": (606_000_000, None, "midtraining", (37.03, 6.51)),
    "dolmino_flan": (57_300_000, None, "midtraining", (4.10, 0.72)),
    "dolmino_math": (21_000_000, None, "midtraining", (11.63, 29.10)),
    "nemotron_cc_math": (144_000_000, None, "midtraining", (3.45, 19.40)),
    "gsm8k": (7_473, None, "midtraining", (None, 0.97)),
    "tulu3": (866_000, None, "posttraining", (100, None)),
    "open_science_reasoning": (802_000, None, "posttraining", (None, 100)),
}
# A row as the card of each data set shows it, and its text.
ROWS = {
    "trivia_qa": (
        {"question": "Who was the man behind The Chipmunks?", "answer": {"value": "David Seville", "aliases": ["x"]}},
        "Question: Who was the man behind The Chipmunks?\nAnswer: David Seville",
    ),
    "openbookqa": (
        {
            "id": "7-980",
            "question_stem": "The sun is responsible for",
            "choices": {
                "text": ["puppies learning new tricks", "growing old", "wilting in a vase", "plants sprouting"],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "D",
        },
        "Question: The sun is responsible for\nAnswer: plants sprouting",
    ),
    "natural_questions": (
        {"question": "names of the metropolitan municipalities", "answer": ["Mangaung", "eThekwini"]},
        "Question: names of the metropolitan municipalities\nAnswer: Mangaung, eThekwini",
    ),
    "piqa": (
        {"goal": "How to boil eggs.", "sol1": "Use no water.", "sol2": "Use cold water.", "label": 1},
        "Question: How to boil eggs.\nAnswer: Use cold water.",
    ),
    "gsm8k": (
        {"question": "How many clips?", "answer": "She sold 48+24 = <<48+24=72>>72 clips.\n#### 72"},
        "Question: How many clips?\nAnswer: She sold 48+24 = <<48+24=72>>72 clips.\n#### 72",
    ),
    "boolq": (
        {"question": "does ethanol take more energy", "answer": False, "passage": "All biomass goes through steps."},
        "All biomass goes through steps.\nQuestion: does ethanol take more energy\nAnswer: no",
    ),
    "arc_easy": (
        {"question": "Why so many?", "choices": {"text": ["shade", "food"], "label": ["1", "2"]}, "answerKey": "2"},
        "Question: Why so many?\nAnswer: food",
    ),
    "nemotron_math": (
        {"input": [{"role": "user", "content": "What is 1+1?"}], "output": "<think>Easy.</think>2"},
        "What is 1+1?\n\n<think>Easy.</think>2",
    ),
    "natural_reasoning": (
        {
            "question": "Why is the sky blue?",
            "reference_answer": "Scattering.",
            "responses": [{"response_model": "Llama3.3-70B-Instruct", "response": "Short waves scatter more."}],
        },
        "Why is the sky blue?\n\nShort waves scatter more.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_THE_PAPER)
def test_rows_tokens_and_percentages_are_those_of_the_tables(name):
    rows, tokens, stage, percentages = IN_THE_PAPER[name]
    spec = SOURCES[name]
    assert (spec.name, spec.rows, spec.tokens, spec.mix[stage]) == (name, rows, tokens, percentages)


def test_every_line_of_the_tables_is_there_and_says_what_it_must():
    assert [len([s for s in SOURCES.values() if stage in s.mix]) for stage in PHASES] == [14, 9 + 8, 4]
    assert SOURCES["starcoder"].mix == {"pretraining": (10.66, 0.52), "midtraining": (6.90, 9.70)}
    # "The total token count of the datasets used in pre-training is 1.8T".
    assert round(math.fsum(spec.tokens for spec in SOURCES.values() if spec.tokens) / 1000, 1) == 1.8
    for spec in SOURCES.values():
        assert spec.domain in DOMAINS and spec.hub_id.count("/") == 1 and spec.subsets
        assert spec.columns or "column" in spec.unseen
        assert spec.verified == (spec.unseen == "")
        assert spec.license or "The card names no licence" in spec.note or "The card refers to" in spec.note
        assert bool(spec.text_of) == (len(spec.columns or "1") > 1 and not spec.is_chat)
    with pytest.raises(AttributeError):
        SOURCES["gsm8k"].rows = 1


@pytest.mark.parametrize(
    ("stage", "phase", "total"),
    [("pretraining", 1, 100.01), ("pretraining", 2, 99.99), ("midtraining", 1, 99.99), ("midtraining", 2, 99.98)],
)
def test_what_is_printed_sums_to_a_hundred_but_for_rounding(stage, phase, total):
    assert check_printed(stage, phase) == pytest.approx(total, abs=1e-9)


def test_a_mistyped_percentage_is_found(monkeypatch):
    wrong = {**catalog.printed("pretraining", 1), "wiki": 5.30}
    monkeypatch.setattr(catalog, "printed", lambda stage, phase: wrong)
    with pytest.raises(CorpusError, match="pretraining, phase 1, sum to 100.28%, which no rounding"):
        check_printed("pretraining", 1)


@pytest.mark.parametrize(("stage", "phase"), ALL_PHASES)
def test_shares_sum_to_one_exactly_in_any_order_and_keep_the_printed_proportions(stage, phase):
    shares = mixture(stage, phase)
    values = list(shares.values())
    assert sum(values) == sum(values[::-1]) == sum(sorted(values)) == 1.0
    assert min(values) > 0
    lines = printed(stage, phase)
    for name in set(lines) - {"benchmark"}:
        assert shares[name] == pytest.approx(lines[name] / math.fsum(lines.values()), rel=1e-6)


def test_the_benchmark_sets_share_their_line_by_rows_and_table_7_by_examples():
    shares = mixture("midtraining", 2)
    assert list(shares)[-8:] == list(BENCHMARK_ROWS) and sum(BENCHMARK_ROWS.values()) == 267_649
    assert sum(shares[name] for name in BENCHMARK_ROWS) == pytest.approx(0.97 / 99.98)
    assert shares["piqa"] / shares["gsm8k"] == pytest.approx(16_113 / 7_473)
    assert not set(BENCHMARK_ROWS) & set(mixture("midtraining", 1))
    assert mixture("posttraining", "general") == {"tulu3": 1.0} and printed("posttraining", "general") == {}
    assert mixture("posttraining", "reasoning")["open_math_reasoning"] == pytest.approx(3.2 / 6.202)


@pytest.mark.parametrize(("stage", "phase"), [("pretraining", 3), ("pre-training", 1), ("posttraining", 1)])
def test_an_unknown_phase_is_refused_with_those_there_are(stage, phase):
    with pytest.raises(CorpusError, match="midtraining: 1, 2; posttraining: general, reasoning"):
        mixture(stage, phase)


def test_an_unknown_name_brings_the_closest():
    with pytest.raises(CorpusError, match="no source 'finemth'. Did you mean finemath?"):
        find("finemth")
    with pytest.raises(CorpusError, match="no source 'zzzz'. It has starcoder, open_web_math, "):
        entry("zzzz")


@pytest.mark.parametrize("name", SOURCES)
def test_an_entry_is_taken_by_load_corpus_or_refused_with_the_reason(name):
    spec = SOURCES[name]
    given = {"text_column": "text"} if spec.columns is None else {}
    if spec.is_chat or spec.obstacle:
        with pytest.raises(CorpusError, match="is chat, not text" if spec.is_chat else "cannot be loaded by its name"):
            entries(name)
        return
    for arguments in entries(name, **given):
        inspect.signature(load_corpus).bind(**arguments)
        assert (arguments["name"], arguments["source"], arguments["domain"]) == (spec.hub_id, name, spec.domain)
        assert arguments.get("data_files", []) == list(spec.data_files)
        assert arguments.get("text_of") is spec.text_of
        known = [file.removesuffix(".zst") for file in spec.data_files]
        assert not known or loader_of(name, known) in ("json", "parquet")


def test_entries_of_each_kind():
    common = {"split": "train", "streaming": True, "text_column": "text"}
    assert entry("open_web_math") == {
        "name": "open-web-math/open-web-math", "source": "open_web_math", "domain": "math", "subset": None, **common
    }  # fmt: skip
    assert entry("wiki")["subset"] == "wiki"
    assert [given["subset"] for given in entries("nemotron_cc_math")] == ["3", "4plus", "4plus_MIND"]
    with pytest.raises(CorpusError, match="cosmopedia has several subsets. Give one of auto_math_text, khanacademy"):
        entry("cosmopedia")
    assert entry("cosmopedia", subset="stanford", streaming=False)["streaming"] is False
    with pytest.raises(CorpusError, match="give text_column. Not checked is the name of the text column"):
        entry("nemotron_pretraining_code")
    assert entry("nemotron_pretraining_code", text_column="text")["subset"] == "Synthetic-Code"
    for name in CHAT:
        with pytest.raises(CorpusError, match=f"{name} is chat, not text. Fine-tune on "):
            entry(name)


def test_overrides_reach_every_subset_and_a_local_copy_is_one_entry():
    assert entry("pes2o")["data_files"] == ["data/v2/train-*.json.gz"]
    assert entry("gsm8k")["text_of"] is SOURCES["gsm8k"].text_of and entry("gsm8k")["min_characters"] == 1
    assert "min_characters" not in entry("nemotron_math")
    assert not any("test" in pattern for pattern in entry("dolmino_math")["data_files"])
    assert [given["streaming"] for given in entries("cosmopedia", streaming=False)] == [False] * 8
    assert [given["subset"] for given in entries("cosmopedia", subset="stanford")] == ["stanford"]
    assert [given["name"] for given in entries("cosmopedia", name="copies/cosmopedia")] == ["copies/cosmopedia"]


@pytest.mark.parametrize("streaming", [False, True])
def test_local_copies_of_question_sets_become_text(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, (row, text) in ROWS.items():
        Dataset.from_list([row]).to_parquet(tmp_path / f"{name}.parquet")
        arguments = entry(name, name=str(tmp_path / f"{name}.parquet"), streaming=streaming, min_characters=1)
        assert list(load_corpus(**arguments)) == [{"text": text, "source": name, "domain": SOURCES[name].domain}]


def test_a_local_copy_takes_the_place_of_what_no_name_loads(tmp_path):
    with pytest.raises(CorpusError, match="arxiv cannot be loaded by its name: its files are the URLs"):
        entry("arxiv")
    paper = "We prove that every even number is the sum of two halves, and that each of these is a number as well."
    (tmp_path / "part.jsonl").write_text(json.dumps({"text": paper, "meta": {"url": "x"}}))
    rows = load_corpus(**entry("arxiv", name=str(tmp_path)))
    assert rows[:] == {"text": [paper], "source": ["arxiv"], "domain": ["knowledge"]}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_text(name):
    row, text = ROWS[name]
    spec = SOURCES[name]
    assert set(spec.columns) <= set(row) and spec.text_of(row) == text
    # Through Arrow as `datasets` stores it, and through the pickle that a worker gets.
    compose = pickle.loads(pickle.dumps(spec.text_of))
    assert Dataset.from_list([row, row]).map(lambda stored: {"composed": compose(stored)})["composed"][:] == [text] * 2


def test_rows_that_lack_a_part():
    row, _ = ROWS["natural_reasoning"]
    assert SOURCES["natural_reasoning"].text_of({**row, "responses": []}) == "Why is the sky blue?\n\nScattering."
    row, text = ROWS["boolq"]
    assert SOURCES["boolq"].text_of({**row, "answer": True}) == text.removesuffix("no") + "yes"
    with pytest.raises(ValueError):
        SOURCES["arc_easy"].text_of({**ROWS["arc_easy"][0], "answerKey": "E"})
    assert {name for name, spec in SOURCES.items() if spec.text_of} == {
        *ROWS, "arc_challenge", "nemotron_science", "nemotron_code"
    }  # fmt: skip


def test_the_tables_are_printed_with_every_licence_and_doubt(capsys):
    for stage in PHASES:
        shown = describe(stage)
        assert max(map(len, shown.splitlines())) <= 119 and "…" not in shown
        for name, spec in SOURCES.items():
            if stage in spec.mix:
                line = next(line for line in shown.splitlines() if line.startswith(f"{name} "))
                assert spec.hub_id in line and f"{spec.rows:,}" in line
                assert line.endswith(spec.license or "none named")
                assert " ".join(spec.unseen.split()) in " ".join(shown.split())
    main(["posttraining"])
    assert capsys.readouterr().out == describe("posttraining") + "\n"
    with pytest.raises(SystemExit):
        main(["pretrain"])
    assert "there is no stage 'pretrain'; the stages are pretraining" in capsys.readouterr().err


def test_the_command_prints_all_three():
    command = [sys.executable, "-m", "mobilellm_hf.data.catalog"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    assert shown == "\n\n".join(map(describe, PHASES)) + "\n"
