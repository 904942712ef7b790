"""Memory is bounded, whoever takes it and however often."""

from __future__ import annotations

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from contract.limits import Limits
from gateway.budget import SHEDDING_S, MemoryBudget, unpacked_bytes


@given(st.lists(st.integers(0, 60), max_size=40))
def test_what_is_taken_never_exceeds_the_limit_and_comes_back_to_the_byte(sizes):
    budget = MemoryBudget(100)
    held = []
    for size in sizes:
        room = 100 - sum(held)
        assert budget.take(size) == (size <= room)
        if size <= room:
            held.append(size)
        assert budget.taken_bytes == sum(held) <= 100
    for size in held:
        budget.give_back(size)
    assert budget.taken_bytes == 0
    assert budget.highest_bytes == sum(held)


def test_giving_back_more_than_was_taken_is_a_fault_and_not_silent():
    budget = MemoryBudget(100)
    assert budget.take(10)
    with pytest.raises(ValueError, match="11 bytes given back, 10 were taken"):
        budget.give_back(11)
    assert budget.taken_bytes == 10


def test_shedding_is_remembered_for_a_moment():
    budget = MemoryBudget(100)
    assert not budget.shedding(0.0)
    budget.shed(50.0)
    assert budget.shedding(50.0 + SHEDDING_S / 2)
    assert not budget.shedding(50.0 + SHEDDING_S)


def test_a_body_is_believed_only_where_it_will_be_unpacked():
    limits = Limits(body_bytes_max=1_000)
    assert unpacked_bytes(zstandard.compress(b"x" * 1_000), limits) == 1_000
    assert unpacked_bytes(zstandard.compress(b"x" * 1_001), limits) == 0
    assert unpacked_bytes(zstandard.ZstdCompressor(write_content_size=False).compress(b"x"), limits) == 0
    assert unpacked_bytes(b"no zstd", limits) == 0
    assert unpacked_bytes(b"", limits) == 0
