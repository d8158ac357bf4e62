"""Run by test_sampled_tasks.py, alone or by torchrun.

sampled_task_worker.py FOLDER killed        by its own hand, with no chance to clean up, once 10 completions are stored
sampled_task_worker.py FOLDER failing       one process fails, here and there; then to the end; writes report-RANK.json
"""

import itertools
import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from sampled_task_cases import make_model, make_tokenizer, run

from mobilellm_hf.evaluation import journal, records, sampled_tasks, samplers
from mobilellm_hf.evaluation.records import Records, load_parts
from mobilellm_hf.evaluation.sampling import sample_completions


def no_grader(*arguments):
    raise ValueError("no tests")


def no_more_samples(*arguments):
    yield from itertools.islice(sample_completions(*arguments), 3)
    raise RuntimeError("broken")


def full_disk(*arguments):
    raise OSError("no space left")


def error_of(folder, model, tokenizer) -> str:
    try:
        return str(run(folder, model, tokenizer, batch_size=4))
    except (RuntimeError, ValueError, OSError) as error:
        return str(error)


def die_at_ten():
    journal.SECONDS_BETWEEN_WRITES = 0.001
    append, stored = Records.append, []

    def append_and_die(self, records):
        append(self, records)
        stored.extend(records)
        if len(stored) >= 10:
            os.kill(os.getpid(), signal.SIGKILL)

    Records.append = append_and_die


def main():
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    state = PartialState(cpu=True, timeout=timedelta(seconds=60))
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    if mode == "killed":
        die_at_ten()
        run(folder, model, tokenizer, batch_size=4)
    errors, kept = [], []
    for module, name, broken, fails in (
        (sampled_tasks, "grader_of", no_grader, state.is_last_process),
        (samplers, "sample_completions", no_more_samples, state.is_last_process),
        (records, "write_finished", full_disk, state.is_main_process),
    ):
        whole = getattr(module, name)
        setattr(module, name, broken if fails else whole)
        errors.append(error_of(folder, model, tokenizer))
        setattr(module, name, whole)
        state.wait_for_everyone()
        kept.append(len(load_parts(folder)))
        state.wait_for_everyone()
    report = {"errors": errors, "kept": kept}
    report["result"] = run(folder, model, tokenizer, batch_size=4, source="here").to_json()
    (folder / f"report-{state.process_index}.json").write_text(json.dumps(report))
    state.destroy_process_group()


if __name__ == "__main__":
    main()
