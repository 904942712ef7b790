"""Processes that race on one lane lose nothing and double nothing: table made, columns added, rows committed.

Mutants tried, each made a test here fail: commits without application transactions; the version not checked after
columns were added; a new handle opened for the commit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from contract.names import shard_of
from lake.raw import RawTable
from lake.store import Store, StoreSettings
from tests.contract.lake_reading import batches_in
from tests.contract.lake_suite import EPOCH, A
from tests.integration.servers import StoreServer
from tests.integration.test_lake_s3 import s3_settings

ROOT = Path(__file__).parents[2]
RACERS = 3
SEQ_MAX = 40
PATIENCE_S = 100


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_racing_gateways_commit_each_batch_once(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if kind == "file":
        settings = StoreSettings(url=tmp_path.as_uri(), fsync=False)
    else:
        server: StoreServer = request.getfixturevalue("object_store")
        settings = s3_settings(server)
    given = msgspec.json.encode(settings).decode()
    racers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.lake_racer", given, str(number), str(SEQ_MAX)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(RACERS)
    ]
    results = []
    try:
        for racer in racers:
            output, _ = racer.communicate(timeout=PATIENCE_S)
            assert racer.returncode == 0
            results.append(json.loads(output))
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    store = Store(settings)
    assert batches_in(store, "race") == [(A, seq, 1) for seq in range(1, SEQ_MAX + 1)]
    assert sum(result["commits"] + result["unknown"] for result in results) >= SEQ_MAX
    assert sum(result["conflicts"] for result in results) > 0, "they never met: the race proves nothing"
    table = RawTable(store, "race")
    table.refresh()
    assert table.watermark(A, EPOCH) == SEQ_MAX
    assert table.shard_counter(shard_of(A)) == SEQ_MAX
