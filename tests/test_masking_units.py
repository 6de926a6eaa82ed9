"""Masking by spans and n-grams: distributed like a plain walk, whole units, and ends that are where they should be."""

import functools

import jax
import numpy as np
import pytest
from test_masking import (
    CLS,
    LENGTH,
    MASK,
    ROWS,
    SETTINGS,
    SPECIAL,
    assert_binomial,
    assert_same,
    chosen_mask,
    expected_count,
    make_rows,
    make_vocab,
    words_of,
)

from mlm_jax import masking
from mlm_jax.config import MaskingConfig
from mlm_jax.masking.ngrams import join_words
from mlm_jax.masking.spans import run_starts
from mlm_jax.masking.words import word_starts

GEOMETRIC = MaskingConfig(policy="span").span_lengths
HARMONIC = MaskingConfig(policy="ngram", max_words=3).span_lengths


@functools.partial(
    jax.jit, static_argnames=("rate", "policy", "random_from", "include_special", "span_lengths", "rate_spread")
)
def run(tokens, segment_ids, example_ids, vocab, *, rate=0.15, policy="span", **settings):
    keys = masking.example_keys(jax.random.key(7), example_ids * 0, example_ids, static=False)
    slots = masking.num_slots(tokens.shape[1], rate + settings.get("rate_spread", 0.0))
    return masking.mask_tokens(keys, tokens, segment_ids, vocab, rate=rate, num_slots=slots, policy=policy, **settings)


def mask(tokens, segment_ids, *, vocab=None, **options) -> masking.MaskedBatch:
    ids = np.arange(len(tokens), dtype=np.int32)
    options = SETTINGS | {"span_lengths": GEOMETRIC} | options
    return jax.tree.map(np.asarray, run(tokens, segment_ids, ids, vocab or make_vocab(), **options))


def runs_of(chosen: np.ndarray, segment_ids: np.ndarray) -> list[tuple[int, int]]:
    """Stretches of one row's chosen positions as (first, last)."""
    found: list[tuple[int, int]] = []
    for place in np.flatnonzero(chosen):
        if found and found[-1][1] == place - 1 and segment_ids[place] == segment_ids[place - 1]:
            found[-1] = (found[-1][0], place)
        else:
            found.append((place, place))
    return found


def walk(rng, words: list[list[int]], breaks: set[int], budget: int, lengths) -> set[int]:
    """SpanBERT's procedure, one step after the other: anchors are drawn anew until one is free.

    `breaks` holds the indices of the words that begin a segment's text.
    """
    places = [(place, index) for index, word in enumerate(words) for place in word]
    taken: set[int] = set()
    while len(taken) < min(budget, len(places)):
        anchor, first = places[rng.integers(len(places))]
        if anchor in taken:
            continue
        count = 1 + rng.choice(len(lengths), p=lengths)
        for index in range(first, min(first + count, len(words))):
            if index > first and index in breaks:
                break
            for place in words[index]:
                if len(taken) < budget:
                    taken.add(place)
    return taken


def chi_square_of_two(first: np.ndarray, second: np.ndarray) -> tuple[float, int]:
    """The statistic of two samples' counts having one distribution, over cells with at least 10 in both; and its freedom."""
    kept = first + second >= 20
    first, second = (np.append(counts[kept], counts[~kept].sum()) for counts in (first, second))
    used = first + second > 0
    first, second = first[used], second[used]
    ratio = np.sqrt(second.sum() / first.sum())
    return float(((first * ratio - second / ratio) ** 2 / (first + second)).sum()), len(first) - 1


def assert_one_distribution(first: np.ndarray, second: np.ndarray) -> None:
    """The statistic has mean k and variance 2k: within 4.5 deviations."""
    statistic, freedom = chi_square_of_two(first.astype(float), second.astype(float))
    assert freedom >= 3 and statistic < freedom + 4.5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(("lengths", "rate"), [(GEOMETRIC, 0.15), (HARMONIC, 0.4), (GEOMETRIC, 0.6)])
def test_spans_are_distributed_like_a_plain_walks(lengths, rate):
    tokens, segment_ids = make_rows(ROWS)
    chosen = chosen_mask(mask(tokens, segment_ids, span_lengths=lengths, rate=rate))
    rng = np.random.default_rng(1)
    sizes, places = np.zeros((2, 2, LENGTH + 1), int)
    for row in range(ROWS):
        words = words_of(tokens[row], segment_ids[row])
        breaks = {
            i for i, word in enumerate(words) if segment_ids[row, word[0] - 1] == 0 or tokens[row, word[0] - 1] in SPECIAL
        }
        budget = expected_count((segment_ids[row] > 0).sum(), LENGTH, rate, LENGTH)
        other = np.zeros(LENGTH, bool)
        other[list(walk(rng, words, breaks, budget, lengths))] = True
        assert other.sum() == chosen[row].sum() == min(budget, sum(map(len, words)))
        for index, each in enumerate((chosen[row], other)):
            for first, last in runs_of(each, segment_ids[row]):
                sizes[index, last - first + 1] += 1
                places[index, first] += 1
    # Stretches of a row depend on each other through its budget, which makes counts vary less, not more.
    assert_one_distribution(*sizes)
    assert_one_distribution(*places)


def test_that_test_tells_other_lengths_apart():
    rng = np.random.default_rng(0)
    clipped = [0.2 * 0.8**n for n in range(9)] + [0.8**9]  # the rest of the mass on the longest, instead of renormalised
    first, second = (np.bincount(rng.choice(10, 20_000, p=p), minlength=10) for p in (GEOMETRIC, clipped))
    with pytest.raises(AssertionError):
        assert_one_distribution(first, second)


def test_lengths_are_geometric_up_to_ten_words_and_harmonic_for_ngrams():
    assert sum(GEOMETRIC) == pytest.approx(1)
    assert sum(n * p for n, p in enumerate(GEOMETRIC, 1)) == pytest.approx(3.797, abs=1e-3)
    np.testing.assert_allclose(np.diff(np.log(GEOMETRIC)), np.log(0.8))
    np.testing.assert_allclose(HARMONIC, [6 / 11, 3 / 11, 2 / 11])


def test_spans_are_whole_words_of_one_segment_but_for_one_that_the_budget_cuts():
    tokens, segment_ids = make_rows(ROWS)
    tokens[:, 15] = 9  # a special id inside the text ends a span
    chosen = chosen_mask(mask(tokens, segment_ids, rate=0.3))
    assert not chosen[np.isin(tokens, SPECIAL)].any() and not chosen[segment_ids == 0].any()
    cut = 0
    for row in range(ROWS):
        partial = [word for word in words_of(tokens[row], segment_ids[row]) if 0 < chosen[row, word].sum() < len(word)]
        assert len(partial) <= 1
        if partial:
            cut += 1
            taken = chosen[row, partial[0]]
            assert taken[: taken.sum()].all()  # from its beginning
    assert ROWS / 3 < cut < ROWS  # words have three tokens on average, and a span ends within one by chance


@pytest.mark.parametrize("policy", ["span", "pmi"])
def test_a_stretch_is_shown_in_one_way(policy):
    tokens, segment_ids = make_rows(ROWS)
    batch = mask(tokens, segment_ids, policy=policy, rate=0.3)
    chosen = chosen_mask(batch)
    outcomes = np.zeros(3, int)
    for row in range(ROWS):
        if policy == "span":
            units = [list(range(first, last + 1)) for first, last in runs_of(chosen[row], segment_ids[row])]
        else:
            units = [word for word in words_of(tokens[row], segment_ids[row]) if chosen[row, word].all()]
        for unit in units:
            masked = batch.inputs_BL[row, unit] == MASK
            kept = batch.inputs_BL[row, unit] == tokens[row, unit]
            assert masked.all() or not masked.any()
            if len(unit) > 1:  # a random token may be the token itself, but not often
                outcomes += masked.all(), kept.all(), not (masked.all() or kept.all())
    trials = outcomes.sum()
    assert trials > 3000
    assert_binomial(outcomes[0], trials, 0.8)
    assert_binomial(outcomes[2], trials, 0.1)


def test_stretches_of_two_segments_that_touch_are_two():
    chosen, segment_ids = np.array([[1, 1, 0, 1, 1, 1]], bool), np.array([[1, 1, 1, 1, 2, 2]], np.int32)
    starts = jax.vmap(run_starts)(chosen, segment_ids)
    np.testing.assert_array_equal(starts, [[True, False, False, True, True, False]])


def test_rows_of_one_long_word_or_of_nothing():
    tokens = np.full((3, LENGTH), 31, np.int32)  # 31 continues a word
    segment_ids = np.ones_like(tokens)
    segment_ids[1], tokens[1] = 0, 0
    tokens[2, :], tokens[2, 10] = CLS, 31
    batch = mask(tokens, segment_ids)
    np.testing.assert_array_equal(batch.weights_BP.sum(1), [10, 0, 1])
    np.testing.assert_array_equal(batch.positions_BP[0], np.arange(10))  # from the word's beginning
    assert batch.positions_BP[2, 0] == 10


def test_the_ends_of_stretches():
    tokens, segment_ids = make_rows(ROWS)
    tokens[:, 20], segment_ids[:, 20:] = 31, segment_ids[:, 20:] + 2 * (segment_ids[:, 20:] > 0)  # segments without CLS
    batch = mask(tokens, segment_ids, rate=0.4)
    chosen = chosen_mask(batch)
    special = np.isin(np.arange(128), SPECIAL)
    ends = jax.tree.map(
        np.asarray,
        masking.span_ends(batch.positions_BP, batch.weights_BP, tokens, segment_ids, special, max_targets=4),
    )
    touching = counted = long = 0
    for row in range(ROWS):
        expected = {}
        for first, last in runs_of(chosen[row], segment_ids[row]):
            left, right = first - 1, last + 1
            inside = all(
                0 <= end < LENGTH and segment_ids[row, end] == segment_ids[row, first] and not special[tokens[row, end]]
                for end in (left, right)
            )
            touching += not inside
            long += inside and last - first >= 4
            expected |= {p: (left, right, p - first, 1.0) for p in range(first, min(last + 1, first + 4)) if inside}
        for slot, position in enumerate(batch.positions_BP[row]):
            used = batch.weights_BP[row, slot] == 1
            wanted = expected.pop(position, (0, 0, 0, 0.0)) if used else (0, 0, 0, 0.0)
            assert wanted == tuple(leaf[row, slot] for leaf in jax.tree.leaves(ends))
            counted += int(wanted[3])
        assert not expected
    assert min(touching, counted, long) > 100


# N-grams of a list.

NGRAMS = [np.array(ids, np.int32) for ids in ([33, 36], [33, 34, 36], [33, 36, 39], [39, 42, 43, 45], [48, 51])]


def make_table(sequences=NGRAMS, max_words: int = 3) -> masking.NgramTable:
    return masking.NgramTable.from_sequences(sequences, max_words)


@jax.jit
def joined(tokens, segment_ids, table, vocab, key):
    def one_row(bits_L, tokens_L, segment_ids_L):
        special_L = vocab.is_special_V[tokens_L]
        eligible_L = (segment_ids_L > 0) & ~special_L
        starts_L = word_starts(vocab.is_word_start_V[tokens_L], eligible_L, special_L, segment_ids_L)
        return join_words(bits_L, tokens_L, starts_L, eligible_L, segment_ids_L, table)

    return jax.vmap(one_row)(jax.random.bits(key, tokens.shape), tokens, segment_ids)


def units_of(text: list[int], *, segment_ids=None, table=None, rows: int = 1) -> list[list[list[int]]]:
    """The units of a text, as many times with other random bits as there are rows."""
    tokens = np.tile(np.array(text, np.int32), (rows, 1))
    segment_ids = np.ones_like(tokens) if segment_ids is None else np.tile(np.array(segment_ids, np.int32), (rows, 1))
    vocab = jax.tree.map(jax.numpy.asarray, make_vocab())
    starts = np.asarray(joined(tokens, segment_ids, table or make_table(), vocab, jax.random.key(0)))
    return [[part.tolist() for part in np.split(np.array(text), np.flatnonzero(row)) if part.size] for row in starts]


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ([30, 33, 36, 60, 33], [[30], [33, 36], [60], [33]]),
        ([33, 34, 36, 33, 36], [[33, 34, 36], [33, 36]]),
        ([33, 36, 37, 33, 36], [[33], [36, 37], [33, 36]]),  # 36 37 is another word than 36
        ([33, 36, 39, 60], [[33, 36, 39], [60]]),  # the longest of those that begin with a word
        ([39, 42, 43, 45, 48], [[39, 42, 43, 45], [48]]),
        ([42, 43, 45, 48, 51], [[42, 43], [45], [48, 51]]),
        ([33, CLS, 36, 33, 36], [[33, CLS], [36], [33, 36]]),  # no unit begins with a special token
    ],
)
def test_words_of_a_listed_ngram_are_one_unit(text, units):
    assert units_of(text) == [units]


def test_an_ngram_does_not_reach_into_the_next_segment_or_padding():
    assert units_of([33, 36, 33, 36, 60], segment_ids=[1, 2, 2, 2, 2]) == [[[33], [36], [33, 36], [60]]]
    assert units_of([30, 30, 60, 48, 51], segment_ids=[1, 1, 1, 1, 0])[0][:4] == [[30], [30], [60], [48, 51]]
    starts = units_of([30, 30, 60, 48, 51], segment_ids=[1, 1, 1, 1, 0], table=make_table([np.array([60, 48], np.int32)], 2))
    assert starts[0][2][:2] == [60, 48]


def test_one_within_another_loses_and_of_two_that_overlap_either_is_chosen():
    table = make_table([np.array(ids, np.int32) for ids in ([30, 33, 36], [33, 36], [36, 39], [60, 63])], 3)
    found = units_of([30, 33, 36, 39, 60], table=table, rows=ROWS)
    first, second = [[30, 33, 36], [39], [60]], [[30], [33], [36, 39], [60]]
    assert all(units in (first, second) for units in found)
    assert_binomial(sum(units == first for units in found), ROWS, 0.5)


def test_a_table_finds_all_of_a_long_list_and_nothing_else():
    rng = np.random.default_rng(0)
    listed = [rng.integers(5, 120, rng.integers(2, 6)).astype(np.int32) for _ in range(5_000)]
    listed = [ids - ids % 3 for ids in listed]  # every piece begins a word
    known = {ids.tobytes() for ids in listed}
    table = make_table(listed, 5)
    assert table.buckets_HC.size < 20 * len(known)
    wide = 8
    others = [ids - ids % 3 for ids in rng.integers(5, 120, (500, 4)).astype(np.int32)]
    rows = np.full((1_000, wide), 117 - 117 % 3, np.int32)
    segments = np.zeros_like(rows)
    chosen = listed[:500] + others
    for row, ids in enumerate(chosen):
        rows[row, : len(ids)], segments[row, : len(ids)] = ids, 1
    starts = np.asarray(joined(rows, segments, table, jax.tree.map(jax.numpy.asarray, make_vocab()), jax.random.key(0)))
    for row, ids in enumerate(chosen):
        special = np.isin(ids, SPECIAL)
        if special.any():
            continue
        windows = {(i, j) for i in range(len(ids)) for j in range(i + 2, len(ids) + 1) if ids[i:j].tobytes() in known}
        if row < 500:
            assert starts[row, : len(ids)].tolist() == [True] + [False] * (len(ids) - 1)
        elif not windows:
            assert starts[row, : len(ids)].all()


def test_ngrams_are_masked_whole_and_words_as_before():
    tokens, segment_ids = make_rows(ROWS)
    tokens[:, 4:7], segment_ids[:, 4:7] = (33, 34, 36), 1
    tokens[:, 7] = 60
    vocab = masking.VocabTables.from_arrays(
        mask_id=MASK,
        special_ids=SPECIAL,
        word_starts=np.arange(120) % 3 == 0,
        vocab_size=128,
        ngrams=make_table(),
    )
    plain, listed = (chosen_mask(mask(tokens, segment_ids, policy="pmi", vocab=each)) for each in (make_vocab(), vocab))
    group = listed[:, 4:7]
    assert (group.all(1) == group.any(1)).all() and group.all(1).sum() > 100
    assert (plain[:, 4:6].all(1) != plain[:, 6]).any()
    whole = chosen_mask(mask(tokens, segment_ids, policy="whole_word"))
    assert abs(int(whole.sum()) - int(plain.sum())) < 0.02 * whole.sum()


def greedy(rng, units: list[list[int]], budget: int) -> list[int]:
    """BERT's procedure, one step after the other: the indices of shuffled units, less those that do not fit any more."""
    taken, left = [], budget
    for index in rng.permutation(len(units)):
        if len(units[index]) <= left:
            taken.append(index)
            left -= len(units[index])
    return taken


@pytest.mark.parametrize("policy", ["whole_word", "pmi"])
def test_units_are_distributed_like_a_plain_walks(policy):
    tokens, segment_ids = make_rows(ROWS)
    for place, ngram in ((4, NGRAMS[0]), (12, NGRAMS[2]), (40, NGRAMS[3]), (48, NGRAMS[1])):
        end = place + len(ngram)
        whole = (segment_ids[:, place : end + 1] == segment_ids[:, [place]]).all(1) & (segment_ids[:, place] > 0)
        whole &= ~np.isin(tokens[:, place : end + 1], (*SPECIAL, 0)).any(1)
        tokens[whole, place:end], tokens[whole, end] = ngram, 60
    vocab = masking.VocabTables.from_arrays(
        mask_id=MASK,
        special_ids=SPECIAL,
        word_starts=np.arange(120) % 3 == 0,
        vocab_size=128,
        ngrams=make_table() if policy == "pmi" else None,
    )
    chosen = chosen_mask(mask(tokens, segment_ids, policy=policy, vocab=vocab))
    if policy == "pmi":
        given = make_table(), jax.tree.map(jax.numpy.asarray, make_vocab()), jax.random.key(1)
        starts = np.asarray(joined(tokens, segment_ids, *given))
    rng = np.random.default_rng(1)
    sizes, places = np.zeros((2, 2, LENGTH + 1), int)
    joined_words = 0
    for row in range(ROWS):
        units: list[list[int]] = []
        for word in words_of(tokens[row], segment_ids[row]):
            if policy == "pmi" and not starts[row, word[0]]:
                units[-1] += word
                joined_words += 1
            else:
                units.append(list(word))
        budget = expected_count((segment_ids[row] > 0).sum(), LENGTH, 0.15, LENGTH)
        found = [index for index, unit in enumerate(units) if chosen[row, unit].all()]
        assert sum(len(units[index]) for index in found) == chosen[row].sum() <= budget
        for which, taken in enumerate((found, greedy(rng, units, budget))):
            for index in taken:
                sizes[which, len(units[index])] += 1
                places[which, units[index][0]] += 1
    assert joined_words > 2 * ROWS or policy != "pmi"
    # Units of a row depend on each other through its budget, which makes counts vary less, not more.
    assert_one_distribution(*sizes)
    assert_one_distribution(*places)


# What holds for all policies.


@pytest.mark.parametrize("policy", ["span", "pmi"])
@pytest.mark.parametrize("shape", [(2, 4)])
def test_masks_are_the_same_on_any_mesh_without_communication(shape, policy):
    tokens, segment_ids = make_rows(16)
    vocab = masking.VocabTables.from_arrays(
        mask_id=MASK, special_ids=SPECIAL, word_starts=np.arange(120) % 3 == 0, vocab_size=128, ngrams=make_table()
    )
    alone = mask(tokens, segment_ids, policy=policy, vocab=vocab)
    names = ("data", "fsdp")[: len(shape)]
    explicit = (jax.sharding.AxisType.Explicit,) * len(shape)
    mesh = jax.make_mesh(shape, names, axis_types=explicit, devices=jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh), jax.numpy_rank_promotion("raise"):
        rows = [jax.device_put(array, jax.P(names)) for array in (tokens, segment_ids, np.arange(16, dtype=np.int32))]
        vocab = jax.device_put(vocab, jax.P())
        compiled = run.lower(*rows, vocab, policy=policy, span_lengths=GEOMETRIC, **SETTINGS).compile()
        sharded = compiled(*rows, vocab, mask_prob=0.8, random_prob=0.1)
    assert_same(jax.tree.map(np.asarray, sharded), alone)
    text = compiled.as_text()
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-", "reduce-scatter"):
        assert collective not in text


@pytest.mark.parametrize("policy", ["span", "pmi"])
def test_a_rows_mask_does_not_depend_on_its_neighbours(policy):
    tokens, segment_ids = make_rows(ROWS)
    whole = mask(tokens, segment_ids, policy=policy)
    part = mask(tokens[:3], segment_ids[:3], policy=policy)
    assert_same(part, jax.tree.map(lambda leaf: leaf[:3], whole))
