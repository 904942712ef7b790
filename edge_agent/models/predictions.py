"""What a model says, as rows of the stream `predictions.<model>`, which takes the same way as every reading.

`ts` is the end of the window by the device's clock, so a prediction and the readings that it is about stand side by
side.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pyarrow as pa

from contract.batches import TS_TYPE
from contract.names import PREDICTIONS_PREFIX, TS, is_name
from edge_agent.models.runtime import Answer
from edge_agent.models.window import Cut
from edge_agent.sampling.queue import Sink
from edge_agent.sensors.port import Reading

SCHEMA = pa.schema(
    [
        pa.field(TS, TS_TYPE, nullable=False),
        pa.field("release", pa.int32()),
        pa.field("window_start", TS_TYPE),
        pa.field("score", pa.float32()),
        pa.field("label", pa.string()),
        pa.field("latency_us", pa.int32()),
        pa.field("nan_count", pa.int32()),
        pa.field("features", pa.list_(pa.float32())),
        pa.field("shadow_release", pa.int32()),
        pa.field("shadow_score", pa.float32()),
        pa.field("shadow_label", pa.string()),
    ]
)
"""`score`: of the chosen label, or the anomaly score. `label`: empty where the model gives none. `features`: of every
so-many-th window, null else. `shadow_…`: of a candidate that is tried beside, null else."""
_INT32_MAX = 2**31 - 1
_NEVER = threading.Event()


class Outcome(NamedTuple):
    """A release's answer to a window."""

    release: int
    answer: Answer
    latency_us: int


def stream_of(model: str) -> str | None:
    """The stream of a model's predictions; None where the name would be too long for one."""
    name = PREDICTIONS_PREFIX + model
    return name if is_name(name) else None


class PredictionWriter:
    """Puts predictions into their streams; never waits: what finds no room is counted.

    Args:
        sink_of: opens the queue of a stream.
        features_every: one row in so many carries its features; 0 for none.
    """

    def __init__(self, sink_of: Callable[[str], Sink], features_every: int) -> None:
        self._sink_of, self._every = sink_of, features_every
        self._sinks: dict[str, Sink] = {}
        self._written: dict[str, int] = {}
        self.dropped: Counter[str] = Counter()
        """Rows that found the queue full, by model."""

    def write(self, model: str, cut: Cut, outcome: Outcome, shadow: Outcome | None) -> None:
        """One row."""
        sink = self._sinks.get(model)
        if sink is None:
            stream = stream_of(model)
            if stream is None:
                return
            sink = self._sinks[model] = self._sink_of(stream)
        number = self._written.get(model, 0)
        self._written[model] = number + 1
        answer = outcome.answer
        sampled = self._every and number % self._every == 0 and answer.features is not None
        values = {
            "release": outcome.release,
            "window_start": cut.start_us,
            "score": answer.score,
            "label": answer.label,
            "latency_us": min(outcome.latency_us, _INT32_MAX),
            "nan_count": min(answer.nan_count, _INT32_MAX),
            "features": answer.features.tolist() if sampled and answer.features is not None else None,
            "shadow_release": None if shadow is None else shadow.release,
            "shadow_score": None if shadow is None else shadow.answer.score,
            "shadow_label": None if shadow is None else shadow.answer.label,
        }
        if not sink.put(SCHEMA, Reading(values, cut.end_us), 0.0, _NEVER):
            self.dropped[model] += 1
