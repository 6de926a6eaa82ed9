"""Batches follow from the step alone: each row once an epoch, the same on any processes and after a resume."""

import itertools
import json
import pathlib
import random

import numpy as np
import pytest

from mlm_jax.config import Config, DataConfig, StageConfig, TokenizerConfig
from mlm_jax.data import loader
from mlm_jax.data.loader import Rows, batches, row_index
from mlm_jax.data.prepare import prepare
from mlm_jax.errors import MachineError, UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("loader")
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnop", k=5)) for _ in range(100)]
    texts = [" ".join(chance.choices(words, k=chance.randint(1, 40))) for _ in range(150)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cfg = Config(
        name="test",
        data=DataConfig(source=f"files:{folder / 'texts.jsonl'}", validation_fraction=0.1),
        tokenizer=TokenizerConfig(vocab_size=300),
        stages=(StageConfig(seq_len=32),),
    )
    prepare(cfg, folder / "corpus", workers=1)
    return folder / "corpus"


def _run(rows: Rows, **arguments: object) -> list[dict[str, np.ndarray]]:
    defaults = {"batch_size": 8, "start_step": 0, "num_steps": 5, "first_position": 0, "seed": 3}
    return list(batches(rows, **{**defaults, **arguments}))  # type: ignore[arg-type]


def _assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys() == {"tokens", "segment_ids", "example_ids", "epochs"}
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_batches_have_the_promised_shapes_and_types(corpus: pathlib.Path) -> None:
    (batch,) = _run(Rows(corpus, 32), num_steps=1)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "tokens": ((8, 32), np.int32),
        "segment_ids": ((8, 32), np.int32),
        "example_ids": ((8,), np.int32),
        "epochs": ((8,), np.int32),
    }


@pytest.mark.parametrize("num_rows", [1, 2, 97, 1000])
def test_every_epoch_visits_each_row_once_in_an_order_of_its_own(num_rows: int) -> None:
    rows, epochs = row_index(np.arange(3 * num_rows), num_rows, seed=5)
    assert (np.sort(rows.reshape(3, num_rows)) == np.arange(num_rows)).all()
    assert (epochs.reshape(3, num_rows) == [[0], [1], [2]]).all()
    if num_rows > 2:
        orders = {tuple(order) for order in rows.reshape(3, num_rows).tolist()}
        assert len(orders) == 3


def test_seeds_do_not_share_orders_between_epochs() -> None:
    orders = [
        tuple(row_index(np.arange(epoch * 50, epoch * 50 + 50), 50, seed)[0]) for seed in range(4) for epoch in range(4)
    ]
    assert len(set(orders)) == 16


def test_one_position_is_what_an_array_gives() -> None:
    rows, epochs = row_index(np.arange(30).reshape(2, 15), 13, seed=1)
    assert [row_index(position, 13, seed=1) for position in range(30)] == [
        *zip(rows.ravel().tolist(), epochs.ravel().tolist(), strict=True)
    ]


def test_batches_are_the_rows_at_their_positions(corpus: pathlib.Path) -> None:
    rows = Rows(corpus, 32)
    for step, batch in enumerate(_run(rows, start_step=4, first_position=1000), start=4):
        expected_rows, expected_epochs = row_index(1000 + step * 8 + np.arange(8), len(rows), seed=3)
        expected = {**rows.read(expected_rows), "example_ids": expected_rows, "epochs": expected_epochs}
        _assert_equal(batch, expected)


def test_resuming_continues(corpus: pathlib.Path) -> None:
    rows = Rows(corpus, 32)
    whole = _run(rows, num_steps=90)
    assert len(whole) == 90
    assert whole[-1]["epochs"].max() > 0, "the run must go beyond an epoch to test its seam"
    for step in (1, 7, 89):
        resumed = _run(Rows(corpus, 32), start_step=step, num_steps=90 - step)
        for one, other in itertools.zip_longest(resumed, whole[step:]):
            _assert_equal(one, other)


@pytest.mark.parametrize(
    "owners", [[[0, 1, 2, 3, 4, 5, 6, 7]], [[0, 1, 2, 3], [4, 5, 6, 7]], [[7, 0], [5, 2, 4], [1, 3, 6]]]
)
def test_processes_together_feed_the_global_batch(corpus: pathlib.Path, owners: list[list[int]]) -> None:
    rows = Rows(corpus, 32)
    shares = [_run(rows, local_rows=local) for local in owners]
    for step, whole in enumerate(_run(rows)):
        for local, share in zip(owners, shares, strict=True):
            _assert_equal(share[step], {name: array[local] for name, array in whole.items()})


def test_segment_ids_number_the_segments_and_leave_padding_at_zero(corpus: pathlib.Path) -> None:
    lengths = np.array([[3, 2, 0], [8, 0, 0], [1, 1, 5]], np.int32)
    expected = [[1, 1, 1, 2, 2, 0, 0, 0], [1] * 8, [1, 2, 3, 3, 3, 3, 3, 0]]
    assert loader._segment_ids(lengths, 8).tolist() == expected
    rows = Rows(corpus, 32)
    batch = rows.read(range(len(rows)))
    assert ((batch["tokens"] == 0) == (batch["segment_ids"] == 0)).all()


def test_wrong_row_length_and_damaged_files_are_told(corpus: pathlib.Path) -> None:
    with pytest.raises(UserError, match="no rows of seq_len=64"):
        Rows(corpus, 64)
    (shard,) = (corpus / "seq32").glob("*-validation.array_record-*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + b"#" + whole[101:-70_000] + b"#" * 70_000)
    try:
        rows = Rows(corpus, 32, "validation")
        with pytest.raises(MachineError, match="seq32 cannot be read"):
            rows.read(range(len(rows)))
    finally:
        shard.write_bytes(whole)
