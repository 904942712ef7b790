"""A process that brings one device's batches in, as fast as it can, beside others that do the same.

`python -m tests.integration.lake_racer SETTINGS_JSON NUMBER SEQ_MAX` prints how many commits it made and how often
it was refused, as JSON.
"""

from __future__ import annotations

import json
import random
import sys

import msgspec
import pyarrow as pa

from contract.errors import TemporaryError
from contract.names import shard_of
from lake.errors import CommitConflictError
from lake.raw import RawTable
from lake.store import Store, StoreSettings
from tests.contract.lake_suite import EPOCH, A, raw, rows

ATTEMPTS_MAX = 5_000


def main(settings: str, number: int, seq_max: int) -> None:
    """Look where the lane is, append the next batch, look again: the gateway's loop."""
    table = RawTable(Store(msgspec.json.decode(settings, type=StoreSettings)), "race")
    dice = random.Random(number)
    commits = conflicts = unknown = 0
    for _ in range(ATTEMPTS_MAX):
        try:
            table.refresh()
            seq = table.watermark(A, EPOCH) + 1
            if seq > seq_max:
                break
            fields = {"x": pa.array([number], pa.int8())}
            if dice.random() < 0.1:
                # Now and then somebody has a new field: a change of columns between refresh and commit.
                fields[f"f{number}_{seq}"] = pa.array([seq], pa.int32())
            counter = table.shard_counter(shard_of(A))
            table.append([raw(A, seq, rows(1, **fields))], {(A, EPOCH): seq}, {shard_of(A): counter + 1})
            commits += 1
        except CommitConflictError:
            conflicts += 1
        except TemporaryError:
            unknown += 1
    print(json.dumps({"commits": commits, "conflicts": conflicts, "unknown": unknown}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
