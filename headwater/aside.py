"""Work in C code that does not look for signals, done beside the main thread, so that Ctrl-C still ends it at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self, TypeVar

from headwater.exits import Exit

Result = TypeVar("Result")
GRACE_S = 2.0
"""What is interrupted may take so long to come back; then the process ends without it."""
_ASK_AGAIN_S = 0.05


class Aside:
    """One thread that works while the main thread waits; a context manager. For the main thread.

    Args:
        interrupt: asks the work to end; called again and again until it has. May be set later.
    """

    def __init__(self, interrupt: Callable[[], None] = lambda: None) -> None:
        self.interrupt = interrupt
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="aside")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._worker.shutdown()

    def run(self, work: Callable[[], Result]) -> Result:
        """Do it there, and wait.

        Raises:
            KeyboardInterrupt: Ctrl-C; the work has ended.
        """
        future = self._worker.submit(work)
        try:
            return future.result()
        except KeyboardInterrupt:
            self._end(future)
            raise

    def each(self, items: Iterator[Result]) -> Iterator[Result]:
        """The same items, each made there."""
        end = object()
        while (item := self.run(lambda: next(items, end))) is not end:
            yield item  # type: ignore[misc]  # it is not the end

    def _end(self, future: Future[Result]) -> None:
        deadline_s = time.monotonic() + GRACE_S
        try:
            while not future.done() and time.monotonic() < deadline_s:
                self.interrupt()
                wait([future], _ASK_AGAIN_S)
        except KeyboardInterrupt:
            os._exit(Exit.INTERRUPTED)  # a second one: at once
        if not future.done():
            # Joining the thread would wait for it. Processes that this one started are ended by the kernel.
            os._exit(Exit.INTERRUPTED)
