"""Generated text: every blank filled and nothing else touched, in the order of the method, the same for the same seed."""

import dataclasses
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_masking import assert_binomial

from mlm_jax.config import Config, HybridConfig, MaskingConfig, ModelConfig, ShardingConfig, StageConfig, TokenizerConfig
from mlm_jax.data.tokenizer import train_tokenizer
from mlm_jax.errors import UserError
from mlm_jax.generate import Generator, Sampling, Schedule, default_method, untrained_for
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import make_objective
from mlm_jax.sharding import make_mesh

VOCAB, LIMIT = 320, 32
TEXTS = ["the cat sat on the mat", "a dog and a cat ran to the house", "the house of the dog is old"] * 20
CFG = Config(
    name="tiny",
    model=ModelConfig(vocab_size=384, num_layers=1, embed_dim=32, num_heads=2, mlp_dim=48, max_positions=LIMIT),
    hybrid=HybridConfig(causal_share=0.5),
)
PROMPT = "the [MASK] sat [MASK:4] on the mat [MASK]"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TokenizerConfig(vocab_size=VOCAB, algorithm="bpe"), TEXTS)


@pytest.fixture(scope="module")
def objectives(tokenizer):
    names = ("mlm", "diffusion", "hybrid")
    cfgs = {name: dataclasses.replace(CFG, objective=name) for name in names}
    return {name: make_objective(cfg, Compute.resolve(cfg.compute), mask_id=tokenizer.mask_id) for name, cfg in cfgs.items()}


@pytest.fixture(scope="module")
def generators(objectives, tokenizer):
    return {name: Generator(objective, tokenizer) for name, objective in objectives.items()}


@pytest.fixture(scope="module")
def weights(objectives, tokenizer):
    """Random, and so biased that special ids and ids beyond the tokenizer's would come first; SEP is rare but possible."""
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        shapes = jax.eval_shape(objectives["mlm"].init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), shapes)
    for ids in (np.setdiff1d(tokenizer.special_ids, [tokenizer.sep_id]), np.arange(tokenizer.vocab_size, 384)):
        params["head"]["output_bias_V"][ids] += 5.0
    return params


@pytest.fixture(params=[1, 8])
def params(request, weights):
    mesh = make_mesh(ShardingConfig(), jax.devices()[: request.param])
    with jax.set_mesh(mesh):
        yield jax.device_put(weights, jax.NamedSharding(mesh, jax.P()))


one_device = pytest.mark.parametrize("params", [1], indirect=True)


def test_every_blank_is_filled_and_nothing_else_is_touched(generators, tokenizer, params):
    for name, method, steps, size in [
        ("mlm", "confidence", 3, 0),
        ("diffusion", "ancestral", 5, 2),
        ("hybrid", "ancestral", 2, 0),
    ]:
        generator = generators[name]
        ids, blanks = generator.encode(PROMPT, 3)
        assert len(blanks) == 1 + 4 + 1 + 3
        found = generator.draw(params, ids, blanks, Sampling(method, steps, block_size=size, count=9, seed=1))
        assert found.shape == (9, len(ids))
        np.testing.assert_array_equal(np.delete(found, blanks, axis=1), np.delete(ids, blanks)[None].repeat(9, 0))
        assert not np.isin(found[:, blanks], tokenizer.special_ids).any() and found.max() < tokenizer.vocab_size
        assert len(np.unique(found, axis=0)) == 9
        (text,) = generator(params, PROMPT, Sampling(method, steps, block_size=size, seed=1), length=3)
        assert text == tokenizer.decode(found[0]) and text.startswith("the") and "on the mat" in text


def test_a_seed_gives_the_same_samples_however_many_are_drawn(generators, params):
    generator = generators["diffusion"]
    three = generator(params, PROMPT, Sampling(steps=3, count=3, seed=7))
    assert three == generator(params, PROMPT, Sampling(steps=3, count=3, seed=7))
    assert three[:2] == generator(params, PROMPT, Sampling(steps=3, count=2, seed=7))
    assert not set(three) & set(generator(params, PROMPT, Sampling(steps=3, count=3, seed=8)))


# The order.


def probabilities(objective, weights, tokenizer, ids, method="logits") -> np.ndarray:
    """At every place of one text without padding, of regular tokens alone: float64 [L, V]."""
    places = np.arange(len(ids), dtype=np.int32)[None]
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        given = weights, ids[None], np.ones_like(ids)[None], places
        logits = np.asarray(jax.jit(getattr(objective, method))(*given), np.float64)[0]
    logits[:, tokenizer.vocab_size :] = -np.inf
    logits[:, np.setdiff1d(tokenizer.special_ids, [tokenizer.sep_id] if method == "causal_logits" else [])] = -np.inf
    exponential = np.exp(logits - logits.max(-1, keepdims=True))
    return exponential / exponential.sum(-1, keepdims=True)


@one_device
@pytest.mark.parametrize(
    ("steps", "block_size", "left"), [(9, 0, range(8, -1, -1)), (2, 0, (4, 0)), (5, 4, (2, 0, 2, 0, 0))]
)
def test_the_surest_blanks_of_the_block_come_first(
    generators, objectives, weights, tokenizer, params, steps, block_size, left
):
    generator = generators["mlm"]
    ids, blanks = generator.encode(PROMPT, 3)
    found = generator.draw(params, ids, blanks, Sampling("confidence", steps, 0.0, block_size))[0]
    expected, schedule = ids.copy(), Schedule.plan(9, steps, block_size)
    np.testing.assert_array_equal(schedule.left_K, list(left))
    for block, remain in zip(schedule.block_K, schedule.left_K, strict=True):
        own = blanks[block * (block_size or 9) :][: block_size or 9]
        best = probabilities(objectives["mlm"], weights, tokenizer, expected)
        open_places = [place for place in own if expected[place] == tokenizer.mask_id]
        open_places.sort(key=lambda place: -best[place].max())
        for place in open_places[: len(open_places) - remain]:
            expected[place] = best[place].argmax()
    np.testing.assert_array_equal(found, expected)


def test_a_plan_of_ancestral_steps_fills_each_blank_with_equal_chance_at_each():
    plan = Schedule.plan(7, 11, 3)
    np.testing.assert_array_equal(plan.block_K, [0] * 4 + [1] * 4 + [2] * 3)
    left = 1.0
    for step, chance in enumerate(plan.chance_K[:4]):
        assert left * chance == pytest.approx(1 / 4), step
        left *= 1 - chance
    assert left == 0 and plan.chance_K[-1] == 1.0
    with pytest.raises(UserError, match="2 steps are too few for 3 blocks of 3 blanks"):
        Schedule.plan(7, 2, 3)


@one_device
def test_ancestral_steps_draw_from_the_models_distribution(generators, objectives, weights, tokenizer, params):
    """One blank, many samples: the tokens' shares are their probabilities, at the temperature asked for."""
    generator = generators["hybrid"]
    ids, blanks = generator.encode("the cat [MASK] on the mat", 0)
    exact = probabilities(objectives["hybrid"], weights, tokenizer, ids)[blanks[0]]
    for temperature in (1.0, 0.5):
        found = generator.draw(params, ids, blanks, Sampling("ancestral", 3, temperature, count=2048, seed=3))[:, blanks[0]]
        expected = exact ** (1 / temperature) / (exact ** (1 / temperature)).sum()
        common = expected > 0.01
        shares = np.bincount(found, minlength=384)[common] / 2048
        assert common.sum() > 3
        assert (np.abs(shares - expected[common]) < 4.5 * np.sqrt(expected[common] / 2048)).all()


@one_device
@pytest.mark.parametrize(("steps", "blocks"), [(3, 1), (4, 2)])
def test_ancestral_steps_fill_each_blank_in_one_of_its_blocks_steps_by_lot(tokenizer, params, steps, blocks):
    """A model whose every token tells how many masks are left: what a blank holds is the step at which it was filled."""
    blanks, rows, first = 40, 512, 100

    def logits(params, tokens_BL, segment_ids_BL, positions_BP):
        left_B11 = (tokens_BL == tokenizer.mask_id).sum(1)[:, None, None]
        told_BPV = jnp.arange(VOCAB)[None, None] == first + left_B11
        return jnp.where(jnp.broadcast_to(told_BPV, (*positions_BP.shape, VOCAB)), 0.0, -1e9)

    model = types.SimpleNamespace(vocab_size=VOCAB, max_positions=64)
    generator = Generator(types.SimpleNamespace(cfg=types.SimpleNamespace(model=model), logits=logits), tokenizer)
    ids, places = generator.encode(f"[MASK:{blanks}]", 0)
    sampling = Sampling("ancestral", steps, 0.0, block_size=blanks // blocks, count=rows, seed=5)
    left = generator.draw(params, ids, places, sampling)[:, places] - first
    counts = [np.unique(row)[::-1] for row in left]  # of these seeds no step of any row fills nothing
    assert {len(each) for each in counts} == {steps} and {each[0] for each in counts} == {blanks}
    step = np.stack([np.searchsorted(-each, -row) for each, row in zip(counts, left, strict=True)])
    own_steps = steps // blocks
    block, turn = step // own_steps, step % own_steps
    np.testing.assert_array_equal(block, np.arange(blanks)[None] * blocks // blanks + np.zeros((rows, 1), int))
    for one in range(own_steps):
        assert_binomial(int((turn == one).sum()), turn.size, 1 / own_steps)
    neighbours = {
        "blanks": (turn[:, ::2], turn[:, 1::2]),
        "blocks": (turn[:, :20], turn[:, 20:]),
        "rows": (turn[::2], turn[1::2]),
    }
    for one, other in neighbours.values():
        for pair in itertools.product(range(own_steps), repeat=2):
            assert_binomial(int(((one == pair[0]) & (other == pair[1])).sum()), one.size, 1 / own_steps**2)


# From left to right.


@one_device
def test_a_text_is_continued_token_by_token_up_to_its_end(generators, objectives, weights, tokenizer, params):
    generator = generators["hybrid"]
    ids, blanks = generator.encode("the cat sat", 9)
    found = generator.draw(params, ids, blanks, Sampling("causal", temperature=0.0))[0]
    expected, ended = ids.copy(), False
    for place in blanks:
        best = probabilities(objectives["hybrid"], weights, tokenizer, expected, "causal_logits")[place].argmax()
        expected[place] = tokenizer.sep_id if ended else best
        ended |= expected[place] == tokenizer.sep_id
    np.testing.assert_array_equal(found, expected)
    ending = jax.tree.map(np.copy, weights)
    ending["head"]["output_bias_V"][tokenizer.sep_id] += 50.0
    assert generator(ending, "the cat sat", Sampling("causal", count=2), length=9) == ["the cat sat"] * 2


@one_device
def test_a_prompt_without_blanks_is_continued(generators, tokenizer, params):
    for method in ("confidence", "causal"):
        ids, blanks = generators["hybrid"].encode("the cat", 0)
        assert len(ids) == LIMIT and len(blanks) == LIMIT - 2 - len(tokenizer.encode("the cat"))
        (text,) = generators["hybrid"](params, "the cat", Sampling(method, seed=1))
        assert text.startswith("the cat") and len(text) > len("the cat")
    (text,) = generators["mlm"](params, "", Sampling(steps=2), length=5)
    assert text and "[MASK]" not in text


@one_device
def test_prompts_of_about_one_length_share_a_program(generators, params):
    generator = generators["mlm"]
    generator(params, "the [MASK] sat", Sampling(steps=2))
    programs = generator._fill._cache_size()
    generator(params, "a [MASK] and [MASK] ran", Sampling(steps=2, temperature=0.3, seed=4))
    assert generator._fill._cache_size() == programs


@one_device
@pytest.mark.parametrize(
    ("name", "prompt", "sampling", "length", "message"),
    [
        ("mlm", "a cat", {"method": "causal"}, 4, "needs a run with objective='hybrid'.* objective='mlm'"),
        ("hybrid", "a [MASK] cat", {"method": "causal"}, 4, "its blanks must be at its end"),
        ("mlm", "a [MASK:40]", {}, 0, f"40 blanks exceed the model's {LIMIT} positions"),
        ("mlm", "a [MASK:0]", {}, 0, "a run of blanks holds at least one"),
        ("mlm", "a", {}, -1, "length=-1"),
        ("mlm", "cat " * 29, {}, 20, f"exceeds the model's {LIMIT} positions"),
        ("mlm", "cat " * 40, {}, 0, f"exceeds the model's {LIMIT} positions"),
        ("mlm", "[MASK:9]", {"steps": 2, "block_size": 3}, 0, "2 steps are too few for 3 blocks"),
    ],
)
def test_mistakes(generators, params, name, prompt, sampling, length, message):
    with pytest.raises(UserError, match=message):
        generators[name](params, prompt, Sampling(**sampling), length=length)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "greedy"}, "unknown method 'greedy': choose from confidence, ancestral, causal"),
        ({"count": 0}, "count=0 must be positive"),
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be at least 0"),
        ({"steps": -1}, "steps=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296 must be at least 0 and below 2147483648"),
        ({"steps": 3_000_000_000}, "steps=3000000000 must be at least 0 and below 2147483648"),
        ({"temperature": float("inf")}, "temperature=inf must be at least 0 and below 2147483648"),
        ({"method": "causal", "steps": 3}, "takes neither steps nor block_size"),
    ],
)
def test_settings_that_mean_nothing(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)


def test_what_a_run_was_not_trained_for_is_said(objectives):
    stages = (StageConfig(), StageConfig(mask_rate=0.4))
    assert "40% of a text masked" in untrained_for(dataclasses.replace(CFG, stages=stages), "confidence")
    moving = MaskingConfig(rate=0.15, rate_spread=0.05, schedule="linear", final_rate=0.6)
    assert "at most 65% of a text masked" in untrained_for(dataclasses.replace(CFG, masking=moving), "confidence")
    assert untrained_for(dataclasses.replace(CFG, objective="diffusion"), "ancestral") == ""
    hybrid = dataclasses.replace(CFG, objective="hybrid")
    assert "15% of a text" in untrained_for(hybrid, "confidence") and untrained_for(hybrid, "causal") == ""
    plain = dataclasses.replace(hybrid, hybrid=HybridConfig(causal_share=1.0))
    assert "--method causal is its own" in untrained_for(plain, "confidence")
    assert default_method(make_objective(plain, Compute.resolve(plain.compute))) == "causal"
    assert {default_method(objective) for objective in objectives.values()} == {"confidence"}
