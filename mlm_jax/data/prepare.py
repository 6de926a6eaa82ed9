"""From raw text to a packed corpus: tokenizer, tokenised units, rows, manifest, each step kept when a later one fails.

The verb `prepare`, and the first act of `train`. What it writes does not depend on the number of workers, nor on
interruptions: documents are ordered, split and packed by the hashes of their texts.
"""

import dataclasses
import functools
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlm_jax.config import Config, FiltersConfig
from mlm_jax.data import atomic, encode, images, limit, pool, selection, shards, units
from mlm_jax.data.corpus import (
    FORMAT,
    MANIFEST,
    SOURCES,
    TOKENIZER,
    UNIGRAMS,
    Corpus,
    check_identity,
    check_vocabulary,
    identity,
    open_corpus,
    read_manifest,
    rows_directory,
)
from mlm_jax.data.filters import check_languages
from mlm_jax.data.manifest import describe, report
from mlm_jax.data.runner import LocalRunner, Runner
from mlm_jax.data.sources import Source, changed, open_source
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import UserError

_log = logging.getLogger(__name__)

# A bucket is packed in memory by one worker and becomes one shard. Small corpora are cut too, so that several workers
# have something to do; a million tokens are plenty for best fit to fill rows.
LARGEST_BUCKET_TOKENS = 32_000_000
SMALLEST_BUCKET_TOKENS = 1_000_000
BUCKETS_FOR_PARALLELISM = 16
BYTES_FOR_A_TOKEN = 64  # of images, which a bucket counts as so many tokens: the largest shard has 2 GB of them

REMEMBERED_BYTES = 32 * 2**20  # of text: a source up to this size is read once, not twice

_OF_EACH_SOURCE = ("source", "content_hash", "documents", "words", "tokens", "rows", "filters")  # in a mixture's manifest
_DECISIONS = "filters"  # the folder of what the filters have decided; of a mixture's source with -NAME
_READY = "manifest.ready"  # the manifest's name from the moment that all else is in place until the clean-up is done


def prepare(cfg: Config, out: str | os.PathLike[str], workers: int | None = None, runner: Runner | None = None) -> Corpus:
    """Makes the corpus of a configuration, or continues making it, or opens it when it is whole.

    Args:
        cfg: its data and tokenizer sections and its stages' row lengths decide the content.
        out: a local directory that is new, empty, or was used for the same configuration before.
        workers: processes that tokenise and pack; as many as there are cores when None.
        runner: what does the passes over the text in the place of such processes.

    Raises:
        UserError: an unusable source, too little text, a directory that is taken, in use, or of another configuration.
        MachineError: a full disk, a damaged file, a worker that died; starting again continues.
    """
    if "://" in os.fspath(out):
        raise UserError(f"{out}: prepare works in a local directory; copy the finished one to its bucket afterwards")
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers} must be at least 1")
    if cfg.tokenizer.sample_megabytes <= 0:
        raise UserError(f"tokenizer.sample_megabytes={cfg.tokenizer.sample_megabytes} must be positive")
    directory = pathlib.Path(out)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; give a directory")
    _prepare(cfg, directory, runner or LocalRunner(workers or pool.available_cores()))
    return open_corpus(directory, cfg)


@dataclasses.dataclass(frozen=True)
class _OfMixture:
    """What a source of a mixture is given: the mixture's tokenizer, and where what the filters decided of it lies."""

    tokenizer: Tokenizer
    decisions: pathlib.Path


def _prepare(cfg: Config, directory: pathlib.Path, runner: Runner, mixture: _OfMixture | None = None) -> None:
    if read_manifest(directory) is None:
        with atomic.telling_faults(directory):
            directory.mkdir(parents=True, exist_ok=True)
        with atomic.locked(directory):
            if read_manifest(directory) is None:  # else it was finished while this process came to the lock
                building = _begin(directory, identity(cfg))
                if not (directory / _READY).exists():
                    if cfg.data.sources:
                        _build_mixture(cfg, directory, building, runner)
                    else:
                        _build(cfg, directory, building, runner, mixture)
                with atomic.telling_faults(directory):
                    shutil.rmtree(building)
                    os.replace(directory / _READY, directory / MANIFEST)
    else:
        _log.info("%s is whole already", directory)


def _begin(directory: pathlib.Path, wanted: dict[str, Any]) -> pathlib.Path:
    """Marks a directory as the place of one corpus, or checks that it is; returns the folder for unfinished work."""
    building, ready = directory / "building", directory / _READY
    begun = building / "identity.json"
    if ready.exists():
        check_identity(directory, json.loads(ready.read_bytes())["identity"], wanted, whole=False)
    elif begun.exists() and (directory / TOKENIZER).exists():
        made = json.loads(begun.read_bytes())
        if made.get("format", 1) != FORMAT:
            raise UserError(f"{directory} was begun by another version of mlm-jax: delete it and prepare it again")
        check_identity(directory, made, wanted, whole=False)
        _log.info("continuing the unfinished corpus in %s", directory)
    else:
        known = {building.name, atomic.LOCK_NAME}
        others = sorted(path.name for path in directory.iterdir() if path.name not in known)
        if others:
            raise UserError(f"{directory} holds {others[0]!r} and no corpus: give a new or empty directory")
        # Nothing is finished that a corrected setting would not change, but what the filters have decided for these.
        same = begun.exists() and json.loads(begun.read_bytes()) == {"format": FORMAT, **wanted}
        for path in list(building.iterdir()) if building.exists() else ():
            if path.is_file():
                path.unlink()
            elif not (same and path.name.startswith(_DECISIONS)):
                shutil.rmtree(path)
    with atomic.telling_faults(building):
        building.mkdir(exist_ok=True)
        for left_by_a_killed_process in building.glob(f"*{atomic.TEMPORARY_SUFFIX}"):
            left_by_a_killed_process.unlink()
    if not begun.exists():
        with atomic.replacing(begun) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, **wanted}))
    return building


def _build(cfg: Config, directory: pathlib.Path, building: pathlib.Path, runner: Runner, mixture: _OfMixture | None) -> None:
    """All the work: everything is in place and the manifest is ready when this returns."""
    decisions = mixture.decisions if mixture else building / _DECISIONS
    source = _open_filtered(cfg, runner, decisions)
    _log.info("preparing %s from %s with %s", directory, source.description, runner)
    read_image = images.decoder(cfg, source.images, source.uri)
    if cfg.data.max_words:
        source = _limited(cfg, source, building, runner)
    totals_path = building / "totals.json"

    def draw() -> list[bytes]:
        texts, totals = runner.sample(source, building, _sample_bytes(cfg), _held_out_below(cfg))
        if not texts:
            raise _too_few_documents(cfg)
        with atomic.replacing(totals_path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(totals)))
        return texts

    given = mixture.tokenizer if mixture else None
    tokenizer = encode.make_tokenizer(cfg, directory / TOKENIZER, building, draw, given)
    expected = encode.Totals(**json.loads(totals_path.read_bytes())) if totals_path.exists() else None
    check_vocabulary(tokenizer, cfg)
    row_format = shards.RowFormat(
        seq_lens=tuple(identity(cfg)["seq_lens"]),
        max_segments=cfg.data.max_segments,
        deduplicate=cfg.data.deduplicate,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        cls_id=tokenizer.cls_id,
        sep_id=tokenizer.sep_id,
        read_image=read_image,
    )
    plan = functools.partial(_plan, cfg)
    summaries, blank, totals = runner.pack(source, building, directory / TOKENIZER, row_format, plan, expected)
    for seq_len in row_format.seq_lens:
        shards.publish(summaries, row_format, seq_len, building, rows_directory(directory, seq_len))
    _write_unigrams(summaries, building, directory / UNIGRAMS)
    filtered = selection.read_summary(decisions)
    manifest = describe(cfg, tokenizer, totals, blank, row_format, summaries) | ({"filters": filtered} if filtered else {})
    if 0 < cfg.data.max_words < manifest["words"]["train"]:
        raise changed(source.uri, building)
    with atomic.replacing(directory / _READY, building) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")
    report(manifest)


def _open_filtered(cfg: Config, runner: Runner, decisions: pathlib.Path) -> Source:
    """The source without the documents that `data.filters` drop; what they decided is kept for a restart.

    Args:
        decisions: the folder for that.
    """
    source = open_source(cfg.data.source)
    if cfg.data.filters != FiltersConfig():
        check_languages(cfg.data.filters)
        with atomic.telling_faults(decisions):
            decisions.mkdir(parents=True, exist_ok=True)
        if selection.read_summary(decisions) is None:
            runner.select(source, cfg.data.filters, decisions)
        source = selection.selected(source, decisions)
    return encode.remembering(source, REMEMBERED_BYTES)


def _limited(cfg: Config, source: Source, building: pathlib.Path, runner: Runner) -> Source:
    """Cuts the source down to `data.max_words`; where it is cut is kept for a restart."""
    path = building / "limit"
    if not path.exists():
        cut = runner.find_limit(
            source, building, cfg.data.max_words, deduplicate=cfg.data.deduplicate, held_out_below=_held_out_below(cfg)
        )
        with atomic.replacing(path) as temporary:
            temporary.write_text(cut)
    return limit.limited(source, path.read_text())


def _build_mixture(cfg: Config, directory: pathlib.Path, building: pathlib.Path, runner: Runner) -> None:
    """A tokenizer from a sample of all sources, then a corpus of each source with it, each in its own folder."""
    sources = {
        source.name: dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, source=source.uri, sources=()))
        for source in cfg.data.sources
    }

    def draw() -> list[bytes]:
        samples = []
        for name, part in sources.items():
            source = _open_filtered(part, runner, building / f"{_DECISIONS}-{name}")
            samples.append(runner.sample(source, building, _sample_bytes(cfg), _held_out_below(cfg)))
        texts = encode.balanced(samples, _sample_bytes(cfg), cfg.tokenizer.sample_alpha)
        for part, drawn in zip(sources.values(), texts, strict=True):
            if not drawn:
                raise _too_few_documents(part)
        return [text for drawn in texts for text in drawn]

    tokenizer = encode.make_tokenizer(cfg, directory / TOKENIZER, building, draw, None)
    check_vocabulary(tokenizer, cfg)
    with atomic.telling_faults(directory):
        (directory / SOURCES).mkdir(exist_ok=True)
    parts = {}
    for name, part in sources.items():
        _log.info("source %s of %s", name, ", ".join(sources))
        _prepare(part, directory / SOURCES / name, runner, _OfMixture(tokenizer, building / f"{_DECISIONS}-{name}"))
        parts[name] = open_corpus(directory / SOURCES / name, part)
    with atomic.replacing(directory / UNIGRAMS, building) as temporary, open(temporary, "wb") as file:
        np.save(file, sum(part.unigrams for part in parts.values()))
    manifest = {
        "format": FORMAT,
        "identity": identity(cfg),
        "sources": {
            name: {field: part.manifest[field] for field in _OF_EACH_SOURCE if field in part.manifest}
            for name, part in parts.items()
        },
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "unigrams": UNIGRAMS,
    }
    with atomic.replacing(directory / _READY, building) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n")


def _sample_bytes(cfg: Config) -> int:
    return int(cfg.tokenizer.sample_megabytes * 1e6)


def _held_out_below(cfg: Config) -> int:
    """Documents are held out whose hash begins with 64 bits below this."""
    return int(cfg.data.validation_fraction * 2**64)


def _plan(cfg: Config, found: Sequence[units.UnitSummary]) -> list[shards.Bucket]:
    """Cuts the range of hashes into the splits, and each split into buckets of bounded size.

    A corpus too small for the share that is held out gives up the one document with the smallest hash.
    """
    smallest = min(unit.smallest_hash for unit in found)
    largest = max(unit.largest_hash for unit in found)
    fraction = cfg.data.validation_fraction
    boundary = max(_held_out_below(cfg), smallest + 1) if fraction else 0
    if largest < max(boundary, smallest):
        raise _too_few_documents(cfg)
    image_bytes = 3 * cfg.model.image_size**2 * sum(unit.documents for unit in found)
    tokens = sum(unit.tokens for unit in found) + image_bytes // BYTES_FOR_A_TOKEN
    buckets = []
    for split, lower, upper, share in (
        ("validation", 0, boundary, fraction),
        ("train", boundary, 2**64, 1.0 - fraction),
    ):
        count = _num_buckets(int(tokens * share)) if upper else 0
        bounds = [lower + (upper - lower) * index // count for index in range(count)] + [upper]
        buckets += [shards.Bucket(split, index, bounds[index], bounds[index + 1]) for index in range(count)]
    return buckets


def _num_buckets(tokens: int) -> int:
    return max(1, -(-tokens // LARGEST_BUCKET_TOKENS), min(BUCKETS_FOR_PARALLELISM, tokens // SMALLEST_BUCKET_TOKENS))


def _too_few_documents(cfg: Config) -> UserError:
    return UserError(
        f"{cfg.data.source} has too few different documents to hold some out (data.validation_fraction="
        f"{cfg.data.validation_fraction}): add documents, cut them smaller (?documents=blank_line for .txt files),"
        " change the fraction, or set it to 0 for no validation split"
    )


def _write_unigrams(summaries: Sequence[shards.BucketSummary], building: pathlib.Path, path: pathlib.Path) -> None:
    train = [summary.bucket for summary in summaries if summary.bucket.split == "train"]
    counts = sum(np.load(building / f"unigrams-{bucket.name}.npy") for bucket in train)
    with atomic.replacing(path, building) as temporary, open(temporary, "wb") as file:
        np.save(file, counts)
