"""Splits a test into what is asked of code and what is expected, so that the answer stays out of its reach.

    prepare("assert double(2) == 4", "record")        # "record(0, double(2))", [Question(4)]

Asserts that compare something with a literal become questions; all others stay asserts. Those under a condition, a
loop or a `try` stay, too, since they may rightly never run.
"""

import ast
from dataclasses import dataclass
from typing import Any


class _NoValue:
    """Equal to nothing: of a type that a literal cannot have."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__


NO_VALUE = _NoValue()


@dataclass(frozen=True)
class Question:
    """The value that is expected of an expression."""

    expected: Any

    def accepts(self, value: Any) -> bool:
        """As `==` decides it."""
        try:
            return bool(value == self.expected)
        except RecursionError:
            return False


def prepare(test: str, recorder: str) -> tuple[str, list[Question]]:
    """The test with `recorder(number, expression)` in place of asserts against literals, and their expected values.

    Raises:
        SyntaxError: the test is no Python.
    """
    tree = ast.parse(test)
    questions: list[Question] = []
    _split(tree, recorder, questions)
    return ast.unparse(ast.fix_missing_locations(tree)), questions


def _split(node: ast.Module | ast.FunctionDef, recorder: str, questions: list[Question]) -> None:
    for place, statement in enumerate(node.body):
        if isinstance(statement, ast.FunctionDef):
            _split(statement, recorder, questions)
        elif isinstance(statement, ast.Assert) and (parts := _against_literal(statement.test)) is not None:
            asked, expected = parts
            call = ast.Call(ast.Name(recorder, ast.Load()), [ast.Constant(len(questions)), asked], [])
            node.body[place] = ast.Expr(call)
            questions.append(Question(expected))


def _against_literal(test: ast.expr) -> tuple[ast.expr, Any] | None:
    """(expression, value) of `expression == literal`, either way round; None for anything else."""
    if not isinstance(test, ast.Compare) or len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq):
        return None
    for asked, literal in ((test.left, test.comparators[0]), (test.comparators[0], test.left)):
        try:
            return asked, ast.literal_eval(literal)
        except (ValueError, TypeError, SyntaxError, RecursionError):
            continue
    return None


def decode(encoded: Any) -> Any:
    """The value that the harness encoded; one that is equal to nothing, if it is no encoding of one."""
    try:
        return _decode(encoded)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return NO_VALUE


def _decode(encoded: Any) -> Any:
    kind, content = encoded
    if kind in CONTAINERS:
        return CONTAINERS[kind](_decode(item) for item in content)
    if kind == "dict":
        return {_decode(key): _decode(value) for key, value in content}
    return SCALARS[kind](content)


CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
SCALARS = {
    "constant": lambda value: value if value is None else bool(value),
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "complex": complex,
    "str": str,
    "bytes": bytes.fromhex,
}
