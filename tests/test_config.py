"""Configuration: overrides reach the right field with the right type, and every mistake is one message that says so."""

import dataclasses
import json
import math
import re

import pytest

from mlm_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    MaskingConfig,
    ModelConfig,
    OptimizerConfig,
    ShardingConfig,
    SourceConfig,
    StageConfig,
    TrainConfig,
    check,
    differences,
    from_dict,
    load_config,
    to_dict,
)
from mlm_jax.errors import UserError

RECIPE = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({
        "name": "tiny",
        "model": {"vocab_size": 8192, "embed_dim": 64, "num_heads": 4},
        "stages": ({"steps": 10, "seq_len": 16}, {"steps": 20, "seq_len": 32}),
    })
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(RECIPE)
    return str(path)


def write(tmp_path, body: str) -> str:
    """A recipe whose `get_config` returns ConfigDict(body)."""
    path = tmp_path / "written.py"
    path.write_text(f"import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({body})\n")
    return str(path)


def test_what_a_recipe_leaves_out_has_the_dataclass_default(recipe):
    cfg = load_config(recipe)
    assert cfg.model == ModelConfig(vocab_size=8192, embed_dim=64, num_heads=4)
    assert cfg.stages == (StageConfig(steps=10, seq_len=16), StageConfig(steps=20, seq_len=32))
    assert (cfg.optimizer, cfg.data, cfg.masking) == (OptimizerConfig(), DataConfig(), MaskingConfig())
    assert cfg.total_steps == 30 and cfg.model.head_dim == 16


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("seed=7", "seed", 7),
        ("name=a=b", "name", "a=b"),
        ("data.source=files:/x/*.txt?field=a", "data.source", "files:/x/*.txt?field=a"),
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate", 1e-3),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("model.tie_embeddings=false", "model.tie_embeddings", False),
        ("model.tie_embeddings=True", "model.tie_embeddings", True),
        ("sharding.data=-1", "sharding.data", -1),
        ("evaluation.probes=('a [MASK]', 'b [MASK]')", "evaluation.probes", ("a [MASK]", "b [MASK]")),
        ("evaluation.probes=[]", "evaluation.probes", ()),
    ],
)
def test_an_override_sets_one_field_in_its_type(recipe, override, field, value):
    cfg = load_config(recipe, [override])
    found = cfg
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)
    assert [line.split(":")[0] for line in differences(load_config(recipe), cfg)] in ([field], [])


def test_an_override_sets_one_stage_only(recipe):
    cfg = load_config(recipe, ["stages[0].steps=3", "stages[1].mask_rate=0.3"])
    assert cfg.stages == (StageConfig(steps=3, seq_len=16), StageConfig(steps=20, seq_len=32, mask_rate=0.3))
    assert [cfg.mask_rate(stage) for stage in cfg.stages] == [0.15, 0.3]


def test_a_mixture_is_made_by_flags(recipe):
    given = "data.sources=[{'name': 'a', 'uri': 'files:a.txt'}, {'name': 'b', 'uri': 'files:b.txt'}]"
    cfg = load_config(recipe, [given, "data.sources[1].weight=2"])
    assert cfg.data.sources == (SourceConfig("a", "files:a.txt"), SourceConfig("b", "files:b.txt", weight=2.0))


def test_a_recipe_without_stages_has_one_that_can_be_overridden(tmp_path):
    path = write(tmp_path, '{"name": "x"}')
    assert load_config(path).stages == (StageConfig(),)
    assert load_config(path, ["stages[0].steps=3"]).stages == (StageConfig(steps=3),)


def test_a_later_override_wins(recipe):
    assert load_config(recipe, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rat=1", "no config field 'optimizer.learning_rat'; did you mean 'learning_rate'?"),
        ("optimiser.name=lamb", "no config field 'optimiser'; did you mean 'optimizer'?"),
        ("stages[0].step=1", "no config field 'stages[0].step'; did you mean 'steps'?"),
        ("zzzzzz=1", "no config field 'zzzzzz'"),
        ("seed", "--config.seed needs a value"),
        ("optimizer=lamb", "optimizer is a section; set one of its fields: name, learning_rate,"),
        ("stages[0]=3", "is a section; set one of its fields: steps,"),
        ("seed.x=3", "seed is a single value and has no field 'x'"),
        ("stages[2].steps=1", "stages[2]: the last one is stages[1]"),
        ("stages[-1].steps=1", ": the last one is stages[1]"),
        ("stages[].steps=1", ": the last one is stages[1]"),
        ("stages.steps=1", "has no field 'steps'"),
        ("seed=1.5", "seed=1.5 is not a whole number"),
        ("seed=True", "seed=True is not a whole number"),
        ("seed=one", "seed='one' is not a whole number"),
        ("seed=", "seed='' is not a whole number"),
        ("seed=__import__('os').getpid()", "is not a whole number"),
        ("model.tie_embeddings=1", "model.tie_embeddings=1 is not true or false"),
        ("model.tie_embeddings=yes", "model.tie_embeddings='yes' is not true or false"),
        ("optimizer.learning_rate=nan", "is not a finite number"),
        ("optimizer.learning_rate=1e999", "optimizer.learning_rate=inf is not a finite number"),
        ("optimizer.learning_rate='1'", "is not a finite number"),
        ("evaluation.probes='a [MASK]'", "evaluation.probes='a [MASK]' is not a list"),
        ("evaluation.probes=(1,)", "evaluation.probes[0]=1 is not a text"),
        ("stages=[]", "at least one stage"),
        ("stages=3", "stages=3 must be a list of sections"),
        ("data.sources=[1]", "data.sources=[1] must be a list of sections"),
        ("data.sources=[{'name': 'a'}]", "config field 'data.sources[0].uri' is missing"),
        ("data.sources[0].weight=2", "sources[0]: sources is empty"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(recipe, override, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(recipe, [override])


@pytest.mark.parametrize("override", ["seed[0]=3", "name[0]=x", "model[0].num_layers=2", "evaluation.probes[0]=x [MASK]"])
def test_an_index_where_none_belongs_is_a_users_mistake(recipe, override):
    with pytest.raises(UserError):
        load_config(recipe, [override])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"model": {}}', "config field 'name' is missing"),
        ('{"name": "x", "modle": {}}', "no config field 'modle'; did you mean 'model'?"),
        ('{"name": "x", "model": {"num_layer": 1}}', "no config field 'model.num_layer'; did you mean 'num_layers'?"),
        ('{"name": "x", "stages": ({"step": 1},)}', "no config field 'stages[0].step'; did you mean 'steps'?"),
        ('{"name": "x", "model": 3}', "model must be a section of fields, not 3"),
        ('{"name": 3}', "name=3 is not a text"),
        ('{"name": "x", "seed": 1.0}', "seed=1.0 is not a whole number"),
        ('{"name": "x", "undefined": y}', "could not be read as a config: NameError"),
        ('{"name": "x", "stages": 3}', "stages"),
        ('{"name": "x", "stages": {"steps": 3}}', "stages"),
        ('{"name": "x", "stages": (3,)}', "stages"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(tmp_path, body, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(write(tmp_path, body))


def test_files_that_are_no_recipes(tmp_path, recipe):
    with pytest.raises(UserError, match=r"no config file .*; did you mean 'tiny\.py'\?"):
        load_config(str(tmp_path / "tny.py"))
    with pytest.raises(UserError, match="no config file"):
        load_config(str(tmp_path / "absent" / "x.py"))
    (tmp_path / "x.txt").write_text(RECIPE)
    with pytest.raises(UserError, match="not a Python file"):
        load_config(str(tmp_path / "x.txt"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match=r"could not be read as a config: .*it has no function get_config"):
        load_config(str(tmp_path / "empty.py"))
    (tmp_path / "other.py").write_text("def get_config(): return {}")
    with pytest.raises(UserError, match=r"get_config\(\) returned a dict and must return an ml_collections.ConfigDict"):
        load_config(str(tmp_path / "other.py"))
    with pytest.raises(UserError, match="is a directory: name one of its"):
        load_config(str(tmp_path))


# Each relation between fields: what breaks it, and a part of the message, which names the field.
CHECKS = [
    ("model.num_heads=5", "model.embed_dim=64 is no multiple of model.num_heads=5"),
    *((f"model.{name}=0", f"model.{name}=0") for name in ("vocab_size", "num_layers", "embed_dim", "num_heads")),
    *((f"model.{name}=-1", f"model.{name}=-1") for name in ("mlp_dim", "max_positions")),
    ("model.dropout=1.0", "dropout=1.0 must be in [0, 1)"),
    ("model.attention_dropout=-0.1", "attention_dropout=-0.1 must be in [0, 1)"),
    ("data.validation_fraction=1.0", "validation_fraction=1.0 must be in [0, 1)"),
    ("data.max_segments=0", "data.max_segments=0 must be positive"),
    ("optimizer.ema_decay=1", "ema_decay=1.0 must be in [0, 1)"),
    ("optimizer.learning_rate=0", "optimizer.learning_rate=0.0 must be positive"),
    ("optimizer.schedule=wsd", "needs optimizer.decay_steps"),
    ("stages[1].schedule=wsd stages[1].learning_rate=1e-4", "the schedule 'wsd' needs optimizer.decay_steps"),
    (
        "stages[1].schedule=cosine",
        "stages[1].schedule='cosine' begins a curve of its own, which needs stages[1].lear",
    ),
    ("stages[1].schedule=cosin", "stages[1].schedule='cosin' is none of constant, linear, cosine, inverse_sqrt"),
    ("stages[1].rope_base=1e5", "stages[1].rope_base=100000.0 with model.positions='learned': only 'rope' has a base"),
    ("stages[1].rope_base=-1 model.positions=rope", "stages[1].rope_base=-1.0 must be at least 0"),
    ("evaluation.mask_rate=0", "evaluation.mask_rate=0.0 must be in (0, 1)"),
    ("evaluation.mask_rate=1", "evaluation.mask_rate=1.0 must be in (0, 1)"),
    ("masking.rate=0", "masking.rate=0.0 must be in (0, 1)"),
    ("stages[1].mask_rate=1", "stages[1].mask_rate=1.0 must be in [0, 1)"),
    ("stages[1].mask_rate=-0.1", "stages[1].mask_rate=-0.1 must be in [0, 1)"),
    ("masking.mask_prob=0.95", "masking.mask_prob=0.95 and masking.random_prob=0.1"),
    ("masking.random_prob=-0.1", "masking.random_prob=-0.1"),
    ("objective=span", "objective='span' predicts tokens from the ends of masked spans, of which masking.policy='token'"),
    ("masking.policy=pmi", "masking.policy='pmi' with masking.ngrams='': the policy 'pmi' needs a list"),
    ("masking.ngrams=list.txt", "masking.policy='token' with masking.ngrams='list.txt'"),
    ("masking.max_words=0", "masking.max_words=0 must be positive"),
    ("masking.span_p=1", "masking.span_p=1.0 must be in (0, 1)"),
    (
        "masking.policy=span stages[0].seq_len=16",
        "draws 3.8 words at a time, and rows of stages[0].seq_len=16 have a budget of 2.4 tokens",
    ),
    (
        "masking.policy=span stages[0].seq_len=32 masking.rate_spread=0.1",
        "draws 3.8 words at a time, and rows of stages[0].seq_len=32 have a budget of 1.6 tokens",
    ),
    (
        "masking.policy=ngram masking.max_words=3 stages[0].seq_len=64 masking.schedule=step masking.schedule_start=1 "
        "masking.final_rate=0.02",
        "draws 1.6 words at a time, and rows of stages[0].seq_len=64 have a budget of 1.3 tokens",
    ),
    ("masking.schedule=linear", "masking.schedule='linear' with no final value"),
    ("masking.final_rate=0.1", "masking.schedule='constant' with final_rate=0.1"),
    ("masking.schedule=linear masking.final_rate=1.5", "masking.final_rate=1.5 with masking.rate_spread=0.0 leaves (0, 1)"),
    (
        "masking.schedule=linear masking.final_mask_prob=0.95",
        "masking.final_mask_prob=0.95 and masking.final_random_prob=0.1",
    ),
    ("masking.schedule=cosine masking.final_random_prob=-0.5", "masking.final_random_prob=-0.5 is negative"),
    ("masking.rate_spread=0.15", "masking.rate=0.15 with masking.rate_spread=0.15 leaves (0, 1)"),
    ("masking.rate=0.3 masking.rate_spread=0.2 stages[1].mask_rate=0.1", "stages[1].mask_rate=0.1 with masking.rate_spread"),
    ("masking.schedule=step masking.final_rate=0.1", "masking.schedule_start=0 must lie within the run's"),
    ("masking.schedule=linear masking.final_rate=0.1 masking.schedule_start=5000000", "masking.schedule_start=5000000 must"),
    ("masking.schedule=quadratic", "masking.schedule='quadratic' is none of constant, linear, cosine, step"),
    ("span_boundary.max_targets=0", "span_boundary.max_targets=0 must be positive"),
    ("tokenizer.algorithm=pretrained", "needs tokenizer.path"),
    ("tokenizer.vocab_size=8193", "tokenizer.vocab_size=8193 exceeds model.vocab_size=8192"),
    *((f"stages[0].{name}=0", f"stages[0].{name}=0") for name in ("steps", "seq_len", "batch_size", "accumulation")),
    ("stages[1].seq_len=7", "stages[1].seq_len=7 is below 8"),
    ("stages[1].seq_len=513", "stages[1].seq_len=513 exceeds model.max_positions=512"),
    ("stages[1].accumulation=3", "stages[1].batch_size=256 is no multiple of stages[1].accumulation=3"),
    *(
        (f"train.{name}=0", f"train.{name}=0 must be positive")
        for name in ("log_every", "checkpoint_every", "keep_checkpoints", "max_nonfinite")
    ),
    ("sharding.fsdp=-1", "sharding sizes [1, -1, -1, 1] of slice, data, fsdp and tensor: positive; one of the first three"),
    ("sharding.tensor=0", "sharding sizes [1, -1, 1, 0] of slice, data, fsdp and tensor: positive"),
    ("sharding.slice=-2", "sharding sizes [-2, -1, 1, 1] of slice"),
    ("sharding.zero=True sharding.data=1", "sharding.zero=True divides the state over data, but sharding.data=1"),
    ("sharding.tensor=3", "sharding.tensor=3 must divide model.num_heads=4"),
    (
        "sharding.tensor=4 model.vocab_size=30522",
        "sharding.tensor=4 must divide model.vocab_size=30522: set model.vocab_size=30524, as a model's may exceed its",
    ),
    ("reference_topology=v5e-16", "reference_topology='v5e-16' is not like v5e:4x4"),
    ("rtd.generator_size=0", "rtd.generator_size=0.0 must be in (0, 1]"),
    (
        "rtd.generator_size=1.5",
        "rtd.generator_size=1.5 must be in (0, 1]: the generator is a part of the model, and 1 makes",
    ),
    (
        "rtd.generator_layers=0",
        "rtd.generator_layers=0.0 must be in (0, 1]: the generator is a part of the model, and 1 gives",
    ),
    ("rtd.discriminator_weight=-1", "rtd.discriminator_weight=-1.0 must be at least 0"),
    ("rtd.embedding_sharing=tide", "rtd.embedding_sharing='tide' is none of tied, disentangled; did you mean 'tied'?"),
    (
        "objective=mlmm",
        "objective='mlmm' is none of mlm, span, rtd, diffusion, hybrid, image_text, classification, ",
    ),
    ("tokenizer.algorithm=unigra", "did you mean 'unigram'?"),
    ("model.activation=gelu", "model.activation='gelu' is none of gelu_tanh, gelu_erf, relu, silu; did you mean"),
    ("model.positions=rotary", "model.positions='rotary' is none of learned, rope, alibi"),
    ("model.norm=rmsnorm", "model.norm='rmsnorm' is none of layer, rms; did you mean 'rms'?"),
    ("model.rope_base=0", "model.rope_base=0.0 must be positive"),
    ("model.local_rope_base=-1", "model.local_rope_base=-1.0 must be positive"),
    ("model.global_every=0", "model.global_every=0 must be positive"),
    ("model.local_window=-1", "model.local_window=-1 must be at least 0"),
    ("model.positions=rope model.embed_dim=68 model.table_dim=64", "model.positions='rope' turns pairs of dimensions, and"),
    ("model.positions=alibi model.local_window=64", "model.positions='alibi' with model.local_window=64: local layers"),
    ("model.positions=rope model.position_offset=2", "model.position_offset=2 is for a table of positions, and model.posi"),
    ("model.first_norm=False", "model.first_norm=False with model.pre_norm=False and model.embedding_norm=True"),
    ("model.first_norm=False model.pre_norm=True model.embedding_norm=False", "the first sublayer can only do without"),
    ("model.first_norm=False model.pre_norm=True model.num_layers=1", "leaves model.num_layers=1 without any norm before"),
    ("masking.policy=word", "masking.policy='word' is none of token, whole_word, span, ngram, pmi"),
    ("masking.random_from=all", "masking.random_from='all' is none of"),
    ("optimizer.name=adam", "optimizer.name='adam' is none of adamw, stable_adamw, lamb; did you mean 'adamw'?"),
    ("optimizer.schedule=linaer", "did you mean 'linear'?"),
    ("compute.dtype=float16", "compute.dtype='float16' is none of"),
    ("compute.layers=unrolled", "did you mean 'unroll'?"),
    ("compute.remat=all", "compute.remat='all' is none of"),
    ("compute.attention=flash", "compute.attention='flash' is none of"),
    ("compute.head_chunk=-1", "compute.head_chunk=-1 must be at least 0"),
    ("diffusion.min_rate=0", "diffusion.min_rate=0.0 must be in (0, 1)"),
    ("diffusion.scored_share=0", "diffusion.scored_share=0.0 must be in (0, 1]"),
    ("diffusion.draws=0", "diffusion.draws=0 must be positive"),
    ("hybrid.causal_share=1.5", "hybrid.causal_share=1.5 must be in [0, 1]"),
]


@pytest.mark.parametrize(("override", "message"), CHECKS, ids=[override for override, _ in CHECKS])
def test_each_relation_between_fields_is_checked(recipe, override, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(recipe, override.split())


def test_a_vocabulary_may_be_rounded_up_for_tensor_parallelism(recipe):
    cfg = load_config(recipe, ["sharding.tensor=4", "model.vocab_size=30524", "tokenizer.vocab_size=30522"])
    assert cfg.model.vocab_size > cfg.tokenizer.vocab_size


def test_a_generator_that_cannot_be_built_says_what_can(recipe):
    load_config(recipe, ["objective=rtd"])
    load_config(recipe, ["rtd.generator_size=0.45"])  # another objective has none
    message = "rtd.generator_size=0.45 makes a generator of width 29, mlp 461 and 2 head(s), which must divide the width"
    with pytest.raises(
        UserError, match=re.escape(message) + ".*whole heads of the model's 4, as rtd.generator_size=0.5 does"
    ):
        load_config(recipe, ["objective=rtd", "rtd.generator_size=0.45"])
    load_config(recipe, ["objective=rtd", "rtd.generator_size=0.5"])
    with pytest.raises(UserError, match=r"sharding.tensor=2 must divide the generator's num_heads=1"):
        load_config(recipe, ["objective=rtd", "sharding.tensor=2"])
    with pytest.raises(UserError, match=r"sharding.fsdp=32 must divide the generator's embed_dim=16"):
        load_config(recipe, ["objective=rtd", "sharding.fsdp=32"])
    with pytest.raises(UserError, match=r"sharding.fsdp=32 must divide model.table_dim=16"):
        load_config(recipe, ["model.table_dim=16", "sharding.fsdp=32"])


# What an objective alone asks for.
OWN_CHECKS = [
    ("diffusion", "masking.rate=0.3", "objective='diffusion' draws its own rates"),
    ("diffusion", "masking.include_special=true", "objective='diffusion' draws its own rates"),
    ("diffusion", "stages[1].mask_rate=0.3", "stages[…].mask_rate=[0.0, 0.3]"),
    ("hybrid", "masking.include_special=true", "nothing comes before CLS"),
    (
        "hybrid",
        "hybrid.causal_share=0.003",
        "hybrid.causal_share=0.003 leaves some batches of stages[0].batch_size=256 without a causal row",
    ),
    ("hybrid", "hybrid.causal_share=0.997", "without a masked row"),
]


@pytest.mark.parametrize(("objective", "override", "message"), OWN_CHECKS)
def test_what_an_objective_cannot_do_is_refused_for_it_alone(recipe, objective, override, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(recipe, [f"objective={objective}", override])
    load_config(recipe, [override])
    load_config(recipe, [f"objective={objective}", "hybrid.causal_share=1", "diffusion.scored_share=1"])


# What would otherwise end as a traceback, or as nonsense, after the corpus has been prepared.
LATE = [
    "evaluation.batch_size=0",
    "evaluation.max_rows=0",
    "tokenizer.vocab_size=0",
    "tokenizer.sample_megabytes=0",
    "model.norm_eps=-1",
    "model.init_std=-1",
    "model.position_offset=-1",
    "model.num_token_types=-1",
    "optimizer.b1=1.0",
    "optimizer.b2=1.5",
    "optimizer.eps=-1e-6",
    "optimizer.weight_decay=-0.1",
    "optimizer.clip_norm=-1",
    "optimizer.warmup_steps=-1",
    "optimizer.end_factor=-1",
    "stages[0].learning_rate=-1",
    "stages[0].warmup_steps=-1",
    "sharding.tensor=-1 sharding.data=1",
]


@pytest.mark.parametrize("overrides", LATE)
def test_a_value_out_of_range_is_refused_before_any_work(recipe, overrides):
    with pytest.raises(UserError):
        load_config(recipe, overrides.split())


@pytest.mark.parametrize(
    "overrides",
    [
        "sharding.tensor=4 model.vocab_size=8194",  # the vocabulary is split over tensor
        "sharding.tensor=4 model.mlp_dim=1026",
        "sharding.fsdp=3",  # the model dimension, 64, is split over fsdp
    ],
)
def test_dimensions_that_the_mesh_cannot_divide_are_refused(recipe, overrides):
    with pytest.raises(UserError):
        load_config(recipe, overrides.split())


def test_a_config_survives_json(recipe):
    cfg = load_config(recipe, ["evaluation.probes=('a [MASK]',)", "optimizer.learning_rate=1e-3", "model.norm_eps=1e-12"])
    stored = to_dict(cfg)
    assert json.loads(json.dumps(stored)) == stored
    again = from_dict(json.loads(json.dumps(stored)))
    assert again == cfg and hash(again) == hash(cfg)
    assert stored.keys() == {field.name for field in dataclasses.fields(Config)}


def test_a_config_that_was_checked_stays_valid_when_built_by_hand():
    check(Config(name="x"))
    with pytest.raises(UserError, match="at least one stage"):
        check(Config(name="x", stages=()))
    with pytest.raises(UserError, match="positive"):
        check(Config(name="x", train=TrainConfig(log_every=0)))


def test_differences_name_what_changes_the_mathematics():
    old = Config(name="x", stages=(StageConfig(steps=5), StageConfig(steps=6)))
    assert differences(old, old) == []
    new = dataclasses.replace(
        old,
        seed=1,
        model=ModelConfig(dropout=0.1),
        stages=(StageConfig(steps=5), StageConfig(steps=7)),
    )
    assert set(differences(old, new)) == {"seed: 0 -> 1", "model.dropout: 0.0 -> 0.1", "stages[1].steps: 6 -> 7"}
    shorter = differences(old, dataclasses.replace(old, stages=(StageConfig(steps=5),)))
    assert len(shorter) == 1 and shorter[0].startswith("stages: [{")


def test_differences_leave_out_how_a_run_is_executed_and_watched():
    old = Config(name="x")
    new = dataclasses.replace(
        old,
        sharding=ShardingConfig(fsdp=2),
        train=TrainConfig(log_every=1),
        evaluation=EvaluationConfig(every=3, probes=("a [MASK]",)),
    )
    assert differences(old, new) == []


def test_a_mask_rate_of_a_stage_replaces_the_general_one():
    cfg = Config(name="x", masking=MaskingConfig(rate=0.2), stages=(StageConfig(), StageConfig(mask_rate=0.4)))
    assert [cfg.mask_rate(stage) for stage in cfg.stages] == [0.2, 0.4]
    assert math.isclose(cfg.mask_rate(StageConfig()), 0.2)


def test_a_stage_changes_the_base_of_rotated_positions_from_there_on(recipe):
    overrides = ["model.positions=rope", "stages[1].rope_base=160000", "stages[0].steps=30"]
    cfg = load_config(recipe, overrides)
    assert [cfg.at_stage(index).model.rope_base for index in (0, 1)] == [10_000.0, 160_000.0]
    longer = dataclasses.replace(cfg, stages=(*cfg.stages, dataclasses.replace(cfg.stages[1], rope_base=0.0)))
    assert longer.at_stage(2).model.rope_base == 160_000.0
    # A checkpoint is of the stage that its last update belongs to.
    assert [cfg.stage_of(step) for step in (0, 1, 30, 31, 10_000_000)] == [0, 0, 0, 1, 1]


def test_a_recipe_of_several_variants_is_given_the_name_behind_the_colon(tmp_path, recipe):
    path = tmp_path / "several.py"
    body = "    if size not in ('a', 'b'):\n        raise ValueError(f'{size} is neither a nor b')\n"
    body += "    return ml_collections.ConfigDict({'name': size})\n"
    path.write_text(f"import ml_collections\ndef get_config(size):\n{body}")
    assert [load_config(f"{path}:{size}").name for size in "ab"] == ["a", "b"]
    assert load_config(f"{path}:a", ["seed=3"]).seed == 3
    for wrong, message in ((f"{path}", "needs a variant"), (f"{path}:c", "c is neither"), (f"{recipe}:a", "no variants")):
        with pytest.raises(UserError, match=message):
            load_config(wrong)
    with pytest.raises(UserError, match=r"no config file .*severl"):
        load_config(f"{tmp_path}/severl.py:a")
