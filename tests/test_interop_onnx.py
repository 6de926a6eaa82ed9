"""A model.onnx computes what the run does, at any number of rows and tokens."""

import numpy as np
import pytest

pytestmark = pytest.mark.peer
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")
pytest.importorskip("transformers", reason="needs the extra onnx")

from interop_runs import MODERNBERT, config, our_logits, rows, write_random_run  # noqa: E402
from test_finetune_export import write_task  # noqa: E402

from mlm_jax.cli import main  # noqa: E402
from mlm_jax.interop.save import export_run  # noqa: E402

CASES = {"bert": config(num_token_types=2), "modernbert": config(**MODERNBERT)}


@pytest.mark.parametrize("name", CASES)
def test_logits_of_whole_and_padded_rows(name, tmp_path, capsys):
    write_random_run(tmp_path / "run", CASES[name])
    assert main(["export", "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--onnx"]) == 0
    assert "model.onnx: in onnxruntime" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    for lengths in ([20], [24, 13, 7, 2]):
        tokens, segment_ids = rows(400, {0}, lengths, 0)
        inputs = {"input_ids": tokens, "attention_mask": segment_ids, "token_type_ids": np.zeros_like(tokens)}
        wanted = {each.name for each in session.get_inputs()}
        assert wanted == {*inputs} - ({"token_type_ids"} if name == "modernbert" else set())
        (found,) = session.run(["logits"], {key: inputs[key].astype(np.int64) for key in wanted})
        ours = our_logits(tmp_path / "run", tokens, segment_ids)
        assert np.abs(found - ours)[segment_ids > 0].max() < 1e-4


@pytest.mark.slow
def test_answers(tmp_path):
    batch, ours = write_task(tmp_path / "run", "question_answering", compute=True)
    assert export_run(tmp_path / "run", tmp_path / "out", onnx=True)["onnx_difference"] < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    inputs = {"input_ids": batch["tokens"], "attention_mask": batch["segment_ids"]}
    found = session.run(["start_logits", "end_logits"], {name: array.astype(np.int64) for name, array in inputs.items()})
    real = batch["segment_ids"] > 0
    assert np.abs(np.stack(found, -1) - ours)[real].max() < 1e-4
