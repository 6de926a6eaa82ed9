"""Texts with an image each: from a record of a file to pixels of one size, and which examples are shown another's image.

A text travels through preparation as one document with a mark and the name of its image in it. The workers that pack rows
read the image, and a row holds its pixels, so that an example is as much a function of its number as one of text alone.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from mlm_jax.config import Config
from mlm_jax.data import record_files, text_files
from mlm_jax.errors import MachineError, UserError, install

MARK = "\ufdd1"  # between a text and the name of its image; Unicode keeps it for a program's own use


def join(text: str, name: str) -> str:
    """The document of a text and an image."""
    return f"{text}{MARK}{name}"


def split(document: str) -> tuple[str, str]:
    """A document's text and the name of its image, empty where it has none."""
    text, _, name = document.partition(MARK)
    return text, name


# --- records that name an image ---------------------------------------------------------------------------------------


class Images(Protocol):
    """Where images are found by their names; it pickles."""

    def read(self, name: str) -> bytes:
        """The file's content."""

    def place(self, name: str) -> str:
        """Where it is, for a message."""


@dataclasses.dataclass(frozen=True)
class Folder:
    """Image files by their paths from a folder."""

    root: str

    def check(self, name: str, where: str) -> None:
        """Raises a UserError if there is no such file, and it costs nothing to know."""
        path = self.place(name)
        if "://" not in path and not os.path.isfile(path):
            raise UserError(f"{where}: no image file {path}")

    def read(self, name: str) -> bytes:
        path = self.place(name)
        try:
            return epath.Path(path).read_bytes()
        except OSError as error:
            raise MachineError(f"{path} cannot be read: {error}") from error

    def place(self, name: str) -> str:
        return os.path.join(self.root, name)


@dataclasses.dataclass(frozen=True)
class Tars:
    """The members of uncompressed tars, read in any order."""

    paths: tuple[str, ...]

    def check(self, name: str, where: str) -> None:
        """Raises a UserError if there is no such member."""
        if name.removeprefix("./") not in _members(self.paths):
            raise UserError(f"{where}: {', '.join(self.paths)} has no member {name!r}")

    def read(self, name: str) -> bytes:
        path, offset, size = _members(self.paths)[name.removeprefix("./")]
        try:
            with epath.Path(path).open("rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise MachineError(f"{path} cannot be read: {error}") from error

    def place(self, name: str) -> str:
        return f"{', '.join(self.paths)}, member {name}"


@functools.cache  # once in a process
def _members(paths: tuple[str, ...]) -> dict[str, tuple[str, int, int]]:
    """Of each member its tar, where its content begins there, and its bytes."""
    found = {}
    for path in paths:
        try:
            with epath.Path(path).open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.isfile():
                        found[member.name.removeprefix("./")] = (path, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise UserError(f"{path} is no tar, or a compressed one, in which nothing can be looked up: {error}") from None
        except OSError as error:
            raise MachineError(f"{path} cannot be read: {error}") from error
    return found


def common_folder(paths: Sequence[str]) -> str:
    """The folder that all of these files lie in or under, with a slash at its end; empty for the current one."""
    shared = itertools.takewhile(
        lambda names: len({*names}) == 1, zip(*(path.split("/")[:-1] for path in paths), strict=False)
    )
    return "".join(f"{names[0]}/" for names in shared)


def read_documents(paths: Sequence[str], fields: Sequence[str], image: str, images: Folder | Tars) -> Iterator[str]:
    """The documents of the records of .jsonl, .tsv and .csv files; those without text are left out.

    Args:
        fields: see `texts_of`.
        image: the field that names the image: a member of a tar, or a path from the file that names it.

    Raises:
        UserError: a record without such fields, or an image that is not there; with file and line.
    """
    root = common_folder(paths)
    for path in paths:
        for where, record in record_files.records(path):
            texts = texts_of(record, fields, where)
            if not texts:
                continue
            name = text_files.text_of(record, image, where, "image")
            if not name:
                raise UserError(f"{where}: the field {image!r} names no image")
            if isinstance(images, Folder):
                name = os.path.join(os.path.dirname(path), name).removeprefix(root)
            images.check(name, where)
            yield from (join(text, name) for text in texts)


def texts_of(record: Mapping[str, Any], fields: Sequence[str], where: str) -> list[str]:
    """The texts of a record: each text that its field holds, or, of several fields, one of all that they hold.

    Args:
        fields: names; `captions/text` is the field `text` within `captions`. Each holds a text or several.

    Raises:
        UserError: there is no such field, or it holds something else.
    """
    texts = []
    for name in fields:
        value: Any = record
        for part in name.split("/"):
            if not isinstance(value, Mapping) or part not in value:
                text_files.text_of(value if isinstance(value, Mapping) else {}, part, where)
            value = value[part]
        several = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
        texts += [text_files.text_of({name: each}, name, where) for each in several]
    texts = [text for text in texts if text and not text.isspace()]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can escape
        raise UserError(f"{where}: no valid text: {error}") from None
    return [", ".join(texts)] if len(fields) > 1 and texts else texts


# --- pixels -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Reads images by their names and brings them to squares of one size; it pickles."""

    images: Images
    size: int  # pixels of a side
    resize: str  # as `data.image_resize`

    def __call__(self, name: str) -> np.ndarray:
        """Uint8 [size, size, 3].

        Raises:
            UserError: it is no image that can be read.
        """
        return decode(self.images.read(name), self.images.place(name), self.size, self.resize)


def decoder(cfg: Config, images: Images | None, uri: str) -> Decoder | None:
    """What reads the images of a source as a model takes them; None where it takes none.

    Raises:
        UserError: it takes images, and the source has none.
    """
    if not cfg.model.image_size:
        return None
    if images is None:
        raise UserError(
            f"model.image_size={cfg.model.image_size} wants an image with each text, and {uri} has none: give a source "
            "images:GLOB?field=TEXT&image=PATH, or tfds: with image="
        )
    return Decoder(images, cfg.model.image_size, cfg.data.image_resize)


def decode(content: bytes, where: str, size: int, resize: str) -> np.ndarray:
    """An image file's content as RGB, uint8 [size, size, 3]; what is transparent is white, and the camera's turn undone.

    Raises:
        UserError: it is no image that can be read.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError(f"to read images, the extra 'images' is needed: {install('images')}") from None
    try:
        with Image.open(io.BytesIO(content)) as opened:
            image: Any = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):  # Pillow would cut off all above 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where} cannot be read as an image: {error}; repair it, or take its record out") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if resize == "pad":
        image = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color="white")
    elif resize == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


# --- another's image --------------------------------------------------------------------------------------------------


def draw_others(
    example_ids: np.ndarray, epochs: np.ndarray, count: int, rate: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which examples are shown another's image, and whose: a function of seed, epoch and example, as a mask is.

    Args:
        count: examples that there are; another is any but the example itself.
        rate: the probability.

    Returns:
        bool [b], and int32 [b], whose image it would be.
    """
    keys = zip(epochs.tolist(), example_ids.tolist(), strict=True)
    drawn = b"".join(hashlib.blake2b(f"{seed} {epoch} {id}".encode(), digest_size=16).digest() for epoch, id in keys)
    bits = np.frombuffer(drawn, "<u8").reshape(-1, 2)
    exchanged = bits[:, 0] < int(rate * 2.0**64) if count > 1 else np.zeros(len(bits), bool)
    distance = 1 + (bits[:, 1] % max(count - 1, 1)).astype(np.int64)
    return exchanged, ((example_ids + distance) % count).astype(np.int32)
