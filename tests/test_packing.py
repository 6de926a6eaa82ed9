"""Packing loses no token, cuts no document without need, and fills rows as best-fit decreasing must."""

import numpy as np
import pytest

from mlm_jax.data import packing

LENGTHS = np.random.default_rng(0).geometric(0.01, 3000)


def _by_brute_force(sizes: list[int], capacity: int, max_items: int) -> list[list[int]]:
    """Best-fit decreasing by looking at every open row, the most recently changed of equals first."""
    rows: list[list[int]] = []
    changed: list[int] = []
    for clock, size in enumerate(sorted(sizes, reverse=True)):
        fitting = [r for r in range(len(rows)) if capacity - sum(rows[r]) >= size and len(rows[r]) < max_items]
        if fitting:
            best = min(fitting, key=lambda r: (capacity - sum(rows[r]), -changed[r]))
        else:
            best = len(rows)
            rows.append([])
            changed.append(0)
        rows[best].append(size)
        changed[best] = clock
    return rows


@pytest.mark.parametrize("seq_len", [8, 61, 128, 512])
@pytest.mark.parametrize("max_segments", [1, 3, 16])
def test_every_token_is_kept_once_and_in_order(seq_len: int, max_segments: int) -> None:
    layout = packing.pack(LENGTHS, seq_len, max_segments)
    seen = [np.zeros(length, int) for length in LENGTHS]
    for document, start, length in zip(layout.documents, layout.starts, layout.lengths, strict=True):
        seen[document][start : start + length] += 1
    assert all((counts == 1).all() for counts in seen)


@pytest.mark.parametrize("seq_len", [8, 61, 512])
def test_only_documents_longer_than_a_row_are_cut_and_then_fill_their_rows(seq_len: int) -> None:
    layout = packing.pack(LENGTHS, seq_len, 16)
    pieces = np.bincount(layout.documents)
    assert (pieces == -(-LENGTHS // (seq_len - 2))).all()
    for document in np.flatnonzero(pieces > 1):
        lengths = sorted(layout.lengths[layout.documents == document], reverse=True)
        assert set(lengths[:-1]) == {seq_len - 2}


@pytest.mark.parametrize("max_segments", [1, 2, 5, 16])
def test_rows_respect_capacity_and_the_limit_on_segments(max_segments: int) -> None:
    layout = packing.pack(LENGTHS, 128, max_segments)
    segments = np.diff(layout.row_bounds)
    used = np.add.reduceat(layout.lengths + 2, layout.row_bounds[:-1])
    assert layout.row_bounds[0] == 0 and layout.row_bounds[-1] == len(layout.lengths)
    assert segments.min() >= 1 and segments.max() <= max_segments
    assert used.max() <= 128
    assert layout.num_slots == used.sum()
    if max_segments == 1:
        assert layout.num_rows == len(layout.lengths)


@pytest.mark.parametrize("seed", range(12))
def test_same_rows_as_a_search_over_all_open_rows(seed: int) -> None:
    random = np.random.default_rng(seed)
    capacity, max_items = int(random.integers(5, 60)), int(random.integers(1, 7))
    sizes = random.integers(1, capacity + 1, 300)
    rows, placed = packing.best_fit(sizes, capacity, max_items)
    expected = _by_brute_force(sizes.tolist(), capacity, max_items)
    found = [[int(sizes[item]) for item in placed if rows[item] == row] for row in range(rows.max() + 1)]
    assert found == expected


def test_a_hand_made_case() -> None:
    # Row of 10. Largest first: 7 opens A, 6 opens B, 4 fits B exactly, 3 fits A exactly, 2 opens C.
    rows, placed = packing.best_fit(np.array([3, 7, 2, 6, 4]), 10, 8)
    assert placed.tolist() == [1, 3, 4, 0, 2]
    assert rows.tolist() == [0, 0, 2, 1, 1]


def test_fills_rows_to_97_percent_for_article_lengths() -> None:
    lengths = np.random.default_rng(1).lognormal(5.5, 1.0, 20000).astype(int) + 1
    for seq_len in (128, 512):
        layout = packing.pack(lengths, seq_len, 16)
        assert layout.num_slots / (layout.num_rows * seq_len) > 0.97


def test_no_documents_make_no_rows() -> None:
    assert packing.pack(np.array([], int), 128, 16).num_rows == 0
