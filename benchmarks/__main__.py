"""Run the benchmarks: `python -m benchmarks [name …]`; all of them write the results file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from benchmarks import agent, buffer_writes, inference, uplink, wire
from benchmarks.report import Report, Result, keep, machine, show

ALL: dict[str, Callable[[], Sequence[Result]]] = {
    "wire": wire.measure,
    "uplink": uplink.measure,
    "agent": agent.measure,
    "buffer": buffer_writes.measure,
    "inference": inference.measure,
}


def main(names: Sequence[str]) -> int:
    """Measure, print, and write the results file when everything was measured."""
    unknown = sorted(set(names) - ALL.keys())
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are {', '.join(ALL)}", file=sys.stderr)
        return 2
    results: list[Result] = []
    for name in names or ALL:
        print(f"measuring {name} …", file=sys.stderr)
        results += ALL[name]()
    report = Report(machine=machine(), results=tuple(results))
    show(report)
    if not names:
        keep(report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
