"""The worker of an agent's models: what hangs is ended and told as late, and every run is a sign of life.

Mutants tried: no sign of life but once a round; a request that was stopped told as a failure of the model; bad windows
of the trial not told from those of the shadow.
"""

from __future__ import annotations

import itertools
import threading
import time
from array import array
from typing import Any

import pyarrow as pa
import pytest
from prometheus_client import CollectorRegistry

from contract.inference import Unanswered
from contract.models import ReportedModel
from edge_agent.models.inference import Engine, Loaded
from edge_agent.models.metrics import ModelMetrics
from edge_agent.models.predictions import PredictionWriter
from edge_agent.models.served import ServedModels
from edge_agent.sensors.port import Reading
from tests.integration.models_bench import ROWS, STREAM, manifest_of, model

SCHEMA = pa.schema([("ts", pa.timestamp("us", "UTC")), ("x", pa.float64()), ("y", pa.float64())])


class Full:
    """A queue without room."""

    def put(self, *_: Any) -> bool:
        return False


def engine_of(clock_s: Any = time.monotonic) -> Engine:
    return Engine(PredictionWriter(lambda stream: Full(), 0), clock_s)


def loaded(version: int = 1, **character: Any) -> Loaded:
    data = model(**character)
    return Loaded(data, manifest_of(data, version=version))


def fed(engine: Engine, rows: int = ROWS) -> None:
    for row in range(rows):
        engine.feed(STREAM, SCHEMA, Reading({"x": 1.0, "y": 0.5}, 1_000_000 + row * 100_000))


def test_a_request_that_the_watchdog_ends_is_late_and_not_the_models_failure() -> None:
    engine, hanging = engine_of(), loaded(character="hangs")
    hanging.deadline_s = 0.2
    engine.configure("gestures", hanging, None, front=False)
    worker = threading.Thread(target=engine.run)
    worker.start()
    try:
        with pytest.raises(Unanswered) as refused:
            ServedModels(engine).infer("gestures", 1, array("f", [0.5] * ROWS * 2), 1, 30.0)
    finally:
        engine.stop()
        worker.join(10)
    assert refused.value.status == 504
    assert "stopped after 0.2 s" in str(refused.value)


def test_every_run_of_a_round_is_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    engine = engine_of(lambda: float(next(ticks)))
    both = [loaded(1), loaded(2, threshold=1.0)]
    engine.configure("gestures", *both, front=False)
    seen = []
    for each in both:
        answer = each.model.answer

        def watched(*values: Any, answer: Any = answer) -> Any:
            seen.append(engine.progress_s)
            return answer(*values)

        monkeypatch.setattr(each.model, "answer", watched)
    fed(engine)
    before = engine.progress_s
    while engine.round():
        pass
    assert len(seen) == 2
    assert before < seen[0] < seen[1]


def test_bad_windows_of_the_trial_are_counted_apart_from_those_of_the_shadow() -> None:
    engine, candidate = engine_of(), loaded(2, character="nan")
    for front, trial_bad in ((False, 0), (True, 1), (True, 2)):
        engine.configure("gestures", loaded(1), candidate, front=front)
        fed(engine)  # time goes back: a new window
        while engine.round():
            pass
        counters = candidate.counters
        assert (counters.bad, counters.trial_bad) == (1 + trial_bad, trial_bad)
        assert (counters.shadow, counters.trial) == (1, trial_bad)


def test_predictions_that_find_no_room_are_counted_by_model() -> None:
    engine, registry = engine_of(), CollectorRegistry()
    metrics = ModelMetrics(registry, 1)
    engine.configure("gestures", loaded(), None, front=False)
    fed(engine)
    while engine.round():
        pass
    assert engine.dropped == {"gestures": 1}
    for _ in range(2):
        metrics.show({"gestures": ReportedModel(active=1)}, 0, engine.dropped)
    total = registry.get_sample_value("headwater_agent_model_dropped_predictions_total", {"model": "gestures"})
    assert total == 1
