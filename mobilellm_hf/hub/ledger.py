"""What was released from here, and to where: a small file beside a model, so that a branch that moved is noticed.

Releases of one run know of each other: the checkpoints of its training, its model, and what was exported beside it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from mobilellm_hf.workspace import write_whole

LEDGER = "releases.json"
INTENDED = 4  # commits whose answer never came, of which more than one at a time is unlikely

# path -> SHA-256 and git's SHA-1; the Hub names a large file by the one, any other by the other
Digests = Mapping[str, Sequence[str]]


class Ledger:
    """Per branch the commit that was last made or found to be ours, and the files of those that were asked for.

    They are written before a commit is asked for: if the answer is lost, the commit is known all the same.

    Args:
        path: of the file; a missing one is an empty ledger.
        endpoint: of the Hub, since names mean nothing without it.

    Raises:
        ValueError: the file is damaged.
    """

    def __init__(self, path: Path, endpoint: str | None = None):
        self.path, self.endpoint = path, endpoint or constants.ENDPOINT
        try:
            self._entries: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is damaged ({error}): delete it, and name the branch's commit in replace"
            ) from error

    def key(self, repo: str, branch: str) -> str:
        return f"{self.endpoint}/{repo}@{branch}"

    def is_ours(self, repo: str, branch: str, commit: str, tree: Mapping[str, str]) -> bool:
        """Whether a branch's head was made from this run, or has the files of a commit that was asked for from it.

        Args:
            tree: path -> SHA-256 or git's SHA-1 of each of its files.
        """
        entries = [entries.get(self.key(repo, branch), {}) for entries in (self._entries, *self._beside())]
        return any(
            commit == entry.get("commit") or any(same_tree(tree, files) for files in entry.get("intended", ()))
            for entry in entries
        )

    def _beside(self) -> Iterator[dict[str, dict[str, Any]]]:
        """The entries of the other releases of the run; of a damaged file none, which only its own release needs."""
        for path in self.path.parent.parent.glob(f"*-release/{self.path.name}"):
            if path != self.path:
                with contextlib.suppress(OSError, json.JSONDecodeError):
                    yield json.loads(path.read_text())

    def intend(self, repo: str, branch: str, files: Digests) -> None:
        entry = self._entries.setdefault(self.key(repo, branch), {})
        others = [found for found in entry.get("intended", ()) if found != as_lists(files)]
        entry["intended"] = [*others, as_lists(files)][-INTENDED:]
        self._save()

    def record(self, repo: str, branch: str, commit: str, files: Digests) -> None:
        self._entries.pop(self.key(repo, branch), None)  # and is put last
        self._entries[self.key(repo, branch)] = {"commit": commit, "files": as_lists(files)}
        self._save()

    def released(self, repo: str, branch: str) -> dict[str, list[str]]:
        """The files that were last released from here."""
        return self._entries.get(self.key(repo, branch), {}).get("files", {})

    def last_repo(self) -> str | None:
        """The repository of the last release to this Hub."""
        mine = [key for key, entry in self._entries.items() if key.startswith(self.endpoint) and entry.get("files")]
        return mine[-1].removeprefix(f"{self.endpoint}/").split("@")[0] if mine else None

    def _save(self) -> None:
        write_whole(self.path, lambda path: path.write_text(json.dumps(self._entries, indent=2) + "\n"))


def same_tree(tree: Mapping[str, str], files: Digests) -> bool:
    """Whether a tree, whose names of contents are of one kind or the other, holds these files and no others."""
    return tree.keys() == files.keys() and all(name in files[path] for path, name in tree.items())


def as_lists(files: Digests) -> dict[str, list[str]]:
    return {path: list(names) for path, names in files.items()}
