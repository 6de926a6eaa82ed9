"""Documents out of .txt, .jsonl and .parquet files, plain or gzipped, in bounded memory; errors name the line.

Readers behind the `files:` source of `data/sources.py`, which `data/files.py` chooses.
"""

import contextlib
import functools
import glob
import gzip
import itertools
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, cast

from etils import epath

from mlm_jax.errors import MachineError, UserError

# One document is held in memory whole, here and while it is tokenised, so its size bounds the memory of `prepare`.
MAX_DOCUMENT_BYTES = 64 * 2**20

_UTF8_MARK = b"\xef\xbb\xbf"  # byte-order mark
_PARQUET_ROWS = 256  # taken from a file together


def expand(pattern: str) -> list[str]:
    """The files that a glob matches, sorted by name. `**` crosses local folders; buckets (`gs://…`) take `*` only."""
    if "://" not in pattern:
        return sorted(path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path))
    root = "/".join(itertools.takewhile(lambda part: not glob.has_magic(part), pattern.split("/")))
    try:
        if root == pattern:
            return [pattern] if epath.Path(pattern).exists() else []
        return sorted(os.fspath(path) for path in epath.Path(root).glob(pattern[len(root) + 1 :]))
    except KeyError:
        scheme = pattern.partition("://")[0]
        raise UserError(f"{pattern}: no {scheme}:// here; there are local paths, gs://, s3:// and az://") from None
    except (ImportError, NotImplementedError) as error:  # a bucket's client is not installed; `**` on a bucket
        raise UserError(f"{pattern}: {error}") from None


def kind(path: str) -> str:
    """The suffix that says what is in a file: the last one, or the one before .gz."""
    return os.path.splitext(path.removesuffix(".gz"))[1]


def uncompressed_bytes(path: str) -> int:
    """An estimate: a file's size; for gzip what its last bytes say, which is modulo 4 GiB and of one member only."""
    with _opened_raw(path) as file:
        stored = file.seek(0, os.SEEK_END)
        if not path.endswith(".gz") or stored < 4:
            return stored
        file.seek(-4, os.SEEK_END)
        return max(stored, int.from_bytes(file.read(4), "little"))


def text_of(record: Mapping[str, Any], field: str, where: str, option: str = "field") -> str:
    """The text in a record; an absent value (null) is an empty document.

    Args:
        option: of the source, that names the field, for messages.
    """
    if field not in record:
        raise UserError(f"{where}: no field {field!r}; there are {', '.join(map(repr, record))} (?{option}=NAME chooses)")
    value = record[field]
    if isinstance(value, bytes):
        return _decode(value, where)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} holds {type(value).__name__}, not text (?{option}=NAME chooses another)")
    return value or ""


def _decode(raw: bytes, where: str, first_line: int | None = None) -> str:
    """Strict UTF-8 without NUL; where `first_line` is given, the message counts lines from it."""
    try:
        text, bad = raw.decode("utf-8"), raw.find(b"\0")
    except UnicodeDecodeError as error:
        nul = raw.find(b"\0")
        text, bad = "", error.start if nul < 0 else nul
    if bad < 0:
        return text
    line = "" if first_line is None else ", line " + str(first_line + raw.count(b"\n", 0, bad))
    what = "a NUL byte, so this is a binary file or UTF-16" if raw[bad] == 0 else f"byte 0x{raw[bad]:02x} is not UTF-8"
    raise UserError(f"{where}{line}: {what}; a source must be UTF-8 text (iconv -f CHARSET -t UTF-8 converts)")


@contextlib.contextmanager
def _opened_raw(path: str) -> Iterator[BinaryIO]:
    """The stored bytes; faults in reading them become the machine's."""
    try:
        with epath.Path(path).open("rb") as file:
            yield cast(BinaryIO, file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise MachineError(f"{path} is damaged or incomplete: {error}; fetch it again") from error
    except OSError as error:
        raise MachineError(f"{path} cannot be read: {error}") from error


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The file's content, decompressed where its name ends in .gz."""
    with _opened_raw(path) as file:
        if path.endswith(".gz"):
            with gzip.open(file, "rb") as content:
                yield cast(BinaryIO, content)
        else:
            yield file


def _too_large(path: str, line: int, fix: str) -> UserError:
    return UserError(f"{path}, line {line}: a document of more than {MAX_DOCUMENT_BYTES / 2**20:g} MiB; {fix}")


def lines(path: str) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends (LF or CRLF) and without the file's byte-order mark."""
    with opened(path) as file:
        for number, raw in enumerate(iter(functools.partial(file.readline, MAX_DOCUMENT_BYTES + 1), b""), start=1):
            if len(raw) > MAX_DOCUMENT_BYTES:
                raise _too_large(path, number, "is this a text file with line ends?")
            yield number, _decode(raw.removeprefix(_UTF8_MARK) if number == 1 else raw, path, number).rstrip("\r\n")


def _txt_by_file(path: str) -> Iterator[str]:
    with opened(path) as file:
        raw = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise _too_large(path, 1, "split the file's text by ?documents=blank_line or ?documents=line")
    yield _decode(raw.removeprefix(_UTF8_MARK), path, 1).replace("\r\n", "\n").replace("\r", "\n")


def _txt_by_line(path: str) -> Iterator[str]:
    for _, line in lines(path):
        yield line


def _txt_by_blank_line(path: str) -> Iterator[str]:
    block: list[str] = []
    chars = 0
    for number, line in lines(path):
        if line and not line.isspace():
            block.append(line)
            chars += len(line) + 1
            if chars > MAX_DOCUMENT_BYTES:
                raise _too_large(path, number, "there are too few blank lines; use ?documents=line")
        elif block:
            yield "\n".join(block)
            block, chars = [], 0
    yield "\n".join(block)


DOCUMENT_RULES: dict[str, Callable[[str], Iterator[str]]] = {
    "file": _txt_by_file,
    "blank_line": _txt_by_blank_line,
    "line": _txt_by_line,
}


def read_txt(path: str, rule: str) -> Iterator[str]:
    """The documents of a text file by one of `DOCUMENT_RULES`."""
    return DOCUMENT_RULES[rule](path)


def json_objects(path: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Of a file of JSON objects, one a line: where each is, for messages, its line, and the object."""
    for number, line in lines(path):
        if not line or line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: {type(record).__name__} instead of an object with named fields")
        yield where, line, record


def read_jsonl(path: str, field: str) -> Iterator[str]:
    """A field of a file of JSON objects, one a line."""
    for where, line, record in json_objects(path):
        text = text_of(record, field, where)
        if "\\u" in line:  # only an escape brings half a surrogate pair into a text, which then has no UTF-8 form
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{where}: field {field!r} is no valid text: {error}") from None
        yield text


def read_parquet(path: str, field: str) -> Iterator[str]:
    """A column of a Parquet file."""
    import pyarrow  # a fifth of a second that other sources need not pay
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        content = stack.enter_context(opened(path))
        if path.endswith(".gz"):  # Parquet is read from its end, and gzip seeks by reading all over again
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(content, unpacked, 2**20)
            content = cast(BinaryIO, unpacked)
        row = 0
        try:
            file = pyarrow.parquet.ParquetFile(content)
            if field not in file.schema_arrow.names:
                text_of(dict.fromkeys(file.schema_arrow.names), field, path)
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield text_of({field: value}, field, f"{path}, row {row}")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, after row {row}: {error}; a source must be UTF-8 text") from None
        except pyarrow.ArrowException as error:
            raise MachineError(f"{path} is damaged or not Parquet: {error}") from error
