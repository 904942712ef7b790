"""What came of the demo's models: who ran which release, and how right they were by the labels of the recordings."""

from __future__ import annotations

from typing import NamedTuple

from headwater.learning.recipe import LABELS, MODEL
from headwater.learning.road import Road
from headwater.result import DriftResult, ModelResult
from lake.errors import UnknownStreamError
from lake.monitoring.accuracy import Accuracy, measure, read_labels, read_predictions
from lake.query import Lake

PREDICTIONS_MAX = 1_000_000


class Learned(NamedTuple):
    """For the demo's result."""

    models: list[ModelResult]
    drift: DriftResult | None
    trouble: str


def learned(lake: Lake, road: Road, since_us: int) -> Learned:
    """Hold the predictions against the labels.

    Args:
        lake: where both are.
        road: at its end.
        since_us: when the run began, microseconds since 1970-01-01 UTC.
    """
    figures = _accuracies(lake, since_us)
    models = []
    for rolled in road.rolled:
        total = figures.get((rolled.version, ""))
        models.append(
            ModelResult(
                name=MODEL,
                version=rolled.version,
                rollout=rolled.state,
                devices=sum(1 for release, device in figures if release == rolled.version and device),
                windows=0 if total is None else total.labelled,
                accuracy=None if total is None else total.accuracy,
            )
        )
    return Learned(models, _drift(lake, road), road.trouble)


def _drift(lake: Lake, road: Road) -> DriftResult | None:
    found = road.turned
    if found is None:
        return None
    figures = _accuracies(lake, found.since_us)
    return DriftResult(
        device=found.device,
        detected_after_s=found.detected_after_s,
        retrained=found.retrained,
        alert=found.alert,
        accuracy={
            str(rolled.version): one.accuracy
            for rolled in road.rolled
            if (one := figures.get((rolled.version, found.device))) is not None
        },
    )


def _accuracies(lake: Lake, since_us: int) -> dict[tuple[int, str], Accuracy]:
    """By release and device; device "" for all of them."""
    try:
        predictions = read_predictions(lake, MODEL, since_us, PREDICTIONS_MAX)
    except UnknownStreamError:
        return {}  # no device has predicted anything yet
    return {(one.release, one.device): one for one in measure(predictions, read_labels(lake, LABELS, "watch"))}
