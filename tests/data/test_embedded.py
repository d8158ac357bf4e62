import json
import os
import subprocess
import sys
from collections import defaultdict

import pytest

from mobilellm_hf.data import embedded, embedded_sources
from mobilellm_hf.data.embedded import SOURCES, describe_corpus, embedded_rows, load_embedded_corpus

SMALL = 60_000


@pytest.fixture(scope="module")
def corpus():
    return load_embedded_corpus(max_bytes_per_source=SMALL)


@pytest.fixture(scope="module")
def rows(corpus):
    return [row for split in corpus.values() for row in split]


def bytes_by_source(rows):
    sizes = defaultdict(int)
    for row in rows:
        sizes[row["source"]] += len(row["text"].encode("utf-8"))
    return sizes


def test_every_source_has_rows_in_every_split(corpus):
    assert list(corpus) == ["train", "probe", "test"]
    for split in corpus.values():
        assert split.column_names == ["text", "source", "domain"]
        assert set(split["source"]) == set(SOURCES)
    assert {spec.domain for spec in SOURCES.values()} == {"code", "math", "knowledge"}
    total = sum(corpus.num_rows.values())
    assert 0.7 < corpus["train"].num_rows / total < 0.9


def test_sources_keep_to_their_bytes_and_use_most_of_them(rows):
    sizes = bytes_by_source(rows)
    assert max(sizes.values()) <= SMALL
    assert min(sizes.values()) > 0.5 * SMALL


def test_no_document_is_empty_too_long_or_repeated(rows):
    texts = [row["text"] for row in rows]
    assert min(len("".join(text.split())) for text in texts) >= 64
    assert max(map(len, texts)) <= 4_000
    assert len({" ".join(text.split()) for text in texts}) == len(texts)


def test_the_pieces_of_a_file_stay_in_one_split():
    splits = embedded_rows(["stdlib", "test_suites"], max_bytes_per_source=300_000, splits=True)
    homes, pieces = defaultdict(set), defaultdict(int)
    for name, split in splits.items():
        for module in split["module"]:
            homes[module].add(name)
            pieces[module] += 1
    assert max(pieces.values()) > 1
    assert all(len(names) == 1 for names in homes.values())


def test_a_smaller_budget_samples_over_the_alphabet():
    modules = list(dict.fromkeys(embedded_rows(["stdlib"], max_bytes_per_source=150_000)["module"]))
    everything = sorted(embedded_sources.SOURCES["stdlib"].modules(0))
    places = [everything.index(module) / len(everything) for module in modules]
    assert min(places) < 0.25 and max(places) > 0.75


def test_the_seed_changes_the_sample_and_the_synthetic_figures():
    for source in ("codec_tables", "synthetic_arithmetic"):
        first, again, other = (
            embedded_rows([source], max_bytes_per_source=SMALL, seed=seed)["text"][:] for seed in (0, 0, 1)
        )
        assert first == again
        assert set(first) != set(other)


def test_rows_do_not_depend_on_the_file_systems_order(monkeypatch):
    sources = ["codec_tables", "numpy_docs"]
    expected = embedded_rows(sources, max_bytes_per_source=SMALL).to_list()
    walk = os.walk

    def reversed_walk(root):
        for folder, subfolders, names in walk(root):
            subfolders.reverse()
            yield folder, subfolders, names[::-1]

    monkeypatch.setattr(embedded_sources.os, "walk", reversed_walk)
    assert embedded_rows(sources, max_bytes_per_source=SMALL).to_list() == expected


def test_rows_do_not_depend_on_the_process_and_its_hash_seed(corpus):
    script = (
        "import json; from mobilellm_hf.data.embedded import load_embedded_corpus;"
        f"corpus = load_embedded_corpus(max_bytes_per_source={SMALL});"
        "print(json.dumps({name: split.to_list() for name, split in corpus.items()}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert json.loads(run.stdout) == {name: split.to_list() for name, split in corpus.items()}


def test_the_synthetic_answers_are_right():
    text = embedded_rows(["synthetic_arithmetic"], max_bytes_per_source=SMALL)["text"][0]
    checked = 0
    for line in text.splitlines():
        question, answer = line.rsplit(" Answer: ", 1)
        if question.startswith("What is") and "%" not in question:
            assert eval(question[len("What is ") : question.index("?")]) == int(answer)
            checked += 1
        elif question.startswith("Solve"):
            left, right = question[len("Solve ") : question.index(".")].replace("x", answer).split(" = ")
            assert eval(left) == int(right)
            checked += 1
        else:
            percent, of = question[len("What is ") : question.index("?")].split("% of ")
            assert int(percent) * int(of) == 100 * int(answer)
    assert checked >= 3


def test_sympy_code_and_docs_share_no_docstring():
    (text,) = SOURCES["sympy_code"].modules(0)["sympy/ntheory/primetest.py"]()
    docs = SOURCES["sympy_docs"].modules(0)["sympy/ntheory/primetest.py"]()
    isprime = next(doc for doc in docs if doc.startswith("sympy.ntheory.primetest.isprime(n)"))
    assert "def isprime(n):" in text
    assert "Test if n is a prime number" in isprime
    assert "Test if n is a prime number" not in text


def test_a_source_that_is_missing_is_an_error_if_named_and_a_warning_if_not(monkeypatch, caplog):
    missing = embedded_sources.SourceSpec("stdlib", "code", "nothing at all", lambda seed: {})
    monkeypatch.setattr(embedded, "SOURCES", {"stdlib": missing, "codec_tables": SOURCES["codec_tables"]})
    with pytest.raises(FileNotFoundError, match="stdlib.*not installed"):
        load_embedded_corpus(["stdlib"])
    corpus = load_embedded_corpus(max_bytes_per_source=SMALL)
    assert set(corpus["train"]["source"]) == {"codec_tables"}
    assert "stdlib" in caplog.text


def test_an_unknown_source_is_named_together_with_the_known_ones():
    with pytest.raises(ValueError, match="wikipedia.*stdlib"):
        load_embedded_corpus(["wikipedia"])


def test_the_table_counts_what_is_there(corpus):
    table = describe_corpus(corpus)
    for name in SOURCES:
        assert name in table
    assert f"{corpus['train'].num_rows:,}" in table
    size = sum(len(text.encode()) for split in corpus.values() for text in split["text"])
    assert f"{size:,}" in table
    assert max(map(len, table.splitlines())) <= 119


def test_the_command_prints_the_table_and_explains_a_wrong_name(capsys):
    embedded.main(["--sources", "codec_tables", "--max-bytes-per-source", str(SMALL)])
    assert "codec_tables" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        embedded.main(["--sources", "nonsense"])
    assert "No embedded source is called nonsense" in capsys.readouterr().err
