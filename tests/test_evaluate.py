"""Evaluation: masks that nothing changes, a baseline computed by hand, and means over rows however they are batched."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlm_jax import masking
from mlm_jax.config import Config, EvaluationConfig, MaskingConfig, ModelConfig, ShardingConfig, StageConfig
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives.mlm import MaskedLM
from mlm_jax.sharding import make_mesh
from mlm_jax.train.evaluate import HeldOut, described, evaluate, evaluate_sources, make_eval_step

ROWS, LENGTH, VOCAB = 20, 24, 128
CFG = Config(
    name="tiny",
    model=ModelConfig(vocab_size=VOCAB, num_layers=1, embed_dim=32, num_heads=2, mlp_dim=48, max_positions=LENGTH),
    stages=(StageConfig(seq_len=LENGTH),),
    evaluation=EvaluationConfig(mask_rate=0.2, seed=3),
)
TABLES = masking.VocabTables.from_arrays(
    mask_id=4, special_ids=np.arange(5), word_starts=np.arange(120) % 2 == 0, vocab_size=VOCAB
)
COUNTS = np.random.default_rng(1).integers(1, 1000, VOCAB)
LOG_UNIGRAM = np.log(COUNTS / COUNTS.sum()).astype(np.float32)
BYTES = np.random.default_rng(4).integers(1, 9, VOCAB).astype(np.float32)  # that each token stands for


def make_rows(rows: int = ROWS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 120, (rows, LENGTH)).astype(np.int32)
    lengths = rng.integers(6, LENGTH + 1, rows)
    segment_ids = (np.arange(LENGTH)[None] < lengths[:, None]).astype(np.int32)
    tokens[:, 0] = 2
    return {"tokens": np.where(segment_ids > 0, tokens, 0), "segment_ids": segment_ids}


@functools.cache
def parameters():
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        built = MaskedLM(CFG, Compute.resolve(CFG.compute))
        shapes = jax.eval_shape(built.init, jax.random.key(0))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: rng.normal(0.2, 0.3, leaf.shape).astype(np.float32), shapes)


@functools.cache
def eval_step(cfg: Config):
    return make_eval_step(cfg, MaskedLM(cfg, Compute.resolve(cfg.compute)))


def run(cfg: Config = CFG, *, batch_size: int = 8, rows=None, devices: int = 1) -> dict[str, float]:
    mesh = make_mesh(ShardingConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        replicated = jax.NamedSharding(mesh, jax.P())
        params, vocab, log_unigram, lengths = jax.device_put((parameters(), TABLES, LOG_UNIGRAM, BYTES), replicated)
        return evaluate(eval_step(cfg), params, HeldOut(rows or make_rows(), log_unigram), vocab, lengths, batch_size)


def change(cfg: Config = CFG, **sections) -> Config:
    return dataclasses.replace(cfg, **sections)


@functools.cache
def plain() -> dict[str, float]:
    return run()


def test_a_second_call_gives_the_same_numbers_from_the_same_program():
    first, programs = run(), eval_step(CFG)._cache_size()
    assert run() == first == plain()
    assert eval_step(CFG)._cache_size() == programs
    assert plain()["perplexity"] == pytest.approx(math.exp(plain()["loss"]))


@pytest.mark.parametrize(
    "cfg",
    [
        change(masking=MaskingConfig(policy="whole_word", rate=0.4, mask_prob=1.0, random_prob=0.0, include_special=True)),
        change(seed=5, stages=(StageConfig(seq_len=LENGTH, mask_rate=0.5),)),
        change(model=dataclasses.replace(CFG.model, dropout=0.5, attention_dropout=0.5)),
    ],
    ids=["masking", "seed", "dropout"],
)
def test_how_a_run_trains_does_not_change_how_it_is_evaluated(cfg):
    assert run(cfg) == plain()


def test_the_evaluations_own_rate_and_seed_do():
    rated = run(change(evaluation=dataclasses.replace(CFG.evaluation, mask_rate=0.4)))
    assert rated["tokens"] == pytest.approx(2 * plain()["tokens"], rel=0.05)
    seeded = run(change(evaluation=dataclasses.replace(CFG.evaluation, seed=4)))
    assert seeded["tokens"] == plain()["tokens"] and seeded["loss"] != plain()["loss"]


@functools.cache
def frozen() -> masking.MaskedBatch:
    """The masks that an evaluation must use, for all rows at once."""

    @jax.jit
    def mask(rows):
        ids = jnp.arange(ROWS, dtype=jnp.int32)
        keys = masking.example_keys(jax.random.key(CFG.evaluation.seed), ids, ids, static=True)
        return masking.mask_tokens(
            keys,
            rows["tokens"],
            rows["segment_ids"],
            TABLES,
            rate=0.2,
            num_slots=masking.num_slots(LENGTH, 0.2),
            policy="token",
            mask_prob=0.8,
            random_prob=0.1,
            random_from="regular",
            include_special=False,
        )

    return jax.device_get(mask(make_rows()))


def test_the_unigram_baseline_by_hand():
    masked = frozen()
    used = masked.weights_BP == 1
    targets = np.take_along_axis(make_rows()["tokens"], masked.positions_BP, 1)[used]
    assert plain()["tokens"] == len(targets) > 40
    assert plain()["unigram_loss"] == pytest.approx(-LOG_UNIGRAM[targets].astype(np.float64).mean(), rel=1e-6)
    best = np.argmax(LOG_UNIGRAM)
    # The most frequent token of the training text, wherever it stands here.
    rows = make_rows()
    rows["tokens"] = np.where((rows["segment_ids"] > 0) & (np.arange(LENGTH) % 3 == 1), best, rows["tokens"])
    targets = np.take_along_axis(rows["tokens"], masked.positions_BP, 1)[used]
    assert (targets == best).mean() > 0.2
    assert run(rows=rows)["unigram_accuracy"] == pytest.approx((targets == best).mean())


def test_the_models_loss_by_hand():
    masked = frozen()
    built = MaskedLM(CFG, Compute.resolve(CFG.compute))
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        logits = jax.jit(built.logits)(parameters(), masked.inputs_BL, make_rows()["segment_ids"], masked.positions_BP)
    logits = np.asarray(logits, np.float64)
    used = masked.weights_BP == 1
    targets = masked.targets_BP
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    assert plain()["loss"] == pytest.approx(nll[used].mean(), rel=1e-5)
    assert plain()["accuracy"] == pytest.approx((logits.argmax(-1) == targets)[used].mean())
    bits = nll[used].sum() / math.log(2.0)
    assert plain()["bits_per_byte"] == pytest.approx(bits / BYTES[targets[used]].sum(), rel=1e-5)


def test_a_mixture_is_measured_by_source_and_as_a_whole():
    """The whole is the mean over all masked tokens, and a source has the masks and the unigram model that it has alone."""
    mesh = make_mesh(ShardingConfig(), jax.devices()[:1])
    other = np.roll(LOG_UNIGRAM, 7)
    sources = {"one": HeldOut(make_rows(), LOG_UNIGRAM), "two": HeldOut(make_rows(9), other)}
    with jax.set_mesh(mesh):
        arguments = (jax.device_put(parameters(), jax.NamedSharding(mesh, jax.P())), TABLES, BYTES, 8)
        params, *rest = arguments
        found = evaluate_sources(eval_step(CFG), params, sources, *rest)
        alone = {name: evaluate(eval_step(CFG), params, one, *rest) for name, one in sources.items()}
        (only,) = (evaluate_sources(eval_step(CFG), params, {"": one}, *rest) for one in [sources["one"]])
    assert found["sources"] == alone and only == alone["one"]
    assert alone["one"]["unigram_loss"] != alone["two"]["unigram_loss"]
    tokens = {name: values["tokens"] for name, values in alone.items()}
    assert found["tokens"] == sum(tokens.values()) and tokens["one"] != tokens["two"]
    for name in ("loss", "accuracy", "unigram_loss"):
        mean = sum(alone[source][name] * count for source, count in tokens.items()) / found["tokens"]
        assert found[name] == pytest.approx(mean, rel=1e-6)
    whole, *by_source = described(found)
    assert whole.startswith(f"held-out: loss {found['loss']:.4f}, accuracy")
    assert [line.split(":")[0] for line in by_source] == ["held-out one", "held-out two"]
    assert f"{alone['two']['bits_per_byte']:.4f} bits per byte" in by_source[1]


@pytest.mark.parametrize(("batch_size", "devices"), [(ROWS, 1), (32, 1), (3, 8)])
def test_batches_and_devices_change_nothing(batch_size, devices):
    """20 rows are two batches of 8 and a short one, one of 20, one of 32 with padding, or short ones of 8 over 8 devices."""
    found = run(batch_size=batch_size, devices=devices)
    assert found["tokens"] == plain()["tokens"]
    assert found == pytest.approx(plain(), rel=1e-6)


def test_a_diverged_model_has_a_perplexity_still():
    cfg, mesh = CFG, make_mesh(ShardingConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda leaf: leaf * 1e4, parameters())
        found = evaluate(eval_step(cfg), params, HeldOut(make_rows(), LOG_UNIGRAM), TABLES, BYTES, 8)
    assert found["loss"] > 1e3 and math.isfinite(found["perplexity"])
