"""The `bench` verb: how fast the compiled step and the loader are here, where time and memory go, other recipes, a peer.

The step is built by the functions that training builds it with, and runs on one batch that stays on the devices.
"""

import logging
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mlm_jax import flops
from mlm_jax.bench.peer import HuggingFacePeer, check_installed
from mlm_jax.bench.profile import Breakdown, profile_steps
from mlm_jax.config import Config, StageConfig
from mlm_jax.data.corpus import Corpus, open_corpus
from mlm_jax.data.loader import batches
from mlm_jax.data.mixture import training_rows
from mlm_jax.data.ngrams import read_ngrams
from mlm_jax.errors import UserError
from mlm_jax.interop.fields import differences
from mlm_jax.masking import VocabTables
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import make_objective
from mlm_jax.sharding import ROWS, check_batch, make_mesh
from mlm_jax.train.feed import vocab_tables
from mlm_jax.train.optimizer import learning_rate, make_optimizer
from mlm_jax.train.state import TrainState, init_state
from mlm_jax.train.step import make_train_step

logger = logging.getLogger(__name__)

# Threads of torch's OpenMP go on spinning after its round; the next round begins when they have stopped.
SETTLE_SECONDS = 0.5
PROFILED_STEPS = 3
LOADED_ROWS = 50_000  # at most, to measure the loader
SPECIAL_IDS = 5  # of synthetic rows: padding, unknown, CLS, SEP and, last, the mask, as in our own tokenizers


def run_bench(
    cfg: Config,
    *,
    stage_index: int = 0,
    steps: int = 20,
    rounds: int = 5,
    peer: str | None = None,
    against: Sequence[Config] = (),
    data_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Measures one stage's step on this machine.

    Args:
        steps: in a round.
        rounds: whose median, least and most are reported; each is ours, the peer's, and one of every recipe of `against`.
        peer: "hf" compares with Hugging Face's BertForMaskedLM.
        against: other recipes, whose tokens a second are reported as a share of this one's; all are in memory together.
        data_dir: a prepared corpus, to take the rows from and to measure the loader on. Default: random rows.

    Returns:
        The measurements in JSON's types, as `bench.table` shows them.

    Raises:
        UserError: an argument is out of range, the corpus does not fit, or the peer is not installed.
    """
    _check(cfg, against, stage_index, steps, rounds)
    if peer is not None:
        _check_peer(cfg, peer)
        # The peer needs memory of the same device, of which JAX would else take three quarters when it starts.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    stage, machine = cfg.stages[stage_index], _machine()
    corpora = [None if data_dir is None else open_corpus(data_dir, each) for each in (cfg, *against)]
    mesh = make_mesh(cfg.sharding)
    for each in (cfg, *against):
        check_batch(each.stages[stage_index], mesh, f"{each.name}: stages[{stage_index}]")
    with jax.set_mesh(mesh):
        corpus = corpora[0]
        ours = _Contender(cfg, stage_index, corpus)
        result = {
            "config": cfg.name,
            "stage": stage_index,
            **machine,
            **ours.shape(),
            "rows": "random" if corpus is None else str(data_dir),
            "memory": ours.memory(),  # before anything else of this process adds to it
            "loader": None if corpus is None else _measure_loader(cfg, stage, corpus, steps * rounds),
        }
        runs: dict[str, Callable[[int], None]] = {"ours": ours.run}
        if peer is not None:
            rival = HuggingFacePeer(cfg, stage, ours.rows, dtype=ours.compute.dtype.name, num_threads=machine["threads"])
            rival.run(2)  # torch allocates and chooses its kernels in its first steps
            runs["peer"] = rival.run
        others = [_Contender(*each) for each in zip(against, [stage_index] * len(against), corpora[1:], strict=True)]
        runs |= {f"against {other.name}": other.run for other in others}
        seconds = alternate(runs, steps, rounds)
        result["step"] = ours.describe(seconds["ours"], steps)
        result["peer"] = None if peer is None else _compare(ours, rival, seconds)
        # Last, and after as many steps: the first ones of a process are slower, until it has all the memory they need.
        result["operations"] = ours.operations()
        result["against"] = [
            _compare_recipes(ours, other, seconds["ours"], seconds[f"against {other.name}"], steps) for other in others
        ]
    return result


def _check(cfg: Config, against: Sequence[Config], stage_index: int, steps: int, rounds: int) -> None:
    for each in (cfg, *against):
        if not 0 <= stage_index < len(each.stages):
            raise UserError(f"--stage={stage_index}: {each.name} has {len(each.stages)} stage(s), counted from 0")
        if each.sharding != cfg.sharding:
            raise UserError(f"--against: {each.name} has {each.sharding}, {cfg.name} {cfg.sharding}: one mesh is for all")
    names = [each.name for each in (cfg, *against)]
    if len({*names}) < len(names):
        raise UserError(f"--against: the recipes {', '.join(names)} must have different names")
    for name, value in (("steps", steps), ("rounds", rounds)):
        if value < 1:
            raise UserError(f"--{name}={value} must be positive")


def _check_peer(cfg: Config, peer: str) -> None:
    if cfg.objective != "mlm" or cfg.model.table_dim or differences(cfg.model, "bert"):
        raise UserError(
            f"--peer={peer}: the peers are BERT, with objective 'mlm', model.table_dim=0 and nothing that came later: "
            "leave it out"
        )
    check_installed(peer)


class _Contender:
    """A recipe's compiled step with its state and batch on the devices."""

    def __init__(self, cfg: Config, stage: int, corpus: Corpus | None):
        self.name, self.stage = cfg.name, cfg.stages[stage]
        self.rows = _random_rows(cfg, cfg.stages[stage]) if corpus is None else _corpus_rows(cfg, cfg.stages[stage], corpus)
        self.vocab = _vocab(cfg, corpus)
        self.compute = Compute.resolve(cfg.compute)
        objective = make_objective(cfg, self.compute, stage)
        optimizer, schedule = make_optimizer(cfg), learning_rate(cfg)
        step = make_train_step(cfg, cfg.stages[stage], objective, optimizer, schedule)

        def create() -> TrainState:
            params = objective.init(jax.random.key(cfg.seed))
            names = objective.loss_names + objective.metric_names
            ema, zero = cfg.optimizer.ema_decay > 0, cfg.sharding.zero
            return init_state(params, optimizer, ema=ema, names=names, zero=zero)

        self.state = jax.jit(create)()
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(ROWS))
        self.batch = {name: jax.device_put(array, sharding) for name, array in self.rows.items()}
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        self.compiled, self.compile_seconds, self.from_cache = _compile(step, self.state, self.batch, self.vocab)
        self.run(2)
        interval = jax.device_get(self.metrics["interval"])
        means = {name: float(term.sum) / max(float(term.weight), 1.0) for name, term in interval.items()}
        self.tokens = means["tokens"]  # real ones, in a step
        self.flops_per_token = objective.flops_per_token(means["segment_length"], means["predicted"])

    def shape(self) -> dict[str, Any]:
        """What was compiled: the rows of a step, the dtype and the parameters."""
        rows = {name: getattr(self.stage, name) for name in ("batch_size", "seq_len", "accumulation")}
        return {**rows, "dtype": self.compute.dtype.name, "parameters": self.parameters}

    def run(self, steps: int) -> None:
        """Runs so many steps, dispatched as training does it, and waits for the last one."""
        with jax.transfer_guard("disallow"):
            for _ in range(steps):
                self.state, self.metrics = self.compiled(self.state, self.batch, self.vocab)
        jax.block_until_ready((self.state, self.metrics))

    def describe(self, seconds: list[float], steps: int) -> dict[str, Any]:
        """Times and rates from the seconds that a step took in each round."""
        if int(jax.device_get(self.metrics["nonfinite"])):
            logger.warning("%s: the loss is not finite: the times hold, but try a lower optimizer.learning_rate", self.name)
        median = statistics.median(seconds)
        devices = jax.device_count()
        return {
            "steps": steps,
            "rounds": len(seconds),
            "compile_seconds": self.compile_seconds,
            "compiled_from_cache": self.from_cache,
            "tokens": self.tokens,
            "milliseconds": _spread([1e3 * value for value in seconds]),
            "tokens_per_second": _spread([self.tokens / value for value in seconds]),
            "flops_per_token": self.flops_per_token,
            "flops_per_second": self.flops_per_token * self.tokens / median,
            "mfu": flops.mfu(self.tokens / median, self.flops_per_token, devices, jax.devices()[0]),
        }

    def operations(self) -> dict[str, Any]:
        """Milliseconds a step by operation, from traced steps."""
        self.run(PROFILED_STEPS)
        return _breakdown(profile_steps(self.run, PROFILED_STEPS, self.compiled.as_text()))

    def memory(self) -> dict[str, Any]:
        """Bytes: what the compiler plans for one device, and the most that the process or the device has held."""
        planned = self.compiled.memory_analysis()
        # In KiB, but for macOS, which counts bytes.
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        stats = jax.devices()[0].memory_stats()
        return {
            "arguments": planned.argument_size_in_bytes,
            "outputs": planned.output_size_in_bytes,
            "outputs_in_arguments": planned.alias_size_in_bytes,  # the donated state
            "temporaries": planned.temp_size_in_bytes,
            "process_peak": resident,
            "device_peak": stats.get("peak_bytes_in_use") if stats else None,
        }


def alternate(runs: Mapping[str, Callable[[int], None]], steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a step of each contender in each round, one contender after the other within a round.

    Whatever else slows the machine for a while then slows all.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # unmeasured: memory that one has freed for another, and the like
        run(steps)
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(SETTLE_SECONDS)
            began = time.perf_counter()
            run(steps)
            seconds[name].append((time.perf_counter() - began) / steps)
    return seconds


def _compile(step: Any, *arguments: Any) -> tuple[Any, float, bool]:
    """The compiled step, the seconds that lowering and compiling took, and whether it came from a cache on disk."""
    hits: list[str] = []

    def listen(event: str, **kwargs: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    # A cached program carries the scopes of the code that it was compiled from; older ones would misplace its time.
    option = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, option)
    jax.config.update(option, True)
    jax.monitoring.register_event_listener(listen)
    began = time.perf_counter()
    try:
        compiled = step.lower(*arguments).compile()
    finally:
        jax.monitoring.unregister_event_listener(listen)
        jax.config.update(option, before)
    return compiled, time.perf_counter() - began, bool(hits)


def _vocab(cfg: Config, corpus: Corpus | None) -> VocabTables:
    if corpus is not None:
        ngrams = read_ngrams(cfg.masking.ngrams) if cfg.masking.ngrams else []
        return vocab_tables(cfg, corpus.tokenizer, ngrams)
    tables = VocabTables.from_arrays(
        mask_id=SPECIAL_IDS - 1,
        special_ids=np.arange(SPECIAL_IDS),
        word_starts=np.ones(cfg.model.vocab_size, bool),
        vocab_size=cfg.model.vocab_size,
    )
    return jax.device_put(tables, jax.NamedSharding(jax.sharding.get_mesh(), jax.P()))


def _random_rows(cfg: Config, stage: StageConfig) -> dict[str, np.ndarray]:
    """A batch of full rows, each one segment: the same work as text, and no text needed."""
    shape = (stage.batch_size, stage.seq_len)
    rng, side = np.random.default_rng(cfg.seed), cfg.model.image_size
    tokens = rng.integers(SPECIAL_IDS, cfg.model.vocab_size, shape, dtype=np.int32)
    rows = {
        "tokens": tokens,
        "segment_ids": np.ones(shape, np.int32),
        "example_ids": np.arange(stage.batch_size, dtype=np.int32),
        "epochs": np.zeros(stage.batch_size, np.int32),
    }
    if side:
        rows["images"] = rng.integers(0, 256, (stage.batch_size, side, side, 3), dtype=np.uint8)
        rows["matches"] = np.ones(stage.batch_size, np.int32)
    return rows


def _loader(cfg: Config, stage: StageConfig, corpus: Corpus, num_steps: int) -> Iterator[dict[str, np.ndarray]]:
    rows = training_rows(corpus, cfg, stage)
    return batches(
        rows,
        batch_size=stage.batch_size,
        start_step=0,
        num_steps=num_steps,
        first_position=0,
        seed=cfg.seed,
        exchanged=cfg.image_text.exchanged,
    )


def _corpus_rows(cfg: Config, stage: StageConfig, corpus: Corpus) -> dict[str, np.ndarray]:
    """The first batch of a run on this corpus."""
    return next(_loader(cfg, stage, corpus, 1))


def _measure_loader(cfg: Config, stage: StageConfig, corpus: Corpus, num_steps: int) -> dict[str, Any]:
    """What reading alone yields, from the first batch on, and what it costs in processor time of all threads."""
    num_steps = max(2, min(num_steps, LOADED_ROWS // stage.batch_size))
    wall, processor = time.perf_counter(), time.process_time()
    fills = [float((batch["segment_ids"][0] > 0).sum()) for batch in _loader(cfg, stage, corpus, num_steps)]
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    rows = num_steps * stage.batch_size
    return {
        "rows": rows,
        "rows_per_second": rows / wall,
        "rows_per_core_second": rows / processor,
        "tokens_per_second": rows * statistics.mean(fills) / wall,
        "tokens_per_core_second": rows * statistics.mean(fills) / processor,
    }


def _machine() -> dict[str, Any]:
    """The devices and the host; `load` is the average of the last minute, before this process adds to it."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "num_devices": jax.device_count(),
        "load": os.getloadavg()[0],
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _breakdown(found: Breakdown) -> dict[str, Any]:
    """Milliseconds a step, from the seconds of all traced steps."""
    scale = 1e3 / found.steps
    return {
        "steps": found.steps,
        "milliseconds": found.wall_seconds * scale,
        "covered": found.covered,
        "groups": {
            name: {
                "milliseconds": value * scale,
                "backward": found.backward[name] * scale,
                "matrix_products": found.matrix_products[name] * scale,
            }
            for name, value in found.groups.items()
        },
        "phases": {name: value * scale for name, value in found.phases.items()},
    }


def _compare(ours: _Contender, other: HuggingFacePeer, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    assert other.parameters == ours.parameters + other.extra_parameters, (
        f"the peer has {other.parameters} parameters and ours {ours.parameters}, which are not the same model"
    )
    ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds["peer"], strict=True)]
    return {
        "name": other.name,
        "versions": other.versions,
        "parameters": other.parameters,
        "extra_parameters": other.extra_parameters,
        "milliseconds": _spread([1e3 * value for value in seconds["peer"]]),
        "tokens_per_second": _spread([ours.tokens / value for value in seconds["peer"]]),
        "ratio": _spread(ratios),
        "ratios": ratios,
    }


def _compare_recipes(ours: _Contender, other: _Contender, own: list[float], its: list[float], steps: int) -> dict[str, Any]:
    """Another recipe's step, and its tokens a second as a share of ours: by round, and as its arithmetic predicts."""
    ratios = [other.tokens / theirs / (ours.tokens / mine) for mine, theirs in zip(own, its, strict=True)]
    return {
        "config": other.name,
        **other.shape(),
        "step": other.describe(its, steps),
        "ratio": _spread(ratios),
        "ratios": ratios,
        "ratio_by_flops": ours.flops_per_token / other.flops_per_token,
        "operations": other.operations(),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
