"""Configuration: ml_collections recipes in, frozen dataclasses out, every check before a device is touched.

Each section of a recipe has exactly one dataclass here, and a field's default is written here and nowhere else. A recipe
(`configs/*.py`) names only what it sets; the command line overrides any field with `--config.section.field=value`.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import math
import pathlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from mlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it is split and packed. What it holds decides a prepared corpus's identity."""

    source: str = "builtin:python_docs"  # URI: builtin:, files:, tfds:, hf:
    validation_fraction: float = 0.01  # share of documents held out, chosen by the hash of their text
    deduplicate: bool = True  # drop exact repetitions of a document
    max_segments: int = 16  # documents (or parts of one) that may share a row


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Trained by `prepare` (unigram, bpe), or an existing model file (pretrained)."""

    algorithm: str = "unigram"  # unigram | bpe | pretrained
    path: str = ""  # for pretrained: a SentencePiece .model or a tokenizer.json
    vocab_size: int = 8192  # for unigram and bpe; a pretrained tokenizer brings its own
    character_coverage: float = 0.9995
    byte_fallback: bool = True
    lowercase: bool = False
    sample_megabytes: float = 10.0  # text that the tokenizer is trained on, sampled over the whole source


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The encoder's architecture. The vocabulary may exceed the tokenizer's (padding to a multiple of 128)."""

    vocab_size: int = 8192
    num_layers: int = 4
    embed_dim: int = 256
    num_heads: int = 4
    mlp_dim: int = 1024
    max_positions: int = 512
    position_offset: int = 0  # RoBERTa: 2, its tables start after the padding id
    num_token_types: int = 0  # BERT: 2; 0 leaves the table out
    activation: str = "gelu_tanh"  # gelu_tanh | gelu_erf | relu
    norm_eps: float = 1e-12
    dropout: float = 0.0
    attention_dropout: float = 0.0
    init_std: float = 0.02
    init_truncated: bool = True  # BERT: truncated normal; Hugging Face and RoBERTa: plain normal
    tie_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """What is predicted and what the encoder sees in its place."""

    policy: str = "token"  # token | whole_word
    rate: float = 0.15  # of the row's real tokens
    mask_prob: float = 0.8  # of the chosen positions: shown as [MASK]
    random_prob: float = 0.1  # shown as a random token; the rest is shown unchanged
    random_from: str = "regular"  # regular | vocab: whether random tokens may be special ones (BERT: vocab)
    include_special: bool = False  # whether CLS and SEP may be chosen (fairseq's RoBERTa does)
    static: bool = False  # the same mask in every epoch (BERT's original data), for ablation


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and the learning-rate curve over the whole run (a stage may restart it)."""

    name: str = "adamw"  # adamw | lamb
    learning_rate: float = 1e-4  # peak
    schedule: str = "linear"  # constant | linear | cosine | inverse_sqrt | wsd
    warmup_steps: int = 0
    decay_steps: int = 0  # wsd only: length of the final decay
    end_factor: float = 0.0  # final learning rate as a fraction of the peak
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.01
    decay_embeddings: bool = True  # norms and biases never decay
    bias_correction: bool = True  # BERT's own Adam: False
    clip_norm: float = 1.0  # global gradient norm; 0 is off
    ema_decay: float = 0.0  # exponential moving average of the parameters; 0 keeps none


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One piece of a run: so many steps on rows of one length."""

    steps: int = 1000
    seq_len: int = 128
    batch_size: int = 256  # rows in a global step
    accumulation: int = 1  # micro-batches that a step is split into
    learning_rate: float = 0.0  # above 0: the schedule restarts in this stage with this peak
    warmup_steps: int = 0  # of a restarted schedule
    mask_rate: float = 0.0  # above 0: replaces masking.rate in this stage


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the same mathematics is executed; may change between a run and its continuation."""

    dtype: str = "auto"  # auto (bfloat16 on TPU and GPU, float32 on CPU) | float32 | bfloat16
    layers: str = "auto"  # auto (unrolled on CPU, scan elsewhere) | scan | unroll
    remat: str = "none"  # none | dots | full
    attention: str = "auto"  # auto | xla | splash | cudnn


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """Sizes of the mesh's axes; -1 (once) takes the devices that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop around the step. Counts are in steps."""

    log_every: int = 50
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    max_nonfinite: int = 10  # consecutive skipped updates before the run stops
    wandb_project: str = ""  # extra: pip install mlm-jax[wandb]


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss under frozen masks, the same for every run whatever its training rate."""

    every: int = 500  # steps between evaluations while training; 0 only at the end
    batch_size: int = 64
    max_rows: int = 2048
    mask_rate: float = 0.15
    seed: int = 1234
    probes: tuple[str, ...] = ()  # texts with [MASK] that are filled in at each evaluation, for the report


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str
    seed: int = 0
    objective: str = "mlm"
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    stages: tuple[StageConfig, ...] = (StageConfig(),)
    compute: ComputeConfig = ComputeConfig()
    sharding: ShardingConfig = ShardingConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def mask_rate(self, stage: StageConfig) -> float:
        """The rate that a stage trains with."""
        return stage.mask_rate or self.masking.rate


# Sections that may differ when a workdir is continued: they change how a run is executed and watched, not what it computes.
FREE_ON_RESUME = ("compute", "sharding", "train", "evaluation")


def load_config(path: str, overrides: Iterable[str] = ()) -> Config:
    """Reads a recipe file, applies `section.field=value` overrides, and checks the whole.

    Args:
        path: a Python file with `get_config() -> ml_collections.ConfigDict`.
        overrides: `optimizer.learning_rate=1e-3`, `stages[0].steps=100`, as the command line's `--config.` flags.

    Raises:
        UserError: the file cannot be used, or a field is unknown, missing, of a wrong type or inconsistent.
    """
    raw = _run_recipe(path)
    for override in overrides:
        _apply_override(raw, override)
    cfg = from_dict(raw)
    check(cfg)
    return cfg


def from_dict(raw: Mapping[str, Any]) -> Config:
    """Builds the dataclasses from plain dictionaries, as read from a recipe or from a workdir's config.json."""
    return typing.cast(Config, _build(Config, raw, ""))


def to_dict(cfg: Config) -> dict[str, Any]:
    """The inverse of `from_dict`, in JSON's types (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def differences(old: Config, new: Config) -> list[str]:
    """The fields, as `section.field: old -> new`, that differ and must not when a run is continued."""
    found: list[str] = []

    def walk(a: Any, b: Any, path: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted(a.keys() | b.keys()):
                if path or key not in FREE_ON_RESUME:
                    walk(a.get(key), b.get(key), f"{path}.{key}".lstrip("."))
        elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for index, (x, y) in enumerate(zip(a, b, strict=True)):
                walk(x, y, f"{path}[{index}]")
        elif a != b:
            found.append(f"{path}: {a} -> {b}")

    walk(to_dict(old), to_dict(new), "")
    return found


def check(cfg: Config) -> None:
    """Every relation between fields that can be wrong without looking at data or devices.

    Raises:
        UserError: naming the field, its value, the limit and a fix.
    """
    _check_choices(cfg)
    model, masking, optimizer = cfg.model, cfg.masking, cfg.optimizer
    _require(model.embed_dim % model.num_heads == 0, f"model.embed_dim={model.embed_dim} is no multiple of model.num_heads={model.num_heads}")
    for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "mlp_dim", "max_positions"):
        _require(getattr(model, name) > 0, f"model.{name}={getattr(model, name)} must be positive")
    for section, name in ((model, "dropout"), (model, "attention_dropout"), (cfg.data, "validation_fraction"), (optimizer, "ema_decay")):
        value = getattr(section, name)
        _require(0.0 <= value < 1.0, f"{name}={value} must lie in [0, 1)")
    _require(0 < cfg.evaluation.mask_rate < 1, f"evaluation.mask_rate={cfg.evaluation.mask_rate} must lie between 0 and 1")
    _require(
        masking.mask_prob >= 0 and masking.random_prob >= 0 and masking.mask_prob + masking.random_prob <= 1 + 1e-9,
        f"masking.mask_prob={masking.mask_prob} and masking.random_prob={masking.random_prob} must not be negative or exceed 1 together",
    )
    _require(cfg.tokenizer.algorithm != "pretrained" or bool(cfg.tokenizer.path), "tokenizer.algorithm='pretrained' needs tokenizer.path")
    _require(
        cfg.tokenizer.algorithm == "pretrained" or cfg.tokenizer.vocab_size <= model.vocab_size,
        f"tokenizer.vocab_size={cfg.tokenizer.vocab_size} exceeds model.vocab_size={model.vocab_size}: raise the model's or lower the tokenizer's",
    )
    _require(cfg.data.max_segments > 0, f"data.max_segments={cfg.data.max_segments} must be positive")
    _require(optimizer.learning_rate > 0, f"optimizer.learning_rate={optimizer.learning_rate} must be positive")
    _require(optimizer.schedule != "wsd" or optimizer.decay_steps > 0, "optimizer.schedule='wsd' needs optimizer.decay_steps > 0")
    _require(len(cfg.stages) > 0, "a run needs at least one stage")
    for index, stage in enumerate(cfg.stages):
        _check_stage(cfg, f"stages[{index}]", stage)
    for name in ("log_every", "checkpoint_every", "keep_checkpoints", "max_nonfinite"):
        _require(getattr(cfg.train, name) > 0, f"train.{name}={getattr(cfg.train, name)} must be positive")
    sizes = [cfg.sharding.data, cfg.sharding.fsdp, cfg.sharding.tensor]
    _require(sizes.count(-1) <= 1 and all(size == -1 or size > 0 for size in sizes), f"sharding sizes {sizes}: positive, and -1 at most once")
    _require(cfg.model.num_heads % max(1, cfg.sharding.tensor) == 0, f"sharding.tensor={cfg.sharding.tensor} must divide model.num_heads={model.num_heads}")


def _check_stage(cfg: Config, where: str, stage: StageConfig) -> None:
    for name in ("steps", "seq_len", "batch_size", "accumulation"):
        _require(getattr(stage, name) > 0, f"{where}.{name}={getattr(stage, name)} must be positive")
    _require(stage.seq_len >= 8, f"{where}.seq_len={stage.seq_len} is below 8")
    _require(
        stage.seq_len <= cfg.model.max_positions,
        f"{where}.seq_len={stage.seq_len} exceeds model.max_positions={cfg.model.max_positions}",
    )
    _require(
        stage.batch_size % stage.accumulation == 0,
        f"{where}.batch_size={stage.batch_size} is no multiple of {where}.accumulation={stage.accumulation}",
    )
    rate = cfg.mask_rate(stage)
    _require(0 < rate < 1, f"{where}: a mask rate of {rate} does not lie between 0 and 1")


_CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("mlm",),
    "tokenizer.algorithm": ("unigram", "bpe", "pretrained"),
    "model.activation": ("gelu_tanh", "gelu_erf", "relu"),
    "masking.policy": ("token", "whole_word"),
    "masking.random_from": ("regular", "vocab"),
    "optimizer.name": ("adamw", "lamb"),
    "optimizer.schedule": ("constant", "linear", "cosine", "inverse_sqrt", "wsd"),
    "compute.dtype": ("auto", "float32", "bfloat16"),
    "compute.layers": ("auto", "scan", "unroll"),
    "compute.remat": ("none", "dots", "full"),
    "compute.attention": ("auto", "xla", "splash", "cudnn"),
}


def _check_choices(cfg: Config) -> None:
    for path, allowed in _CHOICES.items():
        value: Any = cfg
        for name in path.split("."):
            value = getattr(value, name)
        _require(value in allowed, f"{path}={value!r} is none of {', '.join(allowed)}{_nearest(value, allowed)}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _run_recipe(path: str) -> dict[str, Any]:
    file = pathlib.Path(path)
    if not file.is_file():
        siblings = sorted(f.name for f in file.parent.glob("*.py")) if file.parent.is_dir() else []
        raise UserError(f"no config file {path}{_nearest(file.name, siblings)}")
    spec = importlib.util.spec_from_file_location(f"mlm_jax_recipe_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        raw = module.get_config().to_dict()
    except Exception as error:
        raise UserError(f"{path} could not be read as a config: {type(error).__name__}: {error}") from error
    raw["stages"] = [dict(stage) for stage in raw.get("stages", ())] or [{}]
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets one field, walking the dataclasses to know its type and to name the nearest field when there is none."""
    path, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"--config.{path} needs a value: --config.{path}=…")
    cls: Any = Config
    node: Any = raw
    names = path.split(".")
    for depth, part in enumerate(names):
        name, _, index = part.partition("[")
        field_types = typing.get_type_hints(cls)
        if name not in field_types:
            raise UserError(f"no config field {'.'.join(names[:depth] + [name])!r}{_nearest(name, field_types)}")
        kind = field_types[name]
        if index:
            node = node.setdefault(name, [{}])
            kind = typing.get_args(kind)[0]
            position = index.rstrip("]")
            if not position.isdigit() or int(position) >= len(node):
                raise UserError(f"{part}: there are {len(node)} entries, counted from 0")
            node, last = node[int(position)], None
        else:
            last = name
        cls = kind
        if depth < len(names) - 1:
            if not dataclasses.is_dataclass(kind):
                raise UserError(f"{'.'.join(names[: depth + 1])} is a single value and has no field {names[depth + 1]!r}")
            node = node.setdefault(name, {}) if last else node
    if dataclasses.is_dataclass(cls):
        raise UserError(f"{path} is a section; set one of its fields: {', '.join(typing.get_type_hints(cls))}")
    assert last is not None
    node[last] = _parse(text, cls, path)


def _parse(text: str, kind: Any, path: str) -> Any:
    """A flag's text as a value of the field's type."""
    if kind is str:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise UserError(f"{path}={text!r} is not {_describe(kind)}") from None


def _build(cls: Any, raw: Any, path: str) -> Any:
    """A dataclass from a dictionary, every field checked by type."""
    if not isinstance(raw, Mapping):
        raise UserError(f"{path or 'config'} must be a section of fields, not {raw!r}")
    kinds = typing.get_type_hints(cls)
    unknown = [name for name in raw if name not in kinds]
    if unknown:
        where = f"{path}.{unknown[0]}".lstrip(".")
        raise UserError(f"no config field {where!r}{_nearest(unknown[0], kinds)}")
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in raw]
    if required:
        raise UserError(f"config field {f'{path}.{required[0]}'.lstrip('.')!r} is missing")
    return cls(**{name: _convert(value, kinds[name], f"{path}.{name}".lstrip(".")) for name, value in raw.items()})


def _convert(value: Any, kind: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path)
    if isinstance(kind, types.GenericAlias):  # tuple[X, ...]
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{path}={value!r} is not {_describe(kind)}")
        inner = typing.get_args(kind)[0]
        return tuple(_convert(item, inner, f"{path}[{index}]") for index, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UserError(f"{path}={value!r} is not {_describe(kind)}")
    return value


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
    return names.get(kind, "a list like ('a', 'b')")
