"""Tensors of Hugging Face and our parameters: their names, a row of `NAMES` for each `model_type`, and their shapes.

Names of ours are paths within one network's parameters, {"encoder": …, "head": …}. Their kernels are [out, in]; ours have
the input first, heads apart, and layers stacked: what a name ends in says how it is turned.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

# How many dimensions of a kernel are its input's, by how its name ends; whatever ends otherwise is no kernel.
_INPUT_DIMENSIONS = {"DHK": 1, "HKD": 2, "DF": 1, "FD": 1, "DD": 1, "ED": 1, "D1": 1, "DC": 1}
_TABLE, _BIAS = "encoder.embeddings.tokens_VD", "head.output_bias_V"


def _linear(ours: str, theirs: str, kernel: str, bias: str = "D") -> dict[str, str]:
    return {f"{ours}_{kernel}": f"{theirs}.weight", f"{ours}_bias_{bias}": f"{theirs}.bias"}


def _norm(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.scale_D": f"{theirs}.weight", f"{ours}.bias_D": f"{theirs}.bias"}


@dataclasses.dataclass(frozen=True)
class Names:
    """Ours: theirs, for one `model_type`.

    Attributes:
        prefix: of the encoder's tensors where there is a head; a bare encoder's have none.
        encoder: without the prefix; {} stands for a layer's index.
        masked_head, detection_head: of the two kinds of networks.
        decoder: theirs of the decoder's table and bias, where these are not the token table and the head's bias.
        unused: patterns of tensors that pre-training does without: what is computed from CLS, and constants.
    """

    prefix: str
    encoder: Mapping[str, str]
    masked_head: Mapping[str, str]
    decoder: tuple[str, str]
    detection_head: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = (r"(\w+\.)?pooler\..*", r"(\w+\.)?embeddings\.(position_ids|token_type_ids)")


_BERT_LAYER = "encoder.layer.{}"
_BERT_ENCODER = {
    _TABLE: "embeddings.word_embeddings.weight",
    "encoder.embeddings.positions_LD": "embeddings.position_embeddings.weight",
    "encoder.embeddings.token_types_TD": "embeddings.token_type_embeddings.weight",
    **_norm("encoder.embeddings.norm", "embeddings.LayerNorm"),
    **_linear("encoder.layers.attention.query", f"{_BERT_LAYER}.attention.self.query", "DHK", "HK"),
    **_linear("encoder.layers.attention.key", f"{_BERT_LAYER}.attention.self.key", "DHK", "HK"),
    **_linear("encoder.layers.attention.value", f"{_BERT_LAYER}.attention.self.value", "DHK", "HK"),
    **_linear("encoder.layers.attention.output", f"{_BERT_LAYER}.attention.output.dense", "HKD"),
    **_norm("encoder.layers.attention_norm", f"{_BERT_LAYER}.attention.output.LayerNorm"),
    **_linear("encoder.layers.mlp.up", f"{_BERT_LAYER}.intermediate.dense", "DF", "F"),
    **_linear("encoder.layers.mlp.down", f"{_BERT_LAYER}.output.dense", "FD"),
    **_norm("encoder.layers.mlp_norm", f"{_BERT_LAYER}.output.LayerNorm"),
}
_BERT = Names(
    prefix="bert.",
    encoder=_BERT_ENCODER,
    masked_head={
        **_linear("head.transform", "cls.predictions.transform.dense", "DD"),
        **_norm("head.norm", "cls.predictions.transform.LayerNorm"),
        _BIAS: "cls.predictions.bias",
    },
    decoder=("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
    unused=(*Names.unused, r"cls\.seq_relationship\..*"),
)
_ROBERTA = Names(
    prefix="roberta.",
    encoder=_BERT_ENCODER,
    masked_head={
        **_linear("head.transform", "lm_head.dense", "DD"),
        **_norm("head.norm", "lm_head.layer_norm"),
        _BIAS: "lm_head.bias",
    },
    decoder=("lm_head.decoder.weight", "lm_head.decoder.bias"),
)
NAMES = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "electra": Names(
        prefix="electra.",
        encoder=_BERT_ENCODER | _linear("encoder.projection", "embeddings_project", "ED"),
        masked_head={
            **_linear("head.transform", "generator_predictions.dense", "DD"),
            **_norm("head.norm", "generator_predictions.LayerNorm"),
            _BIAS: "generator_lm_head.bias",
        },
        decoder=("generator_lm_head.weight", "generator_lm_head.bias"),
        detection_head={
            **_linear("head.transform", "discriminator_predictions.dense", "DD"),
            **_linear("head.output", "discriminator_predictions.dense_prediction", "D1", "1"),
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names of one network's tensors.

    Attributes:
        tensors: ours: theirs.
        copies: theirs that repeat another of theirs, and that one; a file may leave them out.
    """

    tensors: Mapping[str, str]
    copies: Mapping[str, str]


def layout(model_type: str, network: str, *, tied: bool) -> Layout:
    """The names of a network of a family: network is "masked" or "detection", tied whether the decoder is the table."""
    names = NAMES[model_type]
    tensors = {ours: names.prefix + theirs for ours, theirs in names.encoder.items()}
    if network == "detection":
        return Layout(tensors | dict(names.detection_head), {})
    tensors |= names.masked_head
    weight, bias = names.decoder
    own = tensors[_BIAS]
    if tied:
        return Layout(tensors, {weight: tensors[_TABLE]} | ({bias: own} if bias != own else {}))
    return Layout(tensors | {"head.decoder_VD": weight, _BIAS: bias}, {own: bias} if bias != own else {})


def is_unused(model_type: str, name: str) -> bool:
    """Whether a tensor of theirs is one that pre-training does without."""
    return any(re.fullmatch(pattern, name) for pattern in NAMES[model_type].unused)


def their_tensors(shapes: Any, tensors: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of theirs that hold the parameters of these shapes."""
    found = {}
    for path, leaf in flatten(shapes).items():
        for index, shape in _layers(path, leaf.shape):
            found[tensors[path].format(index)] = _their_shape(path, shape)
    return found


def to_params(shapes: Any, tensors: Mapping[str, str], weight: Callable[[str], np.ndarray]) -> Any:
    """Our parameters from theirs.

    Args:
        shapes: our parameters' tree, of anything with a shape.
        tensors: ours: theirs.
        weight: a tensor of theirs by its name.
    """

    def ours(path: Any, leaf: Any) -> np.ndarray:
        name = _joined(path)
        found = [_to_ours(name, weight(tensors[name].format(i)), shape) for i, shape in _layers(name, leaf.shape)]
        return np.stack(found) if _is_stacked(name) else found[0]

    return jax.tree_util.tree_map_with_path(ours, shapes)


def to_tensors(params: Any, tensors: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Theirs, float32, from our parameters."""
    found = {}
    for path, array in flatten(params).items():
        for index, _ in _layers(path, array.shape):
            part = array[index] if _is_stacked(path) else array
            theirs = part.reshape(_their_shape(path, part.shape)[::-1]).T if _is_kernel(path) else part
            theirs = theirs.reshape(_their_shape(path, part.shape))
            found[tensors[path].format(index)] = np.ascontiguousarray(theirs, np.float32)
    return found


def flatten(tree: Any) -> dict[str, Any]:
    """A nested dictionary's leaves by their paths, joined by points."""
    return {_joined(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _joined(path: Any) -> str:
    return ".".join(str(key.key) for key in path)


def _is_stacked(path: str) -> bool:
    return path.startswith("encoder.layers.")


def _layers(path: str, shape: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """The index and shape of each layer's part, or of the whole."""
    return [(index, shape[1:]) for index in range(shape[0])] if _is_stacked(path) else [(0, shape)]


def _is_kernel(path: str) -> bool:
    return path.rpartition("_")[2] in _INPUT_DIMENSIONS


def _their_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if _is_kernel(path):
        inputs = _INPUT_DIMENSIONS[path.rpartition("_")[2]]
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])
    return (math.prod(shape),) if "_bias_" in path else shape


def _to_ours(path: str, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return (theirs.T if _is_kernel(path) else theirs).reshape(shape)
