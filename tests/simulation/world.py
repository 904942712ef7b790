"""A simulated world around the real protocol code: devices, a bad broker, gateways that freeze and die, one lake.

Only the network, time and the store's faults are simulated. Sending (`edge_agent.sender`), the codec, admission, flow
and commit (`gateway`) are the very code that runs in production, over the memory implementations of buffer and table,
which pass the same suites as the real ones. Everything that happens is drawn from `Choices`, so a run can be replayed.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import pyarrow as pa

from contract.batches import Clock, Envelope
from contract.codec import decode_body, encode_body, seal, unseal
from contract.errors import Rejected, TemporaryError
from contract.limits import DEFAULT_LIMITS
from contract.messages import Rewind, Watermark
from contract.names import shard_of
from edge_agent.buffer.memory import MemoryBuffer
from edge_agent.buffer.port import StreamCaps, WhenFull
from edge_agent.sender import AckOutcome, Sender, SenderSettings
from gateway.admission import Verdict
from gateway.committer import settle
from gateway.flow import Flow
from gateway.ports import Lane, Pending
from lake.memory import MemoryLake, MemoryRawTable
from lake.quarantine import QuarantineRecord
from lake.raw import AppendResult, RawBatch

STREAM = "vibration"
CLOCK = Clock(synced=True, wall_us=0, monotonic_us=0, boot="ab" * 16)
SETTINGS = SenderSettings(
    window_batches_max=4, ack_timeout_s=5.0, ack_timeout_max_s=20.0, rewind_holdoff_s=1.0, backlog_bytes_max=500
)
BODY_BYTES = len(encode_body(pa.record_batch([pa.array([0], pa.timestamp("us", "UTC")), pa.array([0])], ["ts", "x"])))
POISON = -1
"""A reading of this value makes a batch that the gateway must refuse: its schema has no `ts`."""


class Choices(Protocol):
    """Where every decision of the world comes from."""

    def integer(self, low: int, high: int) -> int:
        """An integer of low..high, both included."""

    def chance(self, probability: float) -> bool:
        """True with about this probability."""


class Seeded:
    """Choices from a seed."""

    def __init__(self, seed: int) -> None:
        """Start at the seed's first number."""
        self._rng = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        """An integer of low..high."""
        return self._rng.randint(low, high)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._rng.random() < probability


class BrokenPromiseError(AssertionError):
    """The world saw a duplicate, a loss, a false acknowledgement or a stuck device."""


class Killed(BaseException):
    """The gateway's process died in the middle of a commit."""


class Accepted(NamedTuple):
    """A batch that a buffer accepted."""

    device: str
    value: int


class Device:
    """One device: a durable buffer, and a sender that dies with its process."""

    def __init__(self, name: str, choices: Choices) -> None:
        """Start with an empty buffer."""
        self.name = name
        self._choices = choices
        caps = StreamCaps(bytes_max=5 * BODY_BYTES, age_max_s=1e9, when_full=WhenFull.DROP_OLDEST)
        self.buffer = MemoryBuffer({STREAM: caps}, bytes_max=1 << 30, remembered_acks_max=3)
        self.online = True
        self.restart()

    def restart(self) -> None:
        """The process dies and starts again over the same buffer; deletions of the last moment may be undone."""
        self.buffer.reopen(bring_back=self._choices.integer(0, 3))
        self.sender = Sender(self.buffer, SETTINGS, random.Random(self._choices.integer(0, 2**16)))

    def held(self) -> list[tuple[str, int]]:
        """(epoch, seq) of every batch in the buffer."""
        found: list[tuple[str, int]] = []
        for lane in self.buffer.lanes():
            after = 0
            while (batch := self.buffer.peek(STREAM, lane.epoch, after)) is not None:
                after = batch.seq
                found.append((lane.epoch, after))
        return found


class GatewayProcess:
    """One gateway: beliefs that die with it, and a table handle."""

    def __init__(self, table: MemoryRawTable) -> None:
        """Start knowing nothing."""
        self.table = table
        self.flow = Flow()
        self.committing = False


class FaultyTable:
    """The table as a gateway in trouble sees it: calls fail, outcomes stay unknown, the world goes on in between."""

    def __init__(self, table: MemoryRawTable, world: World) -> None:
        """Wrap a gateway's own handle."""
        self._table = table
        self._world = world

    @property
    def life(self) -> int:
        """As of the last refresh."""
        return self._table.life

    def refresh(self) -> None:
        """May fail."""
        self._world.store_trouble()
        self._table.refresh()

    def watermarks(self, lanes: Iterable[tuple[str, str]]) -> Mapping[tuple[str, str], int]:
        """May fail."""
        self._world.store_trouble()
        return self._table.watermarks(lanes)

    def shard_counter(self, shard: int) -> int:
        """Never fails: it reads what `refresh` fetched."""
        return self._table.shard_counter(shard)

    def unfit(self, schema: pa.Schema) -> Rejected | None:
        """Never fails: it reads what `refresh` fetched."""
        return self._table.unfit(schema)

    def append(
        self,
        batches: Sequence[RawBatch],
        watermarks: Mapping[tuple[str, str], int],
        shard_counters: Mapping[int, int],
    ) -> AppendResult:
        """Long enough for anything to happen before; may fail before or after it took effect; the process may die."""
        self._world.meanwhile()
        self._world.store_trouble()
        if self._world.faults and self._world.choices.chance(0.03):
            raise Killed
        result = self._table.append(batches, watermarks, shard_counters)
        if self._world.faults and self._world.choices.chance(0.05):
            raise TemporaryError("the store took the commit, but its answer was lost; look again")
        if self._world.faults and self._world.choices.chance(0.03):
            raise Killed
        return result


class World:
    """Three devices, two gateways that both own every shard, one lake. `step` does one thing; `check` sees all."""

    def __init__(self, choices: Choices, devices: int = 3, gateways: int = 2, *, restores: bool = False) -> None:
        """Build it, empty and healthy; `restores`: the lake is replaced by an older copy from time to time."""
        self.choices = choices
        self.faults = True
        self.restores = restores
        self.taken_back: set[tuple[str, str, int]] = set()
        """What was in the lake when an older copy took its place: it may be gone, as nobody has it any more."""
        self.now_s = 0.0
        self.steps = 0
        self._depth = 0
        self._values = 0
        self.lake = MemoryLake()
        self.devices = {name: Device(name, choices) for name in (f"pi-{i}" for i in range(devices))}
        self.gateways = [GatewayProcess(MemoryRawTable(self.lake, STREAM)) for _ in range(gateways)]
        self.accepted: dict[tuple[str, str, int], int] = {}
        """(device, epoch, seq) → value."""
        self.evicted: set[tuple[str, str, int]] = set()
        self.quarantined: dict[tuple[str, str, int], bytes] = {}
        self.up: list[tuple[int, str, bytes]] = []
        """Messages on their way to a gateway: (gateway, device, payload)."""
        self.down: list[tuple[str, Watermark | Rewind]] = []
        self.retained: dict[str, dict[tuple[str, str], Watermark]] = {}

    # What can happen. Each is one step.

    def actions(self) -> Sequence[Callable[[], None]]:
        """Everything that can happen, the ordinary more than once."""
        ordinary = [self.measure, self.send, self.send, self.deliver_up, self.deliver_up, self.flush, self.deliver_down]
        trouble = [
            self.lose,
            self.duplicate,
            self.kill_device,
            self.kill_gateway,
            self.kill_broker,
            self.disconnect,
            self.wait,
            self.split,
        ]
        if self.restores and not self._depth:
            trouble.append(self.restore)
        return [*ordinary, *ordinary, *trouble] if self.faults else [*ordinary, self.wait]

    def step(self) -> None:
        """Do one thing and check everything."""
        self.steps += 1
        actions = self.actions()
        actions[self.choices.integer(0, len(actions) - 1)]()
        self.check()

    def measure(self) -> None:
        """A device's buffer accepts a batch; a full buffer evicts others."""
        device = self._device()
        self._values += 1
        value = POISON if self.choices.chance(0.05) else self._values
        appended = device.buffer.append(STREAM, _body(value), 1, CLOCK)
        device.sender.stored(STREAM, appended.epoch)
        self.accepted[device.name, appended.epoch, appended.seq] = value
        for gone in appended.evictions:
            self.evicted |= {(device.name, gone.epoch, seq) for seq in range(gone.first_seq, gone.last_seq + 1)}

    def send(self) -> None:
        """A device sends its next batch to every gateway (they own the same shards)."""
        device = self._device()
        batch = device.sender.next_batch(self.now_s) if device.online else None
        if batch is None:
            return
        body = device.buffer.body(batch.stream, batch.epoch, batch.seq)
        floor = device.buffer.floor(batch.stream, batch.epoch)
        device.sender.sent(batch, self.now_s)
        assert body is not None
        assert floor is not None
        envelope = Envelope(
            device.name, batch.stream, batch.epoch, batch.seq, floor, batch.rows, 0, batch.clock, batch.crc32
        )
        for gateway in range(len(self.gateways)):
            self.up.append((gateway, device.name, seal(envelope, body)))

    def deliver_up(self) -> None:
        """A message reaches its gateway, in any order."""
        if not self.up:
            return
        number, device, payload = self.up.pop(self._index(self.up))
        gateway = self.gateways[number]
        envelope, body = unseal(payload)
        content: pa.RecordBatch | Rejected
        try:
            content = decode_body(body, envelope, DEFAULT_LIMITS)
        except Rejected as refusal:
            content = refusal
        pending = Pending(
            Lane(device, envelope.epoch),
            envelope.seq,
            envelope.floor,
            shard_of(device),
            0,
            CLOCK,
            content,
            "",
            payload,
            held_bytes=1,
        )
        reply = gateway.flow.offer(pending)
        if reply.verdict is Verdict.DUPLICATE and reply.committed:
            self._acknowledge(device, envelope.epoch, reply.committed)
        elif reply.verdict is Verdict.REWIND:
            self.down.append((device, Rewind(stream=STREAM, epoch=envelope.epoch, expected=reply.expected)))

    def flush(self) -> None:
        """A gateway commits what is pending; it may fail, die, or be overtaken in between."""
        number = self._index(self.gateways)
        gateway = self.gateways[number]
        if gateway.committing or not gateway.flow.has_pending:
            return
        gateway.committing = True
        pending, committed, counters = gateway.flow.take(self.choices.integer(1, 6))
        try:
            table = FaultyTable(gateway.table, self)
            outcome = settle(STREAM, table, self, pending, committed, counters, gateway.flow.life)
        except TemporaryError:
            gateway.flow.failed()
        except Killed:
            self.gateways[number] = GatewayProcess(MemoryRawTable(self.lake, STREAM))
        else:
            gateway.flow.settled(outcome)
            for lane, mark in outcome.committed.items():
                if mark:
                    self._acknowledge(lane.device, lane.epoch, mark)
            for lane, expected in outcome.missing.items():
                self.down.append((lane.device, Rewind(stream=STREAM, epoch=lane.epoch, expected=expected)))
        finally:
            gateway.committing = False

    def deliver_down(self) -> None:
        """An acknowledgement or rewind reaches its device."""
        if self.down:
            name, message = self.down.pop(self._index(self.down))
            if self.devices[name].online:
                self._tell(self.devices[name], message)

    def lose(self) -> None:
        """The broker loses a message."""
        queue: list[object] = self.up if self.choices.chance(0.5) else self.down  # type: ignore[assignment]
        if queue:
            queue.pop(self._index(queue))

    def duplicate(self) -> None:
        """The broker delivers a message twice."""
        queue: list[object] = self.up if self.choices.chance(0.5) else self.down  # type: ignore[assignment]
        if queue and len(queue) < 64:
            queue.append(queue[self._index(queue)])

    def kill_device(self) -> None:
        """kill -9 of an agent: what it had sent is forgotten, what it had stored is not."""
        device = self._device()
        device.restart()
        self._connect(device)

    def kill_gateway(self) -> None:
        """kill -9 of a gateway that is not in the middle of a commit."""
        number = self._index(self.gateways)
        if not self.gateways[number].committing:
            self.gateways[number] = GatewayProcess(MemoryRawTable(self.lake, STREAM))

    def kill_broker(self) -> None:
        """kill -9 of a broker that persists nothing."""
        self.up.clear()
        self.down.clear()
        self.retained.clear()

    def disconnect(self) -> None:
        """A device loses its connection, or gets it back."""
        device = self._device()
        device.online = not device.online
        if device.online:
            self._connect(device)

    def wait(self) -> None:
        """Time passes."""
        self.now_s += self.choices.integer(1, 8)

    def split(self) -> None:
        """A device lets fresh data overtake its backlog."""
        self._device().sender.split_backlog()

    def restore(self) -> None:
        """An older copy of the table takes its place, while gateways hold beliefs about the newer one."""
        commits = self.lake.commits.get(STREAM, [])
        version = self.choices.integer(-1, len(commits) - 1)
        if version < len(commits) - 1:
            gone = [batch for commit in commits[version + 1 :] for batch in commit.batches]
            self.taken_back |= {(batch.device, batch.epoch, batch.seq) for batch in gone}
            self.lake.restore(STREAM, version)

    # What the faulty table asks for.

    def store_trouble(self) -> None:
        """Sometimes the store does not answer."""
        if self.faults and self.choices.chance(0.05):
            raise TemporaryError("the store does not answer; try again")

    def meanwhile(self) -> None:
        """A gateway was frozen between its look at the table and its commit; the world went on."""
        if self._depth >= 1 or not self.faults:
            return
        self._depth += 1
        try:
            for _ in range(self.choices.integer(0, 12)):
                self.step()
        finally:
            self._depth -= 1

    def append(self, records: Sequence[QuarantineRecord]) -> None:
        """Quarantine: a repeated key is harmless."""
        for record in records:
            assert record.device is not None
            assert record.epoch is not None
            assert record.seq is not None
            self.quarantined[record.device, record.epoch, record.seq] = record.payload

    # The promises.

    def check(self) -> None:
        """Safety, after every step: nothing twice, nothing wrong, nothing gone that was accepted and not given up."""
        stored: dict[tuple[str, str, int], int] = {}
        for batch in self.lake.batches(STREAM):
            key = (batch.device, batch.epoch, batch.seq)
            value = batch.batch.column("x")[0].as_py()
            if key in stored:
                raise BrokenPromiseError(f"{key} is in the lake twice")
            if self.accepted.get(key) != value:
                raise BrokenPromiseError(f"{key} has value {value}, accepted was {self.accepted.get(key)}")
            stored[key] = value
        held = {(device.name, epoch, seq) for device in self.devices.values() for epoch, seq in device.held()}
        gone = self.accepted.keys() - stored.keys() - held - self.evicted - self.quarantined.keys() - self.taken_back
        if gone:
            raise BrokenPromiseError(
                f"accepted, and neither in a buffer, nor in the lake, nor given up: {sorted(gone)}"
            )
        for (device, _, seq), value in self.accepted.items():
            if value == POISON and (device, _, seq) in stored:
                raise BrokenPromiseError(f"a refused batch is in the lake: {device} {seq}")

    def drain(self, rounds: int = 400) -> None:
        """Liveness: without further faults everything arrives, and the holes are what was given up.

        Raises:
            BrokenPromiseError: a buffer still holds something after `rounds` rounds, or a gap is false.
        """
        self.faults = False
        for device in self.devices.values():
            if not device.online:
                device.online = True
                self._connect(device)
        for _ in range(rounds):
            if not any(device.held() for device in self.devices.values()):
                break
            for action in (self.send, self.deliver_up, self.deliver_down, self.flush):
                for _ in range(12):
                    action()
            self.now_s += 3
        self.check()
        left = {name: device.held() for name, device in self.devices.items() if device.held()}
        if left:
            raise BrokenPromiseError(f"stuck: {left}")
        stored = {(batch.device, batch.epoch, batch.seq) for batch in self.lake.batches(STREAM)}
        for key in self.accepted.keys() - stored - self.quarantined.keys():
            if key not in self.evicted and key not in self.taken_back:
                raise BrokenPromiseError(f"false gap: {key} was never given up")

    # Helpers.

    def _acknowledge(self, device: str, epoch: str, seq: int) -> None:
        mark = Watermark(STREAM, epoch, seq)
        kept = self.retained.setdefault(device, {}).get((STREAM, epoch))
        if kept is None or kept.seq < seq:
            self.retained[device][STREAM, epoch] = mark
        self.down.append((device, mark))

    def _connect(self, device: Device) -> None:
        device.sender.connected()
        for mark in self.retained.get(device.name, {}).values():
            self._tell(device, mark)

    def _tell(self, device: Device, message: Watermark | Rewind) -> None:
        if isinstance(message, Rewind):
            device.sender.rewind(message, self.now_s)
        elif device.sender.acknowledged(message, self.now_s) is AckOutcome.BUFFER_RESTORED:
            raise BrokenPromiseError(f"{device.name} believes its buffer was restored, but it never was: {message}")

    def _device(self) -> Device:
        devices = list(self.devices.values())
        return devices[self._index(devices)]

    def _index(self, items: Sequence[object]) -> int:
        return self.choices.integer(0, len(items) - 1)


def _body(value: int) -> bytes:
    numbers = pa.array([value], pa.int64())
    if value == POISON:
        return encode_body(pa.record_batch([numbers], names=["x"]))
    return encode_body(pa.record_batch([pa.array([value], pa.timestamp("us", tz="UTC")), numbers], names=["ts", "x"]))


def run(seed: int, steps: int, *, restores: bool = False) -> World:
    """One seeded run: `steps` random steps, then everything drains."""
    world = World(Seeded(seed), restores=restores)
    while world.steps < steps:
        world.step()
    world.drain()
    return world


def main() -> int:
    """Run many seeds: `python -m tests.simulation.world --first 1 --seeds 8000 --steps 250`."""
    parser = argparse.ArgumentParser(description="Run the protocol's model under many seeded schedules.")
    parser.add_argument("--first", type=int, default=1, help="first seed")
    parser.add_argument("--seeds", type=int, default=8_000, help="how many")
    parser.add_argument("--steps", type=int, default=250, help="steps before each world drains")
    chosen = parser.parse_args()
    steps = 0
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        try:
            steps += run(seed, chosen.steps).steps
        except BrokenPromiseError as broken:
            print(f"seed {seed}: {broken}")
            return 1
    print(f"{chosen.seeds} worlds, {steps} steps: nothing lost, nothing doubled, nobody stuck, no false gap")
    return 0


if __name__ == "__main__":
    sys.exit(main())
