"""What a benchmark says, and how it is shown and kept."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "latest.json"
_PACKAGES = ("deltalake", "duckdb", "msgspec", "paho-mqtt", "pyarrow", "zstandard")


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One figure, beside what it was compared to in the same run."""

    name: str
    value: float
    unit: str
    compared_to: str
    """What `ratio` divides by: another measurement of this run, or a target, said in words with its number."""
    ratio: float
    runs: tuple[float, ...]
    """The single measurements; `value` is their median."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one `make bench` measured."""

    machine: dict[str, str | int | float]
    results: tuple[Result, ...]


def result(name: str, runs: Sequence[float], unit: str, compared_to: str, reference: float) -> Result:
    """The median of `runs`, as a multiple of `reference`."""
    value = statistics.median(runs)
    return Result(
        name=name,
        value=round(value, 4),
        unit=unit,
        compared_to=compared_to,
        ratio=round(value / reference, 3),
        runs=tuple(round(run, 4) for run in runs),
    )


def machine() -> dict[str, str | int | float]:
    """What the figures were measured on."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


def show(report: Report) -> None:
    """Print the table."""
    table = Table(title="Headwater benchmarks", caption=f"{report.machine['cores']} cores, {report.machine['cpu']}")
    for column in ("figure", "value", "unit", "ratio", "compared to", "runs"):
        table.add_column(column, justify="right" if column in ("value", "ratio") else "left")
    for one in report.results:
        table.add_row(
            one.name,
            f"{one.value:,.4g}",
            one.unit,
            f"{one.ratio:.2f}",
            one.compared_to,
            ", ".join(f"{r:,.4g}" for r in one.runs),
        )
    Console(width=160).print(table)


def keep(report: Report) -> None:
    """Write the results file."""
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
