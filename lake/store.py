"""The one place where bytes are kept: a folder (`file:///dir`) or a bucket (`s3://bucket/prefix`), behind a few
methods.

Every request is bounded: a store that hangs, refuses or answers nonsense gives `StoreUnavailableError` within
`timeout_s`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec
import obstore
import pyarrow as pa
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import LocalStore, S3Store

from contract.errors import ConfigurationError
from lake.errors import CommitConflictError, ObjectMissingError, StoreUnavailableError

_RETRIES_MAX = 3
# delta-rs, DuckDB and obstore escape other characters differently, and would look in different places.
_S3_PREFIX = re.compile(r"[A-Za-z0-9._/-]*", re.ASCII)
_NO_ROLE = re.compile(r"169\.254\.169\.254|/latest/(?:api/token|meta-data)|\bIMDS\b|loading credentials")
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*m")
_PROBES = "control/probe"
_BACKOFF_FIRST_S = 0.1
_BACKOFF_LONGEST_S = 2.0


class StoreSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the lake is and how to reach it."""

    url: str
    """`file:///folder` or `s3://bucket/prefix`."""
    endpoint: str | None = None
    """`http(s)://host:port` of an S3-compatible server; None: Amazon's."""
    region: str = "us-east-1"
    access_key: str | None = None
    """None: what the platform offers (instance role, container credentials)."""
    secret_key: str | None = None
    session_token: str | None = None
    allow_http: bool = False
    """Whether the endpoint may be plain http."""
    timeout_s: float = 30.0
    """Longest time one request may take, its retries included."""
    connect_timeout_s: float = 5.0
    fsync: bool = True
    """file:// only: whether a commit waits until the disk has it, so that a power cut cannot take back what was
    acknowledged. An object store decides this for itself."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is opened."""
        parts = urlsplit(self.url)
        if parts.scheme == "s3" and not _S3_PREFIX.fullmatch(parts.path):
            raise ConfigurationError(f"lake {self.url!r}: use letters, digits and . _ - / in the prefix, nothing else")
        if parts.scheme == "file":
            if parts.netloc or not parts.path.startswith("/") or parts.query or parts.fragment:
                raise ConfigurationError(f"lake {self.url!r} is not a folder; write file:///absolute/folder")
            if not parts.path.strip("/"):
                raise ConfigurationError(f"lake {self.url!r} is the root of all files; write file:///absolute/folder")
        elif parts.scheme == "s3":
            if not parts.netloc or parts.query or parts.fragment:
                raise ConfigurationError(f"lake {self.url!r} names no bucket; write s3://bucket/prefix")
        else:
            raise ConfigurationError(f"lake {self.url!r} is neither file:///folder nor s3://bucket/prefix")
        if self.endpoint is not None:
            endpoint = urlsplit(self.endpoint)
            if endpoint.scheme not in ("http", "https") or not endpoint.netloc or endpoint.path.strip("/"):
                raise ConfigurationError(f"endpoint {self.endpoint!r} is not http(s)://host:port")
            if endpoint.scheme == "http" and not self.allow_http:
                raise ConfigurationError(
                    f"endpoint {self.endpoint!r} is not encrypted; use https or set allow_http = true, or the variable "
                    "AWS_ALLOW_HTTP=true"
                )
        for name in ("timeout_s", "connect_timeout_s"):
            if not 0.1 <= getattr(self, name) <= 600:
                raise ConfigurationError(f"{name} = {getattr(self, name)} is outside 0.1..600 seconds")

    def __repr__(self) -> str:
        """Without the secret: settings end up in logs."""
        return f"StoreSettings(url={self.url!r}, endpoint={self.endpoint!r}, access_key={self.access_key!r})"

    @classmethod
    def from_environment(cls, url: str, environ: Mapping[str, str]) -> StoreSettings:
        """Complete a URL with the usual `AWS_…` variables. For the rim only: nothing reads the environment later."""
        if not url.startswith("s3:"):
            return cls(url=url)
        endpoint = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or None
        allow = environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes")
        return cls(
            url=url,
            endpoint=endpoint,
            region=environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or "us-east-1",
            access_key=environ.get("AWS_ACCESS_KEY_ID") or None,
            secret_key=environ.get("AWS_SECRET_ACCESS_KEY") or None,
            session_token=environ.get("AWS_SESSION_TOKEN") or None,
            allow_http=allow,
        )


class ObjectInfo(NamedTuple):
    """One object of a listing."""

    path: str
    """Relative to the lake."""
    size: int
    """Bytes."""


class Tagged(NamedTuple):
    """An object as it was read."""

    data: bytes
    tag: str
    """Changes whenever the object does."""


class Store:
    """Objects by path relative to the lake, and what deltalake and DuckDB need to reach the same place.

    Safe to share between threads.
    """

    def __init__(self, settings: StoreSettings) -> None:
        self.settings = settings
        self._folder: Path | None = None
        self._objects: LocalStore | S3Store
        parts = urlsplit(settings.url)
        if parts.scheme == "file":
            self._folder = Path(unquote(parts.path))
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigurationError(
                    f"lake folder {self._folder} cannot be made ({error}); choose another"
                ) from error
            self._root = str(self._folder).rstrip("/")
            self._objects = LocalStore(self._folder)
        else:
            prefix = unquote(parts.path).strip("/")
            self._root = f"s3://{parts.netloc}/{prefix}".rstrip("/")
            self._objects = _s3_store(settings, parts.netloc, prefix)

    @property
    def url(self) -> str:
        """Where the lake is, without credentials."""
        return self.settings.url

    @property
    def is_local(self) -> bool:
        """Whether the lake is a folder of this machine."""
        return self._folder is not None

    @property
    def storage_options(self) -> dict[str, str]:
        """What deltalake needs to reach the store with the same bounds on time and retries."""
        settings = self.settings
        if self.is_local:
            return {}
        attempt_s = settings.timeout_s / 2
        options = {
            "AWS_REGION": settings.region,
            "aws_conditional_put": "etag",
            "timeout": f"{attempt_s:.3f}s",
            "connect_timeout": f"{min(settings.connect_timeout_s, attempt_s):.3f}s",
            "max_retries": str(_RETRIES_MAX),
            "retry_timeout": f"{attempt_s:.3f}s",
            "backoff_config.init_backoff": f"{_BACKOFF_FIRST_S}s",
            "backoff_config.max_backoff": f"{_BACKOFF_LONGEST_S}s",
        }
        if settings.endpoint is not None:
            options["AWS_ENDPOINT_URL"] = settings.endpoint
        if settings.allow_http:
            options["AWS_ALLOW_HTTP"] = "true"
        if settings.access_key is not None and settings.secret_key is not None:
            options["AWS_ACCESS_KEY_ID"] = settings.access_key
            options["AWS_SECRET_ACCESS_KEY"] = settings.secret_key
        if settings.session_token is not None:
            options["AWS_SESSION_TOKEN"] = settings.session_token
        return options

    def table_uri(self, path: str) -> str:
        """Where deltalake and DuckDB find a table: an absolute folder or an s3 URL."""
        return f"{self._root}/{path}"

    def put(self, path: str, data: bytes | pa.Buffer) -> None:
        """Write an object, replacing what is there.

        Raises:
            StoreUnavailableError: it is not known whether the object was written.
        """
        with self._translated(f"write {path}"):
            if self._folder is not None and self.settings.fsync:
                _write_durably(self._folder / path, data)
            else:
                obstore.put(self._objects, path, memoryview(data).cast("B"), use_multipart=False)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write an object unless there is one: at most one of many callers writes.

        Returns:
            False where an object stood there already. After a retry that may be the caller's own.

        Raises:
            StoreUnavailableError: it is not known whether the object was written.
        """
        with self._translated(f"write {path}"):
            try:
                obstore.put(self._objects, path, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        self.sync(path)
        return True

    def get(self, path: str) -> bytes:
        """Read an object.

        Raises:
            ObjectMissingError: there is none.
            StoreUnavailableError: the store did not answer.
        """
        with self._translated(f"read {path}"):
            return bytes(obstore.get(self._objects, path).bytes())

    def get_range(self, path: str, start: int, length: int) -> bytes:
        """Read a part of an object; shorter where the object ends.

        Raises:
            ObjectMissingError: there is none.
            StoreUnavailableError: the store did not answer, or the object ends before `start`.
        """
        with self._translated(f"read {path}"):
            return bytes(obstore.get_range(self._objects, path, start=start, length=length))

    def size(self, path: str) -> int:
        """Bytes of an object.

        Raises:
            ObjectMissingError: there is none.
            StoreUnavailableError: the store did not answer.
        """
        with self._translated(f"look at {path}"):
            return obstore.head(self._objects, path)["size"]

    def mark(self, path: str) -> str:
        """Something that changes whenever an object is written anew; empty where there is none.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        try:
            with self._translated(f"look at {path}"):
                found = obstore.head(self._objects, path)
        except ObjectMissingError:
            return ""
        return f"{found['e_tag']} {found['size']}"

    def get_tagged(self, path: str) -> Tagged:
        """Read an object that is to be replaced by `replace`.

        Raises:
            ObjectMissingError: there is none.
            StoreUnavailableError: the store did not answer.
        """
        with self._translated(f"read {path}"):
            found = obstore.get(self._objects, path)
            tag = found.meta["e_tag"] or ""
            data = bytes(found.bytes())
        return Tagged(data, _digest(data) if self.is_local else tag)

    def replace(self, path: str, data: bytes, tag: str) -> bool:
        """Write an object if the one that stands there is still that of `get_tagged`: of many callers, one writes.

        Returns:
            False where it is another one by now. After a retry that may be the caller's own.

        Raises:
            StoreUnavailableError: it is not known whether the object was written.
        """
        with self._translated(f"write {path}"):
            if self._folder is not None:
                return _replace_locally(self._folder / path, data, tag, self.settings.fsync)
            try:
                obstore.put(self._objects, path, data, mode={"e_tag": tag}, use_multipart=False)
            except PreconditionError:
                return False
        return True

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects under a folder, at any depth, in no order.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        with self._translated(f"list {prefix}"):
            for chunk in obstore.list(self._objects, prefix=prefix or None):
                for found in chunk:
                    yield ObjectInfo(found["path"], found["size"])

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders right under a folder, sorted.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        with self._translated(f"list {prefix}"):
            found = obstore.list_with_delimiter(self._objects, prefix=prefix or None)
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"])

    def delete(self, path: str) -> None:
        """Remove an object; one that is not there is no error.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        with self._translated(f"delete {path}"):
            try:
                obstore.delete(self._objects, path)
            except FileNotFoundError:
                pass  # S3 does not tell either

    def remove_empty(self, folder: str) -> None:
        """Remove a folder of a file:// lake that holds nothing (any more), and those above it; elsewhere are none."""
        if self._folder is not None:
            with contextlib.suppress(OSError):  # something is in it, or it is not there: both are well
                for path in ((within := self._folder / folder), *within.parents):
                    if path == self._folder:
                        break
                    path.rmdir()

    def probe(self) -> None:
        """Write, read and remove a small object: the store answers and the credentials suffice.

        Raises:
            StoreUnavailableError: they do not; the message says what failed.
        """
        path = f"{_PROBES}/{secrets.token_hex(8)}"
        self.put(path, b"headwater")
        try:
            if self.get(path) != b"headwater":
                raise StoreUnavailableError(f"lake {self.url} gave back other bytes than were written at {path}")
        except ObjectMissingError as error:
            raise StoreUnavailableError(f"lake {self.url} does not read what was just written at {path}") from error
        self.delete(path)
        self.remove_empty(_PROBES)

    def sync(self, path: str) -> None:
        """Wait until the disk has an object that somebody else wrote (deltalake does not). Nothing to do on S3.

        Raises:
            StoreUnavailableError: the disk refused.
        """
        if self._folder is None or not self.settings.fsync:
            return
        with self._translated(f"sync {path}"):
            written = self._folder / path
            _fsync(written)
            for folder in written.parents:
                _fsync(folder)
                if folder == self._folder:
                    break

    def sync_commits(self, table: str, after: int) -> None:
        """Wait until the disk has the commits of a table beyond a version. Nothing to do on S3.

        Raises:
            StoreUnavailableError: the disk refused; of the commits it is not known whether they will last.
        """
        if self._folder is None or not self.settings.fsync:
            return
        log = self._folder / table / "_delta_log"
        with self._translated(f"sync {table}"):
            while (commit := log / f"{after + 1:020d}.json").exists():
                _fsync(commit)
                after += 1
                checkpoint = log / f"{after:020d}.checkpoint.parquet"
                if checkpoint.exists():
                    # A checkpoint that a power cut left empty would hide the whole table.
                    _fsync(checkpoint)
                    _fsync(log / "_last_checkpoint")
            for folder in (log, log.parent, log.parent.parent, self._folder):
                _fsync(folder)

    @contextlib.contextmanager
    def translated(self, what: str) -> Iterator[None]:
        """Turn what deltalake raises into the lake's errors.

        Raises:
            ObjectMissingError: there is no such table.
            CommitConflictError: another commit came first.
            StoreUnavailableError: anything else; of a commit it is not known whether it happened.
        """
        try:
            yield
        except TableNotFoundError as error:
            raise ObjectMissingError(f"cannot {what} in {self.url}: there is no table") from error
        except CommitFailedError as error:
            raise CommitConflictError(f"cannot {what} in {self.url}: {error}") from error
        except (DeltaError, OSError, ValueError) as error:
            if "already exists at that location" in str(error):
                raise CommitConflictError(f"cannot {what} in {self.url}: somebody else made it first") from error
            raise StoreUnavailableError(f"cannot {what} in {self.url}: {_first_line(error)}") from error

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            if what.startswith("write"):
                raise StoreUnavailableError(
                    f"cannot {what} in {self.url}: there is no such bucket or folder"
                ) from error
            raise ObjectMissingError(f"cannot {what} in {self.url}: there is no such object") from error
        except (BaseError, OSError, ValueError) as error:
            raise StoreUnavailableError(f"cannot {what} in {self.url}: {_first_line(error)}") from error


def _s3_store(settings: StoreSettings, bucket: str, prefix: str) -> S3Store:
    # A request is retried as long as retry_timeout has not passed, and each attempt may take `timeout`: together
    # timeout_s.
    attempt = timedelta(seconds=settings.timeout_s / 2)
    credentials: Any = {
        name: value
        for name, value in (
            ("access_key_id", settings.access_key),
            ("secret_access_key", settings.secret_key),
            ("session_token", settings.session_token),
            ("endpoint", settings.endpoint),
        )
        if value is not None
    }
    return S3Store(
        bucket,
        prefix=prefix or None,
        region=settings.region,
        conditional_put="etag",
        virtual_hosted_style_request=settings.endpoint is None,
        client_options={
            "timeout": attempt,
            "connect_timeout": min(timedelta(seconds=settings.connect_timeout_s), attempt),
            "allow_http": settings.allow_http,
        },
        retry_config={
            "max_retries": _RETRIES_MAX,
            "retry_timeout": attempt,
            "backoff": {
                "init_backoff": timedelta(seconds=_BACKOFF_FIRST_S),
                "max_backoff": timedelta(seconds=_BACKOFF_LONGEST_S),
                "base": 2,
            },
        },
        **credentials,
    )


def _write_durably(path: Path, data: bytes | pa.Buffer) -> None:
    """Write, fsync, rename, fsync the folders: after it returns no power cut takes the object away or leaves half of
    it."""
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    for folder in {path.parent, *(folder.parent for folder in made)}:
        _fsync(folder)


def _replace_locally(path: Path, data: bytes, tag: str, fsync: bool) -> bool:
    """A folder has no conditional write: the lock on the object's folder makes one, among those who call this."""
    handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if _digest(path.read_bytes()) != tag:
            return False
        if fsync:
            _write_durably(path, data)
        else:
            draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
            draft.write_bytes(data)
            draft.replace(path)
    finally:
        os.close(handle)
    return True


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _first_line(error: BaseException) -> str:
    """The cause in one line; object-store errors carry pages of debug text."""
    text = " ".join(_TERMINAL_CODES.sub("", str(error)).split()).partition(" Debug source:")[0]
    if _NO_ROLE.search(text):
        return (
            "there are no credentials: no keys are set (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), and the platform "
            f"gave none ({text[:150]})"
        )
    return text if len(text) <= 300 else text[:297] + "…"
