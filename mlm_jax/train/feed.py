"""What a step takes, on its devices: the vocabulary's tables, and batches, of which a process reads its devices' rows."""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mlm_jax.config import Config, StageConfig
from mlm_jax.data.corpus import Corpus
from mlm_jax.data.loader import Examples, batches
from mlm_jax.data.mixture import example_shares
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
    """How often a run passes over the training text, a part of a pass counted as that part; of a mixture, the most of all.

    Raises:
        UserError: more often than `train.max_epochs`.
    """
    parts = [*corpus.parts.values()] or [corpus]
    epochs, rows = np.zeros(len(parts)), np.zeros(len(parts), int)
    for stage in cfg.stages:
        rows = np.array([part.manifest["rows"][str(stage.seq_len)]["train"]["rows"] for part in parts])
        shares = example_shares(corpus, cfg, stage) if corpus.parts else 1.0
        epochs += stage.steps * stage.batch_size * shares / rows
    most, worst = cfg.train.max_epochs, int(epochs.argmax())
    if 0 < most < epochs[worst]:
        raise UserError(
            f"the stages pass {epochs[worst]:.2f} times over the {rows[worst]} training rows of {parts[worst].path}, and "
            f"train.max_epochs={most}: multiply stages[…].steps by {most / epochs[worst]:.3f}, or give more text"
        )
    return float(epochs[worst])


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """The bytes of text that each id stands for, float32 [vocab_size]; 0 for special ids and beyond the tokenizer's."""
    return np.pad(tokenizer.byte_lengths(), (0, vocab_size - tokenizer.vocab_size)).astype(np.float32)


def device_batches(
    rows: Examples,
    stage: StageConfig,
    mesh: jax.sharding.Mesh,
    *,
    seed: int,
    start_step: int,
    num_steps: int,
    seen: Any,
    exchanged: float = 0.0,
) -> Iterator[dict[str, jax.Array]]:
    """Global batches of a stage, two ahead of the step.

    Args:
        seed: of the run.
        start_step: steps of the stage that are done.
        num_steps: batches to give.
        seen: examples visited at this row length before the stage, as `rows` counts them.
        exchanged: the share of the examples with images that are given another's.
    """
    mine = local_rows(mesh, stage.batch_size)
    host_batches = batches(
        rows,
        batch_size=stage.batch_size,
        start_step=start_step,
        num_steps=num_steps,
        first_position=seen,
        seed=seed,
        local_rows=mine,
        exchanged=exchanged,
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
