"""What a step takes, on its devices: the vocabulary's tables, and batches, of which a process reads its devices' rows."""

import collections
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from mlm_jax.config import Config, StageConfig
from mlm_jax.data.corpus import Corpus
from mlm_jax.data.loader import Rows, batches
from mlm_jax.data.ngrams import encode_ngrams
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import UserError
from mlm_jax.masking import NgramTable, VocabTables
from mlm_jax.sharding import ROWS, local_rows, place

STEPS_AHEAD = 2


def vocab_tables(cfg: Config, tokenizer: Tokenizer, ngrams: Sequence[str] = ()) -> VocabTables:
    """The tokenizer's tables, replicated over the current mesh, with those of `ngrams` where there are any."""
    tables = VocabTables.from_arrays(
        mask_id=tokenizer.mask_id,
        special_ids=tokenizer.special_ids,
        word_starts=tokenizer.word_starts(),
        vocab_size=cfg.model.vocab_size,
        ngrams=NgramTable.from_sequences(*encode_ngrams(ngrams, tokenizer)) if ngrams else None,
    )
    replicated: VocabTables = place(tables, jax.P())
    return replicated


def check_epochs(cfg: Config, corpus: Corpus) -> float:
    """How often a run passes over the training text, a part of a pass counted as that part.

    Raises:
        UserError: more often than `train.max_epochs`.
    """
    rows = {stage.seq_len: corpus.manifest["rows"][str(stage.seq_len)]["train"]["rows"] for stage in cfg.stages}
    epochs = sum(stage.steps * stage.batch_size / rows[stage.seq_len] for stage in cfg.stages)
    most = cfg.train.max_epochs
    if 0 < most < epochs:
        raise UserError(
            f"the stages pass {epochs:.2f} times over the {max(rows.values())} training rows of {corpus.path}, and "
            f"train.max_epochs={most}: multiply stages[…].steps by {most / epochs:.3f}, or give more text"
        )
    return float(epochs)


def device_batches(
    corpus: Corpus, stage: StageConfig, mesh: jax.sharding.Mesh, *, seed: int, num_steps: int, seen: int
) -> Iterator[dict[str, jax.Array]]:
    """Global batches of a stage, two ahead of the step.

    Args:
        seed: of the run.
        num_steps: batches to give.
        seen: examples already visited at this row length.
    """
    mine = local_rows(mesh, stage.batch_size)
    host_batches = batches(
        Rows(corpus.path, stage.seq_len, "train"),
        batch_size=stage.batch_size,
        start_step=0,
        num_steps=num_steps,
        first_position=seen,
        seed=seed,
        local_rows=mine,
    )
    sharding = jax.NamedSharding(mesh, jax.P(ROWS))
    places = {row: place for place, row in enumerate(mine)}

    def put(local: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(stage.batch_size)
            return local[places[start] : places[start] + stop - start]

        return jax.make_array_from_callback((stage.batch_size, *local.shape[1:]), sharding, shard)

    ahead: collections.deque[dict[str, jax.Array]] = collections.deque()
    for host in host_batches:
        ahead.append({name: put(array) for name, array in host.items()})
        if len(ahead) > STEPS_AHEAD:
            yield ahead.popleft()
    yield from ahead
