"""What a single field of a config may be."""

import operator
from collections.abc import Callable
from typing import Any

from mlm_jax.config.conversion import nearest
from mlm_jax.config.sections import TASKS, Config
from mlm_jax.errors import UserError

# Fields by the range that each must lie in; `stages.` stands for every stage.
_RANGES: dict[str, tuple[str, ...]] = {
    "positive": (
        "tokenizer.vocab_size",
        "tokenizer.sample_megabytes",
        "data.max_segments",
        "model.vocab_size",
        "model.num_layers",
        "model.embed_dim",
        "model.num_heads",
        "model.mlp_dim",
        "model.max_positions",
        "model.patch_size",
        "model.norm_eps",
        "model.init_std",
        "model.rope_base",
        "model.local_rope_base",
        "model.global_every",
        "optimizer.learning_rate",
        "optimizer.eps",
        "stages.steps",
        "stages.batch_size",
        "stages.accumulation",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.max_nonfinite",
        "evaluation.batch_size",
        "evaluation.max_rows",
        "masking.max_words",
        "span_boundary.max_targets",
        "span_boundary.position_dim",
        "diffusion.draws",
        "task.stride",
        "task.max_answer_tokens",
        "data.filters.ngram_words",
    ),
    "at least 0": (
        "data.max_words",
        "data.alpha",
        "tokenizer.sample_alpha",
        "model.position_offset",
        "model.num_token_types",
        "model.table_dim",
        "model.local_window",
        "model.image_size",
        "image_text.match_weight",
        "image_text.patch_weight",
        "rtd.generator_weight",
        "rtd.discriminator_weight",
        "optimizer.warmup_steps",
        "optimizer.decay_steps",
        "optimizer.weight_decay",
        "optimizer.clip_norm",
        "optimizer.end_factor",
        "stages.learning_rate",
        "stages.warmup_steps",
        "train.max_epochs",
        "stages.rope_base",
        "evaluation.every",
        "masking.schedule_start",
        "masking.schedule_steps",
        "span_boundary.loss_weight",
        "compute.head_chunk",
        "task.epochs",
        "task.patience",
        "data.filters.min_words",
        "data.filters.max_words",
        "data.filters.min_word_length",
        "data.filters.max_word_length",
        "data.filters.max_symbols",
    ),
    "in [0, 1)": (
        "data.validation_fraction",
        "model.dropout",
        "model.attention_dropout",
        "optimizer.b1",
        "optimizer.b2",
        "optimizer.ema_decay",
        "stages.mask_rate",
        "masking.rate_spread",
        "image_text.patch_mask_rate",
        "task.warmup",
        "task.dropout",
    ),
    "in (0, 1)": (
        "masking.rate",
        "masking.span_p",
        "evaluation.mask_rate",
        "diffusion.min_rate",
        "image_text.exchange_rate",
        "task.dev_fraction",
    ),
    "in (0, 1]": ("rtd.generator_size", "rtd.generator_layers", "diffusion.scored_share", "optimizer.layer_decay"),
    "in [0, 1]": (
        "masking.mask_prob",
        "masking.random_prob",
        "hybrid.causal_share",
        "data.filters.min_lettered_words",
        "data.filters.min_letters",
        "data.filters.max_digits",
        "data.filters.max_bullet_lines",
        "data.filters.max_ellipsis_lines",
        "data.filters.max_repeated_lines",
        "data.filters.min_language_probability",
        "data.filters.near_duplicates",
    ),
}
_HOLDS: dict[str, Callable[[float], bool]] = {
    "positive": lambda value: value > 0,
    "at least 0": lambda value: value >= 0,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in (0, 1)": lambda value: 0 < value < 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
}
# What the limit of a field is there for, where its name does not say it, and what to set.
_WHY = {
    "rtd.generator_size": ": the generator is a part of the model, and 1 makes it as wide",
    "rtd.generator_layers": ": the generator is a part of the model, and 1 gives it as many layers",
}

SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt", "one_minus_sqrt", "wsd")
CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("mlm", "span", "rtd", "diffusion", "hybrid", "image_text", *TASKS),
    "tokenizer.algorithm": ("unigram", "bpe", "characters", "regex", "code", "pretrained"),
    "data.image_resize": ("pad", "crop", "stretch"),
    "model.activation": ("gelu_tanh", "gelu_erf", "relu", "silu"),
    "model.positions": ("learned", "rope", "alibi"),
    "model.norm": ("layer", "rms"),
    "masking.policy": ("token", "whole_word", "span", "ngram", "pmi"),
    "masking.random_from": ("regular", "vocab"),
    "masking.schedule": ("constant", "linear", "cosine", "step"),
    "task.pooling": ("cls", "mean"),
    "task.activation": ("tanh", "gelu_erf", "gelu_tanh", "relu", "silu"),
    "rtd.embedding_sharing": ("tied", "disentangled"),
    "optimizer.name": ("adamw", "stable_adamw", "lamb"),
    "optimizer.schedule": SCHEDULES,
    "compute.dtype": ("auto", "float32", "bfloat16"),
    "compute.layers": ("auto", "scan", "unroll"),
    "compute.remat": ("none", "dots", "full"),
    "compute.attention": ("auto", "xla", "row", "splash", "cudnn"),
}


def check_fields(cfg: Config) -> None:
    """Checks every field by itself.

    Raises:
        UserError: naming the field, its value and what it may be.
    """
    for path, allowed in CHOICES.items():
        value: Any = cfg
        for name in path.split("."):
            value = getattr(value, name)
        require(value in allowed, f"{path}={value!r} is none of {', '.join(allowed)}{nearest(value, allowed)}")
    for limit, paths in _RANGES.items():
        for path in paths:
            section, _, name = path.partition(".")
            if section == "stages":
                found = [(f"stages[{index}].{name}", getattr(stage, name)) for index, stage in enumerate(cfg.stages)]
            else:
                found = [(path, operator.attrgetter(path)(cfg))]
            for where, value in found:
                require(_HOLDS[limit](value), f"{where}={value} must be {limit}{_WHY.get(path, '')}")


def require(condition: bool, message: str) -> None:
    """Raises the message as a UserError where the condition does not hold."""
    if not condition:
        raise UserError(message)
