"""The gateway's life: build the parts, start sinks before sources, watch them, stop sources before sinks."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog
from prometheus_client import CollectorRegistry

from gateway.access import Kept, LakeAccess, store_settings
from gateway.acknowledger import Acknowledger
from gateway.budget import OVERHEAD_BYTES, MemoryBudget
from gateway.engine import Engine, EngineSettings
from gateway.flush import Flusher, FlushPool
from gateway.http import HttpApi, Views
from gateway.inference import Inference
from gateway.ingress import Ingress
from gateway.intake import Intake
from gateway.metrics import GatewayMetrics
from gateway.models import ModelCache
from gateway.models_http import ModelFiles
from gateway.monitoring import Monitoring
from gateway.mqtt import UNACKED_MAX, Link
from gateway.quarantine import QuarantineQueue, QuarantineWriter
from gateway.registry import FILTERS, Registry
from gateway.resigning import Resigner
from gateway.rollouts.controller import RolloutController
from gateway.rollouts.sealing import KeyFile
from gateway.rollouts_http import RolloutsHttp
from gateway.session import Session
from gateway.settings import GatewaySettings, LogSettings
from gateway.watch import LakeHealth, Trouble, WatchedThread
from lake.rollouts import RolloutTable

_log = structlog.get_logger()

LOOK_INTERVAL_S = 0.5
"""How often threads are looked at."""
LOOKS_MAX = 4
"""So many looks in a row must find a thread stuck: after a SIGSTOP all are late once."""
SILENT_MAX_S = 60.0
"""For threads that never wait for the lake."""
INGRESS_CLOSE_S = 2.0
CLOSE_S = 6.0
"""For all parts that stop after the draining."""


class Gateway:
    """All parts of one gateway process, wired.

    Args:
        settings: everything it is told.
        environ: the environment of the process, read here and not again.

    Raises:
        ConfigurationError: something in it cannot work.
    """

    def __init__(self, settings: GatewaySettings, environ: Mapping[str, str]) -> None:
        self._settings = settings
        rng = random.Random(secrets.randbits(64))
        name = f"{settings.replica}-{secrets.token_hex(4)}"
        metrics = self.metrics = GatewayMetrics(CollectorRegistry())
        self._health = LakeHealth()
        budget = MemoryBudget(settings.memory_bytes_max)
        access = LakeAccess(
            store_settings(settings.lake, environ), settings.lake.credentials_file, settings.max_clock_skew_s
        )
        self._acks = Acknowledger(self._publish, metrics)
        self._registry = Registry(
            settings.registry,
            shards=settings.shards,
            gateway=name,
            open_table=Kept(access, access.open_devices),
            publish=self._publish,
            metrics=metrics,
            health=self._health,
            changed=lambda device: self._rollouts.heard(device),
        )
        self._resigner = Resigner(settings.models, lambda: access.store, metrics)
        self._rollouts = RolloutController(
            settings.rollouts,
            shards=settings.shards,
            gateway=name,
            fleet=self._registry,
            table=RolloutTable(Kept(access, access.open_rollouts), metrics.rollout_conflicts.inc),
            sealer=KeyFile(Path(settings.models.online_key)) if settings.models.online_key else None,
            may_sign=self._resigner.may_sign,
            publish=self._publish,
            connected=lambda: self._control.connected,
            metrics=metrics,
            health=self._health,
        )
        self._quarantine = QuarantineWriter(
            QuarantineQueue(settings.quarantine_bytes_max),
            Kept(access, access.open_quarantine),
            metrics,
            self._health,
        )
        flusher = Flusher(access, metrics)
        self._engine = Engine(
            EngineSettings(
                settings.flush_interval_s,
                settings.flush_bytes,
                settings.flush_workers,
                settings.streams_max,
                settings.lanes_max,
            ),
            budget=budget,
            acks=self._acks,
            heard=self._registry.heard,
            metrics=metrics,
            health=self._health,
            forget=flusher.forget,
            rng=rng,
        )
        self._pool = FlushPool(settings.flush_workers, flusher.run, self._engine.done)
        ingress = Ingress(
            limits=settings.limits.limits(),
            budget=budget,
            deliver=self._engine.deliver,
            quarantine=self._quarantine.put,
            metrics=metrics,
        )
        replica = settings.replica_number
        self._control = Link(
            Session,
            settings.broker,
            "control",
            replica,
            FILTERS,
            self._registry.receive,
            self._is_connected,
            metrics,
            rng,
        )
        self._ingress = Link(
            Intake,
            settings.broker,
            "ingress",
            replica,
            settings.up_filters,
            ingress.receive,
            lambda: None,
            metrics,
            rng,
        )
        self._monitoring = Monitoring(
            settings.monitoring,
            shards=settings.shards,
            gateway=name,
            access=access,
            metrics=metrics,
            health=self._health,
        )
        models = ModelCache(
            Kept(access, access.open_releases),
            settings.inference.models_max,
            settings.inference.models_bytes_max,
            metrics,
        )
        self._http = HttpApi(
            settings.http,
            Views(self.sick, self.unready, self._engine.views, self._acks.watermarks, self._registry),
            metrics,
            [
                *Inference(settings.inference, models, metrics).routes(),
                *ModelFiles(lambda: access.store, metrics).routes(),
                *RolloutsHttp(self._rollouts, access.open_releases, metrics).routes(),
            ],
        )
        quick = (self._ingress.thread, self._control.thread, self._engine.thread, self._acks.thread)
        waiting = (
            self._quarantine.thread,
            self._registry.thread,
            self._rollouts.thread,
            self._resigner.thread,
            *([self._monitoring.thread] if settings.monitoring.interval_s > 0 else []),
            *self._pool.threads,
        )
        self._patience_s = dict.fromkeys(quick, SILENT_MAX_S) | dict.fromkeys(waiting, settings.stuck_after_s)
        self._stopping = False
        self._watch()

    def _publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        # The parts call each other only after `start`, when all of them exist.
        return self._control.publish(topic, payload, qos=qos, retain=retain)

    def _is_connected(self) -> None:
        self._registry.connected()
        self._rollouts.is_connected()

    @property
    def threads(self) -> Sequence[WatchedThread]:
        """Every thread whose end is the end of the process."""
        return list(self._patience_s)

    def sick(self) -> Sequence[Trouble]:
        """Why the process should be started afresh; empty when it is well."""
        found = []
        for thread, patience_s in self._patience_s.items():
            if not thread.alive:
                found.append(
                    Trouble("thread_died", f"thread {thread.name} ended: {thread.death!r}; restart the gateway")
                )
            elif thread.silent_s >= patience_s:
                found.append(
                    Trouble(
                        "thread_silent",
                        f"thread {thread.name} made no progress for {thread.silent_s:.0f} s; restart the gateway",
                    )
                )
        return found

    def unready(self) -> Sequence[Trouble]:
        """Why it does no work now; empty when it does."""
        settings = self._settings
        if self._stopping:
            return [Trouble("stopping", "the gateway was asked to stop")]
        found = [
            Trouble("broker_unreachable", f"no {link.role} connection to {settings.broker.url}: {link.trouble}")
            for link in (self._ingress, self._control)
            if not link.connected and (not link.was_connected or link.down_s >= settings.unready_after_s)
        ]
        silent_s = settings.unready_after_s + settings.registry.refresh_interval_s
        lake = self._health.trouble(settings.unready_after_s, silent_s)
        return [*found, lake] if lake is not None else found

    async def run(self) -> int:
        """Work until SIGTERM or SIGINT.

        Returns:
            The exit code: 0 after a stop that was asked for, 1 when a part died.

        Raises:
            ConfigurationError: the HTTP address is taken.
        """
        asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asked.set)
        port = await self._http.start()
        _log.info("http_listening", host=self._settings.http.host, port=port)
        try:
            self._start()
            died = await self._guard(asked)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)  # whoever asks again does not want to wait
            if died:
                return 1
            with ThreadPoolExecutor(1, "stop") as stopping:
                await loop.run_in_executor(stopping, self._stop)
        finally:
            await self._http.stop()
        return 0

    def _start(self) -> None:
        settings = self._settings
        _log.info("gateway_starting", replica=settings.replica, lake=settings.lake.url, broker=settings.broker.url)
        self._pool.start()
        self._engine.start(self._pool)
        self._quarantine.start()
        self._acks.start()
        self._registry.start()
        self._rollouts.start()
        self._resigner.start()
        self._monitoring.start()
        self._control.start()
        self._ingress.start()

    async def _guard(self, asked: asyncio.Event) -> bool:
        """Wait until a stop is asked for, or a part is beyond repair; True then."""
        looks = 0
        while not asked.is_set():
            sick = self.sick()
            dead = [trouble for trouble in sick if trouble.code == "thread_died"]
            stuck = [thread for thread in self.threads if thread.silent_s >= self._settings.stuck_after_s]
            looks = looks + 1 if stuck else 0
            if dead or looks >= LOOKS_MAX:
                _log.error("gateway_gives_up", reasons=[trouble.message for trouble in sick])
                return True
            try:
                await asyncio.wait_for(asked.wait(), LOOK_INTERVAL_S)
            except TimeoutError:
                continue
        return False

    def _stop(self) -> None:
        """Sources, then what is on its way, then sinks. What does not end in time is left: devices have it all."""
        began_s = time.monotonic()
        self._stopping = True
        _log.info("gateway_stopping")
        left: list[str] = []
        drained_s = began_s + INGRESS_CLOSE_S + self._settings.drain_timeout_s + 1.0

        def left_s() -> float:
            """Of the time for all parts behind the engine together."""
            return max(0.1, drained_s + CLOSE_S - time.monotonic())

        steps: tuple[tuple[str, Callable[[], bool]], ...] = (
            ("ingress", lambda: self._ingress.close(INGRESS_CLOSE_S)),
            ("batches", lambda: self._engine.drain(self._settings.drain_timeout_s)),
            ("workers", lambda: self._pool.close(1.0)),
            ("quarantine", lambda: self._quarantine.close(left_s() / 2)),
            ("monitoring", lambda: self._monitoring.close(left_s() / 2)),
            ("rollouts", lambda: self._rollouts.close(left_s() / 2)),
            ("resigning", lambda: self._resigner.close(left_s() / 2)),
            ("registry", lambda: self._registry.close(left_s() / 2)),
            ("acknowledgements", lambda: self._acks.close(left_s() / 2)),
            ("control", lambda: self._control.close(left_s())),
        )
        for name, step in steps:
            if not step():
                left.append(name)
        _log.info("gateway_stopped", seconds=round(time.monotonic() - began_s, 3), left=left)

    def _watch(self) -> None:
        watch = self.metrics.watch
        watch("ingress_connected", "1 while batches can arrive", lambda: self._ingress.connected)
        watch("control_connected", "1 while acknowledgements can leave", lambda: self._control.connected)
        watch("unacked_publishes", "Publishes without the broker's answer", lambda: self._control.unacked, UNACKED_MAX)
        watch("ready", "1 while /readyz says yes", lambda: not self.sick() and not self.unready())
        watch("lake_answered_ago_seconds", "Since the lake last answered", lambda: self._health.answered_ago_s)
        watch("batch_overhead_bytes", "Memory counted for a batch beside its bytes", lambda: OVERHEAD_BYTES)


def configure_logging(settings: LogSettings) -> None:
    """Structured logs on stderr. Tracebacks stay plain: drawn with variables they would hold payloads and keys."""
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    renderer: structlog.typing.Processor
    if settings.format == "json":
        renderer = structlog.processors.JSONRenderer()
        shared: list[structlog.typing.Processor] = [structlog.processors.format_exc_info]
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
        shared = []
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *shared,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def run_gateway(settings: GatewaySettings, environ: Mapping[str, str] | None = None) -> int:
    """Run a gateway until SIGTERM or SIGINT. For the main thread.

    Args:
        settings: everything it is told.
        environ: the environment of the process; None takes it as it is now.

    Returns:
        The exit code: 0 after a stop that was asked for, 1 when a part died.

    Raises:
        ConfigurationError: something in the settings cannot work.
    """
    configure_logging(settings.log)
    gateway = Gateway(settings, os.environ if environ is None else environ)
    return asyncio.run(gateway.run())
