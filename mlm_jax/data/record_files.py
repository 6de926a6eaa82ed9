"""Documents out of files of records that are not prose: tables, FASTA, SMILES.

Readers for the `files:` source beside those of `data/text_files.py`, by the same contract.
"""

import csv
from collections.abc import Iterator, Mapping
from typing import Any

from mlm_jax.data.text_files import MAX_DOCUMENT_BYTES, json_objects, kind, lines
from mlm_jax.errors import UserError


def read_csv(path: str, field: str) -> Iterator[str]:
    """A column of a comma-separated file with quotes; see `_column`."""
    yield from _column(path, _csv_rows(path), field)


def read_tsv(path: str, field: str) -> Iterator[str]:
    """A column of a tab-separated file, in which quotes are text; see `_column`."""
    yield from _column(path, _tsv_rows(path), field)


def records(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each record of a .jsonl, .csv or .tsv file, whose first row names the fields, and where it is, for messages.

    Raises:
        UserError: the file is of another kind, or a row has fewer columns than the first.
    """
    if kind(path) == ".jsonl":
        for where, _, record in json_objects(path):
            yield where, record
        return
    if kind(path) not in (".csv", ".tsv"):
        raise UserError(f"{path} is none of .jsonl, .csv, .tsv (each also .gz)")
    rows = _csv_rows(path) if kind(path) == ".csv" else _tsv_rows(path)
    head = next(rows, [])
    for number, row in enumerate(rows, start=1):
        if row and len(row) < len(head):
            raise UserError(f"{path}, record {number}: {len(row)} column(s), and the first line names {len(head)}")
        if row:
            yield f"{path}, record {number}", dict(zip(head, row, strict=False))


def _csv_rows(path: str) -> Iterator[list[str]]:
    rows = csv.reader(line + "\n" for _, line in lines(path))
    try:
        yield from rows
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}; is this a comma-separated file?") from None


def _tsv_rows(path: str) -> Iterator[list[str]]:
    return (line.split("\t") for _, line in lines(path) if line)


def _column(path: str, rows: Iterator[list[str]], field: str) -> Iterator[str]:
    """The column that the first row calls so, or, where `field` is a number from 1 on, that one of a file without names."""
    if field.isdigit() and int(field) > 0:
        column = int(field) - 1
    else:
        head = next(rows, [])
        if field not in head:
            names = ", ".join(map(repr, head))
            raise UserError(
                f"{path}: no column {field!r}; there are {names} (?field=NAME chooses, ?field=1 the first of a file without "
                "a line of names)"
            )
        column = head.index(field)
    for number, row in enumerate(rows, start=1):
        if row and column >= len(row):
            raise UserError(f"{path}, record {number}: {len(row)} column(s), and field={field} is number {column + 1}")
        yield row[column].strip() if row else ""


def read_fasta(path: str) -> Iterator[str]:
    """The sequences of a FASTA file, each a document in one piece; what follows `>` is left out.

    Raises:
        UserError: a sequence without a `>` line before it.
    """
    parts: list[str] = []
    begun, size = False, 0
    for number, line in lines(path):
        if line.startswith(">"):
            yield "".join(parts)
            parts, begun, size = [], True, 0
        elif line.strip() and not begun:
            raise UserError(f"{path}, line {number}: a sequence before the first '>' line, so this is no FASTA file")
        else:
            parts.append("".join(line.split()))
            size += len(parts[-1])
            if size > MAX_DOCUMENT_BYTES:
                raise UserError(
                    f"{path}, line {number}: a sequence of more than {MAX_DOCUMENT_BYTES / 2**20:g} million letters"
                )
    yield "".join(parts)


def read_smiles(path: str) -> Iterator[str]:
    """The molecules of a .smi file: the first word of each line, before a name."""
    for _, line in lines(path):
        yield line.split(maxsplit=1)[0] if line.strip() else ""
