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
VARIANTS = {"compare_mini": ("mlm", "whole_word", "span", "rtd", "diffusion", "hybrid"), "tlm_mini": ("tlm", "xlm", "mlm")}


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
    "bert_large_40": (355_413_081, [524_288]),
    "bert_large_lamb": (335_174_458, [8_388_608, 16_777_216]),
    "electra_small": (14_196_219, [16_384]),
    "electra_base": (119_386_427, [131_072]),
    "electra_large": (354_655_291, [1_048_576]),
    "roberta_base": (124_696_665, [1_048_576]),
    "roberta_large": (355_411_033, [4_194_304]),
    "spanbert_large": (336_998_976, [131_072]),
    "mdlm_small": (162_965_376, [524_288]),
    "diffusion_mini": (4_282_880, [4_096]),
    "gpt_bert_small": (28_314_752, [4_194_304, 4_194_304, 4_194_304]),
    "babylm_strict_small": (31_468_672, [16_384, 16_384, 16_384]),
    "babylm_mini": (5_335_552, [4_096, 4_096]),
    "modernbert_base": (149_655_232, [*(786_432 * step for step in range(1, 7)), 4_718_592, 4_718_592]),
    "modernbert_large": (395_881_664, [458_752 * step for step in (1, 3, 5, 7, 9, 11, 11)] + [5_242_880] * 2),
    "modern_mini": (5_335_552, [2_048, 2_048]),
    "neobert": (245_136_954, [2_097_152] * 3),
    "mosaicbert_base": (137_400_384, [524_288]),
    "distilbert_base": (66_985_530, [2_097_152]),
    **{f"compare_mini:{variant}": (5_335_552, [2_048]) for variant in ("mlm", "whole_word", "diffusion", "hybrid")},
    "compare_mini:span": (5_595_064, [2_048]),
    "compare_mini:rtd": (5_566_721, [2_048]),
    "xlmr_base": (278_294_418, [4_194_304]),
    "xlmr_large": (560_141_458, [4_194_304]),
    "chem_mini": (3_427_272, [4_096]),
    "protein_mini": (7_676_193, [4_096]),
    "code_mini": (5_462_272, [2_048]),
    "biomed_mini": (5_462_272, [2_048]),
    "multilingual_mini": (7_440_896, [2_048]),
    "emoji_mini": (604_034, [768]),
    "vilt_base": (112_217_660, [163_840]),
    "tlm_mini:tlm": (7_440_896, [2_048]),
    "tlm_mini:xlm": (7_441_920, [2_048]),
    "tlm_mini:mlm": (7_440_896, [2_048]),
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
    "diffusion_mini": {75: 7.5e-4, 150: 1.5e-3, 2_575: 7.5e-4, 5_000: 0.0},
    **{name: {120: 5e-4, 240: 1e-3, 2_520: 5e-4, 4_800: 0.0} for name in names_of("compare_mini")},
    "babylm_strict_small": {70: 3.5e-3, 140: 7e-3, 4_445: 7e-3 * 0.55, 8_750: 7e-4},
    "babylm_mini": {100: 5e-4, 200: 1e-3, 1_850: 5e-4, 3_500: 0.0},
    "xlmr_base": {12_000: 3e-4, 24_000: 6e-4, 762_000: 3e-4, 1_500_000: 0.0},
    "xlmr_large": {15_000: 2e-4, 30_000: 4e-4, 765_000: 2e-4, 1_500_000: 0.0},
    **{name: {75: 5e-4, 150: 1e-3, 1_575: 5e-4, 3_000: 0.0} for name in ("multilingual_mini", "chem_mini", "code_mini")},
    **{name: {75: 5e-4, 150: 1e-3, 1_575: 5e-4, 3_000: 0.0} for name in names_of("tlm_mini")},
    "biomed_mini": {75: 2.5e-4, 150: 5e-4, 1_575: 2.5e-4, 3_000: 0.0},
    "protein_mini": {50: 5e-4, 100: 1e-3, 1_050: 5.5e-4, 2_000: 1e-4},
    "modernbert_base": {3_815: 8e-4, 380_000: 8e-4, 382_742: 3e-4, 435_724: 3e-4, 438_373: 1.5015e-4, 446_320: 3e-7},
    "modernbert_large": {4_360: 5e-4, 184_159: 5e-4, 184_160: 5e-5, 390_376: 5e-5, 399_914: 5e-8},
    "modern_mini": {150: 5e-4, 300: 1e-3, 3_150: 5e-4, 6_000: 0.0},
    "neobert": {1_000: 5e-5, 2_000: 1e-4, 451_000: 5.5e-5, 900_000: 1e-5, 1_050_000: 1e-5},
    "mosaicbert_base": {2_100: 2.5e-4, 4_200: 5e-4, 37_100: 2.55e-4, 70_000: 1e-5},
    "distilbert_base": {625: 3e-4, 1_250: 6e-4, 13_125: 3e-4, 25_000: 0.0},
    "emoji_mini": {50: 1e-3, 100: 2e-3, 650: 1e-3, 1_200: 0.0},
    "vilt_base": {1_250: 5e-5, 2_500: 1e-4, 101_250: 5e-5, 200_000: 0.0},
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
    total = count_embeddings(cfg.model) + count_layers(cfg.model) + count_head(cfg.model) + count_images(cfg)
    return total + count_boundary_head(cfg) if cfg.objective == "span" else total


def count_norm(model: config.ModelConfig, dim: int) -> int:
    return 2 * dim if model.norm == "layer" and model.norm_bias else dim


def count_embeddings(model: config.ModelConfig) -> int:
    dim = model.table_dim or model.embed_dim
    positions = model.max_positions + model.position_offset if model.positions == "learned" else 0
    tables = (model.vocab_size + positions + model.num_token_types + len(model.languages)) * dim
    return tables + (count_norm(model, dim) if model.embedding_norm else 0)


def count_layers(model: config.ModelConfig) -> int:
    dim, norm, bias = model.embed_dim, count_norm(model, model.embed_dim), int(model.biases)
    attention = 4 * (dim * dim + bias * dim)
    up = 2 * dim * model.mlp_dim if model.gated_mlp else dim * model.mlp_dim + bias * model.mlp_dim
    mlp = up + model.mlp_dim * dim + bias * dim
    projection = 0 if model.table_dim in (0, dim) else model.table_dim * dim + bias * dim
    norms = 2 * model.num_layers + model.pre_norm - (not model.first_norm)
    return projection + model.num_layers * (attention + mlp) + norms * norm


def count_head(model: config.ModelConfig) -> int:
    table_dim = model.table_dim or model.embed_dim
    untied = 0 if model.tie_embeddings else model.vocab_size * table_dim
    transform = (model.embed_dim + model.biases) * table_dim + count_norm(model, table_dim)
    return (transform if model.head_transform else 0) + model.vocab_size + untied


def count_discriminator(model: config.ModelConfig) -> int:
    """With the embeddings, which are the generator's too, and its head: a dense layer and one logit."""
    head = (model.embed_dim + model.biases) * model.embed_dim + model.embed_dim + 1
    return count_embeddings(model) + count_layers(model) + head


def count_boundary_head(cfg: config.Config) -> int:
    dim, span = cfg.model.embed_dim, cfg.span_boundary
    inputs, bias = 2 * dim + span.position_dim, int(cfg.model.biases)
    dense = (inputs + bias) * dim + (dim + bias) * dim
    return span.max_targets * span.position_dim + dense + 2 * count_norm(cfg.model, dim) + cfg.model.vocab_size


def count_images(cfg: config.Config) -> int:
    """Patches, their positions, a vector for each modality, and the head that says whether an image is the text's."""
    model, dim = cfg.model, cfg.model.embed_dim
    if not model.image_size:
        return 0
    side = model.image_size // model.patch_size
    patches = (3 * model.patch_size**2 + 1 + side * side + 2) * dim + count_norm(model, dim)
    assert cfg.image_text.match_weight and not cfg.image_text.patch_mask_rate
    return patches + (dim + 1) * dim + (dim + 1) * 2


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
    assert cfg.tokenizer.vocab_size <= 65_536 or "xlmr" in name  # rows are stored in 16 bits


@pytest.mark.parametrize("path", RECIPES, ids=STEMS)
def test_the_reference_topology_is_the_docstrings_and_divides_each_micro_batch(path):
    cfg = load(names_of(path.stem)[0])
    (stated,) = re.findall(r"Reference topology: (.*)", ast.get_docstring(ast.parse(path.read_text())))
    if not cfg.reference_topology:
        assert stated.startswith("one machine with")
        return
    kind = "GPU" if cfg.reference_topology.startswith("h200") else "TPU"
    assert stated.startswith(f"{kind} {cfg.reference_topology}")
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
    assert {"babylm_strict_small": 9.5, "babylm_mini": 0.9}[name] < epochs < 10
    rates = [float(scheduled_rates(cfg, index, step).rate) for index, step in ((0, 0), (-1, cfg.total_steps))]
    assert rates == pytest.approx([0.3, 0.15])


def test_xlmr_is_roberta_on_more_languages():
    """XLM-R (Hugging Face's count): 278M and 560M parameters."""
    for size, published in (("base", 278), ("large", 560)):
        ours, roberta = load(f"xlmr_{size}"), load(f"roberta_{size}")
        assert round(SIZES[f"xlmr_{size}"][0] / 1e6) == published
        assert dataclasses.replace(ours.model, vocab_size=0) == dataclasses.replace(roberta.model, vocab_size=0)
        assert ours.masking == roberta.masking and ours.data.alpha == ours.tokenizer.sample_alpha == 0.3


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


def test_modern_encoders_have_the_published_sizes():
    """By the shapes of the published weights: with the head, and without the decoder in the last two."""
    assert [round(count_parameters(load(name)) / 1e6) for name in ("modernbert_base", "modernbert_large")] == [150, 396]
    neobert = load("neobert")
    assert count_parameters(neobert) - count_head(neobert.model) == 221_665_536
    distilbert = load("distilbert_base").model
    assert count_embeddings(distilbert) + count_layers(distilbert) == 66_362_880


def test_modernberts_phases():
    for name, first, second in (("modernbert_base", 1.719e12, 8), ("modernbert_large", 1.7e12, 9)):
        cfg = load(name)
        tokens = [stage.steps * stage.batch_size * stage.seq_len for stage in cfg.stages]
        np.testing.assert_allclose([sum(tokens[:-2]), *tokens[-2:]], [first, 250e9, 50e9], rtol=1e-3)
        assert [stage.seq_len for stage in cfg.stages] == [1024] * (second - 2) + [8192] * 2
        bases = [cfg.at_stage(index).model.rope_base for index in range(second)]
        assert bases == [10_000.0] * (second - 2) + [160_000.0] * 2
        # A pattern that begins and ends with a global layer.
        kinds = [cfg.model.is_local(layer) for layer in range(cfg.model.num_layers)]
        assert kinds[0] == kinds[-1] is False and kinds.count(False) == (cfg.model.num_layers - 1) // 3 + 1
    # The batch grows over 50 billion tokens.
    growing = [stage.steps * stage.batch_size * stage.seq_len for stage in load("modernbert_base").stages[:5]]
    np.testing.assert_allclose(growing, 10e9, rtol=1e-3)


def test_variants_of_one_comparison_differ_in_what_is_learned_alone():
    variants = [load(name) for name in names_of("compare_mini")]
    assert len({cfg.name for cfg in variants}) == len(variants)
    for field in ("seed", "data", "tokenizer", "model", "optimizer", "stages", "train", "evaluation"):
        assert len({getattr(cfg, field) for cfg in variants}) == 1


@pytest.mark.parametrize(
    "name",
    [
        *("electra_small", "electra_large", "compare_mini:rtd", "compare_mini:span", "modernbert_base", "modernbert_large"),
        *("neobert", "mosaicbert_base", "distilbert_base", "modern_mini"),
    ],
)
def test_the_networks_are_built_as_they_are_counted(name):
    cfg = load(name)
    with jax.set_mesh(make_mesh(config.ShardingConfig(), jax.devices()[:1])):
        params = jax.eval_shape(make_objective(cfg, Compute.resolve(cfg.compute)).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == SIZES[name][0]
