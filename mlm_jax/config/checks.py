"""Every relation between a config's fields that can be wrong without looking at data or devices."""

import re

from mlm_jax.config.check_data import check_data
from mlm_jax.config.check_objectives import check_masking, check_objectives
from mlm_jax.config.conversion import nearest
from mlm_jax.config.limits import SCHEDULES, check_fields, require
from mlm_jax.config.sections import Config, StageConfig


def check(cfg: Config) -> None:
    """Checks single fields first, then what they mean to each other.

    Raises:
        UserError: naming the field, its value, the limit and a fix.
    """
    require(len(cfg.stages) > 0, "a run needs at least one stage")
    check_fields(cfg)
    require(
        not cfg.reference_topology or bool(re.fullmatch(r"(\d+x )?\w+:\d+(x\d+)*", cfg.reference_topology)),
        f"reference_topology={cfg.reference_topology!r} is not like v5e:4x4, 2x v5e:16x16 or h200:1x8",
    )
    check_data(cfg)
    _check_model(cfg)
    _check_training(cfg)
    check_masking(cfg)
    for index, stage in enumerate(cfg.stages):
        _check_stage(cfg, f"stages[{index}]", stage)
    check_objectives(cfg)


def _check_model(cfg: Config) -> None:
    model, tokenizer, sharding = cfg.model, cfg.tokenizer, cfg.sharding
    require(
        model.embed_dim % model.num_heads == 0,
        f"model.embed_dim={model.embed_dim} is no multiple of model.num_heads={model.num_heads}",
    )
    require(
        tokenizer.algorithm != "pretrained" or bool(tokenizer.path),
        "tokenizer.algorithm='pretrained' needs tokenizer.path",
    )
    require(
        (tokenizer.algorithm == "regex") == bool(tokenizer.pattern),
        f"tokenizer.algorithm={tokenizer.algorithm!r} with tokenizer.pattern={tokenizer.pattern!r}: "
        "'regex' needs the pattern of a token, and no other algorithm uses one",
    )
    require(
        tokenizer.algorithm == "pretrained" or tokenizer.vocab_size <= model.vocab_size,
        f"tokenizer.vocab_size={tokenizer.vocab_size} exceeds model.vocab_size={model.vocab_size}: "
        "raise the model's or lower the tokenizer's",
    )
    sizes = [sharding.slice, sharding.data, sharding.fsdp, sharding.tensor]
    require(
        sizes.count(-1) <= 1 and all(size == -1 or size > 0 for size in sizes) and sharding.tensor > 0,
        f"sharding sizes {sizes} of slice, data, fsdp and tensor: positive; one of the first three may be -1, the devices "
        "that are left",
    )
    require(
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
                fix = ""
                if name == "vocab_size":
                    fix = f": set model.vocab_size={-(-size // ways) * ways}, as a model's may exceed its tokenizer's"
                require(ways == -1 or size % ways == 0, f"sharding.{axis}={ways} must divide {where}{name}={size}{fix}")


def _check_generator(cfg: Config) -> None:
    generator, heads = cfg.rtd.generator(cfg.model), cfg.model.num_heads
    require(
        generator.embed_dim > 0 and generator.mlp_dim > 0 and generator.embed_dim % generator.num_heads == 0,
        f"rtd.generator_size={cfg.rtd.generator_size} makes a generator of width {generator.embed_dim}, mlp "
        f"{generator.mlp_dim} and {generator.num_heads} head(s), which must divide the width: give it whole heads of the "
        f"model's {heads}, as rtd.generator_size={generator.num_heads / heads:.4g} does",
    )


def _check_architecture(cfg: Config) -> None:
    model = cfg.model
    for where, network in cfg.networks.items():
        require(
            model.positions != "rope" or network.head_dim % 2 == 0,
            f"model.positions='rope' turns pairs of dimensions, and {where}heads have {network.head_dim}: choose "
            "embed_dim and num_heads so that it is even",
        )
        require(
            model.first_norm or network.num_layers > 1,
            f"model.first_norm=False leaves {where}num_layers=1 without any norm before attention: use 2 layers or more",
        )
    require(
        model.positions != "alibi" or model.local_window == 0,
        f"model.positions='alibi' with model.local_window={model.local_window}: local layers are for 'rope' and 'learned'",
    )
    require(
        model.positions == "learned" or model.position_offset == 0,
        f"model.position_offset={model.position_offset} is for a table of positions, and model.positions="
        f"{model.positions!r} has none: leave it out",
    )
    require(
        model.first_norm or (model.pre_norm and model.embedding_norm),
        f"model.first_norm=False with model.pre_norm={model.pre_norm} and model.embedding_norm={model.embedding_norm}: the "
        "first sublayer can only do without a norm before it where the embeddings have one",
    )


def _check_training(cfg: Config) -> None:
    optimizer = cfg.optimizer
    require(
        "wsd" not in (optimizer.schedule, *(stage.schedule for stage in cfg.stages)) or optimizer.decay_steps > 0,
        "the schedule 'wsd' needs optimizer.decay_steps > 0",
    )


def _check_stage(cfg: Config, where: str, stage: StageConfig) -> None:
    require(stage.seq_len >= 8, f"{where}.seq_len={stage.seq_len} is below 8")
    require(
        stage.seq_len <= cfg.model.max_positions,
        f"{where}.seq_len={stage.seq_len} exceeds model.max_positions={cfg.model.max_positions}",
    )
    require(
        stage.batch_size % stage.accumulation == 0,
        f"{where}.batch_size={stage.batch_size} is no multiple of {where}.accumulation={stage.accumulation}",
    )
    require(
        stage.schedule in ("", *SCHEDULES),
        f"{where}.schedule={stage.schedule!r} is none of {', '.join(SCHEDULES)}{nearest(stage.schedule, SCHEDULES)}",
    )
    require(
        not stage.schedule or stage.learning_rate > 0,
        f"{where}.schedule={stage.schedule!r} begins a curve of its own, which needs {where}.learning_rate, its peak",
    )
    require(
        stage.rope_base == 0 or cfg.model.positions == "rope",
        f"{where}.rope_base={stage.rope_base} with model.positions={cfg.model.positions!r}: only 'rope' has a base",
    )
    rate, spread = cfg.mask_rate(stage), cfg.masking.rate_spread
    require(spread < rate < 1 - spread, f"{where}.mask_rate={rate} with masking.rate_spread={spread} leaves (0, 1)")
    rates = [rate] if stage.mask_rate else [rate, cfg.masking.final_rate]
    budget = (min(rate for rate in rates if rate != -1) - spread) * stage.seq_len
    if cfg.masking.policy in ("span", "ngram"):
        mean = sum(n * share for n, share in enumerate(cfg.masking.span_lengths, start=1))
        require(
            budget >= mean,
            f"masking.policy={cfg.masking.policy!r} draws {mean:.1f} words at a time, and rows of {where}.seq_len="
            f"{stage.seq_len} have a budget of {budget:.1f} tokens: raise one of the two or lower masking.max_words",
        )
