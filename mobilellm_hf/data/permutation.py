"""A random permutation of any length of which any part can be computed alone: nothing is stored, nothing is replayed.

A Feistel network over the next power of two, walked until it lands inside the range. So the row at any place of any
pass over a source costs the same at draw 10 and at draw 10^10, in every process, and takes no memory.
"""

import numpy as np

ROUNDS = 6
GOLDEN = 0x9E3779B97F4A7C15
MIX = np.uint64(0xD6E8FEB86659FD93)


def permute(places: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a random permutation of `size` elements, chosen by `key`, takes each of the places.

    Args:
        places: integers in [0, size).
        key: any number; permutations of different keys are unrelated.

    Returns:
        int64 array of the shape of `places`.
    """
    bits = max(2, (size - 1).bit_length())
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    result = np.asarray(places).astype(np.uint64).ravel()
    outside = np.arange(len(result))
    while len(outside):
        result[outside] = _network(result[outside], bits, keys)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64).reshape(np.shape(places))


def _network(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """One walk: a bijection of [0, 2^bits). The two halves may differ by a bit, and change places every round."""
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(right_bits), values & np.uint64(2**right_bits - 1)
    for key in keys:
        hashed = (right + key) * MIX
        hashed = (hashed ^ (hashed >> np.uint64(32))) * MIX
        left, right = right, (left + (hashed >> np.uint64(40))) & np.uint64(2**left_bits - 1)
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def fraction(numbers: np.ndarray, key: int) -> np.ndarray:
    """Evenly spread numbers of [0, 1), one for each of the given ones: the golden ratio's multiples, shifted."""
    shift = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return ((np.asarray(numbers).astype(np.uint64) * np.uint64(GOLDEN) + shift) >> np.uint64(11)) * 2.0**-53
