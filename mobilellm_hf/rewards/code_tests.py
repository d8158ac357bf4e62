"""A reward for code that passes the tests of its problem. The code runs in `rewards.sandbox`; see there how safely."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mobilellm_hf.rewards.completions import Completion, answer_part, column, text_of
from mobilellm_hf.rewards.sandbox import Limits, run_code, run_tests

FENCE = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


class CodeReward:
    """The share of a problem's tests that the code of a completion passes.

    Args:
        tests_column: of the data set. A value is a list of test programs (`["assert add(1, 2) == 3"]`, or one string
            of such), or `{"inputs": [...], "outputs": [...]}`, what a program reads and must print; also as JSON.
        all_or_nothing: 1.0 if all tests pass, else 0.0.
        limits: of each run: a list of assert tests is one, each input another.
        workers: runs at once; by default a quarter of the cores.
        allow_unconfined: see `run_code`.

    None where the tests are none or cannot be read. A completion without code (its last fenced block, after the
    reasoning) gets 0.0.

    Raises:
        ValueError: on a call, if the data set has no such column.
        SandboxError: on a call, if the machine cannot confine code.

    Example:
        >>> reward, completion = CodeReward("tests"), "```python\\ndef add(a, b): return a - b\\n```"
        >>> reward(None, [completion], tests=[["assert add(1, 0) == 1", "assert add(1, 2) == 3"]])
        [0.5]
    """

    __name__ = "code"

    def __init__(
        self,
        tests_column: str = "tests",
        *,
        all_or_nothing: bool = False,
        limits: Limits | None = None,
        workers: int | None = None,
        allow_unconfined: bool = False,
    ):
        self.tests_column, self.all_or_nothing, self.allow_unconfined = tests_column, all_or_nothing, allow_unconfined
        self.limits = limits or Limits()
        self.workers = workers or max(1, (os.cpu_count() or 1) // 4)

    def __call__(self, prompts: Any, completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        tests = column(columns, self.tests_column, "CodeReward(tests_column)", len(completions))
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._one, map(text_of, completions), tests))

    def _one(self, text: str, tests: Any) -> float | None:
        if (cases := read_tests(tests)) is None:
            return None
        if (code := last_code(text)) is None:
            return 0.0
        options = {"limits": self.limits, "allow_unconfined": self.allow_unconfined}
        if isinstance(cases, list):
            passed: Sequence[bool] = run_tests(code, cases, **options).tests
        else:
            passed = [self._prints(code, given, wanted, options) for given, wanted in cases["pairs"]]
        share = sum(passed) / len(passed)
        return float(share == 1) if self.all_or_nothing else share

    @staticmethod
    def _prints(code: str, given: str, wanted: str, options: dict[str, Any]) -> bool:
        outcome = run_code(code, given, **options)
        return outcome.status == "passed" and same_output(outcome.stdout, wanted)


def last_code(text: str) -> str | None:
    """The last fenced Python block after the reasoning, closed or cut off; None if there is none."""
    blocks = FENCE.findall(answer_part(text))
    return blocks[-1] if blocks else None


def same_output(printed: str, wanted: str) -> bool:
    """Whether the lines are the same, but for white space at their ends and empty lines at the end."""
    ours, theirs = ([line.rstrip() for line in text.rstrip().split("\n")] for text in (printed, wanted))
    return ours == theirs


def read_tests(tests: Any) -> list[str] | dict[str, list[tuple[str, str]]] | None:
    """Test programs, or {"pairs": [(input, output), ...]}; None if there are none or they cannot be read."""
    if isinstance(tests, str) and tests.lstrip()[:1] in ("{", "["):
        try:
            tests = json.loads(tests)
        except ValueError:
            return None
    if isinstance(tests, Mapping):
        inputs, outputs = tests.get("inputs"), tests.get("outputs")
        if not inputs or not outputs or len(inputs) != len(outputs):
            return None
        return {"pairs": [(_lines(given), _lines(wanted)) for given, wanted in zip(inputs, outputs)]}
    programs = [tests] if isinstance(tests, str) else tests
    if not isinstance(programs, Sequence) or not all(isinstance(test, str) and test.strip() for test in programs):
        return None
    return list(programs) if programs and all(map(_is_python, programs)) else None


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _is_python(test: str) -> bool:
    try:
        compile(test, "test", "exec")
    except (SyntaxError, ValueError):
        return False
    return True
