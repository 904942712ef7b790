"""A lake's store: the operations that exactly-once stands on, tried in `control/doctor/` and cleaned up."""

from __future__ import annotations

import http.client
import secrets
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from headwater.checks.findings import Finding, failed, guarded, ok, skipped, warning
from lake.errors import ObjectMissingError
from lake.store import Store, StoreSettings

CLOCK_SKEW_S_MAX = 60.0
"""S3 signatures fail at 15 minutes; a minute already shows that somebody's clock is wrong."""
FOLDER = "control/doctor"
REMEDY = "start the object store, or name the lake with --lake and its keys with AWS_… variables"


def check_store(settings: StoreSettings, remedy: str = REMEDY) -> list[Finding]:
    """Everything that the lake asks of a store.

    Args:
        settings: which store.
        remedy: what to do where it does not answer.
    """
    opened = guarded("store.open", remedy, lambda: _opened(settings))
    if opened[0].verdict != "ok":
        return opened
    store = Store(settings)
    path = f"{FOLDER}/{secrets.token_hex(8)}"
    first = guarded("store.put_get", remedy, lambda: _put_get(store, path))
    findings = [*opened, *first]
    if first[0].verdict == "ok":
        findings += guarded("store.list", "allow listing the bucket", lambda: _list(store, path))
        findings += guarded("store.conditional_put", _CONDITIONAL, lambda: _conditional(store, f"{path}-once"))
        findings += guarded("store.delete", "allow deleting objects", lambda: _delete(store, path))
        store.remove_empty(FOLDER)
    findings += guarded("store.clock", "set the clock of this machine or of the store", lambda: _skew(settings))
    return findings


_CONDITIONAL = (
    "use a store with conditional writes (If-None-Match: *): Amazon S3, SeaweedFS, MinIO, Ceph, R2; without them two "
    "gateways could overwrite each other's commits"
)


def _opened(settings: StoreSettings) -> Finding:
    store = Store(settings)
    return ok("store.open", store.url)


def _put_get(store: Store, path: str) -> Finding:
    data = secrets.token_bytes(64 * 1024)
    began = time.monotonic()
    store.put(path, data)
    if store.get(path) != data:
        return failed("store.put_get", "an object came back with other bytes", "do not use this store")
    return ok("store.put_get", f"64 KiB written and read in {(time.monotonic() - began) * 1000:.0f} ms")


def _list(store: Store, path: str) -> Finding:
    found = {item.path: item.size for item in store.objects(FOLDER)}
    if found.get(path) != 64 * 1024:
        return failed("store.list", f"{path} was written, but is not listed", "use a store with consistent listings")
    return ok("store.list", "what was written is listed at once")


def _conditional(store: Store, path: str) -> Finding:
    try:
        if not store.put_if_absent(path, b"first"):
            return failed("store.conditional_put", f"it says that {path} exists, and it does not", _CONDITIONAL)
        if store.put_if_absent(path, b"second") or store.get(path) != b"first":
            return failed("store.conditional_put", "a second write replaced the first", _CONDITIONAL)
    finally:
        store.delete(path)
    return ok("store.conditional_put", "of two writers only the first succeeds")


def _delete(store: Store, path: str) -> Finding:
    store.delete(path)
    try:
        store.get(path)
    except ObjectMissingError:
        return ok("store.delete", "what was deleted is gone")
    return failed("store.delete", f"{path} was deleted, but can still be read", "use a store with consistent deletes")


def _skew(settings: StoreSettings) -> Finding:
    if settings.endpoint is None:
        return skipped("store.clock", "no endpoint to ask for the time")
    parts = urlsplit(settings.endpoint)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=settings.connect_timeout_s)
    try:
        connection.request("HEAD", "/")
        said = connection.getresponse().getheader("Date")
    except (OSError, http.client.HTTPException) as error:
        # A store that is down is told above; its clock is none of the reasons.
        return skipped("store.clock", f"the store does not tell its time: {str(error) or repr(error)}")
    finally:
        connection.close()
    if said is None:
        return skipped("store.clock", "the store does not tell its time")
    skew_s = (datetime.now(UTC) - parsedate_to_datetime(said)).total_seconds()
    if abs(skew_s) > CLOCK_SKEW_S_MAX:
        detail = f"this machine's clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the store's"
        return warning("store.clock", detail, "set the clock of this machine or of the store (NTP)")
    return ok("store.clock", f"within {max(1, round(abs(skew_s)))} s of the store's")
