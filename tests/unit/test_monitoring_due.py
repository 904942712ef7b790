"""When it is time to learn again.

Mistakes that a test here is for: age counted from the release alone; rows counted that nobody knows the start
of.
"""

from __future__ import annotations

import pytest

from lake.monitoring.alerts import Alert, AlertKind, Key
from lake.monitoring.due import due
from lake.monitoring.policy import Retrain

DAY_US = 86_400_000_000


def asked(retrain: Retrain, alerts=(), *, rows=None, trained_rows=None, now_us=0, ended_us=0) -> str | None:
    found = due(retrain, alerts, rows=rows, trained_rows=trained_rows, created_us=0, now_us=now_us, ended_us=ended_us)
    return None if found is None else found.kind.value


def alert(at_us: int, kind: AlertKind = AlertKind.CHANGE) -> Alert:
    return Alert(Key("gait", 1, "pi-1", kind.value), at_us, "", 1.0, 0.5, "it has changed")


@pytest.mark.parametrize(
    ("now", "ended", "kind"),
    [(6.9, 0, None), (7, 0, "schedule"), (8, 7, None), (13.9, 7, None), (14, 7, "schedule")],
)
def test_a_schedule_counts_from_the_release_or_the_training_that_came_after_it(now, ended, kind):
    weekly = Retrain(every_s=7 * 86_400)
    assert asked(weekly, now_us=round(now * DAY_US), ended_us=ended * DAY_US) == kind


@pytest.mark.parametrize(
    ("rows", "trained", "kind"),
    [(None, None, None), (100, None, None), (149, 100, None), (150, 100, "volume"), (90, 100, None)],
)
def test_volume_counts_from_the_rows_that_the_last_training_saw(rows, trained, kind):
    assert asked(Retrain(new_rows=50), rows=rows, trained_rows=trained) == kind


def test_an_alert_counts_once_and_only_those_that_learning_can_mend():
    assert asked(Retrain(), [alert(10)], ended_us=9) == "drift"
    assert asked(Retrain(), [alert(10)], ended_us=10) is None
    assert asked(Retrain(drift=False), [alert(10)]) is None
    assert asked(Retrain(), [alert(10, AlertKind.LATENCY), alert(10, AlertKind.NAN)]) is None
