"""Pre-training as a job of the loop: a prepared corpus, an objective on its rows, and held-out rows under frozen masks."""

import logging
import os
from typing import Any

import jax

from mlm_jax.config import Config, StageConfig
from mlm_jax.data.corpus import Corpus, open_corpus
from mlm_jax.data.loader import Rows
from mlm_jax.data.mixture import training_rows
from mlm_jax.data.ngrams import read_ngrams
from mlm_jax.data.prepare import prepare
from mlm_jax.distributed import Peers
from mlm_jax.errors import UserError
from mlm_jax.fill_mask import Filler
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import Trainable, make_objective
from mlm_jax.sharding import place
from mlm_jax.train import loop
from mlm_jax.train.begin import begin
from mlm_jax.train.evaluate import HeldOut, described, evaluate_sources, make_eval_step
from mlm_jax.train.feed import check_epochs, device_batches, token_bytes, vocab_tables
from mlm_jax.train.state import TrainState
from mlm_jax.workdir import Workdir

logger = logging.getLogger(__name__)


def train(
    cfg: Config,
    workdir_path: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    profile: loop.Profile | None = None,
    peers: Peers | None = None,
) -> None:
    """Pre-trains to the last stage's last step, continuing from the workdir's newest checkpoint.

    Args:
        data_dir: the prepared corpus; made there when missing. Default: `data/` in the workdir.
        workers: processes for preparation; default one a core.
        peers: the other processes of this run, which call this at the same time with the same arguments; none when None.

    Raises:
        UserError: the config does not fit the machine, the corpus, or the run in the workdir.
        MachineError: the loss stopped being finite, or a file could not be written.
        Stop: SIGTERM or SIGINT arrived, here or at a peer; the state was saved first.
    """
    with loop.site(cfg, workdir_path, peers) as here:
        corpus = _open(cfg, here.workdir, data_dir or here.workdir.default_data, workers, here.peers)
        over = "a source at most" if corpus.parts else "the training text"
        logger.info("%d steps pass over %s %.2f times", cfg.total_steps, over, check_epochs(cfg, corpus))
        loop.run(cfg, here, Pretraining(cfg, here, corpus), profile=profile)


def _open(cfg: Config, workdir: Workdir, data_dir: str | os.PathLike[str], workers: int | None, peers: Peers) -> Corpus:
    """The primary makes what is missing of the workdir and the corpus; the others wait for it and open them."""
    if peers.is_primary:
        workdir.open_for_training(cfg)
        corpus = prepare(cfg, data_dir, workers)
        workdir.write_language(
            corpus.tokenizer, corpus.unigrams, {name: part.unigrams for name, part in corpus.parts.items()}
        )
        if cfg.masking.ngrams:
            workdir.keep_ngrams(read_ngrams(cfg.masking.ngrams))
        peers.announce()
        return corpus
    peers.wait_for_primary()
    try:
        workdir.read_config()
        return open_corpus(data_dir, cfg)
    except UserError as error:
        raise UserError(
            f"process {peers.index} does not see what process 0 has prepared ({error}): --workdir and --data must be on a "
            "disk that all processes share"
        ) from error


class Pretraining:
    """A run over a prepared corpus; see `loop.Job`."""

    def __init__(self, cfg: Config, here: loop.Site, corpus: Corpus):
        self.cfg, self.here, self.corpus = cfg, here, corpus
        self.compute = Compute.resolve(cfg.compute)
        self.vocab = vocab_tables(cfg, corpus.tokenizer, here.workdir.read_ngrams())
        self.sources = tuple(corpus.parts)
        self.log_unigrams = {
            name: place(here.workdir.log_unigrams(cfg.model.vocab_size, name), jax.P()) for name in self.sources or ("",)
        }
        self.bytes_V = place(token_bytes(corpus.tokenizer, cfg.model.vocab_size), jax.P())
        self.validation: dict[str, HeldOut] = {}
        self._measure_as(0)

    def _measure_as(self, stage: int) -> None:
        """Evaluates and fills masks with the model as it is in this stage."""
        objective = make_objective(self.cfg, self.compute, stage, mask_id=self.corpus.tokenizer.mask_id)
        self.objective: Trainable = objective
        self.eval_step = make_eval_step(self.cfg, objective)
        self.filler = Filler(objective, self.corpus.tokenizer)

    def begin(self, state: TrainState) -> TrainState:
        """As drawn, or with the parameters of another run; see `loop.Job`."""
        return begin(state, self.objective, self.corpus.tokenizer)

    def enter(self, index: int, done: int) -> loop.Leg:
        """The stage's objective and batches; it is evaluated on held-out rows of its own length."""
        cfg, stage = self.cfg, self.cfg.stages[index]
        if cfg.at_stage(index).model != self.objective.cfg.model:
            self._measure_as(index)
        self.validation = self._freeze_validation(stage)
        rows = training_rows(self.corpus, cfg, stage)
        # Examples that earlier stages have seen at this row length; of a mixture, of each source.
        seen: Any = 0
        for other in cfg.stages[:index]:
            if other.seq_len == stage.seq_len:
                seen = seen + training_rows(self.corpus, cfg, other).counts(other.steps * other.batch_size)
        feed = device_batches(
            rows,
            stage,
            self.here.mesh,
            seed=cfg.seed,
            start_step=done,
            num_steps=stage.steps - done,
            seen=seen,
            exchanged=cfg.image_text.exchanged,
        )

        def epochs(steps: int) -> dict[str, float]:
            return rows.epochs(seen + rows.counts(steps * stage.batch_size))

        return loop.Leg(make_objective(cfg, self.compute, index), feed, rows.ranges, epochs)

    def _freeze_validation(self, stage: StageConfig) -> dict[str, HeldOut]:
        parts = self.corpus.parts or {"": self.corpus}
        most = max(1, self.cfg.evaluation.max_rows // len(parts))
        languages = {source.name: self.cfg.languages(source.language) for source in self.cfg.data.sources}
        frozen = {}
        for name, part in parts.items():
            rows = Rows(part.path, stage.seq_len, "validation", languages.get(name, ()))
            read = rows.read(range(min(len(rows), most)))
            if self.here.peers.is_primary:
                self.here.workdir.write_validation(stage.seq_len, read, name)
            frozen[name] = HeldOut(read, self.log_unigrams[name])
        return frozen

    def evaluate(self, step: int, params: Any) -> dict[str, Any]:
        """The loss and accuracy of held-out rows under frozen masks, and the config's probes filled in."""
        values = evaluate_sources(
            self.eval_step, params, self.validation, self.vocab, self.bytes_V, self.cfg.evaluation.batch_size
        )
        for line in described(values):
            logger.info("step %d %s", step, line)
        probes = self.cfg.evaluation.probes
        if probes:
            fills = self.filler(params, probes, top_k=5)
            values["probes"] = [{"text": text, "fills": fill} for text, fill in zip(probes, fills, strict=True)]
        return values
