"""What the trainer did, and what came out: the table `control/evaluations`, one row per run of a step.

Rows are only added. A row may be there twice, after a commit whose outcome was not known; `run` names it, so a reader
counts each `run` once. Figures of models are in `outputs`, as JSON: `outputs->>'$.test.f1_macro'` in SQL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import pyarrow as pa

from lake.delta import wall_clock_ms
from lake.errors import CommitConflictError
from lake.store import Store
from lake.tables import ControlTable
from lake.types import STORED_TIMESTAMP

PATH = "control/evaluations"
SCHEMA = pa.schema(
    [
        pa.field("at", STORED_TIMESTAMP),
        pa.field("run", pa.string()),
        pa.field("recipe", pa.string()),
        pa.field("step", pa.string()),
        pa.field("outcome", pa.string()),
        pa.field("error", pa.string()),
        pa.field("seconds", pa.float64()),
        pa.field("seed", pa.int64()),
        pa.field("code", pa.string()),
        pa.field("key", pa.string()),
        pa.field("versions", pa.string()),
        pa.field("packages", pa.string()),
        pa.field("outputs", pa.string()),
    ]
)
OUTPUTS_BYTES_MAX = 4 * 1024 * 1024
"""Of one row; a longer document is named by its size instead, and stands in the work folder alone."""
_ATTEMPTS_MAX = 5


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a step."""

    run: str
    """Names it; the same for every repeat of this row."""
    recipe: str
    step: str
    outcome: str
    """`done` or `failed`."""
    error: str
    """Why it failed, empty where it did not."""
    started_at_us: int
    """Wall clock, microseconds since 1970-01-01 UTC."""
    seconds: float
    seed: int
    code: str
    """Revision of the source, or the version that is installed."""
    key: str
    """SHA-256 of all inputs: of two runs with the same key the second was not needed."""
    pins: Mapping[str, int]
    """Delta version of each table that was read, by path."""
    packages: Mapping[str, str]
    outputs: Mapping[str, Any]


class Evaluations:
    """The table as one process sees it. Not thread-safe."""

    def __init__(self, store: Store, *, clock_ms: Callable[[], int] = wall_clock_ms) -> None:
        self._table = ControlTable(store, PATH, SCHEMA, clock_ms=clock_ms)

    def append(self, evaluations: Sequence[Evaluation]) -> None:
        """Commit rows.

        Raises:
            CommitConflictError: the table was being made by too many at once; try again.
            StoreUnavailableError: it is not known whether they were committed; adding them again is harmless.
        """
        rows = pa.Table.from_pylist([_row(one) for one in evaluations], schema=SCHEMA)
        for attempt in range(1, _ATTEMPTS_MAX + 1):
            self._table.refresh()
            try:
                self._table.append(rows)
                return
            except CommitConflictError:
                # Somebody made the table, or added columns to it.
                if attempt == _ATTEMPTS_MAX:
                    raise

    def read(self) -> pa.Table:
        """All rows, each run once, in the order of nothing.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        self._table.refresh()
        rows = self._table.read()
        first = {run: number for number, run in reversed(list(enumerate(rows.column("run").to_pylist())))}
        return rows.take(sorted(first.values()))


def _row(one: Evaluation) -> dict[str, Any]:
    outputs = msgspec.json.encode(one.outputs)
    if len(outputs) > OUTPUTS_BYTES_MAX:
        outputs = msgspec.json.encode({"too_large_bytes": len(outputs)})
    return {
        "at": one.started_at_us,
        "run": one.run,
        "recipe": one.recipe,
        "step": one.step,
        "outcome": one.outcome,
        "error": one.error,
        "seconds": one.seconds,
        "seed": one.seed,
        "code": one.code,
        "key": one.key,
        "versions": msgspec.json.encode(dict(one.pins)).decode(),
        "packages": msgspec.json.encode(dict(one.packages)).decode(),
        "outputs": outputs.decode(),
    }
