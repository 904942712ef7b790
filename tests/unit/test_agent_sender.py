"""What the sender may believe about epochs that it inherited, and about a disk that refuses."""

from __future__ import annotations

import random

import pytest

from contract.batches import Clock
from contract.messages import Rewind, Watermark
from edge_agent.buffer.memory import MemoryBuffer
from edge_agent.buffer.port import BufferUnavailableError, StreamCaps
from edge_agent.sender import DRAINING_EPOCHS_MAX, AckOutcome, Sender, SenderSettings

CLOCK = Clock(True, 0, 0, "ab" * 16)
BODY = b"x" * 100


def new_buffer() -> MemoryBuffer:
    return MemoryBuffer({"s": StreamCaps(bytes_max=1 << 20, age_max_s=1e9)}, 1 << 30)


LARGE = b"y" * 6_000
"""More than a window of these tests."""


def first_in_flight(sender: Sender) -> tuple[str, str, int] | None:
    """(stream, epoch, seq) of one batch that is on the way; of a large one only when there is nothing else."""
    found = [(key, next(iter(lane.in_flight))) for key, lane in sender._lanes.items() if lane.in_flight]
    found.sort(key=lambda each: each[0][0] == "large")
    return (*found[0][0], found[0][1]) if found else None


def rounds_until_large_is_sent(sender: Sender, buffer: MemoryBuffer, streams: list[str]) -> int:
    """Rounds in which everything that may be sent is, then one batch is acknowledged, and a fresh one comes in."""
    for number in range(200):
        while (batch := sender.next_batch(0.0)) is not None:
            sender.sent(batch, 0.0)
            if batch.stream == "large":
                return number
        oldest = first_in_flight(sender)
        assert oldest is not None
        sender.acknowledged(Watermark(*oldest), 0.0)
        buffer.append(streams[number % len(streams)], BODY, 1, CLOCK)
        sender.refresh_lanes()
    raise AssertionError("the large batch was never sent")


def new_sender(buffer: MemoryBuffer, backlog_bytes_max: int = 1_000) -> Sender:
    return Sender(buffer, SenderSettings(backlog_bytes_max=backlog_bytes_max), random.Random(1))


def fill(buffer: MemoryBuffer, batches: int) -> str:
    for _ in range(batches):
        epoch = buffer.append("s", BODY, 1, CLOCK).epoch
    return epoch


def send_all(sender: Sender) -> list[int]:
    sent = []
    while (batch := sender.next_batch(0.0)) is not None:
        sender.sent(batch, 0.0)
        sent.append(batch.seq)
    return sent


def test_an_inherited_epoch_is_tried_with_one_batch_even_if_nothing_was_stored_in_it_before() -> None:
    """The buffer may have been restored to the moment when the epoch was made, and the lake may have hundreds of it.

    Mutants tried: an empty inherited epoch trusted at once.
    """
    buffer = new_buffer()
    fill(buffer, 1)
    epoch = buffer.open_epoch("s", move_after_seq=0)
    buffer.acknowledge("s", epoch, 1)
    epoch = buffer.open_epoch("s")
    buffer.reopen()
    sender = new_sender(buffer)
    fill(buffer, 3)
    sender.refresh_lanes()
    assert send_all(sender) == [1]
    assert sender.acknowledged(Watermark("s", epoch, 50), 0.0) is AckOutcome.BUFFER_RESTORED
    assert send_all(sender) == [1, 2, 3]


def test_an_epoch_made_by_this_process_is_sent_without_a_trial() -> None:
    buffer = new_buffer()
    sender = new_sender(buffer)
    fill(buffer, 3)
    sender.refresh_lanes()
    assert send_all(sender) == [1, 2, 3]


def test_fresh_batches_of_a_restored_buffer_survive_a_backlog() -> None:
    """Split before the first ack, the fresh batches would stand in an epoch that drains, and be deleted by the very ack
    that shows that the buffer was restored.

    Mutants tried: backlogs split before the first ack.
    """
    buffer = new_buffer()
    epoch = fill(buffer, 20)
    buffer.reopen()
    fill(buffer, 5)
    sender = new_sender(buffer)
    assert sender.split_backlog() == []
    sender.acknowledged(Watermark("s", epoch, 40), 0.0)
    assert sum(lane.batches for lane in buffer.lanes()) == 5
    assert send_all(sender) == [1, 2, 3, 4, 5]


def test_a_backlog_is_split_after_the_first_ack_and_fresh_batches_go_first() -> None:
    buffer = new_buffer()
    epoch = fill(buffer, 20)
    buffer.reopen()
    sender = new_sender(buffer)
    assert send_all(sender) == [1]
    sender.acknowledged(Watermark("s", epoch, 1), 0.0)
    assert sender.split_backlog() == ["s"]
    fresh = fill(buffer, 1)
    assert fresh != epoch
    batch = sender.next_batch(0.0)
    assert batch is not None
    assert (batch.epoch, batch.seq) == (fresh, 1)


def test_a_second_outage_before_the_first_backlog_is_through_does_not_hold_fresh_batches_back() -> None:
    """Before: one draining epoch at a time."""
    buffer = new_buffer()
    sender = new_sender(buffer)
    for number in range(DRAINING_EPOCHS_MAX + 2):
        epoch = fill(buffer, 20)
        sender.refresh_lanes()
        split = sender.split_backlog()
        assert split == (["s"] if number < DRAINING_EPOCHS_MAX else [])
    fresh = fill(buffer, 1)
    assert fresh == epoch
    assert sum(not lane.live for lane in buffer.lanes()) == DRAINING_EPOCHS_MAX
    batch = sender.next_batch(0.0)
    assert batch is not None
    assert batch.epoch == fresh


def test_an_ack_that_the_disk_refused_has_changed_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants tried: the sender's own books written first."""
    buffer = new_buffer()
    epoch = fill(buffer, 1)
    sender = new_sender(buffer)
    send_all(sender)

    def refuse(*_: object) -> int:
        raise BufferUnavailableError("the disk refuses")

    with monkeypatch.context() as patch:
        patch.setattr(buffer, "acknowledge", refuse)
        with pytest.raises(BufferUnavailableError):
            sender.acknowledged(Watermark("s", epoch, 1), 0.0)
    assert sender.in_flight_batches == 1
    assert sender.acknowledged(Watermark("s", epoch, 1), 0.0) is AckOutcome.PROGRESS
    assert buffer.floor("s", epoch) is None


def test_a_batch_larger_than_the_window_is_sent_although_others_never_leave_the_line_empty() -> None:
    """Before: smaller ones were let past it."""
    buffer = MemoryBuffer({}, 1 << 30)
    streams = ["a", "b", "c"]
    for stream in streams:
        for _ in range(20):
            buffer.append(stream, BODY, 1, CLOCK)
    sender = Sender(buffer, SenderSettings(window_batches_max=10, window_bytes_max=5_000), random.Random(1))
    for lane in sender._lanes.values():
        lane.confirmed = True
    assert len(send_all(sender)) == 10
    buffer.append("large", LARGE, 1, CLOCK)
    sender.refresh_lanes()
    assert rounds_until_large_is_sent(sender, buffer, streams) < 30


def test_a_large_fresh_batch_is_sent_although_a_backlog_drains() -> None:
    """Before: the backlog was not held back for it."""
    buffer = MemoryBuffer({}, 1 << 30)
    for _ in range(150):
        buffer.append("s", BODY, 1, CLOCK)
    sender = Sender(buffer, SenderSettings(window_batches_max=10, window_bytes_max=5_000), random.Random(1))
    for lane in sender._lanes.values():
        lane.confirmed = True
    buffer.open_epoch("s")
    sender.refresh_lanes()
    assert len(send_all(sender)) == 5
    buffer.append("large", LARGE, 1, CLOCK)
    sender.refresh_lanes()
    assert rounds_until_large_is_sent(sender, buffer, ["s"]) < 30


def test_what_is_on_the_way_is_counted_right_through_acks_rewinds_and_resends() -> None:
    buffer = MemoryBuffer({}, 1 << 30)
    sizes = [10, 20, 30, 40, 50]
    epochs = {buffer.append("s", b"x" * size, 1, CLOCK).epoch for size in sizes}
    (epoch,) = epochs
    sender = Sender(buffer, SenderSettings(ack_timeout_s=1.0), random.Random(1))
    sender._lanes["s", epoch].confirmed = True
    assert send_all(sender) == [1, 2, 3, 4, 5]
    assert (sender.in_flight_batches, sender.in_flight_bytes) == (5, 150)
    sender.acknowledged(Watermark("s", epoch, 2), 0.0)
    assert (sender.in_flight_batches, sender.in_flight_bytes) == (3, 120)
    sender.rewind(Rewind(stream="s", epoch=epoch, expected=4), 0.0)
    assert (sender.in_flight_batches, sender.in_flight_bytes) == (1, 30)
    assert send_all(sender) == [4, 5]
    assert (sender.in_flight_batches, sender.in_flight_bytes) == (3, 120)
    assert sender.next_batch(10.0) is not None
    assert (sender.in_flight_batches, sender.in_flight_bytes) == (0, 0)


def test_a_timeout_counts_only_for_what_has_reached_the_broker() -> None:
    """Before: counted from the handing over."""
    buffer = MemoryBuffer({}, 1 << 30)
    sender = Sender(buffer, SenderSettings(ack_timeout_s=1.0), random.Random(1))
    buffer.append("s", BODY, 1, CLOCK)
    buffer.append("s", BODY, 1, CLOCK)
    sender.refresh_lanes()
    for number in (7, 8):
        batch = sender.next_batch(0.0)
        assert batch is not None
        sender.sent(batch, 0.0, number)
    assert sender.next_batch(100.0, answered=6) is None
    assert (sender.in_flight_batches, sender.resent_timeouts) == (2, 0)
    assert sender.next_batch(101.5, answered=7) is not None
    assert (sender.in_flight_batches, sender.resent_timeouts) == (0, 1)
