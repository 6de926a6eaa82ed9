"""What the manifest of a corpus says of it: counts, fill rates and hashes. `prepare` writes it last."""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

from mlm_jax.config import Config
from mlm_jax.data import encode, shards
from mlm_jax.data.corpus import FORMAT, UNIGRAMS, identity
from mlm_jax.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


def describe(
    cfg: Config,
    tokenizer: Tokenizer,
    totals: encode.Totals,
    blank: int,
    row_format: shards.RowFormat,
    summaries: Sequence[shards.BucketSummary],
) -> dict[str, Any]:
    """Only what follows from the source and the configuration: no times, no paths."""
    of_split: dict[str, list[shards.BucketSummary]] = {}
    for summary in summaries:
        of_split.setdefault(summary.bucket.split, []).append(summary)
    documents = {split: sum(summary.documents for summary in group) for split, group in of_split.items()}
    content = "".join(summary.content_hash for summary in summaries).encode()
    return {
        "format": FORMAT,
        "identity": identity(cfg),
        "source": {"uri": cfg.data.source, "documents": totals.documents, "text_bytes": totals.text_bytes},
        "content_hash": hashlib.blake2b(content, digest_size=16).hexdigest(),
        "documents": {**documents, "duplicates": sum(summary.duplicates for summary in summaries), "blank": blank},
        "held_out_share": documents.get("validation", 0) / sum(documents.values()),
        "words": {split: sum(summary.words for summary in group) for split, group in of_split.items()},
        "tokens": {split: sum(summary.tokens for summary in group) for split, group in of_split.items()},
        "rows": {
            str(seq_len): {split: _row_counts(group, seq_len) for split, group in of_split.items()}
            for seq_len in row_format.seq_lens
        },
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "unigrams": UNIGRAMS,
    }


def _row_counts(summaries: Sequence[shards.BucketSummary], seq_len: int) -> dict[str, int | float]:
    counts = [summary.rows[seq_len] for summary in summaries]
    rows, slots = sum(count.rows for count in counts), sum(count.slots for count in counts)
    return {
        "rows": rows,
        "segments": sum(count.segments for count in counts),
        "tokens_and_specials": slots,
        "fill_rate": slots / (rows * seq_len),
    }


def report(manifest: dict[str, Any]) -> None:
    """Logs what a person wants to know of a corpus, and warns of rows that are far from full."""
    max_segments = manifest["identity"]["data"]["max_segments"]
    for split, words in manifest["words"].items():
        _log.info("%s: %s words, %s tokens", split, f"{words:,}", f"{manifest['tokens'][split]:,}")
    for seq_len, splits in manifest["rows"].items():
        counts = splits["train"]
        _log.info("rows of %s: %d for training, fill rate %.1f%%", seq_len, counts["rows"], 100 * counts["fill_rate"])
        if max_segments > 1 and counts["fill_rate"] < 0.9 and counts["segments"] > 0.9 * max_segments * counts["rows"]:
            _log.warning(
                "rows of %s are %.0f%% padding, as no more than data.max_segments=%d documents may share one: raise it",
                seq_len,
                100 * (1 - counts["fill_rate"]),
                max_segments,
            )
