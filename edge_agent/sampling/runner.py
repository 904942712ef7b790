"""A thread for a `SensorLoop`: starts it, wakes it, stops it within bounded time."""

from __future__ import annotations

import threading

import structlog

from edge_agent.sampling.loop import SensorLoop
from edge_agent.sampling.queue import Sink
from edge_agent.sampling.status import SamplingStatus, State


class SensorRunner:
    """Samples one stream on a thread of its own.

    Args:
        loop: the work.
        sink: the sink of that loop, which is woken when the runner is asked to stop.
    """

    def __init__(self, loop: SensorLoop, sink: Sink) -> None:
        self._loop, self._sink = loop, sink
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"sensor-{loop.stream}"[:40], daemon=True)
        self._log = structlog.get_logger().bind(stream=loop.stream)

    @property
    def stream(self) -> str:
        """The stream's name."""
        return self._loop.stream

    def start(self) -> None:
        """Begin; call it once."""
        self._thread.start()

    def reconfigure(self, *, enabled: bool | None = None, rate_hz: float | None = None) -> None:
        """Change the configuration at once; None stands for what the device's own file says.

        Raises:
            SensorConfigError: the rate is out of range, or the driver sets the pace. Nothing was changed.
        """
        self._loop.reconfigure(enabled=enabled, rate_hz=rate_hz)
        self._wake.set()

    def status(self) -> SamplingStatus:
        """Condition and counters."""
        return self._loop.status()

    @property
    def alive(self) -> bool:
        """Whether its thread runs. It ends only when it is asked to, or by a mistake in the agent."""
        return self._thread.is_alive()

    @property
    def ended(self) -> bool:
        """Whether no more rows will come unless it is reconfigured: stopped, exhausted or failed."""
        if self._thread.ident is not None and not self._thread.is_alive():
            return True
        return self.status().state in (State.EXHAUSTED, State.FAILED)

    def request_stop(self) -> None:
        """Ask it to end; returns at once. Ask all of them first, then `stop` each."""
        self._stopping.set()
        self._wake.set()
        self._sink.wake()

    def stop(self, timeout_s: float) -> bool:
        """Ask it to end, and wait for it.

        Returns:
            False when a driver did not return within `timeout_s`. Its thread is a daemon: it cannot hold up the end of
            the process.
        """
        self.request_stop()
        if self._thread.ident is None:
            return True
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._log.warning("sensor_did_not_stop", timeout_s=timeout_s)
            return False
        return True

    def _run(self) -> None:
        try:
            while True:
                # Cleared before looking: whoever sets it later is seen in this round or ends the wait below.
                self._wake.clear()
                if self._stopping.is_set():
                    break
                wait_s = self._loop.step(self._wake, self._stopping)
                if wait_s > 0:
                    self._wake.wait(wait_s)
            self._loop.close()
        except Exception as error:  # noqa: BLE001 - logged below, and shown as the sampler's state
            # A mistake in the agent itself: the other streams go on, this one shows as failed.
            self._log.exception("sampler_crashed")
            self._loop.fail(error)
