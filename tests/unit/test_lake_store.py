"""Settings of a store are checked once, at the rim; secrets do not show; writes last.

Mutants tried, each made a test here fail: plain http allowed by itself; the representation left as it is; a file
written in place; a half-written file left behind.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from contract.errors import ConfigurationError
from lake.errors import StoreUnavailableError
from lake.store import Store, StoreSettings


def settings(**change: Any) -> StoreSettings:
    given: dict[str, Any] = {"url": "s3://bucket/lake", "endpoint": "http://127.0.0.1:1", "allow_http": True}
    return StoreSettings(**(given | change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"url": "lake"}, "neither file"),
        ({"url": "gs://bucket/x"}, "neither file"),
        ({"url": "file://lake"}, "absolute"),
        ({"url": "file://host/lake"}, "absolute"),
        ({"url": "s3:///lake"}, "bucket"),
        ({"url": "s3://bucket/a lake"}, "letters, digits"),
        ({"endpoint": "127.0.0.1:9000"}, "http"),
        ({"endpoint": "http://127.0.0.1:9000/bucket"}, "http"),
        ({"allow_http": False}, "allow_http"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"connect_timeout_s": 1e9}, "connect_timeout_s"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_remedy(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        settings(**change)


def test_the_environment_completes_a_bucket_and_leaves_a_folder_alone() -> None:
    environ = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9000",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "eu-north-1",
        "AWS_ALLOW_HTTP": "true",
    }
    found = StoreSettings.from_environment("s3://bucket/lake", environ)
    assert msgspec.structs.asdict(found) | {"timeout_s": 0, "connect_timeout_s": 0} == {
        "url": "s3://bucket/lake",
        "endpoint": "http://127.0.0.1:9000",
        "region": "eu-north-1",
        "access_key": "key",
        "secret_key": "secret",
        "session_token": None,
        "allow_http": True,
        "timeout_s": 0,
        "connect_timeout_s": 0,
        "fsync": True,
    }
    assert StoreSettings.from_environment("file:///lake", environ) == StoreSettings(url="file:///lake")


def test_secrets_do_not_show() -> None:
    shown = repr(settings(access_key="AKEY", secret_key="hush", session_token="token"))
    assert "hush" not in shown
    assert "token" not in shown
    assert "AKEY" in shown


def test_a_store_that_is_not_there_is_unavailable() -> None:
    store = Store(settings(access_key="k", secret_key="s", timeout_s=1.0))
    with pytest.raises(StoreUnavailableError, match="s3://bucket/lake"):
        store.probe()


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(StoreSettings(url=tmp_path.as_uri()))
    store.put("a/one", b"before")

    def fail(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreUnavailableError, match="No space left"):
        store.put("a/one", b"after, much longer")
    monkeypatch.undo()
    assert store.get("a/one") == b"before"
    assert [info.path for info in store.objects("a")] == ["a/one"]


def test_what_was_written_is_synced_to_the_disk_with_its_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def note(handle: int) -> None:
        synced.append(os.path.realpath(f"/proc/self/fd/{handle}").removeprefix(str(tmp_path)).partition(".one")[0])

    monkeypatch.setattr(os, "fsync", note)
    Store(StoreSettings(url=tmp_path.as_uri())).put("a/b/one", b"1")
    assert sorted(synced) == ["", "/a", "/a/b", "/a/b/"]
    synced.clear()
    Store(StoreSettings(url=tmp_path.as_uri(), fsync=False)).put("a/b/one", b"1")
    assert synced == []


def test_a_folder_that_cannot_be_made_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="cannot be made"):
        Store(StoreSettings(url=(tmp_path / "file" / "lake").as_uri()))
