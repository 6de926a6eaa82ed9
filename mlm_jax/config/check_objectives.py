"""What the fields of masking and of each objective mean to each other and to the rest of a config."""

from mlm_jax.config.conversion import nearest
from mlm_jax.config.limits import require
from mlm_jax.config.sections import TASKS, Config, MaskingConfig, TaskConfig


def check_objectives(cfg: Config) -> None:
    """See `checks.check`. Of masking `check_masking` is to come first, before what a stage makes of it."""
    if cfg.objective == "diffusion":
        _check_diffusion(cfg)
    if cfg.objective == "hybrid":
        _check_hybrid(cfg)
    _check_images(cfg)
    _check_task(cfg)


def check_masking(cfg: Config) -> None:
    """See `checks.check`."""
    masking = cfg.masking
    require(
        cfg.objective != "span" or masking.policy in ("span", "ngram"),
        f"objective='span' predicts tokens from the ends of masked spans, of which masking.policy={masking.policy!r} "
        "makes none: set it to 'span' or 'ngram'",
    )
    require(
        (masking.policy == "pmi") == bool(masking.ngrams),
        f"masking.policy={masking.policy!r} with masking.ngrams={masking.ngrams!r}: "
        "the policy 'pmi' needs a list of n-grams, and no other policy uses one",
    )
    values = {name: getattr(masking, name) for name in ("rate", "mask_prob", "random_prob")}
    finals = {name: getattr(masking, f"final_{name}") for name in values}
    finals = {name: value for name, value in finals.items() if value != -1}
    require(
        (masking.schedule != "constant") == bool(finals),
        f"masking.schedule={masking.schedule!r} with "
        f"{', '.join(f'final_{name}={value}' for name, value in finals.items()) or 'no final value'}: "
        "a constant schedule has none, and every other has one or more of final_rate, final_mask_prob, final_random_prob",
    )
    require(
        masking.schedule_start < cfg.total_steps and (masking.schedule != "step" or masking.schedule_start > 0),
        f"masking.schedule_start={masking.schedule_start} must lie within the run's {cfg.total_steps} steps, and behind 0 "
        "for the schedule 'step'",
    )
    for names, shares in (("masking.", values), ("masking.final_", values | finals)):
        rate, spread = shares["rate"], masking.rate_spread
        require(spread < rate < 1 - spread, f"{names}rate={rate} with masking.rate_spread={spread} leaves (0, 1)")
        shown, random = shares["mask_prob"], shares["random_prob"]
        require(min(shown, random) >= 0, f"{names}mask_prob={shown} or {names}random_prob={random} is negative")
        require(shown + random <= 1 + 1e-9, f"{names}mask_prob={shown} and {names}random_prob={random} exceed 1 together")


def _check_diffusion(cfg: Config) -> None:
    rates = [stage.mask_rate for stage in cfg.stages]
    require(
        cfg.masking == MaskingConfig() and not any(rates),
        f"objective='diffusion' draws its own rates and shows every masked token as [MASK], but {cfg.masking} and "
        f"stages[…].mask_rate={rates} ask for others: leave masking and mask_rate out; see diffusion.min_rate",
    )


def _check_hybrid(cfg: Config) -> None:
    share = cfg.hybrid.causal_share
    require(
        not cfg.masking.include_special,
        "masking.include_special=True cannot be used with objective='hybrid': nothing comes before CLS to predict it from",
    )
    for index, stage in enumerate(cfg.stages):
        for name, part in (("causal", share), ("masked", 1.0 - share)):
            require(
                part == 0 or part * stage.batch_size >= 1,
                f"hybrid.causal_share={share} leaves some batches of stages[{index}].batch_size={stage.batch_size} "
                f"without a {name} row: use 0, 1, a share nearer to a half, or a larger batch",
            )


def _check_images(cfg: Config) -> None:
    model, objective = cfg.model, cfg.objective
    if not model.image_size:
        require(
            objective != "image_text",
            "objective='image_text' reads an image with each text, and model.image_size=0: set it to a side in pixels",
        )
        return
    require(
        objective in ("image_text", *TASKS),
        f"model.image_size={model.image_size} is for objective='image_text', and this is objective={objective!r}",
    )
    require(
        model.image_size % model.patch_size == 0,
        f"model.image_size={model.image_size} is no multiple of model.patch_size={model.patch_size}: an image is cut into "
        f"whole patches, as one of {-(-model.image_size // model.patch_size) * model.patch_size} would be",
    )
    require(
        model.positions == "learned" and model.local_window == 0,
        f"model.image_size={model.image_size} with model.positions={model.positions!r} and model.local_window="
        f"{model.local_window}: patches have learned positions and see all of the text: use 'learned' and 0",
    )
    require(
        objective != "image_text" or cfg.data.max_segments == 1,
        f"data.max_segments={cfg.data.max_segments}, and a row that has an image has one text: set it to 1",
    )
    rate = cfg.image_text.patch_mask_rate
    require(
        rate == 0 or 1 <= round(rate * model.num_patches) < model.num_patches,
        f"image_text.patch_mask_rate={rate} hides none or all of an image's {model.num_patches} patches",
    )


def _check_task(cfg: Config) -> None:
    task, kind = cfg.task, cfg.objective
    if kind not in TASKS:
        require(
            task == TaskConfig(),
            f"objective={kind!r} pre-trains, and the section task is for the objectives {', '.join(TASKS)}: set one, or "
            "leave task out",
        )
        return
    require(bool(task.train), f"objective={kind!r} needs task.train, a file to learn from")
    require(len(cfg.stages) == 1, f"objective={kind!r} has one stage, and {len(cfg.stages)} are given")
    metrics = TASKS[kind]
    require(
        task.metric in ("", *metrics),
        f"task.metric={task.metric!r} is none of {', '.join(metrics)}{nearest(task.metric, metrics)}",
    )
    repeated = [label for label in task.labels if task.labels.count(label) > 1]
    require(not repeated, f"task.labels has {repeated[:1]} twice")
    require(
        not task.labels or kind in ("classification", "tagging"), f"task.labels={task.labels} is not for objective={kind!r}"
    )
    weights = task.class_weights
    require(
        not weights or (kind == "classification" and len(weights) == len(task.labels) and min(weights) > 0),
        f"task.class_weights={weights} must be positive, one for each of task.labels={task.labels}, and objective="
        f"{kind!r} must be 'classification'",
    )
    require(
        task.activation == "tanh" or task.transform or (kind in ("classification", "regression") and task.pooling == "cls"),
        f"task.activation={task.activation!r} is for the dense layer of classification and regression with "
        f"task.pooling='cls', and objective={kind!r} with {task.pooling!r} has none: leave it out, or set task.transform",
    )
    require(
        task.transform or not task.transform_bias,
        "task.transform_bias=True is for the layer that task.transform adds: set both, or leave it out",
    )
    buckets = task.buckets
    require(
        buckets == tuple(sorted({*buckets})) and all(length >= 8 for length in buckets),
        f"task.buckets={buckets} must be lengths of 8 or more, each above the one before",
    )
