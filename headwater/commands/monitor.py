"""`headwater monitor`: releases at work."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from contract.errors import ConfigurationError
from headwater import extras, logs, output
from headwater.aside import Aside
from headwater.commands.options import Data, Json, Lake, check_above_zero
from headwater.signals import stopping

if TYPE_CHECKING:
    from lake.monitoring.overview import Line, Monitor
    from lake.store import Store

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
COLUMNS = (
    "model",
    "device",
    "windows",
    "1/s",
    "p50 ms",
    "p99 ms",
    "NaN",
    "PSI",
    "KS",
    "drifted",
    "change",
    "accuracy",
    "labelled",
    "alerts",
)


def monitor(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Only this one; else all.")] = None,
    since: Annotated[
        str, typer.Option("--since", metavar="AGO|TIME", help="Such as 90s, 15m, 24h, 7d, or an ISO 8601 time.")
    ] = "24h",
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option("--interval", metavar="S", help="Seconds between two looks.")] = 5.0,
    windows: Annotated[
        int, typer.Option("--windows", metavar="N", help="Latest windows of a device that drift is measured over.")
    ] = 300,
    retrain: Annotated[
        str | None, typer.Option("--retrain", metavar="WHY", help="Ask for a training of MODEL, for this reason.")
    ] = None,
    lake: Lake = None,
    data: Data = None,
    json: Json = False,
) -> None:
    """How releases do on devices: speed, missing values, drift from training, accuracy once labels have come.

    With --json one line per release and device. PSI is that of the most drifted feature; `drifted` the part of the
    features that has; `change` the detector's sum, of 50 at which it alarms.
    """
    check_above_zero("--interval", interval)
    check_above_zero("--windows", windows)
    parse_since(since)
    if retrain is not None and model is None:
        raise ConfigurationError("--retrain needs a MODEL; name it")
    logs.configure(quiet=True)
    with extras.imports("gateway", "headwater monitor"):
        from headwater.lake_access import opened_store
        from lake.monitoring.observe import Bounds
        from lake.monitoring.overview import Monitor
        from lake.query import Lake as OpenLake

    with opened_store(lake, data, os.environ) as store:
        if retrain is not None and model is not None:
            _ask(store, model, retrain, json=json)
            return
        opened = OpenLake(store)
        try:
            looking = Monitor(store, opened, Bounds(windows_max=windows, windows_min=min(30, windows)))
            if model is not None and model not in looking.models():
                raise ConfigurationError(f"there is no release of a model {model[:80]!r}; see headwater release list")
            if not watch:
                with Aside(opened.interrupt) as aside:
                    aside.run(lambda: _show(looking, model, since, json=json))
                return
            with stopping() as stop:
                while not stop.is_set():
                    _show(looking, model, since, json=json)
                    stop.wait(interval)
        finally:
            opened.close()


def parse_since(text: str) -> datetime:
    """A time, or how long ago.

    Raises:
        ConfigurationError: it is neither.
    """
    ago = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhd])", text)
    try:
        if ago:
            return datetime.now(UTC) - timedelta(seconds=float(ago[1]) * _UNITS_S[ago[2]])
        moment = datetime.fromisoformat(text)
    except (ValueError, OverflowError) as error:
        raise ConfigurationError(
            f"--since {text!r} is neither such as 90s, 15m, 24h, 7d nor an ISO 8601 time"
        ) from error
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


def _show(looking: Monitor, model: str | None, since: str, *, json: bool) -> None:
    lines = [
        line for each in ([model] if model else looking.models()) for line in looking.look(each, parse_since(since))
    ]
    if json:
        for line in lines:
            output.say_json(as_json(line))
        return
    if not lines:
        output.say(f"no predictions since {since}")
        return
    output.say_table(COLUMNS, [_row(line) for line in lines])
    for line in lines:
        for alert in line.alerts:
            output.say(f"alert {alert.key.kind}, {line.model}@{alert.key.release} on {alert.key.device}: {alert.text}")


def as_json(line: Line) -> dict[str, Any]:
    """The names are a contract."""
    done, drift, accuracy = line.performance, line.drift, line.accuracy
    return {
        "model": line.model,
        "release": done.release,
        "device": done.device,
        "windows": done.windows,
        "first_us": done.first_us,
        "last_us": done.last_us,
        "rate_per_s": done.rate_per_s,
        "latency_ms_p50": done.latency_ms_p50,
        "latency_ms_p99": done.latency_ms_p99,
        "nan_share": done.nan_share,
        "labels": done.labels,
        "score_mean": done.score_mean,
        "score_sd": done.score_sd,
        "compared": done.compared,
        "disagreements": done.disagreements,
        "features": [] if drift is None else drift.features,
        "drifted_share": None if drift is None else drift.drifted_share,
        "drifted_share_max": None if drift is None else drift.drifted_share_max,
        "score": None if drift is None else drift.score,
        "change": None if drift is None else drift.change,
        "change_feature": None if drift is None else drift.change_feature,
        "accuracy": None if accuracy is None else accuracy.accuracy,
        "macro_f1": None if accuracy is None else accuracy.macro_f1,
        "coverage": None if accuracy is None else accuracy.coverage,
        "classes": {} if accuracy is None else accuracy.classes,
        "alerts": [
            {"kind": alert.key.kind, "since_us": alert.at_us, "feature": alert.feature, "text": alert.text}
            for alert in line.alerts
        ],
    }


def _row(line: Line) -> list[Any]:
    done, drift, accuracy = line.performance, line.drift, line.accuracy
    worst = drift.features[0] if drift is not None and drift.features else None
    right = None if accuracy is None or accuracy.accuracy is None else accuracy
    return [
        f"{line.model}@{done.release}",
        done.device,
        done.windows,
        round(done.rate_per_s, 3),
        round(done.latency_ms_p50, 2),
        round(done.latency_ms_p99, 2),
        f"{done.nan_share:.1%}",
        "" if worst is None else f"{worst.psi:.2f} {worst.name}",
        None if worst is None else round(worst.ks, 2),
        "" if drift is None or drift.drifted_share is None else f"{drift.drifted_share:.0%}",
        None if drift is None or drift.change is None else round(drift.change, 1),
        "" if right is None else f"{right.accuracy:.1%}",
        "" if right is None else f"{right.coverage:.0%}",
        ", ".join(sorted(alert.key.kind for alert in line.alerts)),
    ]


def _ask(store: Store, model: str, why: str, *, json: bool) -> None:
    import getpass
    import time

    from lake.monitoring.triggers import PATH, SCHEMA, TriggerKind, TriggerTable
    from lake.releases import Releases
    from lake.tables import ControlTable

    versions = [release.version for release in Releases(store).look().of_model(model)]
    if not versions:
        raise ConfigurationError(f"there is no release of a model {model[:80]!r}; run headwater train run first")
    table = ControlTable(store, PATH, SCHEMA)
    triggers = TriggerTable(lambda: table, getpass.getuser(), lambda: time.time_ns() // 1000)
    name = triggers.request(model, versions[0], TriggerKind.MANUAL, why, 0.0)
    if json:
        output.say_json({"trigger": name, "model": model})
    elif name is None:
        output.say(f"a training of {model} is asked for, or under way, already")
    else:
        output.say(f"asked for {name}; `headwater train watch RECIPE` takes it up")
