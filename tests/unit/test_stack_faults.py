"""The pure parts of the fault injector: where a message ends, and who is killed when."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.errors import ConfigurationError, TemporaryError
from simulators.faults import processes
from simulators.faults.http import Body, NotHttp, chunk_size, request_head, response_head
from simulators.faults.processes import ProcessFaults, kill_schedule

TARGETS = ["agent-1", "agent-2", "agent-3", "broker", "gateway", "store"]


def test_a_request_without_a_length_has_no_body() -> None:
    head = request_head(b"GET /b/k?x=1 HTTP/1.1\r\nHost: h:1\r\n\r\n")
    assert head.first == ("GET", "/b/k?x=1", "HTTP/1.1")
    assert (head.body, head.last) == (Body.NONE, False)


@pytest.mark.parametrize(
    ("field", "body", "length"),
    [
        ("Content-Length: 5", Body.LENGTH, 5),
        ("content-length:0", Body.NONE, 0),
        ("Transfer-Encoding: chunked", Body.CHUNKED, 0),
        ("Transfer-Encoding: gzip, Chunked", Body.CHUNKED, 0),
    ],
)
def test_the_length_of_a_body_is_read_from_its_fields(field: str, body: Body, length: int) -> None:
    head = request_head(f"PUT /b/k HTTP/1.1\r\n{field}\r\n\r\n".encode())
    assert (head.body, head.length) == (body, length)


@pytest.mark.parametrize(
    ("status", "method", "body"),
    [
        ("200 OK", "GET", Body.LENGTH),
        ("200 OK", "HEAD", Body.NONE),
        ("204 No Content", "DELETE", Body.NONE),
        ("304 Not Modified", "GET", Body.NONE),
        ("100 Continue", "PUT", Body.NONE),
        ("200", "GET", Body.LENGTH),
    ],
)
def test_some_answers_have_no_body_whatever_they_say(status: str, method: str, body: Body) -> None:
    assert response_head(f"HTTP/1.1 {status}\r\nContent-Length: 5\r\n\r\n".encode(), method).body is body


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    head = response_head(b"HTTP/1.1 200 OK\r\n\r\n", "GET")
    assert (head.body, head.last) == (Body.UNTIL_CLOSE, True)


@pytest.mark.parametrize(
    "data",
    [
        b"\x10\x0c\x00\x04MQTT\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\nno field\r\n\r\n",
        b"PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"PUT / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"PUT / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(NotHttp):
        request_head(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_head_or_refused(data: bytes) -> None:
    for read in (request_head, lambda head: response_head(head, "GET"), chunk_size):
        try:
            read(data)
        except NotHttp:
            continue


def test_chunk_sizes_are_hexadecimal_and_may_carry_extensions() -> None:
    assert chunk_size(b"1000;chunk-signature=abc\r\n") == 4096
    assert chunk_size(b"0\r\n") == 0


@given(
    seed=st.integers(0, 2**32),
    count=st.integers(4, 60),
    duration_s=st.floats(1.0, 1000.0),
    pairs_min=st.integers(0, 2),
)
def test_a_schedule_kills_exactly_so_many_in_order_and_spares_nobody(
    seed: int, count: int, duration_s: float, pairs_min: int
) -> None:
    """Mutants tried: targets drawn independently (someone was spared); pairs of one target; times drawn over the
    whole duration (two moments fell together)."""
    schedule = kill_schedule(seed, TARGETS, count, duration_s, pairs_min=pairs_min)
    assert schedule == kill_schedule(seed, TARGETS, count, duration_s, pairs_min=pairs_min)
    victims = Counter(name for moment in schedule for name in moment.targets)
    assert sum(victims.values()) == count
    assert min(victims[name] for name in TARGETS) >= count // len(TARGETS)
    pairs = [moment.targets for moment in schedule if len(moment.targets) == 2]
    assert len(pairs) == pairs_min
    assert all(len(set(pair)) == 2 for pair in pairs)
    slot_s = duration_s / len(schedule)
    assert all(index * slot_s <= moment.at_s <= (index + 1) * slot_s for index, moment in enumerate(schedule))


def test_different_seeds_tell_different_stories() -> None:
    assert len({kill_schedule(seed, TARGETS, 10, 60.0) for seed in range(50)}) == 50


def test_a_target_that_is_listed_twice_is_killed_twice_as_often() -> None:
    victims = Counter(n for k in kill_schedule(1, ["a", "b", "b"], 30, 60.0, pairs_min=0) for n in k.targets)
    assert victims == {"a": 10, "b": 20}


@pytest.mark.parametrize(
    ("targets", "count", "duration_s", "pairs_min"),
    [(["a"], 10, 60.0, 1), ([], 10, 60.0, 0), (["a", "b"], 3, 60.0, 2), (["a", "b"], 0, 60.0, 0), (["a"], 1, 0.0, 0)],
)
def test_a_schedule_that_cannot_be_is_refused(
    targets: list[str], count: int, duration_s: float, pairs_min: int
) -> None:
    with pytest.raises(ConfigurationError):
        kill_schedule(1, targets, count, duration_s, pairs_min=pairs_min)


def test_nobody_is_killed_by_mistake() -> None:
    for pid in (-1, 0, 1, os.getpid()):
        faults = ProcessFaults({"x": pid}.get)
        with pytest.raises(ConfigurationError, match=f"process {pid} "):
            faults.kill("x")


def test_nobody_is_killed_when_one_of_two_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, signal.Signals]] = []
    monkeypatch.setattr(processes, "_send", lambda pid, number: sent.append((pid, number)))
    time = iter(range(0, 10_000, 10))
    faults = ProcessFaults({"here": 4242}.get, clock=lambda: float(next(time)))
    with pytest.raises(TemporaryError, match="'gone'"):
        faults.kill("here", "gone")
    assert sent == []


def test_a_schedule_ends_early_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_send", lambda pid, number: pytest.fail("nobody should be killed"))
    stop = threading.Event()
    stop.set()
    assert ProcessFaults(lambda name: 4242).run(kill_schedule(1, TARGETS, 10, 3600.0), stop) == []
