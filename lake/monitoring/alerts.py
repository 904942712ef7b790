"""The table `control/alerts`: what is wrong with a release on a device, from when to when.

An alert opens when so many looks in a row find it, and closes when so many in a row do not; in between it is one row,
however long it lasts. Opening and closing are committed by check-and-set against the alerts that are open, so several
gateways, or one that starts anew, do not open the same alert twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

import pyarrow as pa

from lake.ledger import TIMESTAMP, Ledger, Row, Table
from lake.monitoring.accuracy import Accuracy
from lake.monitoring.observe import Figures

PATH = "control/alerts"
SCHEMA = pa.schema(
    [
        pa.field("at", TIMESTAMP),
        pa.field("model", pa.string()),
        pa.field("release", pa.int64()),
        pa.field("device", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("event", pa.string()),
        pa.field("feature", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("threshold", pa.float64()),
        pa.field("text", pa.string()),
        pa.field("who", pa.string()),
        pa.field("sequence", pa.int64()),
    ]
)
OPENED, CLOSED = "opened", "closed"
CLOSE_BELOW = 0.8
"""An open alert counts as over only below this part of its threshold."""
SILENT_H = 24.0
"""An alert closes after so many hours without a window from its device: nobody can say that it is still so."""
NAN_SHARE_MAX = 0.5
COUNTED_MAX = 10_000
ACCURACY_DROP_MAX = 0.1
"""So much less than in its evaluation a release may be right."""


class AlertKind(StrEnum):
    """What is wrong. The values are a contract: they stand in the table and in metrics."""

    FEATURES = "features"
    """More of the features have drifted from training than training groups do among themselves."""
    SCORE = "score"
    CHANGE = "change"
    """The device has changed against its own first windows."""
    NAN = "nan"
    LATENCY = "latency"
    ACCURACY = "accuracy"


DRIFT = frozenset({AlertKind.FEATURES, AlertKind.SCORE, AlertKind.CHANGE, AlertKind.ACCURACY})
"""Kinds that learning again can mend."""


class Key(NamedTuple):
    """What an alert is about: at most one is open for each."""

    model: str
    release: int
    device: str
    kind: str


class Finding(NamedTuple):
    """One look at one key."""

    key: Key
    over: bool
    calm: bool
    """Clearly below; between `over` and `calm` nothing is counted."""
    feature: str
    value: float
    threshold: float
    text: str


class Alert(NamedTuple):
    """An alert that is open."""

    key: Key
    at_us: int
    feature: str
    value: float
    threshold: float
    text: str


def judge(model: str, figures: Figures, windows_min: int, latency_ms_max: float | None = None) -> list[Finding]:
    """What can be said of a release on a device; kinds without enough data are left out."""
    found: list[tuple[AlertKind, str, float, float, str]] = []
    if figures.drifted_share is not None and figures.features:
        worst = figures.features[0]
        found.append(
            (
                AlertKind.FEATURES,
                worst.name,
                figures.drifted_share,
                figures.drifted_share_max,
                f"{figures.drifted_share:.0%} of the features are away from training, foremost {worst.name} "
                f"(PSI {worst.psi:.2f}, threshold {worst.threshold:.2f}, KS {worst.ks:.2f})",
            )
        )
    if figures.score is not None:
        score = figures.score
        value = score.psi if score.drifted else min(score.psi, CLOSE_BELOW * score.threshold * 0.99)
        text = f"the score is away from training (PSI {score.psi:.2f}, KS {score.ks:.2f})"
        found.append((AlertKind.SCORE, score.name, value, score.threshold, text))
    if figures.change is not None:
        text = f"the device has changed since the release began there, foremost {figures.change_feature}"
        found.append((AlertKind.CHANGE, figures.change_feature, figures.change, figures.change_max, text))
    if figures.windows >= windows_min:
        text = f"{figures.nan_share:.0%} of the windows lack values or have no score"
        found.append((AlertKind.NAN, "", figures.nan_share, NAN_SHARE_MAX, text))
        if latency_ms_max is not None:
            text = f"p99 latency {figures.latency_ms_p99:.1f} ms, the release allows {latency_ms_max:g} ms"
            found.append((AlertKind.LATENCY, "", figures.latency_ms_p99, latency_ms_max, text))
    return [
        Finding(
            Key(model, figures.release, figures.device, kind.value),
            value > threshold,
            value <= CLOSE_BELOW * threshold,
            feature,
            value,
            threshold,
            text,
        )
        for kind, feature, value, threshold, text in found
    ]


def judge_accuracy(model: str, found: Accuracy, promised: float, windows_min: int) -> Finding | None:
    """Whether a release is less right than its evaluation promised; None where too few windows are labelled."""
    if found.accuracy is None or found.labelled < windows_min:
        return None
    least = promised - ACCURACY_DROP_MAX
    return Finding(
        Key(model, found.release, found.device, AlertKind.ACCURACY.value),
        found.accuracy < least,
        found.accuracy >= least + ACCURACY_DROP_MAX / 5,
        "",
        found.accuracy,
        least,
        f"right in {found.accuracy:.1%} of {found.labelled} labelled windows, in its evaluation in {promised:.1%}",
    )


class Hysteresis:
    """Counts looks in a row. Bounded by forgetting what does not matter any more, and beyond `COUNTED_MAX` what was
    looked at longest ago: a device that is gone in the midst of its count."""

    def __init__(self) -> None:
        self._counts: dict[Key, int] = {}

    def step(self, finding: Finding, is_open: bool, checks: int) -> str | None:
        """Count a look.

        Args:
            finding: what it found.
            is_open: whether the alert is.
            checks: looks in a row that open or close it.

        Returns:
            `OPENED` or `CLOSED` where that is to be done now.
        """
        matters = finding.calm if is_open else finding.over
        if not matters:
            self._counts.pop(finding.key, None)
            return None
        count = self._counts.pop(finding.key, 0) + 1
        if count < checks:
            self._counts[finding.key] = count
            if len(self._counts) > COUNTED_MAX:
                del self._counts[next(iter(self._counts))]
            return None
        return CLOSED if is_open else OPENED


def fold(rows: Iterable[Row]) -> dict[Key, Alert]:
    """The alerts that are open."""
    found: dict[Key, Alert] = {}
    for row in rows:
        key = Key(row["model"], row["release"], row["device"], row["kind"])
        if row["event"] == OPENED:
            alert = Alert(key, row["at"], row["feature"] or "", row["value"], row["threshold"], row["text"] or "")
            found.setdefault(key, alert)
        elif row["event"] == CLOSED:
            found.pop(key, None)
    return found


class AlertTable:
    """The table as one process sees it. Not thread-safe.

    Args:
        open_table: gives the table, anew when credentials changed.
        who: names the process in the rows.
        now_us: wall clock, microseconds since 1970-01-01 UTC.
    """

    def __init__(self, open_table: Callable[[], Table], who: str, now_us: Callable[[], int]) -> None:
        self._ledger = Ledger(open_table, SCHEMA)
        self._who, self._now_us = who, now_us

    def open(self) -> dict[Key, Alert]:
        """The alerts that are open now.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        return fold(self._ledger.look())

    def record(self, changes: Sequence[tuple[str, Finding]]) -> list[Row]:
        """Open and close alerts, those left out that somebody else opened or closed.

        Returns:
            The rows that were added.

        Raises:
            CommitConflictError: others were first too often; look again.
            StoreUnavailableError: it is not known whether the rows are in; recording them again is harmless.
        """

        def decide(rows: list[Row]) -> list[Row]:
            opened = fold(rows)
            return [
                self._row(event, finding) for event, finding in changes if (finding.key in opened) == (event == CLOSED)
            ]

        return self._ledger.act(decide) if changes else []

    def _row(self, event: str, finding: Finding) -> Row:
        return {
            "at": self._now_us(),
            **finding.key._asdict(),
            "event": event,
            "feature": finding.feature,
            "value": finding.value,
            "threshold": finding.threshold,
            "text": finding.text,
            "who": self._who,
        }


def over(alert: Alert, why: str) -> Finding:
    """A finding that closes an alert for another reason than its figure, such as a newer release on the device."""
    return Finding(alert.key, False, True, alert.feature, alert.value, alert.threshold, why)
