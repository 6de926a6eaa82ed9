"""What several verbs share: options, and how a device's lack of memory is told."""

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

from mlm_jax.errors import MachineError

Result = dict[str, Any] | None
# By name: what it does, its options, and what runs it with them and the --config. overrides.
Verbs = dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace, list[str]], Any]]]


def config_option(parser: argparse.ArgumentParser) -> None:
    """--config, for a verb that reads a recipe."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="a recipe, as configs/smoke.py or configs/compare_mini.py:span; override with --config.section.field=value",
    )


def workdir_option(parser: argparse.ArgumentParser) -> None:
    """--workdir, for a verb that reads a run."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a trained run's directory")


@contextlib.contextmanager
def device_errors() -> Any:
    """Tells a device's lack of memory in one message; any other error of the runtime stays a traceback."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MachineError(
            f"the device is out of memory: {str(error).splitlines()[0][:300]}. Try more stages[…].accumulation, "
            "compute.remat=dots, a smaller batch, or sharding.fsdp"
        ) from error
