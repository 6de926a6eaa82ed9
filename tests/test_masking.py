"""Masking: exact counts, unbiased choices, whole words, and independence of everything but the row."""

import functools

import jax
import numpy as np
import pytest

from mlm_jax import masking
from mlm_jax.masking import words

LENGTH, ROWS = 64, 2048  # most tests share one shape: compiling takes longer than running
TOKENIZER_SIZE, MODEL_SIZE = 120, 128
CLS, SEP, MASK = 2, 3, 4
SPECIAL = np.array([0, 1, 2, 3, 4, 9])
REGULAR = np.setdiff1d(np.arange(TOKENIZER_SIZE), SPECIAL)
SETTINGS = {"mask_prob": 0.8, "random_prob": 0.1, "random_from": "regular", "include_special": False}


def make_vocab() -> masking.VocabTables:
    """Every third id begins a word."""
    return masking.VocabTables.from_arrays(
        mask_id=MASK,
        special_ids=SPECIAL,
        word_starts=np.arange(TOKENIZER_SIZE) % 3 == 0,
        vocab_size=MODEL_SIZE,
    )


def make_rows(num_rows: int, seed: int = 0, length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two packed segments `[CLS] … [SEP]` and some padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.choice(REGULAR, (num_rows, length)).astype(np.int32)
    segment_ids = np.zeros((num_rows, length), np.int32)
    for row in range(num_rows):
        first, last = rng.integers(4, length // 2), rng.integers(length // 2 + 4, length + 1)
        for segment, (begin, end) in enumerate([(0, first), (first, last)], start=1):
            tokens[row, begin], tokens[row, end - 1] = CLS, SEP
            segment_ids[row, begin:end] = segment
        tokens[row, last:] = 0
    return tokens, segment_ids


@functools.partial(
    jax.jit,
    static_argnames=("rate", "policy", "static", "random_from", "include_special"),
)
def run(tokens, segment_ids, example_ids, epochs, vocab, *, rate=0.15, policy="token", static=False, **settings):
    keys = masking.example_keys(jax.random.key(7), epochs, example_ids, static=static)
    slots = masking.num_slots(tokens.shape[1], rate)
    return masking.mask_tokens(keys, tokens, segment_ids, vocab, rate=rate, num_slots=slots, policy=policy, **settings)


def mask(tokens: np.ndarray, segment_ids: np.ndarray, *, ids=None, epoch: int = 0, **options) -> masking.MaskedBatch:
    ids = np.arange(len(tokens), dtype=np.int32) if ids is None else np.asarray(ids, np.int32)
    options = SETTINGS | options
    epochs = np.full(len(ids), epoch, np.int32)
    return jax.tree.map(np.asarray, run(tokens, segment_ids, ids, epochs, make_vocab(), **options))


def chosen_mask(batch: masking.MaskedBatch) -> np.ndarray:
    """bool [B, L]: the positions in used slots."""
    chosen = np.zeros(batch.inputs_BL.shape, bool)
    rows, slots = np.nonzero(batch.weights_BP)
    chosen[rows, batch.positions_BP[rows, slots]] = True
    return chosen


def assert_same(a: masking.MaskedBatch, b: masking.MaskedBatch) -> None:
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


def expected_count(real: int, candidates: int, rate: float, length: int) -> int:
    budget = max(1, int(np.round(np.float32(rate) * np.float32(real))))
    return min(masking.num_slots(length, rate), candidates, budget)


def test_no_two_draws_share_a_key():
    found = {name: int(number) for name, number in vars(masking.streams).items() if name.isupper()}
    assert len(set(found.values())) == len(found) == 6
    # An epoch is folded in where the last three are, so that none of them may be one.
    assert min(found[name] for name in ("ROW_RATES", "CAUSAL_ROWS", "DRAWS")) > 2**31


@pytest.mark.parametrize("rate", [0.01, 0.15, 0.9])
def test_count_is_exact_and_slots_are_ordered(rate):
    tokens, segment_ids = make_rows(ROWS)
    batch = mask(tokens, segment_ids, rate=rate)
    candidates = (segment_ids > 0) & ~np.isin(tokens, SPECIAL)
    for row in range(ROWS):
        count = expected_count((segment_ids[row] > 0).sum(), candidates[row].sum(), rate, LENGTH)
        np.testing.assert_array_equal(batch.weights_BP[row], np.arange(batch.weights_BP.shape[1]) < count)
        positions = batch.positions_BP[row, :count]
        assert (np.diff(positions) > 0).all()
        np.testing.assert_array_equal(batch.targets_BP[row, :count], tokens[row, positions])
        assert (batch.positions_BP[row, count:] == 0).all() and (batch.targets_BP[row, count:] == 0).all()


@pytest.mark.parametrize("policy", ["token", "whole_word"])
def test_specials_and_padding_are_never_chosen_and_the_rest_is_shown_as_it_is(policy):
    tokens, segment_ids = make_rows(ROWS)
    batch = mask(tokens, segment_ids, policy=policy, rate=0.3)
    chosen = chosen_mask(batch)
    assert chosen.any(axis=1).all()
    assert not chosen[segment_ids == 0].any()
    assert not chosen[np.isin(tokens, SPECIAL)].any()
    np.testing.assert_array_equal(batch.inputs_BL[~chosen], tokens[~chosen])


def test_include_special_chooses_cls_and_sep_but_not_padding():
    tokens, segment_ids = make_rows(ROWS)
    chosen = chosen_mask(mask(tokens, segment_ids, include_special=True))
    assert chosen[tokens == CLS].any() and chosen[tokens == SEP].any()
    assert not chosen[segment_ids == 0].any()


def test_number_of_slots_is_what_a_full_row_uses():
    assert masking.num_slots(128, 0.15) == 19
    assert masking.num_slots(512, 0.15) == 77
    assert masking.num_slots(8, 0.01) == 1
    tokens = np.full((1, 512), 30, np.int32)
    assert mask(tokens, np.ones_like(tokens)).weights_BP.sum() == 77


def shares(batch: masking.MaskedBatch, tokens: np.ndarray) -> tuple[int, np.ndarray]:
    """How many positions were chosen, and how many of them show [MASK], the token itself, and another token."""
    chosen = chosen_mask(batch)
    shown, original = batch.inputs_BL[chosen], tokens[chosen]
    masked, kept = shown == MASK, shown == original
    return chosen.sum(), np.array([masked.sum(), kept.sum(), (~masked & ~kept).sum()])


def assert_binomial(count: int, trials: int, probability: float) -> None:
    """Within 4.5 standard deviations: a false alarm in 150,000 runs, and the seed is fixed."""
    assert abs(count - trials * probability) < 4.5 * np.sqrt(trials * probability * (1 - probability)) + 1e-9


@pytest.mark.parametrize(("mask_prob", "random_prob"), [(0.8, 0.1), (1.0, 0.0), (0.5, 0.5), (0.0, 0.3), (0.85, 0.0)])
@pytest.mark.parametrize("policy", ["token", "whole_word"])
def test_split_of_outcomes(policy, mask_prob, random_prob):
    tokens, segment_ids = make_rows(ROWS)
    batch = mask(tokens, segment_ids, policy=policy, mask_prob=mask_prob, random_prob=random_prob)
    trials, (masked, kept, other) = shares(batch, tokens)
    same_by_chance = random_prob / len(REGULAR)
    assert trials > 10_000
    assert_binomial(masked, trials, mask_prob)
    assert_binomial(kept, trials, 1 - mask_prob - random_prob + same_by_chance)
    assert_binomial(other, trials, random_prob - same_by_chance)


def chi_square_is_ordinary(counts: np.ndarray) -> bool:
    """Against equal shares: the statistic has mean k - 1 and variance 2(k - 1), here within 4.5 deviations."""
    expected, freedom = counts.mean(), counts.size - 1
    return abs(((counts - expected) ** 2 / expected).sum() - freedom) < 4.5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("random_from", ["regular", "vocab"])
def test_random_tokens_are_uniform_over_their_range(random_from):
    tokens = np.full((ROWS, LENGTH), 30, np.int32)
    batch = mask(tokens, np.ones_like(tokens), mask_prob=0.0, random_prob=1.0, random_from=random_from)
    counts = np.bincount(batch.inputs_BL[chosen_mask(batch)], minlength=MODEL_SIZE)
    allowed = np.arange(TOKENIZER_SIZE) if random_from == "vocab" else REGULAR
    assert counts[allowed].sum() == counts.sum() == ROWS * 10
    assert chi_square_is_ordinary(counts[allowed])


def test_chosen_positions_are_uniform():
    tokens = np.full((ROWS, LENGTH), 30, np.int32)
    tokens[:, 0], tokens[:, -1] = CLS, SEP
    counts = chosen_mask(mask(tokens, np.ones_like(tokens))).sum(axis=0)
    assert counts[0] == counts[-1] == 0
    # Drawing exactly 10 of 62 makes counts negatively correlated: the statistic shrinks by (1 - 10/62) · 62/61.
    inner = counts[1:-1]
    statistic = ((inner - inner.mean()) ** 2 / inner.mean()).sum() / ((1 - 10 / 62) * 62 / 61)
    assert abs(statistic - 61) < 4.5 * np.sqrt(2 * 61)


def test_a_rows_mask_does_not_depend_on_its_neighbours():
    tokens, segment_ids = make_rows(ROWS)
    whole = mask(tokens, segment_ids)
    order = np.array([5, 11, 0])
    part = mask(tokens[order], segment_ids[order], ids=order)
    assert_same(part, jax.tree.map(lambda leaf: leaf[order], whole))


def test_masks_differ_by_epoch_and_example_unless_static():
    tokens = np.full((ROWS, LENGTH), 30, np.int32)
    segment_ids = np.ones_like(tokens)
    first, second = mask(tokens, segment_ids), mask(tokens, segment_ids, epoch=1)
    assert (first.positions_BP != second.positions_BP).any(axis=1).all()
    assert len({tuple(row) for row in first.positions_BP}) == ROWS
    assert_same(mask(tokens, segment_ids, static=True), mask(tokens, segment_ids, static=True, epoch=1))
    assert_same(mask(tokens, segment_ids, static=True, epoch=3), first)


def test_token_zero_is_a_target_like_any_other():
    special, starts = np.array([5, 6]), np.ones(7, bool)
    vocab = masking.VocabTables.from_arrays(mask_id=5, special_ids=special, word_starts=starts, vocab_size=7)
    tokens = np.zeros((2, 20), np.int32)
    ids = np.arange(2, dtype=np.int32)
    batch = run(tokens, np.ones_like(tokens), ids, np.zeros_like(ids), vocab, **SETTINGS)
    assert (batch.weights_BP.sum(axis=1) == 3).all() and (batch.targets_BP == 0).all()


@pytest.mark.parametrize("policy", ["token", "whole_word"])
def test_rows_without_candidates_have_no_weight(policy):
    tokens = np.full((ROWS, LENGTH), 30, np.int32)
    segment_ids = np.ones_like(tokens)
    tokens[:2], segment_ids[:2] = 0, 0
    tokens[1, :2], segment_ids[1, :2] = (CLS, SEP), 1
    batch = mask(tokens, segment_ids, policy=policy)
    assert (batch.weights_BP[:2] == 0).all() and (batch.weights_BP[2:].sum(axis=1) == 10).all()
    np.testing.assert_array_equal(batch.inputs_BL[:2], tokens[:2])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(batch))


def words_of(tokens: np.ndarray, segment_ids: np.ndarray) -> list[list[int]]:
    """The words of one row as lists of positions, by a plain loop."""
    words: list[list[int]] = []
    previous = None
    for place, (token, segment) in enumerate(zip(tokens, segment_ids, strict=True)):
        if segment == 0 or token in SPECIAL:
            previous = None
            continue
        if previous != segment or token % 3 == 0:
            words.append([])
        words[-1].append(place)
        previous = segment
    return words


def test_whole_words_are_taken_whole_within_the_budget():
    tokens, segment_ids = make_rows(ROWS)
    # A segment that begins in the middle of a word, without CLS, must not join the segment before it.
    tokens[:, 20], segment_ids[:, 20:] = 31, segment_ids[:, 20:] + 2 * (segment_ids[:, 20:] > 0)
    tokens[:, 15:17] = 9, 31  # a special id inside a word ends it
    chosen = chosen_mask(mask(tokens, segment_ids, policy="whole_word", rate=0.3))
    for row in range(ROWS):
        words = words_of(tokens[row], segment_ids[row])
        taken = [word for word in words if chosen[row, word].all()]
        budget = expected_count((segment_ids[row] > 0).sum(), LENGTH, 0.3, LENGTH)
        assert chosen[row].sum() == sum(len(word) for word in taken) <= budget
        left = budget - chosen[row].sum()
        assert all(len(word) > left for word in words if word not in taken)  # no word that would still fit is left


def test_a_special_token_is_a_word_of_its_own():
    tokens = np.full((ROWS, LENGTH), 31, np.int32)  # 31 continues a word
    tokens[:, ::8] = CLS
    chosen = chosen_mask(mask(tokens, np.ones_like(tokens), policy="whole_word", include_special=True))
    specials, words = chosen[:, ::8], chosen.reshape(ROWS, -1, 8)[:, :, 1:]
    assert (words.all(axis=2) == words.any(axis=2)).all()
    assert (specials & ~words.any(axis=2)).any() and (~specials & words.any(axis=2)).any()


def sequential_greedy(sizes: np.ndarray, budget: int) -> np.ndarray:
    taken = np.zeros(len(sizes), bool)
    for index, size in enumerate(sizes):
        if 0 < size <= budget:
            taken[index] = True
            budget -= size
    return taken


@pytest.mark.parametrize("longest", [1, 3, 6, 20])
def test_greedy_passes_equal_the_sequential_walk(longest):
    rng = np.random.default_rng(longest)
    sizes = rng.integers(0, longest + 1, (2000, 40)).astype(np.int32)
    budgets = rng.integers(1, 60, 2000).astype(np.int32)
    taken = jax.jit(jax.vmap(words.take_in_order))(sizes, budgets)
    expected = np.stack([sequential_greedy(row, budget) for row, budget in zip(sizes, budgets, strict=True)])
    np.testing.assert_array_equal(taken, expected)


def test_words_with_one_token_each_make_the_token_policy():
    tokens = np.full((ROWS, LENGTH), 30, np.int32)  # 30 begins a word
    chosen = chosen_mask(mask(tokens, np.ones_like(tokens), policy="whole_word"))
    assert (chosen.sum(axis=1) == 10).all()
    counts = chosen.sum(axis=0)
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum() / ((1 - 10 / 64) * 64 / 63)
    assert abs(statistic - 63) < 4.5 * np.sqrt(2 * 63)


@pytest.mark.parametrize(
    ("size", "message"),
    [(120, "120 ids does not fit a model vocabulary of 64"), (5, "all 5 ids of the tokenizer are special")],
)
def test_a_vocabulary_that_cannot_work_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        masking.VocabTables.from_arrays(mask_id=4, special_ids=np.arange(5), word_starts=np.ones(size, bool), vocab_size=64)


@pytest.mark.parametrize("policy", ["token", "whole_word"])
@pytest.mark.parametrize("shape", [(1,), (8,), (2, 4)])
def test_masks_are_the_same_on_any_mesh_without_communication(shape, policy):
    tokens, segment_ids = make_rows(16)
    alone = mask(tokens, segment_ids, policy=policy)
    names = ("data", "fsdp")[: len(shape)]
    explicit = (jax.sharding.AxisType.Explicit,) * len(shape)
    mesh = jax.make_mesh(shape, names, axis_types=explicit, devices=jax.devices()[: int(np.prod(shape))])
    ids = np.arange(16, dtype=np.int32)
    with jax.set_mesh(mesh), jax.numpy_rank_promotion("raise"):
        rows = [jax.device_put(array, jax.P(names)) for array in (tokens, segment_ids, ids, np.zeros_like(ids))]
        vocab = jax.device_put(make_vocab(), jax.P())
        compiled = run.lower(*rows, vocab, policy=policy, **SETTINGS).compile()
        sharded = compiled(*rows, vocab, mask_prob=0.8, random_prob=0.1)
        assert jax.typeof(sharded.inputs_BL).sharding.spec[0] == (names if len(names) > 1 else names[0])
    assert_same(jax.tree.map(np.asarray, sharded), alone)
    text = compiled.as_text()
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-", "reduce-scatter"):
        assert collective not in text
