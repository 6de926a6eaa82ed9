"""A prepared corpus on disk: its identity, its manifest, and how it is opened.

`prepare` writes it; training, evaluation and the loader read it. Its content follows from its identity and its source.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlm_jax import config
from mlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from mlm_jax.errors import MachineError, UserError

FORMAT = 2  # raised when what `prepare` writes changes, so that an older corpus is not taken for a newer one
_READABLE = (1, FORMAT)  # 1: the manifest counts no words
MANIFEST = "manifest.json"
SOURCES = "sources"  # of a mixture: the folder with a corpus for each
TOKENIZER = "tokenizer"
UNIGRAMS = "unigrams.npy"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """An opened corpus, or a mixture of several with one tokenizer.

    Attributes:
        path: its directory.
        manifest: what `prepare` recorded: identity, counts of documents, words, tokens and rows, fill rates, hashes.
        tokenizer: the one that its tokens were made with.
        unigrams: int64 [tokenizer's vocabulary], how often each id is text of the training split; special ids 0.
        parts: of a mixture, the corpus of each source by its name, in the config's order; else empty.
    """

    path: pathlib.Path
    manifest: Mapping[str, Any]
    tokenizer: Tokenizer
    unigrams: np.ndarray
    parts: Mapping[str, "Corpus"] = dataclasses.field(default_factory=dict)


def identity(cfg: config.Config) -> dict[str, Any]:
    """The part of a configuration that a corpus depends on, in JSON's types. How sources are mixed is not in it."""
    sections = config.to_dict(cfg)
    seq_lens = sorted({stage.seq_len for stage in cfg.stages})
    data = sections["data"]
    del data["alpha"]
    data |= {f"filters.{name}": value for name, value in data.pop("filters").items()}
    if cfg.model.image_size:
        data["image_size"] = cfg.model.image_size
    else:
        del data["image_resize"]
    if data["sources"]:
        data["sources"] = {source["name"]: source["uri"] for source in data["sources"]}
    else:
        del data["sources"], sections["tokenizer"]["sample_alpha"]
    return {"data": data, "tokenizer": sections["tokenizer"], "seq_lens": seq_lens}


def rows_directory(path: str | os.PathLike[str], seq_len: int) -> pathlib.Path:
    """Where the TFDS dataset of one row length lies."""
    return pathlib.Path(path) / f"seq{seq_len}"


def open_corpus(path: str | os.PathLike[str], cfg: config.Config | None = None) -> Corpus:
    """Opens a prepared corpus.

    Args:
        path: its directory.
        cfg: when given, the configuration that the corpus must have been made for. It may use fewer row lengths.

    Raises:
        UserError: there is no whole corpus, or it was made for another configuration, whose first field is named.
        MachineError: a file of it is missing or damaged.
    """
    directory = pathlib.Path(path)
    manifest = read_manifest(directory)
    if manifest is None:
        raise UserError(f"no prepared corpus in {directory}: run `mlm-jax prepare --config C --out {directory}`")
    if manifest["format"] not in _READABLE:
        raise UserError(f"{directory} has format {manifest['format']}, this version reads {FORMAT}: prepare it again")
    if cfg is not None:
        check_identity(directory, manifest["identity"], identity(cfg), whole=True)
    tokenizer = load_tokenizer(directory / TOKENIZER)
    if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
        raise MachineError(f"{directory / TOKENIZER} is not the tokenizer of this corpus: prepare it again")
    if cfg is not None:
        check_vocabulary(tokenizer, cfg)
    try:
        unigrams = np.load(directory / UNIGRAMS)
    except (OSError, ValueError) as error:
        raise MachineError(f"{directory / UNIGRAMS} cannot be read: {error}; prepare the corpus again") from error
    names = manifest.get("sources", ()) if cfg is None else [source.name for source in cfg.data.sources]
    parts = {name: open_corpus(directory / SOURCES / name) for name in names}
    for part in parts.values():
        if part.tokenizer.fingerprint != tokenizer.fingerprint:
            raise MachineError(f"{part.path} has another tokenizer than {directory}: prepare the mixture again")
    return Corpus(directory, manifest, tokenizer, unigrams, parts)


def read_manifest(directory: pathlib.Path) -> dict[str, Any] | None:
    """The manifest of a whole corpus, or None where there is none (yet)."""
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MachineError(f"{path} cannot be read: {error}; delete {directory} and prepare it again") from error


def check_identity(directory: pathlib.Path, made: Mapping[str, Any], wanted: Mapping[str, Any], *, whole: bool) -> None:
    """Raises a UserError that names the first field in which a corpus differs from what is wanted.

    A whole corpus may have more row lengths than are wanted; one that is being made must have exactly those. A corpus that
    is older than a field was made with its default.
    """
    older = identity(config.Config(name=""))
    older["data"]["image_size"] = 0
    differing = [
        (f"{section}.{field}", was, now)
        for section in ("data", "tokenizer")
        for field in sorted(made[section].keys() | wanted[section].keys())
        if (was := made[section].get(field, older[section].get(field))) != (now := wanted[section].get(field))
    ]
    missing = set(wanted["seq_lens"]) - set(made["seq_lens"])
    if missing or (not whole and made["seq_lens"] != wanted["seq_lens"]):
        differing.append(("stages' seq_len", made["seq_lens"], wanted["seq_lens"]))
    for field, old, new in differing[:1]:
        raise UserError(
            f"{directory} was made with {field}={old!r}, and the config has {new!r}: give another directory,"
            f" delete this one, or set the field back"
        )


def check_vocabulary(tokenizer: Tokenizer, cfg: config.Config) -> None:
    """Raises a UserError when the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids and model.vocab_size={cfg.model.vocab_size}: raise the"
            f" model's to {-(-tokenizer.vocab_size // 128) * 128} (a multiple of 128) or use another tokenizer"
        )
