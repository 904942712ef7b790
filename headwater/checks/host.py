"""This machine: its clock, its limits, and the packages that have to fit together."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edge_agent.clock import clock_is_synced
from headwater import extras
from headwater.checks.findings import Finding, failed, ok, skipped, warning

OPEN_FILES_MIN = 1_024
DISK_FREE_BYTES_MIN = 1024**3
MEMORY_FREE_BYTES_MIN = 1024**3
_GIB = 1024**3

DUCKDB_EXTENSIONS = ("duckdb-extension-delta", "duckdb-extension-httpfs")


def check_clock() -> Finding:
    """Whether the kernel holds its clock to be right."""
    if clock_is_synced():
        return ok("host.clock", "synchronised")
    return warning(
        "host.clock",
        "the kernel does not say that the clock is synchronised",
        "run: timedatectl set-ntp true (batches carry the mark `not synchronised` until then; nothing is lost)",
    )


def check_python() -> Finding:
    """The interpreter."""
    return ok("host.python", f"Python {'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}")


def check_extras() -> list[Finding]:
    """Which parts of Headwater are installed, wholly, in part or not."""
    findings = []
    for extra in extras.MODULES:
        gone = extras.missing(extra)
        own = extras.own(extra)
        name, remedy = f"host.extra.{extra}", f"run: pip install 'headwater[{extra}]'"
        if not gone:
            findings.append(ok(name, "installed"))
        elif set(own) <= set(gone):
            findings.append(skipped(name, f"not installed; for it {remedy}"))
        else:
            findings.append(failed(name, f"installed in part: {', '.join(gone)} missing", remedy))
    return findings


def check_duckdb() -> Finding:
    """DuckDB loads only extensions that were built for the very same version."""
    try:
        wanted = version("duckdb")
    except PackageNotFoundError:
        return skipped("host.duckdb", "not installed; only the lake needs it")
    found = {name: _version(name) for name in DUCKDB_EXTENSIONS}
    wrong = {name: there for name, there in found.items() if there != wanted}
    if wrong:
        listed = ", ".join(f"{name} {there or 'missing'}" for name, there in wrong.items())
        pins = " ".join(f"{name}=={wanted}" for name in DUCKDB_EXTENSIONS)
        return failed("host.duckdb", f"duckdb {wanted} beside {listed}", f"run: pip install {pins}")
    return ok("host.duckdb", f"duckdb and its extensions are {wanted}")


def check_open_files() -> Finding:
    """How many files and sockets a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES_MIN:
        remedy = "run: ulimit -n 65536, or set LimitNOFILE=65536 in the systemd unit"
        return warning("host.open_files", f"{soft} allowed, {hard} at most", remedy)
    return ok("host.open_files", f"{soft} allowed")


def check_disk(folder: Path) -> Finding:
    """Room where the data is."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    usage = shutil.disk_usage(there)
    detail = f"{usage.free / _GIB:.1f} GiB free of {usage.total / _GIB:.1f} at {there}"
    if not os.access(there, os.W_OK):
        return failed("host.disk", f"{there} cannot be written", "choose another folder with --data, or its owner")
    if usage.free < DISK_FREE_BYTES_MIN:
        return warning("host.disk", detail, "free some space, or choose another folder with --data")
    return ok("host.disk", detail)


def check_memory() -> Finding:
    """Memory for the one-machine stack; an agent alone needs a tenth of it."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
            detail = f"{free / _GIB:.1f} GiB available"
            if free < MEMORY_FREE_BYTES_MIN:
                return warning("host.memory", detail, "headwater up needs about 1 GiB; start fewer devices")
            return ok("host.memory", detail)
    return skipped("host.memory", "the kernel does not say how much memory is available")


def check_host(folder: Path) -> list[Finding]:
    """Everything about this machine."""
    return [
        check_python(),
        *check_extras(),
        check_duckdb(),
        check_clock(),
        check_open_files(),
        check_disk(folder),
        check_memory(),
    ]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
