from __future__ import annotations

import random

import pytest

from contract.backoff import Backoff


def test_ceilings_double_up_to_the_cap_and_never_overflow() -> None:
    backoff = Backoff(1.0, 60.0, random.Random(1))
    ceilings = []
    for _ in range(3_000):
        ceilings.append(backoff.ceiling_s)
        assert 0.0 <= backoff.next_delay_s() <= ceilings[-1]
    assert ceilings[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert ceilings[-1] == 60
    backoff.reset()
    assert backoff.ceiling_s == 1


def test_a_fleet_spreads_evenly_over_the_whole_wait() -> None:
    """Ten thousand devices that lost one broker come back over the whole ceiling, none of its tenths left out.

    Mutants tried: half the ceiling as a fixed part.
    """
    tenths = [0] * 10
    for seed in range(10_000):
        backoff = Backoff(10.0, 10.0, random.Random(seed))
        tenths[min(9, int(backoff.next_delay_s()))] += 1
    assert min(tenths) > 800
    assert max(tenths) < 1_200


def test_the_same_seed_waits_the_same() -> None:
    def delays() -> list[float]:
        backoff = Backoff(1.0, 60.0, random.Random(7))
        return [backoff.next_delay_s() for _ in range(10)]

    assert delays() == delays()


@pytest.mark.parametrize(("base", "cap"), [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
def test_limits_that_make_no_sense_are_refused(base: float, cap: float) -> None:
    with pytest.raises(ValueError, match="0 < base <= cap"):
        Backoff(base, cap, random.Random(1))
