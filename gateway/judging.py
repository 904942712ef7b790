"""How right releases were, worked out in a child process: `python -m gateway.judging`, the question on its stdin.

DuckDB's extension for Delta tables keeps a little of every file that it has looked at until its process ends
(duckdb-delta #279, mended after the release we hold: some 0.6 kB a file and scan). A gateway runs for months, a child
for seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import msgspec

from contract.errors import ConfigurationError, HeadwaterError, TemporaryError
from lake.duck import QuerySettings
from lake.errors import StoreUnavailableError, UnknownStreamError
from lake.monitoring.accuracy import Accuracy, accuracy_of
from lake.monitoring.policy import LabelSource
from lake.query import Lake
from lake.store import Store, StoreSettings

QUERY_BYTES_MAX = 512 * 1024 * 1024
"""What DuckDB may use."""
POLL_S = 0.5


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What `lake.monitoring.accuracy.accuracy_of` is asked, and of which lake."""

    store: StoreSettings
    model: str
    labels: LabelSource
    stream: str
    since_us: int
    rows_max: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it: figures, or why there are none."""

    told: list[Accuracy] | None = None
    """None: there are no labels, or no predictions, yet."""
    trouble: str = ""
    passing: bool = False
    """Whether the trouble is the lake's, and may pass."""


def ask(question: Question, beat: Callable[[], None], stopping: Callable[[], bool], timeout_s: float) -> Answer | None:
    """Have a question answered by a child; None where the gateway stops meanwhile.

    Args:
        question: goes to the child's stdin, credentials and all: not into its arguments, which everybody may read.
        beat: called while it works.
        stopping: whether to give up.
        timeout_s: how long it may take.

    Raises:
        StoreUnavailableError: the store did not answer.
        ConfigurationError: the labels cannot be read as the recipe says, or it takes too long.
        HeadwaterError: the child ended without an answer.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "gateway.judging"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline_s = time.monotonic() + timeout_s
    sent: bytes | None = msgspec.json.encode(question)
    try:
        while True:
            try:
                said, complaint = child.communicate(sent, POLL_S)
                break
            except subprocess.TimeoutExpired:
                sent = None  # what was begun to be written goes on
                beat()
            if stopping():
                return None
            if time.monotonic() > deadline_s:
                raise ConfigurationError(
                    f"accuracy of {question.model} was not worked out within {timeout_s:g} s; lower accuracy_hours, or "
                    "raise accuracy_interval_s"
                )
    finally:
        if child.poll() is None:
            child.kill()
            child.communicate()
    try:
        answer = msgspec.json.decode(said, type=Answer)
    except msgspec.MsgspecError as error:
        last = complaint.decode(errors="replace").strip().rpartition("\n")[2]
        raise HeadwaterError(f"working out accuracy ended with {child.returncode}: {last[:300]}") from error
    if answer.trouble:
        raise (StoreUnavailableError if answer.passing else ConfigurationError)(answer.trouble)
    return answer


def answered(question: Question) -> Answer:
    """The answer, worked out here. Raises nothing that the asker should hear of."""
    try:
        lake = Lake(Store(question.store), QuerySettings(memory_bytes_max=QUERY_BYTES_MAX, threads_max=1))
        told = accuracy_of(lake, question.model, question.labels, question.stream, question.since_us, question.rows_max)
    except UnknownStreamError:
        return Answer()
    except HeadwaterError as error:
        return Answer(trouble=str(error), passing=isinstance(error, TemporaryError))
    return Answer(told=told)


def main() -> None:
    """Read a question, write its answer."""
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    sys.stdout.buffer.write(msgspec.json.encode(answered(question)))
    sys.stdout.buffer.flush()
    os._exit(0)  # said is said: taking the interpreter apart costs time, and Arrow sometimes aborts there


if __name__ == "__main__":
    main()
