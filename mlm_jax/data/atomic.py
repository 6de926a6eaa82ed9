"""Files that exist whole or not at all, and a lock on a directory.

`prepare` builds everything through these, so that an interruption at any point leaves nothing that looks finished.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

from mlm_jax.errors import MachineError, UserError

LOCK_NAME = "prepare.lock"
TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def telling_faults(path: pathlib.Path, left: str = "finished work is kept") -> Iterator[None]:
    """Turns what the operating system refuses, while the block writes `path`, into a MachineError with the path.

    Args:
        left: what the user finds there afterwards.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise MachineError(f"cannot write {path}: {reason}; start again, {left}") from error


@contextlib.contextmanager
def replacing(final: pathlib.Path, scratch: pathlib.Path | None = None) -> Iterator[pathlib.Path]:
    """Gives a temporary path; what the block made there takes `final`'s name when the block succeeds.

    The content is on the disk before it gets its name, so a power cut does not leave a whole-looking empty file either.

    Args:
        final: the file's name.
        scratch: a folder on the same disk for the temporary file, which a killed process leaves there; if None, the
            folder of `final`.

    Raises:
        MachineError: the disk is full, or `final` cannot be written for another reason.
    """
    temporary = (scratch or final.parent) / f"{final.name}.{os.getpid()}{TEMPORARY_SUFFIX}"
    try:
        with telling_faults(final):
            yield temporary
            flush(temporary)
            os.replace(temporary, final)
            flush(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(final: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary folder beside `final`; it takes that name, whole and on the disk, when the block succeeds.

    Raises:
        UserError: there is something at `final` already.
        MachineError: the disk is full, or `final` cannot be written for another reason.
    """
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final} is not an empty folder, and nothing in it is overwritten: give a new one")
    temporary = final.absolute().parent / f".{final.name}.{os.getpid()}{TEMPORARY_SUFFIX}"
    try:
        with telling_faults(final, "nothing was written"):
            temporary.mkdir(parents=True)
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                flush(path)
            os.replace(temporary, final)
            flush(temporary.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush(path: pathlib.Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
    """Holds `directory` for this process alone; the operating system frees it however the process ends.

    Raises:
        UserError: another process holds it.
        MachineError: the lock file cannot be made.
    """
    path = directory / LOCK_NAME
    try:
        descriptor = _lock(path)
    except BlockingIOError:
        raise UserError(f"another process is preparing {directory}; wait until it ends, or give another directory") from None
    except OSError as error:
        raise MachineError(f"cannot lock {path}: {error.strerror}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held: whoever opened it meanwhile notices in _lock
        os.close(descriptor)


def _lock(path: pathlib.Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed the file between our open and our lock: take the new one
