"""What the demo trains, and what it does to a device's sensor: values, and the files that hold them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contract.errors import ConfigurationError
from headwater.plan import DevicePlan, watch_path
from lake.monitoring.policy import LabelSource

MODEL = "watch-activity"
FIELDS = ("ax", "ay", "az", "wx", "wy", "wz")
ROWS_PER_DEVICE = 14_000
"""The latest readings of each device that it learns from: a little more than one whole recording."""
GROUPS_MIN = 3
JUDGING_SHARE = 0.2
"""Of all windows: at least three quarters have to train."""
LABELS = LabelSource(stream="exercise", field="exercise")
_PERSON = r"^watch-(s\d+)-"
_SETTLE_S = 1.0
"""A stage of the demo is watched for so long."""


def demo_recipe(devices: Sequence[str]) -> dict[str, Any]:
    """The recipe of the demo: that of `examples/watch`, with a small budget, and free to do everything by itself.

    Args:
        devices: names; the last person among them judges, and nobody learns from that person.
    """
    person_of = {name: found.group(1) for name in devices if (found := re.match(_PERSON, name))}
    people = sorted(set(person_of.values()))
    split: dict[str, Any] = {"by": "time", "test": 0.2, "folds": 3}
    rows_judging = ROWS_PER_DEVICE
    if len(people) >= GROUPS_MIN:
        split = {"by": "group", "group": _PERSON, "test_groups": people[-1:], "folds": min(3, len(people) - 1)}
        judging = sum(person == people[-1] for person in person_of.values())
        rows_training = ROWS_PER_DEVICE * (len(person_of) - judging)
        rows_judging = min(ROWS_PER_DEVICE, int(rows_training * JUDGING_SHARE / (1 - JUDGING_SHARE) / judging))
    columns = ", ".join(FIELDS)
    judge = people[-1] if people else "-"
    return {
        "name": MODEL,
        "task": "classification",
        "seed": 1,
        "data": {
            "stream": "watch",
            "fields": list(FIELDS),
            "sql": f"SELECT _device, ts, {columns}, _epoch, _seq, _row FROM watch "
            "QUALIFY row_number() OVER (PARTITION BY _device ORDER BY ts DESC) "
            f"<= CASE WHEN _device LIKE 'watch-{judge}-%' THEN {rows_judging} ELSE {ROWS_PER_DEVICE} END",
        },
        "labels": {"stream": LABELS.stream, "field": LABELS.field},
        "window": {"rows": 128, "stride": 64, "gap_s": 0.5},
        "split": split,
        "families": {"extra_trees": {"n_estimators": [100]}, "logistic_regression": {}},
        # Of seven exercises: chance reaches 0.1; people never seen 0.9, with two to learn from 0.6.
        "search": {"metric": "f1_macro", "target": 0.4, "trials": 3, "seconds": 12.0},
        "report": {"html": False, "learning_curve": False},
        # The recordings are played in a loop, so that a device repeats itself.
        "checks": {"windows_min": 50, "identical_windows_max": 1_000_000, "rate_tolerance": 0.5},
        "limits": {"latency_ms_p99_max": 50.0},
        "trial": {"shadow_windows": 10, "trial_windows": 10, "timeout_s": 60.0},
        "policy": {
            "approve": True,
            "rollout": True,
            "retrain": {"drift": True, "checks": 2, "pause_s": 5.0, "tolerance": 0.1},
        },
        "rollout": {
            "max_wait_s": 60.0,
            "stages": [{"percent": share, "bake_s": _SETTLE_S} for share in (25.0, 50.0, 100.0)],
        },
    }


def turned(device: DevicePlan, recordings: Path) -> DevicePlan:
    """The same device worn turned by 90 degrees: its x axis points where its y axis pointed. Writes the recording.

    The values are those of the recording to the bit, in other columns and with other signs.

    Raises:
        ConfigurationError: the recording cannot be written.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = watch_path(recordings, f"{device.recording}.turned")
    table = pq.read_table(watch_path(recordings, device.recording))
    for kind in "aw":
        x, y = table[f"{kind}x"], table[f"{kind}y"]
        for name, column in ((f"{kind}x", pc.negate(y)), (f"{kind}y", x)):
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    draft = path.with_suffix(".part")
    try:
        pq.write_table(table, draft, compression="zstd")
        draft.replace(path)
    except OSError as error:
        raise ConfigurationError(
            f"recordings cannot be written to {recordings}: {error}; choose another --data"
        ) from error
    watch = dict(device.streams["watch"])
    watch["options"] = {**watch["options"], "path": str(path)}
    return DevicePlan(name=device.name, recording=device.recording, streams={**device.streams, "watch": watch})
