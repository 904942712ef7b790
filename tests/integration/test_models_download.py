"""A download goes on where it was cut, ends at once when told, and never keeps a byte that the hash does not cover."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from contract.models import Artifact
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
