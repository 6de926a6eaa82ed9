"""Long stages tell how far they are: lines in a log, a bar on a terminal."""

import logging
import sys

import pytest

from mlm_jax.data import progress


def test_lines_tell_share_and_speed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    caplog.set_level(logging.INFO)
    with progress.shown("tokenising", total_bytes=8_000_000) as advance:
        advance(text_bytes=2_000_000, tokens=500_000)
        advance(text_bytes=4_000_000, tokens=1_000_000)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("tokenising: 25%, 2.0 MB, ") and "0.50M tokens, " in lines[0]
    assert lines[1].startswith("tokenising: 75%, 6.0 MB, ") and "1.50M tokens, " in lines[1]
    assert lines[2].startswith("tokenising: done in ")


def test_lines_are_few(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with progress.shown("packing", total_tokens=1000) as advance:
        for _ in range(1000):
            advance(tokens=1)
    assert len(caplog.records) == 1


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.shown("packing", total_tokens=1000) as advance:
        advance(tokens=500)
    shown = capsys.readouterr().err
    assert "packing" in shown and "50%" in shown and "tokens/s" in shown
