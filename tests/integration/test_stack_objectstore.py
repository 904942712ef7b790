"""The embedded object store: what the lake relies on, and what it survives."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import signal
import stat
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from botocore.exceptions import BotoCoreError, ClientError

from headwater.stack.objectstore import SeaweedSettings
from headwater.stack.ports import PortBook
from tests.integration.servers import PATIENCE_S, Servers, StoreServer, s3_client, wait_until


def error_code(caught: pytest.ExceptionInfo[ClientError]) -> str:
    return str(caught.value.response["Error"]["Code"])


def content(client: Any, bucket: str, key: str) -> bytes:
    return bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())


def test_objects_are_there_again_after_a_stop_and_a_start_over_the_same_folder(tmp_path: Path) -> None:
    with Servers(tmp_path) as servers:
        store = servers.seaweed()
        access = store.access
        s3_client(access).put_object(Bucket=access.bucket, Key="lake/a", Body=b"kept")
    with Servers(tmp_path) as servers:
        again = servers.seaweed().access
        assert again == access, "same ports, same credentials"
        assert content(s3_client(again), again.bucket, "lake/a") == b"kept"


def test_objects_are_there_when_the_ports_had_to_change(tmp_path: Path) -> None:
    with Servers(tmp_path) as servers:
        access = servers.seaweed().access
        s3_client(access).put_object(Bucket=access.bucket, Key="lake/a", Body=b"kept")
    (tmp_path / "ports.json").unlink()
    with Servers(tmp_path) as servers:
        again = servers.seaweed().access
        assert again.endpoint != access.endpoint
        assert content(s3_client(again), again.bucket, "lake/a") == b"kept"


def test_every_object_whose_put_was_answered_survives_kills_at_any_moment(servers: Servers) -> None:
    store = servers.seaweed()
    bucket, stop = store.access.bucket, threading.Event()
    answered: dict[str, str] = {}
    failed: list[str] = []

    def write(worker: int) -> None:
        client = s3_client(store.access)
        for number in range(10_000):
            if stop.is_set():
                return
            key, body = f"kill/{worker}/{number}", os.urandom(1000 * (number % 50 + 1))
            try:
                client.put_object(Bucket=bucket, Key=key, Body=body)
                answered[key] = hashlib.sha256(body).hexdigest()
            except (ClientError, BotoCoreError):
                failed.append(key)
                stop.wait(0.05)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write, worker) for worker in range(3)]
        try:
            for _ in range(3):
                target = len(answered) + 100
                wait_until(lambda: len(answered) >= target, PATIENCE_S, "a hundred more objects")  # noqa: B023
                store.kill()
        finally:
            stop.set()
        for writer in writers:
            writer.result()
    assert failed, "the kills were noticed"
    client = s3_client(store.access)
    found = {key: hashlib.sha256(content(client, bucket, key)).hexdigest() for key in answered}
    assert found == answered


def test_a_condition_lets_exactly_one_writer_win(object_store: StoreServer) -> None:
    """On this a Delta commit stands: `If-None-Match: *` and `If-Match`."""
    bucket, client = object_store.access.bucket, s3_client(object_store.access)

    def put(body: bytes, **condition: str) -> bool:
        try:
            s3_client(object_store.access).put_object(Bucket=bucket, Key="race/a", Body=body, **condition)
        except ClientError as error:
            assert error.response["Error"]["Code"] in ("PreconditionFailed", "ConditionalRequestConflict")
            return False
        return True

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        bodies = [str(number).encode() for number in range(8)]
        wins = list(pool.map(lambda body: put(body, IfNoneMatch="*"), bodies))
    assert sum(wins) == 1
    first = client.get_object(Bucket=bucket, Key="race/a")
    assert first["Body"].read() == bodies[wins.index(True)]
    assert put(b"next", IfMatch=first["ETag"])
    assert not put(b"late", IfMatch=first["ETag"])
    assert content(client, bucket, "race/a") == b"next"


def test_a_wrong_secret_is_refused(object_store: StoreServer) -> None:
    with pytest.raises(ClientError) as caught:
        s3_client(object_store.access, secret="wrong").list_objects_v2(Bucket=object_store.access.bucket)
    assert error_code(caught) == "SignatureDoesNotMatch"


def test_only_loopback_is_listened_on(object_store: StoreServer) -> None:
    listening = [
        c.laddr for c in psutil.Process(object_store.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN
    ]
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert len(listening) == 10, "every door that it opens was given a port"


def test_credentials_are_readable_by_their_owner_only(servers: Servers) -> None:
    servers.seaweed()
    for name in ("credentials.json", "s3.json"):
        assert stat.S_IMODE((servers.folder / "store" / name).stat().st_mode) == 0o600


def test_bucket_and_prefix_can_be_chosen(servers: Servers) -> None:
    access = servers.seaweed(settings=SeaweedSettings(bucket="fleet-7", prefix="a/b")).access
    assert access.url == "s3://fleet-7/a/b"
    s3_client(access).put_object(Bucket="fleet-7", Key="a/b/x", Body=b"1")


def test_a_frozen_store_goes_on_where_it_was(servers: Servers) -> None:
    store = servers.seaweed()
    client, bucket = s3_client(store.access), store.access.bucket
    os.kill(store.pid, signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        put = pool.submit(client.put_object, Bucket=bucket, Key="lake/frozen", Body=b"1")
        wait_until(lambda: psutil.Process(store.pid).status() == psutil.STATUS_STOPPED, PATIENCE_S, "frozen")
        assert not put.done()
        os.kill(store.pid, signal.SIGCONT)
        put.result(PATIENCE_S)
    assert content(client, bucket, "lake/frozen") == b"1"


def test_a_stop_that_has_to_kill_leaves_no_socket_of_its_own_behind(tmp_path: Path) -> None:
    """Mutants tried: no `clean` in the spec (five sockets stay)."""

    def sockets(ports: dict[str, int]) -> list[Path]:
        return [path for port in ports.values() for path in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock")]

    with Servers(tmp_path) as servers:
        store = servers.seaweed()
        ports = PortBook(tmp_path / "ports.json").read()
        wait_until(lambda: len(sockets(ports)) == 5, 30.0, "all parts of the store listen")
        os.kill(store.pid, signal.SIGSTOP)
    assert sockets(ports) == []
