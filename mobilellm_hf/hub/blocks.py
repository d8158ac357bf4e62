"""The code blocks of a card: found by their names, run as they are printed, and what is remembered of it.

    blocks = code_blocks(card)                                  # {"with-plugin": Block(language="python", ...), ...}
    with staged_hub(release) as environment:                    # the release as a download would find it
        run_block(blocks["with-plugin"], environment)

A block is named by a comment above it, `<!-- block: with-plugin -->`. One that does not import this package runs where
it cannot be imported. The record says of a block that it was run only while its code and the weights are those that it
was run with.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub.constants import HF_TOKEN_PATH

from mobilellm_hf.export.requirements import need_executorch
from mobilellm_hf.hub.files import WEIGHTS, ReleaseFile
from mobilellm_hf.workspace import write_whole

BLOCK = re.compile(r"<!-- block: ([\w-]+) -->\n```(\w+)\n(.*?)^```$", re.S | re.M)
PACKAGE = "mobilellm_hf"
WITHOUT = f"import sys\nsys.modules[{PACKAGE!r}] = None  # importing it raises ImportError\n"
EXECUTORCH = "executorch"  # the block that needs what is no dependency
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
NOT_RUN = "*Not run.*"
SECONDS = 1800
LINES_OF_ERROR = 12
COMMIT = "0" * 40  # that a release has before it is sent


class BlockError(ValueError):
    """A code block of a card does not run."""


@dataclass(frozen=True)
class Block:
    name: str
    language: str
    code: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.code.encode()).hexdigest()

    def obstacle(self) -> str:
        """Why it cannot be run here; empty if it can."""
        if self.language != "python":
            return f"{self.language} blocks are not run"
        if self.name == EXECUTORCH:
            try:
                need_executorch()
            except ImportError as error:
                return str(error)
        return ""


def code_blocks(card: str) -> dict[str, Block]:
    """name -> block, in the card's order."""
    return {name: Block(name, language, code) for name, language, code in BLOCK.findall(card)}


def run_block(block: Block, environment: Mapping[str, str], timeout: float = SECONDS) -> str:
    """What the block prints, in a process and a folder of its own.

    Raises:
        BlockError: it fails, or takes longer than `timeout` seconds.
    """
    code = block.code if PACKAGE in block.code else WITHOUT + block.code
    return run_python(["-c", code], environment, f"the card's block {block.name}", timeout)


def run_python(arguments: Sequence[str], environment: Mapping[str, str], what: str, timeout: float = SECONDS) -> str:
    """The standard output of a Python process, with this package's folder on its path.

    Raises:
        BlockError: it fails; the message has the last lines that it wrote.
    """
    with TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, *arguments], cwd=folder, env=dict(environment), capture_output=True, text=True,
                timeout=timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise BlockError(f"{what} took longer than {timeout:.0f} s") from error
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-LINES_OF_ERROR:])
        raise BlockError(f"{what} fails:\n{last}")
    return done.stdout


def clean_environment(home: Path, offline: bool) -> dict[str, str]:
    """This process's environment with an empty cache; offline, where downloaded code may run, without the token."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith(("_CACHE", "_OFFLINE"))}
    if offline:
        kept = {name: value for name, value in kept.items() if name not in TOKENS}
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {
        "HF_HOME": str(home),
        "HF_TOKEN_PATH": str(home / "token" if offline else HF_TOKEN_PATH),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }


@contextmanager
def staged_hub(repo: str, branch: str, files: Sequence[ReleaseFile]) -> Iterator[dict[str, str]]:
    """The environment of a process that finds the files as if it had downloaded them, and has no network."""
    with TemporaryDirectory() as folder:
        cache = Path(folder) / "hub" / f"models--{repo.replace('/', '--')}"
        for file in files:
            path = cache / "snapshots" / COMMIT / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file.source, bytes):
                path.write_bytes(file.source)
            else:
                path.symlink_to(file.source.resolve())
        reference = cache / "refs" / branch
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(COMMIT)
        yield clean_environment(Path(folder), offline=True)


@dataclass
class Record:
    """Which blocks were run, when and with what: `verification.json` of a release.

    Attributes:
        weights: file -> SHA-256 of the weights that they were run with.
        blocks: name -> SHA-256 of the code, date, `source` (the Hub, or the files before they were sent) and versions.
    """

    weights: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Record:
        """An empty record if there is no file, or an unreadable one."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, TypeError, json.JSONDecodeError):
            return cls()

    def save(self, path: Path) -> None:
        write_whole(path, lambda partial: partial.write_text(json.dumps(asdict(self), indent=2) + "\n"))

    def note(self, block: Block, weights: Mapping[str, str], source: str) -> None:
        """Notes that a block has just been run. A record of other weights is begun anew."""
        if self.weights != weights:
            self.weights, self.blocks = dict(weights), {}
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "huggingface_hub")}
        date = datetime.now(timezone.utc).date().isoformat()
        self.blocks[block.name] = {"sha256": block.digest, "date": date, "source": source, "versions": versions}

    def knows(self, block: Block) -> bool:
        return self.blocks.get(block.name, {}).get("sha256") == block.digest

    def restricted(self, blocks: Mapping[str, Block], weights: Mapping[str, str]) -> Record:
        """What of it holds for these blocks and weights."""
        if self.weights != weights:
            return Record()
        return Record(self.weights, {name: self.blocks[name] for name, block in blocks.items() if self.knows(block)})

    def status(self, block: Block) -> str:
        """The line under a block."""
        if not self.knows(block):
            return NOT_RUN
        run = self.blocks[block.name]
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        return f"*Run on {run['date']}, from {run['source']}: {versions}.*"


def weights_of(files: Sequence[ReleaseFile]) -> dict[str, str]:
    """file -> SHA-256 of what a block's outcome depends on most: the weights and programs."""
    return {file.path: file.digests[0] for file in files if file.path.endswith((WEIGHTS, ".pte"))}
