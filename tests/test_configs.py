"""Every shipped recipe: it loads, has the size that it states, and follows the published learning-rate curve."""

import ast
import dataclasses
import math
import pathlib
import re

import jax
import ml_collections
import numpy as np
import pytest

from mlm_jax import config
from mlm_jax.compile.topology import parse_topology
from mlm_jax.data.corpus import Corpus
from mlm_jax.masking import num_slots
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import make_objective
from mlm_jax.objectives.rates import scheduled_rates
from mlm_jax.sharding import make_mesh
from mlm_jax.train.feed import check_epochs
from mlm_jax.train.optimizer import learning_rate

# Those of tasks have no architecture of their own: test_finetune.py.
CONFIGS = (pathlib.Path(__file__).resolve().parent.parent / "configs").glob("*.py")
RECIPES = sorted(path for path in CONFIGS if not path.stem.startswith("finetune_"))
STEMS = [path.stem for path in RECIPES]
VARIANTS = {"compare_mini": ("mlm", "whole_word", "span", "rtd", "diffusion", "hybrid")}


def names_of(stem: str) -> list[str]:
    """A file's recipes, as FILE or FILE:VARIANT."""
    return [f"{stem}:{variant}" for variant in VARIANTS[stem]] if stem in VARIANTS else [stem]


NAMES = [name for stem in STEMS for name in names_of(stem)]

# Parameters, and tokens in a step of each stage.
SIZES = {
    "smoke": (958_336, [4_096]),
    "bert_mini": (5_462_272, [2_048, 2_048]),
    "bert_mini_decay": (5_462_272, [2_048, 2_048]),
    "bert_base": (109_514_298, [32_768, 131_072]),
    "bert_large": (335_174_458, [32_768, 131_072]),
    "bert_large_40": (355_411_033, [524_288]),
    "bert_large_lamb": (335_174_458, [8_388_608, 16_777_216]),
    "electra_small": (14_196_219, [16_384]),
    "electra_base": (119_386_427, [131_072]),
    "electra_large": (354_655_291, [1_048_576]),
    "roberta_base": (124_696_665, [1_048_576]),
    "roberta_large": (355_411_033, [4_194_304]),
    "spanbert_large": (336_998_976, [131_072]),
    "mdlm_small": (163_751_808, [524_288]),
    "diffusion_mini": (4_344_064, [4_096]),
    "gpt_bert_small": (22_431_104, [4_194_304, 4_194_304, 4_194_304]),
    "babylm_strict_small": (25_585_024, [16_384, 16_384, 16_384]),
    "babylm_mini": (5_462_272, [4_096, 4_096]),
    **{f"compare_mini:{variant}": (5_462_272, [2_048]) for variant in ("mlm", "whole_word", "diffusion", "hybrid")},
    "compare_mini:span": (5_722_808, [2_048]),
    "compare_mini:rtd": (5_695_553, [2_048]),
}

# The rate at named steps: half of the warm-up, its end, halfway down, the end.
RATES = {
    "smoke": {0: 0.0, 30: 1.5e-3, 60: 3e-3, 330: 1.5e-3, 600: 0.0},
    "bert_mini": {150: 5e-4, 300: 1e-3, 3_150: 5e-4, 6_000: 0.0},
    "bert_mini_decay": {150: 5e-4, 300: 1e-3, 3_150: 5e-4, 6_000: 0.0},
    "bert_base": {5_000: 5e-5, 10_000: 1e-4, 505_000: 5e-5, 900_000: 1e-4 * 100 / 990, 1_000_000: 0.0},
    "bert_large": {5_000: 5e-5, 10_000: 1e-4, 505_000: 5e-5, 1_000_000: 0.0},
    "bert_large_40": {690: 1e-3, 1_380: 2e-3, 12_190: 1e-3, 23_000: 0.0},
    "bert_large_lamb": {2_001: 6e-3, 7_037: 6e-3 / 5_037, 7_038: 0.0, 7_138: 2e-3, 7_238: 4e-3, 8_601: 0.0},
    "electra_small": {5_000: 2.5e-4, 10_000: 5e-4, 505_000: 2.5e-4, 1_000_000: 0.0},
    "electra_base": {5_000: 1e-4, 10_000: 2e-4, 388_000: 1e-4, 766_000: 0.0},
    "electra_large": {5_000: 1e-4, 10_000: 2e-4, 205_000: 1e-4, 400_000: 0.0},
    "roberta_base": {5_000: 2.5e-4, 10_000: 5e-4, 67_500: 2.5e-4, 125_000: 0.0},
    "roberta_large": {15_000: 2e-4, 30_000: 4e-4, 265_000: 2e-4, 500_000: 0.0},
    "spanbert_large": {5_000: 5e-5, 10_000: 1e-4, 1_205_000: 5e-5, 2_400_000: 0.0},
    "mdlm_small": {1_250: 1.5e-4, 2_500: 3e-4, 500_000: 3e-4, 1_000_000: 3e-4},
    "diffusion_mini": {75: 7.5e-4, 150: 1.5e-3, 1_575: 7.5e-4, 3_000: 0.0},
    **{name: {120: 5e-4, 240: 1e-3, 2_520: 5e-4, 4_800: 0.0} for name in names_of("compare_mini")},
    "babylm_strict_small": {70: 3.5e-3, 140: 7e-3, 4_445: 7e-3 * 0.55, 8_750: 7e-4},
    "babylm_mini": {150: 5e-4, 300: 1e-3, 3_150: 5e-4, 6_000: 0.0},
    "gpt_bert_small": {62: 7.05e-3, 124: 1.41e-2, 3_968: 1.41e-2 * 0.55, 7_812: 1.41e-3},
}


def load(name: str) -> config.Config:
    stem, _, variant = name.partition(":")
    path = next(str(path) for path in RECIPES if path.stem == stem)
    return config.load_config(f"{path}:{variant}" if variant else path)


def count_parameters(cfg: config.Config) -> int:
    """By arithmetic on the shape, so that the encoder's own count has something to agree with."""
    if cfg.objective == "rtd":
        generator = cfg.rtd.generator(cfg.model)
        return count_layers(generator) + count_head(generator) + count_discriminator(cfg.model)
    total = count_embeddings(cfg.model) + count_layers(cfg.model) + count_head(cfg.model)
    return total + count_boundary_head(cfg) if cfg.objective == "span" else total


def count_embeddings(model: config.ModelConfig) -> int:
    positions = model.max_positions + model.position_offset
    return (model.vocab_size + positions + model.num_token_types + 2) * (model.table_dim or model.embed_dim)


def count_layers(model: config.ModelConfig) -> int:
    dim, norm = model.embed_dim, 2 * model.embed_dim
    attention = 4 * (dim * dim + dim)
    mlp = 2 * dim * model.mlp_dim + model.mlp_dim + dim
    projection = 0 if model.table_dim in (0, dim) else model.table_dim * dim + dim
    return projection + model.num_layers * (attention + mlp + 2 * norm)


def count_head(model: config.ModelConfig) -> int:
    table_dim = model.table_dim or model.embed_dim
    untied = 0 if model.tie_embeddings else model.vocab_size * table_dim
    return model.embed_dim * table_dim + 3 * table_dim + model.vocab_size + untied


def count_discriminator(model: config.ModelConfig) -> int:
    """With the embeddings, which are the generator's too, and its head: a dense layer and one logit."""
    return count_embeddings(model) + count_layers(model) + model.embed_dim**2 + 2 * model.embed_dim + 1


def count_boundary_head(cfg: config.Config) -> int:
    dim, span = cfg.model.embed_dim, cfg.span_boundary
    inputs = 2 * dim + span.position_dim
    return span.max_targets * span.position_dim + inputs * dim + dim * dim + 2 * (dim + 2 * dim) + cfg.model.vocab_size


def test_every_recipe_is_known_here():
    assert set(NAMES) == SIZES.keys() == RATES.keys()


@pytest.mark.parametrize("path", RECIPES, ids=STEMS)
def test_a_recipe_is_a_short_list_of_literals(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 100
    tree = ast.parse(text)
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert [alias.name for node in imports for alias in node.names] == ["ml_collections"]
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    refusal = {"ValueError"} if path.stem in VARIANTS else set()
    assert {call for call in calls if not call.endswith(".lock")} == {"ml_collections.ConfigDict"} | refusal
    scope: dict = {}
    exec(compile(tree, str(path), "exec"), scope)
    for name in names_of(path.stem):
        recipe = scope["get_config"](*name.split(":")[1:])
        assert isinstance(recipe, ml_collections.ConfigDict) and recipe.is_locked


@pytest.mark.parametrize("name", NAMES)
def test_sizes(name):
    cfg = load(name)
    parameters, tokens = SIZES[name]
    assert cfg.name == name.replace(":", "_")
    assert count_parameters(cfg) == parameters
    assert [stage.batch_size * stage.seq_len for stage in cfg.stages] == tokens


@pytest.mark.parametrize("path", RECIPES, ids=STEMS)
def test_the_docstring_says_what_a_reader_needs(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    for parameters, tokens in map(SIZES.get, names_of(path.stem)):
        assert f"{parameters:,} parameters" in docstring
        assert all(f"{count:,}" in docstring for count in tokens)
    assert f"--config configs/{path.stem}.py" in docstring
    for heading in ("Command:", "Expected:", "Reference topology:"):
        assert heading in docstring
    # What comes from a paper that nobody looked into is said to.
    assert ("[P]" in path.read_text()) == ("[P] from the paper, unchecked" in " ".join(docstring.split()))


@pytest.mark.parametrize("path", RECIPES, ids=STEMS)
def test_every_source_that_is_cited_is_named(path):
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text))
    assert set(re.findall(r"\[([A-Z])\]", text)) == set(re.findall(r"\[([A-Z])\]", docstring))


@pytest.mark.parametrize("name", NAMES)
def test_the_learning_rate_at_named_steps(name):
    schedule = learning_rate(load(name))
    rates = [float(schedule(step)) for step in RATES[name]]
    np.testing.assert_allclose(rates, list(RATES[name].values()), rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_writes_no_path_and_fits_its_vocabulary(name):
    cfg = load(name)
    assert cfg.data.source == "builtin:python_docs" and not cfg.tokenizer.path
    assert cfg.tokenizer.vocab_size == cfg.model.vocab_size
    assert cfg.tokenizer.vocab_size <= 65_536  # rows are stored in 16 bits


@pytest.mark.parametrize("path", RECIPES, ids=STEMS)
def test_the_reference_topology_is_the_docstrings_and_divides_each_micro_batch(path):
    cfg = load(names_of(path.stem)[0])
    (stated,) = re.findall(r"Reference topology: (.*)", ast.get_docstring(ast.parse(path.read_text())))
    if not cfg.reference_topology:
        assert stated.startswith("one machine with")
        return
    assert stated.startswith(f"TPU {cfg.reference_topology}")
    _, shape, slices = parse_topology(cfg.reference_topology)
    for stage in cfg.stages:
        assert (stage.batch_size // stage.accumulation) % (math.prod(shape) * slices) == 0


def test_berts_limits_of_predictions_are_close_to_ours():
    # google-research/bert allows 20 predictions in 128 tokens and 77 in 512.
    assert (num_slots(128, 0.15), num_slots(512, 0.15)) == (19, 77)


def test_what_makes_bert_and_roberta_differ():
    bert, roberta = load("bert_base"), load("roberta_base")
    assert not bert.optimizer.bias_correction and roberta.optimizer.bias_correction
    assert (bert.optimizer.b2, roberta.optimizer.b2) == (0.999, 0.98)
    assert (bert.optimizer.clip_norm, roberta.optimizer.clip_norm) == (1.0, 0.0)
    assert (bert.model.activation, roberta.model.activation) == ("gelu_tanh", "gelu_erf")
    assert (bert.model.norm_eps, roberta.model.norm_eps) == (1e-12, 1e-5)
    assert not bert.masking.include_special and roberta.masking.include_special
    base, large = (dataclasses.asdict(load(name).optimizer) for name in ("bert_base", "bert_large"))
    assert base == large


def test_masking_of_the_recipes_that_are_about_it():
    decay = load("bert_mini_decay")
    assert [float(scheduled_rates(decay, 0, step).rate) for step in (0, 3_000, 6_000)] == pytest.approx([0.3, 0.225, 0.15])
    assert (decay.model, decay.optimizer) == (load("bert_mini").model, load("bert_mini").optimizer)
    forty = load("bert_large_40").masking
    assert (forty.rate, forty.mask_prob, forty.random_prob) == (0.4, 1.0, 0.0)
    spans = load("spanbert_large").masking
    assert len(spans.span_lengths) == 10 and spans.span_lengths[0] == pytest.approx(0.2 / (1 - 0.8**10))


def test_gpt_berts_mask_rate_falls_linearly_over_stages_of_equal_batches():
    cfg = load("gpt_bert_small")
    rates = [float(scheduled_rates(cfg, index, step).rate) for index, step in ((0, 0), (0, 3_906), (2, 7_812))]
    assert rates == pytest.approx([0.3, 0.225, 0.15])
    assert cfg.total_steps == 31_250 // 4 and {stage.batch_size * stage.seq_len for stage in cfg.stages} == {32_768 * 128}


@pytest.mark.parametrize("name", ["babylm_strict_small", "babylm_mini"])
def test_babylms_ten_million_words_are_seen_ten_times_at_most(name):
    cfg = load(name)
    tokens = 1.443e7  # with CLS and SEP, of ten million words of fiction and Wikipedia in rows of 128
    rows = {str(stage.seq_len): {"train": {"rows": tokens / stage.seq_len}} for stage in cfg.stages}
    epochs = check_epochs(cfg, Corpus(pathlib.Path("corpus"), {"rows": rows}, tokenizer=None, unigrams=None))
    assert (cfg.data.max_words, cfg.train.max_epochs) == (10_000_000, 10)
    assert {"babylm_strict_small": 9.5, "babylm_mini": 1.7}[name] < epochs < 10
    rates = [float(scheduled_rates(cfg, index, step).rate) for index, step in ((0, 0), (-1, cfg.total_steps))]
    assert rates == pytest.approx([0.3, 0.15])


@pytest.mark.parametrize("name", ["smoke", "bert_mini", "bert_mini_decay", "diffusion_mini"])
def test_probes_have_a_mask(name):
    probes = load(name).evaluation.probes
    assert len(probes) == 3 and all(probe.count("[MASK]") == 1 for probe in probes)


@pytest.mark.parametrize("name", ["electra_small", "electra_base", "electra_large"])
def test_electras_networks_have_the_published_sizes(name):
    """google-research/electra:README.md counts the discriminator: 14M, 110M, 335M. Its generators have heads of 64."""
    cfg = load(name)
    generator, total = cfg.rtd.generator(cfg.model), count_discriminator(cfg.model)
    published, width = {"electra_small": (14, 64), "electra_base": (110, 256), "electra_large": (335, 256)}[name]
    assert abs(total / 1e6 - published) < 0.6
    docstring = ast.get_docstring(ast.parse((RECIPES[0].parent / f"{name}.py").read_text()))
    assert f"the discriminator has {total:,} with the embeddings (published: {published}M [R])" in docstring
    assert (generator.embed_dim, generator.head_dim, generator.mlp_dim) == (width, 64, 4 * width)
    assert generator.num_layers == cfg.model.num_layers and generator.vocab_size == cfg.model.vocab_size


def test_variants_of_one_comparison_differ_in_what_is_learned_alone():
    variants = [load(name) for name in names_of("compare_mini")]
    assert len({cfg.name for cfg in variants}) == len(variants)
    for field in ("seed", "data", "tokenizer", "model", "optimizer", "stages", "train", "evaluation"):
        assert len({getattr(cfg, field) for cfg in variants}) == 1


@pytest.mark.parametrize("name", ["electra_small", "electra_large", "compare_mini:rtd", "compare_mini:span"])
def test_the_networks_are_built_as_they_are_counted(name):
    cfg = load(name)
    with jax.set_mesh(make_mesh(config.ShardingConfig(), jax.devices()[:1])):
        params = jax.eval_shape(make_objective(cfg, Compute.resolve(cfg.compute)).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == SIZES[name][0]
