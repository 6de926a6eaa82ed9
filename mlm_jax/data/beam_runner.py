"""The passes over a source as Apache Beam pipelines, on one machine or on a cluster: `prepare --runner beam`.

Beam reads, moves and groups; what happens to documents are the functions of the local runner. A bucket is a range of hashes
and is packed as a whole wherever it is, so that both runners write the same bytes. TFDS's own Beam writer is not used for
that reason: it would put rows into shards and an order of its own, and order decides which examples a step of a run has.

Workers read the source, and read and write the corpus, under the same paths as the process that starts the pipelines.
"""

import collections
import contextlib
import dataclasses
import json
import logging
import pathlib
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from mlm_jax.config import FiltersConfig
from mlm_jax.data import atomic, encode, filters, limit, near_duplicates, selection, shards, units
from mlm_jax.data.runner import Plan
from mlm_jax.data.sources import Source, changed
from mlm_jax.errors import MachineError, UserError

_log = logging.getLogger(__name__)

Found = tuple[units.UnitSummary, encode.Totals]

_LOCAL = "--runner=FnApiRunner"  # Beam's own for one machine, which "DirectRunner" may exchange for one that it downloads


@dataclasses.dataclass(frozen=True)
class BeamRunner:
    """Starts a pipeline for each pass and waits for it.

    Attributes:
        options: Beam's, as "--runner=FlinkRunner"; without a runner the pipelines run on this machine.
    """

    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"Beam ({' '.join(self._all_options)})"

    @property
    def _all_options(self) -> tuple[str, ...]:
        chosen = any(option.partition("=")[0] == "--runner" for option in self.options)
        return self.options if chosen else (_LOCAL, *self.options)

    def select(self, source: Source, cfg: FiltersConfig, folder: pathlib.Path) -> None:
        with self._pipeline("applying the filters") as pipeline:
            read = _pieces(pipeline, source) | beam.FlatMap(_read, source.pieces).with_outputs("digests", main="texts")
            inspected = read.texts | beam.Reshuffle() | beam.Map(_inspect, cfg)
            alike = (
                inspected
                | beam.FlatMap(_by_band, cfg)
                | beam.GroupByKey()
                | "lower ranked" >> beam.FlatMap(_lower_ranked, cfg)
            )
            codes = inspected | "codes" >> beam.Map(lambda found: (found[0], (found[1], found[2].codes)))
            _ = (
                {"codes": codes, "alike": alike, "digests": read.digests}
                | beam.CoGroupByKey()
                | beam.Map(_write_part, folder)
                | beam.CombineGlobally(_summed).without_defaults()
                | "write" >> beam.Map(lambda counts: selection.write_summary(folder, counts))
            )

    def find_limit(
        self, source: Source, building: pathlib.Path, max_words: int, *, deduplicate: bool, held_out_below: int
    ) -> str:
        def taken(number: int) -> limit.Taken:
            found = limit.Taken(max_words, deduplicate=deduplicate, held_out_below=held_out_below)
            for document in source.pieces[number]():
                found.add(document)
            return found

        path = building / "beam-limit.json"
        with self._pipeline("counting words") as pipeline:
            _ = (
                _pieces(pipeline, source)
                | beam.Map(taken)
                | beam.CombineGlobally(_summed).without_defaults()
                | "write" >> beam.Map(lambda found: _write_json(path, found.limit(source.uri)))
            )
        return json.loads(path.read_bytes())

    def sample(
        self, source: Source, building: pathlib.Path, sample_bytes: int, held_out_below: int
    ) -> tuple[list[bytes], encode.Totals]:
        def drawn(number: int) -> tuple[encode.Sample, encode.Totals]:
            found, counter = encode.Sample(sample_bytes, held_out_below), encode.Counter()
            for document in source.pieces[number]():
                text = document.encode()
                found.add(counter.add(text), text)
            return found, counter.totals()

        def write(found: tuple[encode.Sample, encode.Totals]) -> None:
            texts = [text.decode() for text in found[0].texts()]
            _write_json(path, {"texts": texts, "totals": dataclasses.asdict(found[1])})

        path = building / "beam-sample.json"
        with self._pipeline("sampling text for the tokenizer") as pipeline:
            _ = (
                _pieces(pipeline, source)
                | beam.Map(drawn)
                | beam.CombineGlobally(_summed_each).without_defaults()
                | "write" >> beam.Map(write)
            )
        found = json.loads(path.read_bytes())
        return [text.encode() for text in found["texts"]], encode.Totals(**found["totals"])

    def pack(
        self,
        source: Source,
        building: pathlib.Path,
        tokenizer_directory: pathlib.Path,
        row_format: shards.RowFormat,
        plan: Plan,
        expected: encode.Totals | None,
    ) -> tuple[list[shards.BucketSummary], int, encode.Totals]:
        path = building / "beam-found.json"
        earlier = _read_found(path) if path.exists() else None
        if earlier is None or not all(shards.is_packed(bucket, building) for bucket in plan([earlier[0]])):
            with self._pipeline("tokenising and packing") as pipeline:
                tokenised = (
                    _pieces(pipeline, source)
                    | beam.FlatMap(lambda number: encode.grouped(source.pieces[number]()))
                    | "spread" >> beam.Reshuffle()
                    | beam.Map(_tokenise, str(tokenizer_directory))
                )
                found = (
                    tokenised
                    | "found" >> beam.Map(lambda pair: pair[1])
                    | beam.CombineGlobally(_summed_each).without_defaults()
                    | "write" >> beam.Map(_write_found, path, source.uri)
                )
                buckets = beam.pvalue.AsSingleton(found | "plan" >> beam.Map(lambda pair: plan([pair[0]])))
                _ = (
                    tokenised
                    | "by bucket" >> beam.FlatMap(_by_bucket, buckets)
                    | beam.GroupByKey()
                    | beam.Map(_pack, buckets, row_format, building)
                )
        unit, totals = _read_found(path)
        if expected is not None and totals != expected:
            raise changed(source.uri, building)
        # What is packed is read back; a bucket without a document, which no pipeline knows of, is written here.
        summaries = [shards.pack_bucket(bucket, row_format, [], building) for bucket in plan([unit])]
        packed = sum(summary.documents + summary.duplicates for summary in summaries)
        if packed != unit.documents:
            raise MachineError(
                f"{unit.documents} documents were tokenised and {packed} packed: do all of Beam's workers see {building} "
                "under this path?"
            )
        return summaries, unit.blank, totals

    @contextlib.contextmanager
    def _pipeline(self, what: str) -> Iterator[beam.Pipeline]:
        """A pipeline that has run when the block ends. Messages of ours come back from its workers as they were raised."""
        start = time.monotonic()
        try:
            pipeline = beam.Pipeline(options=PipelineOptions(list(self._all_options)))
        except (ValueError, ImportError) as error:
            raise UserError(f"--beam-options: {error}") from error
        try:
            with pipeline:
                yield pipeline
        except Exception as error:
            raise _told(error) from error
        _log.info("%s: done in %.1f s", what, time.monotonic() - start)


def _told(error: Exception) -> Exception:
    """The error of ours that a worker raised, which Beam passes on as text with its own added; else the error itself."""
    text = "".join(traceback.format_exception(error))
    found = re.findall(r"mlm_jax\.errors\.(UserError|MachineError): (.*?)(?: \[while running .*)?$", text, re.MULTILINE)
    if not found:
        return error
    kind, message = found[-1]
    return {"UserError": UserError, "MachineError": MachineError}[kind](message)


def _pieces(pipeline: beam.Pipeline, source: Source) -> Any:
    """The numbers of a source's pieces, each of which one worker reads."""
    return pipeline | beam.Create(range(len(source.pieces))) | "pieces" >> beam.Reshuffle()


def _summed(parts: Iterable[Any]) -> Any:
    first, *others = parts
    for other in others:
        first = first + other
    return first


def _summed_each(parts: Iterable[Sequence[Any]]) -> Any:
    return tuple(_summed(column) for column in zip(*parts, strict=True))


def _write_json(path: pathlib.Path, value: Any) -> None:
    with atomic.replacing(path) as temporary:
        temporary.write_text(json.dumps(value))


def _write_found(found: Any, path: pathlib.Path, uri: str) -> Any:
    """Writes what tokenising found, before anything is packed of it, and checks that an earlier run found the same."""
    if path.exists() and _read_found(path) != found:
        raise changed(uri, path.parent)
    _write_json(path, [dataclasses.asdict(one) for one in found])
    return found


def _read_found(path: pathlib.Path) -> Found:
    unit, totals = json.loads(path.read_bytes())
    return units.UnitSummary(**unit), encode.Totals(**totals)


def _read(number: int, pieces: Sequence[Callable[[], Iterator[str]]]) -> Iterator[Any]:
    """A piece's texts, with its number and the place of the first; and, apart, how many it has and their hash."""
    digest, first = selection.Digest(), 0
    for texts in encode.grouped(digest.through(pieces[number]())):
        yield number, first, texts
        first += len(texts)
    yield beam.pvalue.TaggedOutput("digests", (number, (digest.documents, digest.hexdigest())))


def _inspect(read: tuple[int, int, list[bytes]], cfg: FiltersConfig) -> tuple[int, int, selection.Inspected]:
    number, first, texts = read
    return number, first, selection.inspect(texts, cfg)


def _by_band(found: tuple[int, int, selection.Inspected], cfg: FiltersConfig) -> Iterator[Any]:
    number, first, inspected = found
    for place, rank, signature in inspected.signed():
        for band in near_duplicates.bands(cfg):
            yield (band.start, signature[band].tobytes()), (rank, signature, number, first + place)


def _lower_ranked(group: tuple[Any, Iterable[Any]], cfg: FiltersConfig) -> Iterator[tuple[int, int]]:
    members = list(group[1])
    lower = set(near_duplicates.lower_ranked({rank: signature for rank, signature, *_ in members}, cfg.near_duplicates))
    return ((number, place) for rank, _, number, place in members if rank in lower)


def _write_part(of_part: tuple[int, Mapping[str, Iterable[Any]]], folder: pathlib.Path) -> collections.Counter[str]:
    number, found = of_part
    ((documents, digest),) = found["digests"]
    codes = np.zeros(documents, np.uint8)
    for first, some in found["codes"]:
        codes[first : first + len(some)] = some
    codes[np.fromiter(found["alike"], np.int64)] = selection.OF_RULE[filters.NEAR_DUPLICATES]
    return selection.write_part(folder, number, codes, digest)


def _tokenise(texts: list[bytes], tokenizer_directory: str) -> tuple[units.Documents, Found]:
    counter = encode.Counter()
    for text in texts:
        counter.add(text)
    documents = units.tokenise(texts, tokenizer_directory)
    unit = units.summary(documents, blank=len(texts) - len(documents.lengths), text_bytes=sum(map(len, texts)))
    return documents, (unit, counter.totals())


def _by_bucket(
    tokenised: tuple[units.Documents, Found], buckets: Sequence[shards.Bucket]
) -> Iterator[tuple[int, units.Documents]]:
    for index, bucket in enumerate(buckets):
        documents = tokenised[0].between(bucket.lower, bucket.upper)
        if len(documents.lengths):
            yield index, documents


def _pack(
    of_bucket: tuple[int, Iterable[units.Documents]],
    buckets: Sequence[shards.Bucket],
    row_format: shards.RowFormat,
    building: pathlib.Path,
) -> None:
    bucket = buckets[of_bucket[0]]
    if not shards.is_packed(bucket, building):
        shards.pack_documents(bucket, row_format, units.joined(of_bucket[1]), building)
