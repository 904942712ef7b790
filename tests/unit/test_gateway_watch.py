"""A thread that dies or falls silent is noticed, and so is a lake."""

from __future__ import annotations

import threading

import pytest
from structlog.testing import capture_logs

from gateway.watch import LakeHealth, WatchedThread
from tests.unit.gateway_parts import Clocks


@pytest.fixture(autouse=True)
def logs():
    """What was logged; with the default settings each traceback would be drawn with all its variables, for seconds."""
    with capture_logs() as found:
        yield found


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_ended_a_thread_is_remembered():
    thread = WatchedThread("t", lambda: 1 // 0)
    thread.start()
    assert thread.join(10)
    assert isinstance(thread.death, ZeroDivisionError)
    assert not thread.alive


def test_a_thread_that_works_without_a_beat_is_silent_and_one_that_rests_is_not():
    clock, go = Clocks(), threading.Event()
    thread = WatchedThread("t", lambda: go.wait(30) and None, clock)
    thread.start()
    clock.pass_s(7)
    assert thread.silent_s == 7
    thread.beat()
    assert thread.silent_s == 0
    thread.rest()
    clock.pass_s(100)
    assert thread.silent_s == 0
    go.set()
    assert thread.join(10)
    assert thread.death is None


def test_a_lake_is_trusted_once_it_answered_and_until_it_fails_or_is_silent_for_long():
    clock = Clocks()
    health = LakeHealth(clock)
    assert "has not answered yet" in health.trouble(10, 30).message
    health.answered()
    assert health.trouble(10, 30) is None
    health.failed(RuntimeError("refused"))
    clock.pass_s(9)
    health.failed(RuntimeError("refused again"))
    assert health.trouble(10, 30) is None
    clock.pass_s(1)
    assert health.trouble(10, 30).code == "lake_unreachable"
    assert "refused again" in health.trouble(10, 30).message
    health.answered()
    assert health.trouble(10, 30) is None
    clock.pass_s(30)
    assert health.trouble(10, 30).code == "lake_silent"
