"""Text sources named by a URI string, each a stream of documents in an order that never changes.

The first stage of `prepare`; nothing here knows about tokens.
"""

import ast
import dataclasses
import difflib
import functools
import glob
import os
import pathlib
import re
import sysconfig
import urllib.parse
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mlm_jax.data import files, images, pairs, text_files
from mlm_jax.data.images import Images
from mlm_jax.errors import MachineError, UserError, install

MOST_PARTS = 1024  # of a source of files
_TFDS_PARTS = 64
_TFDS_ROWS = 256  # read together
_MIN_DOCSTRING_CHARS = 40  # a shorter docstring is a label, not prose
_FOLDERS_WITHOUT_PROSE = frozenset(
    ("__pycache__", "dist-packages", "idle_test", "idlelib", "lib-dynload", "site-packages", "test", "tests")
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A stream of documents that can be opened any number of times, in any process (it pickles).

    Attributes:
        uri: as the user wrote it.
        documents: gives a fresh iterator over the non-blank documents, always in the same order, in bounded memory. It
            raises UserError for unusable content, with file and line, and MachineError for damaged files.
        size_bytes: estimated bytes of uncompressed input, for progress and sampling only; None where it is unknown.
        description: a few words for logs.
        parts: the same documents in pieces, in order, that can be read apart; empty where there is one only.
        images: where the images are that documents name (see `mlm_jax.data.images`); None where they name none.
    """

    uri: str
    documents: Callable[[], Iterator[str]]
    size_bytes: int | None
    description: str
    parts: tuple[Callable[[], Iterator[str]], ...] = ()
    images: Images | None = None

    @property
    def pieces(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """`parts`, of which there is at least one here."""
        return self.parts or (self.documents,)


def in_parts(uri: str, parts: tuple[Callable[[], Iterator[str]], ...], size_bytes: int | None, description: str) -> Source:
    """A source that reads its parts one after another."""
    return Source(uri, functools.partial(_chained, parts), size_bytes, description, parts)


def _chained(parts: Sequence[Callable[[], Iterator[str]]]) -> Iterator[str]:
    return (text for part in parts for text in part())


def _portions(count: int) -> list[slice]:
    """Cuts so many files into MOST_PARTS runs at most, as a part leaves files of its own in a preparation."""
    step = -(-count // MOST_PARTS)
    return [slice(start, start + step) for start in range(0, count, step)]


def changed(uri: str, building: pathlib.Path) -> UserError:
    """What to raise when a later pass over a source does not read what an earlier one did.

    Args:
        building: the folder for unfinished work of the corpus.
    """
    return UserError(
        f"{uri}: the documents have changed since {building.parent} was begun; delete that directory and prepare it again,"
        " or bring the documents back as they were"
    )


def open_source(uri: str) -> Source:
    """Opens a source and reads its first document, so that most mistakes show before any work is done.

    Args:
        uri: `builtin:python_docs`; `files:GLOB?field=text&documents=file|blank_line|line&format=txt`;
            `tfds:NAME/CONFIG:VERSION#SPLIT?field=text&data_dir=…`;
            `hf:NAME#SPLIT?field=text&config=…&revision=…`; `pairs:GLOB?columns=1,2` (tab-separated) or
            `pairs:GLOB?with=GLOB` (two files, line by line); `images:GLOB?field=text&image=image&tar=GLOB`, and `tfds:` with
            `image=`: texts with an image each.

    Raises:
        UserError: an unknown scheme or option, a glob that matches nothing, a missing field, no text at all.
        MachineError: a file that cannot be read as far as its first document.
    """
    scheme, separator, body = uri.partition(":")
    if not separator or scheme not in _SCHEMES:
        hint = f"; for files write 'files:{uri}'" if os.path.exists(uri) or glob.has_magic(uri) else ""
        raise UserError(f"source {uri!r} begins with none of {', '.join(f'{name}:' for name in _SCHEMES)}{hint}")
    source = _SCHEMES[scheme](uri, body)
    if next(source.documents(), None) is None:
        raise UserError(f"{uri}: no text in {source.description}")
    return source


def open_records(uri: str) -> Iterator[Mapping[str, object]]:
    """All fields of each example of a `tfds:` or `hf:` source, which takes the options of `open_source` but for the field.

    Raises:
        UserError: another scheme, an unknown option, or a data set that cannot be had.
    """
    scheme, _, body = uri.partition(":")
    if scheme == "tfds":
        name, split, options = _split_dataset(uri, body, ("data_dir",))
        return _tfds_records(uri, name, split, options.get("data_dir"))
    if scheme == "hf":
        name, split, options = _split_dataset(uri, body, ("config", "revision"))
        return _hf_records(uri, name, split, options)
    raise UserError(f"source {uri!r} has no records with named fields; tfds: and hf: have")


def _split_options(uri: str, body: str, allowed: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Takes `?name=value&…` off the end; a `?` that is not followed by that shape belongs to a glob."""
    head, _, query = body.rpartition("?")
    if not head or not re.match(r"\w+=", query):
        return body, {}
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in allowed:
            nearest = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise UserError(f"{uri}: no option {name!r} here, there are {', '.join(allowed)}{hint}")
    return head, options


def _open_builtin(uri: str, body: str) -> Source:
    if body != "python_docs":
        raise UserError(f"{uri}: the only built-in source is builtin:python_docs")
    folder = sysconfig.get_path("stdlib")
    return Source(uri, functools.partial(_python_docs, folder), None, f"the help topics and docstrings of {folder}")


def _python_docs(folder: str) -> Iterator[str]:
    """The language reference that `help()` prints, then every docstring of the library, by path and line."""
    from pydoc_data.topics import topics  # half a megabyte of text that only this source reads

    for name in sorted(topics):
        yield topics[name].strip()
    modules = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if name not in _FOLDERS_WITHOUT_PROSE and not name.startswith("config-")
        )
        for name in sorted(names):
            if name.endswith(".py"):
                modules += 1
                yield from _docstrings(os.path.join(parent, name))
    if not modules:
        raise MachineError(f"this Python has no library sources in {folder}; use another interpreter or another source")


def _docstrings(path: str) -> Iterator[str]:
    """A module's docstrings, by parsing it: to import the whole library would run code, and fail on some machines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's literals are not this program's concern
        try:
            tree = ast.parse(pathlib.Path(path).read_bytes())
        except (SyntaxError, OSError) as error:
            raise MachineError(f"{path}, a part of this Python, cannot be read: {error}") from error
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        text = (ast.get_docstring(node) or "").strip()
        if len(text) >= _MIN_DOCSTRING_CHARS:
            yield text


def _matched(uri: str, pattern: str) -> tuple[str, ...]:
    paths = tuple(text_files.expand(pattern))
    if not paths:
        where = "" if os.path.isabs(pattern) or "://" in pattern else f" (looked from {os.getcwd()})"
        raise UserError(f"{uri}: no file matches {pattern}{where}")
    return paths


def _open_files(uri: str, body: str) -> Source:
    pattern, options = _split_options(uri, body, ("field", "documents", "format"))
    paths = _matched(uri, pattern)
    form = options.get("format", "")
    known = ", ".join(files.READERS)
    if form and f".{form}" not in files.READERS:
        raise UserError(f"{uri}: format={form} is none of {known.replace('.', '')}")
    kinds = {files.kind_of(path, form) for path in paths}
    for path in paths:
        if files.kind_of(path, form) not in files.READERS:
            raise UserError(
                f"{uri}: {path} is none of {known} (each also .gz); narrow the glob, or say what it is, as in ?format=txt"
            )
    if "documents" in options and ".txt" not in kinds:
        raise UserError(f"{uri}: documents= is for .txt files, and none matches; elsewhere a record is a document")
    if "field" in options and not kinds & {*files.WITH_FIELD}:
        raise UserError(f"{uri}: field= is for {', '.join(files.WITH_FIELD)} files, and none matches")
    # A .txt file is mostly one work (a book, an article). To cut it at blank lines would hide its paragraphs from each
    # other in training, and nothing would show it, while a file too large for one document ends in a message.
    rule = options.get("documents", "file")
    if rule not in text_files.DOCUMENT_RULES:
        raise UserError(f"{uri}: documents={rule} is none of {', '.join(text_files.DOCUMENT_RULES)}")
    field = options.get("field", "text")
    parts = tuple(
        functools.partial(files.read_documents, paths[portion], field, rule, form) for portion in _portions(len(paths))
    )
    size = sum(text_files.uncompressed_bytes(path) for path in paths)
    return in_parts(uri, parts, size, f"{len(paths)} file{'s' * (len(paths) > 1)} ({pattern})")


def _split_dataset(uri: str, body: str, allowed: Sequence[str]) -> tuple[str, str, dict[str, str]]:
    head, options = _split_options(uri, body, allowed)
    name, _, split = head.partition("#")
    if not name or not split:
        raise UserError(f"{uri}: a dataset needs a name and a split, as in {uri.partition(':')[0]}:NAME#train")
    return name, split, options


def _records_text(records: Iterator[Mapping[str, object]], field: str, uri: str) -> Iterator[str]:
    for number, record in enumerate(records):
        text = text_files.text_of(record, field, f"{uri}, example {number}")
        if text and not text.isspace():
            yield text


def _open_tfds(uri: str, body: str) -> Source:
    name, split, options = _split_dataset(uri, body, ("field", "image", "data_dir"))
    field = options.pop("field", "text")
    description = f"split {split} of TFDS {name}"
    if "image" in options:
        found = _TfdsImages(uri, name, split, options["image"], options.get("data_dir"))
        return Source(uri, functools.partial(found.documents, field.split(",")), None, description, images=found)
    documents = functools.partial(_tfds_documents, uri, name, split, field, options.get("data_dir"))
    parts = tuple(functools.partial(documents, part, _TFDS_PARTS) for part in range(_TFDS_PARTS))
    return Source(uri, documents, None, description, parts)


def _tfds_documents(
    uri: str, name: str, split: str, field: str, data_dir: str | None, part: int = 0, parts: int = 1
) -> Iterator[str]:
    where = f"{uri}, part {part + 1} of {parts}" if parts > 1 else uri
    return _records_text(_tfds_records(uri, name, split, data_dir, part, parts), field, where)


def _tfds_source(uri: str, name: str, split: str, data_dir: str | None, undecoded: str = "") -> Any:
    """The examples by their numbers; `undecoded` names an image that stays the content of its file."""
    import tensorflow_datasets as tfds  # seconds that other sources need not pay

    refusals = (tfds.core.DatasetNotFoundError, ValueError, AssertionError, NotImplementedError, ImportError)
    try:
        found = tfds.data_source(name, split=split, data_dir=data_dir)
    except refusals as error:
        reason = str(error).partition("\n")[0]  # a list of every dataset may follow
        raise UserError(f"{uri}: TFDS cannot serve this: {reason}") from error
    except OSError as error:
        raise MachineError(f"{uri}: {error}") from error
    if not undecoded:
        return found
    features = found.dataset_info.features
    if undecoded not in features or not isinstance(features[undecoded], tfds.features.Image):
        names = ", ".join(map(repr, features))
        raise UserError(f"{uri}: no image {undecoded!r}; there are {names} (?image=NAME chooses)")
    return tfds.data_source(name, split=split, data_dir=data_dir, decoders={undecoded: tfds.decode.SkipDecoding()})


def _tfds_records(
    uri: str, name: str, split: str, data_dir: str | None, part: int = 0, parts: int = 1, undecoded: str = ""
) -> Iterator[Mapping[str, object]]:
    rows = _tfds_source(uri, name, split, data_dir, undecoded)
    begin, end = (len(rows) * bound // parts for bound in (part, part + 1))
    batches = (range(start, min(start + _TFDS_ROWS, end)) for start in range(begin, end, _TFDS_ROWS))
    yield from (record for batch in batches for record in rows.__getitems__(list(batch)))


@dataclasses.dataclass(frozen=True)
class _TfdsImages:
    """The images of a TFDS dataset, whose names are the numbers of their examples in the split."""

    uri: str
    dataset: str
    split: str
    field: str
    data_dir: str | None

    def documents(self, fields: Sequence[str]) -> Iterator[str]:
        records = _tfds_records(self.uri, self.dataset, self.split, self.data_dir, undecoded=self.field)
        for number, record in enumerate(records):
            for text in images.texts_of(record, fields, self.place(str(number))):
                yield images.join(text, str(number))

    def read(self, name: str) -> bytes:
        return _tfds_source_once(self.uri, self.dataset, self.split, self.data_dir, self.field)[int(name)][self.field]

    def place(self, name: str) -> str:
        return f"{self.uri}, example {name}"


_tfds_source_once = functools.cache(_tfds_source)  # in a process


def _open_images(uri: str, body: str) -> Source:
    pattern, options = _split_options(uri, body, ("field", "image", "tar"))
    paths = _matched(uri, pattern)
    folder = images.Folder(images.common_folder(paths))
    found = images.Tars(_matched(uri, options["tar"])) if "tar" in options else folder
    fields = options.get("field", "text").split(",")
    documents = functools.partial(images.read_documents, paths, fields, options.get("image", "image"), found)
    size = sum(text_files.uncompressed_bytes(path) for path in paths)
    description = f"texts with images from {len(paths)} file{'s' * (len(paths) > 1)} ({pattern})"
    return Source(uri, documents, size, description, images=found)


def _open_hf(uri: str, body: str) -> Source:
    name, split, options = _split_dataset(uri, body, ("field", "config", "revision"))
    field = options.pop("field", "text")
    documents = functools.partial(_hf_documents, uri, name, split, field, options)
    return Source(uri, documents, None, f"split {split} of Hugging Face's {name}")


def _hf_documents(uri: str, name: str, split: str, field: str, options: Mapping[str, str]) -> Iterator[str]:
    return _records_text(_hf_records(uri, name, split, options), field, uri)


def _hf_records(uri: str, name: str, split: str, options: Mapping[str, str]) -> Iterator[Mapping[str, object]]:
    try:
        from datasets import load_dataset  # an optional extra
    except ImportError:
        raise UserError(f"{uri}: this source needs the extra 'hf': {install('hf')}") from None
    try:
        rows = load_dataset(name, options.get("config"), split=split, revision=options.get("revision"), streaming=True)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{uri}: {error}") from error
    except OSError as error:
        raise MachineError(f"{uri}: {error}") from error
    yield from rows


def _open_pairs(uri: str, body: str) -> Source:
    pattern, options = _split_options(uri, body, ("columns", "with"))
    paths = _matched(uri, pattern)
    if "with" in options and "columns" in options:
        raise UserError(f"{uri}: columns= are of one file, and with= names a second one: leave one of them out")
    if "with" in options:
        others = _matched(uri, options["with"])
        if len(others) != len(paths):
            raise UserError(f"{uri}: {pattern} matches {len(paths)} file(s), and with={options['with']} {len(others)}")
        parts = tuple(functools.partial(pairs.read_aligned, paths[p], others[p]) for p in _portions(len(paths)))
        paths += others
    else:
        columns = options.get("columns", "1,2")
        chosen = re.fullmatch(r"([1-9]\d*),([1-9]\d*)", columns)
        if not chosen or chosen[1] == chosen[2]:
            raise UserError(f"{uri}: columns={columns} are not two different numbers from 1 on, as in ?columns=1,2")
        numbers = int(chosen[1]), int(chosen[2])
        parts = tuple(functools.partial(pairs.read_columns, paths[p], numbers) for p in _portions(len(paths)))
    size = sum(text_files.uncompressed_bytes(path) for path in paths)
    return in_parts(uri, parts, size, f"pairs from {len(paths)} file{'s' * (len(paths) > 1)} ({pattern})")


_SCHEMES: dict[str, Callable[[str, str], Source]] = {
    "builtin": _open_builtin,
    "files": _open_files,
    "tfds": _open_tfds,
    "hf": _open_hf,
    "pairs": _open_pairs,
    "images": _open_images,
}
