"""Run by torchrun and as a script from test_processes.py: curates in some of the ways that the tests compare.

curation_worker.py FOLDER curate NAME [RANK SHARDS]     into FOLDER/NAME; RANK is killed after so many shards
curation_worker.py FOLDER stream NAME                   the same, and FOLDER/stream.jsonl; writes what was counted
curation_worker.py FOLDER memory                        prints how memory grows with the documents of FOLDER/*.arrow
"""

import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from curation_cases import WordScorer, documents
from datasets import Dataset, disable_progress_bars

from mobilellm_hf.curation.ask_llm import AskLLM, Judge
from mobilellm_hf.curation.corpus import open_documents
from mobilellm_hf.curation.quality import QualityClassifier
from mobilellm_hf.curation.representative import AtMost
from mobilellm_hf.curation.scoring import Rate
from mobilellm_hf.curation.stages import Curation, CurationStage, Verdict, curate, top_of_each_source
from mobilellm_hf.curation.text_filter import TextFilter

COUNT, PER_SHARD = 70, 6


class Best(CurationStage):
    """The best half of each source by a cheap score."""

    name = "best"

    def __init__(self, scorer: WordScorer, per_shard: int = PER_SHARD):
        self.scorer, self.per_shard = scorer, per_shard

    def settings(self):
        return {"name": self.name}

    def decide(self, given):
        values = given.scores_of(self.scorer, {}, self.per_shard).column("score")
        sources = np.unique(given.documents["source"][:], return_inverse=True)[1]
        kept = top_of_each_source(values, sources, 0.5)
        return Verdict((~kept).astype(np.int8), ("not the best",), {"score": values})


def run(folder: Path, name: str, rank: int | None = None, shards: int | None = None) -> Curation:
    """Four steps, two of which run a model; `judge`, `classifier` and `prompt.txt` are in the folder."""
    die = shards if rank == PartialState().process_index else None
    stages = [
        TextFilter(),
        Best(WordScorer(die)),
        QualityClassifier(folder / "classifier", -100.0, per_shard=PER_SHARD, batch_tokens=200),
        AskLLM(Judge(folder / "judge", batch_tokens=300), folder / "prompt.txt", top=0.5, per_shard=PER_SHARD),
        AtMost(4),
    ]
    return curate(documents(COUNT), stages, folder / name)


def stream(folder: Path, name: str) -> None:
    run(folder, name)
    counted = []
    found = open_documents([{"name": str(folder / "stream.jsonl"), "streaming": True}], folder / "streams",
                           Rate(counted.append), 40)  # fmt: skip
    rank = PartialState().process_index
    (folder / f"{name}-{rank}.json").write_text(json.dumps({"texts": found["text"][:], "counted": counted}))


def own_memory() -> int:
    """Bytes that are the process's own: pages of files that are mapped come and go as the system likes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def memory(folder: Path) -> None:
    """The peak over what there was before, for each file, smallest first."""
    peaks, before, stop = {}, {}, threading.Event()

    def watch():
        while not stop.wait(0.002):
            peaks[current] = max(peaks[current], own_memory())

    files = sorted(folder.glob("*.arrow"), key=lambda file: file.stat().st_size)
    current = files[0].stem
    peaks[current] = 0
    thread = threading.Thread(target=watch)
    thread.start()
    for file in [files[0], *files]:  # what a first run loads is no growth
        before[file.stem], peaks[file.stem] = own_memory(), 0
        current = file.stem
        steps = [TextFilter(), Best(WordScorer(), 256), AtMost(100)]
        kept = curate(Dataset.from_file(str(file)), steps, folder / f"run-{file.stem}-{time.time_ns()}")
        assert len(kept.documents) == 300
    stop.set()
    thread.join()
    print(json.dumps({name: peak - before[name] for name, peak in peaks.items()}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    disable_progress_bars()
    PartialState(cpu=True)
    folder, what, *rest = Path(sys.argv[1]), *sys.argv[2:]
    if what == "curate":
        run(folder, rest[0], *map(int, rest[1:]))
    else:
        {"stream": stream, "memory": memory}[what](folder, *rest)
    PartialState().destroy_process_group()
