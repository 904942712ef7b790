"""DuckDB, opened so that it reads one lake and nothing else: extensions out of the wheels, no network but the store's.

Measured with DuckDB 1.5.5: with external access disabled and the lake as only allowed folder, `delta_scan` and
`read_parquet` work within the lake, and reading a local file, another bucket, ATTACH and SET are refused. COPY into the
lake would still be allowed, which is why `lake.query` runs nothing but SELECT.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from urllib.parse import urlsplit

import duckdb
import msgspec

from contract.errors import ConfigurationError
from lake.credentials import no_credentials
from lake.store import Store


class QuerySettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a query may use."""

    memory_bytes_max: int = 2 * 1024 * 1024 * 1024
    threads_max: int = 4
    spill_folder: str = ""
    """Where results that outgrow the memory go; empty: nowhere, such a query fails."""


def connect(store: Store, settings: QuerySettings) -> duckdb.DuckDBPyConnection:
    """An in-memory database with the delta and httpfs extensions, locked to the store.

    Raises:
        ConfigurationError: an extension is missing or does not fit the installed DuckDB.
    """
    connection = duckdb.connect(
        ":memory:", config={"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    )
    for name in ("httpfs", "delta"):
        path = extension_path(name)
        try:
            with interruptible():
                connection.execute(f"LOAD {literal(path)}")
        except duckdb.Error as error:
            raise ConfigurationError(
                f"DuckDB {duckdb.__version__} cannot load its extension {name} ({error}); install duckdb, "
                "duckdb-extension-httpfs and duckdb-extension-delta of one version: pip install 'headwater[gateway]'"
            ) from error
    options = {
        "TimeZone": "'UTC'",
        "python_enable_replacements": "false",
        "allow_persistent_secrets": "false",
        "preserve_insertion_order": "true",
        "memory_limit": literal(f"{max(1, settings.memory_bytes_max // (1024 * 1024))}MiB"),
        "threads": str(settings.threads_max),
        "temp_directory": literal(settings.spill_folder),
        "http_timeout": str(max(1, round(store.settings.timeout_s / 2))),
        "http_retries": "2",
    }
    for name, value in options.items():
        connection.execute(f"SET GLOBAL {name} = {value}")
    if not store.is_local:
        connection.execute(_secret(store))
    connection.execute(f"SET allowed_directories = [{literal(store.table_uri(''))}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


@contextmanager
def interruptible() -> Iterator[None]:
    """Around calls of DuckDB: Ctrl-C stays a KeyboardInterrupt, which DuckDB turns into a RuntimeError of its own."""
    try:
        yield
    except RuntimeError as error:
        if str(error) != "Query interrupted":
            raise
        raise KeyboardInterrupt from error


def extension_path(name: str) -> str:
    """Where the wheel `duckdb-extension-…` put an extension.

    Raises:
        ConfigurationError: the wheel is not installed.
    """
    distribution = f"duckdb_extension_{name}"
    try:
        found = [str(file.locate()) for file in files(distribution) or () if file.suffix == ".duckdb_extension"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ConfigurationError(f"{distribution} is not installed; install it: pip install 'headwater[gateway]'")
    return found[0]


def literal(text: str) -> str:
    """A string in SQL."""
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """A name in SQL."""
    return '"' + name.replace('"', '""') + '"'


def _secret(store: Store) -> str:
    settings = store.settings
    parts = {"TYPE": "s3", "REGION": literal(settings.region), "SCOPE": literal(store.table_uri("").rstrip("/"))}
    if settings.access_key is None or settings.secret_key is None:
        # DuckDB finds a machine's own role only with an extension that is in no wheel.
        raise ConfigurationError(f"{no_credentials(settings)}; SQL needs keys, a machine's own role does not serve it")
    parts["KEY_ID"], parts["SECRET"] = literal(settings.access_key), literal(settings.secret_key)
    if settings.session_token is not None:
        parts["SESSION_TOKEN"] = literal(settings.session_token)
    if settings.endpoint is not None:
        endpoint = urlsplit(settings.endpoint)
        parts["ENDPOINT"] = literal(endpoint.netloc)
        parts["URL_STYLE"] = "'path'"
        parts["USE_SSL"] = "true" if endpoint.scheme == "https" else "false"
    return "CREATE SECRET lake (" + ", ".join(f"{name} {value}" for name, value in parts.items()) + ")"
