"""The main thread's work, about once a second: look after the other threads, follow the desired configuration, report.

Everything is handed in; starting and stopping is `app.py`'s matter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import structlog

from contract.batches import Clock
from contract.messages import Desired, Refusal, encode
from contract.models import ReportedModel
from edge_agent.batcher import BatchSettings
from edge_agent.buffer.port import BatchBuffer, Opened, OpenedKind
from edge_agent.clock import ClockWatch
from edge_agent.events import Event, EventLog, Kind
from edge_agent.metrics import AgentMetrics
from edge_agent.recorder import Recorder
from edge_agent.remote_config import (
    Applied,
    InForce,
    RemoteConfigFile,
    RemoteConfigUnavailableError,
    apply,
    in_force,
    refusal_of,
)
from edge_agent.report import Condition, StreamCondition, reported, settled_part, stream_status, waiting
from edge_agent.sampling.runner import SensorRunner
from edge_agent.sampling.status import State
from edge_agent.settings import AgentSettings
from edge_agent.uplink import Identity, Uplink

_log = structlog.get_logger()

STALL_S = 30.0
"""A recorder or uplink without a round for this long hangs; both make one at least every second."""
SENSOR_STALL_S = 120.0
"""A driver whose `open` has not returned for this long hangs; so does one whose `read` has not, if it is polled."""
SAVE_AGAIN_S = 10.0
"""The disk may take a desired document later; the broker brings it only once a connection."""
STATUS_LINE_S = 10.0


class DeviceClock(Protocol):
    """What the supervisor needs of the device's clocks."""

    def read(self) -> Clock:
        """All of them at this moment."""

    def monotonic_s(self) -> float:
        """Seconds that never go back."""


class OpenedBuffer(BatchBuffer, Protocol):
    """A buffer that knows how it came to life; after damage found in use, how it came to its new one."""

    opened: Opened


class Models(Protocol):
    """What the supervisor needs of the part that runs models. Both may be called from any thread."""

    def reported(self) -> Mapping[str, ReportedModel]:
        """By model, for the fleet."""

    def status(self) -> dict[str, Any]:
        """By model, for the status socket."""


class Worker(NamedTuple):
    """A thread that has to live as long as the agent."""

    thread: threading.Thread
    progress_s: Callable[[], float]
    """Monotonic time of its last round."""


class Supervisor:
    """All methods but `desired` and the answers belong to the main thread.

    Args:
        identity, settings: who this is, and how it is configured.
        buffer, clock, events, metrics, recorder, uplink: the parts.
        runners: the samplers by stream.
        remote_config: keeps the desired document in force.
        wake: ends the main thread's sleep.
        models: what runs models; None where none does.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        settings: AgentSettings,
        buffer: OpenedBuffer,
        clock: DeviceClock,
        events: EventLog,
        metrics: AgentMetrics,
        recorder: Recorder,
        uplink: Uplink,
        runners: Mapping[str, SensorRunner],
        remote_config: RemoteConfigFile,
        wake: Callable[[], None],
        models: Models | None = None,
    ) -> None:
        self._models = models
        self._identity, self._settings, self._buffer = identity, settings, buffer
        self._clock, self._events, self._metrics = clock, events, metrics
        self._recorder, self._uplink, self._runners = recorder, uplink, runners
        self._remote_config, self._wake = remote_config, wake
        now = clock.read()
        self._clock_watch = ClockWatch(now)
        self._started_at_us = now.wall_us
        self._opened = buffer.opened
        self._desired: Desired | None = None
        self._refused: Refusal | None = None
        self._in_force = {name: in_force(stream, None) for name, stream in settings.streams.items()}
        self._arrived: bytes | None = None
        self._unsaved: bytes | None = None
        """A good document that the disk did not take."""
        self._unsaved_again_s = 0.0
        self._arrived_lock = threading.Lock()
        self._overruns = dict.fromkeys(runners, 0)
        self._failed: set[str] = set()
        self._published: Any = None
        self._publish_at_s = 0.0

    # From other threads.

    def desired(self, payload: bytes) -> None:
        """Take a desired document; only the newest waits."""
        with self._arrived_lock:
            self._arrived = payload
        self._wake()

    def answers(self) -> Mapping[str, Callable[[], Any]]:
        """What the status socket can be asked."""
        return {
            "status": self._status,
            "buffer": lambda: waiting(self._buffer.lanes()),
            "metrics": self._metrics.exposition,
        }

    # The main thread: the start.

    def begin(self) -> None:
        """Report the start, and put the desired document of the last run in force, before the samplers start."""
        now, opened = self._clock.read(), self._opened
        detail = {"agent": self._identity.agent, "buffer": opened.kind.value, **_clock_detail(now)}
        self._report(Event(Kind.AGENT_STARTED, detail=detail))
        if opened.kind is not OpenedKind.RESUMED:
            self._report_opened(opened)
        try:
            saved = self._remote_config.load()
        except RemoteConfigUnavailableError as error:
            self._refuse(Refusal(revision=None, reason=str(error)))
            return
        if saved is None:
            return
        reason = refusal_of(saved, self._settings.streams)
        if reason is None:
            self._put_in_force(saved)
        else:
            # The device's own file has changed since: half a document is worse than none.
            self._refuse(Refusal(revision=saved.revision, reason=reason))

    # The main thread: each second.

    def tick(self) -> None:
        """Do what is due."""
        now_s = self._clock.monotonic_s()
        with self._arrived_lock:
            arrived, self._arrived = self._arrived, None
        if arrived is None and now_s >= self._unsaved_again_s:
            arrived = self._unsaved
        if arrived is not None:
            self._unsaved = None
            self._take_desired(arrived)
        self._look_at_clock()
        self._look_at_sensors()
        if self._buffer.opened is not self._opened:
            self._opened = self._buffer.opened
            self._report_opened(self._opened)
        document = reported(self._condition())
        settled = settled_part(document)
        if settled != self._published or now_s >= self._publish_at_s:
            self._published, self._publish_at_s = settled, now_s + self._settings.report_interval_s
            self._uplink.publish_reported(encode(document))

    def death(self, workers: Sequence[Worker]) -> str | None:
        """The name of a thread that should live and does not."""
        threads = [worker.thread for worker in workers]
        dead = [thread.name for thread in threads if not thread.is_alive()]
        dead += [f"sensor-{name}" for name, runner in self._runners.items() if not runner.alive]
        return dead[0] if dead else None

    def stalled(self, workers: Sequence[Worker]) -> str | None:
        """The name of a thread that makes no progress."""
        now_s = self._clock.monotonic_s()
        for worker in workers:
            if now_s - worker.progress_s() > STALL_S:
                return worker.thread.name
        for name, runner in self._runners.items():
            status = runner.status()
            # One that sets its own pace may wait in `read` for as long as nothing happens.
            bounded = status.calling != "read" or status.rate_hz is not None
            since_ns = status.calling_since_ns if bounded else None
            if since_ns is not None and now_s - since_ns / 1e9 > SENSOR_STALL_S:
                return f"sensor-{name}"
        return None

    def line(self) -> str:
        """One line for people who look at the service."""
        lanes, state = self._buffer.lanes(), self._uplink.state
        waiting_batches = sum(lane.batches for lane in lanes)
        how = "connected" if state.connected else f"not connected ({state.last_loss or 'yet'})"
        return f"{how}; {waiting_batches} batches waiting; {len(self._runners)} streams"

    def end(self) -> None:
        """Report the end; the recorder stores it with the last batches."""
        self._report(Event(Kind.AGENT_STOPPED, detail=_clock_detail(self._clock.read())))

    # Parts of these.

    def _take_desired(self, payload: bytes) -> None:
        revision = self._desired.revision if self._desired is not None else 0
        verdict = apply(revision, payload, self._settings.streams)
        if isinstance(verdict, Refusal):
            self._refuse(verdict)
        elif isinstance(verdict, Applied):
            try:
                # Kept before it is in force: what is reported as applied must survive the next restart.
                self._remote_config.save(verdict.desired)
            except RemoteConfigUnavailableError as error:
                self._refuse(Refusal(revision=verdict.desired.revision, reason=str(error)))
                self._unsaved, self._unsaved_again_s = payload, self._clock.monotonic_s() + SAVE_AGAIN_S
                return
            self._put_in_force(verdict.desired)
            _log.info("config_applied", revision=verdict.desired.revision)
            self._report(Event(Kind.CONFIG_APPLIED, detail={"revision": verdict.desired.revision}))

    def _put_in_force(self, desired: Desired) -> None:
        for name, settings in self._settings.streams.items():
            wanted = desired.streams.get(name)
            new, old = in_force(settings, wanted), self._in_force[name]
            if new[:2] != old[:2]:
                # Only on a change: it also revives a sampler that came to the end of its recording.
                enabled, rate_hz = (wanted.enabled, wanted.rate_hz) if wanted is not None else (None, None)
                self._runners[name].reconfigure(enabled=enabled, rate_hz=rate_hz)
            if new != old:
                self._recorder.configure(name, batch_settings(new))
            self._in_force[name] = new
        self._desired, self._refused = desired, None

    def _refuse(self, refusal: Refusal) -> None:
        if refusal == self._refused:
            return  # the same document came again with a new connection
        self._refused = refusal
        _log.warning("config_refused", revision=refusal.revision, reason=refusal.reason)
        self._report(Event(Kind.CONFIG_REFUSED, detail={"revision": refusal.revision, "reason": refusal.reason}))

    def _look_at_clock(self) -> None:
        now = self._clock.read()
        self._metrics.clock_synced.set(now.synced)
        for change in self._clock_watch.look(now):
            _log.info(change.kind, jump_us=change.jump_us)
            self._report(Event(Kind(change.kind), detail={"jump_us": change.jump_us, **_clock_detail(change.clock)}))

    def _look_at_sensors(self) -> None:
        for name, runner in self._runners.items():
            status = runner.status()
            if status.overruns > self._overruns[name]:
                missed, self._overruns[name] = status.overruns - self._overruns[name], status.overruns
                self._report(Event(Kind.OVERRUN, name, rows=missed))
            if status.state is not State.FAILED:
                self._failed.discard(name)
            elif name not in self._failed:
                self._failed.add(name)
                self._report(Event(Kind.SENSOR_FAILED, name, detail={"error": status.last_error}))

    def _report_opened(self, opened: Opened) -> None:
        self._report(Event(Kind.BUFFER_OPENED, detail={"cause": opened.kind.value, "detail": opened.detail}))

    def _report(self, event: Event) -> None:
        self._events.report(event, self._clock.read().wall_us, self._clock.monotonic_s())

    def _condition(self) -> Condition:
        recorder, lanes = self._recorder, self._buffer.lanes()
        streams = {
            name: StreamCondition(
                in_force=self._in_force[name],
                sampling=runner.status(),
                accepted_rows=recorder.accepted_rows[name],
                evicted_rows=recorder.evicted_rows[name],
                dropped_rows=recorder.dropped_rows[name],
                lanes=[lane for lane in lanes if lane.stream == name],
            )
            for name, runner in self._runners.items()
        }
        return Condition(
            agent=self._identity.agent,
            boot=self._identity.boot,
            started_at_us=self._started_at_us,
            clock_synced=self._clock.read().synced,
            revision=self._desired.revision if self._desired is not None else 0,
            refused=self._refused,
            streams=streams,
            models=self._models.reported() if self._models is not None else {},
            tags=self._settings.tags,
        )

    def _status(self) -> dict[str, Any]:
        condition, lanes = self._condition(), self._buffer.lanes()
        return {
            "device": self._identity.device,
            "agent": condition.agent,
            "boot": condition.boot,
            "started_at_us": condition.started_at_us,
            "clock_synced": condition.clock_synced,
            "uplink": self._uplink.state._asdict(),
            "buffer": {
                "opened": self._opened.kind.value,
                "batches": sum(lane.batches for lane in lanes),
                "rows": sum(lane.rows for lane in lanes),
                "bytes": sum(lane.body_bytes for lane in lanes),
                "bytes_max": self._settings.buffer.bytes_max,
                "unavailable": self._recorder.unavailable,
                "unstored_batches": self._recorder.unstored_batches,
            },
            "revision": condition.revision,
            "refused": msgspec.to_builtins(condition.refused),
            "streams": {name: stream_status(stream) for name, stream in condition.streams.items()},
            "models": self._models.status() if self._models is not None else {},
        }


def batch_settings(settings: InForce) -> BatchSettings:
    """When batches are closed under these settings."""
    return BatchSettings(max_batch_rows=settings.max_batch_rows, max_batch_age_s=settings.max_batch_age_s)


def _clock_detail(clock: Clock) -> dict[str, str | int | bool]:
    """With this, rows of the same boot that were stamped by a wrong clock can be placed in time."""
    return {
        "synced": clock.synced,
        "boot": clock.boot,
        "monotonic_us": clock.monotonic_us,
        "wall_us": clock.wall_us,
    }
