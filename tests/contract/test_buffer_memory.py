"""The memory buffer keeps the promises of every buffer; and its restarts are those of a disk."""

from __future__ import annotations

from collections.abc import Mapping

from edge_agent.buffer.memory import MemoryBuffer
from edge_agent.buffer.port import BatchBuffer, OpenedKind, StreamCaps
from tests.contract.buffer_suite import PLENTY, ROOMY, BufferSuite, Hands, held


class TestMemoryBuffer(BufferSuite):
    def make(self, caps: Mapping[str, StreamCaps], bytes_max: int, now: Hands) -> BatchBuffer:
        return MemoryBuffer(caps, bytes_max, now)


def test_a_restart_keeps_what_is_held_and_remembers_the_numbers() -> None:
    now = Hands()
    buffer = MemoryBuffer({"a": ROOMY}, PLENTY, now)
    epoch = [buffer.append("a", bytes([n]), 1, now()).epoch for n in range(3)].pop()
    buffer.acknowledge("a", epoch, 3)
    buffer.reopen()
    assert buffer.opened.kind is OpenedKind.RESUMED
    assert buffer.lanes()[0].last_seq_at_open == 3
    assert buffer.append("a", b"next", 1, now())[:2] == (epoch, 4)


def test_a_restart_may_bring_back_what_was_acknowledged_last() -> None:
    now = Hands()
    buffer = MemoryBuffer({"a": ROOMY}, PLENTY, now, remembered_acks_max=3)
    epoch = [buffer.append("a", bytes([n]), 1, now()).epoch for n in range(6)].pop()
    buffer.acknowledge("a", epoch, 5)
    assert held(buffer, "a", epoch) == [6]
    buffer.reopen(bring_back=2)
    assert held(buffer, "a", epoch) == [4, 5, 6]
    assert buffer.floor("a", epoch) == 4
    assert buffer.acknowledge("a", epoch, 5) == 2


def test_a_cloned_disk_begins_new_epochs() -> None:
    now = Hands()
    buffer = MemoryBuffer({"a": ROOMY}, PLENTY, now)
    old = buffer.append("a", b"one", 1, now()).epoch
    buffer.reopen(cloned=True)
    assert buffer.opened.kind is OpenedKind.CLONED
    new = buffer.append("a", b"two", 1, now()).epoch
    assert [(info.epoch, info.live) for info in buffer.lanes()] == [(new, True), (old, False)]
