"""`mlm-jax train` that writes down which examples each step takes under which masks, and can hurt itself at a step.

python tests/recorded_train.py RECORD ACTION@STEP|- train --config …      ACTION: kill (SIGKILL), term (SIGTERM)

The record has a line for each step and process: its step, and for each row of the global batch that the process's devices
hold the epoch, the example and a checksum of what the masking made of it.
"""

import json
import os
import pathlib
import signal
import sys
import time
import zlib

from mlm_jax.cli import main
from mlm_jax.distributed import Peers


def record(file: pathlib.Path, hurt: str = "-") -> None:
    """Makes every train step write its line first."""
    import jax
    import numpy as np

    from mlm_jax.objectives.mlm import mask_batch
    from mlm_jax.objectives.rates import constant_rates
    from mlm_jax.train import loop

    original = loop.make_train_step
    action, _, at = hurt.partition("@")

    def rows_here(array):
        """The rows that this process's devices hold, by their place in the global batch."""
        found = {}
        for shard in array.addressable_shards:
            start = shard.index[0].start or 0
            found.update({start + place: row for place, row in enumerate(np.asarray(shard.data))})
        return found

    def make_train_step(cfg, stage, *arguments, **options):
        train_step = original(cfg, stage, *arguments, **options)

        @jax.jit
        def mask(batch, vocab):
            return mask_batch(batch, jax.random.key(cfg.seed), vocab, cfg.masking, constant_rates(cfg.masking))

        def recorded(state, batch, vocab):
            with jax.transfer_guard("allow"):
                step = int(state.step) + 1
                epochs, examples = rows_here(batch["epochs"]), rows_here(batch["example_ids"])
                masked = [rows_here(array) for array in jax.tree.leaves(mask(batch, vocab))]
            rows = {
                row: [int(epochs[row]), int(examples[row]), zlib.crc32(b"".join(part[row].tobytes() for part in masked))]
                for row in epochs
            }
            with file.open("a") as lines:
                lines.write(json.dumps({"step": step, "rows": rows}) + "\n")
            if action != "-" and step >= int(at):
                hurt_at(action, is_first=step == int(at), is_alone=jax.process_count() == 1)
            return train_step(state, batch, vocab)

        return recorded

    loop.make_train_step = make_train_step


def hurt_at(action: str, *, is_first: bool, is_alone: bool) -> None:
    """Sends the signal to the process that was started: the supervisor, where there is one."""
    target = os.getpid() if is_alone else os.getppid()
    if action == "kill":
        os.kill(target, signal.SIGKILL)
        time.sleep(30)
    elif is_first:
        os.kill(target, signal.SIGTERM)
    time.sleep(0.05)  # this small run would come to its end before the notice is through


if __name__ == "__main__":
    initialize_jax = Peers.initialize_jax

    def initialize_and_record(peers: Peers) -> None:
        """In the worker, so that the supervisor imports neither JAX nor what starts threads."""
        initialize_jax(peers)
        record(pathlib.Path(sys.argv[1]), sys.argv[2])

    Peers.initialize_jax = initialize_and_record
    sys.exit(main(sys.argv[3:]))
