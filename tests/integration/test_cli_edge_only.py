"""With `pip install headwater[edge]` alone the agent works, and every other command names what is missing.

Python imports `sitecustomize` in every process that finds one; the one of these tests hides what the extra does not
bring, also from the process that `agent run` becomes.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from edge_agent.status import fetch_status
from headwater import extras
from tests.integration.servers import PATIENCE_S, wait_until
from tests.integration.stacks import ROOT, headwater

HIDING = """
from importlib.machinery import PathFinder

real = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {hidden} else real(name, path, target)

PathFinder.find_spec = staticmethod(find_spec)
"""
# numpy is not hidden: pyarrow takes it along where it finds it, and does without it where not.
HIDDEN = {
    *("duckdb", "deltalake", "obstore", "aiohttp", "boto3", "botocore", "iotcore", "mqtt5", "sklearn", "scipy"),
    *("matplotlib", "onnx", "optuna", "skl2onnx"),
}


@pytest.fixture
def edge_only(tmp_path: Path) -> str:
    """A PYTHONPATH under which only the extra `edge` seems to be installed."""
    folder = tmp_path / "hiding"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDING.format(hidden=HIDDEN))
    return f"{folder}:{ROOT}"


def test_what_is_hidden_is_what_the_other_extras_bring() -> None:
    bring = {module for extra in ("gateway", "simulators", "trainer") for module in extras.MODULES[extra]}
    assert bring - set(extras.MODULES["edge"]) - {"numpy"} <= HIDDEN
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["edge"]
    assert {re.split(r"[<>=\[]", requirement)[0] for requirement in declared} & HIDDEN == set()


def test_the_agent_runs_answers_and_stops(edge_only: str, tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text('device = "pi-1"\nbroker.url = "mqtt://127.0.0.1:1"\nstreams.host.driver = "host"\n')
    process = subprocess.Popen(
        [sys.executable, "-m", "headwater", "agent", "run", "--config", str(config), "--json"],
        cwd=ROOT,
        env={"PYTHONPATH": edge_only, "PATH": "/usr/bin:/bin"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        socket = tmp_path / "agent.sock"
        wait_until(socket.exists, PATIENCE_S, "the agent answers")
        status = headwater("agent", "status", "--config", str(config), "--json", PYTHONPATH=edge_only)
        assert json.loads(status.stdout)["device"] == "pi-1"
        # The same process, and nothing of the command line left in it.
        words = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")
        assert "headwater.agent_process" in words
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert not any(name in maps for name in ("duckdb", "deltalake", "obstore", "pydantic"))
        assert fetch_status(socket)["streams"]["host"]["state"] == "running"
    finally:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    events = [json.loads(line)["event"] for line in said.splitlines()]
    assert "agent_started" in events and "agent_stopping" in events

    # Without an agent the buffer is read from its file; the status is nobody's.
    buffer = headwater("agent", "buffer", "--config", str(config), "--json", PYTHONPATH=edge_only)
    assert buffer.returncode == 0
    assert {lane["stream"] for lane in json.loads(buffer.stdout)["lanes"]} >= {"headwater.events"}
    gone = headwater("agent", "status", "--config", str(config), PYTHONPATH=edge_only)
    assert gone.returncode == 3
    assert gone.stderr.startswith("error: no agent answers")


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("up",), "simulators"),
        (("demo",), "simulators"),
        (("gateway", "run", "--config", "x"), "gateway"),
        (("lake", "streams", "--lake", "file:///x"), "gateway"),
        (("lake", "sql", "SELECT 1", "--lake", "file:///x"), "gateway"),
        (("simulate", "swarm", "--devices", "1", "--rate", "1", "--broker", "mqtt://x"), "simulators"),
    ],
)
def test_what_is_not_installed_is_said_with_its_remedy(arguments: tuple[str, ...], extra: str, edge_only: str) -> None:
    done = headwater(*arguments, PYTHONPATH=edge_only)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"pip install 'headwater[{extra}]'" in done.stderr


def test_the_doctor_says_what_is_there(edge_only: str, tmp_path: Path) -> None:
    done = headwater("doctor", "--data", str(tmp_path), "--json", PYTHONPATH=edge_only)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = {one["check"]: one for one in json.loads(done.stdout)["findings"]}
    assert findings["host.extra.edge"]["verdict"] == "ok"
    assert findings["broker"]["verdict"] == findings["store"]["verdict"] == "skipped"
