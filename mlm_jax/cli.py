"""The command line: it finds the verb, runs it, and turns what goes wrong into one message and a status."""

import argparse
import difflib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from mlm_jax import __version__
from mlm_jax.errors import UserError, tell
from mlm_jax.verbs import VERBS

# XLA's CPU client allocates a step's temporaries anew each time, and glibc would hand blocks of that size back to the
# system at once, so that each step began with page faults: up to a third of it. Kept blocks have to come from the heap, and
# from that of the one main arena, as the other arenas grow to 64 MiB at most. Huge pages make what faults remain cheap.
_KEEP_MEMORY = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"hugetlb": 1, "mmap_max": 0, "trim_threshold": 2**62, "arena_max": 1}.items()
)


def run() -> None:
    """The program: `main` in a process whose memory is set up for it."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        # glibc reads this once, when a process starts, so this one starts again.
        os.environ["GLIBC_TUNABLES"] = _KEEP_MEMORY
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    devices = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    if devices.isdigit() and int(devices) > 1:
        # Several devices on one CPU are for trials. Each holds threads of XLA's pool while it waits in collectives, and in
        # a pool of the default size all of them can be waiting. XLA reads its size from here.
        os.environ.setdefault("NPROC", str(4 * int(devices)))
    sys.unraisablehook = _interrupt_again
    sys.exit(main())


def _interrupt_again(unraisable: Any) -> None:
    """Repeats a Ctrl-C whose exception was lost, because it arrived within a callback of the garbage collector."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(unraisable)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Returns:
        The exit status: 0; 1 for a fault of the machine; 2 for a mistake of the user; 128 + n after signal n.
    """
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    # What Orbax and Beam log on failure they also raise, and then it is told once, in our words.
    for repeating in ("absl", "apache_beam.runners"):
        logging.getLogger(repeating).setLevel(logging.CRITICAL)
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    for chatty in ("jax", "orbax", "grain", "fsspec", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        options, overrides = _parse(list(sys.argv[1:] if arguments is None else arguments))
        result = options.run(options, overrides)
    except (Exception, KeyboardInterrupt) as error:
        status = tell(error)
        if status is None:
            raise
        return status
    if isinstance(result, int):
        return result
    if options.json and result is not None:
        print(json.dumps(result))
    return 0


class _Parser(argparse.ArgumentParser):
    """Refuses what it does not know with the nearest thing that it does."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (see: {self.prog} --help)")


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The verb's options and the `--config.` overrides, which ml_collections' flags spell `--config.a.b=value`."""
    overrides, rest = [], []
    queue = iter(arguments)
    for argument in queue:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        if "=" not in argument:
            argument += "=" + next(queue, "")
        overrides.append(argument.removeprefix("--config."))
    parser = _Parser(prog="mlm-jax", description="Masked-language-model pre-training in JAX.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"mlm-jax {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    known: dict[str, _Parser] = {}
    for name, (text, declare, run) in VERBS.items():
        known[name] = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        known[name].add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
        known[name].set_defaults(run=run)
        declare(known[name])
    options, unknown = parser.parse_known_args(rest)
    if unknown:
        names = [name for action in known[options.verb]._actions for name in action.option_strings if action.dest != "help"]
        near = difflib.get_close_matches(unknown[0].split("=")[0], [*names, "--config."], n=1, cutoff=0.65)
        hint = f"; did you mean {near[0]}?" if near else f"; see mlm-jax {options.verb} --help"
        raise UserError(f"unknown option {unknown[0]}{hint}")
    if overrides and not hasattr(options, "config"):
        raise UserError(f"{options.verb} takes no --config. overrides: it uses the config in its --workdir")
    return options, overrides
