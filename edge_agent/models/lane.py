"""A thread for work that takes time: one piece at a time, which can be told to end."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from edge_agent.models.download import Cancel

_log = structlog.get_logger()


class Lane:
    """Does what it is given, one after the other; the giver waits until it is `idle`.

    Args:
        name: of the thread, which is made with the first work.
        done: called after each piece of work, from the thread; must return soon.
    """

    def __init__(self, name: str, done: Callable[[], None]) -> None:
        self._name, self._done = name, done
        self._given = threading.Semaphore(0)
        self._work: Callable[[Cancel], None] | None = None
        self._cancel: Cancel | None = None
        self._thread: threading.Thread | None = None
        self._ended = False

    @property
    def idle(self) -> bool:
        """Whether it may be given work."""
        return self._work is None

    def give(self, work: Callable[[Cancel], None]) -> None:
        """Begin; only when idle. The work looks at the event it is handed."""
        assert self._work is None
        self._cancel, self._work = Cancel(), work
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._given.release()

    def cancel(self) -> None:
        """Tell the work at hand to end."""
        if self._cancel is not None:
            self._cancel.set()

    def end(self, timeout_s: float) -> None:
        """Tell the work at hand to end, and the thread with it; what hangs is left to the end of the process."""
        self._ended = True
        self.cancel()
        self._given.release()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            self._given.acquire()
            work, cancel = self._work, self._cancel
            if self._ended or work is None or cancel is None:
                return
            try:
                work(cancel)
            except Exception:  # noqa: BLE001 - a mistake in one release must not end all others
                _log.exception("model_work_failed", lane=self._name)
            finally:
                self._work = None
                self._done()
