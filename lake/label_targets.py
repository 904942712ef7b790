"""Whether labels are about a stream and devices that the lake knows.

Labels that are about nothing are found out late: they match no window, training and accuracy pass them over, and rows
of `control/labels` are never taken back. A name that was mistyped is so refused before anything is written.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from contract.errors import ConfigurationError
from contract.names import PREDICTIONS_PREFIX
from lake.catalog import Catalog
from lake.log import TransactionLog
from lake.raw import lane_of, table_path
from lake.releases import Releases
from lake.store import Store

SHOWN = 5
ALLOW = "where its rows are still to come, import with --allow-unknown"


def check_targets(store: Store, stream: str, devices: Iterable[str]) -> None:
    """Refuse labels of what the lake does not know.

    A stream is known that has rows, or that a release eats: devices may send what a model says and not what it saw.

    Args:
        store: where the lake is.
        stream: that is labelled.
        devices: that are.

    Raises:
        ConfigurationError: the stream or a device is not known; names it and what is like it.
        StoreUnavailableError: the store did not answer.
    """
    catalog = Catalog(store)
    streams = set(catalog.streams())
    releases = [release.manifest for release in Releases(store).look().releases.values()]
    sources = {stream} | {PREDICTIONS_PREFIX + manifest.model for manifest in releases if manifest.stream == stream}
    if not sources & streams:
        known = sorted({name for name in streams if "." not in name} | {manifest.stream for manifest in releases})
        raise ConfigurationError(
            f"{store.url} has no stream {stream!r}{_like(stream, known)}; correct --stream, or {ALLOW}"
        )
    seen: set[str] = set()
    for source in sources & streams:
        found = _devices(store, catalog, source)
        if found is None:
            return  # an unusual log: who is to say that a device is not there
        seen |= found
    unknown = sorted(set(devices) - seen)
    if unknown:
        named = ", ".join(f"{name!r}{_like(name, sorted(seen))}" for name in unknown[:SHOWN])
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise ConfigurationError(
            f"no row of {stream} is of the device {named}{more}; nothing was imported: correct it, or {ALLOW}"
        )


def _devices(store: Store, catalog: Catalog, stream: str) -> set[str] | None:
    """Devices that ever committed to a stream; None where its log does not say."""
    state = catalog.state(table_path(stream))
    if state is None:
        return set()
    log = TransactionLog(store, state.path)
    log.advance(state.version)
    app_ids = log.app_ids()
    if app_ids is None:
        return None
    return {device for device, epoch in map(lane_of, app_ids) if epoch}


def _like(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f" (is it {close[0]!r}?)" if close else ""
