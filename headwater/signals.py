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


class Stop(threading.Event):
    """Set by the first SIGINT or SIGTERM."""

    def __init__(self) -> None:
        super().__init__()
        self._interrupts = False

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """While inside, the first signal also ends what is being done: it has no result yet that could be kept.

        Raises:
            KeyboardInterrupt: in the main thread, whichever of the two signals it was, or one that came before.
        """
        self._interrupts = True
        try:
            if self.is_set():
                raise KeyboardInterrupt
            yield
        finally:
            self._interrupts = False

    def ask(self) -> None:
        """For the handler of the first signal."""
        self.set()
        if self._interrupts:
            raise KeyboardInterrupt


@contextmanager
def stopping(last_words: str = "") -> Iterator[Stop]:
    """An event that is set by SIGINT or SIGTERM while inside; a second signal ends this process without more ado.

    Processes that it supervises are ended by the kernel then; nothing that counts is lost by that.

    Args:
        last_words: a line for stdout at a second signal.
    """
    stop = Stop()

    def asked(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            if last_words:
                with contextlib.suppress(OSError):
                    os.write(1, f"{last_words}\n".encode())  # print may be in the middle of a line of its own
            os._exit(Exit.INTERRUPTED)
        stop.ask()

    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """While inside, SIGINT and SIGTERM end this process as the kernel does, in the midst of a library's call, too.

    A handler in Python would run only when that call is over, and a query over thousands of objects takes minutes.
    Processes that it supervises are ended by the kernel then; nothing that counts is lost by that.
    """
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
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
