"""The register of devices: listens to presence and reports, keeps `control/devices`, and hands out desired documents.

Any number of gateways may run it. A row that two of them write is harmless, because state is a fold; a desired document
gets its revision by check-and-set, so of two people who change one device at once, one is told to look again.
"""

from __future__ import annotations

import functools
import heapq
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping

import msgspec
import pyarrow as pa
import structlog

from contract import topics
from contract.desired import check_desired_stream
from contract.errors import HeadwaterError, Reason, Rejected, TemporaryError
from contract.limits import CONTROL_BYTES_MAX
from contract.messages import Desired, DesiredStream, Presence, Reported, decode, encode
from contract.names import is_name, shard_of
from contract.settings import plain
from gateway.acknowledger import Publish
from gateway.devices import (
    DESIRED,
    REPORTED_BYTES_MAX,
    REPORTED_MODELS_MAX,
    Device,
    DeviceBook,
    DeviceEvent,
)
from gateway.ingress import wall_us
from gateway.metrics import GatewayMetrics
from gateway.settings import RegistrySettings
from gateway.watch import LakeHealth, WatchedThread
from lake import ledger
from lake.errors import CommitConflictError
from lake.ledger import TIMESTAMP, Table

_log = structlog.get_logger()

PATH = "control/devices"
SCHEMA = pa.schema(
    [
        pa.field("at", TIMESTAMP),
        pa.field("device", pa.string()),
        pa.field("event", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("agent", pa.string()),
        pa.field("boot", pa.string()),
        pa.field("revision", pa.int64()),
        pa.field("document", pa.string()),
        pa.field("gateway", pa.string()),
    ]
)
FILTERS = (topics.status("+"), topics.reported("+"))
"""What the registry wants to hear."""
PRESENCE_BYTES_MAX = 4096
"""What it says is kept in memory for each device."""
ATTEMPTS_MAX = 5
RETRY_MAX_S = 15.0
_PUBLISH_PAUSE_S = 0.1


class Refused(HeadwaterError):
    """A desired document is not acceptable as it is; the message says why.

    Attributes:
        code: the machine-readable reason.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Registry:
    """A thread around a `DeviceBook`. All methods may be called from any thread; only `set_desired` waits for the lake.

    Args:
        settings: bounds and intervals.
        shards: whose devices this gateway writes rows for, and publishes desired documents of.
        gateway: its name, for the rows.
        open_table: gives the table, anew when credentials changed; may raise what the lake raises.
        publish: the way to the broker.
        metrics: counters.
        health: told how the lake answers.
        clock_us: wall clock, microseconds.
        changed: told the name of each device that said something, in the network thread; must not wait.
    """

    def __init__(
        self,
        settings: RegistrySettings,
        *,
        shards: Iterable[int],
        gateway: str,
        open_table: Callable[[], Table],
        publish: Publish,
        metrics: GatewayMetrics,
        health: LakeHealth,
        clock_us: Callable[[], int] = wall_us,
        changed: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._changed = changed
        self._settings, self._shards, self._gateway = settings, frozenset(shards), gateway
        self._open_table, self._publish = open_table, publish
        self._metrics, self._health, self._clock_us = metrics, health, clock_us
        self._book = DeviceBook(settings.devices_max)
        self._lock = threading.Lock()
        """Guards the book, the queues and `_loaded`; never held while the lake or the broker is asked."""
        self._lake_lock = threading.Lock()
        """Guards the table's handle; held while the lake is asked."""
        self._loaded = False
        self._early: OrderedDict[tuple[str, str], Callable[[], list[DeviceEvent]]] = OrderedDict()
        """What was heard before the table was read: only the table tells what is new."""
        self._rows: deque[DeviceEvent] = deque()
        self._to_publish: OrderedDict[str, None] = OrderedDict()
        self._version_seen = -1
        self._bell = threading.Event()
        self._stopping = threading.Event()
        self.thread = WatchedThread("registry", self._run)
        metrics.watch("registry_waiting", "Changes to be written", lambda: len(self._rows), settings.queued_rows_max)
        metrics.watch("devices", "Devices in memory", lambda: len(self._book), settings.devices_max)
        metrics.watch("devices_online", "Devices that are online", self._online)
        metrics.watch(
            "desired_waiting", "Desired documents to publish", lambda: len(self._to_publish), settings.devices_max
        )
        metrics.watch(
            "reported_bytes", "Reported documents in memory", lambda: self._book.reported_bytes, REPORTED_BYTES_MAX
        )
        metrics.watch(
            "reported_models", "Reported models in memory", lambda: self._book.reported_models, REPORTED_MODELS_MAX
        )

    def start(self) -> None:
        """Begin: read the table, then keep it."""
        self.thread.start()

    def close(self, timeout_s: float) -> bool:
        """Write what waits, once, and end; False when that took too long."""
        self._stopping.set()
        self._bell.set()
        return self.thread.join(timeout_s)

    # What is heard.

    def receive(self, topic: str, payload: bytes) -> None:
        """A presence or reported document, from the network thread. Never raises, never waits."""
        if not payload:
            return  # somebody cleared the retained document
        now_us = self._clock_us()
        kind = "status" if topic.startswith(f"{topics.ROOT}/status/") else "reported"
        try:
            device = topics.parse_device(topic, kind)
            if kind == "status":
                if len(payload) > PRESENCE_BYTES_MAX:
                    raise Rejected(
                        Reason.PAYLOAD_TOO_LARGE,
                        f"presence document of {len(payload)} bytes, more than {PRESENCE_BYTES_MAX}; shorten it",
                    )
                presence = decode(payload, Presence)
                self._hear(kind, device, lambda: self._book.presence(device, presence, now_us))
            else:
                report = decode(payload, Reported)
                with self._lock:
                    if not self._loaded:
                        # Kept from the first moment on: a device that is offline now will not say it again.
                        self._book.learn(device, report, now_us)
                self._hear(kind, device, lambda: self._book.reports(device, report, now_us))
            self._changed(device)
        except Rejected as refusal:
            self._metrics.documents_refused.labels(kind).inc()
            _log.debug("document_refused", topic=topic[:200], error=str(refusal))
        except Exception as error:  # noqa: BLE001 - a bug that one document finds must not cost the connection
            self._metrics.faults.labels("registry").inc()
            _log.error("registry_fault", topic=topic[:200], exc_info=error)

    def heard(self, devices: Iterable[str], at_us: int) -> None:
        """Batches of these devices were committed."""
        if self._loaded:
            with self._lock:
                self._queue(self._book.heard(devices, at_us))
            return
        for device in devices:
            self._hear("heard", device, functools.partial(self._book.heard, (device,), at_us))

    def connected(self) -> None:
        """The broker may have forgotten everything: desired documents are published again."""
        with self._lock:
            for device in self._book:
                if device.desired is not None and self._owns(device.name):
                    self._to_publish[device.name] = None
        self._bell.set()

    # What is asked.

    def device(self, name: str) -> Device | None:
        """What is known of a device."""
        with self._lock:
            found = self._book.get(name)
            return None if found is None else msgspec.structs.replace(found)

    def devices(self, after: str, limit: int) -> list[Device]:
        """Devices in order of their names, those behind `after`, at most `limit`."""
        with self._lock:
            names = heapq.nsmallest(limit, (device.name for device in self._book if device.name > after))
            found = [self._book.get(name) for name in names]
            return [msgspec.structs.replace(device) for device in found if device is not None]

    def everyone(self) -> list[Device]:
        """Every device that is known, as of now."""
        with self._lock:
            return [msgspec.structs.replace(device) for device in self._book]

    @property
    def loaded(self) -> bool:
        """Whether the table was read."""
        return self._loaded

    # What is ordered.

    def set_desired(self, name: str, streams: Mapping[str, DesiredStream], replaces: int | None = None) -> Desired:
        """Give a device a new desired document: commit it, then publish it.

        Args:
            name: the device; it need not have been seen yet.
            streams: the whole document's content.
            replaces: the revision the caller believes to replace; None where it does not matter.

        Raises:
            Refused: no device would accept the document, or by its last report this one would not, or it replaces
                another revision.
            TemporaryError: the lake did not answer; whether the document is in force is not known: look, then decide.
        """
        check_desired(name, streams)
        device = self.device(name)
        if device is not None and device.reported is not None:
            check_against_report(streams, msgspec.json.decode(device.reported, type=Reported))
        with self._lake_lock:
            for attempt in range(1, ATTEMPTS_MAX + 1):
                table = self._open_table()
                table.refresh()
                events = events_of(table.read())
                current = max(
                    (event.revision or 0 for event in events if event.device == name and event.event == DESIRED),
                    default=0,
                )
                if replaces is not None and replaces != current:
                    raise Refused(
                        "conflict",
                        f"device {name!r} is at revision {current}, not at {replaces}; read it again, then decide",
                    )
                desired = Desired(revision=current + 1, streams=dict(streams))
                document = encode(desired)
                if len(document) > CONTROL_BYTES_MAX:
                    raise Refused(
                        "too_large",
                        f"the document takes {len(document)} bytes, more than {CONTROL_BYTES_MAX}; name fewer streams",
                    )
                row = DeviceEvent(
                    self._clock_us(),
                    name,
                    DESIRED,
                    revision=desired.revision,
                    document=document.decode(),
                    gateway=self._gateway,
                )
                try:
                    table.append(table_of([row]), expected=table.version)
                    break
                except CommitConflictError:
                    if attempt == ATTEMPTS_MAX:
                        raise
        self._metrics.registry_rows.labels(DESIRED).inc()
        with self._lock:
            self._book.fold([*events, row])
            self._to_publish[name] = None
        self._bell.set()
        return desired

    # Below here everything runs in the registry's thread.

    def _run(self) -> None:
        settings = self._settings
        refresh_s = write_s = time.monotonic()
        failures = 0
        while not self._stopping.is_set():
            self.thread.beat()
            now_s = time.monotonic()
            well = True
            if now_s >= refresh_s:
                well = self.refresh()
                refresh_s = time.monotonic() + settings.refresh_interval_s
            if well and self._loaded and now_s >= write_s:
                well = self.write()
                write_s = time.monotonic() + settings.write_interval_s
            published = self.publish_waiting()
            failures = 0 if well else failures + 1
            if not well:
                pause_s = min(RETRY_MAX_S, 0.25 * 2.0 ** min(failures, 10))
                write_s = time.monotonic() + pause_s
                refresh_s = write_s if not self._loaded else min(refresh_s, write_s)
            next_s = min(refresh_s, write_s) if self._rows or not self._loaded else refresh_s
            pause_s = max(0.0, next_s - time.monotonic())
            self._bell.wait(pause_s if published else min(pause_s, _PUBLISH_PAUSE_S))
            self._bell.clear()
        if self._loaded:
            self.write()
        self.publish_waiting()

    def refresh(self) -> bool:
        """Read what other gateways wrote; False when the lake did not answer."""
        try:
            with self._lake_lock:
                table = self._open_table()
                table.refresh()
                version = table.version
                events = events_of(table.read()) if not self._loaded or version != self._version_seen else []
        except TemporaryError as error:
            self._metrics.store_errors.inc()
            self._health.failed(error)
            return False
        except Exception as error:  # noqa: BLE001 - devices are served without their register, too
            self._metrics.faults.labels("registry").inc()
            _log.error("registry_fault", table=PATH, exc_info=error)
            return False
        self._health.answered()
        self._version_seen = version
        with self._lock:
            for device in self._book.fold(events):
                if self._owns(device.name):
                    self._to_publish[device.name] = None
            if not self._loaded:
                self._loaded = True
                for early in self._early.values():
                    self._queue(early())
                self._early.clear()
        return True

    def write(self) -> bool:
        """Write the changes that wait; False when they have to wait longer."""
        with self._lock:
            rows = list(self._rows)
        if not rows:
            return True
        try:
            with self._lake_lock:
                table = self._open_table()
                table.refresh()
                table.append(table_of(rows))
        except CommitConflictError:
            return False
        except TemporaryError as error:
            self._metrics.store_errors.inc()
            self._health.failed(error)
            return False
        except Exception as error:  # noqa: BLE001 - as above; these rows are given up, or nothing would ever be written
            self._metrics.faults.labels("registry").inc()
            self._metrics.registry_dropped.inc(len(rows))
            _log.error("registry_fault", table=PATH, rows=len(rows), exc_info=error)
        else:
            self._health.answered()
            for row in rows:
                self._metrics.registry_rows.labels(row.event).inc()
        with self._lock:
            for _ in rows:
                self._rows.popleft()
        return True

    def publish_waiting(self) -> bool:
        """Publish desired documents until nothing waits or the broker takes no more; whether everything is out."""
        while True:
            with self._lock:
                if not self._to_publish:
                    return True
                name, _ = self._to_publish.popitem(last=False)
                device = self._book.get(name)
                desired = None if device is None else device.desired
            if desired is not None and not self._publish(topics.desired(name), encode(desired), qos=1, retain=True):
                with self._lock:
                    self._to_publish[name] = None
                    self._to_publish.move_to_end(name, last=False)
                return False

    # Helpers.

    def _hear(self, kind: str, name: str, learn: Callable[[], list[DeviceEvent]]) -> None:
        with self._lock:
            if self._loaded:
                self._queue(learn())
            else:
                self._early[kind, name] = learn
                self._early.move_to_end((kind, name))
                if len(self._early) > 2 * self._settings.devices_max:
                    self._early.popitem(last=False)

    def _queue(self, events: list[DeviceEvent]) -> None:
        for event in events:
            if not self._owns(event.device):
                continue
            if len(self._rows) >= self._settings.queued_rows_max:
                self._metrics.registry_dropped.inc()
            else:
                self._rows.append(event._replace(gateway=self._gateway))
                self._bell.set()

    def _owns(self, name: str) -> bool:
        return shard_of(name) in self._shards

    def _online(self) -> float:
        with self._lock:
            return sum(device.online is True for device in self._book)


def check_desired(name: str, streams: Mapping[str, DesiredStream]) -> None:
    """Accept what any device may be told to be.

    Raises:
        Refused: naming stream, member, value and range.
    """
    if not is_name(name):
        raise Refused("bad_name", f"device {name[:80]!r} is not a device name; use 1 to 63 of a-z 0-9 . _ -")
    for stream, wanted in streams.items():
        if not is_name(stream):
            raise Refused("bad_name", f"stream {stream[:80]!r} is not a stream name; use 1 to 63 of a-z 0-9 . _ -")
        try:
            check_desired_stream(wanted)
        except ValueError as error:
            raise Refused("out_of_range", f"stream {stream!r}: {error}") from error


def check_against_report(streams: Mapping[str, DesiredStream], reported: Reported) -> None:
    """Accept what fits the streams that the device has, as it last said: it would refuse anything else itself.

    Raises:
        Refused: naming stream and remedy.
    """
    for stream, wanted in streams.items():
        has = reported.streams.get(stream)
        if has is None:
            known = ", ".join(sorted(reported.streams)[:20]) or "none"
            raise Refused(
                "unknown_stream",
                f"the device says that it has no stream {stream!r}; name one of its streams: {known}",
            )
        if wanted.rate_hz is not None and has.rate_hz is None:
            raise Refused(
                "rate_not_settable",
                f"stream {stream!r}: rate_hz = {plain(wanted.rate_hz)} does not apply, its driver sets the pace; "
                "leave rate_hz out",
            )


def table_of(events: Iterable[DeviceEvent]) -> pa.Table:
    """Rows for `control/devices`."""
    return ledger.table_of([{"at": event.at_us, **event._asdict()} for event in events], SCHEMA)


def events_of(rows: pa.Table) -> list[DeviceEvent]:
    """Rows of `control/devices`; those that name no device, or hold what is no document, are left out."""
    found = []
    for row in ledger.values_of(rows.select(SCHEMA.names)):
        event = DeviceEvent(at_us=row.pop("at") or 0, **row)
        if event.device and event.event and _is_document(event.document):
            found.append(event)
    return found


def _is_document(text: str | None) -> bool:
    if text is None:
        return True
    try:
        msgspec.json.decode(text, type=Desired)
    except msgspec.MsgspecError:
        return False
    return True
