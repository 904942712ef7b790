"""`headwater` as its users run it: a process of its own, told by options, asked by its output, ended by signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from headwater.answers import quoted
from headwater.ledger import LaneKey, lanes_of
from headwater.place import StackRecord, read_record
from headwater.reconcile import Batch
from headwater.tally import arrivals, moment
from lake.query import Lake
from lake.store import Store, StoreSettings
from tests.integration.servers import PATIENCE_S, alive, wait_until

ROOT = Path(__file__).parents[2]
ENDS_S = 90.0


def headwater(*arguments: str, timeout_s: float = ENDS_S, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "headwater", *arguments],
        cwd=ROOT,
        env=_environment(environment),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def rows(*arguments: str) -> list[dict[str, Any]]:
    """What a command that succeeds answers as JSON lines."""
    done = headwater(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


class Running:
    """`headwater up` or `demo` while it runs; a context manager that leaves nothing behind.

    Args:
        data: its data folder.
        arguments: the command and its options, without --data and --json.
    """

    def __init__(self, data: Path, *arguments: str, **environment: str) -> None:
        self.data = data
        self._process = subprocess.Popen(
            [sys.executable, "-m", "headwater", *arguments, "--data", str(data), "--json"],
            cwd=ROOT,
            env=_environment(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[dict[str, Any]] = []
        self.complaints = ""
        self._readers = [threading.Thread(target=self._read_answers), threading.Thread(target=self._read_complaints)]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process.poll() is None:
            self.kill()
        self._process.wait(PATIENCE_S)
        for reader in self._readers:
            reader.join()
        for pipe in (self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def up(self) -> dict[str, Any]:
        """Wait until it says that it is up; what it said."""

        def said() -> dict[str, Any] | None:
            assert self._process.poll() is None, f"ended with {self._process.returncode}: {self.complaints}"
            return next((line for line in self.lines if line.get("event") == "up"), None)

        found: dict[str, Any] = wait_until(said, ENDS_S, "the stack is up")
        return found

    def record(self) -> StackRecord:
        """Where everything is."""
        record = read_record(self.data)
        assert record is not None
        return record

    def children(self) -> dict[str, int]:
        """Process ids of its children, by the end of their command line."""
        found = {}
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            for pid in (task / "children").read_text().split():
                try:
                    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                except FileNotFoundError:
                    continue  # it ended since it was listed, and so is no child any more
                found[" ".join(words[1:])] = int(pid)
        return found

    def child(self, words: str) -> int:
        """The process id of the one child whose command line has these words."""
        (pid,) = [pid for line, pid in self.children().items() if words in line]
        return pid

    def catches(self, number: signal.Signals) -> bool:
        """Whether a handler of its own is in force for a signal."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        (mask,) = [line.split()[1] for line in lines if line.startswith("SigCgt:")]
        return bool(int(mask, 16) >> (number - 1) & 1)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def end(self, timeout_s: float = ENDS_S) -> int:
        """Wait until it has ended by itself; its exit status."""
        code = self._process.wait(timeout_s)
        for reader in self._readers:
            reader.join()
        return code

    def interrupt(self) -> int:
        """Ctrl-C; its exit status."""
        self.signal(signal.SIGINT)
        return self.end()

    def rows(self, query: str) -> list[dict[str, Any]]:
        """What the lake says, asked as a user would."""
        return rows("lake", "sql", query, "--data", str(self.data))

    def wait_for_rows(self, stream: str, least: int) -> None:
        """Wait until the lake has so many rows of a stream."""

        def enough() -> bool:
            done = headwater("lake", "streams", "--data", str(self.data), "--json")
            # 3: the store does not answer now, as right after it was killed.
            assert done.returncode in (0, 3), done.stderr
            found = [json.loads(line) for line in done.stdout.splitlines()] if done.returncode == 0 else []
            return any(row["stream"] == stream and row["rows"] >= least for row in found)

        wait_until(enough, ENDS_S, f"{least} rows of {stream} in the lake")

    def _read_answers(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(json.loads(line))

    def _read_complaints(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.complaints += line


def check_books(record: StackRecord, settings: StoreSettings) -> int:
    """Every batch that a buffer gave a number is in the lake, each row once; and nothing waits. Returns the rows.

    For a stack whose devices have ended.
    """
    lanes = lanes_of(record.devices)
    lake = Lake(Store(settings))
    try:
        streams = sorted({lane.stream for lane in lanes})
        there = arrivals(lake.sql, streams, moment(0))
        key = "(_device, _epoch, _seq, _row)"
        doubled = {
            stream: lake.sql(f"SELECT count(*) - count(DISTINCT {key}) AS n FROM {quoted(stream)}")["n"].to_pylist()
            for stream in streams
        }
    finally:
        lake.close()
    assert [stream for stream, counts in doubled.items() if counts != [0]] == []
    for lane, info in lanes.items():
        assert info.batches == 0, f"{info.batches} batches of {lane} were not sent"
        seqs = sorted(batch.seq for batch in there.get(lane, ()))
        assert seqs == list(range(1, info.last_seq + 1)), lane
    return sum(_rows_of(there, lanes))


def _rows_of(there: Mapping[LaneKey, Sequence[Batch]], lanes: Mapping[LaneKey, object]) -> list[int]:
    return [batch.rows for lane in lanes for batch in there.get(lane, ())]


def wait_gone(pids: Sequence[int]) -> None:
    """Wait until none of these processes runs."""
    wait_until(lambda: not any(alive(pid) for pid in pids), PATIENCE_S, f"processes {pids} are gone")


def _environment(changes: Mapping[str, str]) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HEADWATER_", "AWS_"))}
    return {**clean, **changes}
