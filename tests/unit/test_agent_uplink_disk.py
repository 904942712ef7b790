"""The uplink's thread over a disk that refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from contract import topics
from edge_agent import uplink as uplink_module
from edge_agent.buffer.memory import MemoryBuffer
from edge_agent.buffer.port import BufferUnavailableError
from edge_agent.transport import LossCause, Lost, Received
from tests.unit.uplink_bench import READY, Bench, ack, fill, live, wait_until

Benches = Callable[..., Bench]


@pytest.fixture
def bench() -> Iterator[Benches]:
    made: list[Bench] = []

    def make(buffer: MemoryBuffer, **settings: Any) -> Bench:
        made.append(Bench(buffer, **settings))
        return made[-1]

    yield make
    for one in made:
        one.stop()
        assert one.failure is None


class FailingBuffer(MemoryBuffer):
    """A disk that refuses for a while."""

    refusals = 0
    opens_refused = 0
    unreadable: str | None = None
    """A stream whose batches cannot be read."""
    gone = False
    """Nothing can be read at all."""

    def peek(self, stream: str, epoch: str, after_seq: int) -> Any:
        if self.gone:
            raise BufferUnavailableError("the disk refuses")
        return super().peek(stream, epoch, after_seq)

    def fetch(self, stream: str, epoch: str, seq: int) -> Any:
        if stream == self.unreadable:
            raise BufferUnavailableError("the disk refuses")
        return super().fetch(stream, epoch, seq)

    def open_epoch(self, stream: str, *, move_after_seq: int | None = None) -> str:
        if self.opens_refused:
            self.opens_refused -= 1
            raise BufferUnavailableError("the disk refuses")
        return super().open_epoch(stream, move_after_seq=move_after_seq)

    def acknowledge(self, stream: str, epoch: str, seq: int) -> int:
        if self.refusals:
            self.refusals -= 1
            raise BufferUnavailableError("the disk refuses")
        return super().acknowledge(stream, epoch, seq)


def test_an_ack_that_the_disk_refused_is_asked_for_again(bench: Benches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants tried: the sender believing the ack before the buffer has it."""
    monkeypatch.setattr(uplink_module, "TROUBLE_S", 0.01)
    buffer = FailingBuffer({}, 1 << 20)
    buffer.refusals = 1
    one = bench(buffer, ack_timeout_s=0.2, ack_timeout_max_s=0.4)
    connection = one.start_ready()
    epoch = fill(buffer, 1)
    one.uplink.stored(new_lane=True)
    wait_until(lambda: connection.batches(), "sent")
    connection.say(ack("s", epoch, 1))
    wait_until(lambda: len(connection.batches()) == 2, "sent again")
    connection.say(ack("s", epoch, 1))
    wait_until(lambda: buffer.floor("s", epoch) is None, "deleted")


def test_what_the_broker_says_while_the_disk_refuses_is_heard(bench: Benches) -> None:
    """A connection's end is told once: an uplink that missed it would think itself connected for ever.

    Mutants tried: the pause after a refusal spent in taking a signal, and forgetting it.
    """
    buffer = FailingBuffer({}, 1 << 20)
    buffer.gone = True
    fill(buffer, 1)
    one = bench(buffer)
    connection = one.start_ready()
    # However the thread's pauses fall, one of these comes in one of them.
    for number in range(3):
        marker = str(number).encode()
        connection.say(Received(topics.desired("pi-1"), marker))
        wait_until(lambda marker=marker: marker in one.desired, f"document {number} is heard")
    connection.say(Lost(LossCause.LOST, "gone"))
    second = one.transport.attempt(1)
    buffer.gone = False
    second.say(READY)
    wait_until(lambda: second.batches() == [("s", 1)], "sent on the next connection")


def test_a_batch_that_cannot_be_read_does_not_hold_up_other_streams(bench: Benches) -> None:
    """A bad block of a card may never be read again; what lies beside it is sent."""
    buffer = FailingBuffer({}, 1 << 20)
    buffer.unreadable = "s"
    fill(buffer, 1)
    fill(buffer, 200, "t")
    one = bench(buffer, window_batches_max=1_000)
    connection = one.start_ready()
    wait_until(lambda: len(connection.batches()) == 200, "all of the other stream")
    assert {stream for stream, _ in connection.batches()} == {"t"}
    assert one.uplink.state.connected


def test_a_disk_that_refuses_a_new_epoch_delays_that_stream_and_no_other(
    bench: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: the connection was given up."""
    monkeypatch.setattr(uplink_module, "TROUBLE_S", 0.01)
    buffer = FailingBuffer({}, 1 << 20)
    old = fill(buffer, 3)
    buffer.acknowledge("s", old, 3)
    buffer.reopen()
    fill(buffer, 2)
    fill(buffer, 2, "t")
    buffer.opens_refused = 3
    one = bench(buffer)
    connection = one.start_ready()
    wait_until(lambda: len(connection.batches()) == 4, "all is sent in the end")
    assert connection.batches()[:2] == [("t", 1), ("t", 2)]
    assert connection.batches()[2:] == [("s", 1), ("s", 2)]
    assert live(buffer) != old
    assert len(one.transport.attempts) == 1
