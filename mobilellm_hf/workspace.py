"""The output folder of a recipe: what is finished stays, what is not is done again, other settings are refused."""

import json
import os
import secrets
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(target: Path, write: Callable[[Path], None]) -> None:
    """A file that is whole or absent, also where several machines write the same one to a folder that they share."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        write(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


class Workspace:
    """A subfolder a stage, each written under another name first, so that it is whole or absent.

    Args:
        folder: made if it does not exist.
        settings: everything that decides the result, as plain JSON values; kept in `settings.json` from the first
            finished stage on.

    Raises:
        ValueError: the folder holds a run with other settings; the message names the first that differs.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        self._file = folder / "settings.json"
        found = self._read() if self._file.exists() else self.settings
        for key, value in self.settings.items():
            if found.get(key) != value:
                raise ValueError(
                    f"{self._file} is from a run with {key}={found.get(key)!r}, not {value!r}: "
                    "give another output folder, or delete that folder to start again"
                )

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self._file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{self._file} is damaged ({error}): delete {self.folder} to start again") from error

    def claim(self) -> None:
        """Writes the settings: from here on the folder belongs to this run; what failed before left no trace."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self.settings, indent=2))
        os.replace(partial, self._file)

    def once(self, name: str, build: Callable[[Path], None]) -> Path:
        """The folder `name`; `build` fills it if an earlier run has not."""
        path, partial = self.folder / name, self.folder / f"{name}.partial"
        if not path.exists():
            shutil.rmtree(partial, ignore_errors=True)
            build(partial)
            self.claim()
            partial.rename(path)
        return path

    def last_checkpoint(self, name: str) -> Path | None:
        """The newest whole checkpoint of a Trainer's folder; what a kill left half-written after it is deleted.

        The Trainer writes `trainer_state.json` last.
        """
        for path in reversed(self.checkpoints(name)):
            try:
                json.loads((path / "trainer_state.json").read_text())
                return path
            except (OSError, json.JSONDecodeError):
                shutil.rmtree(path)
        return None

    def checkpoints(self, name: str) -> list[Path]:
        """The Trainer's `checkpoint-N` folders by N."""
        return sorted((self.folder / name).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
