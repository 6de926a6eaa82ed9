"""`mlm-jax extend`: a run with new words in its vocabulary, to go on with its pre-training on another kind of text."""

import dataclasses
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mlm_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    ShardingConfig,
    StageConfig,
    TokenizerConfig,
    TrainConfig,
    check,
)
from mlm_jax.data import encode
from mlm_jax.data.atomic import new_folder
from mlm_jax.data.sources import open_source
from mlm_jax.errors import UserError
from mlm_jax.extend.words import extend_tokenizer, find_words
from mlm_jax.inference import TrainedRun, open_run
from mlm_jax.interop.load import write_run
from mlm_jax.interop.recipe import RECIPE, write_recipe
from mlm_jax.objectives import make_objective
from mlm_jax.sharding import make_mesh
from mlm_jax.workdir import Workdir

logger = logging.getLogger(__name__)

NEW_WORDS = "new_words.txt"
_ROWS = 128  # a table that grows has a multiple of so many rows


def extend_run(
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    words: str | os.PathLike[str] | None = None,
    corpus: str | None = None,
    count: int = 1000,
    sample_megabytes: float = 100.0,
) -> dict[str, Any]:
    """Writes a workdir with the parameters of a run and those of new words, whole or not at all.

    Args:
        workdir: a pre-trained or an imported run.
        out: a new or empty folder.
        words: a text file, a word a line.
        corpus: in its place a source, of which the `count` most frequent words are taken that the tokenizer cuts into
            three pieces or more.
        sample_megabytes: text that is read of the source for this.

    Raises:
        UserError: words that cannot be added; or a run that cannot be extended.
        MachineError: the workdir cannot be written.
    """
    if "://" in os.fspath(out):
        raise UserError(f"{out}: extend works on local folders; copy it to its bucket afterwards")
    final = pathlib.Path(out)
    with open_run(workdir) as run:
        params = jax.device_get(run.params)
    if words is not None:
        chosen = _read_words(pathlib.Path(words))
    else:
        assert corpus is not None
        chosen = _words_of(run, corpus, count, sample_megabytes)
    extended = extend_tokenizer(run.tokenizer, chosen)
    tokenizer = extended.tokenizer
    cfg = _config(run, final.absolute() / "tokenizer" / tokenizer.file_name, tokenizer.vocab_size)
    params = extend_params(params, extended.pieces, first=run.tokenizer.vocab_size, rows=cfg.model.vocab_size)
    with new_folder(final) as temporary, jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        objective = make_objective(cfg, run.objective.compute, mask_id=tokenizer.mask_id)
        write_run(Workdir(temporary), cfg, tokenizer, objective, params)
        origin = f"{pathlib.Path(workdir).name} with {len(chosen)} new words"
        write_recipe(temporary / RECIPE, cfg, final, origin)
        (temporary / NEW_WORDS).write_text("".join(f"{word}\n" for word in chosen), encoding="utf-8")
    return {
        "workdir": str(final),
        "recipe": str(final / RECIPE),
        "words": len(chosen),
        "first_words": chosen[:10],
        "tokenizer_ids": tokenizer.vocab_size,
        "vocab_size": cfg.model.vocab_size,
    }


def extend_params(params: Any, pieces: Sequence[np.ndarray], *, first: int, rows: int) -> Any:
    """The parameters of a run whose tables and output biases have the rows of new words.

    A word's row is the mean of its pieces', of every table. Its bias is the lowest of theirs: a bias is near the logarithm
    of how frequent a token is, and a word is no more frequent than its rarest piece. Rows behind the last word, which
    no text has, are the mean of all and have the lowest bias.

    Args:
        params: a run's, in NumPy.
        pieces: of each word, the ids whose place it takes.
        first: the id of the first word; rows that the run has there are of no token and are written over.
        rows: of the new tables.
    """

    def extend(path: Any, old: np.ndarray) -> np.ndarray:
        name = path[-1].key
        if not name.endswith(("_VD", "_bias_V")):
            return old
        kept = old[:first]
        combine = np.min if name.endswith("_bias_V") else np.mean
        new = [combine(kept[ids], axis=0) for ids in pieces]
        spare = [combine(kept, axis=0)] * (rows - first - len(pieces))
        return np.concatenate([kept, np.stack([*new, *spare]).astype(old.dtype)])

    return jax.tree_util.tree_map_with_path(extend, params)


def _config(run: TrainedRun, tokenizer: pathlib.Path, ids: int) -> Config:
    """What the run computes, and defaults for how it is trained; its schedules are over."""
    rows = run.cfg.model.vocab_size
    stage = run.cfg.stages[run.cfg.stage_of(run.step)]
    masking = dataclasses.replace(
        run.cfg.masking,
        schedule="constant",
        schedule_start=0,
        schedule_steps=0,
        final_rate=-1.0,
        final_mask_prob=-1.0,
        final_random_prob=-1.0,
    )
    cfg = dataclasses.replace(
        run.cfg,
        init_from="",
        reference_topology="",
        data=DataConfig(),
        tokenizer=TokenizerConfig(algorithm="pretrained", path=str(tokenizer)),
        model=dataclasses.replace(run.cfg.model, vocab_size=rows if ids <= rows else -(-ids // _ROWS) * _ROWS),
        masking=masking,
        optimizer=OptimizerConfig(),
        stages=(StageConfig(seq_len=stage.seq_len),),
        sharding=ShardingConfig(),
        train=TrainConfig(),
        evaluation=EvaluationConfig(),
    )
    check(cfg)
    return cfg


def _read_words(file: pathlib.Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"--words={file}: there is no such file") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise UserError(f"--words={file} is no text file in UTF-8, a word a line: {error}") from error
    words = [line.strip() for line in lines if line.strip()]
    if not words:
        raise UserError(f"--words={file} holds no words: write one a line")
    repeated = [word for word in words if words.count(word) > 1] if len({*words}) < len(words) else []
    if repeated:
        raise UserError(f"--words={file} has {repeated[0]!r} twice")
    return words


def _words_of(run: TrainedRun, corpus: str, count: int, sample_megabytes: float) -> list[str]:
    if count < 1 or sample_megabytes <= 0:
        raise UserError(f"--count={count} and --sample-megabytes={sample_megabytes} must be positive")
    texts, _ = encode.sample(open_source(corpus), round(sample_megabytes * 1e6), 0)
    found = find_words(run.tokenizer, (text.decode() for text in texts), count)
    logger.info("words of %s: from %s, %d times, to %s, %d times", corpus, *found[0], *found[-1])
    return [word for word, _ in found]
