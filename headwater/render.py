"""What a demo shows a person: how it goes, and how it ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from headwater import output
from headwater.ledger import Totals, quantile_s
from headwater.place import data_option
from headwater.result import DemoResult

PLAIN_S = 10.0
"""Between two lines of progress where nobody watches a terminal."""

_SUMMED = ("rows_accepted", "rows_in_lake", "distinct", "lost", "duplicated", "gaps")

Show = Callable[[Totals], None]


@contextmanager
def progress(seconds: float, *, json: bool) -> Iterator[Show]:
    """Show how it goes: a moving line on a terminal, else a line now and then, on stderr.

    Args:
        seconds: how long it takes.
        json: say it as JSON lines on stdout instead.
    """
    began_s = time.monotonic()
    if json or not sys.stderr.isatty():
        said_s = began_s

        def say(totals: Totals) -> None:
            nonlocal said_s
            if time.monotonic() - said_s < PLAIN_S:
                return
            said_s = time.monotonic()
            if json:
                output.say_json({"event": "progress", **_numbers(totals, said_s - began_s)})
            else:
                output.complain(_line(totals, said_s - began_s, seconds))

        yield say
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=30), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=seconds)

        def move(totals: Totals) -> None:
            passed_s = time.monotonic() - began_s
            bar.update(task, completed=passed_s, description=_line(totals, passed_s, seconds))

        yield move


def _numbers(totals: Totals, passed_s: float) -> dict[str, float | int | None]:
    accepted = sum(totals.rows.values())
    return {
        "seconds": round(passed_s, 1),
        "rows_accepted": accepted,
        "rows_acknowledged": accepted - totals.waiting_rows,
        "readings_per_s": round(accepted / max(passed_s, 0.1), 1),
        "ack_ms_p50": milliseconds(quantile_s(totals.acks, 0.5)),
    }


def _line(totals: Totals, passed_s: float, seconds: float) -> str:
    numbers = _numbers(totals, passed_s)
    ack = f", acknowledged after {numbers['ack_ms_p50']:.0f} ms" if numbers["ack_ms_p50"] is not None else ""
    return (
        f"{passed_s:3.0f} of {seconds:g} s: {numbers['rows_accepted']:,} readings accepted, "
        f"{numbers['rows_acknowledged']:,} in the lake{ack}"
    )


def milliseconds(seconds: float | None) -> float | None:
    """Seconds as rounded milliseconds."""
    return None if seconds is None else round(seconds * 1000, 1)


def result(found: DemoResult, data: Path) -> None:
    """Show the reconciliation, the figures and the answers."""
    output.say()
    columns = ("device", "stream", "accepted", "in lake", "distinct", "lost", "duplicated", "gaps")
    rows = [
        (one.device, one.stream, one.rows_accepted, one.rows_in_lake, one.distinct, one.lost, one.duplicated, one.gaps)
        for one in found.streams
    ]
    total = (
        "all",
        "",
        found.rows_accepted,
        found.rows_in_lake,
        found.distinct,
        found.lost,
        found.duplicated,
        found.gaps,
    )
    output.say_table(columns, [*rows, total], title="Readings: what the buffers accepted, and what the lake holds")
    output.say_pairs(
        {
            "lost": found.lost,
            "duplicated": found.duplicated,
            "changed": f"{found.rows_changed:,} of {found.rows_compared:,} compared bit for bit",
            "quarantined": found.quarantined,
            "still in buffers": found.waiting,
            "readings/s": found.readings_per_s,
            "ack latency": f"p50 {_ms(found.ack_ms.p50)}, p99 {_ms(found.ack_ms.p99)}",
            "on the wire": f"{found.wire_bytes_per_reading:.1f} bytes a reading",
            "agents": f"{found.agent_resident_bytes_max / 2**20:.0f} MiB each at most",
        }
    )
    for answer in found.answers:
        output.say()
        names = list(answer.rows[0]) if answer.rows else ["nothing"]
        output.say_table(names, [list(row.values()) for row in answer.rows], title=answer.question)
    _models(found)
    output.say()
    if found.exactly_once:
        output.say(f"Every reading is in the lake exactly once. Ask it more: headwater lake streams{data_option(data)}")


def _models(found: DemoResult) -> None:
    """What came of the models, where there were any."""
    if found.models:
        output.say()
        columns = ("model", "version", "rollout", "devices", "windows with a label", "accuracy")
        rows = [
            (one.name, one.version, one.rollout, one.devices, one.windows, _share(one.accuracy)) for one in found.models
        ]
        output.say_table(
            columns, rows, title="Models: trained on these readings, signed, rolled out, at work on the devices"
        )
    if found.drift is not None:
        drift = found.drift
        seen = "not noticed" if drift.detected_after_s is None else f"noticed after {drift.detected_after_s:g} s"
        right = ", ".join(f"version {version} {_share(share)}" for version, share in drift.accuracy.items())
        output.say_pairs(
            {
                "worn turned": f"{drift.device}: {seen}",
                "alert": drift.alert or "none",
                "learned again": "yes" if drift.retrained else "no",
                "right since then": right or "unknown",
            }
        )


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def _ms(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f} ms"
