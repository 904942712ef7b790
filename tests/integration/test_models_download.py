"""A download goes on where it was cut, ends at once when told, and never keeps a byte that the hash does not cover.

Mutants tried: what came kept by whole chunks only; any 206 taken for the rest; a compressed answer taken for the file;
no least pace; no turns; no end of headers that trickle, by time or by being told; what was kept dropped at
headers that were cut off.
"""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from contract.models import Artifact
from edge_agent.models import download as module
from edge_agent.models.download import Cancel, DownloadError, Timeouts, WrongContentError, download
from tests.integration.models_bench import Faults, serving

DATA = np.random.default_rng(3).bytes(200_000)
TIMEOUTS = Timeouts(2.0, 2.0)


def artifact(data: bytes = DATA) -> Artifact:
    return Artifact(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


class Site:
    def __init__(self, folder: Path, url: str, faults: Faults) -> None:
        self.faults, self.partial = faults, folder / "partial"
        (folder / "artifacts").mkdir()
        (folder / "artifacts" / "file").write_bytes(DATA)
        self.url = url + "artifacts/file"

    def get(self, wanted: Artifact | None = None, cancel: Cancel | None = None) -> None:
        download(self.url, wanted or artifact(), self.partial, TIMEOUTS, cancel or Cancel())

    @property
    def ranges(self) -> list[str | None]:
        return [each for _, each in self.faults.asked]


@pytest.fixture
def site(tmp_path: Path):
    with serving(tmp_path) as (url, faults):
        yield Site(tmp_path, url, faults)


def test_a_whole_file_comes_in_one_go(site: Site) -> None:
    site.get()
    assert site.partial.read_bytes() == DATA
    site.get()  # and is not asked for again
    assert site.ranges == [None]


def test_cut_again_and_again_it_goes_on_where_it_was(site: Site) -> None:
    site.faults.cut_after = 70_000
    for _ in range(2):
        with pytest.raises(DownloadError, match=r"200000|IncompleteRead"):
            site.get()
    site.get()
    assert site.partial.read_bytes() == DATA
    starts = [0 if each is None else int(each.removeprefix("bytes=").rstrip("-")) for each in site.ranges]
    assert starts[0] == 0
    assert 0 < starts[1] < starts[2]


def test_a_half_of_another_file_is_not_completed_with_this_one(site: Site) -> None:
    site.faults.cut_after, site.faults.etag = 70_000, '"old"'
    with pytest.raises(DownloadError):
        site.get()
    site.partial.write_bytes(b"x" * site.partial.stat().st_size)
    site.faults.cut_after, site.faults.etag = None, '"new"'
    site.get()  # If-Range: the server says that it is another file by now, and sends it whole
    assert site.partial.read_bytes() == DATA


def test_what_was_damaged_on_the_disk_costs_one_more_download(site: Site) -> None:
    site.faults.cut_after, site.faults.etag = 70_000, '"same"'
    with pytest.raises(DownloadError):
        site.get()
    site.partial.write_bytes(b"x" * site.partial.stat().st_size)
    site.faults.cut_after = None
    with pytest.raises(DownloadError, match="begins anew"):
        site.get()
    site.get()
    assert site.partial.read_bytes() == DATA


def test_a_server_without_ranges_sends_it_whole(site: Site) -> None:
    site.faults.cut_after = 70_000
    with pytest.raises(DownloadError):
        site.get()
    site.faults.cut_after, site.faults.ignore_ranges = None, True
    site.get()
    assert site.partial.read_bytes() == DATA


def test_other_bytes_of_the_same_size_are_wrong_content_and_not_kept(site: Site) -> None:
    site.faults.change = lambda path, data: b"y" * len(data)
    with pytest.raises(WrongContentError, match="another hash"):
        site.get()
    assert not site.partial.exists()


@pytest.mark.parametrize("length", [10, 300_000])
def test_the_page_of_a_portal_is_not_final_and_is_not_read(site: Site, length: int) -> None:
    site.faults.change = lambda path, data: b"<html>" + b" " * length
    with pytest.raises(DownloadError, match="portal"):
        site.get()
    assert not site.partial.exists()


@pytest.mark.parametrize("status", [404, 403, 500, 503])
def test_a_server_in_trouble_is_tried_later(site: Site, status: int) -> None:
    site.faults.status = status
    with pytest.raises(DownloadError, match=f"HTTP {status}"):
        site.get()


def test_nobody_there_is_told_with_the_address(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=re.escape("127.0.0.1:1/")):
        download("http://127.0.0.1:1/file", artifact(), tmp_path / "partial", TIMEOUTS, Cancel())


def test_a_stop_ends_it_at_once_though_the_server_is_silent(site: Site) -> None:
    site.faults.pause_s = 30.0
    cancel = Cancel()
    threading.Timer(0.5, cancel.set).start()
    began_s = time.monotonic()
    with pytest.raises(DownloadError):
        download(site.url, artifact(), site.partial, Timeouts(2.0, 25.0), cancel)
    assert time.monotonic() - began_s < 5


def test_a_half_longer_than_the_manifest_says_is_dropped(site: Site) -> None:
    site.partial.write_bytes(DATA + b"more")
    site.get()
    assert site.partial.read_bytes() == DATA


Reply = Callable[[socket.socket, int], None]
"""Answers a request on a connection; its range begins there."""


@contextmanager
def scripted(*replies: Reply) -> Iterator[tuple[str, list[int]]]:
    """A server that answers one connection after the other as it is told; its address, and where each range began."""
    server, starts = socket.create_server(("127.0.0.1", 0)), []

    def serve() -> None:
        for reply in replies:
            connection, _ = server.accept()
            with connection:
                request = b""
                while not request.endswith(b"\r\n\r\n"):
                    request += connection.recv(4_096)
                found = re.search(rb"Range: bytes=([0-9]+)-", request)
                starts.append(int(found[1]) if found else 0)
                reply(connection, starts[-1])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/file", starts
    finally:
        server.close()
        thread.join(5)


def head(start: int, *lines: str, end: int = len(DATA)) -> bytes:
    """Of an answer with the bytes from `start` to `end`."""
    part = (f"Content-Range: bytes {start}-{end - 1}/{len(DATA)}",) if start or end < len(DATA) else ()
    status = "206 Partial Content" if part else "200 OK"
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {end - start}", *part, *lines, "", ""]).encode()


def fetch(url: str, partial: Path, timeouts: Timeouts = TIMEOUTS) -> None:
    download(url, artifact(), partial, timeouts, Cancel())


def whole(connection: socket.socket, start: int) -> None:
    connection.sendall(head(start) + DATA[start:])


@pytest.mark.parametrize("silent", [False, True], ids=["reset", "silent"])
def test_a_connection_that_breaks_within_a_chunk_takes_nothing_away_that_came(tmp_path: Path, *, silent: bool) -> None:
    """On a bad line every connection may break so early: without this, the file would never be complete."""
    partial, gone = tmp_path / "partial", threading.Event()

    def some(connection: socket.socket, start: int) -> None:
        connection.sendall(head(start) + DATA[start : start + 50_000])
        wanted = start + 50_000
        deadline_s = time.monotonic() + 10
        while (not partial.exists() or partial.stat().st_size < wanted) and time.monotonic() < deadline_s:
            gone.wait(0.01)
        if not silent:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        else:
            connection.recv(1)  # until the device gives it up

    with scripted(some, some, whole) as (url, starts):
        for came in (50_000, 100_000):
            with pytest.raises(DownloadError):
                fetch(url, partial, Timeouts(2.0, 0.5))
            assert partial.stat().st_size == came
        fetch(url, partial)
    assert starts == [0, 50_000, 100_000]
    assert partial.read_bytes() == DATA


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (f"bytes 50000-{len(DATA) - 1}/{len(DATA)}", True),
        (f"bytes 50000-{len(DATA) - 1}/*", True),
        (f"bytes 50000-99999/{len(DATA)}", True),
        (f"bytes 0-{len(DATA) - 1}/{len(DATA)}", False),
        (f"bytes 50001-{len(DATA) - 1}/{len(DATA)}", False),
        (f"bytes 50000-{len(DATA) - 1}/{len(DATA) + 1}", False),
        (f"bytes 50000-{len(DATA)}/{len(DATA)}", False),
        ("bytes 50000-49998/*", False),
        ("", False),
        ("items 1-2/3", False),
    ],
)
def test_only_a_part_that_goes_on_where_it_was_is_taken(tmp_path: Path, said: str, *, kept: bool) -> None:
    partial = tmp_path / "partial"
    partial.write_bytes(DATA[:50_000])

    def part(connection: socket.socket, start: int) -> None:
        connection.sendall(
            f"HTTP/1.1 206 Partial Content\r\nContent-Range: {said}\r\nContent-Length: 50000\r\n\r\n".encode()
            + DATA[start : start + 50_000]
        )

    with scripted(part) as (url, _), pytest.raises(DownloadError, match="the rest follows" if kept else "anew"):
        fetch(url, partial)
    assert (partial.read_bytes() if kept else partial.exists()) == (DATA[:100_000] if kept else False)


def test_a_compressed_answer_is_not_taken_for_the_file(tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    partial.write_bytes(DATA[:50_000])

    def squeezed(connection: socket.socket, start: int) -> None:
        connection.sendall(head(0, "Content-Encoding: gzip") + DATA)

    with scripted(squeezed, whole) as (url, starts):
        with pytest.raises(DownloadError, match="'gzip', though not asked for"):
            fetch(url, partial)
        assert not partial.exists()
        fetch(url, partial)
    assert starts == [50_000, 0]


@pytest.mark.parametrize("line", ["200 OK", "206 Partial Content", "206 Partial Content\r\nContent-Ra"])
def test_headers_that_are_cut_off_take_nothing_away(tmp_path: Path, line: str) -> None:
    partial = tmp_path / "partial"
    partial.write_bytes(DATA[:50_000])

    def cut_off(connection: socket.socket, start: int) -> None:
        connection.sendall(f"HTTP/1.1 {line}\r\n".encode())

    with scripted(cut_off, whole) as (url, starts):
        with pytest.raises(DownloadError, match="before the file began"):
            fetch(url, partial)
        assert partial.read_bytes() == DATA[:50_000]
        fetch(url, partial)
    assert starts == [50_000, 50_000]
    assert partial.read_bytes() == DATA


def test_a_chunked_answer_without_a_length_is_taken_to_its_end(tmp_path: Path) -> None:
    def chunked(connection: socket.socket, start: int) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for at in range(0, len(DATA), 30_000):
            piece = DATA[at : at + 30_000]
            connection.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        connection.sendall(b"0\r\n\r\n")

    with scripted(chunked) as (url, _):
        fetch(url, tmp_path / "partial")
    assert (tmp_path / "partial").read_bytes() == DATA


@pytest.mark.parametrize(
    ("limits", "lines", "told"),
    [
        ({"SLOW_S": 0.05, "SLOW_BYTES": 1 << 20}, (), "fewer than 1048576 bytes in 0.05 s"),
        ({"TURN_S": 0.05}, ("Accept-Ranges: bytes",), "in another turn"),
    ],
    ids=["too slow", "its turn is over"],
)
def test_a_server_that_trickles_does_not_hold_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, float], lines: tuple[str, ...], told: str
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(module, name, value)
    partial, ended = tmp_path / "partial", threading.Event()

    def trickles(connection: socket.socket, start: int) -> None:
        connection.sendall(head(start, *lines))
        for at in range(start, start + 300):
            if ended.wait(0.01):
                break
            try:
                connection.sendall(DATA[at : at + 1])
            except OSError:
                break

    with scripted(trickles, whole) as (url, starts):
        with pytest.raises(DownloadError, match=told):
            fetch(url, partial)
        ended.set()
        came = partial.stat().st_size
        assert came > 0
        fetch(url, partial)
    assert starts == [0, came]
    assert partial.read_bytes() == DATA


@pytest.mark.parametrize("told", [False, True], ids=["by itself", "when told"])
def test_headers_that_trickle_are_not_waited_for(tmp_path: Path, *, told: bool) -> None:
    """Each byte ends a silence, so no timeout of silence ends it."""
    cancel, began = Cancel(), threading.Event()
    ended, patient = threading.Event(), threading.Event()

    def trickles(connection: socket.socket, start: int) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
        began.set()
        for _ in range(500):
            if ended.wait(0.01):
                return
            try:
                connection.sendall(b"x")
            except OSError:
                return
        patient.set()

    def tell() -> None:
        assert began.wait(5)
        if told:
            cancel.set()

    with scripted(trickles) as (url, _):
        teller = threading.Thread(target=tell)
        teller.start()
        timeouts = Timeouts(2.0, 60.0) if told else Timeouts(0.25, 0.25)
        with pytest.raises(DownloadError):
            download(url, artifact(), tmp_path / "partial", timeouts, cancel)
        assert not patient.is_set(), "it was the device that ended it, not the server"
        ended.set()
        teller.join()
    assert not (tmp_path / "partial").exists()
