"""The output folder of a recipe: what is finished stays, what is not is done again, other settings are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Workspace:
    """A subfolder a stage, each written under another name first, so that it is whole or absent.

    Args:
        folder: made if it does not exist.
        settings: everything that decides the result, as plain JSON values; kept in `settings.json`.

    Raises:
        ValueError: the folder holds a run with other settings; the message names the first that differs.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "settings.json"
        found = json.loads(path.read_text()) if path.exists() else settings
        for key, value in settings.items():
            if found.get(key) != value:
                raise ValueError(
                    f"{path} is from a run with {key}={found.get(key)!r}, not {value!r}: "
                    "give another --output-dir, or delete that folder to start again"
                )
        path.write_text(json.dumps(settings, indent=2))

    def once(self, name: str, build: Callable[[Path], None]) -> Path:
        """The folder `name`; `build` fills it if an earlier run has not."""
        path, partial = self.folder / name, self.folder / f"{name}.partial"
        if not path.exists():
            shutil.rmtree(partial, ignore_errors=True)
            build(partial)
            partial.rename(path)
        return path
