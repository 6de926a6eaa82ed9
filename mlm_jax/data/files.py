"""The kinds of files that the `files:` source reads, by the suffixes of their names, and the reader of each."""

import logging
from collections.abc import Callable, Iterator

from mlm_jax.data import record_files, text_files

_log = logging.getLogger(__name__)

READERS: dict[str, Callable[[str, str, str], Iterator[str]]] = {
    ".txt": lambda path, field, rule: text_files.read_txt(path, rule),
    ".jsonl": lambda path, field, rule: text_files.read_jsonl(path, field),
    ".parquet": lambda path, field, rule: text_files.read_parquet(path, field),
    ".csv": lambda path, field, rule: record_files.read_csv(path, field),
    ".tsv": lambda path, field, rule: record_files.read_tsv(path, field),
    ".fasta": lambda path, field, rule: record_files.read_fasta(path),
    ".smi": lambda path, field, rule: record_files.read_smiles(path),
}
WITH_FIELD = (".jsonl", ".parquet", ".csv", ".tsv")


def kind_of(path: str, form: str) -> str:
    """The key in `READERS` for a file."""
    return f".{form}" if form else text_files.kind(path)


def read_documents(paths: tuple[str, ...], field: str, rule: str, form: str) -> Iterator[str]:
    """The documents of all files in turn, blank ones left out.

    Args:
        paths: each of a kind in `READERS`, or of any where `form` names one.
        field: the text's key in .jsonl records, its column in tables.
        rule: what a document is in a .txt file, one of `text_files.DOCUMENT_RULES`.
        form: the kind of all of them, as "txt"; empty where their names say it.

    Raises:
        UserError: content that is no UTF-8 text or has no such field, with file and line.
        MachineError: a file that is damaged or cannot be read.
    """
    for path in paths:
        count = 0
        for text in READERS[kind_of(path, form)](path, field, rule):
            if text and not text.isspace():
                count += 1
                yield text
        if not count:
            _log.warning("%s holds no text", path)
