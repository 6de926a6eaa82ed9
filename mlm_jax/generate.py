"""Generated text: blanks that a masked model fills in an order of its own, or text continued from left to right.

Sources: Sahoo et al., 2024 (kuleshov-group/mdlm:diffusion.py) for ancestral sampling; Chang et al., 2022, "MaskGIT", and
Nie et al., 2025 (ML-GSAI/LLaDA:generate.py) for the order by confidence and for blocks.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlm_jax.config import Config
from mlm_jax.data.tokenizer import MASK_TEXT, Tokenizer
from mlm_jax.errors import UserError
from mlm_jax.objectives import Objective
from mlm_jax.objectives.hybrid import HybridLM
from mlm_jax.objectives.rates import scheduled_rates
from mlm_jax.sharding import ROWS

METHODS = ("confidence", "ancestral", "causal")
DEFAULT_LENGTH = 64  # blanks after a prompt that has none
_RUN = re.compile(r"\[MASK:(\d+)\]")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How text is drawn.

    Attributes:
        method: "confidence" fills the blanks first that the model is surest of, as many in each step; "ancestral" fills each
            blank in a step of its own chance, as the diffusion that the model was trained on runs backwards; "causal"
            fills from left to right, a token a step.
        steps: calls of the model for the two first; 0: as many as there are blanks.
        temperature: of each token's distribution; 0 takes the most probable token.
        block_size: blanks that are filled before the next ones are begun, from left to right; 0: all in one block.
        count: samples.
    """

    method: str = "confidence"
    steps: int = 0
    temperature: float = 1.0
    block_size: int = 0
    count: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"unknown method {self.method!r}: choose from {', '.join(METHODS)}")
        if self.count < 1:
            raise UserError(f"count={self.count} must be positive")
        for name in ("steps", "temperature", "block_size", "seed"):
            if not 0 <= getattr(self, name) < 2**31:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0 and below {2**31}")
        if self.method == "causal" and (self.steps or self.block_size):
            raise UserError("method causal fills one token a step: it takes neither steps nor block_size")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """For each of K steps: the block at work, how many of its blanks it leaves, and the chance of each to be filled."""

    block_K: np.ndarray  # int32
    left_K: np.ndarray  # int32
    chance_K: np.ndarray  # float32

    @classmethod
    def plan(cls, blanks: int, steps: int, block_size: int) -> "Schedule":
        """Steps divided evenly over blocks, a block's blanks evenly over its steps.

        Raises:
            UserError: there are fewer steps than blocks.
        """
        size = min(block_size or blanks, blanks)
        blocks = -(-blanks // size)
        if steps < blocks:
            raise UserError(f"{steps} steps are too few for {blocks} blocks of {size} blanks: each block takes one at least")
        rows = []
        for block in range(blocks):
            own_blanks = min(size, blanks - block * size)
            own_steps = steps // blocks + (block < steps % blocks)
            for step in range(own_steps):
                to_come = own_steps - step - 1
                rows.append((block, own_blanks * to_come // own_steps, 1.0 / (to_come + 1)))
        block_K, left_K, chance_K = zip(*rows, strict=True)
        return cls(np.array(block_K, np.int32), np.array(left_K, np.int32), np.array(chance_K, np.float32))


class Generator:
    """Draws texts, all steps in one program that is compiled once for each method, padded shape and number of steps."""

    def __init__(self, objective: Objective, tokenizer: Tokenizer):
        self._objective, self._tokenizer = objective, tokenizer
        hidden = np.ones(objective.cfg.model.vocab_size, bool)
        hidden[: tokenizer.vocab_size] = False
        hidden[tokenizer.special_ids] = True
        self._is_hidden_V = hidden

    def __call__(self, params: Any, prompt: str, sampling: Sampling, *, length: int = 0) -> list[str]:
        """Texts in which every blank of the prompt is filled and everything else is as given; no special token is drawn.

        Args:
            prompt: with `[MASK]` for a blank and `[MASK:20]` for a run of twenty.
            length: blanks to add behind the prompt. A prompt without blanks gets 64, or as many as the model has room for.

        Raises:
            UserError: the text exceeds the model's positions, or the method cannot fill its blanks.
        """
        ids, blanks = self.encode(prompt, length)
        samples = self.draw(params, ids, blanks, sampling)
        if sampling.method == "causal":  # a text ends at its first SEP, the one behind the blanks at the latest
            begin, sep_id = blanks[0], self._tokenizer.sep_id
            ends = begin + (samples[:, begin:] == sep_id).argmax(axis=1)
            return [self._tokenizer.decode(row[:end]) for row, end in zip(samples, ends, strict=True)]
        return [self._tokenizer.decode(row) for row in samples]

    def draw(self, params: Any, ids: np.ndarray, blanks: np.ndarray, sampling: Sampling) -> np.ndarray:
        """Token ids, int32 [count, tokens], from what `encode` returned."""
        causal = sampling.method == "causal"
        if causal:
            self._check_causal(ids, blanks)
        else:
            schedule = Schedule.plan(len(blanks), sampling.steps or len(blanks), sampling.block_size)
        mesh = jax.sharding.get_mesh()
        rows = -(-sampling.count // mesh.size) * mesh.size
        padded = min(self._objective.cfg.model.max_positions, _round_up(len(ids)))
        tokens = np.full((rows, padded), self._tokenizer.pad_id, np.int32)
        tokens[:, : len(ids)] = ids
        segment_ids = np.broadcast_to(np.arange(padded) < len(ids), tokens.shape).astype(np.int32)
        by_row, replicated = jax.NamedSharding(mesh, jax.P(ROWS)), jax.NamedSharding(mesh, jax.P())
        seeds = np.arange(rows, dtype=np.int32)
        tokens_BL, segment_ids_BL, seeds_B = (jax.device_put(x, by_row) for x in (tokens, segment_ids, seeds))
        key, temperature = jax.random.key(sampling.seed), np.float32(sampling.temperature)
        is_hidden_V, temperature, key = jax.device_put((self._is_hidden_V, temperature, key), replicated)
        if causal:
            begin, end = jax.device_put((np.int32(blanks[0]), np.int32(blanks[-1] + 1)), replicated)
            found = self._continue(params, tokens_BL, segment_ids_BL, seeds_B, is_hidden_V, temperature, key, begin, end)
        else:
            slots = np.zeros((3, _round_up(len(blanks))), np.int32)
            used = np.arange(len(blanks))
            slots[0, used] = blanks
            slots[1, used] = used // (sampling.block_size or len(blanks))  # the block of each
            slots[2, used] = 1
            slots_3P, planned = jax.device_put((slots, dataclasses.astuple(schedule)), replicated)
            given = (params, tokens_BL, segment_ids_BL, seeds_B, is_hidden_V, temperature, key, slots_3P, planned)
            found = self._fill(*given, ancestral=sampling.method == "ancestral")
        return np.asarray(jax.device_get(found))[: sampling.count, : len(ids)]

    def encode(self, prompt: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The prompt's ids between CLS and SEP, and where its blanks are."""
        limit = self._objective.cfg.model.max_positions
        runs = [int(digits[:9]) for digits in _RUN.findall(prompt)]
        if sum(runs) + length > limit:
            raise UserError(f"{sum(runs) + length} blanks exceed the model's {limit} positions")
        if length < 0 or 0 in runs:
            raise UserError(f"a run of blanks holds at least one: {prompt!r}, length={length}")
        text = _RUN.sub(lambda match: MASK_TEXT * int(match[1]), prompt)
        tokenizer = self._tokenizer
        given = tokenizer.encode_with_masks(text) if text else np.zeros(0, np.int32)
        if length == 0 and tokenizer.mask_id not in given:
            length = max(1, min(DEFAULT_LENGTH, limit - 2 - len(given)))
        if length:
            given = tokenizer.encode_with_masks(text + MASK_TEXT * length)
        ids = np.concatenate([[tokenizer.cls_id], given, [tokenizer.sep_id]]).astype(np.int32)
        if len(ids) > limit:
            raise UserError(f"a text of {len(ids)} tokens with its blanks exceeds the model's {limit} positions; shorten it")
        return ids, np.flatnonzero(ids == tokenizer.mask_id)

    def _check_causal(self, ids: np.ndarray, blanks: np.ndarray) -> None:
        if not can_continue(self._objective):
            raise UserError(
                f"method causal needs a run with objective='hybrid' and hybrid.causal_share above 0, and this is one of "
                f"objective={self._objective.cfg.objective!r}; use confidence or ancestral"
            )
        if len(blanks) != len(ids) - 1 - blanks[0]:
            raise UserError("method causal continues a text: its blanks must be at its end; use confidence or ancestral")

    @functools.cached_property
    def _fill(self) -> Any:
        @functools.partial(jax.jit, static_argnames=("ancestral",))
        def fill(
            params: Any,
            tokens_BL: jax.Array,
            segment_ids_BL: jax.Array,
            seeds_B: jax.Array,
            is_hidden_V: jax.Array,
            temperature: jax.Array,
            key: jax.Array,
            slots_3P: jax.Array,
            schedule: tuple[jax.Array, jax.Array, jax.Array],
            *,
            ancestral: bool,
        ) -> jax.Array:
            rows = tokens_BL.shape[0]
            positions_P, blocks_P, used_P = slots_3P
            repeat = functools.partial(jnp.broadcast_to, shape=(rows, len(positions_P)), out_sharding=jax.P(ROWS, None))
            positions_BP = repeat(positions_P)
            places_11L = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)[None, None]
            at_BPL = (positions_BP[:, :, None] == places_11L) & repeat(used_P > 0)[:, :, None]

            def step(
                state: tuple[jax.Array, jax.Array], now: tuple[jax.Array, ...]
            ) -> tuple[tuple[jax.Array, jax.Array], None]:
                tokens_BL, blank_BP = state
                number, block, left, chance = now
                logits_BPV = self._objective.logits(params, tokens_BL, segment_ids_BL, positions_BP)
                keys_B = _keys(key, seeds_B, number)
                chosen_BP, confidence_BP = _draw(keys_B, logits_BPV, is_hidden_V, temperature)
                open_BP = blank_BP & (blocks_P == block)[None]
                if ancestral:
                    count = len(positions_P)
                    uniform_BP = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 1), (count,)))(keys_B)
                    now_BP = open_BP & (uniform_BP < chance)
                else:
                    order_BP = jnp.argsort(jnp.where(open_BP, -confidence_BP, jnp.inf), axis=1)
                    rank_BP = jnp.argsort(order_BP, axis=1)
                    now_BP = open_BP & (rank_BP < open_BP.sum(1, keepdims=True) - left)
                written_BL = ((at_BPL & now_BP[:, :, None]) * chosen_BP[:, :, None]).sum(1)
                filled_BL = (at_BPL & now_BP[:, :, None]).any(1)
                return (jnp.where(filled_BL, written_BL, tokens_BL), blank_BP & ~now_BP), None

            numbers_K = jnp.arange(len(schedule[0]), dtype=jnp.int32)
            (tokens_BL, _), _ = jax.lax.scan(step, (tokens_BL, repeat(used_P > 0)), (numbers_K, *schedule))
            return tokens_BL

        return fill

    @functools.cached_property
    def _continue(self) -> Any:
        model, sep_id = self._objective, self._tokenizer.sep_id
        assert isinstance(model, HybridLM)

        @jax.jit
        def proceed(
            params: Any,
            tokens_BL: jax.Array,
            segment_ids_BL: jax.Array,
            seeds_B: jax.Array,
            is_hidden_V: jax.Array,
            temperature: jax.Array,
            key: jax.Array,
            begin: jax.Array,
            end: jax.Array,
        ) -> jax.Array:
            is_hidden_V = is_hidden_V & (jnp.arange(len(is_hidden_V)) != sep_id)

            def step(place: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                tokens_BL, ended_B1 = state
                logits_BPV = model.causal_logits(params, tokens_BL, segment_ids_BL, jnp.zeros_like(seeds_B)[:, None] + place)
                chosen_B1, _ = _draw(_keys(key, seeds_B, place), logits_BPV, is_hidden_V, temperature)
                chosen_B1 = jnp.where(ended_B1, sep_id, chosen_B1)
                here_1L = (jnp.arange(tokens_BL.shape[1]) == place)[None]
                return jnp.where(here_1L, chosen_B1, tokens_BL), ended_B1 | (chosen_B1 == sep_id)

            return jax.lax.fori_loop(begin, end, step, (tokens_BL, jnp.zeros_like(seeds_B, bool)[:, None]))[0]

        return proceed


def can_continue(objective: Objective) -> bool:
    """Whether a model has learnt to predict from what comes before alone."""
    return isinstance(objective, HybridLM) and objective.cfg.hybrid.causal_share > 0


def default_method(objective: Objective) -> str:
    """What a model was trained for: "causal" where no row was ever masked, else "confidence"."""
    return "causal" if can_continue(objective) and objective.cfg.hybrid.causal_share == 1 else "confidence"


def untrained_for(cfg: Config, method: str) -> str:
    """Why a model is used outside of what it was trained for, or nothing."""
    if method == "causal" or cfg.objective == "diffusion":
        return ""
    if cfg.objective == "hybrid" and cfg.hybrid.causal_share == 1:
        return "this run was trained on causal rows alone and fills each blank from its left; --method causal is its own"
    rate = max(scheduled_rates(cfg, stage, 0).largest for stage in range(len(cfg.stages)))
    return f"this run was trained with at most {rate:.0%} of a text masked; more blanks at once than that are new to it"


def _keys(key: jax.Array, seeds_B: jax.Array, step: jax.Array) -> jax.Array:
    """A key for each row and step, so that a sample does not depend on how many are drawn beside it."""
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.fold_in(key, seed), step))(seeds_B)


def _draw(
    keys_B: jax.Array, logits_BPV: jax.Array, is_hidden_V: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A token for each position, int32 [B, P], and its probability at temperature 1."""
    logits_BPV = jax.reshard(logits_BPV, jax.P(ROWS, None, None))
    logits_BPV = jnp.where(is_hidden_V[None, None], -jnp.inf, logits_BPV)
    shape = logits_BPV.shape[1:]
    # The plain float32 generator has no noise above 16, which thins out rare tokens where many are drawn (arXiv:2409.02908).
    noise_BPV = jax.vmap(lambda key: jax.random.gumbel(key, shape, mode="high"))(keys_B)
    chosen_BP = jnp.argmax(logits_BPV + temperature * noise_BPV, axis=-1).astype(jnp.int32)
    picked_BPV = chosen_BP[:, :, None] == jnp.arange(shape[-1], dtype=jnp.int32)[None, None]
    return chosen_BP, jnp.where(picked_BPV, jax.nn.softmax(logits_BPV, axis=-1), 0.0).sum(-1)


def _round_up(count: int) -> int:
    """The next power of two from 16 on, so that few shapes are compiled."""
    return max(16, 1 << (count - 1).bit_length())
