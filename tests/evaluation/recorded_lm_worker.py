"""Run by test_recorded_lm.py with two processes: recorded_lm_worker.py PLACE OUT"""

import sys
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from evaluation_cases import GOLD, GivenLM
from rich.console import Console

from mobilellm_hf.evaluation.documents import locate
from mobilellm_hf.evaluation.lm_eval_runner import quiet, run_lm_eval_task
from mobilellm_hf.evaluation.lm_eval_tasks import build_parts
from mobilellm_hf.evaluation.models import load_model, load_tokenizer
from mobilellm_hf.evaluation.recorded_lm import Team
from mobilellm_hf.evaluation.suites import TASKS
from mobilellm_hf.progress import StageProgress


def run(name: str, place: Path, folder: Path, lm) -> None:
    team = Team(lm)
    if not PartialState().is_main_process:
        team.follow()
        return
    with quiet():
        source = locate(name, TASKS[name].data, place / "data")
        parts = build_parts(TASKS[name], source, max_new_tokens=24)
    with team, StageProgress([name], Console(quiet=True)) as progress, progress.stage(name) as stage:
        run_lm_eval_task(TASKS[name], parts, team, folder, stage, source=source.label)


class Inkless(GivenLM):
    def generate_until(self, requests, disable_tqdm=False):
        raise ValueError("out of ink")


def main() -> None:
    place, out = map(Path, sys.argv[1:])
    state = PartialState(cpu=True, timeout=timedelta(seconds=120))
    tokenizer = load_tokenizer(str(place / "model"))
    lm = load_model(str(place / "model"), tokenizer=tokenizer).lm
    for name in ("gsm8k_8shot", "arc_easy"):
        run(name, place, out / f"two-{name}", lm)
    # The second process fails; what the first answered stays, and what is left is asked of both.
    gold = GOLD["gsm8k_8shot"]
    given = GivenLM(gold) if state.is_main_process else Inkless(gold)
    try:
        run("gsm8k_8shot", place, out / "failed", given)
    except RuntimeError as error:
        print(type(error).__name__, error, flush=True)
    again = GivenLM(gold)
    run("gsm8k_8shot", place, out / "failed", again)
    counts = gather_object([len(given.asked)]), gather_object([len(again.asked)])
    if state.is_main_process:
        print("asked", counts[0], flush=True)
        print("asked", counts[1], flush=True)
    state.destroy_process_group()


if __name__ == "__main__":
    main()
