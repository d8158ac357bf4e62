"""The vectors that a deduplication kept, searched by cosine: exact, since every shortcut is a bound and no guess.

- The inner product of two vectors is at most that of their first principal components plus the product of what is
  left of their norms (Cauchy-Schwarz). A few dozen numbers a vector rule out nearly all pairs.
- The vectors lie in cells around centroids. A cell is left out if its half-space, which ends midway between its
  centroid and the visitor's, is farther from the visitor than a near-duplicate can be.
- What remains is decided by its cosine in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A cosine this close to the threshold reaches it. So 1.0 finds equal texts whose vectors were rounded differently,
# to half precision too.
TOLERANCE = 1e-6
# What rounding to float32 can add to a squared distance of unit vectors, or take from an inner product; with room.
SLACK = 1e-5
# Cells for each root of the number of vectors, and vectors that each cell is learnt from.
CELLS_PER_ROOT = 2.0
POINTS_PER_CELL = 32
# A pair that the components do not rule out costs about as much as this many further components for another pair.
CANDIDATE_COST = 15_000
WIDTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
PAIRS_AT_ONCE = 1_024
KEPT_AT_ONCE = 8_192

# Rows, columns and their cosines.
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass
class Block:
    """Vectors as they were read, the documents they are of, their lengths, prefixes (see `_prefixes`) and cells."""

    raw: np.ndarray
    numbers: np.ndarray
    lengths: np.ndarray
    prefixes: np.ndarray
    cells: np.ndarray

    def append(self, other: Block, rows: np.ndarray, size: int) -> None:
        """Puts rows of another block behind the first `size`; the room for them doubles when it is used up."""
        end = size + len(rows)
        for name, values in vars(self).items():
            if end > len(values):
                values = np.concatenate([values[:size], np.empty((max(end, size), *values.shape[1:]), values.dtype)])
                setattr(self, name, values)
            values[size:end] = getattr(other, name)[rows]


class KeptIndex:
    """Near-duplicates among what was added.

    Args:
        sample: vectors (n, D), from which components and cells are learnt; they are not added.
        threshold: the cosine that counts.
        most: vectors that will be added at most.

    Raises:
        ImportError: faiss is missing.
    """

    def __init__(self, sample: np.ndarray, threshold: float, most: int):
        directions = _directions(sample, _lengths(sample))
        self.threshold = threshold
        self.components = _components(directions, threshold)
        cells = min(int(CELLS_PER_ROOT * most**0.5), len(sample) // POINTS_PER_CELL)
        self.centroids = _centroids(directions, _prefixes(directions, self.components), max(cells, 1))
        self._squares = (self.centroids**2).sum(1)
        apart = np.maximum(self._squares[:, None] + self._squares - 2 * self.centroids @ self.centroids.T, 0)
        # x, whose centroid is c, is (|x-c'|^2 - |x-c|^2) / (2 |c-c'|) away from the half-space that holds the cell
        # of c', and from its near-duplicates no more than the root of 2 - 2 threshold.
        self._reach = 2 * np.sqrt(apart * (2 - 2 * threshold + 2 * TOLERANCE)) + SLACK
        self._size = 0
        self._kept = self.block(sample[:1], np.zeros(1, np.int64))[0]  # for its shapes
        self._sort()

    @property
    def numbers(self) -> np.ndarray:
        """The documents that were added, in their order."""
        return self._kept.numbers[: self._size]

    def block(self, raw: np.ndarray, numbers: np.ndarray) -> tuple[Block, np.ndarray]:
        """Vectors made ready to be searched for and added; and which cells (cells, n) can hold near-duplicates."""
        lengths = _lengths(raw)
        directions = _directions(raw, lengths)
        distances = self._squares - 2 * directions @ self.centroids.T
        cells = distances.argmin(1)
        distances -= distances[np.arange(len(raw)), cells][:, None]
        block = Block(raw, numbers, lengths, _prefixes(directions, self.components), cells)
        return block, np.ascontiguousarray((distances <= self._reach[cells]).T)

    def add(self, block: Block, rows: np.ndarray) -> None:
        """Adds these rows of a block."""
        if len(rows):
            self._kept.append(block, rows, self._size)
            self._size += len(rows)
            self._sort()

    def _sort(self) -> None:
        """Lays the prefixes out cell by cell."""
        cells = self._kept.cells[: self._size]
        self._order = np.argsort(cells, kind="stable")
        self._sorted = self._kept.prefixes[self._order]
        self._starts = np.searchsorted(cells[self._order], np.arange(len(self.centroids) + 1))

    def search(self, block: Block, near: np.ndarray) -> Pairs:
        """All near-duplicates of a block's vectors: rows of the block, places in `numbers`, cosines."""
        rows, places = [block.cells[:0]], [block.cells[:0]]
        for cell in np.flatnonzero(near.any(1) & (np.diff(self._starts) > 0)):
            visitors = np.flatnonzero(near[cell])
            prefixes, end = block.prefixes[visitors], self._starts[cell + 1]
            for start in range(self._starts[cell], end, KEPT_AT_ONCE):
                row, column = self._candidates(prefixes, self._sorted[start : min(start + KEPT_AT_ONCE, end)])
                rows.append(visitors[row])
                places.append(self._order[start + column])
        return self._decide(block, np.concatenate(rows), self._kept, np.concatenate(places))

    def within(self, block: Block, later: np.ndarray, earlier: np.ndarray) -> Pairs:
        """Near-duplicates among a block's own rows, each a later one with one before it, in the order of the later."""
        rows, columns = self._candidates(block.prefixes[later], block.prefixes[earlier])
        rows, columns = later[rows], earlier[columns]
        before = columns < rows
        return self._decide(block, rows[before], block, columns[before])

    def _candidates(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of prefixes (n, m) and (k, m) that may be near-duplicates."""
        # On a sparse matrix `np.nonzero` takes several times as long as `flatnonzero`.
        return np.divmod(np.flatnonzero(a @ b.T >= self.threshold - SLACK), len(b))

    def _decide(self, a: Block, rows: np.ndarray, b: Block, columns: np.ndarray) -> Pairs:
        parts = [(rows[:0], columns[:0], np.zeros(0))]
        for start in range(0, len(rows), PAIRS_AT_ONCE):
            row, column = rows[start : start + PAIRS_AT_ONCE], columns[start : start + PAIRS_AT_ONCE]
            # First roughly: in float64 it takes five times as long.
            close = _cosines(a, row, b, column, np.float32) >= self.threshold - SLACK
            row, column = row[close], column[close]
            cosines = _cosines(a, row, b, column, np.float64)
            reached = cosines >= self.threshold - TOLERANCE
            parts.append((row[reached], column[reached], cosines[reached]))
        return tuple(map(np.concatenate, zip(*parts)))


def _cosines(a: Block, rows: np.ndarray, b: Block, columns: np.ndarray, dtype: type) -> np.ndarray:
    first, second = a.raw[rows].astype(dtype, copy=False), b.raw[columns].astype(dtype, copy=False)
    return np.einsum("nd,nd->n", first, second) / (a.lengths[rows] * b.lengths[columns])


def _lengths(raw: np.ndarray) -> np.ndarray:
    wide = raw.astype(np.float64)
    return np.sqrt(np.einsum("nd,nd->n", wide, wide))


def _directions(raw: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return (raw / lengths[:, None]).astype(np.float32)


def _prefixes(directions: np.ndarray, components: np.ndarray) -> np.ndarray:
    """(n, m + 1): m principal components and the norm of the rest; their inner products bound those of the whole."""
    first = directions @ components
    rest = np.sqrt(np.maximum(1 - (first**2).sum(1, keepdims=True), 0))
    return np.concatenate([first, rest], 1)


def _components(sample: np.ndarray, threshold: float) -> np.ndarray:
    """(D, m) principal components, as many as cost least: each is paid for by every pair, and spares candidates."""
    axes = np.linalg.eigh(sample.T @ sample)[1][:, ::-1].astype(np.float32)
    few = sample[:1_000]
    pairs = np.triu_indices(len(few), 1)
    costs = {}
    for width in [*(width for width in WIDTHS if width < len(axes)), len(axes)]:
        prefixes = _prefixes(few, axes[:, :width])
        candidates = (prefixes @ prefixes.T)[pairs] >= threshold - SLACK
        costs[width] = width + CANDIDATE_COST * (candidates.mean() if len(candidates) else 0)
    return np.ascontiguousarray(axes[:, : min(costs, key=costs.get)])


def _centroids(sample: np.ndarray, prefixes: np.ndarray, count: int) -> np.ndarray:
    """(count or fewer, D): the means of clusters, which are found by their prefixes, in a fraction of the time."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError("Deduplication needs faiss: pip install 'mobilellm_hf[curation]'") from error

    if count == 1:
        return sample.mean(0, keepdims=True)
    means = faiss.Kmeans(
        prefixes.shape[1], count, niter=5, seed=1, min_points_per_centroid=1, max_points_per_centroid=POINTS_PER_CELL
    )
    means.train(prefixes)
    cells = means.index.search(prefixes, 1)[1][:, 0]
    sizes = np.bincount(cells, minlength=count)
    sums = np.zeros((count, sample.shape[1]), np.float32)
    np.add.at(sums, cells, sample)
    return sums[sizes > 0] / sizes[sizes > 0, None].astype(np.float32)
