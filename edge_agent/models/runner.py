"""Everything that runs models, built and wired: what `edge_agent.app` imports where there is a `[models]`."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from prometheus_client import CollectorRegistry

from contract.models import Manifest, ReportedModel
from edge_agent.clock import DeviceClock
from edge_agent.events import Event, Kind
from edge_agent.models.inference import Engine
from edge_agent.models.metrics import ModelMetrics
from edge_agent.models.precheck import Surroundings
from edge_agent.models.predictions import PredictionWriter
from edge_agent.models.service import ModelService
from edge_agent.models.settings import ModelsSettings
from edge_agent.models.store import ReleaseStore
from edge_agent.models.tasks import Tasks
from edge_agent.sampling.queue import Sink

if TYPE_CHECKING:
    from edge_agent.models.endpoint import Endpoint

_log = structlog.get_logger()

MEMORY_FILE = Path("/proc/meminfo")


class ModelRunner:
    """The store, the engine, the service that follows orders, and the local endpoint.

    Args:
        device: its name.
        settings: the table `[models]`.
        streams: names of the device's own streams.
        clock: the device's clocks.
        registry: for metrics.
        sink_of: opens the queue of a stream for predictions.
        report: takes events for `headwater.events`.
        changed: called when there is something new to report.
        rng: jitter.

    Raises:
        ConfigurationError: it cannot work as configured.
        StoreUnavailableError: the disk refuses.
    """

    def __init__(
        self,
        *,
        device: str,
        settings: ModelsSettings,
        streams: frozenset[str],
        clock: DeviceClock,
        registry: CollectorRegistry,
        sink_of: Callable[[str], Sink],
        report: Callable[[Event], None],
        changed: Callable[[], None],
        rng: random.Random,
    ) -> None:
        self._streams = streams

        def trouble(text: str) -> None:
            _log.error("model_store_damaged", error=text)
            report(Event(Kind.MODEL_STATE, detail={"cause": f"store/{text[:80]}", "state": "damaged", "reason": text}))

        self._store = ReleaseStore(
            Path(settings.folder),
            factory=Path(settings.factory) if settings.factory else None,
            bytes_max=settings.bytes_max,
            trouble=trouble,
        )
        self.engine = Engine(PredictionWriter(sink_of, settings.features_every), clock.monotonic_s)
        tasks = Tasks(
            device=device, settings=settings, store=self._store, synced=clock.synced, surroundings=self._surroundings
        )
        self.service = ModelService(
            settings=settings,
            store=self._store,
            engine=self.engine,
            tasks=tasks,
            clock=clock,
            synced=clock.synced,
            metrics=ModelMetrics(registry, settings.bytes_max),
            report=report,
            changed=changed,
            rng=rng,
        )
        self._endpoint = _endpoint(settings.endpoint.listen, self.engine)

    def reported(self) -> Mapping[str, ReportedModel]:
        """By model, for the fleet."""
        return self.service.reported()

    def status(self) -> dict[str, Any]:
        """By model, for the status socket."""
        return self.service.status()

    def begin(self) -> None:
        """Open the local endpoint; the threads of service and engine are the caller's."""
        if self._endpoint is not None:
            self._endpoint.start()

    def stop(self) -> None:
        """Ask everything to end; returns soon."""
        if self._endpoint is not None:
            self._endpoint.close()
        self.service.stop()
        self.engine.stop()

    def close(self) -> None:
        """Let another process use the store. Call it when the threads have ended."""
        self._store.close()

    def _surroundings(self, manifest: Manifest) -> Surroundings:
        total, free = _memory()
        others = [name for name, record in self._store.records().items() if record.active and name != manifest.model]
        return Surroundings(self._streams, self.engine.schemas.get(manifest.stream), total, free, len(others))


def _endpoint(listen: str, engine: Engine) -> Endpoint | None:
    """An HTTP server is imported only where there is one."""
    if not listen:
        return None
    from edge_agent.models.endpoint import Endpoint
    from edge_agent.models.served import ServedModels

    return Endpoint(listen, ServedModels(engine))


def _memory() -> tuple[int, int]:
    """Bytes of RAM, and those that are available; 0 where the kernel does not say."""
    found = {"MemTotal": 0, "MemAvailable": 0}
    try:
        for line in MEMORY_FILE.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return 0, 0
    return found["MemTotal"], found["MemAvailable"]
