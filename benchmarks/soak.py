"""The demo for hours: does any part's memory, files or threads grow without end, and is every row there after it?

`python -m benchmarks.soak [--minutes 60] [--data DIR]` runs `headwater demo` with its models for so long, looks at each
of its processes every ten seconds, and writes a line of JSON for each look into `soak.jsonl`. In the end the demo
counts every row; the exit status is 1 where one is missing, doubled or changed, or where a part of ours grew in the
second half.

The broker and the object store are shown beside, not judged: the embedded broker keeps the last messages of each filter
up to a bound that it reaches within hours, and the store's memory is Go's.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

LOOK_S = 10.0
GROWTH_SHARE_MAX, GROWTH_MIB_MAX = 0.10, 16.0
"""What the memory of a part of ours may grow between the second and the last quarter of the run: caches that fill, not
leaks."""
FILES_GROWTH_MAX, THREADS_GROWTH_MAX = 16, 4
_PARTS = {"gateway": "gateway run", "agent": "headwater.agent_process", "broker": "iotcore", "store": "weed"}
OURS = ("gateway", "agent")


class Look(msgspec.Struct, frozen=True):
    """One process at one moment; of the agents the one with the most memory."""

    at_s: float
    part: str
    rss_mib: float
    files: int
    threads: int


def watch(demo: psutil.Process, began_s: float) -> list[Look]:
    """Look at each part once; children of children too, and none that ends meanwhile."""
    found: dict[str, Look] = {}
    for child in demo.children(recursive=True):
        try:
            words = " ".join(child.cmdline())
            part = next((name for name, mark in _PARTS.items() if mark in words), None)
            if part is None:
                continue
            rss_mib = child.memory_info().rss / 2**20
            look = Look(time.monotonic() - began_s, part, rss_mib, child.num_fds(), child.num_threads())
        except psutil.Error:
            continue
        if part not in found or look.rss_mib > found[part].rss_mib:
            found[part] = look
    return list(found.values())


def quarter(looks: Sequence[Look], part: str, number: int) -> tuple[float, float, float]:
    """Medians of memory, files and threads in one quarter (0 to 3) of a part's looks."""
    mine = [look for look in looks if look.part == part]
    piece = mine[len(mine) * number // 4 : len(mine) * (number + 1) // 4] or mine[-1:]
    return (
        statistics.median(look.rss_mib for look in piece),
        statistics.median(look.files for look in piece),
        statistics.median(look.threads for look in piece),
    )


def grown(looks: Sequence[Look], part: str) -> list[str]:
    """What of a part grew between the second and the last quarter by more than it may."""
    (rss, files, threads), (rss_last, files_last, threads_last) = quarter(looks, part, 1), quarter(looks, part, 3)
    said = []
    if rss_last - rss > max(GROWTH_MIB_MAX, GROWTH_SHARE_MAX * rss):
        said.append(f"{part}: memory from {rss:.0f} to {rss_last:.0f} MiB")
    if files_last - files > FILES_GROWTH_MAX:
        said.append(f"{part}: open files from {files:.0f} to {files_last:.0f}")
    if threads_last - threads > THREADS_GROWTH_MAX:
        said.append(f"{part}: threads from {threads:.0f} to {threads_last:.0f}")
    return said


def show(looks: Sequence[Look]) -> None:
    """A table: memory by quarters, files and threads at the end."""
    table = Table(title="Memory in MiB, medians of each quarter")
    for column in ("part", "1st", "2nd", "3rd", "4th", "highest", "files", "threads"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in sorted({look.part for look in looks}):
        quarters = [quarter(looks, part, number) for number in range(4)]
        highest = max(look.rss_mib for look in looks if look.part == part)
        numbers = [*(each[0] for each in quarters), highest, *quarters[3][1:]]
        table.add_row(part, *(f"{number:,.0f}" for number in numbers))
    Console(width=110).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, watch, judge; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="The demo for hours, watched.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--data", type=Path, help="an empty folder; a temporary one without")
    asked = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as at Ctrl-C, the demo ends with us
    with tempfile.TemporaryDirectory() as spare:
        folder: Path = asked.data or Path(spare) / "soak"
        folder.mkdir(parents=True, exist_ok=True)
        looks, demo = _run(folder, asked.minutes * 60)
    show(looks)
    counted = {name: demo.get(name) for name in ("rows_accepted", "rows_in_lake", "lost", "duplicated", "exactly_once")}
    print(msgspec.json.encode(counted).decode())
    said = [words for part in OURS for words in grown(looks, part)]
    if not demo.get("ok"):
        said.append("the demo failed; see the lines above and soak.log")
    for words in said:
        print(words, file=sys.stderr)
    return 1 if said else 0


def _run(folder: Path, seconds: float) -> tuple[list[Look], dict[str, object]]:
    command = [sys.executable, "-m", "headwater", "demo", "--json", "--seconds", f"{seconds:g}"]
    looks: list[Look] = []
    told = folder / "demo.json"
    with told.open("wb") as out, (folder / "soak.log").open("wb") as log, (folder / "soak.jsonl").open("wb") as kept:
        demo = subprocess.Popen([*command, "--data", str(folder / "stack")], stdout=out, stderr=log)
        try:
            process, began_s = psutil.Process(demo.pid), time.monotonic()
            while demo.poll() is None and time.monotonic() - began_s < seconds:
                for look in watch(process, began_s):
                    looks.append(look)
                    kept.write(msgspec.json.encode(look) + b"\n")
                kept.flush()
                try:
                    demo.wait(LOOK_S)
                except subprocess.TimeoutExpired:
                    continue
            demo.wait()
        except BaseException:
            demo.terminate()
            demo.wait()
            raise
    lines = told.read_bytes().splitlines()
    result = msgspec.json.decode(lines[-1]) if lines else {}
    return looks, result if isinstance(result, dict) else {}


if __name__ == "__main__":
    sys.exit(main())
