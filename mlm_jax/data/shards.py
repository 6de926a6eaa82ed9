"""From tokenised documents to the rows of a TFDS dataset: one range of document hashes makes one array_record shard.

The packing half of `prepare`: its workers write shards (`pack_bucket`), the parent makes a dataset of them (`publish`).
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from mlm_jax.data import atomic, images, packing, units
from mlm_jax.errors import MachineError

DATASET_NAME = "packed_rows"


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """What decides the content of rows besides the documents."""

    seq_lens: tuple[int, ...]
    max_segments: int
    deduplicate: bool
    vocab_size: int  # of the tokenizer
    pad_id: int
    cls_id: int
    sep_id: int
    read_image: images.Decoder | None = None  # where rows have images

    def features(self, seq_len: int) -> tfds.features.FeaturesDict:
        """Fixed-size raw bytes: two a token where the vocabulary allows, and decoded by one numpy call."""
        tokens = tfds.features.Tensor(shape=(seq_len,), dtype=units.smallest_dtype(self.vocab_size), encoding="bytes")
        lengths = tfds.features.Tensor(shape=(self.max_segments,), dtype=units.smallest_dtype(seq_len + 1), encoding="bytes")
        features = {"tokens": tokens, "segment_lengths": lengths}
        if self.read_image is not None:
            shape = (self.read_image.size, self.read_image.size, 3)
            features["images"] = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="bytes")
        return tfds.features.FeaturesDict(features)


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The documents of a split whose hash begins with 64 bits in lower … upper - 1."""

    split: str
    index: int
    lower: int
    upper: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.index:05d}"


@dataclasses.dataclass(frozen=True)
class RowCounts:
    """Of one bucket at one row length."""

    rows: int
    segments: int
    slots: int  # positions that are not padding
    num_bytes: int  # of the serialised rows


@dataclasses.dataclass(frozen=True)
class BucketSummary:
    """What a finished bucket holds; `rows` by row length."""

    bucket: Bucket
    documents: int  # without duplicates where those are dropped
    duplicates: int
    tokens: int  # of documents, specials not counted
    words: int
    content_hash: str  # over the hashes of the documents, in order
    rows: Mapping[int, RowCounts]


def pack_bucket(
    bucket: Bucket, row_format: RowFormat, unit_paths: Sequence[pathlib.Path], building: pathlib.Path
) -> BucketSummary:
    """Packs a bucket's documents for every row length and writes its shards. Runs in a worker process.

    A bucket that an interrupted run has finished is read back instead.

    Raises:
        UserError: an image cannot be read.
        MachineError: a file cannot be read or written.
    """
    finished = _summary_path(bucket, building)
    if finished.exists():
        return _from_json(finished.read_bytes())
    return pack_documents(bucket, row_format, units.gather(unit_paths, bucket.lower, bucket.upper), building)


def pack_documents(bucket: Bucket, row_format: RowFormat, found: units.Documents, building: pathlib.Path) -> BucketSummary:
    """Packs documents, sorted by hash, and writes the bucket's shards."""
    documents = found
    if row_format.deduplicate:
        is_first = np.ones(len(found.hashes), bool)
        is_first[1:] = (found.hashes[1:] != found.hashes[:-1]).any(axis=1)
        documents = found.take(is_first)
    content_hash = hashlib.blake2b(documents.hashes.astype(">u8").tobytes(), digest_size=16).hexdigest()
    rows = {}
    for seq_len in row_format.seq_lens:
        path = building / f"seq{seq_len}-{bucket.name}"
        rows[seq_len] = _write_rows(documents, row_format, seq_len, content_hash, path)
    summary = BucketSummary(
        bucket,
        len(documents.lengths),
        len(found.lengths) - len(documents.lengths),
        int(documents.lengths.sum()),
        int(documents.words.sum()),
        content_hash,
        rows,
    )
    with atomic.replacing(building / f"unigrams-{bucket.name}.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, _count_text(documents, row_format))
    with atomic.replacing(_summary_path(bucket, building)) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(summary)))
    return summary


def is_packed(bucket: Bucket, building: pathlib.Path) -> bool:
    """Whether `pack_bucket` would read a finished bucket back."""
    return _summary_path(bucket, building).exists()


def _summary_path(bucket: Bucket, building: pathlib.Path) -> pathlib.Path:
    return building / f"bucket-{bucket.name}.json"


def _from_json(content: bytes) -> BucketSummary:
    raw = json.loads(content)
    rows = {int(seq_len): RowCounts(**counts) for seq_len, counts in raw.pop("rows").items()}
    return BucketSummary(bucket=Bucket(**raw.pop("bucket")), rows=rows, **raw)


def _count_text(documents: units.Documents, row_format: RowFormat) -> np.ndarray:
    """How often each id is text; between the parts of a pair are ids that are not."""
    counts = np.zeros(row_format.vocab_size, np.int64)
    for start, length in zip(documents.starts.tolist(), documents.lengths.tolist(), strict=True):
        np.add.at(counts, documents.tokens[start : start + length], 1)
    counts[[row_format.cls_id, row_format.sep_id]] = 0
    return counts


def _write_rows(
    documents: units.Documents, row_format: RowFormat, seq_len: int, content_hash: str, path: pathlib.Path
) -> RowCounts:
    layout = packing.pack(documents.lengths, seq_len, row_format.max_segments)
    features = row_format.features(seq_len)
    serializer = tfds.core.ExampleSerializer(features.get_serialized_info())
    num_bytes = 0
    with atomic.replacing(path) as temporary:
        # One record a group is what random access needs.
        writer = ArrayRecordWriter(os.fspath(temporary), "group_size:1")
        for row in _rows(documents, layout, row_format, seq_len, content_hash):
            # Not features.serialize_example: a map's order on the wire changes from process to process unless asked.
            example = serializer.get_tf_example(features.encode_example(row))
            record = example.SerializeToString(deterministic=True)
            num_bytes += len(record)
            writer.write(record)
        try:
            writer.close()
        except RuntimeError as error:  # the writer's own kind of OSError, also for what went wrong in write()
            raise MachineError(f"cannot write {path}: {error}; start again, finished work is kept") from error
    return RowCounts(layout.num_rows, len(layout.lengths), layout.num_slots, num_bytes)


def _rows(
    documents: units.Documents, layout: packing.Packing, row_format: RowFormat, seq_len: int, content_hash: str
) -> Iterator[dict[str, np.ndarray]]:
    """Assembles rows in a shuffled order, so that the first rows of a split are a fair sample of it."""
    token_dtype, length_dtype = units.smallest_dtype(row_format.vocab_size), units.smallest_dtype(seq_len + 1)
    firsts = (documents.starts[layout.documents] + layout.starts).tolist()
    lengths, bounds = layout.lengths.tolist(), layout.row_bounds.tolist()
    for row in _shuffled(layout.num_rows, f"{content_hash} {seq_len}").tolist():
        tokens = np.full(seq_len, row_format.pad_id, token_dtype)
        segment_lengths = np.zeros(row_format.max_segments, length_dtype)
        position = 0
        for segment, piece in enumerate(range(bounds[row], bounds[row + 1])):
            first, end = firsts[piece], position + lengths[piece] + 1
            tokens[position] = row_format.cls_id
            tokens[position + 1 : end] = documents.tokens[first : first + lengths[piece]]
            tokens[end] = row_format.sep_id
            segment_lengths[segment] = end + 1 - position
            position = end + 1
        found = {"tokens": tokens, "segment_lengths": segment_lengths}
        if row_format.read_image is not None:  # a row has one text
            found["images"] = row_format.read_image(documents.images[layout.documents[bounds[row]]].decode())
        yield found


def _shuffled(count: int, seed: str) -> np.ndarray:
    """A permutation from a bit generator's raw output, which NumPy keeps between versions (NEP 19)."""
    bits = np.random.PCG64(int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=16).digest()))
    return np.argsort(bits.random_raw(count), kind="stable")


def publish(
    summaries: Sequence[BucketSummary], row_format: RowFormat, seq_len: int, building: pathlib.Path, out: pathlib.Path
) -> None:
    """Moves the shards of one row length to their final names and writes TFDS's metadata; can be repeated.

    Raises:
        MachineError: a shard is missing, or a file cannot be written.
    """
    with atomic.telling_faults(out):
        out.mkdir(exist_ok=True)
        infos = []
        for split in sorted({summary.bucket.split for summary in summaries}):
            template = tfds.core.ShardedFileTemplate(
                data_dir=out, dataset_name=DATASET_NAME, split=split, filetype_suffix="array_record"
            )
            filled = [s for s in summaries if s.bucket.split == split and s.rows[seq_len].rows]
            for index, summary in enumerate(filled):
                final = template.sharded_filepath(shard_index=index, num_shards=len(filled))
                shard = building / f"seq{seq_len}-{summary.bucket.name}"
                if shard.exists() or not final.exists():  # else an interrupted run has moved it
                    os.replace(shard, final)
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[summary.rows[seq_len].rows for summary in filled],
                    num_bytes=sum(summary.rows[seq_len].num_bytes for summary in filled),
                    filename_template=template,
                )
            )
        tfds.folder_dataset.write_metadata(
            data_dir=out, features=row_format.features(seq_len), split_infos=infos, check_data=False
        )
