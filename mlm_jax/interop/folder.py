"""A Hugging Face folder that is to be imported: what its config.json says, and checks of all that belongs together."""

import contextlib
import dataclasses
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping

from mlm_jax.config import ModelConfig
from mlm_jax.config.conversion import nearest
from mlm_jax.data.tokenizer import Tokenizer
from mlm_jax.errors import UserError
from mlm_jax.interop.families import FAMILIES
from mlm_jax.interop.fields import family_of, read_model
from mlm_jax.interop.task_heads import Head, read_head
from mlm_jax.interop.tensors import NAMES, is_unused
from mlm_jax.interop.weights import Weights

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Folder:
    """One network of a Hugging Face folder, its weights not yet read."""

    path: pathlib.Path
    model_type: str
    network: str  # masked | detection | task
    model: ModelConfig
    weights: Weights
    pad_id: int | None
    head: Head | None  # of a fine-tuned network


def open_folder(path: pathlib.Path) -> Folder:
    """Reads config.json and finds the weights.

    Raises:
        UserError: there is no such folder, or none that is known here; the message names the file, field or class.
    """
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    file = path / "config.json"
    if not file.exists():
        raise UserError(f"{path} has no config.json: it is no Hugging Face folder")
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file} is not a dictionary")
    with _naming(path):
        model_type = family_of(raw)
        head = read_head(raw, model_type)
    weights = Weights(path)
    detection = NAMES[model_type].detection_head.values()
    network = "task" if head else "detection" if any(name in weights.shapes for name in detection) else "masked"
    with _naming(path):
        model = read_model(raw, network)
    pad_id = model.position_offset - 1 if FAMILIES[model_type].positions_follow_padding else None
    return Folder(path, model_type, network, model, weights, pad_id, head)


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Says which folder's config.json a message is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def check_tokenizer(tokenizer: Tokenizer, folder: Folder) -> None:
    """Whether a tokenizer can be the folder's. Tables are padded by a few rows often; many are worth a warning.

    Raises:
        UserError: it has more ids, or its padding is elsewhere.
    """
    if tokenizer.vocab_size > folder.model.vocab_size:
        raise UserError(
            f"{folder.path}: the tokenizer has {tokenizer.vocab_size} ids and the model {folder.model.vocab_size}: they do "
            "not belong together"
        )
    if folder.pad_id not in (None, tokenizer.pad_id):
        raise UserError(
            f"{folder.path}: config.json has pad_token_id={folder.pad_id}, and the tokenizer's is {tokenizer.pad_id}: they "
            "do not belong together"
        )
    if tokenizer.vocab_size < 0.9 * folder.model.vocab_size:
        logger.warning(
            "%s: the tokenizer has %d ids and the model %d: look whether it is this model's own",
            folder.path,
            tokenizer.vocab_size,
            folder.model.vocab_size,
        )


def check_tensors(folder: Folder, expected: Mapping[str, tuple[int, ...]], copies: Mapping[str, str]) -> None:
    """Whether a folder has the tensors that its config.json asks for, and no others that would be lost.

    Args:
        expected: their names and shapes.
        copies: those that repeat another, which may be left out.

    Raises:
        UserError: it has not; the message names the tensor.
    """
    found = folder.weights.shapes
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{folder.path}: the tensor {name} is missing{nearest(name, found)}")
        if found[name] != shape:
            raise UserError(
                f"{folder.path}: the tensor {name} is {list(found[name])}, and by config.json it is {list(shape)}"
            )
    others = [name for name in found if name not in expected and name not in copies]
    unexpected = [name for name in others if not is_unused(folder.model_type, name)]
    if unexpected:
        raise UserError(
            f"{folder.path}: the tensor {unexpected[0]} is unexpected in a {folder.model_type} of {folder.model.num_layers} "
            "layers with the head that it has: it would be lost"
        )
    if others:
        logger.info("left out, as the head that is kept does without: %s", ", ".join(sorted(others)))
