"""Threads whose death and silence are noticed. The process ends with any of them: it holds nothing that matters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import structlog

_log = structlog.get_logger()


class WatchedThread:
    """A daemon thread that says that it is alive, and remembers what ended it.

    Args:
        name: for logs and `/healthz`.
        body: what it does; returning is a normal end.
        clock_s: monotonic seconds.
    """

    def __init__(self, name: str, body: Callable[[], None], clock_s: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.death: BaseException | None = None
        self._body = body
        self._clock_s = clock_s
        self._beat_s: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self.beat()
        self._thread.start()

    def beat(self) -> None:
        """Show progress; called by the thread in each of its rounds."""
        self._beat_s = self._clock_s()

    def rest(self) -> None:
        """Show that there is nothing to do until something is handed over: silence is no sign of trouble now."""
        self._beat_s = None

    @property
    def silent_s(self) -> float:
        """Seconds since the last sign of progress; 0 while it rests or has ended."""
        beat_s = self._beat_s
        return 0.0 if beat_s is None or not self._thread.is_alive() else max(0.0, self._clock_s() - beat_s)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._thread.is_alive()

    @property
    def ended(self) -> bool:
        """Whether it ran, and does not any more."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def join(self, timeout_s: float) -> bool:
        """Wait for its end; False when it still runs."""
        if self._thread.ident is not None:
            self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._body()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the process must learn that the thread died
            self.death = error
            _log.error("thread_died", thread=self.name, exc_info=error)


class Trouble(NamedTuple):
    """Why the process is not well."""

    code: str
    message: str


class LakeHealth:
    """Whether the lake answers, as everybody who talks to it sees it. Safe to use from several threads.

    Args:
        clock_s: monotonic seconds.
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._answered_s: float | None = None
        self._failing_since_s: float | None = None
        self._error = "it was not asked yet"

    def answered(self) -> None:
        """The lake did what it was asked."""
        with self._lock:
            self._answered_s, self._failing_since_s, self._error = self._clock_s(), None, ""

    def failed(self, error: Exception) -> None:
        """The lake did not answer, or refused."""
        with self._lock:
            if self._failing_since_s is None:
                self._failing_since_s = self._clock_s()
            self._error = str(error)

    @property
    def answered_ago_s(self) -> float:
        """Seconds since the lake last answered; infinite before it ever did."""
        return float("inf") if self._answered_s is None else self._clock_s() - self._answered_s

    def trouble(self, failing_max_s: float, silent_max_s: float) -> Trouble | None:
        """Why the lake is not to be counted on, or None.

        Args:
            failing_max_s: errors and nothing else for so long are trouble.
            silent_max_s: nothing at all for so long is trouble.
        """
        with self._lock:
            now_s = self._clock_s()
            if self._answered_s is None:
                return Trouble("lake_unreachable", f"the lake has not answered yet: {self._error}; check [lake]")
            if self._failing_since_s is not None and now_s - self._failing_since_s >= failing_max_s:
                return Trouble(
                    "lake_unreachable",
                    f"the lake has refused or not answered for {now_s - self._failing_since_s:.0f} s: {self._error}; "
                    "devices keep their batches until it does",
                )
            if now_s - self._answered_s >= silent_max_s:
                return Trouble(
                    "lake_silent", f"the lake did not answer for {now_s - self._answered_s:.0f} s; is it slow?"
                )
            return None
