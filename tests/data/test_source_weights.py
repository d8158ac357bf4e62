"""Shares of a mixture in every way in which a YAML file can say them."""

import pytest
import yaml

from mobilellm_hf.data.catalog import mixture
from mobilellm_hf.data.rows import check_entries
from mobilellm_hf.data.source_weights import source_weights

EMBEDDED = [{"name": "embedded:stdlib,sympy_docs"}]


def test_every_entry_says_its_own():
    entries = [
        {"name": "embedded:stdlib", "weight": 0.25},
        {"name": "notes/*.jsonl", "source": "notes", "weight": 0.5},
        {"name": "org/notes", "source": "notes", "weight": 0.15},
        {"catalog": "open_web_math", "weight": 0.1},
    ]
    check_entries("sources", entries, weights=True)
    assert source_weights(entries) == {"stdlib": 0.25, "notes": pytest.approx(0.65), "open_web_math": 0.1}
    phase = mixture("pretraining", 1)
    entries = [{"catalog": name, "stage": "pretraining", "phase": 1} for name in phase if name != "arxiv"]
    entries.append({"catalog": "arxiv", "name": "copies/arxiv", "stage": "pretraining", "phase": 1})
    check_entries("sources", entries, weights=True)
    assert source_weights(entries) == pytest.approx(phase)


def test_weights_for_all_from_a_file_the_paper_or_the_yaml_itself(tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_text(yaml.safe_dump({"weights": {"stdlib": 0.75, "sympy_docs": 0.25}, "figures": {}}))
    assert source_weights(EMBEDDED, str(path)) == {"stdlib": 0.75, "sympy_docs": 0.25}
    assert source_weights(EMBEDDED, {"stdlib": 1, "sympy_docs": 0}) == {"stdlib": 1, "sympy_docs": 0}
    phase = mixture("pretraining", 2)
    entries = [{"catalog": name} for name in phase]
    assert source_weights(entries, {"catalog": ["pretraining", 2]}) == phase
    assert source_weights([{"name": "a.jsonl"}], {"b": 1}) == {"b": 1}  # what it is called only the data know
    path.write_text(yaml.safe_dump({"weights": {"catalog": ["pretraining", 2]}}))
    assert source_weights(entries, path) == phase


def test_percentages_are_normalised_and_that_is_said(caplog):
    entries = [{"name": f"embedded:{name}"} for name in ("a", "b", "c")]
    assert source_weights(entries, {"a": 33.3, "b": 33.3, "c": 33.3}) == pytest.approx(dict.fromkeys("abc", 1 / 3))
    assert "read as percentages; they sum to 99.9" in caplog.text
    assert source_weights(entries, {"a": 50, "b": 30, "c": 20})["a"] == 0.5


def test_a_source_without_a_weight_is_named(caplog):
    assert source_weights(EMBEDDED, {"stdlib": 1.0}) == {"stdlib": 1.0}
    assert "nothing is read of sympy_docs" in caplog.text


@pytest.mark.parametrize(
    ("entries", "weights", "message"),
    [
        ([{"name": "embedded:a", "weight": 1}, {"catalog": "wiki"}], None,
         r"sources\[1\] has no weight: give every source a weight, or stage and phase"),
        ([{"name": "embedded:a", "weight": 0.5}, {"name": "embedded:b"}], None, r"sources\[1\] has no weight"),
        ([{"name": "embedded:a,b", "weight": 1}], None, r"sources\[0\]: a weight is of one.*embedded:NAME"),
        ([{"rows": "x", "weight": 1}], None, r"sources\[0\]: .* name one of them with sources"),
        ([{"name": "embedded:a", "weight": -1}], None, r"sources\[0\]: weight is -1: it must be a number"),
        ([{"name": "embedded:a", "weight": True}], None, r"weight is True"),
        ([{"name": "embedded:a", "weight": 0.9}], None, r"must sum to 1, or to 100.*they sum to 0.9: a 0.9"),
        ([{"catalog": "wiki", "stage": "pretraining"}], None, r"give a weight, or stage and phase"),
        ([{"catalog": "wiki", "stage": "pretraining", "phase": 3}], None, r"no phase 3"),
        ([{"catalog": "pes2o", "stage": "pretraining", "phase": 1}], None, r"pes2o is not in phase 1"),
        ([{"name": "embedded:a", "weight": 1}], {"a": 1}, r"sources\[0\] has weight, and there are weights for all"),
        (EMBEDDED, {"stdlib": 0.5, "sympydocs": 0.5}, r"'sympydocs' is to have .* Did you mean sympy_docs"),
        (EMBEDDED, {"catalog": ["pretraining", 1]}, r"'starcoder' is to have .* The sources are stdlib, sympy_docs"),
        (EMBEDDED, {"catalog": ["pretraining"]}, r"write \[STAGE, PHASE\]"),
        (EMBEDDED, {"stdlib": 60, "sympy_docs": 38}, r"they sum to 98"),
        (EMBEDDED, {"stdlib": 0.333, "sympy_docs": 0.666}, r"they sum to 0.999"),
        (EMBEDDED, {"stdlib": "half"}, r"weights: stdlib is 'half'"),
        (EMBEDDED, [], r"weights is \[\]: write a file"),
        (EMBEDDED, "nowhere.yaml", r"nowhere.yaml cannot be read"),
    ],
)  # fmt: skip
def test_weights_that_are_none_are_refused(entries, weights, message):
    with pytest.raises(ValueError, match=message):
        source_weights(entries, weights)


def test_a_file_without_weights_is_refused(tmp_path):
    (tmp_path / "other.yaml").write_text("learning_rate: 1")
    with pytest.raises(ValueError, match="other.yaml has no key weights"):
        source_weights(EMBEDDED, tmp_path / "other.yaml")


def test_the_names_of_the_loaded_rows_decide():
    with pytest.raises(ValueError, match="'a' is to have .* The sources are x, y"):
        source_weights([{"name": "a.jsonl"}], {"a": 1}, sources=["x", "y"])
