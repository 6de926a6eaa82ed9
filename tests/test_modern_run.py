"""A whole run of a modern encoder: two stages, of which the second rotates positions by another base."""

import json
import pathlib

import jax
import numpy as np
import pytest
from test_cli import TEXT, WORDS, last_json, metrics

from mlm_jax.cli import main
from mlm_jax.config import load_config
from mlm_jax.finetune.embed import Embedder
from mlm_jax.finetune.prepare import prepare
from mlm_jax.inference import open_run, trained_config
from mlm_jax.workdir import Workdir

pytestmark = pytest.mark.slow

RECIPE = pathlib.Path(__file__).resolve().parents[1] / "configs" / "modern_mini.py"
FIELDS = (
    *("model.embed_dim=32", "model.mlp_dim=48", "model.vocab_size=512", "model.max_positions=96", "model.local_window=4"),
    *("tokenizer.vocab_size=400", "tokenizer.algorithm=bpe", "optimizer.warmup_steps=0", "optimizer.learning_rate=1e-2"),
    *("stages[0].steps=6", "stages[0].batch_size=16", "stages[1].steps=6", "stages[1].seq_len=96"),
    # So small that every position is turned otherwise.
    *("stages[1].rope_base=2.0", "train.log_every=3", "train.checkpoint_every=6", "evaluation.every=6"),
    *("evaluation.max_rows=24", "model.num_layers=2"),
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("modern")
    with (folder / "rivers.jsonl").open("w") as lines:
        for index in range(400):
            words = (WORDS[(index * step + step) % len(WORDS)] for step in (1, 3, 7, 9))
            lines.write(json.dumps({"text": f"{index}. {TEXT.format(*words)}"}) + "\n")
    fields = (f"data.source=files:{folder}/rivers.jsonl?field=text", *FIELDS)
    command = ["train", "--config", str(RECIPE), "--workdir", str(folder / "run")]
    assert main([*command, *(f"--config.{field}" for field in fields)]) == 0
    return folder / "run"


def test_a_run_is_measured_as_it_was_trained_in_its_last_stage(workdir, capsys):
    """The base of the second stage is there in training's own evaluation, and in that of the finished run."""
    logged = [line for line in metrics(workdir) if line["kind"] == "eval"]
    assert [line["step"] for line in logged] == [6, 12]
    assert main(["evaluate", "--workdir", str(workdir), "--json"]) == 0
    assert last_json(capsys)["loss"] == pytest.approx(logged[-1]["loss"], rel=1e-5)
    with open_run(workdir) as run:
        assert (run.step, run.cfg.model.rope_base, run.objective.cfg.model.rope_base) == (12, 2.0, 2.0)


def test_what_follows_a_run_rotates_positions_as_its_last_stage_did(workdir, tmp_path):
    assert trained_config(Workdir(workdir)).model.rope_base == Embedder(workdir).cfg.model.rope_base == 2.0
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "".join(f"a river {i}\t{i % 2}\n" for i in range(60)))
    fields = (f"task.train={tmp_path}/train.tsv", "task.dev=", f"init_from={workdir}", "stages[0].seq_len=32")
    prepared = prepare(load_config(str(RECIPE.parent / "finetune_sst2.py"), fields, for_task=True))
    assert prepared.cfg.model.rope_base == 2.0


def test_a_checkpoint_is_of_its_own_stage(workdir, tmp_path, capsys):
    """Of the run as it was when its first stage had ended."""
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    for name in workdir.iterdir():
        if name.name != "checkpoints":
            (earlier / name.name).symlink_to(name)
    (earlier / "checkpoints").mkdir()
    (earlier / "checkpoints" / "6").symlink_to(workdir / "checkpoints" / "6")
    assert main(["evaluate", "--workdir", str(earlier), "--json", "--seq-len", "32"]) == 0
    logged = next(line for line in metrics(workdir) if line["kind"] == "eval")
    assert last_json(capsys)["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    with open_run(earlier) as run:
        assert (run.step, run.cfg.model.rope_base) == (6, 1_000.0)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(run.params)))
