"""Filled masks: the most probable tokens of the model's own distribution, sorted, and never a special one."""

import jax
import numpy as np
import pytest

from mlm_jax.config import Config, ModelConfig, ShardingConfig, TokenizerConfig
from mlm_jax.data.tokenizer import train_tokenizer
from mlm_jax.errors import UserError
from mlm_jax.fill_mask import Filler
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives.mlm import MaskedLM
from mlm_jax.sharding import make_mesh

VOCAB, LIMIT = 320, 32
TEXTS = ["the cat sat on the mat", "a dog and a cat ran to the house", "the house of the dog is old"] * 20
CFG = Config(
    name="tiny",
    model=ModelConfig(vocab_size=384, num_layers=1, embed_dim=32, num_heads=2, mlp_dim=48, max_positions=LIMIT),
)
PROMPTS = ["the [MASK] sat on the mat", "a [MASK] and a [MASK] ran to [MASK]", "[MASK]"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TokenizerConfig(vocab_size=VOCAB, algorithm="bpe"), TEXTS)


@pytest.fixture(scope="module")
def objective():
    return MaskedLM(CFG, Compute.resolve(CFG.compute))


@pytest.fixture(scope="module")
def filler(objective, tokenizer):
    return Filler(objective, tokenizer)


@pytest.fixture(scope="module")
def weights(objective, tokenizer):
    """Random, and so biased that special ids and ids beyond the tokenizer's would come first."""
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        shapes = jax.eval_shape(objective.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), shapes)
    for ids in (tokenizer.special_ids, np.arange(tokenizer.vocab_size, CFG.model.vocab_size)):
        params["head"]["output_bias_V"][ids] += 5.0
    return params


@pytest.fixture(params=[1, 8])
def params(request, weights):
    mesh = make_mesh(ShardingConfig(), jax.devices()[: request.param])
    with jax.set_mesh(mesh):
        yield jax.device_put(weights, jax.NamedSharding(mesh, jax.P()))


def by_hand(objective, tokenizer, weights, text: str) -> list[np.ndarray]:
    """The model's distribution at each mask, one text at a time and without padding: float64 [V]."""
    ids = np.concatenate([[tokenizer.cls_id], tokenizer.encode_with_masks(text), [tokenizer.sep_id]]).astype(np.int32)[None]
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        logits = jax.jit(objective.logits)(weights, ids, np.ones_like(ids), np.arange(ids.shape[1], dtype=np.int32)[None])
    exponential = np.exp(np.asarray(logits, np.float64)[0])
    return list((exponential / exponential.sum(-1, keepdims=True))[ids[0] == tokenizer.mask_id])


def test_fills_are_the_models_own_best_regular_tokens(filler, objective, tokenizer, weights, params):
    found = filler(params, PROMPTS, top_k=7)
    assert [len(masks) for masks in found] == [1, 3, 1]
    for text, masks in zip(PROMPTS, found, strict=True):
        for fills, distribution in zip(masks, by_hand(objective, tokenizer, weights, text), strict=True):
            regular = np.setdiff1d(np.arange(tokenizer.vocab_size), tokenizer.special_ids)
            best = regular[np.argsort(-distribution[regular])][:7]
            assert [fill["token"] for fill in fills] == [tokenizer.decode([token]) for token in best]
            assert [fill["begins_word"] for fill in fills] == list(tokenizer.word_starts()[best])
            # Of the whole vocabulary: what is hidden has its share.
            np.testing.assert_allclose([fill["probability"] for fill in fills], distribution[best], rtol=1e-4)


@pytest.mark.parametrize("params", [1], indirect=True)
def test_every_candidate_is_regular_and_in_order(filler, tokenizer, params):
    regular = tokenizer.vocab_size - len(tokenizer.special_ids)
    (fills,) = filler(params, PROMPTS[:1], top_k=regular)[0]
    probabilities = [fill["probability"] for fill in fills]
    assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) < 0.9
    assert min(probabilities) > 0
    assert len(fills) == regular and tokenizer.piece(tokenizer.mask_id) not in {fill["token"] for fill in fills}
    with pytest.raises(UserError, match=f"top_k={regular + 1} must lie between 1 and {regular}"):
        filler(params, PROMPTS, top_k=regular + 1)


@pytest.mark.parametrize("params", [1], indirect=True)
def test_a_text_has_the_same_fills_beside_others(filler, params):
    together = filler(params, PROMPTS, top_k=3)
    for text, masks in zip(PROMPTS, together, strict=True):
        (alone,) = filler(params, [text], top_k=3)
        for fills, others in zip(alone, masks, strict=True):
            assert [fill["token"] for fill in fills] == [fill["token"] for fill in others]
            np.testing.assert_allclose(*([fill["probability"] for fill in each] for each in (fills, others)), rtol=1e-4)


@pytest.mark.parametrize("params", [1], indirect=True)
@pytest.mark.parametrize(
    ("texts", "top_k", "message"),
    [
        (["no mask here"], 5, r"no \[MASK\] in 'no mask here'"),
        (["a [MASK]", "none"], 5, r"no \[MASK\] in 'none'"),
        ([""], 5, r"no \[MASK\] in ''"),
        (["[MASK] " + "cat " * LIMIT], 5, rf"exceeds the model's {LIMIT} positions"),
        (["a [MASK]"], 0, "top_k=0 must lie between 1 and"),
        (["a [MASK]"], -1, "top_k=-1 must lie between 1 and"),
    ],
)
def test_mistakes(filler, params, texts, top_k, message):
    with pytest.raises(UserError, match=message):
        filler(params, texts, top_k=top_k)


@pytest.mark.parametrize("params", [1], indirect=True)
def test_a_text_as_long_as_the_model_allows(filler, tokenizer, params):
    words = 0
    while len(tokenizer.encode_with_masks("[MASK]" + " cat" * (words + 1))) <= LIMIT - 2:
        words += 1
    ((fills,),) = filler(params, ["[MASK]" + " cat" * words], top_k=2)
    assert len(fills) == 2


@pytest.mark.parametrize("params", [1], indirect=True)
def test_texts_of_about_one_length_share_a_program(filler, params):
    filler(params, ["the [MASK]"], top_k=2)
    programs = filler._predict._cache_size()
    filler(params, ["the [MASK] sat on"], top_k=2)
    assert filler._predict._cache_size() == programs
