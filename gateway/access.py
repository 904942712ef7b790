"""The way to the lake: one store, opened anew when its credentials change."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import structlog

from contract.errors import ConfigurationError
from contract.settings import convert, read_toml
from gateway.ports import QuarantineTable, StreamTable
from gateway.registry import PATH as DEVICES_PATH
from gateway.registry import SCHEMA as DEVICES_SCHEMA
from gateway.settings import LakeSettings
from lake.credentials import require_credentials
from lake.monitoring.alerts import PATH as ALERTS_PATH
from lake.monitoring.alerts import SCHEMA as ALERTS_SCHEMA
from lake.monitoring.triggers import PATH as TRIGGERS_PATH
from lake.monitoring.triggers import SCHEMA as TRIGGERS_SCHEMA
from lake.quarantine import QuarantineTable as LakeQuarantine
from lake.raw import RawTable
from lake.releases import Releases
from lake.rollouts import PATH as ROLLOUTS_PATH
from lake.rollouts import SCHEMA as ROLLOUTS_SCHEMA
from lake.store import Store, StoreSettings
from lake.tables import ControlTable

_log = structlog.get_logger()

Handle = TypeVar("Handle")
LOOK_INTERVAL_S = 1.0
"""The credentials file is looked at this often, and only when the lake is used."""


class _Credentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    access_key: str
    secret_key: str
    session_token: str | None = None


def store_settings(settings: LakeSettings, environ: Mapping[str, str]) -> StoreSettings:
    """What `lake` needs to know.

    Args:
        settings: the table `[lake]`; what it leaves empty comes from the environment.
        environ: the environment of the process, read once at the rim.

    Raises:
        ConfigurationError: naming what is wrong and the remedy.
    """
    found = StoreSettings.from_environment(settings.url, environ)
    changes: dict[str, object] = {
        "timeout_s": settings.timeout_s,
        "connect_timeout_s": settings.connect_timeout_s,
        "fsync": settings.fsync,
    }
    if settings.endpoint:
        changes["endpoint"] = settings.endpoint
    if settings.region:
        changes["region"] = settings.region
    if settings.allow_http:
        changes["allow_http"] = True
    if settings.credentials_file:
        changes |= msgspec.structs.asdict(_read_credentials(Path(settings.credentials_file)))
    complete = msgspec.structs.replace(found, **changes)
    require_credentials(complete, environ)
    return complete


def _read_credentials(path: Path) -> _Credentials:
    return convert(read_toml(path, "a file with access_key and secret_key"), _Credentials, f"{path}: ")


class LakeAccess:
    """Opens tables. Safe to use from several threads; what it opens is not.

    Args:
        settings: how to reach the lake, as of the start.
        credentials_file: read again when it changes; empty where credentials never change.
        max_clock_skew_s: for the tables.
        clock_s: monotonic seconds.
    """

    def __init__(
        self,
        settings: StoreSettings,
        credentials_file: str,
        max_clock_skew_s: float,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = Path(credentials_file) if credentials_file else None
        self._max_clock_skew_s, self._clock_s = max_clock_skew_s, clock_s
        self._lock = threading.Lock()
        self._generation = 0
        self._settings = settings
        self._stamp = self._look()
        self._looked_s = clock_s()
        self._store = Store(settings)

    @property
    def generation(self) -> int:
        """Changes with the credentials: tables opened before use the old ones."""
        with self._lock:
            now_s = self._clock_s()
            if self._file is not None and now_s - self._looked_s >= LOOK_INTERVAL_S:
                self._looked_s = now_s
                self._renew()
            return self._generation

    @property
    def store(self) -> Store:
        """The store, with the credentials of now."""
        _ = self.generation
        return self._store

    def open_table(self, stream: str) -> StreamTable:
        """A handle of a stream's table; touches nothing yet."""
        return RawTable(self.store, stream, max_clock_skew_s=self._max_clock_skew_s)

    def open_quarantine(self) -> QuarantineTable:
        """A handle of the quarantine table; touches nothing yet."""
        return LakeQuarantine(self.store)

    def open_devices(self) -> ControlTable:
        """A handle of `control/devices`; touches nothing yet."""
        return ControlTable(self.store, DEVICES_PATH, DEVICES_SCHEMA)

    def open_rollouts(self) -> ControlTable:
        """A handle of `control/rollouts`; touches nothing yet."""
        return ControlTable(self.store, ROLLOUTS_PATH, ROLLOUTS_SCHEMA)

    def open_releases(self) -> Releases:
        """A handle of the register of releases; touches nothing yet."""
        return Releases(self.store)

    def open_alerts(self) -> ControlTable:
        """A handle of `control/alerts`; touches nothing yet."""
        return ControlTable(self.store, ALERTS_PATH, ALERTS_SCHEMA)

    def open_triggers(self) -> ControlTable:
        """A handle of `control/triggers`; touches nothing yet."""
        return ControlTable(self.store, TRIGGERS_PATH, TRIGGERS_SCHEMA)

    def _renew(self) -> None:
        stamp = self._look()
        if stamp == self._stamp or self._file is None:
            return
        try:
            credentials = _read_credentials(self._file)
        except ConfigurationError as error:
            # Half written, perhaps: the old ones serve until the new ones can be read.
            _log.warning("credentials_unreadable", file=str(self._file), error=str(error))
            return
        self._stamp = stamp
        fresh = msgspec.structs.replace(self._settings, **msgspec.structs.asdict(credentials))
        if _secrets(fresh) != _secrets(self._settings):
            self._settings, self._store = fresh, Store(fresh)
            self._generation += 1
            _log.info("credentials_renewed", file=str(self._file))

    def _look(self) -> tuple[int, int, int] | None:
        if self._file is None:
            return None
        try:
            found = self._file.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size


class Kept(Generic[Handle]):
    """One handle, opened anew when credentials change. For one thread.

    Args:
        access: the way to the lake.
        opened: opens it.
    """

    def __init__(self, access: LakeAccess, opened: Callable[[], Handle]) -> None:
        self._access, self._opened = access, opened
        self._found: tuple[int, Handle] | None = None

    def __call__(self) -> Handle:
        """The handle."""
        generation = self._access.generation
        if self._found is None or self._found[0] != generation:
            self._found = generation, self._opened()
        return self._found[1]


def _secrets(settings: StoreSettings) -> tuple[str | None, str | None, str | None]:
    return settings.access_key, settings.secret_key, settings.session_token
