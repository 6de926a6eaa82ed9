"""Tensors of Hugging Face and our parameters: their names, a row of `NAMES` for each `model_type`, and their shapes.

Names of ours are paths within one network's parameters, {"encoder": …, "head": …}. Their kernels are [out, in]; ours have
the input first, heads apart, and layers stacked: what a name ends in says how it is turned.

One of theirs may hold several of ours: "qkv.weight#1/3" is the second third of its rows, "qkv.weight#1/3 of each head" the
second third of each head's. With ", pairs" behind it, two dimensions that a rotation turns lie side by side in theirs and
half a head apart in ours.
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


def _kernel(ours: str, theirs: str) -> dict[str, str]:
    return {ours: f"{theirs}.weight"}


@dataclasses.dataclass(frozen=True)
class Names:
    """Ours: theirs, for one `model_type`.

    Attributes:
        prefix: of the encoder's tensors where there is a head; a bare encoder's have none.
        encoder: without the prefix; {} stands for a layer's index. What a model does not have is not looked for.
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
_DISTIL_LAYER = "transformer.layer.{}"
_DISTILBERT = Names(
    prefix="distilbert.",
    encoder={
        _TABLE: "embeddings.word_embeddings.weight",
        "encoder.embeddings.positions_LD": "embeddings.position_embeddings.weight",
        **_norm("encoder.embeddings.norm", "embeddings.LayerNorm"),
        **_linear("encoder.layers.attention.query", f"{_DISTIL_LAYER}.attention.q_lin", "DHK", "HK"),
        **_linear("encoder.layers.attention.key", f"{_DISTIL_LAYER}.attention.k_lin", "DHK", "HK"),
        **_linear("encoder.layers.attention.value", f"{_DISTIL_LAYER}.attention.v_lin", "DHK", "HK"),
        **_linear("encoder.layers.attention.output", f"{_DISTIL_LAYER}.attention.out_lin", "HKD"),
        **_norm("encoder.layers.attention_norm", f"{_DISTIL_LAYER}.sa_layer_norm"),
        **_linear("encoder.layers.mlp.up", f"{_DISTIL_LAYER}.ffn.lin1", "DF", "F"),
        **_linear("encoder.layers.mlp.down", f"{_DISTIL_LAYER}.ffn.lin2", "FD"),
        **_norm("encoder.layers.mlp_norm", f"{_DISTIL_LAYER}.output_layer_norm"),
    },
    masked_head={
        **_linear("head.transform", "vocab_transform", "DD"),
        **_norm("head.norm", "vocab_layer_norm"),
        _BIAS: "vocab_projector.bias",
    },
    decoder=("vocab_projector.weight", "vocab_projector.bias"),
)
_MODERN_LAYER = "layers.{}"
_MODERNBERT = Names(
    prefix="model.",
    encoder={
        _TABLE: "embeddings.tok_embeddings.weight",
        **_norm("encoder.embeddings.norm", "embeddings.norm"),
        **_norm("encoder.layers.attention_norm", f"{_MODERN_LAYER}.attn_norm"),
        "encoder.layers.attention.query_DHK": f"{_MODERN_LAYER}.attn.Wqkv.weight#0/3",
        "encoder.layers.attention.key_DHK": f"{_MODERN_LAYER}.attn.Wqkv.weight#1/3",
        "encoder.layers.attention.value_DHK": f"{_MODERN_LAYER}.attn.Wqkv.weight#2/3",
        **_kernel("encoder.layers.attention.output_HKD", f"{_MODERN_LAYER}.attn.Wo"),
        **_norm("encoder.layers.mlp_norm", f"{_MODERN_LAYER}.mlp_norm"),
        # What is activated comes first.
        "encoder.layers.mlp.gate_DF": f"{_MODERN_LAYER}.mlp.Wi.weight#0/2",
        "encoder.layers.mlp.up_DF": f"{_MODERN_LAYER}.mlp.Wi.weight#1/2",
        **_kernel("encoder.layers.mlp.down_FD", f"{_MODERN_LAYER}.mlp.Wo"),
        **_norm("encoder.final_norm", "final_norm"),
    },
    masked_head={
        **_kernel("head.transform_DD", "head.dense"),
        **_norm("head.norm", "head.norm"),
        _BIAS: "decoder.bias",
    },
    decoder=("decoder.weight", "decoder.bias"),
    unused=(),
)
_NEO_LAYER = "transformer_encoder.{}"
_NEOBERT = Names(
    prefix="model.",
    encoder={
        _TABLE: "encoder.weight",
        **_kernel("encoder.layers.attention_norm.scale_D", f"{_NEO_LAYER}.attention_norm"),
        "encoder.layers.attention.query_DHK": f"{_NEO_LAYER}.qkv.weight#0/3 of each head, pairs",
        "encoder.layers.attention.key_DHK": f"{_NEO_LAYER}.qkv.weight#1/3 of each head, pairs",
        "encoder.layers.attention.value_DHK": f"{_NEO_LAYER}.qkv.weight#2/3 of each head",
        **_kernel("encoder.layers.attention.output_HKD", f"{_NEO_LAYER}.wo"),
        **_kernel("encoder.layers.mlp_norm.scale_D", f"{_NEO_LAYER}.ffn_norm"),
        "encoder.layers.mlp.gate_DF": f"{_NEO_LAYER}.ffn.w12.weight#0/2",
        "encoder.layers.mlp.up_DF": f"{_NEO_LAYER}.ffn.w12.weight#1/2",
        **_kernel("encoder.layers.mlp.down_FD", f"{_NEO_LAYER}.ffn.w3"),
        **_kernel("encoder.final_norm.scale_D", "layer_norm"),
    },
    masked_head={_BIAS: "decoder.bias"},
    decoder=("decoder.weight", "decoder.bias"),
    unused=(r"(model\.)?freqs_cis",),
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
    "distilbert": _DISTILBERT,
    "modernbert": _MODERNBERT,
    "neobert": _NEOBERT,
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


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where one of ours is in theirs: a tensor, or one of several equal parts of its rows."""

    name: str
    index: int = 0
    count: int = 1
    by_head: bool = False
    in_pairs: bool = False

    @classmethod
    def of(cls, theirs: str, layer: int) -> "_Place":
        found = re.fullmatch(r"([^#]*)(?:#(\d)/(\d)( of each head)?(, pairs)?)?", theirs)
        assert found is not None, theirs
        name, index, count, by_head, in_pairs = found.groups()
        return cls(name.format(layer), int(index or 0), int(count or 1), bool(by_head), bool(in_pairs))

    def select(self, whole: np.ndarray, heads: int) -> np.ndarray:
        """The part of theirs, its rows in our order. Of a whole array that is written, a view."""
        if self.count == 1:
            return whole
        rows, inputs = whole.shape[0] // self.count, whole.shape[1]
        if not self.by_head:
            return whole.reshape(self.count, rows, inputs)[self.index]
        part = whole.reshape(heads, self.count, rows // heads, inputs)[:, self.index]
        if self.in_pairs:
            return part.reshape(heads, rows // heads // 2, 2, inputs).swapaxes(1, 2).reshape(rows, inputs)
        return part.reshape(rows, inputs)

    def insert(self, whole: np.ndarray, part: np.ndarray, heads: int) -> None:
        """The inverse: writes into theirs."""
        rows, inputs = part.shape
        if not self.by_head:
            whole.reshape(self.count, rows, inputs)[self.index] = part
            return
        if self.in_pairs:
            part = part.reshape(heads, 2, rows // heads // 2, inputs).swapaxes(1, 2)
        part = part.reshape(heads, rows // heads, inputs)
        whole.reshape(heads, self.count, rows // heads, inputs)[:, self.index] = part


def their_tensors(shapes: Any, tensors: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of theirs that hold the parameters of these shapes."""
    found = {}
    for path, leaf in flatten(shapes).items():
        for index, shape in _layers(path, leaf.shape, _num_layers(shapes)):
            place, (rows, *rest) = _Place.of(tensors[path], index), _their_shape(path, shape)
            found[place.name] = (rows * place.count, *rest)
    return found


def to_params(shapes: Any, tensors: Mapping[str, str], weight: Callable[[str], np.ndarray]) -> Any:
    """Our parameters from theirs.

    Args:
        shapes: our parameters' tree, of anything with a shape.
        tensors: ours: theirs.
        weight: a tensor of theirs by its name.
    """
    num_layers = _num_layers(shapes)

    def ours(path: Any, leaf: Any) -> np.ndarray:
        name, found = _joined(path), []
        for index, shape in _layers(name, leaf.shape, num_layers):
            place = _Place.of(tensors[name], index)
            found.append(_to_ours(name, place.select(weight(place.name), shape[-2] if place.by_head else 0), shape))
        return np.stack(found) if _is_stacked(name) else found[0]

    return jax.tree_util.tree_map_with_path(ours, shapes)


def to_tensors(params: Any, tensors: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Theirs, float32, from our parameters."""
    found: dict[str, np.ndarray] = {}
    for path, array in flatten(params).items():
        for row, (index, shape) in enumerate(_layers(path, array.shape, _num_layers(params))):
            part = array[row] if _is_stacked(path) else array
            theirs = part.reshape(_their_shape(path, shape)[::-1]).T if _is_kernel(path) else part
            theirs = np.ascontiguousarray(theirs.reshape(_their_shape(path, shape)), np.float32)
            place = _Place.of(tensors[path], index)
            if place.count == 1:
                found[place.name] = theirs
                continue
            rows, *rest = theirs.shape
            whole = found.setdefault(place.name, np.empty((rows * place.count, *rest), np.float32))
            place.insert(whole, theirs, shape[-2] if place.by_head else 0)
    return found


def flatten(tree: Any) -> dict[str, Any]:
    """A nested dictionary's leaves by their paths, joined by points."""
    return {_joined(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _joined(path: Any) -> str:
    return ".".join(str(key.key) for key in path)


def _is_stacked(path: str) -> bool:
    return path.startswith("encoder.layers.")


def _num_layers(tree: Any) -> int:
    return max((leaf.shape[0] for path, leaf in flatten(tree).items() if _is_stacked(path)), default=0)


def _layers(path: str, shape: tuple[int, ...], num_layers: int) -> list[tuple[int, tuple[int, ...]]]:
    """The index and shape of each layer's part, or of the whole. What only some layers have, the last ones have."""
    if not _is_stacked(path):
        return [(0, shape)]
    return [(index, shape[1:]) for index in range(num_layers - shape[0], num_layers)]


def _is_kernel(path: str) -> bool:
    return path.rpartition("_")[2] in _INPUT_DIMENSIONS


def _their_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if _is_kernel(path):
        inputs = _INPUT_DIMENSIONS[path.rpartition("_")[2]]
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])
    return (math.prod(shape),) if "_bias_" in path else shape


def _to_ours(path: str, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return (theirs.T if _is_kernel(path) else theirs).reshape(shape)
