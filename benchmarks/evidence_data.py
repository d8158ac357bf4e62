"""Real text for evidence.py: six sources to train on, and probes that share no document with them.

train/SOURCE.jsonl               what is read: GSM8K and MATH, WikiText-2, Python's library and installed packages
tuning/CAPABILITY.jsonl          other documents of those sources, by which influence and rivals are tuned
final/CAPABILITY.jsonl           HumanEval, GSM8K's test set, WikiText's test set: what decides
unscored/DOMAIN.jsonl            MATH's geometry and Python's own tests, which no source has any of
conversations/NAME-SPLIT.jsonl   problems and their solutions, for supervised fine-tuning; of `test` no source has any
"""

import json
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from mobilellm_hf.data.tokenization import train_tokenizer

CAPABILITIES = ("code", "math", "knowledge")
# What each source is of.
SOURCES = {
    "gsm8k": "math", "algebra": "math", "counting": "math", "wikitext": "knowledge", "library": "code",
    "packages": "code",
}  # fmt: skip
SUBJECTS = {
    "algebra": ("Algebra", "Intermediate Algebra", "Prealgebra"),
    "counting": ("Counting & Probability", "Number Theory"),
    "geometry": ("Geometry", "Precalculus"),
}
FILES = (
    "gsm8k_train.jsonl", "gsm8k_test.jsonl", "math_test.jsonl", "humaneval.jsonl", "wikitext2_valid.txt",
    "wikitext2_test.txt",
)  # fmt: skip
COLUMNS = {
    "gsm8k_train.jsonl": {"question", "answer"}, "gsm8k_test.jsonl": {"question", "answer"},
    "math_test.jsonl": {"problem", "solution", "type"}, "humaneval.jsonl": {"prompt", "canonical_solution"},
}  # fmt: skip
HELD_OUT = 0.1
# Characters: of a source, of the longest document, of a probe of text that no source has.
SOURCE_SIZE, DOCUMENT_SIZE, PROBE_SIZE = 600_000, 4_000, 150_000
VOCABULARY = 2048
# Words in a row that no probe may share with what is read: licences are longer.
WINDOW = 24
ARTICLE = re.compile(r"\n (?== [^=])")
CALCULATION = re.compile(r"<<.*?>>")


def check_folder(folder: Path) -> None:
    """Raises a ValueError that names the files that the folder lacks."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise ValueError(f"{folder} has no {', '.join(missing)}; it should have {', '.join(FILES)}")


def records(file: Path) -> list[dict]:
    """Raises a ValueError that names the file, and the line or the columns that it lacks."""
    rows = []
    for number, line in enumerate(file.read_text().splitlines()):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number + 1}: is no JSON") from error
    needed = COLUMNS[file.name]
    if not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise ValueError(f"{file} lacks a column: every line is to have {', '.join(sorted(needed))}")
    return rows


def gsm8k(file: Path) -> list[dict[str, str]]:
    return [{"question": row["question"], "answer": CALCULATION.sub("", row["answer"])} for row in records(file)]


def mathematics(folder: Path, subject: str) -> list[dict[str, str]]:
    rows = records(folder / "math_test.jsonl")
    rows = [row for row in rows if row["type"] in SUBJECTS[subject]]
    return [{"question": row["problem"], "answer": row["solution"]} for row in rows]


def as_text(problems: list[dict[str, str]]) -> list[str]:
    return shuffled([f"Problem: {row['question']}\nSolution: {row['answer']}\n" for row in problems])


def articles(file: Path) -> list[str]:
    return shuffled([text.strip() for text in ARTICLE.split(file.read_text()) if text.strip()])


def python_files(name: str, tests: bool = False) -> Iterator[str]:
    """Files in a random order; those of test suites, or those that are not.

    Args:
        name: "stdlib", Python's own library without what is installed into it, or "purelib", that.
    """
    folder = Path(sysconfig.get_paths()[name])
    paths = [file.relative_to(folder) for file in sorted(folder.rglob("*.py"))]
    kept = [path for path in paths if ("test" in path.as_posix()) == tests and "-packages" not in path.parts[0]]
    for path in shuffled(kept):
        text = (folder / path).read_text(errors="ignore")
        if len(text) > 200:
            yield text


def up_to(texts: Iterable[str], size: int) -> list[str]:
    """The first texts in parts of DOCUMENT_SIZE at most, none twice, until there are `size` characters."""
    found: dict[str, None] = {}
    total = 0
    for text in texts:
        for start in range(0, len(text), DOCUMENT_SIZE):
            part = text[start : start + DOCUMENT_SIZE]
            total += len(part) * (part not in found)
            found[part] = None
        if total >= size:
            break
    return list(found)


def shuffled(values: list) -> list:
    """In an order that is random, and always the same."""
    return random.Random(0).sample(values, len(values))


def windows(text: str) -> set[tuple[str, ...]]:
    """All runs of WINDOW words."""
    words = text.split()
    return {tuple(words[start : start + WINDOW]) for start in range(len(words) - WINDOW + 1)}


def write(file: Path, rows: Iterable[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def build_data(data: Path, folder: Path) -> None:
    """Writes all of the above and a tokenizer into `folder`."""
    sources = {
        "gsm8k": as_text(gsm8k(data / "gsm8k_train.jsonl")),
        "algebra": as_text(mathematics(data, "algebra")),
        "counting": as_text(mathematics(data, "counting")),
        "wikitext": articles(data / "wikitext2_valid.txt"),
        "library": python_files("stdlib"),
        "packages": python_files("purelib"),
    }
    final = {
        "code": [row["prompt"] + row["canonical_solution"] for row in records(data / "humaneval.jsonl")],
        "math": as_text(gsm8k(data / "gsm8k_test.jsonl")),
        "knowledge": articles(data / "wikitext2_test.txt"),
    }
    unscored = {"geometry": as_text(mathematics(data, "geometry")), "tests": python_files("stdlib", tests=True)}
    seen = {text for texts in final.values() for text in texts}
    train, tuning = {}, {name: [] for name in CAPABILITIES}
    for name, texts in sources.items():
        kept = up_to((text for text in texts if text not in seen), SOURCE_SIZE)
        held_out = round(len(kept) * HELD_OUT)
        tuning[SOURCES[name]] += kept[:held_out]
        train[name] = kept[held_out:]
    known = set().union(*(windows(text) for texts in train.values() for text in texts))
    probes = {"tuning": tuning, "final": final, "unscored": unscored}
    probes = {
        group: {
            name: up_to((text for text in texts if known.isdisjoint(windows(text))), PROBE_SIZE)
            for name, texts in of.items()
        }
        for group, of in probes.items()
    }
    for group, parts in (("train", train), *probes.items()):
        for name, texts in parts.items():
            write(folder / group / f"{name}.jsonl", ({"text": text} for text in texts))
    write_conversations(data, folder, known)
    train_tokenizer([text for texts in train.values() for text in texts], VOCABULARY, show_progress=False
                    ).save_pretrained(folder / "tokenizer")  # fmt: skip


def write_conversations(data: Path, folder: Path, known: set[tuple[str, ...]]) -> None:
    """known: windows of what the sources have, of which no problem that is kept for the test may have one."""
    problems = shuffled(mathematics(data, "algebra"))
    new = [
        row for row in problems if known.isdisjoint(windows(row["answer"])) and len(row["answer"].split()) >= WINDOW
    ]
    held_out = new[: round(len(problems) * HELD_OUT)]
    parts = {
        "gsm8k-train": gsm8k(data / "gsm8k_train.jsonl"), "gsm8k-test": gsm8k(data / "gsm8k_test.jsonl"),
        "algebra-train": [row for row in problems if row not in held_out], "algebra-test": held_out,
    }  # fmt: skip
    for name, rows in parts.items():
        write(folder / "conversations" / f"{name}.jsonl", rows)
