from __future__ import annotations

from pathlib import Path

import pytest

from contract.batches import Clock
from contract.errors import ConfigurationError
from contract.names import is_epoch
from edge_agent.clock import ClockWatch, DeviceClock, clock_is_synced, kernel_says_synced, read_boot_id

BOOT = "ab" * 16


def at(wall_s: float, monotonic_s: float, *, synced: bool = True) -> Clock:
    return Clock(synced, round(wall_s * 1e6), round(monotonic_s * 1e6), BOOT)


class Hands:
    """Clocks that the test sets, nanoseconds."""

    wall = 1_000_000_000
    boottime = 2_000_000_000
    monotonic = 3_000_000_000
    synced = False
    asked = 0

    def ask(self) -> bool:
        self.asked += 1
        return self.synced

    def clock(self) -> DeviceClock:
        return DeviceClock(
            BOOT,
            self.ask,
            wall_ns=lambda: self.wall,
            boottime_ns=lambda: self.boottime,
            monotonic_ns=lambda: self.monotonic,
        )


def test_a_batch_carries_all_clocks_at_one_moment() -> None:
    hands = Hands()
    assert hands.clock().read() == Clock(False, 1_000_000, 2_000_000, BOOT)
    assert hands.clock().monotonic_s() == 3.0


def test_the_kernel_is_asked_at_most_once_a_second() -> None:
    hands = Hands()
    clock = hands.clock()
    for _ in range(100):
        clock.read()
    assert hands.asked == 1
    hands.synced = True
    assert not clock.synced()
    hands.monotonic += 1_000_000_000
    assert clock.synced()
    assert hands.asked == 2


def test_the_moment_when_the_clock_becomes_right_is_noticed_with_what_places_earlier_rows() -> None:
    """A board without a clock: 1970 until NTP comes, then rows are placed by time since boot."""
    watch = ClockWatch(at(10, 10, synced=False))
    assert watch.look(at(11, 11, synced=False)) == []
    right = at(1_700_000_000, 12)
    changes = watch.look(right)
    assert [change.kind for change in changes] == ["clock_synced", "clock_jumped"]
    assert changes[0].clock == right
    assert changes[0].jump_us == 1_699_999_988_000_000
    assert watch.look(at(1_700_000_001, 13)) == []
    assert [change.kind for change in watch.look(at(1_700_000_002, 14, synced=False))] == ["clock_lost_sync"]


def test_jumps_are_noticed_both_ways_and_slewing_is_not() -> None:
    watch = ClockWatch(at(1000, 100))
    assert watch.look(at(1001.4, 101)) == []
    assert [(c.kind, c.jump_us) for c in watch.look(at(2002.4, 102))] == [("clock_jumped", 1_000_000_000)]
    assert [(c.kind, c.jump_us) for c in watch.look(at(1003.4, 103))] == [("clock_jumped", -1_000_000_000)]
    # Asleep: both clocks have gone on.
    assert watch.look(at(9003.4, 8103)) == []


def test_this_machine_has_a_boot_id_and_answers_whether_its_clock_is_right() -> None:
    assert is_epoch(read_boot_id())
    assert isinstance(kernel_says_synced(), bool)
    assert isinstance(clock_is_synced(), bool)


@pytest.mark.parametrize("content", [None, "", "not an id\n"])
def test_a_machine_without_a_boot_id_is_told_so(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "boot_id"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match="boot_id does not give the id of this boot"):
        read_boot_id(path)
