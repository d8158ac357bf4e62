"""A mixture whose weights can change while it is being read, and which is the same however it is read.

    mixture = MixtureDataset(rows, {"code": 0.3, "math": 0.7}, num_draws=steps * batch_size, seed=0)
    mixture[17]                                     # input_ids, labels, position_ids of draw 17
    mixture.set_weights({"code": 0.5, "math": 0.5}, from_draw=6_400, keep=scores > 0)
    mixture.report()                                # rows, tokens and passes of every source

Map-style over draw indices: which source and which row a draw takes is a pure function of the seed, the index and the
history of weights. So any number of workers and ranks reads the same, and a resumed run goes on where it was without
replaying what was read. Weights are shares of tokens. Running DataLoader workers see a change at once.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import get_worker_info

from mobilellm_hf.data.draws import DrawSchedule, RandomOrder, StreamOrder
from mobilellm_hf.data.shared_history import SharedHistory
from mobilellm_hf.data.source_rows import SourceRows
from mobilellm_hf.data.streaming import PackedStream
from mobilellm_hf.workspace import write_whole

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Muennighoff et al. (2305.16264): up to four epochs, repeated data are worth nearly as much as new ones.
MAX_EPOCHS = 4.0
BLOCKS_KEPT = 64


@dataclass(frozen=True)
class SourceDraw:
    """What was drawn of one source: its share now, rows, tokens, and how often the source was read for them."""

    weight: float
    rows: int
    tokens: int
    epochs: float


class MixtureDataset(SourceRows, TorchDataset):
    """Rows drawn from weighted sources, for the stock `Trainer` (with `train_sampling_strategy="sequential"`).

    Args:
        rows: packed rows with a column `source`; or source -> its rows, which may be a `PackedStream`. A stream is
            read in its own order by every worker, each of which skips what the others take.
        weights: source -> share of the tokens; they sum to 1. Sources that are not named are not drawn.
        num_draws: length of the data set: steps x batch x accumulation x processes.
        block_size: shares are met in every block of so many draws, and can change at the start of one.
        max_epochs: how often a source may be read.
        on_max_epochs: "warn", or "limit": a source that was read so often gives its share to the others.
        keep_folder: where masks of kept rows are written, one file a change; by default a temporary folder.

    Attributes:
        emit_ids: whether a row says, as `row_id`, which row of `rows` it is (-1 of a stream) and, as `source_id`, the
            number of its source in `sources`. The Trainer hands them on with `remove_unused_columns=False`; then
            something must take them out before the model runs, as the callbacks of `mobilellm_hf.training` do.

    Raises:
        ValueError: weights are no shares, a source with a weight has no rows, or "limit" leaves too few draws.
    """

    def __init__(
        self,
        rows: Dataset | Mapping[str, Dataset | PackedStream],
        weights: Mapping[str, float],
        num_draws: int,
        *,
        seed: int = 0,
        block_size: int = 64,
        max_epochs: float = MAX_EPOCHS,
        on_max_epochs: Literal["warn", "limit"] = "warn",
        keep_folder: str | Path | None = None,
    ):
        if num_draws < 1 or block_size < 1 or max_epochs <= 0:
            raise ValueError(
                f"num_draws={num_draws}, block_size={block_size} and max_epochs={max_epochs} must be positive"
            )
        if on_max_epochs not in ("warn", "limit"):
            raise ValueError(f"on_max_epochs={on_max_epochs!r} must be 'warn' or 'limit'")
        self.num_draws, self.seed, self.block_size = num_draws, seed, block_size
        self.max_epochs, self.on_max_epochs = max_epochs, on_max_epochs
        self.keep_folder = None if keep_folder is None else Path(keep_folder)
        self.emit_ids = False
        self._warned: set[str] = set()
        SourceRows.__init__(self, rows)
        self._history = SharedHistory(len(self.sources))
        self._rebuild()
        self._change(0, weights, generation=0)

    # What differs from process to process is made anew in each: workers get the history alone, in shared memory.

    def _rebuild(self) -> None:
        orders = [
            StreamOrder()
            if name in self._streams
            else RandomOrder(len(self._rows[name]), (self.seed << 16) + index, partial(self._kept_of, name))
            for index, name in enumerate(self.sources)
        ]
        limit = self.max_epochs if self.on_max_epochs == "limit" else None
        self._schedule = DrawSchedule(orders, self.block_size, self.seed, limit, self.num_draws)
        self._masks: dict[int, np.ndarray] = {}
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._known = 0

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name not in ("_schedule", "_masks", "_blocks")}

    def __setstate__(self, state) -> None:
        vars(self).update(state)
        self._rebuild()

    def _follow(self) -> None:
        """Takes over changes that another process has made."""
        for number in range(self._known, len(self._history)):
            change = self._history[number]
            block = change.start // self.block_size
            self._blocks = OrderedDict((key, value) for key, value in self._blocks.items() if key < block)
            self._schedule.append(change)
        self._known = len(self._history)

    def _kept_of(self, source: str, generation: int) -> np.ndarray | None:
        """(rows of the source,) bool, or None if all are kept."""
        if generation == 0:
            return None
        numbers, offset = self._rows[source], self._offsets[source]
        if isinstance(numbers, range):
            return self._mask(generation)[numbers.start + offset : numbers.stop + offset]
        return self._mask(generation)[numbers]

    def _mask(self, generation: int) -> np.ndarray:
        if generation not in self._masks:
            self._masks[generation] = np.load(self._history.folder() / _mask_name(generation), mmap_mode="r")
        return self._masks[generation]

    # Reading

    def __len__(self) -> int:
        return self.num_draws

    def __getitem__(self, draw: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """One dictionary of (tokens,) int64 tensors a draw: `input_ids`, `labels`, and what else the rows have."""
        sources, rows = self.locate(draws)
        worker = get_worker_info()
        self._history.note_fetched(0 if worker is None else worker.id + 1, max(draws))
        result = [self.fetch_row(self.sources[index], row) for index, row in zip(sources.tolist(), rows.tolist())]
        if self.emit_ids:
            for row, identity, source in zip(result, self.row_ids(sources, rows), sources, strict=True):
                row |= {"row_id": torch.tensor(identity), "source_id": torch.tensor(source)}
        return result

    def locate(self, draws: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(draws,) the source of each draw, as its number in `sources`, and the row within the source."""
        if self._known != len(self._history):
            self._follow()
        if min(draws) < 0 or max(draws) >= self.num_draws:
            raise IndexError(f"draw {max(draws)} of a mixture of {self.num_draws}")
        sources, rows = np.empty(len(draws), dtype=np.int64), np.empty(len(draws), dtype=np.int64)
        for place, draw in enumerate(draws):
            block, within = divmod(draw, self.block_size)
            if block not in self._blocks:
                self._blocks[block] = self._schedule.block(block)
                while len(self._blocks) > BLOCKS_KEPT:
                    self._blocks.popitem(last=False)
            of_block, within_source = self._blocks[block]
            sources[place], rows[place] = of_block[within], within_source[within]
        return sources, rows

    def kept(self) -> np.ndarray | None:
        """(num_rows,) bool, the rows that are kept since the last change; None if all are."""
        generation = self._history[len(self._history) - 1].generation
        return None if generation == 0 else np.array(self._mask(generation))

    # Changing

    def set_weights(
        self, weights: Mapping[str, float], from_draw: int | None = None, keep: np.ndarray | None = None
    ) -> int:
        """Other weights, and other kept rows, from a draw on that nobody has fetched.

        To be called in the process that owns the data set, alike on every rank; its workers follow.

        Args:
            weights: as for the mixture.
            from_draw: rounded up to the start of a block. By default the first that no process of this rank has
                fetched; with workers, batches that are on their way must be added (`MixtureCallback` does).
            keep: (num_rows,) bool, by `row_id`; None keeps all rows.

        Returns:
            The draw from which it applies.

        Raises:
            ValueError: that draw was fetched already or precedes an earlier change, the weights are no shares, or a
                source with a weight keeps no row.
        """
        fetched = self._history.fetched()
        start = -(-(fetched + 1 if from_draw is None else from_draw) // self.block_size) * self.block_size
        if start <= fetched:
            raise ValueError(f"draw {start} was fetched already (up to {fetched}): weights can change after it only")
        if start < self._history[len(self._history) - 1].start:
            raise ValueError(f"draw {start} precedes the last change of the weights")
        generation = 0
        if keep is not None:
            generation = len(self._history)
            self._write_mask(generation, np.asarray(keep, dtype=bool))
        self._change(start, weights, generation)
        return start

    def _write_mask(self, generation: int, keep: np.ndarray) -> None:
        if keep.shape != (self.num_rows,):
            raise ValueError(f"keep has the shape {keep.shape}, the mixture {self.num_rows} rows")
        if self.keep_folder is None:
            self.keep_folder = Path(tempfile.mkdtemp(prefix="mixture-"))

        def write(path: Path) -> None:
            with path.open("wb") as stream:
                np.save(stream, keep)

        # Every process writes the same bytes; the last one's stay.
        write_whole(self.keep_folder / _mask_name(generation), write)
        self._history.set_folder(self.keep_folder)

    def _change(self, start: int, weights: Mapping[str, float], generation: int) -> None:
        shares = self._shares(weights, generation)
        self._history.append(start, [weights.get(name, 0.0) for name in self.sources], shares, generation)
        try:
            self._follow()
        except ValueError:
            self._history.pop()
            self._rebuild()
            raise
        self._warn()

    def _shares(self, weights: Mapping[str, float], generation: int) -> np.ndarray:
        """(sources,) probability that a row comes from each source."""
        if unknown := set(weights) - set(self.sources):
            raise ValueError(f"the mixture names {sorted(unknown)[0]!r}; the rows are of {', '.join(self.sources)}")
        values = np.array([weights.get(name, 0.0) for name in self.sources])
        if not (np.isfinite(values).all() and (values >= 0).all() and abs(values.sum() - 1) < 1e-6):
            raise ValueError(f"mixture weights must be shares that sum to 1, not {dict(weights)}")
        for name, weight in zip(self.sources, values.tolist(), strict=True):
            if weight > 0 and name not in self._streams:
                keep = self._kept_of(name, generation)
                if len(self._rows[name]) == 0 or (keep is not None and not keep.any()):
                    raise ValueError(f"the mixture gives {name!r} a weight of {weight:.3f}, but no row of it is kept")
        shares = values / self.tokens_per_row
        return shares / shares.sum()

    def _warn(self) -> None:
        if self.on_max_epochs != "warn":
            return
        for name, draw in self.report(self.num_draws).items():
            if draw.epochs > self.max_epochs and name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    "%s will be read %.1f times; rows repeated beyond %g teach little",
                    name, draw.epochs, self.max_epochs,
                )  # fmt: skip

    # Reporting and resuming

    @property
    def weights(self) -> dict[str, float]:
        """The last weights that were set."""
        return dict(zip(self.sources, self._history.weights(len(self._history) - 1), strict=True))

    def weights_at(self, draw: int) -> dict[str, float]:
        """The weights by which a draw was made."""
        number = max(number for number in range(len(self._history)) if self._history[number].start <= draw)
        return dict(zip(self.sources, self._history.weights(number), strict=True))

    def fetched(self) -> int:
        """The last draw that a process of this rank has fetched; -1 if none."""
        return self._history.fetched()

    def report(self, draws: int | None = None) -> dict[str, SourceDraw]:
        """What the first `draws` draws (all) take of every source.

        Tokens are counted by the source's mean row where rows differ in length; epochs are 0 for streams.
        """
        self._follow()
        draws = self.num_draws if draws is None else min(draws, self.num_draws)
        counts, passes = self._schedule.counts(draws), self._schedule.passes(draws)
        weights = self.weights_at(max(0, draws - 1))
        return {
            name: SourceDraw(weights[name], int(count), round(count * tokens), float(epochs))
            for name, count, tokens, epochs in zip(self.sources, counts, self.tokens_per_row, passes, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the draws, as JSON values; kept rows by the name and digest of their file."""
        changes = []
        for number in range(len(self._history)):
            change = self._history[number]
            entry = {"from_draw": change.start, "weights": self._history.weights(number)}
            if change.generation:
                file = self._history.folder() / _mask_name(change.generation)
                entry |= {"generation": change.generation, "keep": file.name, "sha256": _digest(file)}
            changes.append(entry)
        return self._identity() | {"changes": changes}

    def restart(self) -> None:
        """Forgets every change but the first weights, and what was fetched: for another run over the same rows."""
        weights = dict(zip(self.sources, self._history.weights(0), strict=True))
        self._history.clear()
        self._rebuild()
        self._change(0, weights, generation=0)

    def _identity(self) -> dict[str, Any]:
        sizes = [len(self._rows[name]) if name in self._rows else None for name in self.sources]
        limit = self.max_epochs if self.on_max_epochs == "limit" else None
        return {
            "seed": self.seed,
            "block_size": self.block_size,
            "sources": self.sources,
            "rows": sizes,
            "limit": limit,
            "first_weights": self._history.weights(0),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on with the history of another run; files of kept rows are looked for in `keep_folder`.

        Raises:
            ValueError: it is of another mixture, or a file of kept rows is missing or changed; the message names it.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"the saved mixture has {name}={state.get(name)!r}, this one {value!r}: resume with the data and "
                    "settings of the interrupted run, or start in another output folder"
                )
        for entry in (entry for entry in state["changes"] if "keep" in entry):
            file = (self.keep_folder or Path()) / entry["keep"]
            if not file.exists() or _digest(file) != entry["sha256"]:
                raise ValueError(f"{file}, the rows that an influence round kept, is missing or was changed")
            self._history.set_folder(self.keep_folder)
        self._history.clear()
        self._rebuild()
        for entry in state["changes"]:
            weights = dict(zip(self.sources, entry["weights"], strict=True))
            generation = entry.get("generation", 0)
            shares = self._shares(weights, generation)
            self._history.append(entry["from_draw"], entry["weights"], shares, generation)
            self._follow()


def _mask_name(generation: int) -> str:
    return f"keep-{generation:04d}.npy"


def _digest(file: Path) -> str:
    status = file.stat()
    return _sha256(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=256)  # every checkpoint asks for every mask again
def _sha256(file: Path, changed: int, size: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
