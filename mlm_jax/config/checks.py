"""Every relation between a config's fields that can be wrong without looking at data or devices."""

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from mlm_jax.config.conversion import nearest
from mlm_jax.config.sections import TASKS, Config, DataConfig, MaskingConfig, StageConfig, TaskConfig
from mlm_jax.errors import UserError
from mlm_jax.segments import MOST_LANGUAGES

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


def check(cfg: Config) -> None:
    """Checks single fields first, then what they mean to each other.

    Raises:
        UserError: naming the field, its value, the limit and a fix.
    """
    _check_choices(cfg)
    _require(len(cfg.stages) > 0, "a run needs at least one stage")
    for limit, paths in _RANGES.items():
        for path in paths:
            section, _, name = path.partition(".")
            if section == "stages":
                found = [(f"stages[{index}].{name}", getattr(stage, name)) for index, stage in enumerate(cfg.stages)]
            else:
                found = [(path, operator.attrgetter(path)(cfg))]
            for where, value in found:
                _require(_HOLDS[limit](value), f"{where}={value} must be {limit}")
    _require(
        not cfg.reference_topology or bool(re.fullmatch(r"(\d+x )?\w+:\d+(x\d+)*", cfg.reference_topology)),
        f"reference_topology={cfg.reference_topology!r} is not like v5e:4x4, 2x v5e:16x16 or h200:1x8",
    )
    _check_mixture(cfg)
    _check_filters(cfg.data)
    _check_model(cfg)
    _check_training(cfg)
    _check_masking(cfg)
    for index, stage in enumerate(cfg.stages):
        _check_stage(cfg, f"stages[{index}]", stage)
    if cfg.objective == "diffusion":
        _check_diffusion(cfg)
    if cfg.objective == "hybrid":
        _check_hybrid(cfg)
    _check_images(cfg)
    _check_task(cfg)


def _check_mixture(cfg: Config) -> None:
    data = cfg.data
    names = [source.name for source in data.sources]
    _require(
        not names or data.source == DataConfig().source,
        f"data.source={data.source!r} and data.sources={names} are both given: put the one among the others",
    )
    for index, name in enumerate(names):
        _require(
            bool(re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII)),
            f"data.sources[{index}].name={name!r} names a folder: letters, digits, '.', '_' and '-' only",
        )
        _require(names.count(name) == 1, f"data.sources has the name {name!r} more than once: rename one of them")
    _check_languages(cfg)
    _check_weights("data.sources[…].weight", names, [source.weight for source in data.sources])
    for index, stage in enumerate(cfg.stages):
        if stage.weights:
            where = f"stages[{index}].weights"
            _require(
                len(stage.weights) == len(names),
                f"{where}={stage.weights} must have one weight for each of data.sources={names}",
            )
            _check_weights(where, names, stage.weights)


def _check_languages(cfg: Config) -> None:
    known = cfg.model.languages
    _require(
        len({*known}) == len(known) <= MOST_LANGUAGES and all(known) and not any("," in name for name in known),
        f"model.languages={known} must be up to {MOST_LANGUAGES} different names without commas",
    )
    for index, source in enumerate(cfg.data.sources):
        names = source.language.split(",") if source.language else []
        where = f"data.sources[{index}].language={source.language!r}"
        for name in names:
            _require(name in known, f"{where} is not of model.languages={known}{nearest(name, known)}: add it there")
        count = 2 if source.uri.startswith("pairs:") else 1
        _require(
            not names or len(names) == count,
            f"{where} must name {count} for {source.uri}, the first part's first: {'en,de' if count == 2 else 'en'}",
        )


def _check_filters(data: DataConfig) -> None:
    filters, where = data.filters, "data.filters."
    for least, most in (("min_words", "max_words"), ("min_word_length", "max_word_length")):
        low, high = getattr(filters, least), getattr(filters, most)
        _require(not high or low <= high, f"{where}{least}={low} and {where}{most}={high} leave no document: exchange them")
    _require(
        not filters.min_language_probability or bool(filters.languages),
        f"{where}min_language_probability={filters.min_language_probability} is of {where}languages, which names none: add "
        "them, as in ('en',)",
    )
    pairs = [uri for uri in (data.source, *(source.uri for source in data.sources)) if uri.startswith("pairs:")]
    _require(
        not (filters.languages and pairs),
        f"{where}languages={filters.languages} cannot be told of {', '.join(pairs)}, whose documents have two languages: "
        "leave it out",
    )
    _require(
        not filters.near_duplicates or (data.deduplicate and filters.minhashes >= 16),
        f"{where}near_duplicates={filters.near_duplicates} needs data.deduplicate=True, not {data.deduplicate}, and "
        f"{where}minhashes of 16 or more, not {filters.minhashes}",
    )


def _check_weights(where: str, names: Sequence[str], weights: Sequence[float]) -> None:
    for name, weight in zip(names, weights, strict=True):
        _require(weight >= 0, f"{where}: {name} has {weight}, and a weight is at least 0")
    _require(not names or sum(weights) > 0, f"{where}: the weights of {', '.join(names)} sum to zero; make one positive")


def _check_model(cfg: Config) -> None:
    model, tokenizer, sharding = cfg.model, cfg.tokenizer, cfg.sharding
    _require(
        model.embed_dim % model.num_heads == 0,
        f"model.embed_dim={model.embed_dim} is no multiple of model.num_heads={model.num_heads}",
    )
    _require(
        tokenizer.algorithm != "pretrained" or bool(tokenizer.path),
        "tokenizer.algorithm='pretrained' needs tokenizer.path",
    )
    _require(
        (tokenizer.algorithm == "regex") == bool(tokenizer.pattern),
        f"tokenizer.algorithm={tokenizer.algorithm!r} with tokenizer.pattern={tokenizer.pattern!r}: "
        "'regex' needs the pattern of a token, and no other algorithm uses one",
    )
    _require(
        tokenizer.algorithm == "pretrained" or tokenizer.vocab_size <= model.vocab_size,
        f"tokenizer.vocab_size={tokenizer.vocab_size} exceeds model.vocab_size={model.vocab_size}: "
        "raise the model's or lower the tokenizer's",
    )
    sizes = [sharding.slice, sharding.data, sharding.fsdp, sharding.tensor]
    _require(
        sizes.count(-1) <= 1 and all(size == -1 or size > 0 for size in sizes) and sharding.tensor > 0,
        f"sharding sizes {sizes} of slice, data, fsdp and tensor: positive; one of the first three may be -1, the devices "
        "that are left",
    )
    _require(
        not sharding.zero or sharding.data != 1,
        "sharding.zero=True divides the state over data, but sharding.data=1: set it to -1 or leave zero out",
    )
    if cfg.objective == "rtd":
        _check_generator(cfg)
    _check_architecture(cfg)
    for axis, fields in (("tensor", ("num_heads", "mlp_dim", "vocab_size")), ("fsdp", ("embed_dim", "table_dim"))):
        for where, network in cfg.networks.items():
            for name in fields:
                ways, size = getattr(sharding, axis), getattr(network, name)
                _require(ways == -1 or size % ways == 0, f"sharding.{axis}={ways} must divide {where}{name}={size}")


def _check_generator(cfg: Config) -> None:
    generator, heads = cfg.rtd.generator(cfg.model), cfg.model.num_heads
    _require(
        generator.embed_dim > 0 and generator.mlp_dim > 0 and generator.embed_dim % generator.num_heads == 0,
        f"rtd.generator_size={cfg.rtd.generator_size} makes a generator of width {generator.embed_dim}, mlp "
        f"{generator.mlp_dim} and {generator.num_heads} head(s), which must divide the width: give it whole heads of the "
        f"model's {heads}, as rtd.generator_size={generator.num_heads / heads:.4g} does",
    )


def _check_architecture(cfg: Config) -> None:
    model = cfg.model
    for where, network in cfg.networks.items():
        _require(
            model.positions != "rope" or network.head_dim % 2 == 0,
            f"model.positions='rope' turns pairs of dimensions, and {where}heads have {network.head_dim}: choose "
            "embed_dim and num_heads so that it is even",
        )
        _require(
            model.first_norm or network.num_layers > 1,
            f"model.first_norm=False leaves {where}num_layers=1 without any norm before attention: use 2 layers or more",
        )
    _require(
        model.positions != "alibi" or model.local_window == 0,
        f"model.positions='alibi' with model.local_window={model.local_window}: local layers are for 'rope' and 'learned'",
    )
    _require(
        model.positions == "learned" or model.position_offset == 0,
        f"model.position_offset={model.position_offset} is for a table of positions, and model.positions="
        f"{model.positions!r} has none: leave it out",
    )
    _require(
        model.first_norm or (model.pre_norm and model.embedding_norm),
        f"model.first_norm=False with model.pre_norm={model.pre_norm} and model.embedding_norm={model.embedding_norm}: the "
        "first sublayer can only do without a norm before it where the embeddings have one",
    )


def _check_training(cfg: Config) -> None:
    optimizer = cfg.optimizer
    _require(
        "wsd" not in (optimizer.schedule, *(stage.schedule for stage in cfg.stages)) or optimizer.decay_steps > 0,
        "the schedule 'wsd' needs optimizer.decay_steps > 0",
    )


def _check_masking(cfg: Config) -> None:
    masking = cfg.masking
    _require(
        cfg.objective != "span" or masking.policy in ("span", "ngram"),
        f"objective='span' predicts tokens from the ends of masked spans, of which masking.policy={masking.policy!r} "
        "makes none: set it to 'span' or 'ngram'",
    )
    _require(
        (masking.policy == "pmi") == bool(masking.ngrams),
        f"masking.policy={masking.policy!r} with masking.ngrams={masking.ngrams!r}: "
        "the policy 'pmi' needs a list of n-grams, and no other policy uses one",
    )
    values = {name: getattr(masking, name) for name in ("rate", "mask_prob", "random_prob")}
    finals = {name: getattr(masking, f"final_{name}") for name in values}
    finals = {name: value for name, value in finals.items() if value != -1}
    _require(
        (masking.schedule != "constant") == bool(finals),
        f"masking.schedule={masking.schedule!r} with "
        f"{', '.join(f'final_{name}={value}' for name, value in finals.items()) or 'no final value'}: "
        "a constant schedule has none, and every other has one or more of final_rate, final_mask_prob, final_random_prob",
    )
    _require(
        masking.schedule_start < cfg.total_steps and (masking.schedule != "step" or masking.schedule_start > 0),
        f"masking.schedule_start={masking.schedule_start} must lie within the run's {cfg.total_steps} steps, and behind 0 "
        "for the schedule 'step'",
    )
    for names, shares in (("masking.", values), ("masking.final_", values | finals)):
        rate, spread = shares["rate"], masking.rate_spread
        _require(spread < rate < 1 - spread, f"{names}rate={rate} with masking.rate_spread={spread} leaves (0, 1)")
        shown, random = shares["mask_prob"], shares["random_prob"]
        _require(min(shown, random) >= 0, f"{names}mask_prob={shown} or {names}random_prob={random} is negative")
        _require(shown + random <= 1 + 1e-9, f"{names}mask_prob={shown} and {names}random_prob={random} exceed 1 together")


def _check_stage(cfg: Config, where: str, stage: StageConfig) -> None:
    _require(stage.seq_len >= 8, f"{where}.seq_len={stage.seq_len} is below 8")
    _require(
        stage.seq_len <= cfg.model.max_positions,
        f"{where}.seq_len={stage.seq_len} exceeds model.max_positions={cfg.model.max_positions}",
    )
    _require(
        stage.batch_size % stage.accumulation == 0,
        f"{where}.batch_size={stage.batch_size} is no multiple of {where}.accumulation={stage.accumulation}",
    )
    _require(
        stage.schedule in ("", *_SCHEDULES),
        f"{where}.schedule={stage.schedule!r} is none of {', '.join(_SCHEDULES)}{nearest(stage.schedule, _SCHEDULES)}",
    )
    _require(
        not stage.schedule or stage.learning_rate > 0,
        f"{where}.schedule={stage.schedule!r} begins a curve of its own, which needs {where}.learning_rate, its peak",
    )
    _require(
        stage.rope_base == 0 or cfg.model.positions == "rope",
        f"{where}.rope_base={stage.rope_base} with model.positions={cfg.model.positions!r}: only 'rope' has a base",
    )
    rate, spread = cfg.mask_rate(stage), cfg.masking.rate_spread
    _require(spread < rate < 1 - spread, f"{where}.mask_rate={rate} with masking.rate_spread={spread} leaves (0, 1)")
    rates = [rate] if stage.mask_rate else [rate, cfg.masking.final_rate]
    budget = min(rate for rate in rates if rate != -1) * stage.seq_len
    if cfg.masking.policy in ("span", "ngram"):
        mean = sum(n * share for n, share in enumerate(cfg.masking.span_lengths, start=1))
        _require(
            budget >= mean,
            f"masking.policy={cfg.masking.policy!r} draws {mean:.1f} words at a time, and rows of {where}.seq_len="
            f"{stage.seq_len} have a budget of {budget:.1f} tokens: raise one of the two or lower masking.max_words",
        )


def _check_diffusion(cfg: Config) -> None:
    rates = [stage.mask_rate for stage in cfg.stages]
    _require(
        cfg.masking == MaskingConfig() and not any(rates),
        f"objective='diffusion' draws its own rates and shows every masked token as [MASK], but {cfg.masking} and "
        f"stages[…].mask_rate={rates} ask for others: leave masking and mask_rate out; see diffusion.min_rate",
    )


def _check_hybrid(cfg: Config) -> None:
    share = cfg.hybrid.causal_share
    _require(
        not cfg.masking.include_special,
        "masking.include_special=True cannot be used with objective='hybrid': nothing comes before CLS to predict it from",
    )
    for index, stage in enumerate(cfg.stages):
        for name, part in (("causal", share), ("masked", 1.0 - share)):
            _require(
                part == 0 or part * stage.batch_size >= 1,
                f"hybrid.causal_share={share} leaves some batches of stages[{index}].batch_size={stage.batch_size} "
                f"without a {name} row: use 0, 1, a share nearer to a half, or a larger batch",
            )


def _check_images(cfg: Config) -> None:
    model, objective = cfg.model, cfg.objective
    if not model.image_size:
        _require(
            objective != "image_text",
            "objective='image_text' reads an image with each text, and model.image_size=0: set it to a side in pixels",
        )
        return
    _require(
        objective in ("image_text", *TASKS),
        f"model.image_size={model.image_size} is for objective='image_text', and this is objective={objective!r}",
    )
    _require(
        model.image_size % model.patch_size == 0,
        f"model.image_size={model.image_size} is no multiple of model.patch_size={model.patch_size}: an image is cut into "
        f"whole patches, as one of {-(-model.image_size // model.patch_size) * model.patch_size} would be",
    )
    _require(
        model.positions == "learned" and model.local_window == 0,
        f"model.image_size={model.image_size} with model.positions={model.positions!r} and model.local_window="
        f"{model.local_window}: patches have learned positions and see all of the text: use 'learned' and 0",
    )
    _require(
        objective != "image_text" or cfg.data.max_segments == 1,
        f"data.max_segments={cfg.data.max_segments}, and a row that has an image has one text: set it to 1",
    )
    rate = cfg.image_text.patch_mask_rate
    _require(
        rate == 0 or 1 <= round(rate * model.num_patches) < model.num_patches,
        f"image_text.patch_mask_rate={rate} hides none or all of an image's {model.num_patches} patches",
    )


def _check_task(cfg: Config) -> None:
    task, kind = cfg.task, cfg.objective
    if kind not in TASKS:
        _require(
            task == TaskConfig(),
            f"objective={kind!r} pre-trains, and the section task is for the objectives {', '.join(TASKS)}: set one, or "
            "leave task out",
        )
        return
    _require(bool(task.train), f"objective={kind!r} needs task.train, a file to learn from")
    _require(len(cfg.stages) == 1, f"objective={kind!r} has one stage, and {len(cfg.stages)} are given")
    metrics = TASKS[kind]
    _require(
        task.metric in ("", *metrics),
        f"task.metric={task.metric!r} is none of {', '.join(metrics)}{nearest(task.metric, metrics)}",
    )
    repeated = [label for label in task.labels if task.labels.count(label) > 1]
    _require(not repeated, f"task.labels has {repeated[:1]} twice")
    _require(
        not task.labels or kind in ("classification", "tagging"), f"task.labels={task.labels} is not for objective={kind!r}"
    )
    weights = task.class_weights
    _require(
        not weights or (kind == "classification" and len(weights) == len(task.labels) and min(weights) > 0),
        f"task.class_weights={weights} must be positive, one for each of task.labels={task.labels}, and objective="
        f"{kind!r} must be 'classification'",
    )
    _require(
        task.activation == "tanh" or task.transform or (kind in ("classification", "regression") and task.pooling == "cls"),
        f"task.activation={task.activation!r} is for the dense layer of classification and regression with "
        f"task.pooling='cls', and objective={kind!r} with {task.pooling!r} has none: leave it out, or set task.transform",
    )
    _require(
        task.transform or not task.transform_bias,
        "task.transform_bias=True is for the layer that task.transform adds: set both, or leave it out",
    )
    buckets = task.buckets
    _require(
        buckets == tuple(sorted({*buckets})) and all(length >= 8 for length in buckets),
        f"task.buckets={buckets} must be lengths of 8 or more, each above the one before",
    )


_SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt", "one_minus_sqrt", "wsd")
_CHOICES: dict[str, tuple[str, ...]] = {
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
    "optimizer.schedule": _SCHEDULES,
    "compute.dtype": ("auto", "float32", "bfloat16"),
    "compute.layers": ("auto", "scan", "unroll"),
    "compute.remat": ("none", "dots", "full"),
    "compute.attention": ("auto", "xla", "row", "splash", "cudnn"),
}


def _check_choices(cfg: Config) -> None:
    for path, allowed in _CHOICES.items():
        value: Any = cfg
        for name in path.split("."):
            value = getattr(value, name)
        _require(value in allowed, f"{path}={value!r} is none of {', '.join(allowed)}{nearest(value, allowed)}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
