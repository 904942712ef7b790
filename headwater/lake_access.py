"""Which lake a command means, and how to reach it; an embedded store that is not running is started for as long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import msgspec

from contract.errors import ConfigurationError
from headwater.place import LAKE_VARIABLE, StackRecord, find_record
from headwater.turn import turn
from lake.credentials import require_credentials
from lake.store import Store, StoreSettings

if TYPE_CHECKING:
    from headwater.stack.folder import DataFolder
    from headwater.stack.objectstore import StoreAccess
    from headwater.stack.supervisor import Supervisor

EMBEDDED = "embedded"


class Found(msgspec.Struct, frozen=True):
    """A lake, and the data folder that serves it where it is an embedded one."""

    settings: StoreSettings
    embedded_in: Path | None


def find_store(lake: str | None, data: str | None, environment: Mapping[str, str]) -> Found:
    """The lake that is meant: `--lake`, else `$HEADWATER_LAKE`, else that of the stack in the data folder.

    Args:
        lake: a URL, or `embedded` for the one of the data folder.
        data: the data folder.
        environment: the process environment; also names the keys (`AWS_…`).

    Raises:
        ConfigurationError: the URL is not one, or there is no stack.
    """
    given = lake or environment.get(LAKE_VARIABLE)
    if given and given != EMBEDDED:
        return Found(StoreSettings.from_environment(given, environment), None)
    folder, record = find_record(data, environment, "--lake")
    if not record.lake.embedded:
        if given == EMBEDDED:
            raise ConfigurationError(f"the stack in {folder} has its lake at {record.lake.url}, not embedded")
        return Found(_external(record, environment), None)
    return Found(_embedded(folder, record), folder)


@contextmanager
def opened_store(lake: str | None, data: str | None, environment: Mapping[str, str]) -> Iterator[Store]:
    """The store that is meant, with the keys to it, answering.

    An embedded one whose stack is stopped is started, and stopped again at the end.

    Args:
        lake, data, environment: as of `find_store`.

    Raises:
        ConfigurationError: as `find_store`; or there is no such folder, or no key to the bucket.
        TemporaryError: it does not answer.
    """
    found = find_store(lake, data, environment)
    require_credentials(found.settings, environment)
    with ExitStack() as stack:
        started = _started(found.embedded_in, stack) if found.embedded_in is not None else None
        settings = started or found.settings
        folder = urlsplit(settings.url)
        if folder.scheme == "file" and not Path(unquote(folder.path)).is_dir():
            raise ConfigurationError(
                f"there is no folder {unquote(folder.path)}; name the lake that a gateway writes to with --lake"
            )
        yield Store(settings)


def _started(path: Path, stack: ExitStack) -> StoreSettings | None:
    """Start the embedded store, unless its stack runs."""
    from headwater.stack.errors import FolderInUse
    from headwater.stack.folder import DataFolder
    from headwater.stack.supervisor import Supervisor

    try:
        folder = stack.enter_context(DataFolder(path))
    except FolderInUse:
        return None  # a stack, or another command like this one, runs the store
    supervisor = stack.enter_context(Supervisor())
    with turn():
        return _start_store(folder, supervisor)


def _start_store(folder: DataFolder, supervisor: Supervisor) -> StoreSettings:
    from headwater.stack.objectstore import Seaweed
    from headwater.stack.ports import PortBook

    ports = PortBook(folder.ports).claim(Seaweed.PORTS)
    seaweed = Seaweed(folder.part("store"), log=folder.log("store"), ports=ports)
    supervisor.start([seaweed.spec()], timeout_s=60.0)
    return store_settings(seaweed.access)


def store_settings(access: StoreAccess) -> StoreSettings:
    """How to reach an embedded object store."""
    return StoreSettings(
        url=access.url,
        endpoint=access.endpoint,
        region=access.region,
        access_key=access.key,
        secret_key=access.secret,
        allow_http=True,
    )


def _embedded(folder: Path, record: StackRecord) -> StoreSettings:
    from headwater.stack.objectstore import Seaweed

    port = urlsplit(record.lake.endpoint or "").port
    if port is None:
        raise ConfigurationError(f"{folder} holds a damaged stack.json; start `headwater up` once more over it")
    return store_settings(Seaweed(folder / "store", log=folder / "logs" / "store.log", ports={"s3": port}).access)


def _external(record: StackRecord, environment: Mapping[str, str]) -> StoreSettings:
    settings = StoreSettings.from_environment(record.lake.url, environment)
    if settings.endpoint is None and record.lake.endpoint is not None:
        return msgspec.structs.replace(
            settings, endpoint=record.lake.endpoint, allow_http=record.lake.endpoint.startswith("http:")
        )
    return settings
