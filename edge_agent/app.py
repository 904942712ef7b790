"""The agent as a process: builds the parts, starts sinks before sources, watches them, stops sources before sinks.

Starting: buffer, recorder, uplink, status socket, then the samplers. Stopping: the samplers; the recorder, which stores
what they gave; the uplink, which sends what is waiting for a while; the buffer.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import logging
import math
import os
import random
import secrets
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import structlog
from prometheus_client import CollectorRegistry

from contract.errors import ConfigurationError, HeadwaterError
from contract.names import EVENTS_STREAM
from edge_agent.batcher import BatchSettings
from edge_agent.buffer.port import StreamCaps
from edge_agent.buffer.sqlite import SqliteBuffer
from edge_agent.clock import DeviceClock, clock_is_synced, read_boot_id
from edge_agent.events import Event, EventLog, Kind
from edge_agent.identity import hardware_fingerprint
from edge_agent.lean import give_back_memory
from edge_agent.metrics import AgentMetrics, serve
from edge_agent.recorder import FINISH_S, Recorder
from edge_agent.remote_config import RemoteConfigFile, in_force
from edge_agent.sampling.loop import SensorLoop, default_backoff
from edge_agent.sampling.metrics import SamplingCollector
from edge_agent.sampling.runner import SensorRunner
from edge_agent.sensors.port import Sensor
from edge_agent.sensors.registry import create_sensor
from edge_agent.settings import AgentSettings, LogSettings, secret_from
from edge_agent.status import StatusServer
from edge_agent.supervisor import STATUS_LINE_S, Supervisor, Worker, batch_settings
from edge_agent.systemd import Notifier, notifier_from
from edge_agent.transport import PahoTransport
from edge_agent.uplink import FAREWELL_S, Identity, Uplink

if TYPE_CHECKING:
    from edge_agent.models.runner import ModelRunner

_log = structlog.get_logger()

TICK_S = 1.0
SAMPLERS_STOP_S = 5.0
"""All samplers together; a driver that does not return is left to the end of the process."""
MODELS_STOP_S = 10.0
SALVAGE_TOLD_S = 1.0
EVENTS_CAPS = StreamCaps(bytes_max=4 * 1024 * 1024, age_max_s=90 * 86_400.0)
EXIT_OK, EXIT_FAILED = 0, 1
_M_ARENA_MAX = -8  # malloc.h of glibc


def run_agent(settings: AgentSettings, environment: Mapping[str, str] | None = None) -> int:
    """Run an agent in this process until SIGTERM or SIGINT; call it from the main thread.

    Args:
        settings: of `edge_agent.settings.load_settings`.
        environment: the process environment; read here once. None takes that of this process.

    Returns:
        The exit code: 0 when it was asked to stop, 1 when a part of it died or its disk cannot be used.

    Raises:
        ConfigurationError: it cannot work as configured; nothing was started.
    """
    configure_logging(settings.log)
    _spare_memory()
    environment = dict(os.environ) if environment is None else environment
    if not settings.streams:
        _log.warning("no_streams", remedy="nothing is measured: add [streams.NAME] to agent.toml, with a driver")
    notifier = notifier_from(environment, os.getpid())
    try:
        with _Bell() as bell:
            agent = _Agent(settings, environment, notifier, bell)
            return agent.run()
    except ConfigurationError:
        raise
    except HeadwaterError as error:
        _log.error("agent_failed", error=str(error))
        return EXIT_FAILED
    finally:
        notifier.close()


def _spare_memory() -> None:
    """Let threads share two heaps, and give back what importing has left behind: 10 MB of an agent (glibc)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 2)
    give_back_memory()


def configure_logging(settings: LogSettings) -> None:
    """Logs go to stderr, as text or as JSON lines; stdout belongs to answers."""
    renderer: structlog.typing.Processor
    if settings.format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        plain = structlog.dev.plain_traceback
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([structlog.processors.format_exc_info] if settings.format == "json" else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[settings.level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


class _Bell:
    """Ends the main thread's sleep, from signal handlers as well as from threads: a pipe takes no lock."""

    def __init__(self) -> None:
        self.stops = 0
        """How often the process was asked to stop."""
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before: dict[int, object] = {}

    def __enter__(self) -> _Bell:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.close(self._reader)
        os.close(self._writer)

    def ring(self) -> None:
        """End the sleep; never waits."""
        try:
            os.write(self._writer, b"!")
        except BlockingIOError:
            pass  # it has been rung often enough to be heard

    def sleep(self, timeout_s: float) -> None:
        """Sleep until rung."""
        if select.select([self._reader], [], [], max(0.0, timeout_s))[0]:
            with contextlib.suppress(BlockingIOError):
                os.read(self._reader, 65_536)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.stops += 1
        self.ring()


class _Agent:
    """The parts, wired."""

    def __init__(
        self, settings: AgentSettings, environment: Mapping[str, str], notifier: Notifier, bell: _Bell
    ) -> None:
        self._settings, self._notifier, self._bell = settings, notifier, bell
        self._salvaged_s = -math.inf
        """Monotonic time at which a damaged buffer was last seen to be replaced, batch by batch."""
        secret = secret_from(settings.broker, environment)
        sensors = {name: _sensor(name, settings) for name in settings.streams}
        identity = Identity(device=settings.device, agent=_version(), boot=read_boot_id())
        synced: Callable[[], bool] = (lambda: True) if settings.clock.assume_synced else clock_is_synced
        self._clock = clock = DeviceClock(identity.boot, synced)
        rng = random.Random(secrets.randbits(64))
        self._metrics = metrics = AgentMetrics(CollectorRegistry())
        metrics.watch_process(time.process_time, _resident_bytes, _written_bytes)
        metrics.buffer_bytes_max.set(settings.buffer.bytes_max)
        events = EventLog()

        def report(event: Event) -> None:
            events.report(event, clock.wall_us(), clock.monotonic_s())

        self._buffer = SqliteBuffer(
            Path(settings.buffer.path),
            {EVENTS_STREAM: EVENTS_CAPS, **{name: stream.caps.caps() for name, stream in settings.streams.items()}},
            settings.buffer.bytes_max,
            clock.read,
            hardware_fingerprint(),
            default_caps=_default_caps(settings),
            progress=self._salvaging,
        )
        self._models = self._model_runner(report, random.Random(rng.getrandbits(64)))
        self._uplink = Uplink(
            identity=identity,
            buffer=self._buffer,
            settings=settings.uplink,
            transport=PahoTransport(settings.broker, settings.device, secret),
            clock=clock,
            metrics=metrics,
            report=report,
            desired=lambda payload: self._supervisor.desired(payload),
            rng=random.Random(rng.getrandbits(64)),
            assigned=None if self._models is None else self._models.service.assignments,
        )
        self._recorder = Recorder(
            streams={name: batch_settings(in_force(stream, None)) for name, stream in settings.streams.items()},
            buffer=self._buffer,
            clock=clock,
            metrics=metrics,
            events=events,
            stored=lambda new_lane: self._uplink.stored(new_lane=new_lane),
            rng=random.Random(rng.getrandbits(64)),
            tap=None if self._models is None else self._models.engine.feed,
        )
        self._runners = {
            name: self._runner(name, sensor, random.Random(rng.getrandbits(64))) for name, sensor in sensors.items()
        }
        SamplingCollector(lambda: {name: each.status() for name, each in self._runners.items()}, metrics.registry)
        self._supervisor = Supervisor(
            identity=identity,
            settings=settings,
            buffer=self._buffer,
            clock=clock,
            events=events,
            metrics=metrics,
            recorder=self._recorder,
            uplink=self._uplink,
            runners=self._runners,
            remote_config=RemoteConfigFile(settings.remote_config_path),
            wake=bell.ring,
            models=self._models,
        )
        self._recording = self._worker("recorder", self._recorder.run)
        self._sending = self._worker("uplink", self._uplink.run)
        self._workers = [
            Worker(self._recording, lambda: max(self._recorder.progress_s, self._salvaged_s)),
            Worker(self._sending, lambda: max(self._uplink.progress_s, self._salvaged_s)),
        ]
        self._modelling: list[threading.Thread] = []
        if (models := self._models) is not None:
            following, inferring = (
                self._worker("models", models.service.run),
                self._worker("inference", models.engine.run),
            )
            self._modelling = [following, inferring]
            self._workers += [
                Worker(following, lambda: models.service.progress_s),
                Worker(inferring, lambda: models.engine.progress_s),
            ]

    def _salvaging(self) -> None:
        """Saving a large buffer on a slow card takes minutes; killed in the middle, it would begin again for ever."""
        now_s = self._clock.monotonic_s()
        if now_s - self._salvaged_s >= SALVAGE_TOLD_S:
            self._salvaged_s = now_s
            self._notifier.busy()

    def run(self) -> int:
        """Start, watch, stop."""
        with contextlib.ExitStack() as open_parts:
            open_parts.callback(self._buffer.close)
            # What can be misconfigured comes before what runs.
            if self._settings.metrics.listen:
                open_parts.callback(_serve_metrics(self._metrics, self._settings))
            status = StatusServer(Path(self._settings.status.socket), self._supervisor.answers())
            status.start()
            open_parts.callback(status.stop)
            if self._models is not None:
                open_parts.callback(self._models.close)
                self._models.begin()
            self._supervisor.begin()
            self._recording.start()
            self._sending.start()
            for thread in self._modelling:
                thread.start()
            for runner in self._runners.values():
                runner.start()
            self._notifier.ready()
            _log.info("agent_started", device=self._settings.device, streams=len(self._runners))
            try:
                reason = self._watch()
            except Exception:  # noqa: BLE001 - a mistake here must not skip the orderly stop
                _log.exception("thread_died", thread="main")
                reason = "main"
            self._stop()
        if reason is None:
            return EXIT_OK
        _log.error("agent_failed", thread=reason, remedy="the log above says why; a restart goes on with the buffer")
        return EXIT_FAILED

    def _watch(self) -> str | None:
        """Until asked to stop (None), or until a thread has died (its name)."""
        watchdog_s = self._notifier.watchdog_s
        alive_every_s = watchdog_s / 2 if watchdog_s is not None else 0.0
        alive_at_s = line_at_s = 0.0
        while not self._bell.stops:
            self._supervisor.tick()
            dead = self._supervisor.death(self._workers)
            if dead is not None:
                return dead
            now_s = self._clock.monotonic_s()
            if alive_every_s and now_s >= alive_at_s:
                stalled = self._supervisor.stalled(self._workers)
                if stalled is None:
                    alive_at_s = now_s + alive_every_s
                    self._notifier.alive()
                else:
                    _log.error("thread_hangs", thread=stalled)
            if now_s >= line_at_s:
                line_at_s = now_s + STATUS_LINE_S
                self._notifier.status(self._supervisor.line())
            self._bell.sleep(min(TICK_S, alive_every_s / 2) if alive_every_s else TICK_S)
        return None

    def _stop(self) -> None:
        """Sources first; every step is bounded, and a part that hangs is left to the end of the process."""
        _log.info("agent_stopping")
        self._notifier.stopping()
        deadline_s = self._clock.monotonic_s() + SAMPLERS_STOP_S
        for runner in self._runners.values():
            runner.request_stop()
        for runner in self._runners.values():
            runner.stop(max(0.05, deadline_s - self._clock.monotonic_s()))
        if self._models is not None:
            self._models.stop()
            for thread in self._modelling:
                self._join(thread, MODELS_STOP_S)
        self._supervisor.end()
        self._recorder.finish()
        self._join(self._recording, 2 * FINISH_S + SAMPLERS_STOP_S)
        drain_s = self._settings.uplink.drain_timeout_s
        self._uplink.drain(drain_s)
        self._join(self._sending, drain_s + 2 * FAREWELL_S)

    def _join(self, thread: threading.Thread, timeout_s: float) -> None:
        deadline_s = self._clock.monotonic_s() + timeout_s
        while thread.is_alive() and self._clock.monotonic_s() < deadline_s:
            self._notifier.alive()
            if self._bell.stops > 1:
                self._uplink.drain(0.0)  # asked a second time: what is left waits for the next start
            thread.join(TICK_S / 4)
        if thread.is_alive():
            _log.warning("thread_did_not_stop", thread=thread.name, timeout_s=timeout_s)

    def _worker(self, name: str, work: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                work()
            except Exception:  # noqa: BLE001 - the main thread sees the death, and ends the process
                _log.exception("thread_died", thread=name)
            finally:
                self._bell.ring()

        return threading.Thread(target=guarded, name=name, daemon=True)

    def _model_runner(self, report: Callable[[Event], None], rng: random.Random) -> ModelRunner | None:
        """What runs models; nothing for one is imported where there is no `[models]`."""
        settings, models = self._settings, self._settings.models
        if models is None:
            return None
        from edge_agent.models.runner import ModelRunner
        from edge_agent.models.store import StoreUnavailableError

        try:
            return ModelRunner(
                device=settings.device,
                settings=models,
                streams=frozenset(settings.streams),
                clock=self._clock,
                registry=self._metrics.registry,
                sink_of=lambda stream: self._recorder.open_stream(stream, BatchSettings()),
                report=report,
                changed=self._bell.ring,
                rng=rng,
            )
        except StoreUnavailableError as error:
            # Readings come before models: the agent measures on without them.
            _log.error("models_unavailable", error=str(error))
            report(Event(Kind.MODEL_STATE, detail={"cause": "unavailable", "state": "damaged", "reason": str(error)}))
            return None

    def _runner(self, name: str, sensor: Sensor, rng: random.Random) -> SensorRunner:
        settings, sink = self._settings.streams[name], self._recorder.queues[name]
        loop = SensorLoop(
            name, sensor, settings.sampling, sink, self._clock, default_backoff(rng), enabled=settings.enabled
        )
        return SensorRunner(loop, sink)


def _default_caps(settings: AgentSettings) -> StreamCaps:
    """Of streams that the file does not name: predictions."""
    if settings.models is None:
        return EVENTS_CAPS
    return StreamCaps(bytes_max=settings.models.predictions_bytes_max, age_max_s=EVENTS_CAPS.age_max_s)


def _sensor(name: str, settings: AgentSettings) -> Sensor:
    stream = settings.streams[name]
    try:
        return create_sensor(stream.driver, stream.options)
    except ConfigurationError as error:
        raise ConfigurationError(f"[streams.{name}] {error}") from error


def _serve_metrics(metrics: AgentMetrics, settings: AgentSettings) -> Callable[[], None]:
    host, port = settings.metrics.address()
    try:
        return serve(metrics, host, port)
    except OSError as error:
        raise ConfigurationError(
            f"[metrics] listen = {settings.metrics.listen!r}: {error}; give a free port of this machine"
        ) from error


def _version() -> str:
    """Name and version, as presence and reported state carry them."""
    try:
        return f"headwater/{importlib.metadata.version('headwater')}"
    except importlib.metadata.PackageNotFoundError:
        return "headwater/unknown"  # run from a folder, not installed


def _resident_bytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def _written_bytes() -> float:
    """NaN where the kernel does not tell (proc(5), `/proc/pid/io`)."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return math.nan
    return next((float(line.split()[1]) for line in lines if line.startswith("write_bytes:")), math.nan)
