"""A file is whole or absent, whatever happens while it is written."""

import errno
import os
import pathlib

import pytest

from mlm_jax.data import atomic
from mlm_jax.errors import MachineError


def test_content_appears_when_the_block_succeeds(tmp_path: pathlib.Path) -> None:
    final, scratch = tmp_path / "final", tmp_path / "scratch"
    scratch.mkdir()
    with atomic.replacing(final, scratch) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == scratch and not final.exists()
    assert final.read_text() == "whole"
    assert not list(scratch.iterdir())


def _write(final: pathlib.Path, text: str, fault: Exception) -> None:
    with atomic.replacing(final) as temporary:
        temporary.write_text(text)
        raise fault


def test_a_block_that_fails_leaves_what_was_there(tmp_path: pathlib.Path) -> None:
    final = tmp_path / "final"
    final.write_text("old")
    with pytest.raises(KeyError):
        _write(final, "half", KeyError())
    assert final.read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_what_the_operating_system_refuses_is_told_with_the_path(tmp_path: pathlib.Path) -> None:
    reason = os.strerror(errno.ENOSPC)
    with pytest.raises(MachineError, match=f"cannot write {tmp_path / 'final'}: {reason}"):
        _write(tmp_path / "final", "half", OSError(errno.ENOSPC, reason))
    with pytest.raises(MachineError, match=r"cannot write .*missing/final: No such file"):
        _write(tmp_path / "missing" / "final", "", KeyError())
    assert not list(tmp_path.iterdir())


def test_a_lock_is_free_after_its_block_and_after_a_crash_of_its_holder(tmp_path: pathlib.Path) -> None:
    with atomic.locked(tmp_path):
        pass
    (tmp_path / atomic.LOCK_NAME).touch()  # as a killed process leaves it
    with atomic.locked(tmp_path):
        assert (tmp_path / atomic.LOCK_NAME).exists()
    assert not list(tmp_path.iterdir())
