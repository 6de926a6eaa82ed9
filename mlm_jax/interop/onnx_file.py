"""model.onnx beside an exported model, for onnxruntime and whatever else reads ONNX.

By way of `transformers` and PyTorch's own exporter, which both keep: of JAX there is only a converter for each of its
operations (jax2onnx), and TensorFlow's, which is given up.
"""

import importlib.util
import logging
import pathlib
import warnings
from typing import Any

import numpy as np

from mlm_jax.errors import MachineError, UserError, install

FILE = "model.onnx"
_LIMIT = 1e-3  # largest difference of an output from PyTorch's; float32 gives some 1e-5
_LENGTHS = ((2, 7), (3, 12))  # rows and tokens: the model is traced with the first and compared at the second


def require_onnx(model_type: str) -> None:
    """Whether such a model can be written here.

    Raises:
        UserError: a library is missing, or `transformers` does not have the model.
    """
    missing = [name for name in ("torch", "transformers", "onnx", "onnxscript", "onnxruntime") if not _is_there(name)]
    if missing:
        raise UserError(f"--onnx needs {' and '.join(missing)}: {install('onnx')}")
    if model_type == "neobert":
        raise UserError("--onnx goes by way of transformers, which has no neobert")


def _is_there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def write_onnx(folder: pathlib.Path, architecture: str, *, token_types: bool) -> float:
    """Writes model.onnx for any number of rows and tokens, and compares it with PyTorch.

    Its inputs are input_ids, attention_mask and, where a model has types of texts, token_type_ids; its outputs logits, or
    start_logits and end_logits.

    Args:
        folder: the exported model.
        architecture: its class in `transformers`.

    Returns:
        The largest absolute difference of an output, at another number of rows and tokens, some of them padding.

    Raises:
        MachineError: that is more than rounding.
    """
    import onnxruntime
    import torch
    import transformers

    names = ["input_ids", "attention_mask", *(["token_type_ids"] if token_types else [])]
    outputs = ["start_logits", "end_logits"] if architecture.endswith("ForQuestionAnswering") else ["logits"]
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, architecture).from_pretrained(folder).eval()

    class Positional(torch.nn.Module):  # type: ignore[misc]  # of torch mypy knows nothing
        """Outputs without names, as the exporter numbers them."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            found = self.model(**dict(zip(names, inputs, strict=True)))
            return tuple(found[name] for name in outputs)

    wrapped = Positional()
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    traced, other = (_example(names, *shape, vocab_size=model.config.vocab_size) for shape in _LENGTHS)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter's own use of its libraries
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                wrapped,
                tuple(torch.from_numpy(array) for array in traced.values()),
                dynamo=True,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=(tuple(axes for _ in names),),
                verbose=False,
            )
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
        assert program is not None
        program.save(folder / FILE)
        expected = wrapped(*(torch.from_numpy(array) for array in other.values()))
    session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    found = session.run(outputs, other)
    real = other["attention_mask"] > 0
    difference = max(
        float(np.abs(a - b.numpy())[real if a.shape[:2] == real.shape else ...].max())
        for a, b in zip(found, expected, strict=True)
    )
    if not difference < _LIMIT:
        raise MachineError(
            f"{FILE} differs from the model by {difference:.1e}: torch's exporter fails here; leave out --onnx"
        )
    return difference


def _example(names: list[str], rows: int, length: int, *, vocab_size: int) -> dict[str, np.ndarray]:
    """Random rows, of which the last is half padding."""
    rng = np.random.default_rng(0)
    mask = np.ones((rows, length), np.int64)
    mask[-1, length // 2 :] = 0
    arrays = {"input_ids": rng.integers(0, vocab_size, (rows, length)), "attention_mask": mask}
    types = np.broadcast_to(np.arange(length) >= length // 3, (rows, length)).astype(np.int64)
    return arrays | ({"token_type_ids": types} if "token_type_ids" in names else {})
