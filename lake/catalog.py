"""Which tables a lake has, by the names that SQL uses for them."""

from __future__ import annotations

import re
import threading
from datetime import datetime
from typing import NamedTuple

import pyarrow as pa
from deltalake import DeltaTable

from lake.errors import NoSuchVersionError, ObjectMissingError
from lake.history import version_at
from lake.log import TransactionLog
from lake.predictions import FOLDER as PREDICTIONS
from lake.predictions import predictions_path
from lake.quarantine import PATH as QUARANTINE_PATH
from lake.raw import lane_of, table_path
from lake.store import Store

At = int | datetime | None
"""Which state of a table: a version, a time, or the latest."""

QUARANTINE = "quarantine"
_PATH = re.compile(r"[a-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)+", re.ASCII)
_OWN_FOLDERS = ("schemas", "probe")
"""Folders of `control/` that hold no table."""


def table_of(name: str) -> str | None:
    """The table that a name means which is a path within the lake, such as `raw/vibration`."""
    return name if _PATH.fullmatch(name) else None


class TableState(NamedTuple):
    """A table as of one version."""

    path: str
    uri: str
    version: int
    schema: pa.Schema


class Catalog:
    """The tables of one lake. Safe to share between threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._handles: dict[str, tuple[DeltaTable, str]] = {}
        """Each with the mark of its version's commit, by which a table that was restored or made again is told."""

    def streams(self) -> list[str]:
        """Names of all streams, sorted.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        return self._store.folders("raw")

    def paths(self) -> dict[str, str]:
        """The table that each name in SQL means: `quarantine`, then tables of `control/`, then streams.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        found = {name: table_path(name) for name in self.streams()}
        found |= {name: f"control/{name}" for name in self._store.folders("control") if name not in _OWN_FOLDERS}
        return found | {QUARANTINE: QUARANTINE_PATH}

    def predictions(self) -> list[str]:
        """The tables that batch scoring writes, by path, which is their name in SQL too.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        return [predictions_path(model) for model in self._store.folders(PREDICTIONS)]

    def state(self, path: str, at: At = None) -> TableState | None:
        """A table as it is, or was.

        Returns:
            None where there is no such table (at that time).

        Raises:
            QueryError: the version is not one of the table, or the time is too long ago.
            StoreUnavailableError: the store did not answer.
        """
        if isinstance(at, datetime):
            version = version_at(self._store, path, at)
            return None if version is None else self._at_version(path, version)
        if at is not None:
            latest = self.state(path)
            if latest is not None and not 0 <= at <= latest.version:
                raise NoSuchVersionError(
                    f"{path.removeprefix('raw/')} has no version {at}; choose one of 0 to {latest.version}, or a time"
                )
            return None if latest is None else self._at_version(path, at)
        with self._lock:
            handle, mark = self._handles.pop(path, (None, ""))
            if handle is not None and mark != self._mark(path, handle):
                handle = None
            version = -1 if handle is None else handle.version()
            try:
                with self._store.translated(f"open table {path}"):
                    if handle is None:
                        handle = self._open(path)
                    else:
                        handle.update_incremental()
            except ObjectMissingError:
                return None
            if handle.version() != version:
                mark = self._mark(path, handle)
            if mark:
                self._handles[path] = handle, mark
            return self._state_of(path, handle)

    def files(self, state: TableState) -> pa.Table:
        """The files of a table, one row each, with their statistics (see deltalake's `get_add_actions`)."""
        with self._store.translated(f"read table {state.path}"):
            return pa.table(self._open(state.path, state.version).get_add_actions(flatten=True))

    def devices(self, state: TableState) -> int | None:
        """How many devices ever committed to a raw table; None where its log does not say."""
        log = TransactionLog(self._store, state.path)
        log.advance(state.version)
        app_ids = log.app_ids()
        if app_ids is None:
            return None
        return len({device for device, epoch in map(lane_of, app_ids) if epoch})

    def _open(self, path: str, version: int | None = None) -> DeltaTable:
        return DeltaTable(self._store.table_uri(path), version=version, storage_options=self._store.storage_options)

    def _mark(self, path: str, handle: DeltaTable) -> str:
        return self._store.mark(f"{path}/_delta_log/{handle.version():020d}.json")

    def _at_version(self, path: str, version: int) -> TableState:
        with self._store.translated(f"open table {path} at version {version}"):
            return self._state_of(path, self._open(path, version))

    def _state_of(self, path: str, handle: DeltaTable) -> TableState:
        return TableState(path, self._store.table_uri(path), handle.version(), pa.schema(handle.schema().to_arrow()))
