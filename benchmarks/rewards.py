"""How far AccuracyReward, TRL's accuracy_reward and the official rules agree on gold answers; what running code costs.

    python benchmarks/rewards.py --data DIR       # with gsm8k_test.jsonl and math_test.jsonl

Each gold answer is given as the completion's answer: every verdict but "right" is a disagreement, and is printed.
"""

import argparse
import json
import logging
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table
from trl.rewards import accuracy_reward

from mobilellm_hf.rewards import AccuracyReward
from mobilellm_hf.rewards.grading import extract_answer, gold_answer, official_equal
from mobilellm_hf.rewards.sandbox import available_layers, run_code

COLUMNS = {"gsm8k_test": "answer", "math_test": "solution"}
RUNS = 40


def agreement(solutions: list[str]) -> dict[str, list[float | None]]:
    """Verdicts of each grader on the gold answers."""
    answers = [gold_answer(solution) for solution in solutions]
    texts = [f"So the answer is $\\boxed{{{answer}}}$." for answer in answers]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    return {
        "AccuracyReward": AccuracyReward()(None, texts, solution=solutions),
        "official rules": [float(official_equal(extract_answer(text), gold)) for text, gold in zip(texts, answers)],
        "TRL, gold in a box": accuracy_reward(chats, [f"$\\boxed{{{answer}}}$" for answer in answers]),
        "TRL, whole solution": accuracy_reward(chats, solutions),
    }


def run_costs(console: Console) -> None:
    table = Table("walls", "ms a run", "CPU ms a run", "ms a run, 4 at once")
    for layers in (None, ("namespaces",), ("landlock", "seccomp")):
        if layers is not None and not available_layers() >= set(layers):
            continue
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        for _ in range(RUNS):
            run_code("pass", layers=layers)
        single, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        started = time.perf_counter()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _, layers=layers: run_code("pass", layers=layers), range(RUNS)))
        together = time.perf_counter() - started
        figures = (f"{1000 * seconds / RUNS:.1f}" for seconds in (single, cpu, together))
        table.add_row(", ".join(layers or ("all",)), *figures)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of gsm8k_test.jsonl and math_test.jsonl")
    parser.add_argument("--show", type=int, default=10, help="disagreements to print")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    console = Console(width=150)
    for name, column in COLUMNS.items() if options.data else ():
        lines = (options.data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        solutions = [json.loads(line)[column] for line in lines]
        table = Table(name, "right", "wrong", "gold not parsed", "not right, first ones")
        for grader, verdicts in agreement(solutions).items():
            missed = [gold_answer(text) for text, verdict in zip(solutions, verdicts) if verdict != 1.0]
            counts = (str(verdicts.count(verdict)) for verdict in (1.0, 0.0, None))
            table.add_row(grader, *counts, "  ".join(missed[: options.show]))
        console.print(table, markup=False)
    run_costs(console)


if __name__ == "__main__":
    main()
