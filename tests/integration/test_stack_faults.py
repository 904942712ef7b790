"""The fault injector against real connections and a real store: it does what it says, when it says it."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import obstore
import pytest
from botocore.exceptions import ClientError, ConnectionClosedError, EndpointConnectionError
from obstore.store import S3Store

from contract.errors import ConfigurationError, TemporaryError
from simulators.faults.proxy import Direction, FaultProxy, Weather
from simulators.faults.store import Answer, StoreFault, StoreFaultProxy, When
from tests.integration.servers import PATIENCE_S, StoreServer, free_port, s3_client, wait_until


class Echo:
    """A server that returns what it gets, and says so when a connection ends."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.ended = threading.Semaphore(0)
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join(PATIENCE_S)
        self._listener.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._open.append(connection)
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            while data := connection.recv(65536):
                connection.sendall(data)
        self.ended.release()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[FaultProxy]:
    with FaultProxy(echo.port) as made:
        yield made


def dial(proxy: FaultProxy, timeout_s: float = PATIENCE_S) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=timeout_s)


def ask(connection: socket.socket, data: bytes = b"hello") -> bytes:
    """Send and wait for all of it to come back."""
    connection.sendall(data)
    got = b""
    while len(got) < len(data):
        more = connection.recv(65536)
        if not more:
            raise EOFError
        got += more
    return got


def test_fair_weather_changes_nothing_and_ends_are_passed_on(proxy: FaultProxy, echo: Echo) -> None:
    data = os.urandom(3_000_000)
    with dial(proxy) as connection:
        sender = threading.Thread(target=connection.sendall, args=(data,))
        sender.start()
        got = b""
        while len(got) < len(data):
            got += connection.recv(65536)
        sender.join()
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b"", "the server's end of the connection arrives too"
    assert got == data
    counters = wait_until(lambda: (c := proxy.counters()).connections_open == 0 and c, PATIENCE_S, "closed")
    assert (counters.connections_total, counters.resets_total) == (1, 0)
    assert counters.bytes_up_total == counters.bytes_down_total == len(data)


def test_a_refusing_network_refuses_and_resets_and_keeps_the_port(proxy: FaultProxy) -> None:
    with dial(proxy) as connection:
        assert ask(connection) == b"hello"
        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with pytest.raises(ConnectionRefusedError):
        dial(proxy)
    with socket.socket() as thief, pytest.raises(OSError, match="in use"):
        thief.bind(("127.0.0.1", proxy.port))
    proxy.pass_through()
    with dial(proxy) as connection:
        assert ask(connection) == b"hello"


def test_a_resetting_network_accepts_and_resets(proxy: FaultProxy) -> None:
    proxy.reset()
    # The reset may arrive while the client still counts as connecting.
    with pytest.raises(ConnectionResetError), dial(proxy) as connection:
        connection.recv(1)
    assert proxy.counters().resets_total == 1


def test_a_hanging_network_swallows_and_resets_when_it_is_over(proxy: FaultProxy) -> None:
    with dial(proxy) as before:
        assert ask(before) == b"hello"
        proxy.hang()
        with dial(proxy) as during:
            for connection in (before, during):
                connection.sendall(b"into the void")
            wait_until(lambda: proxy.counters().bytes_swallowed_total == 26, PATIENCE_S, "swallowed")
            proxy.pass_through()
            for connection in (before, during):
                with pytest.raises(ConnectionResetError):
                    connection.recv(1)
    with dial(proxy) as after:
        assert ask(after) == b"hello"


def test_a_connection_that_saw_nothing_of_the_hang_lives_on(proxy: FaultProxy) -> None:
    with dial(proxy) as connection:
        assert ask(connection) == b"hello"
        proxy.hang()
        proxy.pass_through()
        assert ask(connection) == b"hello"


def test_a_stalled_network_loses_nothing(proxy: FaultProxy) -> None:
    with dial(proxy) as before:
        assert ask(before, b"1") == b"1"
        proxy.stall()
        with dial(proxy) as during:
            before.sendall(b"23")
            during.sendall(b"4")
            before.settimeout(0.3)
            with pytest.raises(TimeoutError):
                before.recv(1)
            before.settimeout(PATIENCE_S)
            proxy.pass_through()
            assert before.recv(10) == b"23"
            assert during.recv(10) == b"4"


def test_a_slow_network_is_slow_and_becomes_fast_at_once(proxy: FaultProxy) -> None:
    proxy.slow(bytes_per_s_max=20_000)
    with dial(proxy) as connection:
        began = time.monotonic()
        assert ask(connection, bytes(20_000)) == bytes(20_000)
        assert time.monotonic() - began > 0.9, "a second's worth of bytes took a second"
        proxy.slow(latency_s=3600.0)
        connection.sendall(b"x")
        proxy.pass_through()
        assert connection.recv(1) == b"x"


def test_open_connections_can_be_dropped_in_fair_weather(proxy: FaultProxy) -> None:
    with dial(proxy) as first, dial(proxy) as second:
        assert ask(first) == ask(second) == b"hello"
        assert proxy.drop_connections() == 2
        for connection in (first, second):
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
    with dial(proxy) as third:
        assert ask(third) == b"hello"


def test_one_bit_is_flipped_where_it_was_asked(proxy: FaultProxy) -> None:
    proxy.flip_bit(Direction.UP, chunk=2, byte=-1, bit=7, chunk_bytes_min=3)
    with dial(proxy) as connection:
        assert ask(connection, b"abc") == b"abc"
        assert ask(connection, b"x") == b"x", "too short to be counted"
        assert ask(connection, b"abc") == b"ab\xe3"
        assert ask(connection, b"abc") == b"abc", "once"
    assert proxy.counters().flips_total == 1


def test_nobody_behind_the_proxy_looks_like_a_broken_connection() -> None:
    # The reset may be there before `connect` has returned.
    with FaultProxy(free_port()) as proxy, pytest.raises(ConnectionResetError), dial(proxy) as connection:
        connection.recv(1)


def test_a_closed_proxy_leaves_nothing_behind(echo: Echo) -> None:
    threads = set(threading.enumerate())
    proxy = FaultProxy(echo.port)
    with dial(proxy) as connection:
        assert ask(connection) == b"hello"
        proxy.close()
        proxy.close()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert echo.ended.acquire(timeout=PATIENCE_S)
    with pytest.raises(TemporaryError, match="closed"):
        proxy.hang()
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("fault-proxy")], PATIENCE_S, "ended")
    assert {thread.name for thread in threads} >= {"MainThread"}


def test_commands_while_many_connections_talk_lose_no_connection_and_no_byte(proxy: FaultProxy, seed: int) -> None:
    """Stalls and slowness may come at any moment; a stream stays a stream."""
    failures: list[str] = []

    def talk(number: int) -> None:
        with dial(proxy) as connection:
            for step in range(60):
                data = f"{number}/{step}".encode() * 50
                if ask(connection, data) != data:
                    failures.append(f"{number}/{step}")

    talkers = [threading.Thread(target=talk, args=(number,)) for number in range(8)]
    for talker in talkers:
        talker.start()
    for _ in range(20):
        proxy.stall()
        proxy.slow(bytes_per_s_max=200_000, latency_s=0.001)
        proxy.pass_through()
    for talker in talkers:
        talker.join(PATIENCE_S)
    assert failures == []
    assert proxy.counters().resets_total == 0


@pytest.mark.parametrize("wrong", [{"bytes_per_s_max": 0}, {"latency_s": -1.0}])
def test_impossible_weather_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Weather(**wrong)


def test_a_taken_port_is_named(echo: Echo) -> None:
    with pytest.raises(ConfigurationError, match=f":{echo.port}"):
        FaultProxy(echo.port, port=echo.port)


# Before an object store.


@pytest.fixture
def store_proxy(object_store: StoreServer) -> Iterator[StoreFaultProxy]:
    with StoreFaultProxy(object_store.port) as made:
        yield made


def clients(store: StoreServer, proxy: StoreFaultProxy, **options: Any) -> tuple[Any, Any, str]:
    """One client that goes through the proxy, one that goes past it, and the bucket."""
    spoiled = s3_client(store.access, endpoint=f"http://{proxy.address}", **options)
    return spoiled, s3_client(store.access), store.access.bucket


def keys(client: Any, bucket: str, prefix: str) -> list[str]:
    return [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])]


def test_requests_signed_for_the_proxy_are_accepted_by_the_store(
    object_store: StoreServer, store_proxy: StoreFaultProxy
) -> None:
    through, past, bucket = clients(object_store, store_proxy)
    body = os.urandom(6_000_000)
    through.put_object(Bucket=bucket, Key="verbatim/a", Body=body)
    assert past.get_object(Bucket=bucket, Key="verbatim/a")["Body"].read() == body
    assert through.get_object(Bucket=bucket, Key="verbatim/a", Range="bytes=5-9")["Body"].read() == body[5:10]
    assert through.head_object(Bucket=bucket, Key="verbatim/a")["ContentLength"] == len(body)
    assert keys(through, bucket, "verbatim/") == ["verbatim/a"]
    through.delete_object(Bucket=bucket, Key="verbatim/a")
    assert keys(past, bucket, "verbatim/") == []
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        clients(object_store, store_proxy, secret="wrong")[0].list_objects_v2(Bucket=bucket)
    assert {seen.fault for seen in store_proxy.seen()} == {None}


def test_obstore_works_through_the_proxy_with_multipart_and_conditions(
    object_store: StoreServer, store_proxy: StoreFaultProxy
) -> None:
    store = S3Store(
        object_store.access.bucket,
        prefix="through",
        endpoint=f"http://{store_proxy.address}",
        access_key_id=object_store.access.key,
        secret_access_key=object_store.access.secret,
        region=object_store.access.region,
        client_options={"allow_http": True},
    )
    body = os.urandom(12_000_000)
    obstore.put(store, "large", body, use_multipart=True, chunk_size=5 * 1024 * 1024)
    assert bytes(obstore.get(store, "large").bytes()) == body
    obstore.put(store, "once", b"1", mode="create")
    with pytest.raises(obstore.exceptions.AlreadyExistsError):
        obstore.put(store, "once", b"2", mode="create")
    assert bytes(obstore.get(store, "once").bytes()) == b"1"


def test_a_refusal_before_the_deed_leaves_the_store_as_it_was(
    object_store: StoreServer, store_proxy: StoreFaultProxy
) -> None:
    through, past, bucket = clients(object_store, store_proxy)
    store_proxy.inject([StoreFault(name="busy", method="PUT")])
    with pytest.raises(ClientError) as caught:
        through.put_object(Bucket=bucket, Key="before/a", Body=b"1")
    assert caught.value.response["Error"]["Code"] == "SlowDown"
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 503
    assert keys(through, bucket, "before/") == [], "reading was not forbidden"
    store_proxy.inject([])
    through.put_object(Bucket=bucket, Key="before/a", Body=b"1")
    assert keys(past, bucket, "before/") == ["before/a"]
    assert [seen.fault for seen in store_proxy.seen() if seen.method == "PUT"] == ["busy", None]


@pytest.mark.parametrize("answer", list(Answer))
def test_a_failure_after_the_deed_is_told_though_the_deed_is_done(
    object_store: StoreServer, store_proxy: StoreFaultProxy, answer: Answer
) -> None:
    through, past, bucket = clients(object_store, store_proxy)
    key = f"after/{answer}"
    store_proxy.inject([StoreFault(when=When.AFTER, answer=answer, method="PUT", count_max=1)])
    expected = ConnectionClosedError if answer is Answer.RESET else ClientError
    with pytest.raises(expected):
        through.put_object(Bucket=bucket, Key=key, Body=b"done", IfNoneMatch="*")
    assert past.get_object(Bucket=bucket, Key=key)["Body"].read() == b"done"
    with pytest.raises(ClientError, match="PreconditionFailed"):
        through.put_object(Bucket=bucket, Key=key, Body=b"again", IfNoneMatch="*")
    assert store_proxy.seen()[0].status == "200"


def test_the_same_seed_hits_the_same_requests_and_the_share_is_kept(
    object_store: StoreServer, store_proxy: StoreFaultProxy
) -> None:
    through, _, bucket = clients(object_store, store_proxy)

    def run(seed: int) -> list[bool]:
        store_proxy.inject([StoreFault(fraction=0.3, method="GET", path="list-type")], seed=seed)
        fates = []
        for _ in range(100):
            try:
                through.list_objects_v2(Bucket=bucket, MaxKeys=1)
                fates.append(True)
            except ClientError:
                fates.append(False)
        return fates

    first = run(1)
    assert run(1) == first
    assert run(2) != first
    assert 15 <= first.count(False) <= 45


def test_rules_choose_by_method_path_order_and_number(object_store: StoreServer, store_proxy: StoreFaultProxy) -> None:
    through, _, bucket = clients(object_store, store_proxy)
    store_proxy.inject(
        [
            StoreFault(name="log", path=r"/_delta_log/\d+\.json", method="PUT", skip=1, count_max=1),
            StoreFault(name="rest", answer=Answer.INTERNAL_ERROR, method="PUT", path="/data/"),
        ]
    )

    def put(key: str) -> str:
        try:
            through.put_object(Bucket=bucket, Key=key, Body=b"1")
        except ClientError as error:
            return str(error.response["Error"]["Code"])
        return "ok"

    told = [put(f"rules/_delta_log/{number}.json") for number in range(3)] + [put("rules/data/x"), put("rules/y")]
    assert told == ["ok", "SlowDown", "ok", "InternalError", "ok"]


def test_a_client_with_retries_gets_through_a_busy_store(
    object_store: StoreServer, store_proxy: StoreFaultProxy
) -> None:
    through, past, bucket = clients(object_store, store_proxy, attempts=10)
    store_proxy.inject([StoreFault(fraction=0.3), StoreFault(when=When.AFTER, fraction=0.2)], seed=3)
    for number in range(8):
        through.put_object(Bucket=bucket, Key=f"retry/{number}", Body=str(number).encode())
    assert len(keys(past, bucket, "retry/")) == 8
    assert {seen.fault is None for seen in store_proxy.seen()} == {True, False}


def test_the_weather_applies_to_a_store_too(object_store: StoreServer, store_proxy: StoreFaultProxy) -> None:
    through, _, bucket = clients(object_store, store_proxy)
    store_proxy.refuse()
    with pytest.raises(EndpointConnectionError):
        through.list_objects_v2(Bucket=bucket)
    store_proxy.stall()
    done = threading.Event()
    waiting = threading.Thread(target=lambda: (through.list_objects_v2(Bucket=bucket), done.set()))
    waiting.start()
    assert not done.wait(0.3)
    store_proxy.pass_through()
    assert done.wait(PATIENCE_S)
    waiting.join(PATIENCE_S)


def test_one_connection_carries_many_requests_with_faults_between_them(
    object_store: StoreServer, store_proxy: StoreFaultProxy
) -> None:
    """Bodies of known length and chunked ones, HEAD, and an answer in between that the store never gave."""
    store_proxy.inject([StoreFault(path="/spoiled")])
    connection = http.client.HTTPConnection("127.0.0.1", store_proxy.port, timeout=PATIENCE_S)

    def status(method: str, path: str, body: Any = None) -> int:
        connection.request(method, path, body=body, encode_chunked=not isinstance(body, bytes | None))
        answer = connection.getresponse()
        text = answer.read()
        if answer.status == 503 and method != "HEAD":
            assert re.search(b"<Code>SlowDown</Code>", text)
        return answer.status

    # Unsigned requests are refused by the store itself, which is an answer as good as any.
    told = [
        status("GET", "/x"),
        status("PUT", "/spoiled", b"x" * 100_000),
        status("PUT", "/x", b"x" * 100_000),
        status("PUT", "/spoiled", iter([b"a" * 1000, b"b"])),
        status("HEAD", "/spoiled"),
        status("GET", "/x"),
    ]
    connection.close()
    assert [code == 503 for code in told] == [False, True, False, True, True, False]
    assert store_proxy.counters().connections_total <= 2, "the store may close after an early refusal"


def test_what_is_no_request_is_turned_away(store_proxy: StoreFaultProxy) -> None:
    with dial(store_proxy) as connection:
        connection.sendall(b"\x10\x0c\x00\x04MQTT\x05\x02\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
