"""Which piece of which document lies in which row: best-fit packing on lengths alone.

`data/shards.py` cuts and copies the tokens as this module says; nothing here touches a token.
"""

import dataclasses

import numpy as np

SPECIALS_PER_SEGMENT = 2  # a segment is [CLS] piece [SEP]


@dataclasses.dataclass(frozen=True)
class Packing:
    """The layout of a set of documents in rows. Pieces are listed row by row, in their order within the row.

    Attributes:
        documents: int64 [pieces], the document that a piece is cut from.
        starts: int64 [pieces], the piece's first token within its document.
        lengths: int64 [pieces], its tokens, specials not counted.
        row_bounds: int64 [rows + 1]; row r holds the pieces row_bounds[r] … row_bounds[r + 1] - 1.
    """

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    row_bounds: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.row_bounds) - 1

    @property
    def num_slots(self) -> int:
        """Positions that are not padding, specials included."""
        return int(self.lengths.sum()) + SPECIALS_PER_SEGMENT * len(self.lengths)


def pack(document_lengths: np.ndarray, seq_len: int, max_segments: int) -> Packing:
    """Lays documents out in rows of `seq_len` positions.

    A document that fits into a row stays whole. A longer one is cut into pieces that fill a row each, and what is left
    of it packs like a short document. The result depends on the arguments' values and order only.

    Args:
        document_lengths: [documents] tokens per document, each at least 1, specials not counted.
        seq_len: positions per row; above SPECIALS_PER_SEGMENT.
        max_segments: pieces that may share a row.
    """
    documents, starts, lengths = cut(document_lengths, seq_len - SPECIALS_PER_SEGMENT)
    rows, placed = best_fit(lengths + SPECIALS_PER_SEGMENT, seq_len, max_segments)
    order = placed[np.argsort(rows[placed], kind="stable")]
    row_bounds = np.searchsorted(rows[order], np.arange(rows.max(initial=-1) + 2))
    return Packing(documents[order], starts[order], lengths[order], row_bounds)


def cut(document_lengths: np.ndarray, piece_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts every document from its beginning into pieces of `piece_tokens`; its last piece may be shorter.

    Returns:
        Per piece, in the order of documents and within each: its document, its first token there, its length.
    """
    lengths = np.asarray(document_lengths, np.int64)
    pieces = -(-lengths // piece_tokens)
    documents = np.repeat(np.arange(len(lengths)), pieces)
    first_pieces = np.cumsum(pieces) - pieces
    starts = (np.arange(len(documents)) - first_pieces[documents]) * piece_tokens
    return documents, starts, np.minimum(piece_tokens, lengths[documents] - starts)


def best_fit(sizes: np.ndarray, capacity: int, max_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: each item, largest first, goes into the open row that it leaves with the least room.

    The open rows are kept by the room they have, and one big integer has bit r set where some row has room r, so the
    search for the fullest row that still takes an item is a shift and a lowest set bit, whatever the number of rows.

    Args:
        sizes: [items], each in 1 … capacity.
        capacity: the size of a row.
        max_items: items after which a row is closed.

    Returns:
        int64 [items], the row of each item, numbered from 0 without gaps; and int64 [items], the items in the order in
        which they were placed.

    Source: best-fit decreasing bin packing, D. S. Johnson, "Near-optimal bin packing algorithms", 1973. On whole
        documents: Ding et al., "Fewer truncations improve language modeling", 2024.
    """
    sizes = np.asarray(sizes, np.int64)
    placed = np.argsort(-sizes, kind="stable")
    smallest = int(sizes[placed[-1]]) if len(placed) else 0
    rows = [0] * len(sizes)
    counts: list[int] = []
    rows_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r: rows_by_room[r] is not empty
    for item, size in zip(placed.tolist(), sizes[placed].tolist(), strict=True):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(counts)
            counts.append(0)
        rows[item] = row
        counts[row] += 1
        room -= size
        if room >= smallest and counts[row] < max_items:
            rooms |= 1 << room
            rows_by_room[room].append(row)
    return np.array(rows, np.int64), placed
