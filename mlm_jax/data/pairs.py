"""Pairs of parallel sentences: a document of two parts, from its text to its tokens and its place in a row.

A pair travels through preparation as one document with a mark in it, and lies in a row as `[CLS] one [SEP] [CLS] other
[SEP]`. The class token within the segment is what tells the parts apart; there is none in any other document.
Source: translation language modelling, XLM section 3.3 (Conneau and Lample, 2019).
"""

import itertools
from collections.abc import Iterator

import numpy as np

from mlm_jax import segments
from mlm_jax.data import text_files
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import UserError

MARK = "\ufdd0"  # between the parts; Unicode keeps it for a program's own use, so that no text has it


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a document, int32 [n]; where it has parts, they are ended and begun as segments are."""
    first, *others = (tokenizer.encode(part) for part in text.split(MARK))
    between = np.array([tokenizer.sep_id, tokenizer.cls_id], np.int32)
    return np.concatenate([first, *(ids for other in others for ids in (between, other))]) if others else first


def mark_parts(tokens: np.ndarray, segment_ids: np.ndarray) -> np.ndarray:
    """Segment ids that tell the parts of each segment: int32 [rows, L].

    Args:
        tokens: [rows, L], every row beginning with the class token of its first segment.
        segment_ids: [rows, L], 1, 2, … and 0 for padding.
    """
    begins = (tokens == tokens[:, :1]) & (segment_ids > 0)
    if begins.sum() == segment_ids.max(axis=1).sum():  # one a segment, so there are no pairs
        return segment_ids
    begun = np.cumsum(begins, axis=1, dtype=np.int32)
    first_of_segment = np.diff(segment_ids, axis=1, prepend=0) > 0
    before = np.maximum.accumulate(np.where(first_of_segment, begun, 0), axis=1)
    return np.where(segment_ids > 0, segment_ids + segments.PART * (begun - before), 0).astype(np.int32)


def read_columns(paths: tuple[str, ...], columns: tuple[int, int]) -> Iterator[str]:
    """Pairs from two columns of files of tab-separated lines; those with an empty side are left out.

    Raises:
        UserError: a line has fewer columns.
    """
    for path in paths:
        for number, line in text_files.lines(path):
            if not line or line.isspace():
                continue
            cells = line.split("\t")
            if len(cells) < max(columns):
                raise UserError(
                    f"{path}, line {number}: {len(cells)} column(s) between tabs, and columns={columns[0]},{columns[1]} are "
                    "wanted (?columns=1,2 are the first two)"
                )
            yield from _pair(*(cells[column - 1] for column in columns))


def read_aligned(paths: tuple[str, ...], others: tuple[str, ...]) -> Iterator[str]:
    """Pairs from files of the same number of lines, taken two by two; those with an empty side are left out.

    Raises:
        UserError: two files have different numbers of lines.
    """
    for path, other in zip(paths, others, strict=True):
        for ours, theirs in itertools.zip_longest(text_files.lines(path), text_files.lines(other)):
            if ours is None or theirs is None:
                counts = [sum(1 for _ in text_files.lines(file)) for file in (path, other)]
                raise UserError(
                    f"{path} has {counts[0]} lines and {other} {counts[1]}: line n of one must be the translation of line n "
                    "of the other"
                )
            yield from _pair(ours[1], theirs[1])


def _pair(one: str, other: str) -> Iterator[str]:
    if one.strip() and other.strip():
        yield f"{one.strip()}{MARK}{other.strip()}"
