"""Replaced-token detection: what each network learns from, what the discriminator sees, and what its figures count."""

import dataclasses
import functools
import json
import pathlib
import shutil
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from tiny_step import BATCH, CFG, QUICK, VOCAB, make_rows, mesh_of, on_devices, tables_on

from mlm_jax.cli import main
from mlm_jax.config import MaskingConfig, RtdConfig
from mlm_jax.inference import open_run
from mlm_jax.masking import MaskedBatch, example_keys, streams
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import Keys
from mlm_jax.objectives.mlm import mask_batch
from mlm_jax.objectives.rates import constant_rates
from mlm_jax.objectives.rtd import ReplacedTokenDetection, detection_terms, insert_tokens, sample_tokens
from mlm_jax.train.evaluate import HeldOut, evaluate, make_eval_step
from mlm_jax.train.optimizer import learning_rate, make_optimizer
from mlm_jax.train.state import init_state
from mlm_jax.train.step import accumulate_gradients, make_train_step

TIED = dataclasses.replace(
    CFG,
    objective="rtd",
    model=dataclasses.replace(CFG.model, num_heads=4, table_dim=24, num_token_types=2, activation="gelu_erf"),
    masking=MaskingConfig(rate=0.3, mask_prob=0.85, random_prob=0.0),
    rtd=RtdConfig(generator_size=0.5, generator_layers=0.5),
)
CONFIGS = {
    "tied": TIED,
    "disentangled": dataclasses.replace(TIED, rtd=dataclasses.replace(TIED.rtd, embedding_sharing="disentangled")),
}
SHARING = pytest.mark.parametrize("sharing", CONFIGS)
KEY = jax.random.key(0)


@pytest.fixture
def one():
    """A mesh of one device, set."""
    mesh = mesh_of("1")
    with jax.set_mesh(mesh):
        yield mesh


def build(sharing: str = "tied") -> ReplacedTokenDetection:
    cfg = CONFIGS[sharing]
    return ReplacedTokenDetection(cfg, Compute.resolve(cfg.compute))


@functools.cache
def parameters(sharing: str):
    """On the host, larger than initial ones so that every gradient matters."""
    with jax.set_mesh(mesh_of("1")):
        shapes = jax.eval_shape(build(sharing).init, KEY)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        mean = float("scale" in jax.tree_util.keystr(path))
        return rng.normal(mean, 0.1, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def parameters_on(mesh: jax.sharding.Mesh, sharing: str):
    shapes = jax.eval_shape(build(sharing).init, KEY)
    return jax.tree.map(
        lambda leaf, like: jax.device_put(leaf, jax.NamedSharding(mesh, like.sharding.spec)), parameters(sharing), shapes
    )


@functools.cache
def gradient(sharing: str, mesh_name: str = "1", accumulation: int = 1):
    """On the host: the gradient and the sums of a batch."""
    mesh, built = mesh_of(mesh_name), build(sharing)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def grad(params, batch, vocab):
        def loss(params, micro, key):
            return built.loss(params, micro, Keys(KEY, key), vocab)

        return accumulate_gradients(
            loss, params, batch, None, accumulation, built.compute.dtype, layers_at_once=accumulation > 1
        )

    with jax.set_mesh(mesh):
        return jax.device_get(grad(parameters_on(mesh, sharing), on_devices(make_rows(), mesh), tables_on(mesh)))


# Which loss each parameter learns from.


@functools.cache
def gradients_of_each_loss(sharing: str):
    mesh, built = mesh_of("1"), build(sharing)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def grads(params, batch, vocab):
        def loss(params, name):
            return built.loss(params, batch, Keys(KEY, None), vocab).losses[name].mean()

        return {name: jax.grad(loss)(params, name) for name in built.loss_names}

    with jax.set_mesh(mesh):
        found = grads(parameters_on(mesh, sharing), on_devices(make_rows(), mesh), tables_on(mesh))
    return {name: paths(tree) for name, tree in jax.device_get(found).items()}


def paths(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


SHARED = "generator/encoder/embeddings/"


@SHARING
def test_no_gradient_passes_through_the_samples(sharing):
    """The discriminator's loss reaches of the generator the shared embeddings, or nothing; and the other way nothing."""
    found = gradients_of_each_loss(sharing)
    reached = {path for path, grad in found["discriminator"].items() if (grad != 0).any()}
    own = {path for path in found["discriminator"] if path.startswith("discriminator/")}
    shared = {path for path in found["discriminator"] if path.startswith(SHARED)}
    assert len(shared) == 5 and len(own) > 15
    # Token types are all 0, so that the table's second row is never looked up; every other entry of these moves.
    assert reached == (own | shared if sharing == "tied" else own)
    generator = {path for path in found["generator"] if path.startswith("generator/")}
    assert {path for path, grad in found["generator"].items() if (grad != 0).any()} == generator


def test_disentangled_embeddings_start_as_the_generators(one):
    built, plain = build("disentangled"), build("tied")
    params = jax.jit(built.init, compiler_options=QUICK)(KEY)
    own = params["discriminator"]["encoder"]["embeddings"]
    assert own.keys() == params["generator"]["encoder"]["embeddings"].keys()
    assert all((own[name] == 0).all() for name in own if name != "norm") and (own["norm"]["scale_D"] == 1).all()
    batch, vocab = on_devices(make_rows(), one), tables_on(one)
    tied = params | {"discriminator": jax.tree.map(lambda x: x, params["discriminator"])}
    del tied["discriminator"]["encoder"]["embeddings"]

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def losses(objective, params):
        return objective.loss(params, batch, Keys(KEY, None), vocab).losses

    assert jax.device_get(losses(built, params)) == jax.device_get(losses(plain, tied))


# What the discriminator sees.


def test_a_sample_equal_to_the_original_is_no_replacement_and_unused_slots_replace_nothing(one):
    tokens = np.array([[2, 10, 11, 12, 3, 0], [2, 20, 21, 22, 23, 3]], np.int32)
    masked = MaskedBatch(
        inputs_BL=np.full_like(tokens, 4),  # what the generator saw must not matter
        positions_BP=np.array([[1, 3, 0], [0, 2, 4]], np.int32),
        targets_BP=np.array([[10, 12, 0], [2, 21, 23]], np.int32),
        weights_BP=np.array([[1, 1, 0], [1, 1, 1]], np.float32),
    )
    sampled = np.array([[10, 40, 50], [60, 61, 23]], np.int32)
    found = insert_tokens(jnp.asarray(tokens), masked, jnp.asarray(sampled))
    np.testing.assert_array_equal(found, [[2, 10, 11, 40, 3, 0], [60, 20, 61, 22, 23, 3]])
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found != tokens, [[0, 0, 0, 1, 0, 0], [1, 0, 1, 0, 0, 0]])


def test_samples_follow_the_softmax(one):
    count, logits = 50_000, np.array([0.0, 1.0, -2.0, 2.5, 0.3, -1e9], np.float32)
    keys = jax.vmap(lambda index: jax.random.fold_in(KEY, index))(jnp.arange(count // 2))
    logits_BPV = jnp.broadcast_to(logits[None, None], (count // 2, 2, 6))
    sampled = np.asarray(jax.jit(sample_tokens)(keys, logits_BPV))
    weights = np.exp(logits.astype(np.float64))
    expected, counts = weights / weights.sum() * count, np.bincount(sampled.ravel(), minlength=6)
    assert counts[5] == 0
    assert scipy.stats.chisquare(counts[:5], expected[:5]).pvalue > 1e-3
    # Two positions of one row are drawn apart.
    pairs = np.bincount(sampled[:, 0] * 6 + sampled[:, 1], minlength=36).reshape(6, 6)[:5, :5]
    assert scipy.stats.chi2_contingency(pairs).pvalue > 1e-3


def test_the_losses_by_hand(one):
    """From the parts: unmasked rows with samples in them, binary cross-entropy over every real token, 50 times it."""
    built, params, vocab = build(), parameters_on(one, "tied"), tables_on(one)
    tokens, real = make_rows()["tokens"], make_rows()["segment_ids"] > 0
    # Text of four tokens, which the generator likes best, so that it often draws the original.
    tokens = np.where(tokens >= 5, 5 + tokens % 4, tokens)
    bias_V = np.where((np.arange(VOCAB) >= 5) & (np.arange(VOCAB) < 9), np.float32(10), np.float32(0))
    params["generator"]["head"]["output_bias_V"] = jnp.asarray(bias_V)
    rows = on_devices(make_rows() | {"tokens": tokens}, one)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def parts(params):
        masked = mask_batch(rows, KEY, vocab, TIED.masking, constant_rates(TIED.masking))
        logits = built.logits(params, masked.inputs_BL, rows["segment_ids"], masked.positions_BP)
        keys = example_keys(KEY, rows["epochs"], rows["example_ids"], static=False)
        sampled = sample_tokens(jax.vmap(lambda key: jax.random.fold_in(key, streams.SAMPLES))(keys), logits)
        corrupted = insert_tokens(rows["tokens"], masked, sampled)
        network = built.discriminator.bind(built.discriminator_params(params))
        sums = built.loss(params, rows, Keys(KEY, None), vocab)
        return masked, sampled, corrupted, network(corrupted, rows["segment_ids"]), sums

    masked, sampled, corrupted, logits, sums = jax.device_get(parts(params))
    used, positions = masked.weights_BP > 0, masked.positions_BP
    expected = tokens.copy()
    for row in range(BATCH):
        expected[row, positions[row][used[row]]] = sampled[row][used[row]]
    np.testing.assert_array_equal(corrupted, expected)
    replaced = corrupted != tokens
    assert 10 < (sampled == masked.targets_BP)[used].sum() < used.sum() - 10
    assert replaced.sum() == (sampled != masked.targets_BP)[used].sum() and not replaced[~real].any()
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    nll = -np.where(replaced, np.log(probability), np.log(1 - probability))[real]
    np.testing.assert_allclose(sums.losses["discriminator"], (50 * nll.sum(), real.sum()), rtol=1e-5)
    assert sums.losses["generator"].weight == sums.predicted == used.sum()
    flagged, hits = logits > 0, (logits > 0) & replaced & real
    expected_metrics = {
        "detection_accuracy": ((flagged == replaced)[real].sum(), real.sum()),
        "precision": (hits.sum(), (flagged & real).sum()),
        "recall": (hits.sum(), replaced.sum()),
        "auc": pairs_by_hand(logits, replaced, real),
    }
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(sums.metrics[name], value, rtol=1e-6, err_msg=name)


def pairs_by_hand(logits: np.ndarray, replaced: np.ndarray, real: np.ndarray) -> tuple[float, int]:
    ordered = count = 0.0
    for row, fake, genuine in zip(logits, replaced & real, real & ~replaced, strict=True):
        for high in row[fake]:
            ordered += (high > row[genuine]).sum() + 0.5 * (high == row[genuine]).sum()
            count += genuine.sum()
    return ordered, count


def test_figures_of_a_discriminator_that_knows_and_of_one_that_does_not(one):
    replaced = np.arange(10)[None] % 3 == np.arange(4)[:, None]  # the last row has none
    real = np.ones((4, 10), bool)
    real[:, 8:] = False
    logits = np.where(replaced, 1.0, -1.0).astype(np.float32)
    for sign, share in ((1, 1.0), (-1, 0.0), (0, 0.5)):
        found = detection_terms(jnp.asarray(sign * logits), replaced, real)
        assert float(found["auc"].mean()) == share
        assert found["auc"].weight == sum(row.sum() * (8 - row.sum()) for row in (replaced & real))
        if sign:
            assert all(float(found[name].mean()) == share for name in ("detection_accuracy", "precision", "recall"))
    # Nothing counted is 0, not NaN: no logit above 0, and rows of padding alone.
    assert (float(found["precision"].mean()), float(found["precision"].weight)) == (0.0, 0.0)
    assert all(float(term.mean()) == 0 for term in detection_terms(logits, replaced, ~np.ones_like(real)).values())


# One batch, one gradient.


@pytest.mark.parametrize(
    ("sharing", "mesh_name", "accumulation"),
    [("tied", "1", 4), ("tied", "fsdp", 1), ("tied", "2x2x2", 2), ("disentangled", "2x2x2", 2)],
)
def test_a_batch_has_one_gradient_and_one_set_of_figures_on_any_mesh_and_accumulation(sharing, mesh_name, accumulation):
    expected, expected_sums = gradient(sharing)
    found, sums = gradient(sharing, mesh_name, accumulation)
    for name, term in (expected_sums.losses | expected_sums.metrics).items():
        np.testing.assert_allclose((sums.losses | sums.metrics)[name], term, rtol=1e-5, err_msg=name)
        assert term.weight > 50 or name == "precision"
    found = paths(found)
    for path, grad in paths(expected).items():
        # Float32 has 24 bits, of which sums of thousands of terms in another order lose up to 8.
        np.testing.assert_allclose(found[path], grad, atol=2e-5 * np.abs(grad).max() + 1e-8, rtol=0, err_msg=path)


def test_padding_rows_count_for_nothing(one):
    built, rows = build(), make_rows()
    rows["segment_ids"][:] = 0

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params, batch, vocab):
        return jax.value_and_grad(lambda p: total(built.loss(p, batch, Keys(KEY, None), vocab)), has_aux=True)(params)

    def total(sums):
        return sum(term.mean() for term in sums.losses.values()), sums

    (loss, sums), grads = jax.device_get(run(parameters_on(one, "tied"), on_devices(rows, one), tables_on(one)))
    assert loss == 0 and all(term == (0.0, 0.0) for term in (sums.losses | sums.metrics).values())
    assert all((grad == 0).all() for grad in jax.tree.leaves(grads))


@pytest.mark.slow
def test_steps_are_traced_once_and_need_nothing_from_the_host(one):
    cfg = dataclasses.replace(TIED, model=dataclasses.replace(TIED.model, dropout=0.1, attention_dropout=0.1))
    built = ReplacedTokenDetection(cfg, Compute.resolve(cfg.compute))
    optimizer, schedule, traces = make_optimizer(cfg), learning_rate(cfg), []
    step = make_train_step(cfg, cfg.stages[0], built, optimizer, lambda at: traces.append(at) or schedule(at))
    names = built.loss_names + built.metric_names
    state = jax.jit(lambda: init_state(built.init(KEY), optimizer, ema=False, names=names), compiler_options=QUICK)()
    vocab, before = tables_on(one), None
    for index in range(3):
        batch = on_devices(make_rows(index), one)
        before = jax.device_get(state.params)
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, batch, vocab)
    assert (len(traces), step._cache_size(), int(metrics["nonfinite"])) == (1, 1, 0)
    for (path, old), new in zip(paths(before).items(), jax.tree.leaves(state.params), strict=True):
        assert (old != np.asarray(new)).mean() > 0.4, path  # of token types one of two is never seen


# Evaluation and whole runs.


def test_an_evaluation_is_frozen_and_independent_of_its_batches(one):
    rows = {name: make_rows()[name] for name in ("tokens", "segment_ids")}
    log_unigram, results = np.full(VOCAB, -np.log(VOCAB), np.float32), []
    for sharing, batch_size, changes in (
        ("tied", 32, {}),
        ("tied", 12, {}),
        ("tied", 32, {"seed": 3, "masking": dataclasses.replace(TIED.masking, rate=0.5)}),
    ):
        cfg = dataclasses.replace(CONFIGS[sharing], **changes)
        eval_step = make_eval_step(cfg, ReplacedTokenDetection(cfg, Compute.resolve(cfg.compute)))
        params = parameters_on(one, sharing)
        results.append(evaluate(eval_step, params, HeldOut(rows, log_unigram), tables_on(one), np.ones(VOCAB), batch_size))
    assert results[0] == results[2] and results[1] == pytest.approx(results[0], rel=1e-5)
    own = {name: results[0][name] for name in ("detection_accuracy", "precision", "recall", "auc")}
    assert all(0 < share < 1 for share in own.values()) and results[0]["detection_loss"] > 0


SMOKE = str(pathlib.Path(__file__).resolve().parents[1] / "configs" / "smoke.py")
RUN = (
    "objective=rtd",
    "model.num_layers=1",
    "model.embed_dim=64",
    "model.table_dim=32",
    "model.mlp_dim=128",
    "model.vocab_size=512",
    "model.max_positions=48",
    "tokenizer.vocab_size=512",
    "tokenizer.algorithm=bpe",
    "masking.mask_prob=0.85",
    "masking.random_prob=0.0",
    "rtd.generator_size=0.5",
    "optimizer.warmup_steps=10",
    "optimizer.ema_decay=0.9",
    "stages[0].steps=80",
    "stages[0].seq_len=48",
    "stages[0].batch_size=16",
    "train.log_every=10",
    "train.checkpoint_every=40",
    "evaluation.every=40",
    "evaluation.max_rows=64",
)


def train(workdir: pathlib.Path, source: str) -> int:
    overrides = (f"--config.{field}" for field in (*RUN, f"data.source={source}"))
    return main(["train", "--config", SMOKE, "--workdir", str(workdir), *overrides])


def metrics(workdir: pathlib.Path) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """A run of 80 steps on some of the prose that comes with Python."""
    folder = tmp_path_factory.mktemp("rtd")
    file = folder / "topics.jsonl"
    file.write_text("".join(json.dumps({"text": topics[name]}) + "\n" for name in sorted(topics)[::2]))
    assert train(folder / "whole", f"files:{file}?field=text") == 0
    return folder / "whole"


def test_both_losses_fall_on_real_text(workdir):
    lines = metrics(workdir)
    first, *_, last = (line for line in lines if line["kind"] == "train")
    assert last["generator"] < first["generator"] - 0.5 and last["discriminator"] < first["discriminator"] - 1.0
    assert last["loss"] == pytest.approx(last["generator"] + last["discriminator"])
    held_out = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in held_out] == [40, 80]
    assert held_out[1]["loss"] < held_out[1]["unigram_loss"] + 0.5
    assert held_out[1]["auc"] > 0.55 and held_out[1]["detection_loss"] < 0.6


def test_half_a_run_restored_and_the_other_half_is_the_whole_run(workdir, tmp_path):
    halves = tmp_path / "halves"
    shutil.copytree(workdir, halves)
    shutil.rmtree(halves / "checkpoints" / "80")
    source = json.loads((workdir / "config.json").read_text())["data"]["source"]
    assert train(halves, source) == 0
    assert metrics(halves) == metrics(workdir)
    with open_run(workdir) as whole, open_run(halves) as other:
        assert whole.step == other.step == 80
        jax.tree.map(np.testing.assert_array_equal, whole.params, other.params)


def test_the_generator_fills_masks_and_the_discriminator_is_evaluated(workdir, capsys):
    assert main(["fill-mask", "--workdir", str(workdir), "--json", "--top-k=3", "the [MASK] of the object"]) == 0
    assert [len(mask) for mask in json.loads(capsys.readouterr().out.splitlines()[-1])["fills"][0]["masks"]] == [3]
    assert main(["evaluate", "--workdir", str(workdir), "--json"]) == 0
    found, logged = json.loads(capsys.readouterr().out.splitlines()[-1]), metrics(workdir)[-1]
    for name in ("loss", "detection_loss", "detection_accuracy", "auc"):
        assert found[name] == pytest.approx(logged[name], rel=1e-5)
