"""Following a recording through the lake: what changed, what is missing and what is doubled shows, and nothing else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from headwater.following import follow, rows_as_items

Items = npt.NDArray[np.void]


def items(values: list[int]) -> Items:
    return rows_as_items([np.array(values, np.int16), np.array(values, np.float32)])


def test_loops_from_anywhere_are_one_stretch() -> None:
    recording = items(list(range(1000)))
    sent = recording[(np.arange(4321) + 777) % 1000]
    assert follow([recording], sent) == (4321, 1, 0)
    assert follow([recording], items([])) == (0, 0, 0)


def test_a_lost_a_doubled_and_a_swapped_row_begin_new_stretches() -> None:
    """Mutants tried: comparing sorted rows instead of their order (the swap is not seen)."""
    recording = items(list(range(1000)))
    sent = recording[np.arange(3000) % 1000]
    assert follow([recording], np.delete(sent, 1500)).stretches == 2
    assert follow([recording], np.insert(sent, 1500, sent[1500])).stretches == 2
    swapped = sent.copy()
    swapped[[10, 11]] = swapped[[11, 10]]
    assert follow([recording], swapped).stretches > 2


def test_one_changed_bit_is_a_stranger() -> None:
    recording = items(list(range(1000)))
    sent = recording[np.arange(2500) % 1000].copy()
    sent.view(np.uint8)[5 * sent.dtype.itemsize] ^= 1
    found = follow([recording], sent)
    assert found.strangers + found.stretches >= 2
    assert found.rows == 2500


def test_nan_and_negative_zero_are_compared_by_their_bits() -> None:
    recording = rows_as_items([np.array([np.nan, 0.0, 1.0], np.float32)])
    assert follow([recording], rows_as_items([np.array([np.nan, 0.0], np.float32)])) == (2, 1, 0)
    assert follow([recording], rows_as_items([np.array([-0.0], np.float32)])) == (1, 0, 1)


def test_a_sensor_at_rest_is_followed_although_its_rows_are_alike() -> None:
    recording = items([0] * 30 + list(range(1, 100)) + [0] * 30)
    sent = recording[(np.arange(1000) + 140) % len(recording)]
    assert follow([recording], sent) == (1000, 1, 0)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(0, 39), st.integers(1, 60)), max_size=6),
)
def test_any_stretches_are_covered_by_no_more_than_they_are(values: list[int], pieces: list[tuple[int, int]]) -> None:
    recording = items(values)
    parts = [recording[(np.arange(length) + start) % len(values)] for start, length in pieces]
    sent = np.concatenate(parts) if parts else recording[:0]
    found = follow([recording], sent)
    assert found.rows == len(sent)
    assert found.strangers == 0
    assert found.stretches <= len(pieces)


def test_a_device_that_was_replaced_follows_one_recording_and_then_another() -> None:
    first, second = items(list(range(100))), items(list(range(200, 300)))
    sent = np.concatenate([first, first[:40], second, second[:7]])
    assert follow([first, second], sent) == (247, 2, 0)
    assert follow([first], sent).strangers == 107
