"""The buffer on disk does what the buffer in memory does, through any sequence of calls, restarts and kills.

And both keep an account that is simpler than either: every row appended is held, acknowledged, or reported as evicted;
no number is given twice; no cap is exceeded.

Mutants tried, each made this fail: the floor not moved after an eviction; the bytes of a thinned batch not recounted;
`last_seq` not written before the last batch is deleted; thinning that begins at a newer batch after a restart;
acknowledged batches counted as held after their deletion was put off; a drained epoch forgotten on disk only.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edge_agent.buffer.memory import MemoryBuffer
from edge_agent.buffer.port import Appended, Eviction, LaneInfo, NewBatch, OpenedKind, StreamCaps, WhenFull
from edge_agent.buffer.sqlite import SqliteBuffer
from tests.contract.buffer_suite import Hands, body_of
from tests.integration.buffer_disk import memory_folder

STREAMS = ("a", "b", "c")
BYTES_MAX = 9_000
bodies = functools.cache(body_of)


def caps(when_full: WhenFull, bytes_max: int, age_max_s: float) -> StreamCaps:
    return StreamCaps(bytes_max=bytes_max, age_max_s=age_max_s, when_full=when_full, thin_keep_every=3)


class BufferMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._folder = memory_folder()
        self.folder: Path = self._folder.__enter__()
        self.generation = 0
        self.now = Hands()
        self.number = 0
        self.epochs: dict[str, str] = {}
        """Epoch on disk → epoch in memory."""
        self.last: dict[tuple[str, str], int] = {}
        self.rows = {"appended": 0, "acknowledged": 0, "evicted": 0}

    @initialize(policies=st.permutations(list(WhenFull)), age_max_s=st.sampled_from([40.0, 1e9]))
    def open(self, policies: list[WhenFull], age_max_s: float) -> None:
        self.caps = {
            stream: caps(policy, size, age_max_s)
            for stream, policy, size in zip(STREAMS, policies, (3_000, 4_000, 6_000), strict=True)
        }
        self.memory = MemoryBuffer(self.caps, BYTES_MAX, self.now)
        self.disk = self.opened()

    def opened(self) -> SqliteBuffer:
        path = self.folder / str(self.generation) / "buffer.db"
        return SqliteBuffer(path, self.caps, BYTES_MAX, self.now, "board", wal_bytes_max=16 * 1024)

    # What can happen

    @rule(stream=st.sampled_from(STREAMS), rows=st.sampled_from([1, 2, 3, 10, 60, 150]))
    def append(self, stream: str, rows: int) -> None:
        new = self.new(stream, rows)
        on_disk, in_memory = self.disk.append(*new), self.memory.append(*new)
        self.account(new, on_disk, in_memory)

    @rule(streams=st.lists(st.sampled_from(STREAMS), max_size=4), rows=st.sampled_from([1, 20, 200]))
    def append_many(self, streams: list[str], rows: int) -> None:
        new = [self.new(stream, rows) for stream in streams]
        for outcome in zip(new, self.disk.append_many(new), self.memory.append_many(new), strict=True):
            self.account(*outcome)

    @rule(data=st.data(), share=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.5]))
    def acknowledge(self, data: st.DataObject, share: float) -> None:
        lanes = self.disk.lanes()
        if lanes:
            info = data.draw(st.sampled_from(lanes))
            self.acknowledge_up_to(info, int(info.last_seq * share))

    @rule(data=st.data(), move=st.sampled_from([None, 0.0, 0.5, 1.0]))
    def open_epoch(self, data: st.DataObject, move: float | None) -> None:
        stream = data.draw(st.sampled_from(STREAMS))
        live = next((info for info in self.disk.lanes() if info.stream == stream and info.live), None)
        after = None if move is None or live is None else int(live.last_seq * move)
        on_disk = self.disk.open_epoch(stream, move_after_seq=after)
        in_memory = self.memory.open_epoch(stream, move_after_seq=after)
        assert on_disk not in self.epochs
        self.epochs[on_disk] = in_memory
        self.last[stream, on_disk] = next(info.last_seq for info in self.disk.lanes() if info.epoch == on_disk)

    @rule(seconds=st.sampled_from([0.0, 1.0, 6.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.now.pass_s(seconds)
        self.disk.maintain()
        self.memory.maintain()
        self.take_evictions()

    @rule()
    def the_clock_is_lost_and_found(self) -> None:
        self.now.synced = not self.now.synced

    @rule(reboot=st.booleans())
    def restart(self, reboot: bool) -> None:
        self.disk.close()
        if reboot:
            self.now.boot_again()
        self.disk = self.opened()
        self.memory.reopen()
        assert self.disk.opened.kind is OpenedKind.RESUMED

    @rule()
    def kill(self) -> None:
        """The files as they are at this moment, opened by a process that knows nothing else."""
        before = {(info.stream, info.epoch): info for info in self.disk.lanes()}
        source = self.folder / str(self.generation)
        self.generation += 1
        shutil.copytree(source, source.with_name(str(self.generation)), ignore=shutil.ignore_patterns("*-shm"))
        self.disk.close()
        shutil.rmtree(source)
        self.disk = self.opened()
        self.memory.reopen()
        assert self.disk.opened.kind is OpenedKind.RESUMED
        for info in self.disk.lanes():
            # What comes back was acknowledged; the uplink sends it again, and is told so again.
            known = before.get((info.stream, info.epoch))
            acknowledged = info.last_seq if known is None else (known.floor or known.last_seq + 1) - 1
            assert known is None or info.last_seq == known.last_seq
            self.disk.acknowledge(info.stream, info.epoch, acknowledged)

    # What must hold

    @invariant()
    def disk_and_memory_agree(self) -> None:
        if not hasattr(self, "disk"):
            return
        on_disk, in_memory = self.disk.lanes(), self.memory.lanes()
        assert sorted(self.told(info) for info in on_disk) == sorted(in_memory)
        for stream in STREAMS:
            old = [self.told(info) for info in on_disk if info.stream == stream]
            assert old == [info for info in in_memory if info.stream == stream], "from old to new"
        for info in on_disk:
            self.compare(info)

    @invariant()
    def caps_hold_and_rows_add_up(self) -> None:
        if not hasattr(self, "disk"):
            return
        lanes = self.disk.lanes()
        assert sum(info.body_bytes for info in lanes) <= BYTES_MAX
        for stream in STREAMS:
            held = sum(info.body_bytes for info in lanes if info.stream == stream)
            assert held <= self.caps[stream].bytes_max
        held_rows = sum(info.rows for info in lanes)
        assert self.rows["appended"] == self.rows["acknowledged"] + self.rows["evicted"] + held_rows

    def teardown(self) -> None:
        if hasattr(self, "disk"):
            self.disk.close()
        self._folder.__exit__(None, None, None)

    # Help

    def new(self, stream: str, rows: int) -> NewBatch:
        self.number += 1
        self.now.pass_s(0.1)
        return NewBatch(stream, bodies(rows, self.number % 17), rows, self.now())

    def account(self, new: NewBatch, on_disk: Appended, in_memory: Appended) -> None:
        self.epochs.setdefault(on_disk.epoch, in_memory.epoch)
        note(f"{new.stream} {on_disk.seq} {on_disk.evictions}")
        assert (self.epochs[on_disk.epoch], *on_disk[1:3]) == in_memory[:3]
        assert [self.told(eviction) for eviction in on_disk.evictions] == list(in_memory.evictions)
        key = (new.stream, on_disk.epoch)
        assert on_disk.seq == self.last.get(key, 0) + 1
        self.last[key] = on_disk.seq
        self.rows["appended"] += new.rows
        self.rows["evicted"] += sum(eviction.rows for eviction in on_disk.evictions)

    def acknowledge_up_to(self, info: LaneInfo, seq: int) -> None:
        before = sum(lane.rows for lane in self.disk.lanes())
        deleted = self.disk.acknowledge(info.stream, info.epoch, seq)
        assert deleted == self.memory.acknowledge(info.stream, self.epochs[info.epoch], seq)
        self.rows["acknowledged"] += before - sum(lane.rows for lane in self.disk.lanes())

    def take_evictions(self) -> None:
        on_disk = self.disk.take_evictions()
        assert [self.told(eviction) for eviction in on_disk] == list(self.memory.take_evictions())
        self.rows["evicted"] += sum(eviction.rows for eviction in on_disk)

    def told(self, thing: Any) -> Any:
        """The same with the epoch as memory calls it."""
        assert isinstance(thing, LaneInfo | Eviction)
        return thing._replace(epoch=self.epochs[thing.epoch])

    def compare(self, info: LaneInfo) -> None:
        stream, epoch = info.stream, self.epochs[info.epoch]
        after, count = 0, 0
        while (batch := self.disk.peek(stream, info.epoch, after)) is not None:
            assert batch._replace(epoch=epoch) == self.memory.peek(stream, epoch, after)
            assert self.disk.body(stream, info.epoch, batch.seq) == self.memory.body(stream, epoch, batch.seq)
            after, count = batch.seq, count + 1
        assert self.memory.peek(stream, epoch, after) is None
        assert count == info.batches
        assert self.disk.floor(stream, info.epoch) == self.memory.floor(stream, epoch) == info.floor


TestBufferMachine = BufferMachine.TestCase
TestBufferMachine.settings = settings(
    max_examples=150, stateful_step_count=50, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
