"""Reads the tensors of a Hugging Face folder, one at a time: safetensors, whole or in shards, or PyTorch's files."""

import functools
import importlib.util
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mlm_jax.errors import UserError, install

_FLOATS = ("float32", "float16", "bfloat16", "float64")
# What BERT's first checkpoints call a norm's scale and bias.
_OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}


class Weights:
    """The tensors of a folder by name.

    Attributes:
        shapes: of each.
    """

    def __init__(self, folder: pathlib.Path):
        """Opens the files.

        Raises:
            UserError: there are none, they are damaged, or they are PyTorch's and torch is not here.
        """
        self._readers: dict[str, Callable[[], Any]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in _files(folder):
            (self._open_torch if file.suffix == ".bin" else self._open_safetensors)(file)

    def read(self, name: str) -> np.ndarray:
        """A tensor, float32.

        Raises:
            UserError: it is of a kind that holds no plain weights.
        """
        array = self._readers[name]()
        if array.dtype.name not in _FLOATS:
            raise UserError(f"the tensor {name} is {array.dtype.name}: quantised weights cannot be imported")
        return np.asarray(array, np.float32)

    def _add(self, name: str, shape: tuple[int, ...], read: Callable[[], Any]) -> None:
        for old, new in _OLD_NAMES.items():
            if name.endswith("LayerNorm" + old):
                name = name.removesuffix(old) + new
        self._readers[name], self.shapes[name] = read, tuple(shape)

    def _open_safetensors(self, file: pathlib.Path) -> None:
        try:
            opened = safe_open(file, "np")
            for name in opened.keys():  # noqa: SIM118  (it is no dictionary)
                self._add(name, opened.get_slice(name).get_shape(), functools.partial(opened.get_tensor, name))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error

    def _open_torch(self, file: pathlib.Path) -> None:
        if importlib.util.find_spec("torch") is None:
            raise UserError(
                f"{file} is PyTorch's own format, which needs torch: {install('peers')}, or save the model again as "
                "model.safetensors"
            )
        import torch

        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle raises whatever it runs into
            raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
        for name, tensor in tensors.items():
            self._add(name, tensor.shape, tensor.float().numpy)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{index} is no index of weights: {type(error).__name__}: {error}") from error
            absent = [shard for shard in shards if not (folder / shard).exists()]
            if absent:
                raise UserError(f"{index} names {absent[0]}, which is not there: copy the whole folder")
            return [folder / shard for shard in shards]
    others = sorted(file.name for file in folder.iterdir() if file.suffix in (".h5", ".msgpack", ".onnx", ".ckpt"))
    hint = f"; {others[0]} is of another framework: save the model from there with transformers" if others else ""
    raise UserError(
        f"{folder} has no weights: none of model.safetensors, pytorch_model.bin, nor an index of their parts{hint}"
    )
