"""What the sender may believe about epochs that it inherited, and about a disk that refuses."""

from __future__ import annotations

import random

import pytest

from contract.batches import Clock
from contract.messages import Watermark
from edge_agent.buffer.memory import MemoryBuffer
from edge_agent.buffer.port import BufferUnavailableError, StreamCaps
from edge_agent.sender import AckOutcome, Sender, SenderSettings

CLOCK = Clock(True, 0, 0, "ab" * 16)
BODY = b"x" * 100


def new_buffer() -> MemoryBuffer:
    return MemoryBuffer({"s": StreamCaps(bytes_max=1 << 20, age_max_s=1e9)}, 1 << 30)


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
