"""Permutations that are computed place by place, and the schedule of draws against counting one by one."""

import numpy as np
import pytest

from mobilellm_hf.data.draws import Change, Cursor, DrawSchedule, RandomOrder
from mobilellm_hf.data.permutation import fraction, permute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000, 70_000])
def test_every_length_is_permuted_and_any_part_of_it_alone(size):
    whole = permute(np.arange(size), size, key=7)
    assert np.array_equal(np.sort(whole), np.arange(size))
    some = np.random.default_rng(0).integers(size, size=50)
    assert np.array_equal(permute(some, size, key=7), whole[some])
    if size > 60:
        assert np.mean(permute(np.arange(size), size, key=8) == whole) < 0.1
        assert abs(np.corrcoef(whole, np.arange(size))[0, 1]) < 5 / size**0.5


def test_all_places_are_alike_over_keys():
    tables = np.zeros((6, 6))
    for key in range(3000):
        tables[np.arange(6), permute(np.arange(6), 6, key)] += 1
    chi_square = ((tables - 500) ** 2 / 500).sum()
    assert chi_square < 60  # 25 degrees of freedom: 1 in 10,000 is above 60
    pairs = np.zeros((6, 6))
    for key in range(3000):
        first, second = permute(np.arange(2), 6, key)
        pairs[first, second] += 1
    assert ((pairs[~np.eye(6, dtype=bool)] - 100) ** 2 / 100).sum() < 70  # 29 degrees of freedom


def test_fractions_are_evenly_spread():
    values = np.sort(fraction(np.arange(1000), key=3))
    assert values[0] >= 0 and values[-1] < 1
    assert np.diff(values).max() < 0.004
    assert not np.array_equal(fraction(np.arange(5), 3), fraction(np.arange(5), 4))


def schedule(sizes, block_size=16, max_epochs=None, num_draws=4000, masks=None):
    def keep(index):
        return lambda generation: None if generation == 0 else masks[generation][index]

    orders = [RandomOrder(size, index, keep(index)) for index, size in enumerate(sizes)]
    return DrawSchedule(orders, block_size, 5, max_epochs, num_draws)


def shares(*values):
    return np.array(values) / sum(values)


def draws_of(draws, blocks):
    parts = [draws.block(block) for block in blocks]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


@pytest.mark.parametrize("weights", [(1, 1), (0.003, 0.5, 0.497), (0, 3, 0, 1), (1 / 3, 1 / 3, 1 / 3), (1e-9, 1)])
def test_shares_are_met_in_every_block_and_exactly_over_blocks(weights):
    draws = schedule([50] * len(weights))
    draws.append(Change(0, shares(*weights), 0))
    sources, _ = draws_of(draws, range(200))
    counts = np.stack([np.bincount(block, minlength=len(weights)) for block in sources.reshape(200, 16)])
    assert (abs(counts - 16 * shares(*weights)) <= 1).all()
    assert (abs(counts.cumsum(0) - 16 * np.arange(1, 201)[:, None] * shares(*weights)) < 3).all()
    for number in (0, 1, 15, 16, 1600, 1601, 3199):
        assert np.array_equal(draws.counts(number), np.bincount(sources[:number], minlength=len(weights)))


def test_order_within_a_block_is_random():
    draws = schedule([1000, 1000])
    draws.append(Change(0, shares(1, 1), 0))
    sources = draws_of(draws, range(250))[0].reshape(250, 16)
    assert (abs(sources.mean(0) - 0.5) < 0.16).all()  # five standard errors at every position
    assert abs(np.corrcoef(sources[:, :-1].ravel(), sources[:, 1:].ravel())[0, 1]) < 0.15


def brute_force(sizes, segments, masks, order_of):
    """Rows of each source one by one: what is left of the pass, without rejected rows, then the next pass."""
    state = dict.fromkeys(range(len(sizes)), (0, 0))
    for sources, generation in segments:
        for source in sources:
            number, place = state[source]
            while True:
                if place == sizes[source]:
                    number, place = number + 1, 0
                row = order_of(source, number)[place]
                place += 1
                if generation == 0 or masks[generation][source][row]:
                    break
            state[source] = (number, place)
            yield row


def test_passes_go_on_through_changes_of_weights_and_of_kept_rows():
    sizes, rng = [37, 90, 11], np.random.default_rng(0)
    masks = {number: [rng.random(size) < 0.6 for size in sizes] for number in (1, 2)}
    draws = schedule(sizes, masks=masks)
    changes = [(0, (3, 6, 1), 0), (10, (1, 1, 1), 1), (21, (5, 0, 1), 2), (22, (1, 9, 1), 0), (40, (1, 1, 0), 1)]
    for block, weights, generation in changes:
        draws.append(Change(16 * block, shares(*weights), generation))
    sources, rows = draws_of(draws, range(80))
    ends = [change[0] for change in changes[1:]] + [80]
    parts = [
        (sources[16 * start : 16 * end], generation) for (start, _, generation), end in zip(changes, ends, strict=True)
    ]

    def order_of(source, number):
        return permute(np.arange(sizes[source]), sizes[source], (source << 32) + number)

    expected = brute_force(sizes, parts, masks, order_of)
    assert rows.tolist() == list(expected)
    fresh = schedule(sizes, masks=masks)
    for block, weights, generation in changes:
        fresh.append(Change(16 * block, shares(*weights), generation))
    assert np.array_equal(fresh.block(77)[1], rows[77 * 16 : 78 * 16])  # no replay


def test_a_row_that_is_taken_back_is_read_in_its_place():
    """The cursor stands behind the last row that was read, not before the next that was kept then."""
    order = RandomOrder(10, 0, {0: None, 1: np.array([True] * 5 + [False] * 5)}.get)
    permuted = permute(np.arange(10), 10, 0)
    assert order.read(Cursor(), 0, 10, 0).tolist() == permuted.tolist()
    cursor = order.advance(Cursor(), 2, 1)
    assert cursor.place == np.flatnonzero(permuted < 5)[1] + 1
    assert order.advance(Cursor(0, 9), 1, 0) == Cursor(1, 0)
    assert order.advance(Cursor(3, 4), 0, 1) == Cursor(3, 4)


def test_a_source_that_is_exhausted_gives_its_share_to_the_others():
    sizes = [20, 100, 10_000]
    draws = schedule(sizes, max_epochs=2, num_draws=3200)
    draws.append(Change(0, shares(1, 1, 2), 0))
    sources, rows = draws_of(draws, range(200))
    counts = np.bincount(sources)
    assert 40 - 16 < counts[0] <= 40 and 200 - 16 < counts[1] <= 200
    assert counts.sum() == 3200
    for source, size in enumerate(sizes[:2]):
        read = rows[sources == source]
        assert len(set(read[:size])) == size and np.bincount(read).max() <= 2
    first = np.flatnonzero(sources == 0)[-1]
    between = sources[first + 16 : np.flatnonzero(sources == 1)[-1]]
    assert abs((between == 1).mean() - 1 / 3) < 0.05  # the others keep their proportion


def test_too_few_rows_within_the_limit_is_an_error():
    draws = schedule([20, 20], max_epochs=2, num_draws=3200)
    with pytest.raises(ValueError, match=r"after \d+ of 3,200 draws every source of the mixture was read 2 times"):
        draws.append(Change(0, shares(1, 1), 0))
