"""Labelled records with named fields: tables, JSONL, Parquet, folders of texts, TFDS and Hugging Face's datasets.

What all tasks read their examples from. Each record comes with the place where it was found, for messages.
"""

import csv
import io
import os
from collections.abc import Iterator, Mapping
from typing import Any

from mlm_jax.config.conversion import nearest
from mlm_jax.data import text_files
from mlm_jax.data.sources import open_records
from mlm_jax.errors import MachineError, UserError

Record = Mapping[str, Any]


def paths_of(uri: str) -> list[str]:
    """The files that a path or a glob names, with or without `files:` before it; a folder is given back as it is.

    Raises:
        UserError: there are none.
    """
    pattern = uri.removeprefix("files:")
    if "://" not in pattern and os.path.isdir(pattern):
        return [pattern]
    paths = text_files.expand(pattern)
    if not paths:
        where = "" if os.path.isabs(pattern) or "://" in pattern else f" (looked from {os.getcwd()})"
        raise UserError(f"no file matches {pattern}{where}")
    return paths


def read_records(uri: str, columns: tuple[str, ...], *, labels: tuple[str, ...] = ()) -> Iterator[tuple[str, Record]]:
    """Each record of a source and where it is.

    Args:
        uri: a path or glob, a folder that has a folder of .txt files for each label, or tfds:NAME#SPLIT, hf:NAME#SPLIT.
        columns: the fields that are wanted. In tables, if all of them are numbers, the first line is a record, and fields
            are called "0", "1", …; else it names them.
        labels: of a folder, which of its folders are read; all when empty.

    Raises:
        UserError: no such file, a format that is not known, or content that is not of it, with file and line.
    """
    if uri.startswith(("tfds:", "hf:")):
        for number, found in enumerate(open_records(uri)):
            yield f"{uri}, example {number}", {name: _plain(value) for name, value in found.items()}
        return
    for path in paths_of(uri):
        if os.path.isdir(path):
            yield from _folder(path, labels)
            continue
        kind = text_files.kind(path)
        if kind in (".tsv", ".csv"):
            yield from _table(path, kind, has_header=not all(column.isdigit() for column in columns))
        elif kind in _READERS:
            yield from _READERS[kind](path)
        else:
            raise UserError(f"{path} is none of .tsv, .csv, {', '.join(_READERS)} (each also .gz), and no folder")


def field(record: Record, name: str, where: str, key: str) -> Any:
    """A record's field.

    Args:
        key: which of the config's fields names it, for the message.

    Raises:
        UserError: there is none of this name.
    """
    if name not in record:
        known = list(record)
        raise UserError(
            f"{where}: no column {name!r}; there are {', '.join(map(repr, known))}{nearest(name, known)} ({key} chooses)"
        )
    return record[name]


def text_field(record: Record, name: str, where: str, key: str) -> str:
    """A record's field that must be text."""
    value = field(record, name, where, key)
    if not isinstance(value, str):
        raise UserError(f"{where}: column {name!r} holds {type(value).__name__}, not text ({key} chooses another)")
    return value


def _table(path: str, kind: str, *, has_header: bool) -> Iterator[tuple[str, Record]]:
    # In GLUE's .tsv a quotation mark is a character like any other; in .csv it quotes.
    lines = (line + "\n" for _, line in text_files.lines(path))
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {"strict": True}
    reader = csv.reader(lines, **options)
    names: list[str] = []
    try:
        for row in reader:
            if not row:
                continue
            if not names:
                names = row if has_header else [str(index) for index in range(len(row))]
                repeated = sorted({name for name in names if names.count(name) > 1})
                if repeated:
                    raise UserError(f"{path}, line {reader.line_num}: the column {repeated[0]!r} is there twice")
                if has_header:
                    continue
            if len(row) != len(names):
                raise UserError(f"{path}, line {reader.line_num}: {len(row)} columns, and the first line has {len(names)}")
            yield f"{path}, line {reader.line_num}", dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None


def _jsonl(path: str) -> Iterator[tuple[str, Record]]:
    return ((where, record) for where, _, record in text_files.json_objects(path))


def _parquet(path: str) -> Iterator[tuple[str, Record]]:
    import pyarrow
    import pyarrow.parquet

    with text_files.opened(path) as file:
        content = io.BytesIO(file.read())
    try:
        rows = pyarrow.parquet.read_table(content).to_pylist()
    except pyarrow.ArrowException as error:
        raise MachineError(f"{path} is damaged or not Parquet: {error}") from error
    for number, record in enumerate(rows, start=1):
        yield f"{path}, row {number}", record


def _txt(path: str) -> Iterator[tuple[str, Record]]:
    """A text a line, without labels: for predictions."""
    for number, line in text_files.lines(path):
        if line and not line.isspace():
            yield f"{path}, line {number}", {"text": line}


_READERS = {".jsonl": _jsonl, ".parquet": _parquet, ".txt": _txt}


def _folder(path: str, labels: tuple[str, ...]) -> Iterator[tuple[str, Record]]:
    """A text a file, whose label is the name of the folder that it lies in."""
    found = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    if not found:
        raise UserError(f"{path} has no folders: a folder of texts has one for each label, with .txt files")
    missing = [label for label in labels if label not in found]
    if missing:
        raise UserError(f"{path} has no folder {missing[0]!r} for that label; there are {', '.join(found)}")
    for label in labels or found:
        files = text_files.expand(os.path.join(path, label, "*.txt"))
        if not files:
            raise UserError(f"{os.path.join(path, label)} has no .txt file; task.labels chooses which folders are read")
        for file in files:
            for text in text_files.DOCUMENT_RULES["file"](file):
                yield file, {"text": text, "label": label}


def _plain(value: Any) -> Any:
    """NumPy's scalars and bytes, as TFDS gives them, in Python's types."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value.tolist() if hasattr(value, "tolist") else value
