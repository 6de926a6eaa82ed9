"""One process of several that do not train: what supervisors make of workers that fail.

python tests/peers_program.py COORDINATOR N I BEHAVIOUR PROCESS      the behaviour is that of one process, the others wait
"""

import logging
import os
import signal
import sys
import time

from mlm_jax.config import Config
from mlm_jax.distributed import find_cluster, join
from mlm_jax.errors import MachineError, UserError, tell_any


def main() -> int:
    coordinator, num_processes, process_id, behaviour, culprit = sys.argv[1:]
    cluster = find_cluster({}, coordinator=coordinator, num_processes=int(num_processes), process_id=int(process_id))
    peers = join(cluster, Config(name=behaviour), "workdir", timeout=20.0)
    with peers.ending_at_once(tell_any):
        if behaviour == "finish":
            return 0
        if peers.is_primary:
            peers.announce()
        peers.wait_for_primary()
        print(f"process {process_id} is ready", flush=True)
        if process_id != culprit:
            if behaviour == "echo":  # the runtime's answer to the end of another process
                time.sleep(0.3)
                os.write(2, b"Check failure stack trace\n")
                os.abort()
            time.sleep(60)
        time.sleep(0.2)
        if behaviour in ("killed", "echo"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif behaviour == "lost":
            os.kill(os.getppid(), signal.SIGKILL)
        elif behaviour == "user":
            raise UserError("the user is to blame")
        elif behaviour == "machine":
            raise MachineError("the machine is to blame")
        elif behaviour == "bug":
            raise IndexError("nobody expected this")
        time.sleep(60)
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    try:
        sys.exit(main())
    except (UserError, MachineError) as error:
        sys.exit(tell_any(error))
