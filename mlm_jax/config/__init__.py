"""Configuration: ml_collections recipes in, frozen dataclasses out, every check before a device is touched.

Each section of a recipe has exactly one dataclass in `sections`. A recipe (`configs/*.py`) names only what it sets; the
command line overrides any field with `--config.section.field=value`.
"""

from mlm_jax.config.checks import check
from mlm_jax.config.conversion import FREE_ON_RESUME, differences, from_dict, to_dict
from mlm_jax.config.loading import load_config, override
from mlm_jax.config.sections import (
    TASKS,
    ComputeConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    FiltersConfig,
    HybridConfig,
    ImageTextConfig,
    MaskingConfig,
    ModelConfig,
    OptimizerConfig,
    RtdConfig,
    ShardingConfig,
    SourceConfig,
    SpanBoundaryConfig,
    StageConfig,
    TaskConfig,
    TokenizerConfig,
    TrainConfig,
)

__all__ = [
    "FREE_ON_RESUME",
    "TASKS",
    "ComputeConfig",
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "EvaluationConfig",
    "FiltersConfig",
    "HybridConfig",
    "ImageTextConfig",
    "MaskingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RtdConfig",
    "ShardingConfig",
    "SourceConfig",
    "SpanBoundaryConfig",
    "StageConfig",
    "TaskConfig",
    "TokenizerConfig",
    "TrainConfig",
    "check",
    "differences",
    "from_dict",
    "load_config",
    "override",
    "to_dict",
]
