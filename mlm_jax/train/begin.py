"""The parameters that a run begins with where `init_from` names another run's workdir; else those drawn at random."""

import dataclasses
import logging

import jax
import jax.numpy as jnp

from mlm_jax.config import TASKS, Config, ModelConfig
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import UserError
from mlm_jax.objectives import Trainable, make_objective
from mlm_jax.train.checkpoint import load_params
from mlm_jax.train.state import TrainState
from mlm_jax.workdir import Workdir

logger = logging.getLogger(__name__)

# What a run may change of the model that it begins with: what is only for training, and how positions are rotated.
_MAY_DIFFER = ("dropout", "attention_dropout", "init_std", "init_truncated", "init_scaled", "rope_base", "local_rope_base")


def begin(state: TrainState, objective: Trainable, tokenizer: Tokenizer) -> TrainState:
    """The state at step 0: as it was drawn, or with the parameters (or their average) of the run that `init_from` names.

    Raises:
        UserError: that is no run, or one of another architecture, objective or tokenizer.
    """
    cfg = objective.cfg
    if not cfg.init_from:
        return state
    source = Workdir(cfg.init_from)
    theirs = source.read_config()
    if theirs.objective in TASKS:
        raise UserError(f"init_from={cfg.init_from} is fine-tuned for {theirs.objective}: begin with a pre-trained run")
    _check_models(cfg, theirs)
    drawn = jax.eval_shape(make_objective(theirs, objective.compute).init, jax.random.key(0))
    if jax.tree.map(lambda leaf: leaf.shape, drawn) != jax.tree.map(lambda leaf: leaf.shape, state.params):
        raise UserError(
            f"init_from={cfg.init_from} is a run of objective={theirs.objective!r}, which has other parameters than "
            f"{cfg.objective!r}: begin with a run of the same objective"
        )
    if source.read_tokenizer().fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"init_from={cfg.init_from} has another tokenizer, with other ids: set tokenizer.algorithm=pretrained "
            f"and tokenizer.path to the file in {source.path / 'tokenizer'}"
        )
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params)
    params, step = load_params(source, abstract, ema=theirs.optimizer.ema_decay > 0)
    logger.info("beginning with the parameters of %s at step %d", source.path, step)
    # Each leaf is its own buffer: a donated state must not hold one array twice.
    return dataclasses.replace(state, params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params))


def _check_models(cfg: Config, theirs: Config) -> None:
    for field in dataclasses.fields(ModelConfig):
        if field.name in _MAY_DIFFER or (field.name == "max_positions" and cfg.model.positions != "learned"):
            continue
        wanted, found = getattr(cfg.model, field.name), getattr(theirs.model, field.name)
        if wanted != found:
            raise UserError(
                f"model.{field.name}={wanted!r}, and init_from={cfg.init_from} has {found!r}: a run goes on with the "
                "architecture that it begins with"
            )
    if cfg.objective == theirs.objective == "rtd" and cfg.rtd.generator(cfg.model) != theirs.rtd.generator(cfg.model):
        raise UserError(f"rtd makes another generator than init_from={cfg.init_from} has: copy its section")
