"""Tagged sentences from CoNLL's columns and JSONL, and the schemes that tags are written in."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from mlm_jax.config.sections import TaskConfig
from mlm_jax.data import text_files
from mlm_jax.errors import UserError
from mlm_jax.finetune.metrics import Entity
from mlm_jax.finetune.records import Record, field, paths_of, read_records

_BEGINS, _ENDS = "BSU", "ESLU"  # of IOBES, also written BIOLU; the others are I (within) and O (outside)
_TAG = re.compile(rf"([{_BEGINS}{_ENDS}I])-(.+)")
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclasses.dataclass(frozen=True)
class Sentence:
    """An example: a text, the characters of each of its words, and its entities, None where they are not known."""

    text: str
    words: list[tuple[int, int]]
    entities: list[Entity] | None
    where: str

    def word(self, index: int) -> str:
        """The text of a word."""
        return self.text[slice(*self.words[index])]


def read_sentences(uri: str, task: TaskConfig, *, labelled: bool) -> Iterator[Sentence]:
    """The sentences of .jsonl and .parquet files, datasets, and, under any other name, of columns.

    A record has `tokens` and `tags`, lists of the same length, or `text` and `spans`, each with `start`, `end` (characters)
    and `label`; a record of a dataset is of the first kind.

    Raises:
        UserError: content of another form, or without tags where `labelled`.
    """
    if uri.startswith(("tfds:", "hf:")):
        for where, record in read_records(uri, (task.text, task.label)):
            yield _from_record(record, where, labelled=labelled)
        return
    for path in paths_of(uri):
        if text_files.kind(path) in (".jsonl", ".parquet"):
            for where, record in read_records(path, (task.text, task.label)):
                yield _from_record(record, where, labelled=labelled)
        else:
            yield from _from_columns(path, task, labelled=labelled)


def _from_columns(path: str, task: TaskConfig, *, labelled: bool) -> Iterator[Sentence]:
    """A word a line with its tag in another column, which tabs or spaces separate; a blank line ends a sentence.

    The word is in the first column and the tag in the last, unless numbers in the config say otherwise.
    """
    word_column, tag_column = (
        int(name) if name.lstrip("-").isdigit() else usual for name, usual in ((task.text, 0), (task.label, -1))
    )
    words: list[str] = []
    tags: list[str] = []
    began = 0

    def sentence() -> Sentence:
        where = f"{path}, line {began}"
        return _of_words(words, tags if tags else None, where, labelled=labelled)

    for number, line in text_files.lines(path):
        if line.isspace() or not line or line.startswith("-DOCSTART-"):
            if words:
                yield sentence()
                words, tags = [], []
            continue
        columns = line.split("\t") if "\t" in line else line.split()
        began = began if words else number
        try:
            word = columns[word_column].strip()
            tag = columns[tag_column].strip() if len(columns) > 1 else None
        except IndexError:
            raise UserError(
                f"{path}, line {number}: {len(columns)} columns, and the word is looked for in {word_column} and the tag in "
                f"{tag_column} (task.text and task.label choose)"
            ) from None
        if not word or any(char.isspace() for char in word):
            raise UserError(f"{path}, line {number}: {word!r} is no word")
        if bool(words) and (tag is None) != (not tags):
            raise UserError(f"{path}, line {number}: some words of this sentence have a tag and some have none")
        words.append(word)
        tags += [] if tag is None else [tag]
    if words:
        yield sentence()


def _from_record(record: Record, where: str, *, labelled: bool) -> Sentence:
    if "tokens" in record:
        words = _list_of(record, "tokens", where)
        if not words or not all(isinstance(word, str) and word.strip() for word in words):
            raise UserError(f"{where}: tokens must be words, and are {words!r:.80}")
        tags = _list_of(record, "tags", where) if labelled or "tags" in record else None
        return _of_words([word.strip() for word in words], tags, where, labelled=labelled)
    text = field(record, "text", where, "of tagging: tokens and tags, or text and spans")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: text is no text: {text!r:.80}")
    words_at = [match.span() for match in _WORD.finditer(text)]
    if not labelled and "spans" not in record:
        return Sentence(text, words_at, None, where)
    spans = _list_of(record, "spans", where)
    return Sentence(text, words_at, [_aligned(span, text, words_at, where) for span in spans], where)


def _list_of(record: Record, name: str, where: str) -> list[Any]:
    value = field(record, name, where, "of tagging: tokens and tags, or text and spans")
    if not isinstance(value, list):
        raise UserError(f"{where}: {name} must be a list, not {type(value).__name__}")
    return value


def _aligned(span: Any, text: str, words: Sequence[tuple[int, int]], where: str) -> Entity:
    """A span of characters as one of words.

    Raises:
        UserError: it begins or ends within a word.
    """
    if not isinstance(span, dict) or not {"start", "end", "label"} <= span.keys():
        raise UserError(f"{where}: a span needs start, end and label, and is {span!r:.80}")
    start, end = span["start"], span["end"]
    first = [index for index, (begin, _) in enumerate(words) if begin == start]
    last = [index for index, (_, stop) in enumerate(words) if stop == end]
    if not first or not last or first[0] > last[0]:
        shown = text[max(0, start - 10) : start] + "[" + text[start:end] + "]" + text[end : end + 10]
        raise UserError(
            f"{where}: the span {start} to {end} ({span['label']}) does not align with words: …{shown}…; it must begin "
            "where a word begins and end where one ends"
        )
    return Entity(str(span["label"]), first[0], last[0] + 1)


def _of_words(words: Sequence[str], tags: Sequence[Any] | None, where: str, *, labelled: bool) -> Sentence:
    if labelled and tags is None:
        raise UserError(f"{where}: the words have no tags: there is one column only")
    if tags is not None and len(tags) != len(words):
        raise UserError(f"{where}: {len(words)} words and {len(tags)} tags")
    ends = [0]
    for word in words:
        ends.append(ends[-1] + len(word) + 1)
    places = [(start, start + len(word)) for start, word in zip(ends, words, strict=False)]
    return Sentence(" ".join(words), places, None if tags is None else entities_of(tags, where), where)


def entities_of(tags: Sequence[Any], where: str = "") -> list[Entity]:
    """The entities that tags stand for, in IOB, IOB2 or IOBES (BIOLU): B, S and U begin one always, the others where none
    of their label goes on; E, L, S and U end it.

    Raises:
        UserError: a tag of another form.
    """
    found: list[Entity] = []
    label, first = "", 0  # of the entity that goes on; none where the label is empty

    def close(place: int) -> None:
        if label:
            found.append(Entity(label, first, place))

    for place, tag in enumerate(tags):
        if tag == "O":
            close(place)
            label = ""
            continue
        match = _TAG.fullmatch(tag) if isinstance(tag, str) else None
        if match is None:
            raise UserError(f"{where}: the tag {tag!r} is none of O, B-…, I-…, E-…, S-…, L-…, U-…")
        prefix, kind = match.groups()
        if prefix in _BEGINS or kind != label:
            close(place)
            label, first = kind, place
        if prefix in _ENDS:
            close(place + 1)
            label = ""
    close(len(tags))
    return found


def iob2(entities: Sequence[Entity], count: int) -> list[str]:
    """The tags of so many words, B- for the first of an entity, I- for the others."""
    tags = ["O"] * count
    for label, first, last in entities:
        tags[first:last] = [f"B-{label}"] + [f"I-{label}"] * (last - first - 1)
    return tags
