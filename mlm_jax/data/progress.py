"""How far a long stage of `prepare` is: a bar on a terminal, a log line every few seconds elsewhere."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Protocol

import rich.console
import rich.progress

_log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0


class Advance(Protocol):
    """Reports work that has been done since the last call."""

    def __call__(self, *, text_bytes: int = 0, tokens: int = 0) -> None: ...


@contextlib.contextmanager
def shown(stage: str, total_bytes: int | None = None, total_tokens: int | None = None) -> Iterator[Advance]:
    """Shows a stage until the block ends.

    Args:
        stage: what is done, as in "tokenising".
        total_bytes: text that there is to do, when it is known.
        total_tokens: tokens instead, for a stage that has only those.
    """
    start = time.monotonic()
    done = {"bytes": 0, "tokens": 0}

    def rates() -> str:
        seconds = max(time.monotonic() - start, 1e-3)
        parts = [f"{done['bytes'] / 1e6:.1f} MB, {done['bytes'] / 1e6 / seconds:.1f} MB/s"] if done["bytes"] else []
        tokens = done["tokens"]
        parts += [f"{tokens / 1e6:.2f}M tokens, {tokens / seconds:,.0f} tokens/s"] if tokens else []
        return ", ".join(parts)

    def fraction() -> float | None:
        total, so_far = (total_bytes, done["bytes"]) if total_tokens is None else (total_tokens, done["tokens"])
        return min(1.0, so_far / total) if total else None

    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(_bar()) if sys.stderr.isatty() else None
        task = bar.add_task(stage, total=1.0 if fraction() is not None else None, rates="") if bar else None
        last_line = start

        def advance(*, text_bytes: int = 0, tokens: int = 0) -> None:
            nonlocal last_line
            done["bytes"] += text_bytes
            done["tokens"] += tokens
            if bar is not None and task is not None:
                bar.update(task, completed=fraction(), rates=rates())
            elif time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
                last_line = time.monotonic()
                share = fraction()
                _log.info("%s: %s%s", stage, f"{share:.0%}, " if share is not None else "", rates())

        yield advance
    _log.info("%s: done in %.1f s%s", stage, time.monotonic() - start, f" ({rates()})" if rates() else "")


def _bar() -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TextColumn("{task.fields[rates]}"),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        console=rich.console.Console(stderr=True),
    )
