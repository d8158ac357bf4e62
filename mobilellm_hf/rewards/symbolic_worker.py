"""The process behind `symbolic`: reads questions as lines of JSON, writes answers. Run by path, with no package.

    {"kind": "parseable", "gold": ...}                        -> true, false
    {"kind": "verify", "gold": ..., "prediction": ...}        -> true, false     (math-verify)
    {"kind": "symbolic", "gold": ..., "prediction": ...}      -> true, false     (the official grader's last step)

What it reads was written by a model, and SymPy's `parse_expr` evaluates Python: only numbers, operators and some names
of functions reach it. Where the kernel has Landlock and seccomp, the process can besides open no file but to read the
libraries, and neither start processes nor reach the network.
"""

import json
import logging
import os
import re
import resource
import signal
import sys

del sys.path[0]  # this folder, which is no place for imports
MEMORY = 4 * 2**30
JAIL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "jail")
LIBRARIES = (os.path.dirname(os.__file__), "/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64")
OPERATORS = re.compile(r"(?:\s|[-+*/^().,]|\d+(?:\.\d+)?|[A-Za-z]+)*")
NAMES = {"sqrt", "sin", "cos", "tan", "log", "ln", "exp", "pi", "E", "I", "oo"}


def config():
    r"""How both sides are read: as TRL's accuracy_reward reads predictions, and \frac12 as MATH writes it."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig

    return [
        LatexExtractionConfig(
            normalization_config=NormalizationConfig(units=True, malformed_operators=True, nits=True),
            boxed_match_priority=0,
            try_extract_without_anchor=False,
        )
    ]


def parsed(text: str) -> list:
    from math_verify import parse

    return parse(text, extraction_config=config(), extraction_mode="first_match", parsing_timeout=None)


def parseable(question: dict) -> bool:
    """Whether anything but the text itself was found in it."""
    return any(not isinstance(value, str) for value in parsed(question["gold"]))


def verify(question: dict) -> bool:
    from math_verify import verify as verify_parsed

    return verify_parsed(parsed(question["gold"]), parsed(question["prediction"]), timeout_seconds=None)


def read_expression(text: str):
    """A SymPy object, or the text where it is none."""
    from latex2sympy2_extended import latex2sympy
    from sympy.parsing.sympy_parser import parse_expr

    plain = OPERATORS.fullmatch(text) and all(
        len(name) == 1 or name in NAMES for name in re.findall("[A-Za-z]+", text)
    )
    if plain and "\\" not in text and not re.search(r"\.\s*[A-Za-z]", text):
        try:
            return parse_expr(text.replace("^", "**"))
        except Exception:
            pass
    try:
        return latex2sympy(text)
    except Exception:
        return text


def symbolic(question: dict) -> bool:
    """Equal as printed, after simplification, as equations, as numbers (1e-4), or as matrices to three decimals."""
    left, right = read_expression(question["prediction"]), read_expression(question["gold"])
    if isinstance(left, str) or isinstance(right, str):
        return left == right  # SymPy's methods would evaluate a text
    for equal in (same, same_simplified, same_equation, same_number, same_matrix):
        try:
            if equal(left, right):
                return True
        except Exception:
            continue
    return False


def same(left, right) -> bool:
    return bool(str(left) == str(right) or left == right)


def same_simplified(left, right) -> bool:
    from sympy import simplify

    return bool(left.equals(right) or simplify(left - right) == 0)


def same_equation(left, right) -> bool:
    return bool(abs(left.lhs - left.rhs).equals(abs(right.lhs - right.rhs)))


def same_number(left, right) -> bool:
    from math import isclose

    from sympy import N

    return isclose(float(N(left)), float(N(right)), rel_tol=1e-4)


def same_matrix(left, right) -> bool:
    return left.shape == right.shape and left.applyfunc(lambda x: round(x, 3)).equals(
        right.applyfunc(lambda x: round(x, 3))
    )


KINDS = {"parseable": parseable, "verify": verify, "symbolic": symbolic}


def answer(question: dict) -> bool:
    """An expression that makes the libraries raise is no answer."""
    try:
        return KINDS[question["kind"]](question)
    except Exception:
        return False


def confine() -> None:
    """Takes from this process what it does not need, as far as the kernel can."""
    sys.path.insert(0, JAIL)
    import kernel
    import system_calls

    del sys.path[0]
    try:
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        kernel.restrict_files([path for path in {*sys.path, *LIBRARIES} if os.path.exists(path)])
        system_calls.install(kernel.libc)
    except OSError:
        pass


def main() -> None:
    # What the libraries print must not be taken for answers.
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        out.write(json.dumps(str(error)).encode() + b"\n")
        return
    logging.disable(logging.CRITICAL)
    parsed(r"\boxed{\frac{1}{2}}")  # builds the tables of the parser
    confine()
    out.write(b'"ready"\n')
    for line in sys.stdin.buffer:
        question = json.loads(line)
        # The kernel ends this process, whatever it is in and whoever still waits for it.
        signal.setitimer(signal.ITIMER_REAL, question["seconds"])
        result = answer(question)
        signal.setitimer(signal.ITIMER_REAL, 0)
        out.write(json.dumps(bool(result)).encode() + b"\n")


main()
