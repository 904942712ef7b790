"""When it is time to learn again. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from contract.models import Manifest
from lake.catalog import Catalog
from lake.errors import ObjectMissingError, QueryError
from lake.monitoring.alerts import DRIFT, Alert
from lake.monitoring.policy import Retrain
from lake.monitoring.triggers import TriggerKind
from lake.raw import table_path
from lake.releases import Release, ReleaseBook, ReleaseState

NAMED_MAX = 3
"""Alerts that a reason names."""


class Reason(NamedTuple):
    """Why now."""

    kind: TriggerKind
    why: str


def approved(book: ReleaseBook, model: str) -> Release | None:
    """The newest release that is approved; None where there is none."""
    return next((release for release in book.of_model(model) if release.state is ReleaseState.APPROVED), None)


def current(book: ReleaseBook, model: str) -> Release | None:
    """The release that a training would replace: the newest that is approved. None where there is none, or where a
    newer draft waits for somebody to decide."""
    for release in book.of_model(model):
        if release.state is ReleaseState.DRAFT:
            return None
        if release.state is ReleaseState.APPROVED:
            return release
    return None


def due(
    retrain: Retrain,
    alerts: Sequence[Alert],
    *,
    rows: int | None,
    trained_rows: int | None,
    created_us: int,
    now_us: int,
    ended_us: int = 0,
) -> Reason | None:
    """Whether a policy asks for a training now.

    A training that did not lead to a release was one all the same: what it was asked for begins anew with its end.
    Otherwise a candidate that is worse today is asked for again as soon as the pause is over, for ever.

    Args:
        retrain: the policy of the current release.
        alerts: those that are open for it.
        rows: of its stream; None where nobody counted.
        trained_rows: of its stream when the latest training saw it; None where it is not known.
        created_us: when it was made.
        now_us: wall clock.
        ended_us: when the last training of the model ended, 0 for never; an alert that was open then has had its
            training, and another on the same data would find the same.
    """
    drifted = [alert for alert in alerts if alert.key.kind in DRIFT and alert.at_us > ended_us]
    if retrain.drift and drifted:
        named = "; ".join(f"{alert.key.device or 'all devices'}: {alert.text}" for alert in drifted[:NAMED_MAX])
        more = f" and {len(drifted) - NAMED_MAX} more" if len(drifted) > NAMED_MAX else ""
        return Reason(TriggerKind.DRIFT, f"{named}{more}")
    new_rows = None if rows is None or trained_rows is None else rows - trained_rows
    if retrain.new_rows is not None and new_rows is not None and new_rows >= retrain.new_rows:
        return Reason(TriggerKind.VOLUME, f"{new_rows} rows since the training, the policy says {retrain.new_rows}")
    age_s = (now_us - max(created_us, ended_us)) / 1e6
    if retrain.every_s is not None and age_s >= retrain.every_s:
        return Reason(
            TriggerKind.SCHEDULE, f"the last training was {age_s:.0f} s ago, the policy says {retrain.every_s:g} s"
        )
    return None


def rows_at(catalog: Catalog, stream: str, version: int | None = None) -> int | None:
    """Rows of a stream at a Delta version, None for the latest.

    None where there is no such table, or where the log does not have the version any more.

    Raises:
        StoreUnavailableError: the store did not answer.
    """
    try:
        state = catalog.state(table_path(stream), version)
        if state is None:
            return None
        return sum(count or 0 for count in catalog.files(state).column("num_records").to_pylist())
    except (QueryError, ObjectMissingError):
        return None


def trained_version(manifest: Manifest) -> int | None:
    """Delta version of the release's stream that it was trained on; None where the manifest does not say."""
    streams = manifest.dataset.streams
    return streams.get(manifest.stream, streams.get(table_path(manifest.stream)))
