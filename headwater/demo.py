"""`headwater demo`: the whole road on real recordings, then the books: is every reading in the lake exactly once?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from edge_agent.buffer.port import LaneInfo
from headwater import output, render
from headwater.answers import questions
from headwater.learning.outcome import Learned, learned
from headwater.learning.road import Road
from headwater.ledger import LaneKey, Ledger, Totals, lanes_of, quantile_s
from headwater.plan import WATCH, UpOptions, stream_name
from headwater.reconcile import Balance, balance
from headwater.render import milliseconds
from headwater.result import AckMs, Answer, DemoResult, StreamResult
from headwater.running import introduce, sayer
from headwater.signals import ending_at_once, stopping
from headwater.stack.folder import DataFolder
from headwater.stack.supervisor import Supervisor
from headwater.tally import arrivals, count_gaps, count_quarantined, moment, stream_names
from headwater.up import Stack
from headwater.values import Values, compare
from lake.query import Lake
from lake.store import Store

ROAD_LOOK_S = 1.0


def run_demo(options: UpOptions, environment: Mapping[str, str], *, json: bool) -> DemoResult:
    """Run the demo, show what it found, and return it.

    Raises:
        HeadwaterError: the stack could not start, or a process gave up.
        KeyboardInterrupt: it was to stop before it was up.
    """
    with stopping() as stop, DataFolder(options.data) as folder, Supervisor() as supervisor:
        say = sayer(json=json)
        stack = Stack(options, folder=folder, supervisor=supervisor, environment=environment, say=say)
        before = lanes_of(stack.places)
        began_us = time.time_ns() // 1000
        with stop.interrupting():
            record = stack.start()
        if json:
            output.say_json({"event": "up", "data": str(options.data), "notes": stack.notes, "stack": record})
        else:
            introduce(options, record, stack.notes)
        totals, seconds, road = _send(stack, stop, options.seconds or 0.0, say, json=json)
        say("counting; Ctrl-C ends it without a result")
        run = _Run(before, lanes_of(stack.places), totals, began_us, seconds, road)
        with ending_at_once():
            result = _reconciled(stack, run)
        stack.stop()
    if json:
        output.say_json(result)
    else:
        render.result(result, options.data)
    return result


class _Run(NamedTuple):
    """What is known of a run without the lake."""

    before: Mapping[LaneKey, LaneInfo]
    after: Mapping[LaneKey, LaneInfo]
    totals: Totals
    began_us: int
    seconds: float
    road: Road | None


def _send(
    stack: Stack, stop: threading.Event, seconds: float, say: Callable[[str], None], *, json: bool
) -> tuple[Totals, float, Road | None]:
    """Let the devices send until the time is over and the models have gone their way; count what they accepted."""
    ledger = Ledger(stack.places)
    ledger.start()
    began_s = time.monotonic()
    road = _road(stack, say, ledger)
    try:
        with render.progress(seconds, json=json) as show:
            stack.run(stop, seconds, lambda: show(ledger.totals()))
            while road is not None and not road.over.is_set() and not stop.is_set():
                stack.run(stop, ROAD_LOOK_S, lambda: show(ledger.totals()))
        passed_s = time.monotonic() - began_s
        if road is not None:
            road.stop()
        ledger.look_closely()
        stack.stop_devices()
    finally:
        if road is not None:
            road.stop()
        ledger.stop()
    return ledger.totals(), passed_s, road


def _road(stack: Stack, say: Callable[[str], None], ledger: Ledger) -> Road | None:
    """The way of models, begun; None where there is none to go."""
    if not stack.options.models or stack.options.recordings != WATCH or stack.keys is None:
        return None
    road = Road(stack, say, ledger.look_closely)
    road.start()
    return road


def _reconciled(stack: Stack, run: _Run) -> DemoResult:
    """Hold the buffers' books against the lake."""
    since = moment(run.began_us)
    lake = Lake(Store(stack.store))
    try:
        streams = sorted({key.stream for key in run.totals.rows} & set(stream_names(lake.streams())))
        books = balance(run.before, run.after, run.totals.rows, run.totals.batches, arrivals(lake.sql, streams, since))
        leftovers = {lane.device for lane, info in run.before.items() if info.batches}
        stretches = {name: lives + (name in leftovers) for name, lives in run.totals.lives.items()}
        values = compare(lake.sql, stack.devices, stretches, since, stack.replaced)
        gaps = count_gaps(lake.sql, run.before, {place.name for place in stack.places})
        quarantined = count_quarantined(lake.sql, since)
        answers = [
            Answer(question.title, lake.sql(question.sql).to_pylist())
            for question in questions(stack.options.recordings, stream_name(Path(stack.options.recordings)))
        ]
        models = learned(lake, run.road, run.began_us) if run.road is not None else None
    finally:
        lake.close()
    return _result(stack, run, books, values, answers, gaps, quarantined, models)


def _result(
    stack: Stack,
    run: _Run,
    books: Balance,
    values: Values,
    answers: list[Answer],
    gaps: int,
    quarantined: int,
    models: Learned | None,
) -> DemoResult:
    accepted, totals = books.total("rows_accepted"), run.totals
    bad = [books.total(name) for name in ("lost", "duplicated", "waiting")]
    bad += [gaps, quarantined, values.rows_changed, values.breaks, 0 if accepted else 1]
    trouble = "" if models is None else models.trouble
    return DemoResult(
        ok=not any(bad) and not trouble,
        exactly_once=not any(bad),
        rows_accepted=accepted,
        rows_in_lake=books.total("rows_in_lake"),
        distinct=books.total("distinct"),
        lost=books.total("lost"),
        duplicated=books.total("duplicated"),
        gaps=gaps,
        quarantined=quarantined,
        waiting=books.total("waiting"),
        rows_compared=values.rows_compared,
        rows_changed=values.rows_changed,
        breaks=values.breaks,
        exact=books.exact,
        seconds=round(run.seconds, 1),
        readings_per_s=round(accepted / max(run.seconds, 0.1), 1),
        ack_ms=AckMs(milliseconds(quantile_s(totals.acks, 0.5)), milliseconds(quantile_s(totals.acks, 0.99))),
        wire_bytes_per_reading=round(totals.wire_bytes / max(accepted, 1), 2),
        overruns=totals.lost_before_buffer,
        agent_resident_bytes_max=totals.resident_bytes_max,
        restarts=stack.restarts,
        streams=[
            StreamResult(**{name: getattr(stream, name) for name in StreamResult.__struct_fields__})
            for stream in books.streams
        ],
        answers=answers,
        models=[] if models is None else models.models,
        drift=None if models is None else models.drift,
        models_trouble=trouble,
    )
