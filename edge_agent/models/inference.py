"""Models over live windows, on one worker thread: readings in from the recorder's thread, predictions out as a stream.

    recorder ─▶ Engine.feed: rings ─▶ bounded queue ─▶ worker: active, then candidate ─▶ predictions
                                                          ▲
                                            Engine.infer ─┘ the local endpoint's windows, between two live ones

The recorder's thread only writes rows into a ring; sampling is never touched. Where the worker is late, whole windows
are skipped and counted, and the ring goes on: the next window is as right as without.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import structlog

from contract.errors import TemporaryError
from contract.models import Manifest, Window
from edge_agent.models.predictions import Outcome, PredictionWriter
from edge_agent.models.runtime import Answer, Floats, Model, ModelError, Watchdog
from edge_agent.models.window import Cut, WindowRing
from edge_agent.sensors.port import Sample

_log = structlog.get_logger()

PENDING_WINDOWS_MAX = 4
"""Of one ring, waiting for the worker; beyond, windows are skipped."""
REQUESTS_MAX = 8
"""Of the local endpoint, waiting for the worker."""
IDLE_S = 1.0
LATENCIES_MAX = 512
"""The latest, for quantiles."""
DEADLINE_S_MIN, DEADLINE_S_MAX = 1.0, 20.0
"""Of one run. The agent ends a worker that makes no progress for 30 s, so a run that hangs must be ended before."""
_DEADLINE_LATENCIES = 10
_NOTICE_S = 60.0


class BusyError(TemporaryError):
    """The worker has too much to do; ask again later."""


class LateError(TemporaryError):
    """There was no answer in time."""


@dataclass
class Counters:
    """What a release did since it was loaded. Written by the worker, read by others: each figure by itself is right."""

    windows: int = 0
    skipped: int = 0
    errors: int = 0
    nan_windows: int = 0
    score_sum: float = 0.0
    scores: int = 0
    latencies_us: deque[int] = field(default_factory=lambda: deque(maxlen=LATENCIES_MAX))
    # Of a candidate.
    shadow: int = 0
    trial: int = 0
    bad: int = 0
    """In shadow and in trial; the next are those in trial."""
    trial_bad: int = 0
    compared: int = 0
    disagreements: int = 0

    def latency_ms(self, quantile: float) -> float:
        """Of the latest windows, by the nearest rank; 0 while there is none."""
        latest = sorted(self.latencies_us)
        return latest[math.ceil(quantile * len(latest)) - 1] / 1000 if latest else 0.0


class Loaded:
    """A release in memory, and what it did."""

    def __init__(self, data: bytes, manifest: Manifest) -> None:
        """Raises ModelError as `runtime.Model`."""
        self.manifest = manifest
        self.model = Model(data, manifest)
        self.counters = Counters()
        limit_s = manifest.limits.latency_ms_p99_max / 1000
        self.deadline_s = min(max(DEADLINE_S_MIN, _DEADLINE_LATENCIES * limit_s), DEADLINE_S_MAX)


class _Spec(NamedTuple):
    """What a ring is for; releases that agree in it share one, and are compared."""

    stream: str
    fields: tuple[str, ...]
    window: Window


@dataclass(frozen=True, eq=False)
class _Feed:
    """A ring and who eats from it."""

    model: str
    spec: _Spec
    ring: WindowRing
    pending: deque[Cut]
    active: Loaded | None
    candidate: Loaded | None


@dataclass(frozen=True)
class _Running:
    """The releases of one model."""

    active: Loaded | None
    candidate: Loaded | None
    front: bool
    feeds: tuple[_Feed, ...]

    @property
    def answering(self) -> Loaded | None:
        return self.candidate if self.front else self.active


class _Request:
    def __init__(self, loaded: Loaded, windows: Floats) -> None:
        self.loaded, self.windows = loaded, windows
        self.done = threading.Event()
        self.outputs: dict[str, Any] = {}
        self.error: ModelError | LateError | None = None


class Engine:
    """Runs models over live windows. `run` is the worker's thread; `feed` belongs to the recorder's, the rest to any.

    Args:
        writer: takes predictions.
        clock_s: monotonic seconds.
    """

    def __init__(self, writer: PredictionWriter, clock_s: Callable[[], float]) -> None:
        self._writer, self._clock_s = writer, clock_s
        self._running: dict[str, _Running] = {}
        self._by_stream: dict[str, tuple[_Feed, ...]] = {}
        self._changing = threading.Lock()
        self._queue: deque[_Feed] = deque()
        self._requests: deque[_Request] = deque()
        self._work = threading.Event()
        self._stopping = threading.Event()
        self._watchdog: Watchdog | None = None
        self._noticed_s: dict[str, float] = {}
        self.schemas: dict[str, pa.Schema] = {}
        """The latest schema of each stream, `ts` included."""
        self.progress_s = clock_s()
        """Monotonic time of the worker's last round, or of the last run that it began."""

    # What runs.

    def configure(self, model: str, active: Loaded | None, candidate: Loaded | None, *, front: bool) -> None:
        """Run these releases of a model from the next window on; a ring that goes on fitting goes on."""
        with self._changing:
            old = self._running.get(model)
            rings = {feed.spec: feed for feed in old.feeds} if old is not None else {}
            specs = dict.fromkeys(_spec(each) for each in (active, candidate) if each is not None)
            feeds = tuple(
                _Feed(
                    model,
                    spec,
                    rings[spec].ring if spec in rings else WindowRing(spec.window, spec.fields),
                    rings[spec].pending if spec in rings else deque(),
                    active if active is not None and _spec(active) == spec else None,
                    candidate if candidate is not None and _spec(candidate) == spec else None,
                )
                for spec in specs
            )
            running = {**self._running, model: _Running(active, candidate, front, feeds)}
            if not feeds:
                del running[model]
            by_stream: dict[str, tuple[_Feed, ...]] = {}
            for each in running.values():
                for feed in each.feeds:
                    by_stream[feed.spec.stream] = (*by_stream.get(feed.spec.stream, ()), feed)
            self._running, self._by_stream = running, by_stream

    def answering(self) -> Mapping[str, Loaded]:
        """The release of each model that answers now."""
        found = ((model, running.answering) for model, running in self._running.items())
        return {model: loaded for model, loaded in found if loaded is not None}

    def models(self) -> Mapping[str, Manifest]:
        """The manifest of each model that answers now."""
        return {model: loaded.manifest for model, loaded in self.answering().items()}

    @property
    def dropped(self) -> Mapping[str, int]:
        """Predictions of each model that found their queue full, since the start."""
        return self._writer.dropped

    # From the recorder's thread.

    def feed(self, stream: str, schema: pa.Schema, sample: Sample) -> None:
        """Take what was recorded; returns soon."""
        if self.schemas.get(stream) is not schema:
            self.schemas[stream] = schema
        for feed in self._by_stream.get(stream, ()):
            try:
                self._cut(feed, sample)
            except Exception as error:  # noqa: BLE001 - whatever a model cannot eat, it must still be recorded
                feed.ring.reset()
                self._notice(feed.active or feed.candidate, f"a reading does not fit: {error}")

    def _cut(self, feed: _Feed, sample: Sample) -> None:
        for cut in feed.ring.feed(sample):
            if len(feed.pending) >= PENDING_WINDOWS_MAX:
                for loaded in (feed.active, feed.candidate):
                    if loaded is not None:
                        loaded.counters.skipped += 1
                continue
            feed.pending.append(cut)
            self._queue.append(feed)
            self._work.set()

    # From any thread.

    def infer(self, model: str, version: int, windows: Floats, timeout_s: float) -> dict[str, Any]:
        """What the model that answers now says of these windows, by output name; on the worker's thread.

        Args:
            model: its name.
            version: the one that shall answer.
            windows: `[batch, W, C]`.
            timeout_s: longest wait.

        Raises:
            KeyError: it does not answer here.
            ModelError: it failed.
            BusyError: too many wait already.
            LateError: the worker did not get to it in time, or the model took too long for one window.
        """
        loaded = self.answering()[model]
        if loaded.manifest.version != version:
            raise KeyError(model)
        request = _Request(loaded, windows)
        if len(self._requests) >= REQUESTS_MAX or self._stopping.is_set():
            raise BusyError(f"{len(self._requests)} requests wait for the models of this device; ask again later")
        self._requests.append(request)
        self._work.set()
        if not request.done.wait(timeout_s):
            raise LateError(f"the models of this device did not answer within {timeout_s:g} s; ask again later")
        if request.error is not None:
            raise request.error
        return request.outputs

    def stop(self) -> None:
        """End the worker after the window at hand."""
        self._stopping.set()
        self._work.set()

    # The worker's thread.

    def run(self) -> None:
        """Score windows until stopped."""
        try:
            while not self._stopping.is_set():
                self._work.wait(IDLE_S)
                self._work.clear()
                self.progress_s = self._clock_s()
                while not self._stopping.is_set() and self.round():
                    self.progress_s = self._clock_s()
        finally:
            if self._watchdog is not None:
                self._watchdog.close()

    def round(self) -> bool:
        """One window and one request; False when there is neither."""
        worked = False
        if self._queue:
            queued = self._queue.popleft()
            cut = queued.pending.popleft()
            self._score(queued, cut)
            worked = True
        if self._requests:
            self._answer(self._requests.popleft())
            worked = True
        return worked

    def _score(self, queued: _Feed, cut: Cut) -> None:
        running = self._running.get(queued.model)
        if running is None:
            return
        feed = queued
        if queued not in running.feeds:
            # What runs has changed since the window was cut; who eats such windows now takes it.
            same = [each for each in running.feeds if each.spec == queued.spec]
            if not same:
                return
            feed = same[0]
        if running.front:
            if feed.candidate is not None:
                outcome = self._tried(feed.candidate, cut, trial=True)
                feed.candidate.counters.trial += 1
                if outcome is not None:
                    self._writer.write(feed.model, cut, outcome, None)
            return
        active = self._outcome(feed.active, cut) if feed.active is not None else None
        shadow = None
        if feed.candidate is not None:
            shadow, counters = self._tried(feed.candidate, cut, trial=False), feed.candidate.counters
            if active is not None and shadow is not None:
                counters.compared += 1
                counters.disagreements += active.answer.label != shadow.answer.label
            # Last, because whoever sees enough windows judges by the other counters.
            counters.shadow += 1
        if active is not None:
            self._writer.write(feed.model, cut, active, shadow)

    def _tried(self, candidate: Loaded, cut: Cut, *, trial: bool) -> Outcome | None:
        """The candidate's outcome, with what is bad about it counted."""
        outcome = self._outcome(candidate, cut)
        if outcome is None or (math.isnan(outcome.answer.score) and not outcome.answer.nan_count):
            candidate.counters.bad += 1
            candidate.counters.trial_bad += trial
        return outcome

    def _outcome(self, loaded: Loaded, cut: Cut) -> Outcome | None:
        """What a release says of a window; None where it failed or took too long."""
        counters, watchdog = loaded.counters, self._watching()
        self.progress_s = self._clock_s()
        options = watchdog.begin(loaded.deadline_s)
        began_ns = time.perf_counter_ns()
        try:
            answer = loaded.model.answer(cut.values, options)
        except ModelError as error:
            late = watchdog.end()
            counters.windows += 1
            counters.errors += 1
            self._notice(loaded, f"stopped after {loaded.deadline_s:g} s" if late else str(error))
            return None
        latency_us = (time.perf_counter_ns() - began_ns) // 1000
        watchdog.end()
        _count(counters, answer, latency_us)
        return Outcome(loaded.manifest.version, answer, latency_us)

    def _answer(self, request: _Request) -> None:
        watchdog = self._watching()
        self.progress_s = self._clock_s()
        model = request.loaded.model
        limit_s = request.loaded.deadline_s
        options = watchdog.begin(limit_s)
        failure: ModelError | None = None
        try:
            outputs = model.run(request.windows, options)
            request.outputs = dict(zip(model.outputs, outputs, strict=True))
        except ModelError as error:
            failure = error
        finally:
            late = watchdog.end()
            if failure is not None:
                stopped = LateError(f"the model was stopped after {limit_s:g} s; send fewer windows")
                request.error = stopped if late else failure
            request.done.set()

    def _watching(self) -> Watchdog:
        if self._watchdog is None:
            self._watchdog = Watchdog(self._clock_s)
        return self._watchdog

    def _notice(self, loaded: Loaded | None, why: str) -> None:
        """Log one failure a minute: a model that always fails must not fill a disk."""
        if loaded is None:
            return
        model, now_s = loaded.manifest.model, self._clock_s()
        if now_s - self._noticed_s.get(model, -_NOTICE_S) >= _NOTICE_S:
            self._noticed_s[model] = now_s
            _log.warning("model_window_failed", model=model, version=loaded.manifest.version, error=why)


def _spec(loaded: Loaded) -> _Spec:
    manifest = loaded.manifest
    return _Spec(manifest.stream, manifest.fields, manifest.window)


def _count(counters: Counters, answer: Answer, latency_us: int) -> None:
    counters.latencies_us.append(latency_us)
    is_nan = math.isnan(answer.score)
    if is_nan or answer.nan_count:
        counters.nan_windows += 1
    if not is_nan:
        counters.score_sum += answer.score
        counters.scores += 1
    counters.windows += 1
