"""Two processes against one, kills in the middle of scoring, and memory against the number of documents."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from curation_cases import PROMPT, documents, save_classifier, save_judge
from curation_worker import run

WORKER = Path(__file__).with_name("curation_worker.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def worker(folder: Path, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    command = [sys.executable, *(TORCHRUN if processes == 2 else []), str(WORKER), str(folder), *arguments]
    return subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )


def decisions(folder: Path) -> dict[str, pa.Table]:
    return {file.parent.name: pyarrow.parquet.read_table(file) for file in sorted(folder.glob("*/decisions.parquet"))}


def same(found: dict[str, pa.Table], expected: dict[str, pa.Table]) -> bool:
    """To the bit but for scores, which depend on what shares a batch."""
    assert list(found) == list(expected)
    for name, table in found.items():
        assert table.column_names == expected[name].column_names
        for column in table.column_names:
            one, other = table[column].to_numpy(), expected[name][column].to_numpy()
            if column in ("score", "answered"):
                np.testing.assert_allclose(one, other, atol=1e-6)
            else:
                np.testing.assert_array_equal(one, other)
    return True


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    save_judge(folder / "judge")
    save_classifier(folder / "classifier")
    (folder / "prompt.txt").write_text(PROMPT)
    (folder / "stream.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents(60).to_list()))
    run(folder, "one")
    return folder


def test_a_run_that_was_killed_goes_on_with_any_number_of_processes(place):
    """The second of two processes dies at its third shard, and torchrun ends the other."""
    done = worker(place, "curate", "killed", "1", "2", processes=2)
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr, done.stderr[-2_000:]
    shards = {file: file.stat().st_mtime_ns for file in (place / "killed").rglob("shard-*.arrow")}
    assert {file.name for file in shards} >= {"shard-000001.arrow", "shard-000003.arrow"}
    assert not {file.name for file in shards} & {"shard-000005.arrow", "shard-000007.arrow"}
    assert list(decisions(place / "killed")) == ["1-text"]
    shutil.copytree(place / "killed", place / "alone")  # keeps the times
    run(place, "alone")
    done = worker(place, "stream", "killed", processes=2)
    assert done.returncode == 0, done.stderr[-2_000:]
    for folder in ("killed", "alone"):
        assert same(decisions(place / folder), decisions(place / "one"))
        for file, time in shards.items():
            assert (place / folder / file.relative_to(place / "killed")).stat().st_mtime_ns == time
    assert not list((place / "killed").rglob("*.partial"))
    # The stream was read by one process and seen by both.
    first, second = (json.loads((place / f"killed-{rank}.json").read_text()) for rank in range(2))
    assert first["texts"] == second["texts"] == documents(60)["text"][:40]
    assert sum(first["counted"]) == 40


def test_one_process_goes_on_after_a_kill(place):
    done = worker(place, "curate", "lonely", "0", "4")
    assert done.returncode == -signal.SIGKILL
    shards = {file: file.stat().st_mtime_ns for file in (place / "lonely").rglob("shard-*.arrow")}
    assert len(shards) == 4
    run(place, "lonely")
    assert same(decisions(place / "lonely"), decisions(place / "one"))
    assert {file: file.stat().st_mtime_ns for file in shards} == shards


def test_memory_does_not_grow_with_the_documents(tmp_path):
    """24, 48 and 96 MB of text; what grows is some bytes a document for its number, score and reason."""
    words = "".join(chr(97 + number % 26) for number in range(12_000))
    schema = pa.schema([("text", pa.string()), ("source", pa.string())])
    for count in (2_000, 4_000, 8_000):
        with pa.OSFile(str(tmp_path / f"{count}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for start in range(0, count, 250):
                numbers = range(start, start + 250)
                batch = [[f"{number} {words}" for number in numbers], ["abc"[number % 3] for number in numbers]]
                writer.write_batch(pa.record_batch(batch, schema=schema))
    done = worker(tmp_path, "memory")
    assert done.returncode == 0, done.stderr[-2_000:]
    peaks = json.loads(done.stdout.splitlines()[-1])
    assert list(peaks) == ["2000", "4000", "8000"]
    assert peaks["8000"] < peaks["2000"] + 30e6, peaks  # of 72 MB more text
