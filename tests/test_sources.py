"""Facts about text sources: what a document is, the order they come in, and what is said about unusable input."""

import codecs
import functools
import gzip
import importlib.util
import inspect
import json
import pathlib
import pickle
import pydoc_data.topics
import re
import sys
import sysconfig
import tracemalloc

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from mlm_jax.data import text_files
from mlm_jax.data.sources import open_source
from mlm_jax.errors import MachineError, UserError


def _documents(uri: str) -> list[str]:
    return list(open_source(uri).documents())


def _jsonl(*records: object) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _parquet(path: pathlib.Path, **columns: object) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- files ---


def test_files_come_in_the_order_of_their_names_and_blank_documents_not_at_all(folder):
    for name, text in (("b", "second"), ("c", " \r\n\t"), ("a10", "first"), ("d", "")):
        (folder / f"{name}.txt").write_text(text)
    assert _documents("files:*.txt") == ["first", "second"]


def test_a_double_star_crosses_folders(folder):
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "x.txt").write_text("found")
    assert _documents("files:**/*.txt") == ["found"]


class _Bucket(MemoryFileSystem):
    """Stands for a cloud's storage: the same client interface, kept in memory."""

    protocol = ("gs", "gcs")

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(re.sub("^gc?s://", "memory://", path))


def test_a_bucket_is_read_like_a_folder():
    for name in _Bucket.protocol:
        fsspec.register_implementation(name, _Bucket, clobber=True)
    folder = epath.Path("gs://bucket/folder")
    folder.mkdir(parents=True)
    (folder / "b.txt").write_text("two")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(_jsonl({"text": "one"})))
    assert _documents("files:gs://bucket/*/*") == ["one", "two"]
    assert _documents("files:gs://bucket/folder/b.txt") == ["two"]
    with pytest.raises(UserError, match=r"no file matches gs://bucket/folder/\*\.parquet$"):
        open_source("files:gs://bucket/folder/*.parquet")
    with pytest.raises(UserError, match="Recursive"):
        open_source("files:gs://bucket/**/*.txt")


RULES = {
    "file": ["one\ntwo\n\n \nthree\n"],
    "blank_line": ["one\ntwo", "three"],
    "line": ["one", "two", "three"],
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("compress", [False, True])
def test_txt_documents_do_not_depend_on_line_ends_mark_or_compression(folder, rule, newline, mark, compress):
    content = mark + "one\ntwo\n\n \nthree\n".replace("\n", newline).encode()
    (folder / "x.txt.gz").write_bytes(gzip.compress(content))
    (folder / "x.txt").write_bytes(content)
    assert _documents(f"files:x.txt{'.gz' if compress else ''}?documents={rule}") == RULES[rule]


def test_a_txt_file_is_one_document_unless_a_rule_is_named(folder):
    (folder / "x.txt").write_text("one\n\ntwo")
    assert _documents("files:x.txt") == ["one\n\ntwo"]


def test_a_question_mark_in_a_glob_is_no_option(folder):
    for name in ("part1", "part2", "part10"):
        (folder / f"{name}.jsonl").write_bytes(_jsonl({"body": name}))
    assert _documents("files:part?.jsonl?field=body") == ["part1", "part2"]
    with pytest.raises(UserError, match=r"no field 'text'; there are 'body'"):
        open_source("files:part?.jsonl")


@pytest.mark.parametrize("compress", [False, True])
def test_jsonl_yields_the_chosen_field_and_skips_null_and_blank_lines(folder, compress):
    content = _jsonl({"t": "é 中\u2028x"}, {"t": None}, {"t": "  "}) + b"\r\n" + b'{"t": "\\u00e9\\ud83d\\ude00"}'
    (folder / f"x.jsonl{'.gz' if compress else ''}").write_bytes(gzip.compress(content) if compress else content)
    assert _documents("files:x.jsonl*?field=t") == ["é 中\u2028x", "é😀"]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.string_view()])
@pytest.mark.parametrize("compress", [False, True])
def test_parquet_yields_the_chosen_column(folder, kind, compress):
    texts = [f"text {i} é" for i in range(600)]  # more than is read at once
    values = [text.encode() if kind == pyarrow.binary() else text for text in texts]
    _parquet(folder / "x.parquet", n=list(range(601)), t=pyarrow.array([*values, None], kind))
    if compress:
        (folder / "x.parquet.gz").write_bytes(gzip.compress((folder / "x.parquet").read_bytes()))
    assert _documents(f"files:x.parquet{'.gz' if compress else ''}?field=t") == texts


def test_a_dictionary_encoded_column_is_text(folder):
    _parquet(folder / "x.parquet", text=pyarrow.array(["a", "b", "a"]).dictionary_encode())
    assert _documents("files:x.parquet") == ["a", "b", "a"]


def test_kinds_mix_in_one_glob(folder):
    (folder / "a.txt").write_text("plain")
    (folder / "b.jsonl").write_bytes(_jsonl({"text": "lines"}))
    _parquet(folder / "c.parquet", text=["columns"])
    assert _documents("files:[abc].*") == ["plain", "lines", "columns"]


def test_the_estimated_size_is_that_of_the_uncompressed_content(folder):
    (folder / "a.txt").write_bytes(b"x" * 1000)
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"y" * 50_000))
    assert open_source("files:*.txt*").size_bytes == 51_000


def test_a_pickled_source_gives_the_same_documents_again_and_again(folder):
    (folder / "x.txt").write_text("one\ntwo")
    source = open_source("files:x.txt?documents=line")
    for opened in (source, pickle.loads(pickle.dumps(source))):
        assert [list(opened.documents()) for _ in range(2)] == [["one", "two"]] * 2


def test_memory_does_not_grow_with_a_file(folder):
    with gzip.open(folder / "x.jsonl.gz", "wb", compresslevel=1) as file:
        for index in range(20_000):
            file.write(_jsonl({"text": f"{index} " * 200}))
    documents = open_source("files:x.jsonl.gz").documents
    tracemalloc.start()
    read = sum(len(text) for text in documents())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read > 20_000_000
    assert peak < 1_000_000


# --- files: misuse ---

UNUSABLE = {
    "binary": ("x.txt", b"GIF89a\x01\x00\x80", "x.txt, line 1: a NUL byte"),
    "utf-16": ("x.txt", codecs.BOM_UTF16_LE + "a".encode("utf-16-le"), "x.txt, line 1: a NUL byte"),
    "latin-1": ("x.txt", b"one\ntwo\ncaf\xe9\n", "x.txt, line 3: byte 0xe9 is not UTF-8"),
    "latin-1 gz": ("x.txt.gz", gzip.compress(b"one\ncaf\xe9\n"), "x.txt.gz, line 2: byte 0xe9 is not UTF-8"),
    "latin-1 jsonl": ("x.jsonl", _jsonl({"text": "a"}) + b'{"text": "caf\xe9"}\n', "x.jsonl, line 2: byte 0xe9"),
    "not json": ("x.jsonl", _jsonl({"text": "a"}, {"text": "b"}) + b"{text: c}\n", "x.jsonl, line 3: not JSON"),
    "not an object": ("x.jsonl", b"[1, 2]\n", "x.jsonl, line 1: list instead of an object with named fields"),
    "no field": (
        "x.jsonl",
        _jsonl({"text": "a"}, {"txt": "b", "id": 1}),
        "line 2: no field 'text'; there are 'txt', 'id'",
    ),
    "not text": ("x.jsonl", _jsonl({"text": ["a"]}), "line 1: field 'text' holds list, not text"),
    "half a pair": ("x.jsonl", b'{"text": "a \\ud83d b"}\n', "line 1: field 'text' is no valid text"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_content_is_named_with_file_and_line(folder, case):
    name, content, message = UNUSABLE[case]
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        _documents("files:x.*")
    assert message in str(error.value)


def test_a_file_by_lines_names_the_line_that_is_not_utf8(folder):
    (folder / "x.txt").write_bytes(b"one\ntwo\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"x\.txt, line 3: byte 0xe9 is not UTF-8"):
        _documents("files:x.txt?documents=line")


def test_parquet_without_the_column_and_with_numbers(folder):
    _parquet(folder / "x.parquet", body=["a"], n=[1])
    with pytest.raises(UserError, match=r"x\.parquet: no field 'text'; there are 'body', 'n'"):
        open_source("files:x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet, row 1: field 'n' holds int, not text"):
        open_source("files:x.parquet?field=n")


def test_parquet_whose_text_is_not_utf8(folder):
    column = pyarrow.array([b"good", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    _parquet(folder / "x.parquet", text=column)
    with pytest.raises(UserError, match=r"x\.parquet.*not? .*UTF-8|x\.parquet.*utf-8"):
        _documents("files:x.parquet")


def test_a_column_of_a_table_by_its_name_or_number(folder):
    (folder / "x.csv").write_text('name,smiles\n"a, b",CCO\n"two\nlines", C=C \n,\n')
    (folder / "y.tsv.gz").write_bytes(gzip.compress(b'eins\t"one"\r\nzwei\ttwo\r\n'))
    assert _documents("files:x.csv?field=smiles") == ["CCO", "C=C"]
    assert _documents("files:x.csv?field=name") == ["a, b", "two\nlines"]
    assert _documents("files:y.tsv.gz?field=2") == ['"one"', "two"]


def test_a_fasta_record_is_a_document_without_its_header_and_line_ends(folder):
    (folder / "x.fasta").write_text(">sp|A|ONE first\nMAS\nVS*\n\n>empty\n>B\nGT R\n")
    assert _documents("files:x.fasta") == ["MASVS*", "GTR"]


def test_a_line_of_a_smi_file_is_a_molecule_and_perhaps_its_name(folder):
    (folder / "x.smi").write_text("CCO ethanol\nC[C@H](N)C(=O)O\tL-alanine\n\nC\n")
    assert _documents("files:x.smi") == ["CCO", "C[C@H](N)C(=O)O", "C"]


def test_files_of_other_names_are_read_as_what_they_are_said_to_be(folder):
    (folder / "a.py").write_text("def f():\n    return 1\n")
    (folder / "b.fa").write_text(">x\nMAS\n")
    assert _documents("files:*.py?format=txt") == ["def f():\n    return 1\n"]
    assert _documents("files:b.fa?format=fasta") == ["MAS"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("files:none*.txt", r"no file matches none\*\.txt \(looked from "),
        ("files:*.md", r"x\.md is none of \.txt, \.jsonl, \.parquet"),
        ("files:x.txt?documents=page", "documents=page is none of file, blank_line, line"),
        ("files:x.txt?document=line", r"no option 'document' here.*did you mean 'documents'\?"),
        ("files:x.txt?field=text", "field= is for .jsonl, .parquet, .csv, .tsv files"),
        ("files:x.jsonl?documents=line", "documents= is for .txt files"),
        ("files:empty.txt", r"no text in 1 file \(empty\.txt\)"),
        ("files:x.md?format=text", "format=text is none of txt, jsonl, parquet, csv, tsv, fasta, smi"),
        ("files:x.csv?field=b", r"x\.csv: no column 'b'; there are 'a' "),
        ("files:x.csv?field=2", r"x\.csv, record 1: 1 column\(s\), and field=2 is number 2"),
        ("files:x.txt?format=fasta", r"x\.txt, line 1: a sequence before the first '>' line"),
        ("x.txt", r"begins with none of builtin:, files:, tfds:, hf:, pairs:, images:; for files write 'files:x\.txt'"),
        ("file:x.txt", "begins with none of builtin:, files:, tfds:, hf:"),
        ("", "begins with none of"),
        ("files:ftp://host/*.txt", "no ftp:// here; there are local paths, gs://"),
        ("builtin:perl_docs", "the only built-in source is builtin:python_docs"),
        ("tfds:lm1b", "needs a name and a split, as in tfds:NAME#train"),
        ("hf:#train", "needs a name and a split, as in hf:NAME#train"),
    ],
)
def test_a_uri_that_cannot_be_meant(folder, uri, message):
    (folder / "x.txt").write_text("text")
    (folder / "x.md").write_text("text")
    (folder / "x.csv").write_text("a\n1\n")
    (folder / "x.jsonl").write_bytes(_jsonl({"text": "a"}))
    (folder / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match=message):
        open_source(uri)


@pytest.mark.parametrize("rule", ["file", "blank_line", "line"])
def test_a_document_too_large_for_memory_is_refused(folder, monkeypatch, rule):
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 1000)
    separator = {"file": " ", "blank_line": "\n", "line": " "}[rule]
    (folder / "x.txt").write_text("short\n\n" + separator.join(["word"] * 300))
    with pytest.raises(UserError, match=r"x\.txt, line \d+: a document of more than"):
        _documents(f"files:x.txt?documents={rule}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.txt.gz", gzip.compress(b"word " * 10_000)[:-20]),
        ("x.jsonl.gz", b"this was never compressed"),
        ("x.jsonl.gz", gzip.compress(b"\n" * 100_000)[:-4] + b"\1\1\1\1"),
        ("x.parquet", b"PAR1 is how it begins, and then nothing"),
    ],
    ids=["cut off", "not gzip", "wrong length", "not parquet"],
)
def test_a_damaged_file_is_a_fault_of_the_machine(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(MachineError, match=r"x\..*damaged"):
        open_source(f"files:{name}")


def test_a_file_without_text_is_named_in_the_log(folder, caplog):
    (folder / "a.txt").write_text("")
    (folder / "b.txt").write_text("text")
    assert _documents("files:*.txt") == ["text"]
    assert "a.txt holds no text" in caplog.text


# --- builtin ---


@pytest.fixture(scope="module")
def python_docs():
    return _documents("builtin:python_docs")


def test_python_docs_are_megabytes_of_prose_without_repeating_much(python_docs):
    assert sum(map(len, python_docs)) > 1_500_000
    assert min(map(len, python_docs)) >= 40
    assert len(set(python_docs)) > 0.9 * len(python_docs)
    assert all(text == text.strip() for text in python_docs)


def test_python_docs_hold_the_language_reference_and_deindented_docstrings(python_docs):
    assert python_docs[0].startswith('The "assert" statement')
    assert inspect.getdoc(json.JSONDecoder) in python_docs
    assert inspect.getdoc(functools.lru_cache) in python_docs
    assert inspect.getdoc(np.einsum) not in python_docs  # an installed package is not the library


def test_docstrings_come_by_path_and_line_without_tests_and_packages(folder, monkeypatch):
    prose = "This docstring is long enough to be prose, of module {}."
    for name in (
        "b.py",
        "a/z.py",
        "a/c.py",
        "test/t.py",
        "a/tests/t.py",
        "site-packages/p.py",
        "idlelib/i.py",
        "n.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'"""{prose.format(name)}"""\n')
    (folder / "b.py").write_text(
        "class First:\n"
        "    def method(self):\n"
        '        """Does what a method does in a few words.\n\n        First:\n            \\d once.\n        """\n'
        '    """A text that nothing is documented by, however long it is."""\n'
        "    async def other(self):\n"
        '        """Too short."""\n'
        "raise SystemExit('the module was run')\n"
        "def last():\n"
        '    """A function that follows the class, and so its methods."""\n'
    )
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    topics = len(pydoc_data.topics.topics)
    assert _documents("builtin:python_docs")[topics:] == [
        "Does what a method does in a few words.\n\nFirst:\n    \\d once.",
        "A function that follows the class, and so its methods.",
        prose.format("a/c.py"),
        prose.format("a/z.py"),
    ]


def test_a_python_without_library_sources_is_refused(folder, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    with pytest.raises(MachineError, match="no library sources"):
        _documents("builtin:python_docs")


# --- tfds and hf ---


class Prose(tfds.core.GeneratorBasedBuilder):
    """A small TFDS dataset of text."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "label": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(600), "validation": self._generate_examples(3)}

    def _generate_examples(self, count):
        for index in range(count):
            yield index, {"text": f"text {index} é" if index % 3 else "\n", "label": index}


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    Prose(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


def test_tfds_yields_every_text_of_the_split_in_one_order(prose):
    texts = _documents(f"tfds:prose:1.0.0#train?data_dir={prose}")
    assert sorted(texts) == sorted(f"text {index} é" for index in range(600) if index % 3)
    assert texts == _documents(f"tfds:prose#train?data_dir={prose}")
    assert len(_documents(f"tfds:prose#train[:50%]?data_dir={prose}")) < len(texts)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("tfds:prose#test", "Unknown split 'test'"),
        ("tfds:prose:7.0.0#train", "cannot be loaded at version 7.0.0"),
        ("tfds:no_such_prose#train", "no_such_prose not found"),
        ("tfds:prose#train?field=label", "example 0: field 'label' holds int, not text"),
        ("tfds:prose#train?field=body", "example 0: no field 'body'; there are '(label|text)', '(label|text)'"),
    ],
)
def test_tfds_misuse_is_one_line(prose, uri, message):
    with pytest.raises(UserError, match=message) as error:
        open_source(f"{uri}{'&' if '?' in uri else '?'}data_dir={prose}")
    assert "\n" not in str(error.value)


class _Records(tfds.testing.PickableDataSourceMock):
    """Repairs TFDS's mock, whose batch read wants the mock itself as an argument that no caller gives it."""

    def __setattr__(self, name, value):
        super().__setattr__(name, functools.partial(value, self) if name == "__getitems__" else value)


def test_a_public_tfds_dataset_is_found_by_its_name_without_tensorflow():
    with tfds.testing.mock_data(num_examples=7, mock_array_record_data_source=_Records()):
        texts = _documents("tfds:lm1b#train")
        with pytest.raises(UserError, match="no field 'sentence'; there are 'text'"):
            open_source("tfds:lm1b#train?field=sentence")
    assert len(texts) == 7
    assert all(isinstance(text, str) for text in texts)
    assert "tensorflow" not in sys.modules


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the extra is installed")
def test_hf_without_its_package_names_the_extra():
    with pytest.raises(UserError, match=r"pip install '.\[hf\]'"):
        open_source("hf:some/dataset#train")


def test_hf_streams_a_dataset(folder):
    pytest.importorskip("datasets", reason="needs the extra hf")
    (folder / "train.jsonl").write_bytes(_jsonl({"text": "one"}, {"text": None}, {"text": "two"}))
    assert _documents(f"hf:{folder}#train") == ["one", "two"]
    with pytest.raises(UserError, match="test"):
        open_source(f"hf:{folder}#test")
    with pytest.raises(UserError, match="no field 'body'; there are 'text'"):
        open_source(f"hf:{folder}#train?field=body")


# --- real text ---


def test_novels_and_articles_come_whole(data_path):
    novels = _documents(f"files:{data_path}/en_novels/*.txt.gz")
    assert len(novels) == 49
    assert not any("\r" in text or text.startswith("\ufeff") for text in novels)
    articles = open_source(f"files:{data_path}/zh_wikipedia/*.jsonl.gz")
    assert sum(1 for _ in articles.documents()) == 19_206
