"""Runs the code in the confined process and reports on it. The report says what was computed, not whether it is right.

Descriptors 3 and 4 are the report, which the sandbox reads, and the tests, which it writes once the code is loaded.
"""

import json
import os
import sys
import traceback

REPORT, COMMAND = 3, 4
# Exact, and by the types' own methods: those of a subclass could say anything.
SCALARS = {
    int: lambda value: int.__format__(value, "x"),
    float: float.hex,
    complex: complex.__repr__,
    str: str.__str__,
    bytes: bytes.hex,
}


def report(event: dict, nonce: str = "", _write=os.write, _dumps=json.dumps) -> None:
    """One line for the sandbox."""
    line = _dumps({**event, "nonce": nonce}).encode() + b"\n"
    while line:
        line = line[_write(REPORT, line) :]


def encode(value, depth: int = 0):
    """A value of builtin types (subclasses count as what they derive from) as JSON; None if it is none."""
    if depth > 50:
        return None
    if value is None or value is True or value is False:
        return ["constant", value]
    for kind, text in SCALARS.items():
        if isinstance(value, kind):
            return [kind.__name__, text(value)]
    if isinstance(value, dict):
        pairs = [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in dict.items(value)]
        return None if any(None in pair for pair in pairs) else ["dict", pairs]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            items = [encode(item, depth + 1) for item in kind.__iter__(value)]
            return None if None in items else [kind.__name__, items]
    return None


def run(code: str, *, with_tests: bool) -> None:
    """Runs the code as a program, or loads it and runs the tests. Ends in SystemExit, or at once after tests."""
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["main.py"]
    if not with_tests:
        execute(code, module.__dict__, "main.py")
        raise SystemExit(0)
    # `if __name__ == "__main__"` is a program's part, which reads input that tests do not give.
    module.__dict__["__name__"] = "solution"
    leave, flush, load_json, read = os._exit, (sys.stdout.flush, sys.stderr.flush), json.loads, os.read
    execute(code, module.__dict__, "solution.py")
    try:
        run_tests(module.__dict__, load_json, read)
        for stream in flush:
            stream()
    finally:
        leave(0)


def execute(code: str, namespace: dict, name: str) -> None:
    """Raises SystemExit(1) after the traceback was printed, if the code raises."""
    try:
        exec(compile(code, name, "exec"), namespace)
    except SystemExit:
        raise
    except BaseException as error:
        if isinstance(error, MemoryError):
            report({"memory": True})
        traceback.print_exception(type(error), error, error.__traceback__.tb_next if error.__traceback__ else None)
        raise SystemExit(1) from None


def run_tests(namespace: dict, load_json, read) -> None:
    """Says that the code is loaded, gets the tests, and tells what each asked value is and whether it raised."""
    report({"loaded": True})
    pieces = []
    while piece := read(COMMAND, 1 << 16):
        pieces.append(piece)
    given = load_json(b"".join(pieces))
    for number, test in enumerate(given["tests"]):

        def record(question, value, number=number):
            report({"test": number, "question": question, "value": encode(value)}, given["nonce"])

        try:
            exec(compile(test, f"test {number}", "exec"), {**namespace, given["recorder"]: record})
        except BaseException as error:
            if isinstance(error, MemoryError):
                report({"memory": True})
            report({"test": number, "done": False}, given["nonce"])
            traceback.print_exception(type(error), error, error.__traceback__)
        else:
            report({"test": number, "done": True}, given["nonce"])
