"""A run's directory: its config, tokenizer, frozen validation rows and lock. Host code; nothing here knows the model.

config.json  checkpoints/  metrics.jsonl  tensorboard/  tokenizer/  unigrams.npy  validation_seq128.npz  [ngrams.txt]
[data/]  and of a mixture unigrams_NAME.npy and validation_seq128_NAME.npz for each source.
"""

import contextlib
import fcntl
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping

import numpy as np
from etils import epath

from mlm_jax.config import Config, check, differences, from_dict, to_dict
from mlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from mlm_jax.errors import MachineError, UserError

logger = logging.getLogger(__name__)


class Workdir:
    """Names the files of one run and reads or writes those that are not checkpoints or metrics."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = epath.Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.damaged = self.path / "damaged_checkpoints"
        self.default_data = self.path / "data"
        self._config = self.path / "config.json"
        self._ngrams = self.path / "ngrams.txt"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the directory for one training process. A bucket has no locks and is left to its user.

        Raises:
            UserError: another process is training here.
        """
        if "://" in os.fspath(self.path):
            logger.warning("%s has no lock: a second run that trains there would overwrite this one's files", self.path)
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
            raise UserError(f"--workdir={self.path}: no directory can be made there ({error.strerror})") from None
        with open(self.path / ".lock", "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"another process is training in {self.path}; give this run its own --workdir") from None
            yield

    def open_for_training(self, cfg: Config) -> None:
        """Writes config.json, or checks that the run already here computes the same thing.

        Until a run has saved or logged anything its config may still be corrected.

        Raises:
            UserError: the directory holds a run of another config; the fields that differ are named.
        """
        if self._config.exists() and self._has_begun():
            changed = differences(self.read_config(), cfg)
            if changed:
                raise UserError(
                    f"{self.path} holds a run of another config ({'; '.join(changed[:6])}); use the config that it began "
                    f"with, or another --workdir, which --config.init_from={self.path} begins with this run's parameters"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self._config, json.dumps(to_dict(cfg), indent=2).encode())

    def _has_begun(self) -> bool:
        saved = any(folder.exists() and any(folder.iterdir()) for folder in (self.checkpoints, self.damaged))
        metrics = self.path / "metrics.jsonl"
        return saved or (metrics.exists() and metrics.stat().length > 0)

    def read_config(self) -> Config:
        """The config that the run was started (or last continued) with."""
        if not self._config.exists():
            raise UserError(f"{self.path} is not a run's workdir: it has no config.json")
        try:
            cfg = from_dict(json.loads(self._config.read_text()))
            check(cfg)
        except (json.JSONDecodeError, UnicodeDecodeError, UserError) as error:
            raise MachineError(f"{self._config} is damaged: {error}") from error
        return cfg

    def write_language(
        self, tokenizer: Tokenizer, unigrams: np.ndarray, by_source: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Keeps the tokenizer and the training text's token counts beside the model; of a mixture, each source's too."""
        tokenizer.save(self.path / "tokenizer")
        for name, counts in {"": unigrams, **(by_source or {})}.items():
            buffer = io.BytesIO()
            np.save(buffer, counts)
            write_atomically(self._unigrams(name), buffer.getvalue())

    def read_tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path / "tokenizer")

    def log_unigrams(self, vocab_size: int, source: str = "") -> np.ndarray:
        """Log-probabilities of the training text's tokens, or of one source's, add-one smoothed: float32 [vocab_size].

        Ids beyond the tokenizer's never occur as targets and count as never seen.
        """
        counts = np.load(io.BytesIO(self._unigrams(source).read_bytes())).astype(np.float64)
        counts = np.pad(counts + 1.0, (0, vocab_size - len(counts)), constant_values=1.0)
        return np.log(counts / counts.sum()).astype(np.float32)

    def keep_ngrams(self, ngrams: list[str]) -> None:
        """Keeps the list that n-grams are masked by.

        Raises:
            UserError: it is another than the one that the run began with.
        """
        if self._ngrams.exists() and self.read_ngrams() != ngrams:
            raise UserError(f"masking.ngrams lists other n-grams than {self._ngrams}, which this run began with")
        write_atomically(self._ngrams, "\n".join(ngrams).encode())

    def read_ngrams(self) -> list[str]:
        """The list of n-grams, empty where the run has none."""
        return self._ngrams.read_text().split("\n") if self._ngrams.exists() else []

    def write_validation(self, seq_len: int, rows: dict[str, np.ndarray], source: str = "") -> None:
        """Freezes the held-out rows that this run is evaluated on, of one source where it is a mixture."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **rows)
        write_atomically(self._validation(seq_len, source), buffer.getvalue())

    def read_validation(self, seq_len: int, source: str = "") -> dict[str, np.ndarray]:
        """`tokens` and `segment_ids`, int32 [rows, seq_len]; where texts have images, `images` uint8 [rows, side, side, 3].

        Raises:
            UserError: the run was never evaluated at this length.
        """
        file = self._validation(seq_len, source)
        if not file.exists():
            raise UserError(f"{self.path} has no held-out rows of length {seq_len}; give a --source to evaluate on")
        with np.load(io.BytesIO(file.read_bytes())) as arrays:
            return {name: array if name == "images" else array.astype(np.int32) for name, array in arrays.items()}

    def _validation(self, seq_len: int, source: str) -> epath.Path:
        return self.path / f"validation_seq{seq_len}{source and '_'}{source}.npz"

    def _unigrams(self, source: str) -> epath.Path:
        return self.path / f"unigrams{source and '_'}{source}.npy"


def write_atomically(file: epath.Path, content: bytes) -> None:
    """Writes beside the file and renames, so that a reader sees the old content or the new and nothing between."""
    partial = file.parent / f".{file.name}.partial"
    partial.write_bytes(content)
    partial.replace(file)
