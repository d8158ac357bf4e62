"""Which source and which row every draw takes: a pure function of the seed, the draw's index and the weights' history.

Draws come in blocks. In every block each source gets its share to the nearest draw, and over blocks exactly its share
(systematic sampling at evenly spread offsets), in a random order. A source is read pass after pass, each a random
permutation of its rows, so that no row repeats before all were seen, whatever the weights did meanwhile.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from mobilellm_hf.data.permutation import fraction, permute

# Blocks whose counts are added up at once.
CHUNK = 1024
# Places of a permutation that are computed at once, and how many such parts of it are remembered.
PART = 4096
PARTS_KEPT = 4
# Orders with rejected rows are kept in memory, 8 bytes a row; those of a source's last two passes are enough.
PASSES_KEPT = 2


class Cursor(NamedTuple):
    """Where the reading of a source stands: the pass, and the place in that pass's permutation."""

    number: int = 0
    place: int = 0


class Order(Protocol):
    """The order in which a source is read."""

    def kept(self, generation: int) -> float:
        """Rows that a pass gives."""

    def read(self, cursor: Cursor, first: int, count: int, generation: int) -> np.ndarray:
        """The rows that `count` draws in a row take, `first` of them (0 = at the cursor) before the first."""

    def advance(self, cursor: Cursor, count: int, generation: int) -> Cursor:
        """The cursor after so many draws."""

    def passes(self, cursor: Cursor, generation: int) -> float:
        """How often the source was read up to the cursor."""


class StreamOrder:
    """A stream is read as it comes."""

    def kept(self, generation: int) -> float:
        return np.inf

    def read(self, cursor: Cursor, first: int, count: int, generation: int) -> np.ndarray:
        return np.arange(cursor.place + first, cursor.place + first + count)

    def advance(self, cursor: Cursor, count: int, generation: int) -> Cursor:
        return Cursor(0, cursor.place + count)

    def passes(self, cursor: Cursor, generation: int) -> float:
        return 0.0


def _remember(cache: OrderedDict, key, value, limit: int) -> None:
    cache[key] = value
    while len(cache) > limit:
        cache.popitem(last=False)


class RandomOrder:
    """Pass after pass over `size` rows, each in another random order, without the rows that are rejected meanwhile.

    Args:
        key: what the permutations are chosen by.
        keep: generation -> (size,) bool; generation 0 keeps all rows and is not asked for.
    """

    def __init__(self, size: int, key: int, keep):
        self.size, self.key, self.keep = size, key, keep
        self._places: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._parts: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def _permute(self, number: int, places: np.ndarray) -> np.ndarray:
        return permute(places, self.size, (self.key << 32) + number)

    def _permuted(self, number: int, places: np.ndarray | range) -> np.ndarray:
        """The rows at these increasing places of a pass, by parts of the permutation: reading goes on where it was."""
        first, last = int(places[0]) // PART, int(places[-1]) // PART
        if first == last and isinstance(places, range):
            return self._part(number, first)[places.start - first * PART : places.stop - first * PART]
        places = np.asarray(places)
        parts = [
            self._part(number, part)[places[places // PART == part] - part * PART] for part in range(first, last + 1)
        ]
        return np.concatenate(parts)

    def _part(self, number: int, part: int) -> np.ndarray:
        if (number, part) not in self._parts:
            members = np.arange(part * PART, min((part + 1) * PART, self.size))
            _remember(self._parts, (number, part), self._permute(number, members), PARTS_KEPT)
        return self._parts[number, part]

    def kept_places(self, number: int, generation: int) -> np.ndarray | range:
        """The places of a pass that are not skipped, in order."""
        if generation == 0:
            return range(self.size)
        if (number, generation) not in self._places:
            found = np.flatnonzero(self.keep(generation)[self._permute(number, np.arange(self.size))])
            _remember(self._places, (number, generation), found, PASSES_KEPT)
        return self._places[number, generation]

    def kept(self, generation: int) -> int:
        return self.size if generation == 0 else int(np.count_nonzero(self.keep(generation)))

    def _locate(self, cursor: Cursor, count: int, generation: int) -> tuple[int, int]:
        """The pass of the draw that `count` others precede, and its number among the kept places of that pass."""
        places = self.kept_places(cursor.number, generation)
        skipped = cursor.place if isinstance(places, range) else int(np.searchsorted(places, cursor.place))
        passes, within = divmod(skipped + count, len(places))
        return cursor.number + passes, within

    def read(self, cursor: Cursor, first: int, count: int, generation: int) -> np.ndarray:
        number, within = self._locate(cursor, first, generation)
        rows = []
        while count > 0:
            chosen = self.kept_places(number, generation)[within : within + count]
            rows.append(self._permuted(number, chosen))
            number, within, count = number + 1, 0, count - len(chosen)
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def advance(self, cursor: Cursor, count: int, generation: int) -> Cursor:
        if count == 0:
            return cursor
        # Behind the last row that was read, so that rows which a later generation takes back are not passed over.
        number, within = self._locate(cursor, count - 1, generation)
        place = int(self.kept_places(number, generation)[within]) + 1
        return Cursor(number, place) if place < self.size else Cursor(number + 1, 0)

    def passes(self, cursor: Cursor, generation: int) -> float:
        return cursor.number + cursor.place / self.size


@dataclass(frozen=True)
class Change:
    """From the draw `start` on, sources have these shares of the rows, and of each the generation's rows are kept."""

    start: int
    shares: np.ndarray
    generation: int


class _Segment:
    """Draws between two changes: shares are constant, and so every count follows from the block's number."""

    def __init__(self, change: Change, before: np.ndarray, cursors: Sequence[Cursor], block_size: int, seed: int):
        self.change, self.start, self.cursors = change, change.start // block_size, list(cursors)
        self.block_size, self.seed = block_size, seed
        positive = np.flatnonzero(change.shares)
        self._edges = np.concatenate([[0.0], np.cumsum(change.shares)])
        self._edges[positive[-1] + 1 :] = 1.0  # which rounding may have missed
        self._sums = [before]
        self._last = (-1, before[None])

    def counts(self, blocks: np.ndarray) -> np.ndarray:
        """(blocks, sources) draws of each source in these blocks."""
        offsets = fraction(blocks, self.seed)[:, None]
        reached = np.ceil(self.block_size * self._edges - offsets).astype(np.int64)
        return np.diff(reached, axis=1)

    def before(self, block: int) -> np.ndarray:
        """(sources,) draws of each source before this block, those of earlier segments included."""
        chunk, within = divmod(block - self.start, CHUNK)
        while len(self._sums) <= chunk:
            first = self.start + (len(self._sums) - 1) * CHUNK
            self._sums.append(self._sums[-1] + self.counts(np.arange(first, first + CHUNK)).sum(0))
        if self._last[0] != chunk:
            first = self.start + chunk * CHUNK
            running = np.cumsum(self.counts(np.arange(first, first + CHUNK)), axis=0)
            self._last = (chunk, np.concatenate([np.zeros((1, running.shape[1]), np.int64), running]))
        return self._sums[chunk] + self._last[1][within]

    def exhausted(self, capacity: np.ndarray, until: int) -> int | None:
        """The first block before `until` in which a source would give more than its capacity."""
        for first in range(self.start, until, CHUNK):
            last = min(first + CHUNK, until)
            if (self.before(last) - self._sums[0] > capacity).any():
                over = [(self.before(block + 1) - self._sums[0] > capacity).any() for block in range(first, last)]
                return first + over.index(True)
        return None


class DrawSchedule:
    """The draws of a mixture.

    Args:
        orders: how each source is read.
        block_size: draws of a block; shares are met in every block, and change at a block's start.
        max_epochs: a source gives no more than this many passes; its share goes to the others. None: no limit.
        num_draws: how far the limit is looked ahead for.
    """

    def __init__(self, orders: Sequence[Order], block_size: int, seed: int, max_epochs: float | None, num_draws: int):
        self.orders, self.block_size, self.seed = list(orders), block_size, seed
        self.max_epochs, self.num_draws = max_epochs, num_draws
        self._segments: list[_Segment] = []

    def append(self, change: Change) -> None:
        """Changes from a draw on; what was to come after it is forgotten.

        Raises:
            ValueError: within `max_epochs` the sources cannot give all draws.
        """
        block = change.start // self.block_size
        self._segments = [segment for segment in self._segments if segment.start < block]
        self._open(change)
        while self.max_epochs is not None and self._split_where_exhausted():
            pass

    def _open(self, change: Change) -> None:
        block, last = change.start // self.block_size, self._segments[-1] if self._segments else None
        before = last.before(block) if last else np.zeros(len(self.orders), dtype=np.int64)
        cursors = self._cursors(last, before) if last else [Cursor()] * len(self.orders)
        self._segments.append(_Segment(change, before, cursors, self.block_size, self.seed))

    def _cursors(self, segment: _Segment, counts: np.ndarray) -> list[Cursor]:
        new = (counts - segment._sums[0]).tolist()
        return [
            order.advance(cursor, count, segment.change.generation)
            for order, cursor, count in zip(self.orders, segment.cursors, new, strict=True)
        ]

    def _capacity(self, segment: _Segment) -> np.ndarray:
        """(sources,) draws that each source has left in `max_epochs` passes."""
        kept = np.array([order.kept(segment.change.generation) for order in self.orders], dtype=float)
        read = [order.passes(cursor, 0) for order, cursor in zip(self.orders, segment.cursors, strict=True)]
        left = (self.max_epochs - np.array(read)) * kept
        return np.where(np.isinf(kept), np.inf, np.floor(np.maximum(left, 0) + 1e-6))

    def _split_where_exhausted(self) -> bool:
        segment, blocks = self._segments[-1], -(-self.num_draws // self.block_size)
        capacity = self._capacity(segment)
        block = segment.exhausted(capacity, blocks)
        if block is None:
            return False
        over = segment.before(block + 1) - segment._sums[0] > capacity
        shares = np.where(over, 0.0, segment.change.shares)
        if shares.sum() == 0:
            raise ValueError(
                f"after {block * self.block_size:,} of {self.num_draws:,} draws every source of the mixture was read "
                f"{self.max_epochs:g} times: add data, raise max_epochs, or train for fewer steps"
            )
        change = Change(block * self.block_size, shares / shares.sum(), segment.change.generation)
        if block == segment.start:
            self._segments.pop()
            self._segments.append(_Segment(change, segment._sums[0], segment.cursors, self.block_size, self.seed))
        else:
            self._open(change)
        return True

    def _segment_of(self, block: int) -> _Segment:
        return next(segment for segment in reversed(self._segments) if segment.start <= block)

    def block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(block_size,) source of each draw of a block, and its row within that source."""
        segment = self._segment_of(block)
        counts = segment.counts(np.array([block]))[0]
        first, generation = segment.before(block) - segment._sums[0], segment.change.generation
        sources = np.repeat(np.arange(len(counts)), counts)
        parts = [
            self.orders[source].read(segment.cursors[source], int(first[source]), int(counts[source]), generation)
            for source in np.flatnonzero(counts).tolist()
        ]
        rows = np.concatenate(parts)
        # Sources change places, but the rows of each come in their order.
        random = np.random.Generator(np.random.Philox(key=self.seed, counter=block))
        shuffled = random.permutation(sources)
        in_order = np.empty_like(rows)
        in_order[np.argsort(shuffled, kind="stable")] = rows
        return shuffled, in_order

    def counts(self, draws: int) -> np.ndarray:
        """(sources,) how many of the first `draws` draws each source gives."""
        block, within = divmod(draws, self.block_size)
        total = self._segment_of(block).before(block).copy()
        if within:
            total += np.bincount(self.block(block)[0][:within], minlength=len(total))
        return total

    def passes(self, draws: int) -> np.ndarray:
        """(sources,) how often each source was read in the first `draws` draws, ; 0 for streams."""
        segment = self._segment_of(draws // self.block_size)
        cursors = self._cursors(segment, self.counts(draws))
        passes = [order.passes(cursor, 0) for order, cursor in zip(self.orders, cursors, strict=True)]
        return np.array(passes)
