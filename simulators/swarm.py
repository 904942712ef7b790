"""A light swarm: many devices in one process, each with its own MQTT connection, all obeying the protocol.

What a device does is decided by the agent's own `Sender` over the agent's own buffer port, in memory; only the sensors,
the disk and the threads of a real agent are missing. So a swarm loads broker and gateway as a fleet would, for some
tens of microseconds a batch. A killed swarm loses what was not acknowledged: kill tests use real agents.
"""

from __future__ import annotations

import asyncio
import math
import random
import resource
import ssl
from collections import deque

import msgspec
import structlog

from contract import messages, topics
from contract.backoff import Backoff
from contract.batches import Envelope
from contract.broker import BrokerAddress
from contract.codec import seal
from contract.errors import ConfigurationError, Rejected, TemporaryError
from contract.messages import Ack, Presence, Rewind
from contract.names import is_name
from edge_agent.buffer.memory import MemoryBuffer
from edge_agent.buffer.port import StreamCaps
from edge_agent.clock import DeviceClock, read_boot_id
from edge_agent.sender import Sender, SenderSettings
from simulators.batches import BodySource
from simulators.light_client import KEEPALIVE_S, ConnectionFailed, LightConnection, LightWill, connect
from simulators.reservoir import Reservoir

_log = structlog.get_logger()

AGENT = "headwater-swarm"
DEVICES_MAX = 50_000
READINGS_PER_S_MAX = 10_000_000
"""One process reaches half of it; what asks for more is a slip of the finger."""
BATCHES_PER_S_MAX = 50_000
"""A batch costs 35 to 100 µs: of more a single core makes and sends a part only, and falls ever further behind."""
CONNECTING_MAX = 100
"""Connection attempts at a time."""
TICK_S = 0.01
"""Batches of one device that fill within a tick leave in one write: the system call is the dearest part of a batch."""
LATENCIES_MAX = 100_000
_FILES_SPARE = 64
"""Files that a process has open besides its connections."""
_BYTES_MAX = 2**50
"""The caps of the buffers never act: `waiting_batches_max` stops the sensors first."""


class SwarmSettings(msgspec.Struct, frozen=True, kw_only=True):
    """A swarm and what it sends. Messages name the options of `headwater simulate swarm`."""

    broker: str
    """`mqtt://host:port` or `mqtts://host:port`."""
    devices: int
    readings_per_s: float | None
    """Of all devices together; None is as many as are acknowledged."""
    seconds: float
    """How long readings are made; sending what is left follows."""
    rows_per_batch: int | None = None
    """None: what a device reads in a second, at most 500."""
    stream: str = "swarm"
    prefix: str = "swarm"
    """Devices are named `<prefix>-00001` and so on."""
    pooled: bool = False
    """Send a pool of ready bodies, times and all; see `BodySource`."""
    waiting_batches_max: int = 64
    """A device that has so many unacknowledged batches reads no more until the first is acknowledged."""
    sender: SenderSettings = SenderSettings()
    ca_file: str | None = None
    """With mqtts: who signed the broker's certificate; None trusts the system's list."""
    connect_timeout_s: float = 10.0
    drain_timeout_s: float = 30.0
    """How long to wait for the last acknowledgements."""
    seed: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if not 1 <= self.devices <= DEVICES_MAX:
            raise ConfigurationError(f"--devices {self.devices} is outside 1..{DEVICES_MAX}; start several swarms")
        if self.rows_per_batch is not None and not 1 <= self.rows_per_batch <= 65_536:
            raise ConfigurationError(f"--rows {self.rows_per_batch} is outside 1..65536")
        if self.readings_per_s is not None:
            if not 0 < self.readings_per_s <= READINGS_PER_S_MAX:
                raise ConfigurationError(
                    f"--rate {self.readings_per_s:g} is outside 0..{READINGS_PER_S_MAX} readings a second; "
                    "for more start several swarms"
                )
            if (batches_per_s := self.readings_per_s / self.rows) > BATCHES_PER_S_MAX:
                raise ConfigurationError(
                    f"--rate {self.readings_per_s:g} in batches of {self.rows} is {batches_per_s:,.0f} batches a "
                    f"second, and one process makes {BATCHES_PER_S_MAX:,} at most; raise --rows, or start more swarms"
                )
        if not 0 < self.seconds < math.inf:
            raise ConfigurationError(f"--seconds {self.seconds:g}; choose a number above 0")
        if not 0 <= self.drain_timeout_s < math.inf:
            raise ConfigurationError(f"--patience {self.drain_timeout_s:g}; choose seconds, 0 or more")
        if not self.waiting_batches_max > 0:
            raise ConfigurationError(f"waiting_batches_max = {self.waiting_batches_max}; choose 1 or more")
        for name in (f"{self.prefix}-00001", self.stream):
            if not is_name(name):
                raise ConfigurationError(f"{name!r} is not a name of a device or stream: use a-z 0-9 . _ -, at most 63")

    @property
    def rows(self) -> int:
        """Rows of every batch."""
        if self.rows_per_batch is not None:
            return self.rows_per_batch
        if self.readings_per_s is None:
            return 500
        return min(500, max(1, round(self.readings_per_s / self.devices)))


class Latency(msgspec.Struct, frozen=True):
    """Quantiles of the time from a batch's end to its acknowledgement, milliseconds; None where none was."""

    p50: float | None
    p99: float | None


class SwarmReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a swarm did."""

    devices: int
    seconds: float
    """From the first batch to the last acknowledgement."""
    rows_per_batch: int
    rows_accepted: int
    """Readings that buffers took."""
    rows_acknowledged: int
    rows_unacknowledged: int
    """Still waiting when the swarm gave up draining."""
    rows_held_back: int
    """Readings not made, because their device had too much waiting: the rate was not reached by so many."""
    batches_sent: int
    """Sendings, repeats among them."""
    batches_resent: int
    payload_bytes: int
    """Of all sendings."""
    readings_per_s: float
    """Acknowledged, over `seconds`."""
    ack_ms: Latency
    rewinds_followed: int
    ack_timeouts: int
    connections_lost: int
    publishes_refused: int


class _Counts:
    """What the devices of a swarm count together."""

    def __init__(self, rng: random.Random) -> None:
        self.batches_accepted = self.batches_acknowledged = self.batches_held_back = 0
        self.batches_sent = self.payload_bytes = 0
        self.connections_lost = 0
        self.last_ack_s = 0.0
        self.latencies = Reservoir(LATENCIES_MAX, rng)


class _Device:
    """One device: buffer, sender, connection. Everything runs in the event loop."""

    def __init__(self, name: str, swarm: Swarm) -> None:
        self.name = name
        self._swarm = swarm
        settings = swarm.settings
        caps = StreamCaps(bytes_max=_BYTES_MAX, age_max_s=_BYTES_MAX)
        self._buffer = MemoryBuffer({settings.stream: caps}, _BYTES_MAX)
        self.sender = Sender(self._buffer, settings.sender, swarm.rng)
        self._topic = topics.up(name, settings.stream)
        self._ack_topic, self._rewind_topic = topics.ack(name), topics.rewind(name)
        self._born: deque[tuple[int, float]] = deque()
        """(seq, loop time) of batches that are not acknowledged."""
        self._epoch = ""
        self.connection: LightConnection | None = None
        self.refusals = 0
        self._lost = asyncio.Event()

    @property
    def waiting_batches(self) -> int:
        """Batches not acknowledged."""
        return len(self._born)

    def add(self, body: bytes, rows: int, now_s: float) -> None:
        """The sensors filled a batch; call `send` when the last of this moment is in."""
        done = self._buffer.append(self._swarm.settings.stream, body, rows, self._swarm.clock.read())
        if done.epoch != self._epoch:
            self._epoch = done.epoch
            self.sender.refresh_lanes()
        self._born.append((done.seq, now_s))
        self._swarm.counts.batches_accepted += 1

    def send(self, now_s: float) -> None:
        """Send what the window and the connection allow."""
        connection = self.connection
        if connection is None:
            return
        counts, sender = self._swarm.counts, self.sender
        while connection.room and (batch := sender.next_batch(now_s)) is not None:
            body = self._buffer.body(batch.stream, batch.epoch, batch.seq)
            floor = self._buffer.floor(batch.stream, batch.epoch)
            assert body is not None and floor is not None  # nothing is evicted here
            envelope = Envelope(
                self.name,
                batch.stream,
                batch.epoch,
                batch.seq,
                floor,
                batch.rows,
                self._swarm.clock.wall_us(),
                batch.clock,
                batch.crc32,
            )
            payload = seal(envelope, body)
            connection.publish(self._topic, payload)
            sender.sent(batch, now_s)
            counts.batches_sent += 1
            counts.payload_bytes += len(payload)
        connection.flush()

    async def stay_connected(self) -> None:
        """Whenever the connection is lost, make another, until cancelled."""
        backoff = Backoff(0.5, 10.0, self._swarm.rng)
        while True:
            await self._lost.wait()
            while self.connection is None:
                await asyncio.sleep(backoff.next_delay_s())
                try:
                    await self.connect()
                except ConnectionFailed as error:
                    _log.info("swarm_reconnect_failed", device=self.name, error=str(error))
            backoff.reset()

    async def connect(self) -> None:
        """One attempt.

        Raises:
            ConnectionFailed: naming the broker and the reason.
        """
        swarm = self._swarm
        self._lost.clear()
        async with swarm.connecting:
            connection = await connect(
                swarm.address.host,
                swarm.address.port,
                self.name,
                self,
                (self._ack_topic, self._rewind_topic),
                tls=swarm.tls,
                will=LightWill(topics.status(self.name), swarm.presence(online=False, reason="lost")),
                timeout_s=swarm.settings.connect_timeout_s,
            )
        self.connection = connection
        connection.publish(topics.status(self.name), swarm.presence(online=True, reason="started"), retain=True)
        self.sender.connected()
        self.send(swarm.now_s())

    def close(self) -> None:
        """Say goodbye."""
        if (connection := self.connection) is not None:
            self.connection = None
            self.refusals += connection.refusals
            if connection.room:
                farewell = self._swarm.presence(online=False, reason="stopped")
                connection.publish(topics.status(self.name), farewell, retain=True)
            connection.close()

    def received(self, topic: str, payload: bytes) -> None:
        """An ack or a rewind."""
        now_s = self._swarm.now_s()
        try:
            if topic == self._ack_topic:
                self._acknowledged(messages.decode(payload, Ack), now_s)
            elif topic == self._rewind_topic:
                self.sender.rewind(messages.decode(payload, Rewind), now_s)
        except Rejected as error:
            _log.warning("swarm_document_refused", device=self.name, topic=topic, error=str(error))
        self.send(now_s)

    def has_room(self) -> None:
        """The broker took something."""
        self.send(self._swarm.now_s())

    def lost(self, reason: str) -> None:
        """The connection broke."""
        if self.connection is not None:
            self.refusals += self.connection.refusals
            self.connection = None
            self._swarm.counts.connections_lost += 1
            _log.info("swarm_connection_lost", device=self.name, reason=reason)
        self._lost.set()

    def _acknowledged(self, ack: Ack, now_s: float) -> None:
        counts = self._swarm.counts
        for mark in ack.committed:
            self.sender.acknowledged(mark, now_s)
            if mark.epoch != self._epoch:
                continue
            while self._born and self._born[0][0] <= mark.seq:
                _, born_s = self._born.popleft()
                counts.batches_acknowledged += 1
                counts.latencies.add((now_s - born_s) * 1000.0)
                counts.last_ack_s = now_s


class Swarm:
    """All devices, and the sensors that fill their batches in turn.

    Args:
        settings: what to do.
        clock: the devices' clock.
    """

    def __init__(self, settings: SwarmSettings, clock: DeviceClock) -> None:
        self.settings = settings
        self.clock = clock
        self.rng = random.Random(settings.seed)
        try:
            self.address = BrokerAddress.parse(settings.broker)
            self.tls = ssl.create_default_context(cafile=settings.ca_file) if self.address.tls else None
        except (ValueError, OSError) as error:
            raise ConfigurationError(f"--broker {settings.broker!r}: {error}") from error
        self.counts = _Counts(self.rng)
        self.connecting = asyncio.Semaphore(CONNECTING_MAX)
        self._bodies = BodySource(settings.rows, self.rng, pooled=settings.pooled)
        self._turn = 0
        self._stop = asyncio.Event()
        self._devices: list[_Device] = []

    def now_s(self) -> float:
        """Monotonic seconds."""
        return asyncio.get_running_loop().time()

    def presence(self, *, online: bool, reason: str) -> bytes:
        """A presence document."""
        return messages.encode(
            Presence(online=online, reason=reason, at_us=self.clock.wall_us(), agent=AGENT, boot=self.clock.boot)
        )

    def stop(self) -> None:
        """Make no more readings; what is left is sent as usual."""
        self._stop.set()

    async def run(self) -> SwarmReport:
        """Connect all devices, send for `seconds`, wait for the last acknowledgements, say goodbye.

        Raises:
            TemporaryError: when a device cannot connect at the start.
        """
        settings = self.settings
        self._devices = [_Device(f"{settings.prefix}-{n:05}", self) for n in range(1, settings.devices + 1)]
        keepers: list[asyncio.Task[None]] = []
        ticker = asyncio.create_task(self._tick())
        try:
            await self._first_connections()
            keepers = [asyncio.create_task(_keep(device)) for device in self._devices]
            _log.info("swarm_connected", devices=settings.devices)
            began_s = self.now_s()
            await self._produce(began_s)
            await self._drain()
        finally:
            for task in (*keepers, ticker):
                task.cancel()
            ended = await asyncio.gather(*keepers, ticker, return_exceptions=True)
            for device in self._devices:
                device.close()
        for outcome in ended:
            if isinstance(outcome, Exception):
                raise TemporaryError(f"a device of the swarm failed: {outcome!r}") from outcome
        return self._report(began_s)

    async def _first_connections(self) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_first(device)) for device in self._devices]
        failed = [error for task in tasks if (error := task.result()) is not None]
        if failed:
            raise TemporaryError(f"{len(failed)} of {len(tasks)} devices cannot connect; the first: {failed[0]}")

    async def _produce(self, began_s: float) -> None:
        """Fill the devices' batches in turn, at the wanted rate, until the time is over or `stop` is called."""
        settings = self.settings
        ends_s = began_s + settings.seconds
        made = 0
        while (now_s := self.now_s()) < ends_s and not self._stop.is_set():
            if settings.readings_per_s is None:
                filled = self._fill_all(now_s)
            else:
                due = int((now_s - began_s) * settings.readings_per_s / settings.rows)
                filled, made = self._fill(due - made, settings.devices * 1e6 / settings.readings_per_s, now_s), due
            for device in filled:
                device.send(now_s)
            await self._pause(TICK_S)

    def _fill_all(self, now_s: float) -> set[_Device]:
        """As much as each device may have waiting."""
        filled = set()
        for device in self._devices:
            for _ in range(self.settings.waiting_batches_max - device.waiting_batches):
                device.add(self._bodies.next(self.clock.wall_us(), 1000.0), self._bodies.rows, now_s)
                filled.add(device)
        return filled

    def _fill(self, batches: int, interval_us: float, now_s: float) -> set[_Device]:
        """The next batches of as many devices, in turn."""
        filled = set()
        for _ in range(batches):
            device = self._devices[self._turn]
            self._turn = (self._turn + 1) % len(self._devices)
            if device.waiting_batches < self.settings.waiting_batches_max:
                device.add(self._bodies.next(self.clock.wall_us(), interval_us), self._bodies.rows, now_s)
                filled.add(device)
            else:
                self.counts.batches_held_back += 1
        return filled

    async def _drain(self) -> None:
        deadline_s = self.now_s() + self.settings.drain_timeout_s
        while any(device.waiting_batches for device in self._devices) and self.now_s() < deadline_s:
            await asyncio.sleep(0.02)

    async def _pause(self, delay_s: float) -> None:
        try:
            async with asyncio.timeout(delay_s):
                await self._stop.wait()
        except TimeoutError:
            pass  # time for the next readings

    async def _tick(self) -> None:
        """What time brings: acks that did not come, pings."""
        turn = 0
        while True:
            await asyncio.sleep(0.5)
            turn += 1
            now_s = self.now_s()
            ping = turn % (KEEPALIVE_S // 2) == 0
            for device in self._devices:
                if device.waiting_batches:
                    device.send(now_s)
                if ping and device.connection is not None:
                    device.connection.tick()

    def _report(self, began_s: float) -> SwarmReport:
        counts, rows = self.counts, self._bodies.rows
        seconds = max(counts.last_ack_s - began_s, TICK_S)
        acknowledged = counts.batches_acknowledged * rows
        return SwarmReport(
            devices=self.settings.devices,
            seconds=round(seconds, 3),
            rows_per_batch=rows,
            rows_accepted=counts.batches_accepted * rows,
            rows_acknowledged=acknowledged,
            rows_unacknowledged=(counts.batches_accepted - counts.batches_acknowledged) * rows,
            rows_held_back=counts.batches_held_back * rows,
            batches_sent=counts.batches_sent,
            batches_resent=max(0, counts.batches_sent - counts.batches_accepted),
            payload_bytes=counts.payload_bytes,
            readings_per_s=round(acknowledged / seconds, 1),
            ack_ms=Latency(_rounded(counts.latencies.quantile(0.5)), _rounded(counts.latencies.quantile(0.99))),
            rewinds_followed=sum(device.sender.rewinds_followed for device in self._devices),
            ack_timeouts=sum(device.sender.resent_timeouts for device in self._devices),
            connections_lost=counts.connections_lost,
            publishes_refused=sum(device.refusals for device in self._devices),
        )


def new_swarm(settings: SwarmSettings) -> Swarm:
    """A swarm on this machine's clocks; make it inside the event loop that runs it.

    Raises:
        ConfigurationError: when the broker's URL is not one, or this process may not open as many connections.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != resource.RLIM_INFINITY and settings.devices + _FILES_SPARE > allowed:
        raise ConfigurationError(
            f"--devices {settings.devices}: each is a connection, and this process may open {allowed} files; "
            f"allow more with: ulimit -n {settings.devices + _FILES_SPARE}"
        )
    return Swarm(settings, DeviceClock(read_boot_id()))


async def run_swarm(settings: SwarmSettings) -> SwarmReport:
    """Run a swarm to its end.

    Raises:
        ConfigurationError: when the broker's URL is not one.
        TemporaryError: when a device cannot connect at the start.
    """
    return await new_swarm(settings).run()


async def _first(device: _Device) -> ConnectionFailed | None:
    try:
        await device.connect()
    except ConnectionFailed as error:
        return error
    return None


async def _keep(device: _Device) -> None:
    await device.stay_connected()


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
