"""Exported weights against the tools that take them: `datasets` and TRL run; the others' fields as they document."""

import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from trl import DatasetMixtureConfig, TrlParser, get_dataset

from mobilellm_hf.data.tokenization import train_tokenizer
from mobilellm_hf.data.weights_export import Location, read_export
from mobilellm_hf.data.weights_formats import ms_swift_script, write_export

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "export_weights.py"
SHARES = {"short": 0.6, "long": 0.3, "other/name": 0.1, "none": 0.0}
WORDS = {"short": 4, "long": 40, "other/name": 12}


@pytest.fixture
def mixture(tmp_path) -> tuple[Path, dict]:
    """A mixture over three files whose rows have 4, 40 and 12 words each; one source has no weight."""
    places = {}
    for name, words in WORDS.items():
        file = tmp_path / f"{name.replace('/', '-')}.jsonl"
        column = "content" if name == "long" else "text"
        rows = [json.dumps({column: f"{name[0]} " * words, "extra": number}) for number in range(4_000)]
        file.write_text("\n".join(rows))
        places[name] = {"path": str(file), "column": column}
    file = tmp_path / "mixture.yaml"
    file.write_text(yaml.safe_dump({"weights": SHARES}, sort_keys=False))
    return file, places


def words_of(rows) -> dict[str, float]:
    """source -> its share of the words."""
    counts = dict.fromkeys(WORDS, 0)
    for row in rows:
        text = row.get("text") or row.get("content")
        counts[next(name for name in WORDS if name[0] == text[0])] += len(text.split())
    return {name: count / sum(counts.values()) for name, count in counts.items()}


def exported(mixture, folder: Path, **options) -> Path:
    file, places = mixture
    write_export(read_export(file, places, WORDS), folder, **options)
    return folder


def test_interleaved_rows_have_the_shares_of_tokens(mixture, tmp_path):
    folder = exported(mixture, tmp_path / "out")
    module = runpy.run_path(str(folder / "interleave.py"))
    for strategy in ("first_exhausted", "all_exhausted"):
        rows = module["load"](seed=1, stopping_strategy=strategy)
        assert rows.column_names == ["text"] and len(rows) > 4_000
        assert words_of(rows) == pytest.approx({name: SHARES[name] for name in WORDS}, abs=0.03)
    streamed = module["load"](seed=1, streaming=True).take(3_000)
    assert words_of(streamed) == pytest.approx({name: SHARES[name] for name in WORDS}, abs=0.05)
    document = json.loads((folder / "interleave.json").read_text())
    weighed = [SHARES[name] / words for name, words in WORDS.items()]
    assert document["probabilities"] == pytest.approx([value / sum(weighed) for value in weighed])
    assert sum(document["probabilities"]) == pytest.approx(1) and len(document["datasets"]) == 3


def test_trl_parses_its_config_and_mixes_the_shares(mixture, tmp_path):
    folder = exported(mixture, tmp_path / "out")
    (config,) = TrlParser((DatasetMixtureConfig,)).parse_args_and_config(["--config", str(folder / "trl.yaml")])
    assert [entry.columns for entry in config.datasets] == [["text"], ["content"], ["text"]]
    assert sum(entry.fraction for entry in config.datasets) == pytest.approx(1)
    rows = get_dataset(config)["train"]
    assert words_of(rows) == pytest.approx({name: SHARES[name] for name in WORDS}, abs=0.001)


def test_llamafactory_gets_what_its_arguments_document(mixture, tmp_path):
    folder = exported(mixture, tmp_path / "out")
    arguments = yaml.safe_load((folder / "llamafactory.yaml").read_text())
    assert set(arguments) == {"dataset_dir", "dataset", "mix_strategy", "interleave_probs"}
    names, chances = arguments["dataset"].split(","), list(map(float, arguments["interleave_probs"].split(",")))
    assert names == ["short", "long", "other_name"] and sum(chances) == pytest.approx(1)
    assert arguments["mix_strategy"] in ("interleave_under", "interleave_over")
    info = json.loads((folder / "dataset_info.json").read_text())
    assert list(info) == names and info["long"]["columns"] == {"prompt": "content"}
    assert all(Path(entry["file_name"]).is_file() for entry in info.values())


def test_ms_swift_gets_probabilities_or_counts(mixture, tmp_path):
    file, places = mixture
    export = read_export(file, {**places, "long": {"path": "org/long", "name": "en"}}, WORDS)
    line = shlex.split(ms_swift_script(export).replace("\\\n", ""), comments=True)
    start, chances = line.index("--dataset"), line.index("--interleave_prob")
    assert line[:3] == ["exec", "swift", "pt"]
    assert line[start + 1 : chances] == [places["short"]["path"], "org/long:en", places["other/name"]["path"]]
    assert sum(map(float, line[chances + 1 : chances + 4])) == pytest.approx(1)
    counted = shlex.split(ms_swift_script(export, rows=1_000).replace("\\\n", ""), comments=True)
    counts = {name.partition("#")[0]: int(name.partition("#")[2]) for name in counted if "#" in name}
    assert sum(counts.values()) == pytest.approx(1_000, abs=2) and "--interleave_prob" not in counted
    tokens = {name: counts[places[name]["path"] if name != "long" else "org/long:en"] * WORDS[name] for name in WORDS}
    assert tokens["short"] / sum(tokens.values()) == pytest.approx(0.6, abs=0.02)
    (tmp_path / "script.sh").write_text(ms_swift_script(export))
    assert subprocess.run(["sh", "-n", str(tmp_path / "script.sh")]).returncode == 0


def test_the_catalog_knows_places_means_and_licences(tmp_path):
    file = tmp_path / "mixture.yaml"
    scored = {
        "sources": [{"catalog": "finemath"}, {"name": "org/mine", "subset": "en", "text_column": "body"}],
        "steps": {"00-checkpoint-80": 80}, "weights_sha256_or_commit": {"00-checkpoint-80": "ab" * 32},
        "curvature": "adam", "probe_math_sha256": "cd" * 32,
    }  # fmt: skip
    uncertainty = {
        "verdict": "no evidence: keep the baseline", "formula": "weights = ...", "unshrunk": None,
        "intervals_of_unshrunk": {"finemath": [0.1, 0.9], "mine": [0.1, 0.9]}, "shrinkage": {"factor": 1.0},
        "proportional": {"finemath": 0.75, "mine": 0.25}, "resampled": {"rows": 9}, "share_of_noise": {"rows": 1.0},
    }  # fmt: skip
    weights = {"finemath": 0.75, "mine": 0.25}
    document = {"weights": weights, "weights_are": "shrunk", "uncertainty": uncertainty, "scored": scored}
    file.write_text(yaml.safe_dump(document))
    export = read_export(file, tokens_per_row={"mine": 100})
    assert export.sources[0].locations == [Location("HuggingFaceTB/finemath", "finemath-3plus")]
    assert export.sources[0].tokens_per_row == pytest.approx(34e9 / 48_283_984)
    assert export.sources[1].locations == [Location("org/mine", "en", column="body")]
    write_export(export, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 10.0% to 90.0% | 75.00% |" in card and "odc-by" in card and "not known here" in card
    assert "checkpoint 00-checkpoint-80 of step 80, weights `abab" in card and "- curvature: adam" in card
    assert "No evidence: keep the baseline" in card and "probe math, rows `cdcd" in card and "were not run" in card
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    assert info["mine"] == {"hf_hub_url": "org/mine", "subset": "en", "columns": {"prompt": "body"}}


def test_parts_whose_names_would_be_alike_stay_distinct(tmp_path):
    shares = {"a/b": 0.3, "a b": 0.3, "a_b": 0.2, "c": 0.2}
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"weights": shares}, sort_keys=False))
    places = {name: {"path": f"org/{number}"} for number, name in enumerate(shares)}
    places["c"] = [{"path": "org/c", "name": "en"}, {"path": "org/d", "name": "en"}]
    export = read_export(tmp_path / "mixture.yaml", places, dict.fromkeys(shares, 10))
    assert [name for name, *_ in export.parts()] == ["a_b", "a_b_2", "a_b_3", "c_en", "c_en_2"]
    write_export(export, tmp_path / "out")
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    assert [info[name]["hf_hub_url"] for name, *_ in export.parts()] == ["org/0", "org/1", "org/2", "org/c", "org/d"]


def test_a_source_in_several_places_is_divided_and_a_split_is_kept(mixture, tmp_path):
    file, places = mixture
    several = [{"path": "org/long", "name": "en"}, {"path": "org/long", "name": "de", "split": "validation"}]
    export = read_export(file, {**places, "long": several}, WORDS)
    parts = export.parts()
    assert [name for name, *_ in parts] == ["short", "long_en", "long_de", "other_name"]
    assert parts[1][2] == parts[2][2] == export.sources[1].probability / 2
    write_export(export, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "divided equally: long." in card and "field for a split, which long need" in card
    assert "weight is 0: none." in card
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    assert info["long_de"]["split"] == "validation" and "split" not in info["long_en"]


def test_bad_input_names_the_source_and_the_remedy(mixture, tmp_path):
    file, places = mixture
    cases = [
        ({}, WORDS, "datasets has no place of 'short'"),
        ({**places, "sort": places["short"]}, WORDS, "datasets names 'sort'"),
        (places, {"short": 4, "long": 40}, "a row of 'other/name' has"),
        (places, {**WORDS, "long": 0}, "tokens_per_row: long has 0"),
        ({**places, "long": {"pat": "x"}}, WORDS, "datasets: long is"),
    ]
    for given, means, message in cases:
        with pytest.raises(ValueError, match=message):
            read_export(file, given, means)
    for text, message in (("weights: {a: 0.5}", "sum to 1"), ("a: 1", "no key weights"), ("[", "cannot be read")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_export(file, {"a": {"path": "org/a"}}, {"a": 1})
    file.write_text(yaml.safe_dump({"weights": {"s": 1.0}, "scored": {"sources": [{"rows": "x", "sources": ["s"]}]}}))
    with pytest.raises(ValueError, match="rows are of this package's own"):
        read_export(file, tokens_per_row={"s": 1})


def test_the_recipe_counts_tokens_with_a_tokenizer(mixture, tmp_path):
    file, places = mixture
    tokenizer = train_tokenizer(["s l o " * 50], 300, show_progress=False)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "places.yaml").write_text(yaml.safe_dump({"datasets": places}))
    options = ["--mixture", str(file), "--output", str(tmp_path / "out"), "--config", str(tmp_path / "places.yaml")]
    options += ["--tokenizer", str(tmp_path / "tokenizer"), "--measured_rows", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, str(RECIPE), *options], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "measured" in done.stdout, done.stdout + done.stderr
    chances = json.loads((tmp_path / "out" / "interleave.json").read_text())["probabilities"]
    texts = [f"{name[0]} " * words for name, words in WORDS.items()]
    counts = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    weighed = [SHARES[name] / count for name, count in zip(WORDS, counts, strict=True)]
    assert chances == pytest.approx([value / sum(weighed) for value in weighed]) and counts != list(WORDS.values())
