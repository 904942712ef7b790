"""From a release to the rows it came from, and from rows to the releases that came of them.

A manifest names the Delta version of every table that its trainer read. A version of a Delta table never changes, so
the same SQL over the same versions gives the same rows, for as long as the table keeps them (see `vacuum`).
"""

from __future__ import annotations

import msgspec

from contract.errors import ConfigurationError
from contract.names import is_name
from lake.errors import UnknownStreamError
from lake.query import Lake
from lake.releases import Release, ReleaseBook


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """Where a release came from."""

    model: str
    version: int
    streams: dict[str, int]
    """Delta version of each table that was read, by stream."""
    dataset_sha256: str
    windows: int
    recipe: str
    """TOML, with the SQL in it."""
    code: str
    seed: int
    packages: dict[str, str]
    parents: tuple[int, ...]
    """Versions that it replaced, the nearest first."""


def lineage_of(book: ReleaseBook, release: Release) -> Lineage:
    """Where a release came from."""
    manifest = release.manifest
    parents: list[int] = []
    parent = manifest.parent
    while parent is not None and parent not in parents:
        parents.append(parent)
        before = book.releases.get((release.model, parent))
        parent = None if before is None else before.manifest.parent
    return Lineage(
        model=release.model,
        version=release.version,
        streams=manifest.dataset.streams,
        dataset_sha256=manifest.dataset.sha256,
        windows=manifest.dataset.windows,
        recipe=manifest.recipe,
        code=manifest.code,
        seed=manifest.seed,
        packages=manifest.packages,
        parents=tuple(parents),
    )


def releases_from(
    book: ReleaseBook, stream: str, *, committed: int | None = None, device: str | None = None, lake: Lake | None = None
) -> list[Release]:
    """The releases whose trainer read rows of a stream: candidates to retire when the rows turn out to be wrong.

    A recipe's SQL may have left rows out; what it kept, its text in the manifest says.

    Args:
        book: all releases.
        stream: name of the stream.
        committed: only those that read the table at this Delta version or a later one, so could see its rows.
        device: only those whose table, as it was read, had rows of this device; needs `lake`.
        lake: to look for the device.

    Raises:
        ConfigurationError: the device is not a name.
        QueryError: a version of the table is gone.
        StoreUnavailableError: the store did not answer.
    """
    if device is not None and not is_name(device):
        raise ConfigurationError(f"device {device[:80]!r} is not a name; use 1 to 63 of a-z 0-9 . _ -")
    found = []
    for release in book.releases.values():
        version = release.manifest.dataset.streams.get(stream)
        if version is None or (committed is not None and version < committed):
            continue
        if device is not None and lake is not None and not _has_rows(lake, stream, version, device):
            continue
        found.append(release)
    return sorted(found, key=lambda release: (release.model, release.version))


def _has_rows(lake: Lake, stream: str, version: int, device: str) -> bool:
    quoted = '"' + stream.replace('"', '""') + '"'
    try:
        answer = lake.sql(f"SELECT count(*) AS rows FROM {quoted} WHERE _device = '{device}'", at=version)
    except UnknownStreamError:
        return False
    return bool(answer.column("rows")[0].as_py())
