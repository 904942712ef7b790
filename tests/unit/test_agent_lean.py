"""What an agent's process loads; each case in a process of its own, as what was imported stays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, pathlib, sys
from edge_agent.lean import spare_memory

before = set(sys.modules)
spare_memory(pathlib.Path(sys.argv[1]))
import edge_agent.app, edge_agent.sensors.host, edge_agent.sensors.replay, pyarrow.parquet

print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules if sys.modules[name] is not None})))
"""
HEAVY = {"duckdb", "deltalake", "sklearn", "typer", "rich", "pydantic", "aiohttp", "boto3", "lake", "gateway"}


def loaded(tmp_path: Path, config: str) -> set[str]:
    path = tmp_path / "agent.toml"
    path.write_text(config)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_an_agent_loads_nothing_that_only_servers_and_people_need(tmp_path: Path) -> None:
    """Mutants tried: structlog imported before."""
    assert loaded(tmp_path, "[streams.s]\ndriver = 'host'\n") & (HEAVY | {"numpy"}) == set()


@pytest.mark.parametrize(
    "config",
    [
        "[streams.s]\ndriver = 'callable'\n[streams.t]\ndriver = 'host'\n",
        "[streams.s]\ndriver = 'a package has it'\n",
        "streams = 1",
        "not toml",
    ],
)
def test_drivers_that_may_hand_over_arrays_get_numpy(tmp_path: Path, config: str) -> None:
    found = loaded(tmp_path, config)
    assert "numpy" in found
    assert found & HEAVY == set()


def test_arrow_compute_is_loaded_when_the_first_of_it_is_called() -> None:
    """Mutants tried: `import pyarrow.compute as pc` in `contract.batches`, and in `edge_agent.sensors.columns`."""
    code = (
        "import sys\n"
        "import edge_agent.app, edge_agent.models.service, edge_agent.sampling.runner, edge_agent.sensors.iio\n"
        "from edge_agent import compute as pc\n"
        "before = 'pyarrow.compute' in sys.modules\n"
        "print(before, pc.add(1, 2), 'pyarrow.compute' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "3", "True"]
