"""What the processes that read a mixture must agree on: its changes, and how far it was read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mobilellm_hf.data.draws import Change

MAX_CHANGES = 4096
MAX_WORKERS = 256


class SharedHistory:
    """The changes so far and what was fetched, in memory that DataLoader workers share with their parent."""

    def __init__(self, num_sources: int):
        self._starts = torch.zeros(MAX_CHANGES, dtype=torch.int64).share_memory_()
        self._generations = torch.zeros(MAX_CHANGES, dtype=torch.int64).share_memory_()
        # weights as they were given, and shares of rows
        self._values = torch.zeros(MAX_CHANGES, 2, num_sources, dtype=torch.float64).share_memory_()
        self._length = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._fetched = torch.full((MAX_WORKERS,), -1, dtype=torch.int64).share_memory_()
        self._folder = torch.zeros(4096, dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return int(self._length[0])

    def __getitem__(self, number: int) -> Change:
        start, generation = int(self._starts[number]), int(self._generations[number])
        return Change(start, self._values[number, 1].numpy().copy(), generation)

    def weights(self, number: int) -> list[float]:
        return self._values[number, 0].tolist()

    def append(self, start: int, weights: Sequence[float], shares: np.ndarray, generation: int) -> None:
        number = len(self)
        if number == MAX_CHANGES:
            raise ValueError(f"the weights of a mixture can change {MAX_CHANGES} times")
        self._starts[number], self._generations[number] = start, generation
        self._values[number, 0], self._values[number, 1] = (
            torch.tensor(weights, dtype=torch.float64),
            torch.from_numpy(shares),
        )
        self._length[0] = number + 1  # last: from now on workers see it

    def pop(self) -> None:
        self._length[0] -= 1

    def clear(self) -> None:
        self._length[0] = 0
        self._fetched.fill_(-1)

    def note_fetched(self, worker: int, draw: int) -> None:
        slot = worker % MAX_WORKERS
        if draw > self._fetched[slot]:
            self._fetched[slot] = draw

    def fetched(self) -> int:
        return int(self._fetched.max())

    def folder(self) -> Path:
        return Path(bytes(self._folder.numpy()).rstrip(b"\0").decode())

    def set_folder(self, folder: Path) -> None:
        text = str(folder.resolve()).encode()
        self._folder[: len(text) + 1] = torch.tensor([*text, 0], dtype=torch.uint8)
