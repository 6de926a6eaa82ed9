"""The two kinds of errors that a person is told in one message, and how they are told."""

import errno
import sys
import traceback

UNEXPECTED = 70  # the status after an exception that is neither the user's nor the machine's, among several processes
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ENAMETOOLONG)


class UserError(ValueError):
    """A mistake in what the user asked for or supplied; the command line exits with status 2."""


class MachineError(RuntimeError):
    """A fault outside the user's request (disk, checkpoint, device); the command line exits with status 1."""


def install(extra: str) -> str:
    """How to install an extra, for a message: the package is installed from its own folder."""
    return f"pip install '.[{extra}]' in the folder of mlm-jax"


def tell(error: BaseException) -> int | None:
    """Tells an error that is the user's or the machine's in one message and returns the status; None for any other."""
    if isinstance(error, UserError):
        return fail(2, str(error))
    if isinstance(error, MachineError):
        return fail(1, str(error))
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        return fail(1, f"{error.strerror}: {error.filename or 'while writing'}; what was finished is kept")
    if isinstance(error, KeyboardInterrupt):
        return fail(130, "interrupted")
    return None


def tell_any(error: BaseException) -> int:
    """Tells any error; for one that has no message of its own, its traceback."""
    status = tell(error)
    if status is None:
        traceback.print_exception(error)
        return UNEXPECTED
    return status


def fail(status: int, message: str) -> int:
    """Prints a message as the program's and returns the status."""
    print(f"mlm-jax: {message}", file=sys.stderr)
    return status
