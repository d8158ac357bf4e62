"""The texts behind the embedded corpus: ten sources found on any machine that can import this package.

A source is a `SourceSpec`: a name, a domain, what it is, and a function that names its modules (files, topics,
packages) and says how to read each. Reading is lazy, so a source of 46 MB costs only the megabyte that is kept of it.
No package is imported to be read: docstrings come from the syntax tree, which is faster and runs nobody's code.

The worths differ on purpose, so that a method that picks data by influence has something to find: a code model should
want the standard library more than tables of character codes, a knowledge model a language reference more than
licences.

Adding a source is one entry in `SOURCES`.
"""

from __future__ import annotations

import ast
import gc
import importlib.metadata
import importlib.util
import inspect
import os
import random
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

Modules = Mapping[str, Callable[[], Iterable[str]]]

# Only distributions that this project itself brings in, directly or through its dependencies: what else a user has
# installed must not change the corpus. The list is written out rather than computed, because the computed one differs
# between a CPU and a CUDA build of torch. A distribution that is absent is passed over.
DISTRIBUTIONS = tuple(
    (
        "accelerate anyio click datasets dill filelock fsspec h11 hf-xet huggingface-hub idna jinja2 "
        "markdown-it-py markupsafe mdurl mpmath multiprocess networkx numpy packaging "
        "pandas psutil pyarrow pygments python-dateutil pyyaml regex rich safetensors "
        "setuptools sympy tokenizers torch tqdm transformers typing-extensions xxhash"
    ).split()
)
ALGEBRA = "polys simplify solvers ntheory integrals series matrices sets calculus combinatorics".split()
PAGES_OF_ARITHMETIC = 1_500


@dataclass(frozen=True)
class SourceSpec:
    """One source of the embedded corpus.

    Attributes:
        name: what `load_embedded_corpus(sources=[...])` and the column `source` call it.
        domain: "code", "math" or "knowledge".
        description: what the text is, for the sizes table.
        modules: seed -> {module name: function that reads the module's documents}. The order does not matter.
    """

    name: str
    domain: str
    description: str
    modules: Callable[[int], Modules]


def _python_files(root: str | os.PathLike, skipped: Iterable[str] = ()) -> dict[str, Path]:
    """The `*.py` files under a folder by relative name ("linalg/_linalg.py"), without those in `skipped` folders."""
    skipped = {"__pycache__", *skipped}
    files = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        relative = Path(os.path.relpath(folder, root))
        files.update({(relative / name).as_posix(): Path(folder, name) for name in names if name.endswith(".py")})
    return files


def _package_files(package: str, tests: bool = False) -> dict[str, Path]:
    """A package's test files, or all but them, by name ("numpy/linalg/_linalg.py"); none if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return {}
    files = _python_files(Path(spec.origin).parent, skipped=["benchmarks"])
    return {f"{package}/{name}": path for name, path in files.items() if ("/tests/" in f"/{name}") == tests}


def _read_file(path: Path) -> list[str]:
    """The file's text as the one document; nothing if it is not UTF-8 (a few files of the library are not)."""
    try:
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError:
        return []


def _standard_library(seed: int) -> Modules:
    # Not written to be read: installed packages, tests, tables of characters and topics, grammars, generated settings.
    skipped = "site-packages dist-packages test tests idle_test encodings pydoc_data lib2to3".split()
    files = _python_files(sysconfig.get_paths()["stdlib"], skipped)
    return {name: partial(_read_file, path) for name, path in files.items() if not name.startswith("_sysconfigdata")}


def _test_suites(seed: int) -> Modules:
    # Not the standard library's own tests: Debian's Python and the slim containers leave them out.
    files = {**_package_files("numpy", tests=True), **_package_files("networkx", tests=True)}
    return {name: partial(_read_file, path) for name, path in files.items()}


def _codec_tables(seed: int) -> Modules:
    files = _python_files(Path(sysconfig.get_paths()["stdlib"], "encodings"))
    return {name: partial(_read_file, path) for name, path in files.items()}


def _parse(source: str) -> ast.Module:
    # A syntax tree has no cycles, and collecting garbage while thousands of its nodes are made takes most of the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(source)
    finally:
        if was_enabled:
            gc.enable()


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, ast.AST, ast.Constant]]:
    """Every documented module, class and function: its dotted name in the module, its node, and the docstring's."""
    pending: list[tuple[str, ast.AST]] = [("", tree)]
    while pending:
        name, node = pending.pop()
        match node.body[:1]:
            case [ast.Expr(value=ast.Constant(value=str()) as constant)]:
                yield name, node, constant
        children = [
            child for child in node.body if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        pending += [(f"{name}.{child.name}", child) for child in reversed(children)]


def _read_docstrings(module: str, path: Path) -> Iterator[str]:
    """One document for each docstring of a file, headed by the name and signature it documents."""
    for text in _read_file(path):
        for name, node, constant in _docstrings(_parse(text)):
            signature = f"({ast.unparse(node.args)})" if hasattr(node, "args") else ""
            yield f"{module}{name}{signature}\n\n{inspect.cleandoc(constant.value)}\n"


def _docstrings_of(package: str) -> Modules:
    return {
        name: partial(_read_docstrings, name.removesuffix(".py").removesuffix("/__init__").replace("/", "."), path)
        for name, path in _package_files(package).items()
    }


def _read_without_docstrings(path: Path) -> Iterator[str]:
    """A file's code with its docstrings taken out, so that this source shares no text with the docstrings' source."""
    for text in _read_file(path):
        # Split as the parser counts lines, at "\n" alone.
        lines = text.split("\n")
        for _, _, constant in _docstrings(_parse(text)):
            lines[constant.lineno - 1 : constant.end_lineno] = [None] * (constant.end_lineno - constant.lineno + 1)
        yield "\n".join(line for line in lines if line is not None)


def _sympy_code(seed: int) -> Modules:
    files = {name: path for name, path in _package_files("sympy").items() if name.split("/")[1] in ALGEBRA}
    return {name: partial(_read_without_docstrings, path) for name, path in files.items()}


def _problem(rng: random.Random) -> str:
    """One problem in words, its steps and its answer; every figure follows from the others."""
    a, b, c, fives = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 20), rng.randint(1, 19)
    quotient, rest = divmod(a * c, b)
    problems = (
        (f"What is {a} * {b} + {c}? First {a} * {b} = {a * b}. Then {a * b} + {c} = {a * b + c}.", a * b + c),
        (f"Solve {c}*x + {a} = {c * b + a}. Subtract {a}: {c}*x = {c * b}. Divide by {c}: x = {b}.", b),
        (f"What is {a * c} // {b}? {b} * {quotient} = {b * quotient}, and {rest} is left.", quotient),
        (f"What is {5 * fives}% of {20 * a}? 5% is {a}, and {5 * fives}% is {fives} times that.", fives * a),
    )
    question, answer = rng.choice(problems)
    return f"{question} Answer: {answer}"


def _arithmetic_page(seed: int, page: int) -> Iterator[str]:
    rng = random.Random(f"arithmetic {seed} {page}")
    yield "\n".join(_problem(rng) for _ in range(12)) + "\n"


def _synthetic_arithmetic(seed: int) -> Modules:
    return {f"page {page}": partial(_arithmetic_page, seed, page) for page in range(PAGES_OF_ARITHMETIC)}


def _python_reference(seed: int) -> Modules:
    from pydoc_data.topics import topics

    return {name: partial(list, [text]) for name, text in topics.items()}


def _distributions() -> dict[str, importlib.metadata.Distribution]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _read_description(distribution: importlib.metadata.Distribution) -> Iterator[str]:
    metadata = distribution.metadata
    # The description is the message's body, or in old metadata a header.
    description = metadata.get_payload() or metadata.get("Description", "")
    yield f"{metadata['Name']}: {metadata.get('Summary', '')}\n\n{description}"


def _package_descriptions(seed: int) -> Modules:
    return {name: partial(_read_description, distribution) for name, distribution in _distributions().items()}


def _read_licence(distribution: importlib.metadata.Distribution, name: str) -> list[str]:
    # Metadata 2.4 puts licences in a folder of their own, earlier versions beside the metadata.
    text = distribution.read_text(f"licenses/{name}") or distribution.read_text(name)
    return [text] if text else []


def _licences(seed: int) -> Modules:
    return {
        f"{name}/{file}": partial(_read_licence, distribution, file)
        for name, distribution in _distributions().items()
        for file in distribution.metadata.get_all("License-File", [])
    }


SOURCES: dict[str, SourceSpec] = {
    spec.name: spec
    for spec in (
        SourceSpec("stdlib", "code", "the Python standard library", _standard_library),
        SourceSpec("test_suites", "code", "test files of NumPy and NetworkX", _test_suites),
        SourceSpec("codec_tables", "code", "character tables (low worth)", _codec_tables),
        SourceSpec("sympy_docs", "math", "SymPy's docstrings", lambda seed: _docstrings_of("sympy")),
        SourceSpec("sympy_code", "math", "SymPy's algebra and calculus", _sympy_code),
        SourceSpec("synthetic_arithmetic", "math", "generated problems, worked", _synthetic_arithmetic),
        SourceSpec("python_reference", "knowledge", "Python's language reference", _python_reference),
        SourceSpec("numpy_docs", "knowledge", "NumPy's docstrings", lambda seed: _docstrings_of("numpy")),
        SourceSpec("package_descriptions", "knowledge", "descriptions of dependencies", _package_descriptions),
        SourceSpec("licences", "knowledge", "licence texts (low worth)", _licences),
    )
}
