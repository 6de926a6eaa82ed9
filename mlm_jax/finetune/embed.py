"""`mlm-jax embed` and `probe`: the vectors of texts from a run's encoder as it is, and how much of a task they know."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax.config import Config, ShardingConfig, StageConfig, TaskConfig
from mlm_jax.errors import UserError
from mlm_jax.finetune import metrics
from mlm_jax.finetune.classification import Text, Texts
from mlm_jax.finetune.prepare import make_kind, read_examples
from mlm_jax.finetune.records import read_records, text_field
from mlm_jax.finetune.table import PADDING, bucket_lengths, in_order
from mlm_jax.inference import read_encoder, trained_config
from mlm_jax.model.encoder import Compute, Encoder
from mlm_jax.model.task_heads import mean_of_tokens
from mlm_jax.objectives.network import Network
from mlm_jax.sharding import ROWS, make_mesh, place, row_ways
from mlm_jax.workdir import Workdir

logger = logging.getLogger(__name__)

POOLINGS = ("mean", "cls")
_BUCKETS = TaskConfig().buckets
_NEIGHBOURS = 15


class Embedder:
    """Texts to vectors: the mean of a text's last hidden states (CLS and SEP included), or that of its first token."""

    def __init__(self, workdir: str | os.PathLike[str], *, pooling: str = "mean", max_length: int = 0, batch_size: int = 64):
        """Loads a run, pre-trained or fine-tuned.

        Args:
            max_length: tokens of a text, behind which it is cut; 0: the model's positions, 512 at most.

        Raises:
            UserError: that is no run, or an option is out of range.
        """
        if pooling not in POOLINGS:
            raise UserError(f"--pooling={pooling} is none of {', '.join(POOLINGS)}")
        folder = Workdir(workdir)
        self.cfg = trained_config(folder)
        limit = self.cfg.model.max_positions
        if not 8 <= (max_length or 8) <= limit or batch_size < 1:
            raise UserError(
                f"--max-length={max_length} must lie between 8 and the model's {limit} positions, --batch-size above 0"
            )
        self.max_length, self.pooling, self.batch_size = max_length or min(limit, 512), pooling, batch_size
        self.tokenizer = folder.read_tokenizer()
        self.mesh = make_mesh(ShardingConfig())
        compute = Compute.resolve(self.cfg.compute)
        network = Network(lambda rngs: Encoder(self.cfg.model, compute, rngs=rngs), compute.dtype)
        with jax.set_mesh(self.mesh):
            self.params, self.step = read_encoder(folder, compute)
        self._vectors = jax.jit(lambda params, batch: self._pool(network.bind(params), batch))

    def _pool(self, encoder: Encoder, batch: dict[str, jax.Array]) -> jax.Array:
        hidden_BLD = encoder(batch["tokens"], batch["segment_ids"], None, batch.get("token_types"))
        pooled_B1D = mean_of_tokens(hidden_BLD, batch["segment_ids"]) if self.pooling == "mean" else hidden_BLD[:, :1]
        return jax.reshard(jnp.squeeze(pooled_B1D, 1).astype(jnp.float32), jax.P())

    def __call__(self, texts: Sequence[Text]) -> np.ndarray:
        """Float32 [texts, D]."""
        cfg = dataclasses.replace(self.cfg, objective="classification", stages=(StageConfig(seq_len=self.max_length),))
        table = Texts(cfg, self.tokenizer).encode(texts, (), labelled=False)
        found = np.zeros((len(texts), self.cfg.model.embed_dim), np.float32)
        buckets = bucket_lengths(_BUCKETS, int(table.lengths.max()))
        with jax.set_mesh(self.mesh):
            ways = row_ways(self.mesh)
            for rows, length in in_order(table.lengths, buckets, -(-self.batch_size // ways) * ways):
                batch = place(table.batch(rows, length, self.tokenizer.pad_id, targets=False), jax.P(ROWS))
                real = rows != PADDING
                found[rows[real]] = np.asarray(self._vectors(self.params, batch))[real]
        return found


def read_texts(uri: str, column: str) -> list[Text]:
    """The texts of a file, of any format that `finetune` reads.

    Raises:
        UserError: there are none, or no such column.
    """
    examples = []
    for where, record in read_records(uri, (column,)):
        examples.append(Text(text_field(record, column, where, "--column"), None, None, where))
    if not examples:
        raise UserError(f"{uri} holds no texts")
    return examples


def write_vectors(path: str, vectors: np.ndarray) -> None:
    """A .npy file, or a .parquet with one column, `embedding`, a list of float32 a row.

    Raises:
        UserError: another suffix, or no file can be made there.
    """
    try:
        if path.endswith(".npy"):
            np.save(path, vectors)
        elif path.endswith(".parquet"):
            import pyarrow
            import pyarrow.parquet

            column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.ravel()), vectors.shape[1])
            pyarrow.parquet.write_table(pyarrow.table({"embedding": column}), path)
        else:
            raise UserError(f"--output={path} must end in .npy or .parquet")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"--output={path}: no file can be made there ({error.strerror})") from None


def probe(cfg: Config, embedder: Embedder, *, max_examples: int) -> dict[str, Any]:
    """How well the labels of a task's dev examples follow from vectors of its training examples, nothing being trained but
    a classifier on them: by the nearest neighbours, and by logistic regression.

    Args:
        cfg: of a classification.
        max_examples: to train on, the first of them.

    Returns:
        `majority`, `neighbours` and `logistic`, each with the measures of a classification; and the numbers of examples.

    Raises:
        UserError: another task, or scikit-learn is not installed.
    """
    metrics.require_libraries()
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if cfg.objective != "classification" or cfg.task.pair:
        raise UserError("a probe is for the classification of single texts: --config must be of such a task")
    train, dev, labels = read_examples(cfg, make_kind(cfg, embedder.tokenizer))
    train = train[:max_examples]
    wanted, known = ([example.label for example in part] for part in (dev, train))
    if len({*known}) < 2:
        raise UserError(f"the first {len(train)} examples of {cfg.task.train} have one label only: raise --max-examples")
    vectors, dev_vectors = embedder(train), embedder(dev)
    most_frequent = max(sorted({*known}), key=known.count)
    found = {"majority": [most_frequent] * len(dev)}
    classifiers = {
        "neighbours": KNeighborsClassifier(min(_NEIGHBOURS, len(train)), metric="cosine"),
        "logistic": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
    }
    for name, classifier in classifiers.items():
        found[name] = classifier.fit(vectors, known).predict(dev_vectors).tolist()
    scores = {name: metrics.classification(labels, wanted, labels_found) for name, labels_found in found.items()}
    return {"examples": len(train), "dev_examples": len(dev), **scores}
