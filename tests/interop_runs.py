"""Small runs with random weights in workdirs, and their logits: for test_interop.py and interop_parity.py."""

import functools
import pathlib

import jax
import numpy as np

from mlm_jax.config import Config, MaskingConfig, ModelConfig, ShardingConfig, StageConfig, TokenizerConfig, check
from mlm_jax.data.tokenizer import Tokenizer, train_tokenizer
from mlm_jax.inference import open_run
from mlm_jax.interop.load import write_run
from mlm_jax.model.encoder import Compute
from mlm_jax.objectives import make_objective
from mlm_jax.objectives.rtd import ReplacedTokenDetection
from mlm_jax.sharding import ROWS, make_mesh, place
from mlm_jax.workdir import Workdir

TEXTS = ["the cat sat on the mat", "a dog and a cat ran to the house", "the house of the dog is old", "Öl für 3 €"] * 20
LENGTH = 24
SMALL = {"vocab_size": 400, "num_layers": 2, "embed_dim": 32, "num_heads": 4, "mlp_dim": 48, "max_positions": LENGTH}

# Fields that make it a small ModernBERT, whose second and third layer are local, or a small NeoBERT.
_MODERN = {"positions": "rope", "gated_mlp": True, "biases": False, "pre_norm": True, "norm_eps": 1e-5}
MODERNBERT = _MODERN | {"first_norm": False, "norm_bias": False, "activation": "gelu_erf", "init_scaled": True}
MODERNBERT |= {"num_layers": 4, "local_window": 3, "rope_base": 500.0, "local_rope_base": 50.0}
NEOBERT = _MODERN | {"norm": "rms", "embedding_norm": False, "activation": "silu", "head_transform": False}
NEOBERT |= {"tie_embeddings": False}


@functools.cache
def small_tokenizer(algorithm: str = "bpe") -> Tokenizer:
    """Of about 300 ids, among them those of all bytes."""
    size = 320 if algorithm == "bpe" else 285
    return train_tokenizer(TokenizerConfig(vocab_size=size, algorithm=algorithm, character_coverage=1.0), TEXTS)


def config(objective: str = "mlm", **fields) -> Config:
    """A tiny model that differs from the defaults in these fields."""
    cfg = Config(
        name="tiny",
        objective=objective,
        model=ModelConfig(**SMALL | fields),
        masking=MaskingConfig(policy="span", max_words=3) if objective == "span" else MaskingConfig(),
        stages=(StageConfig(seq_len=LENGTH),),
        tokenizer=TokenizerConfig(algorithm="pretrained", path="tokenizer"),
    )
    check(cfg)
    return cfg


def write_random_run(path: pathlib.Path, cfg: Config, tokenizer: Tokenizer | None = None) -> pathlib.Path:
    """A workdir whose parameters are all random, so that each of them shows in the logits."""
    tokenizer = tokenizer or small_tokenizer()
    with jax.set_mesh(make_mesh(ShardingConfig(), jax.devices()[:1])):
        objective = make_objective(cfg, Compute.resolve(cfg.compute), mask_id=tokenizer.mask_id)
        shapes = jax.eval_shape(objective.init, jax.random.key(0))
        rng = np.random.default_rng(0)

        def draw(key, leaf) -> np.ndarray:
            noise = rng.normal(size=leaf.shape).astype(np.float32)
            return 1 + 0.2 * noise if "scale_D" in jax.tree_util.keystr(key) else 0.3 * noise

        params = jax.tree_util.tree_map_with_path(draw, shapes)
        path.mkdir(parents=True, exist_ok=True)
        write_run(Workdir(path), cfg, tokenizer, objective, params)
    return path


def rows(vocab_size: int, special: set[int], lengths: list[int], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Random regular tokens, padded to the longest, and segment ids: 1, and 0 for padding."""
    rng = np.random.default_rng(1)
    regular = np.setdiff1d(np.arange(vocab_size), list(special))
    tokens = rng.choice(regular, (len(lengths), max(lengths))).astype(np.int32)
    segment_ids = (np.arange(max(lengths))[None] < np.array(lengths)[:, None]).astype(np.int32)
    return np.where(segment_ids > 0, tokens, pad_id).astype(np.int32), segment_ids


def our_logits(workdir: pathlib.Path, tokens: np.ndarray, segment_ids: np.ndarray, *, detection: bool = False) -> np.ndarray:
    """Logits at every position of some rows, whose number is padded to what the mesh of all devices divides."""
    with open_run(workdir) as run:
        objective = run.objective
        count = -(-len(tokens) // jax.device_count()) * jax.device_count()
        arrays = [np.resize(array, (count, tokens.shape[1])) for array in (tokens, segment_ids)]
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), arrays[0].shape)
        placed = place((*arrays, positions), jax.P(ROWS))
        if detection:
            assert isinstance(objective, ReplacedTokenDetection)

            def apply(params, tokens_BL, segment_ids_BL, positions_BP):
                return objective.discriminator.bind(objective.discriminator_params(params))(tokens_BL, segment_ids_BL)
        else:
            apply = objective.logits
        return np.asarray(jax.device_get(jax.jit(apply)(run.params, *placed)))[: len(tokens)]
