"""Ctrl-C and SIGTERM: the first asks for a clean stop, the second ends at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from headwater.exits import Exit


@contextmanager
def stopping(last_words: str = "") -> Iterator[threading.Event]:
    """An event that is set by SIGINT or SIGTERM while inside; a second signal ends this process without more ado.

    Processes that it supervises are ended by the kernel then; nothing that counts is lost by that.

    Args:
        last_words: a line for stdout at a second signal.
    """
    stop = threading.Event()

    def asked(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            if last_words:
                with contextlib.suppress(OSError):
                    os.write(1, f"{last_words}\n".encode())  # print may be in the middle of a line of its own
            os._exit(Exit.INTERRUPTED)
        stop.set()

    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stopping_loop(stop: Callable[[], None]) -> Iterator[None]:
    """Within an event loop: the first SIGINT or SIGTERM calls `stop`, the second ends this process."""
    asked = False

    def on_signal() -> None:
        nonlocal asked
        if asked:
            os._exit(Exit.INTERRUPTED)
        asked = True
        stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
