"""What every buffer promises. A test class per implementation inherits the suite and says how to make one.

Mutants tried in the memory buffer and in the rules, each made a test here fail: an acknowledgement beyond the last
seq kept as watermark; a seq given again after an acknowledgement; drop_newest without using up the seq; thinning
without the last row; thinning from the newest; the new batch left out of the shares; age taken from an unsynchronised
clock; epochs drained and never forgotten; a hollow epoch forgotten like a drained one; moved batches numbered without
their holes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pyarrow as pa
import pytest

from contract.batches import Clock, Envelope, check_batch
from contract.codec import checksum, decode_body, encode_body
from contract.limits import DEFAULT_LIMITS
from contract.names import is_epoch
from edge_agent.buffer.port import BatchBuffer, Eviction, Hollow, LaneInfo, NewBatch, OpenedKind, StreamCaps, WhenFull

BOOT = "ab" * 16
ROOMY = StreamCaps(bytes_max=1 << 30, age_max_s=1e9)
PLENTY = 1 << 30


class Hands:
    """The device's clocks, moved by hand."""

    def __init__(self) -> None:
        self.synced, self.wall_us, self.monotonic_us, self.boot = True, 1_790_000_000_000_000, 1_000_000, BOOT

    def __call__(self) -> Clock:
        return Clock(synced=self.synced, wall_us=self.wall_us, monotonic_us=self.monotonic_us, boot=self.boot)

    def pass_s(self, seconds: float) -> None:
        self.wall_us += int(seconds * 1e6)
        self.monotonic_us += int(seconds * 1e6)

    def boot_again(self) -> None:
        self.boot = format(int(self.boot, 16) + 1, "032x")
        self.monotonic_us = 1_000_000


def rows_of(count: int, start: int = 0) -> pa.RecordBatch:
    ts = pa.array(range(start, start + count), pa.timestamp("us", "UTC"))
    values = pa.array([(i * 2_654_435_761) % 1_000_003 / 7 for i in range(start, start + count)], pa.float64())
    return pa.record_batch([ts, values], ["ts", "x"])


def body_of(count: int, start: int = 0) -> bytes:
    return encode_body(rows_of(count, start))


def decoded(body: bytes, rows: int) -> pa.RecordBatch:
    clock = Clock(synced=True, wall_us=0, monotonic_us=0, boot=BOOT)
    return decode_body(body, Envelope("d", "s", "0" * 32, 1, 1, rows, 0, clock, 0), DEFAULT_LIMITS)


def held(buffer: BatchBuffer, stream: str, epoch: str) -> list[int]:
    seqs, after = [], 0
    while (batch := buffer.peek(stream, epoch, after)) is not None:
        seqs.append(batch.seq)
        after = batch.seq
    return seqs


def lane_of(buffer: BatchBuffer, stream: str, epoch: str) -> LaneInfo:
    return next(info for info in buffer.lanes() if (info.stream, info.epoch) == (stream, epoch))


class BufferSuite:
    """Inherit, and give `make`."""

    def make(self, caps: Mapping[str, StreamCaps], bytes_max: int, now: Hands) -> BatchBuffer:
        raise NotImplementedError

    @pytest.fixture
    def now(self) -> Hands:
        return Hands()

    @pytest.fixture
    def buffer(self, now: Hands) -> BatchBuffer:
        return self.make({"a": ROOMY, "b": ROOMY}, PLENTY, now)

    # Storing and reading

    def test_batches_are_numbered_from_one_in_every_stream(self, buffer: BatchBuffer, now: Hands) -> None:
        numbers = [buffer.append(stream, b"body", 1, now())[:3] for stream in ("a", "a", "b", "a", "b")]
        epoch_a, epoch_b = numbers[0][0], numbers[2][0]
        a, b = ([(epoch, seq, True) for seq in (1, 2, 3)] for epoch in (epoch_a, epoch_b))
        assert numbers == [a[0], a[1], b[0], a[2], b[1]]
        assert is_epoch(epoch_a)
        assert is_epoch(epoch_b)
        assert epoch_a != epoch_b

    def test_a_batch_reads_back_as_it_was_stored(self, buffer: BatchBuffer, now: Hands) -> None:
        clock = Clock(synced=False, wall_us=-5, monotonic_us=2**52, boot="0123456789abcdef" * 2)
        body = bytes(range(256)) * 300
        epoch, seq, _, _ = buffer.append("a", body, 77, clock)
        batch = buffer.peek("a", epoch, 0)
        assert batch == ("a", epoch, seq, 77, len(body), clock, checksum(body))
        assert buffer.body("a", epoch, seq) == body
        assert buffer.fetch("a", epoch, seq) == (batch, body)

    def test_reading_deletes_nothing(self, buffer: BatchBuffer, now: Hands) -> None:
        epoch = [buffer.append("a", bytes([n]), 1, now()).epoch for n in range(3)].pop()
        for _ in range(2):
            assert held(buffer, "a", epoch) == [1, 2, 3]
            assert [buffer.body("a", epoch, seq) for seq in (1, 2, 3)] == [b"\0", b"\1", b"\2"]

    def test_what_is_not_there_reads_as_nothing(self, buffer: BatchBuffer, now: Hands) -> None:
        epoch = buffer.append("a", b"body", 1, now()).epoch
        for stream, strange in (("a", "0" * 32), ("b", epoch)):
            assert buffer.peek(stream, strange, 0) is None
            assert buffer.body(stream, strange, 1) is None
            assert buffer.fetch(stream, strange, 1) is None
            assert buffer.floor(stream, strange) is None
            assert buffer.acknowledge(stream, strange, 5) == 0
        assert buffer.peek("a", epoch, 1) is None
        assert buffer.peek("a", epoch, 10**9) is None
        assert [buffer.body("a", epoch, seq) for seq in (-1, 0, 2, 2**53)] == [None] * 4

    def test_batches_of_several_streams_go_in_together(self, buffer: BatchBuffer, now: Hands) -> None:
        new = [NewBatch(stream, bytes([n]), 1, now()) for n, stream in enumerate("abaab")]
        appended = buffer.append_many(new)
        assert [outcome.seq for outcome in appended] == [1, 1, 2, 3, 2]
        for batch, outcome in zip(new, appended, strict=True):
            assert buffer.body(batch.stream, outcome.epoch, outcome.seq) == batch.body
        assert list(buffer.append_many([])) == []

    def test_lanes_say_what_is_held(self, buffer: BatchBuffer, now: Hands) -> None:
        first = now()
        epoch = buffer.append("a", b"12345", 10, first).epoch
        now.pass_s(1)
        buffer.append("a", b"123", 7, now())
        assert list(buffer.lanes()) == [LaneInfo("a", epoch, True, 2, 0, 1, 2, 17, 8, first.wall_us)]
        buffer.acknowledge("a", epoch, 1)
        assert list(buffer.lanes()) == [LaneInfo("a", epoch, True, 2, 0, 2, 1, 7, 3, now.wall_us)]
        buffer.acknowledge("a", epoch, 2)
        assert list(buffer.lanes()) == [LaneInfo("a", epoch, True, 2, 0, None, 0, 0, 0, None)]

    # Acknowledging

    def test_an_acknowledgement_deletes_up_to_its_seq_and_nothing_else(self, buffer: BatchBuffer, now: Hands) -> None:
        epoch = [buffer.append("a", bytes([n]), 1, now()).epoch for n in range(5)].pop()
        other = buffer.append("b", b"other", 1, now()).epoch
        assert buffer.acknowledge("a", epoch, 3) == 3
        assert held(buffer, "a", epoch) == [4, 5]
        assert buffer.floor("a", epoch) == 4
        assert [buffer.body("a", epoch, seq) for seq in range(1, 6)] == [None, None, None, b"\3", b"\4"]
        assert held(buffer, "b", other) == [1]

    def test_an_acknowledgement_may_come_again_late_and_out_of_order(self, buffer: BatchBuffer, now: Hands) -> None:
        epoch = [buffer.append("a", bytes([n]), 1, now()).epoch for n in range(5)].pop()
        assert [buffer.acknowledge("a", epoch, seq) for seq in (2, 2, 1, 0, -1, 4, 3)] == [2, 0, 0, 0, 0, 2, 0]
        assert held(buffer, "a", epoch) == [5]

    def test_an_acknowledgement_beyond_the_last_seq_takes_no_later_batch(self, buffer: BatchBuffer, now: Hands) -> None:
        epoch = buffer.append("a", b"one", 1, now()).epoch
        assert buffer.acknowledge("a", epoch, 1_000) == 1
        assert buffer.append("a", b"two", 1, now())[:2] == (epoch, 2)
        assert held(buffer, "a", epoch) == [2]
        assert buffer.acknowledge("a", epoch, 1) == 0
        assert held(buffer, "a", epoch) == [2]

    def test_a_number_is_never_given_twice(self, buffer: BatchBuffer, now: Hands) -> None:
        seen: list[int] = []
        for n in range(6):
            outcome = buffer.append("a", bytes([n]), 1, now())
            seen.append(outcome.seq)
            buffer.acknowledge("a", outcome.epoch, outcome.seq)
        assert seen == [1, 2, 3, 4, 5, 6]

    # Epochs

    def test_a_new_epoch_takes_what_is_new_and_the_old_one_drains(self, buffer: BatchBuffer, now: Hands) -> None:
        old = [buffer.append("a", bytes([n]), 1, now()).epoch for n in range(3)].pop()
        other = buffer.append("b", b"other", 1, now()).epoch
        new = buffer.open_epoch("a")
        assert new != old
        assert buffer.append("a", b"new", 1, now())[:2] == (new, 1)
        assert [(info.epoch, info.live) for info in buffer.lanes()] == [(other, True), (new, True), (old, False)]
        assert held(buffer, "a", old) == [1, 2, 3]
        assert buffer.acknowledge("a", old, 2) == 2
        assert buffer.floor("a", old) == 3
        assert buffer.acknowledge("a", old, 3) == 1
        assert [(info.epoch, info.live) for info in buffer.lanes()] == [(other, True), (new, True)]
        assert buffer.floor("a", old) is None

    def test_a_drained_live_epoch_is_remembered_and_an_emptied_old_one_is_not(
        self, buffer: BatchBuffer, now: Hands
    ) -> None:
        epoch = buffer.append("a", b"one", 1, now()).epoch
        buffer.acknowledge("a", epoch, 1)
        assert [info.epoch for info in buffer.lanes()] == [epoch]
        new = buffer.open_epoch("a")
        assert [info.epoch for info in buffer.lanes()] == [new]
        assert lane_of(buffer, "a", new) == LaneInfo("a", new, True, 0, 0, None, 0, 0, 0, None)

    def test_an_epoch_may_begin_before_the_first_batch(self, buffer: BatchBuffer, now: Hands) -> None:
        epoch = buffer.open_epoch("a")
        assert buffer.append("a", b"one", 1, now())[:2] == (epoch, 1)

    def test_old_epochs_are_listed_from_old_to_new(self, buffer: BatchBuffer, now: Hands) -> None:
        epochs = []
        for _ in range(4):
            epochs.append(buffer.append("a", b"one", 1, now()).epoch)
            buffer.open_epoch("a")
        assert [info.epoch for info in buffer.lanes()][1:] == epochs

    def test_batches_above_a_seq_move_to_the_new_epoch(self, buffer: BatchBuffer, now: Hands) -> None:
        old = [buffer.append("a", bytes([n]), n, now()).epoch for n in range(1, 7)].pop()
        new = buffer.open_epoch("a", move_after_seq=4)
        assert held(buffer, "a", old) == [1, 2, 3, 4]
        assert held(buffer, "a", new) == [1, 2]
        assert [buffer.body("a", new, seq) for seq in (1, 2)] == [b"\5", b"\6"]
        assert lane_of(buffer, "a", new)[3:9] == (2, 0, 1, 2, 11, 2)
        assert lane_of(buffer, "a", old)[3:9] == (4, 0, 1, 4, 10, 4)
        assert buffer.append("a", b"next", 1, now())[:2] == (new, 3)
        assert buffer.acknowledge("a", old, 6) == 4
        assert held(buffer, "a", new) == [1, 2, 3]
        assert buffer.acknowledge("a", new, 2) == 2
        assert held(buffer, "a", new) == [3]

    def test_what_was_lost_among_moved_batches_stays_a_hole(self, now: Hands) -> None:
        caps = StreamCaps(bytes_max=30, age_max_s=1e9, when_full=WhenFull.DROP_NEWEST)
        buffer = self.make({"a": caps}, PLENTY, now)
        old = [buffer.append("a", b"0123456789", 1, now()).epoch for _ in range(3)].pop()
        assert not buffer.append("a", b"refused", 1, now()).stored
        buffer.acknowledge("a", old, 1)
        assert buffer.append("a", b"012345678", 1, now()).seq == 5
        new = buffer.open_epoch("a", move_after_seq=2)
        assert held(buffer, "a", old) == [2]
        assert held(buffer, "a", new) == [1, 3]
        assert buffer.floor("a", new) == 1

    @pytest.mark.parametrize("beyond", [3, 4, 1_000])
    def test_nothing_moves_where_nothing_lies_above(self, buffer: BatchBuffer, now: Hands, beyond: int) -> None:
        old = [buffer.append("a", bytes([n]), 1, now()).epoch for n in range(3)].pop()
        new = buffer.open_epoch("a", move_after_seq=beyond)
        assert held(buffer, "a", old) == [1, 2, 3]
        assert buffer.append("a", b"next", 1, now())[:2] == (new, 1)

    def test_everything_can_move(self, buffer: BatchBuffer, now: Hands) -> None:
        old = [buffer.append("a", bytes([n]), 1, now()).epoch for n in range(4)].pop()
        buffer.acknowledge("a", old, 1)
        new = buffer.open_epoch("a", move_after_seq=0)
        assert [info.epoch for info in buffer.lanes()] == [new]
        assert held(buffer, "a", new) == [2, 3, 4]
        again = buffer.open_epoch("a", move_after_seq=2)
        assert held(buffer, "a", new) == [2]
        assert held(buffer, "a", again) == [1, 2]
        assert [buffer.body("a", again, seq) for seq in (1, 2)] == [b"\2", b"\3"]

    # Full

    def test_drop_oldest_gives_up_the_oldest_and_says_so(self, now: Hands) -> None:
        buffer = self.make({"a": StreamCaps(bytes_max=35, age_max_s=1e9)}, PLENTY, now)
        epoch = [buffer.append("a", b"0123456789", 4, now()).epoch for _ in range(3)].pop()
        outcome = buffer.append("a", b"0123456789", 4, now())
        assert outcome == (epoch, 4, True, (Eviction("a", epoch, 1, 1, 4, "bytes_max"),))
        outcome = buffer.append("a", b"0" * 30, 4, now())
        assert outcome.evictions == (Eviction("a", epoch, 2, 4, 12, "bytes_max"),)
        assert held(buffer, "a", epoch) == [5]
        assert buffer.floor("a", epoch) == 5
        assert lane_of(buffer, "a", epoch).body_bytes == 30

    def test_drop_oldest_begins_with_the_oldest_epoch(self, now: Hands) -> None:
        buffer = self.make({"a": StreamCaps(bytes_max=30, age_max_s=1e9)}, PLENTY, now)
        old = [buffer.append("a", b"0123456789", 1, now()).epoch for _ in range(2)].pop()
        new = buffer.open_epoch("a")
        buffer.append("a", b"0123456789", 1, now())
        outcome = buffer.append("a", b"0" * 20, 1, now())
        assert outcome.evictions == (Eviction("a", old, 1, 2, 2, "bytes_max"),)
        assert [info.epoch for info in buffer.lanes()] == [new]

    def test_drop_newest_uses_a_number_and_stores_nothing(self, now: Hands) -> None:
        caps = StreamCaps(bytes_max=20, age_max_s=1e9, when_full=WhenFull.DROP_NEWEST)
        buffer = self.make({"a": caps}, PLENTY, now)
        epoch = [buffer.append("a", b"0123456789", 4, now()).epoch for _ in range(2)].pop()
        refused = buffer.append("a", b"01234", 9, now())
        assert refused == (epoch, 3, False, (Eviction("a", epoch, 3, 3, 9, "refused"),))
        assert lane_of(buffer, "a", epoch).last_seq == 3
        assert held(buffer, "a", epoch) == [1, 2]
        buffer.acknowledge("a", epoch, 2)
        assert buffer.floor("a", epoch) is None
        assert buffer.append("a", b"01234", 9, now())[:3] == (epoch, 4, True)
        assert buffer.floor("a", epoch) == 4

    @pytest.mark.parametrize("when_full", list(WhenFull))
    def test_a_batch_larger_than_its_part_drives_nothing_else_out(self, now: Hands, when_full: WhenFull) -> None:
        caps = {"a": StreamCaps(bytes_max=20, age_max_s=1e9, when_full=when_full), "b": ROOMY}
        buffer = self.make(caps, 50, now)
        epoch = buffer.append("a", b"0123456789", 1, now()).epoch
        outcome = buffer.append("a", b"0" * 21, 7, now())
        assert outcome == (epoch, 2, False, (Eviction("a", epoch, 2, 2, 7, "bytes_max"),))
        other = buffer.append("b", b"0" * 51, 8, now())
        assert other == (other.epoch, 1, False, (Eviction("b", other.epoch, 1, 1, 8, "bytes_max"),))
        assert held(buffer, "a", epoch) == [1]

    def test_the_whole_buffer_is_taken_from_the_stream_most_over_its_share(self, now: Hands) -> None:
        caps = {
            "a": StreamCaps(bytes_max=100, age_max_s=1e9),
            "b": StreamCaps(bytes_max=50, age_max_s=1e9, when_full=WhenFull.DROP_NEWEST),
        }
        buffer = self.make(caps, 90, now)
        epoch_a = [buffer.append("a", b"0123456789", 1, now()).epoch for _ in range(5)].pop()
        epoch_b = [buffer.append("b", b"0123456789", 1, now()).epoch for _ in range(4)].pop()
        # 50 of 100 against 40 of 50: b is the fuller one, and of b the newest gives way.
        outcome = buffer.append("a", b"0123456789", 1, now())
        assert outcome.evictions == (Eviction("b", epoch_b, 4, 4, 1, "bytes_max"),)
        assert held(buffer, "b", epoch_b) == [1, 2, 3]
        # 60 of 100 against 40 of 50, the one coming in counted: it is refused itself.
        outcome = buffer.append("b", b"0123456789", 1, now())
        assert outcome[1:] == (5, False, (Eviction("b", epoch_b, 5, 5, 1, "refused"),))
        assert sum(info.body_bytes for info in buffer.lanes()) == 90
        # 85 of 100 against 30 of 50.
        outcome = buffer.append("a", b"0" * 25, 1, now())
        assert outcome.evictions == (Eviction("a", epoch_a, 1, 3, 3, "bytes_max"),)

    def test_acknowledged_batches_make_room(self, now: Hands) -> None:
        buffer = self.make({"a": StreamCaps(bytes_max=20, age_max_s=1e9)}, PLENTY, now)
        epoch = [buffer.append("a", b"0123456789", 1, now()).epoch for _ in range(2)].pop()
        buffer.acknowledge("a", epoch, 1)
        assert buffer.append("a", b"0123456789", 1, now()).evictions == ()
        assert held(buffer, "a", epoch) == [2, 3]

    def test_a_stream_without_caps_of_its_own_is_kept_too(self, buffer: BatchBuffer, now: Hands) -> None:
        assert buffer.append("unheard-of", b"body", 1, now()).stored

    # The end of a closed epoch

    def test_an_epoch_that_ends_in_a_hole_is_remembered_until_it_is_told(self, now: Hands) -> None:
        caps = StreamCaps(bytes_max=20, age_max_s=60)
        buffer = self.make({"a": caps}, PLENTY, now)
        old = [buffer.append("a", b"0123456789", 1, now()).epoch for _ in range(2)].pop()
        assert buffer.hollow() == []
        buffer.acknowledge("a", old, 1)
        new = buffer.open_epoch("a")
        assert buffer.hollow() == []
        now.pass_s(61)
        buffer.maintain()
        assert held(buffer, "a", old) == []
        assert buffer.hollow() == [Hollow("a", old, 2)]
        assert [info.epoch for info in buffer.lanes()] == [new]
        buffer.forget("a", new)
        assert buffer.append("a", b"0123456789", 1, now())[:2] == (new, 1)
        buffer.forget("a", old)
        assert buffer.hollow() == []

    def test_an_epoch_whose_end_was_refused_is_hollow_once_the_rest_is_drained(self, now: Hands) -> None:
        caps = StreamCaps(bytes_max=20, age_max_s=1e9, when_full=WhenFull.DROP_NEWEST)
        buffer = self.make({"a": caps}, PLENTY, now)
        old = [buffer.append("a", b"0123456789", 1, now()).epoch for _ in range(4)].pop()
        buffer.open_epoch("a")
        buffer.acknowledge("a", old, 1)
        assert buffer.hollow() == []
        buffer.acknowledge("a", old, 2)
        for _ in range(3):
            now.pass_s(10)
            buffer.maintain()
        assert buffer.hollow() == [Hollow("a", old, 4)]

    def test_an_epoch_that_is_drained_to_its_end_is_not_hollow(self, buffer: BatchBuffer, now: Hands) -> None:
        old = [buffer.append("a", b"0123456789", 1, now()).epoch for _ in range(3)].pop()
        buffer.open_epoch("a")
        buffer.acknowledge("a", old, 3)
        now.pass_s(10)
        buffer.maintain()
        assert buffer.hollow() == []

    # Thin

    def thin(self, now: Hands, bytes_max: int, keep_every: int = 4) -> BatchBuffer:
        caps = StreamCaps(bytes_max=bytes_max, age_max_s=1e9, when_full=WhenFull.THIN, thin_keep_every=keep_every)
        return self.make({"a": caps}, PLENTY, now)

    def test_thinning_keeps_every_kth_row_and_the_last_with_their_numbers(self, now: Hands) -> None:
        body = body_of(400)
        buffer = self.thin(now, 2 * len(body) + 10)
        epoch = [buffer.append("a", body, 400, now()).epoch for _ in range(2)].pop()
        outcome = buffer.append("a", body, 400, now())
        kept = [*range(0, 400, 4), 399]
        assert outcome.evictions == (Eviction("a", epoch, 1, 2, 2 * (400 - len(kept)), "thinned"),)
        for seq in (1, 2):
            fetched = buffer.fetch("a", epoch, seq)
            assert fetched is not None
            stored, thinned = fetched
            batch = decoded(thinned, stored.rows)
            check_batch(batch, DEFAULT_LIMITS)
            assert batch.drop_columns(["_row"]).to_pylist() == rows_of(400).take(pa.array(kept)).to_pylist()
            assert batch.schema.remove(2).equals(rows_of(1).schema, check_metadata=True)
            assert batch.column("_row").to_pylist() == kept
            assert stored == buffer.peek("a", epoch, seq - 1)
            assert stored[3:] == (len(kept), len(thinned), now(), checksum(thinned))
        assert buffer.body("a", epoch, 3) == body
        assert held(buffer, "a", epoch) == [1, 2, 3]

    def test_no_more_is_thinned_than_has_to_be_and_the_oldest_first(self, now: Hands) -> None:
        body, small = body_of(400), body_of(1)
        buffer = self.thin(now, 2 * len(body) + len(small) - 1)
        epoch = [buffer.append("a", body, 400, now()).epoch for _ in range(2)].pop()
        outcome = buffer.append("a", small, 1, now())
        assert outcome.evictions == (Eviction("a", epoch, 1, 1, 299, "thinned"),)
        assert buffer.body("a", epoch, 2) == body

    def test_thinning_begins_with_the_oldest_and_spares_none_twice_before_all_once(self, now: Hands) -> None:
        body = body_of(400)
        buffer = self.thin(now, 4 * len(body))
        rows_lost = 0
        for n in range(7):
            outcome = buffer.append("a", body, 400, now())
            assert outcome.seq == n + 1
            rows_lost += sum(eviction.rows for eviction in outcome.evictions)
            assert {eviction.cause for eviction in outcome.evictions} <= {"thinned"}
        batches = [buffer.peek("a", outcome.epoch, seq - 1) for seq in range(1, 8)]
        rows = [batch.rows for batch in batches if batch]
        assert rows == sorted(rows)
        assert set(rows) == {101, 400}
        assert sum(rows) + rows_lost == 7 * 400

    def test_what_is_thinned_again_keeps_its_first_numbers(self, now: Hands) -> None:
        body = body_of(400)
        buffer = self.thin(now, 2 * len(body), keep_every=4)
        epoch = buffer.append("a", body, 400, now()).epoch
        while (batch := buffer.peek("a", epoch, 0)) is not None and batch.rows > 101:
            buffer.append("a", body, 400, now())
        while (batch := buffer.peek("a", epoch, 0)) is not None and batch.rows == 101:
            buffer.append("a", body, 400, now())
        assert batch is not None
        assert batch.seq == 1
        found = buffer.body("a", epoch, 1)
        assert found is not None
        once = [*range(0, 400, 4), 399]
        twice = [*once[::4]] if (len(once) - 1) % 4 == 0 else [*once[::4], once[-1]]
        thinned = decoded(found, batch.rows)
        assert thinned.column("_row").to_pylist() == twice
        assert thinned.column("x").to_pylist() == [rows_of(400).column("x")[row].as_py() for row in twice]

    def test_where_thinning_gains_nothing_the_oldest_goes(self, now: Hands) -> None:
        body = body_of(30)
        buffer = self.thin(now, 2 * len(body))
        for _ in range(20):
            outcome = buffer.append("a", body, 30, now())
        seqs = held(buffer, "a", outcome.epoch)
        assert 1 < len(seqs) < 20
        assert seqs == list(range(seqs[0], 21))
        assert lane_of(buffer, "a", outcome.epoch).body_bytes <= 2 * len(body)

    def test_what_is_no_body_is_not_thinned_but_dropped(self, now: Hands) -> None:
        buffer = self.thin(now, 30)
        epoch = [buffer.append("a", b"0123456789", 5, now()).epoch for _ in range(3)].pop()
        outcome = buffer.append("a", b"0123456789", 5, now())
        assert outcome.evictions == (Eviction("a", epoch, 1, 1, 5, "bytes_max"),)

    # Age

    def test_batches_too_old_are_given_up(self, now: Hands) -> None:
        buffer = self.make({"a": StreamCaps(bytes_max=100, age_max_s=60)}, PLENTY, now)
        epoch = [buffer.append("a", b"x", 3, now()).epoch for _ in range(2)].pop()
        now.pass_s(40)
        buffer.append("a", b"x", 3, now())
        now.pass_s(21)
        assert buffer.take_evictions() == ()
        buffer.maintain()
        assert buffer.take_evictions() == (Eviction("a", epoch, 1, 2, 6, "age_max"),)
        assert buffer.take_evictions() == ()
        assert held(buffer, "a", epoch) == [3]
        now.pass_s(40)
        outcome = buffer.append("a", b"x", 3, now())
        assert outcome == (epoch, 4, True, (Eviction("a", epoch, 3, 3, 3, "age_max"),))

    def test_an_hour_that_the_clock_jumped_makes_nothing_old(self, now: Hands) -> None:
        buffer = self.make({"a": StreamCaps(bytes_max=100, age_max_s=60)}, PLENTY, now)
        buffer.append("a", b"x", 3, now())
        now.wall_us += 3_600_000_000
        buffer.maintain()
        assert buffer.append("a", b"x", 3, now()).evictions == ()
        assert buffer.take_evictions() == ()

    def test_batches_stamped_before_the_clock_was_set_are_not_taken_for_old(self, now: Hands) -> None:
        buffer = self.make({"a": StreamCaps(bytes_max=100, age_max_s=60)}, PLENTY, now)
        stale = Clock(synced=False, wall_us=0, monotonic_us=5, boot="cd" * 16)
        epoch = buffer.append("a", b"x", 3, stale).epoch
        buffer.maintain()
        assert buffer.take_evictions() == ()
        now.pass_s(61)
        buffer.maintain()
        assert buffer.take_evictions() == (Eviction("a", epoch, 1, 1, 3, "age_max"),)

    def test_an_age_over_a_restart_is_read_from_clocks_that_were_right(self, now: Hands) -> None:
        buffer = self.make({"a": StreamCaps(bytes_max=100, age_max_s=60)}, PLENTY, now)
        day_ago = Clock(synced=True, wall_us=now.wall_us - 86_400_000_000, monotonic_us=5, boot="cd" * 16)
        epoch = buffer.append("a", b"x", 3, day_ago).epoch
        now.synced = False
        buffer.maintain()
        assert buffer.take_evictions() == ()
        now.synced = True
        buffer.maintain()
        assert buffer.take_evictions() == (Eviction("a", epoch, 1, 1, 3, "age_max"),)

    # Altogether

    @pytest.mark.parametrize("when_full", list(WhenFull))
    def test_every_row_is_held_acknowledged_or_accounted_for(self, now: Hands, when_full: WhenFull) -> None:
        caps = {
            "a": StreamCaps(bytes_max=6_000, age_max_s=50, when_full=when_full, thin_keep_every=3),
            "b": StreamCaps(bytes_max=4_000, age_max_s=70),
        }
        buffer = self.make(caps, 8_000, now)
        appended = acknowledged = evicted = 0
        for n in range(120):
            stream, rows = ("a", "b")[n % 3 == 0], 5 + 13 * n % 60
            outcome = buffer.append(stream, body_of(rows, n), rows, now())
            appended += rows
            evicted += sum(eviction.rows for eviction in outcome.evictions)
            assert sum(info.body_bytes for info in buffer.lanes()) <= 8_000
            now.pass_s(n % 5)
            if n % 31 == 30:
                buffer.open_epoch(stream)
            if n % 7 == 6:
                before = sum(info.rows for info in buffer.lanes())
                buffer.acknowledge(stream, outcome.epoch, outcome.seq - 2)
                acknowledged += before - sum(info.rows for info in buffer.lanes())
            if n % 11 == 10:
                buffer.maintain()
            evicted += sum(eviction.rows for eviction in buffer.take_evictions())
        assert appended == acknowledged + evicted + sum(info.rows for info in buffer.lanes())
        assert evicted > 0
        assert acknowledged > 0

    def test_threads_that_append_read_and_acknowledge_do_not_disturb_each_other(self, now: Hands) -> None:
        buffer = self.make({"a": ROOMY, "b": ROOMY}, PLENTY, now)
        per_stream = 60
        problems: list[object] = []
        epochs = {stream: buffer.open_epoch(stream) for stream in ("a", "b")}

        def append(stream: str) -> None:
            for n in range(per_stream):
                outcome = buffer.append(stream, f"{stream}{n + 1}".encode() * 50, 1, now())
                if outcome.seq != n + 1:
                    problems.append(outcome)

        def send(stream: str) -> None:
            done = 0
            while done < per_stream:
                batch = buffer.peek(stream, epochs[stream], done)
                if batch is None:
                    finished.wait(0.001)
                    continue
                body = buffer.body(stream, epochs[stream], batch.seq)
                if batch.seq != done + 1 or body != f"{stream}{batch.seq}".encode() * 50:
                    problems.append((batch, body))
                done = batch.seq
                if done % 3 == 0:
                    buffer.acknowledge(stream, epochs[stream], done)

        finished = threading.Event()
        threads = [threading.Thread(target=job, args=(stream,)) for job in (append, send) for stream in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert problems == []
        assert not any(thread.is_alive() for thread in threads)
        assert [info.batches for info in buffer.lanes()] == [0, 0]

    def test_a_new_buffer_says_so(self, buffer: BatchBuffer) -> None:
        assert getattr(buffer, "opened").kind is OpenedKind.NEW  # noqa: B009
