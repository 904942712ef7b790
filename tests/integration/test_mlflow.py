"""Training told to a real MLflow server, by the real command line.

MLflow is no dependency: HEADWATER_TEST_MLFLOW names a Python that has it (`pip install mlflow` in an environment of its
own); without, the test makes such an environment, and is skipped with the reason where it cannot be downloaded.

Mutants, seen to fail in `test_trainer_models`: MLflow's words left on stdout; no look for a run that was told already.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from headwater.exits import Exit
from tests.integration import trainer_lake
from tests.integration.environments import installed
from tests.integration.servers import free_port, wait_until
from tests.integration.trainer_lake import bring_in_walkers, open_lake
from trainer.steps import read_record

ROOT = Path(__file__).parents[2]
PYTHON_VARIABLE = "HEADWATER_TEST_MLFLOW"
STARTS_S = 120.0
RECIPE = trainer_lake.RECIPE.replace("trials = 3", "trials = 1") + "[families.logistic_regression]\n"
HEADWATER = "import sys; sys.path.append(sys.argv.pop(1)); from headwater.cli import console; console()"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with MLflow."""
    given = os.environ.get(PYTHON_VARIABLE)
    return Path(given) if given else installed(tmp_path_factory.mktemp("mlflow"), "mlflow~=3.17")


class Server:
    """`mlflow server` over files in a folder, and what it says when it is asked."""

    def __init__(self, python: Path, folder: Path) -> None:
        self._python, self._folder = python, folder
        self.uri = f"http://127.0.0.1:{free_port()}"

    @contextmanager
    def running(self) -> Iterator[None]:
        port = self.uri.rpartition(":")[2]
        command = [self._python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self._folder}/runs.db"]
        command += ["--artifacts-destination", f"{self._folder}/artifacts"]
        with (self._folder / "server.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._folder, start_new_session=True)
        try:
            wait_until(lambda: process.poll() is not None or self._is_up(), STARTS_S, "MLflow answers")
            assert process.poll() is None, (self._folder / "server.log").read_text()[-3_000:]
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def ask(self, path: str, **body: Any) -> Any:
        url = f"{self.uri}/api/2.0/{path}"
        request = urllib.request.Request(url, json.dumps(body).encode() if body else None)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as answer:
            content = answer.read()
        return json.loads(content) if path.startswith("mlflow/") else content

    def runs(self) -> list[dict[str, Any]]:
        found = self.ask("mlflow/experiments/get-by-name?experiment_name=walking")["experiment"]
        return list(self.ask("mlflow/runs/search", experiment_ids=[found["experiment_id"]]).get("runs", []))


class Training:
    """`headwater train run` with MLflow behind our own packages on its path."""

    def __init__(self, python: Path, folder: Path, uri: str) -> None:
        store = open_lake(folder / "lake")
        bring_in_walkers(store)
        (folder / "recipe.toml").write_text(RECIPE)
        asked = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        site = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
        self.work = folder / "work" / "walking"
        self._command = [sys.executable, "-c", HEADWATER, site, "train", "run", str(folder / "recipe.toml")]
        self._command += ["--lake", store.url, "--work", str(folder / "work"), "--until", "evaluate", "--json"]
        self._environment = os.environ | {
            "MLFLOW_TRACKING_URI": uri,
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "PYTHONPATH": str(ROOT),
        }

    def __call__(self, *options: str) -> tuple[int, list[dict[str, Any]], str]:
        """Exit status, every line of stdout as JSON, and stderr."""
        done = subprocess.run(
            [*self._command, *options],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1_200)
def test_a_real_mlflow_server_hears_of_every_evaluation_once(python: Path, tmp_path: Path) -> None:
    server = Server(python, tmp_path)
    train = Training(python, tmp_path, server.uri)
    with server.running():
        status, lines, complaint = train()
        assert (status, [line["step"] for line in lines]) == (Exit.OK, ["dataset", "checks", "search", "evaluate"]), (
            complaint
        )
        (run,) = server.runs()
        outputs, record = lines[-1]["outputs"], read_record(train.work, "evaluate")
        assert run["info"]["status"] == "FINISHED"
        tags = {one["key"]: one["value"] for one in run["data"]["tags"]}
        assert tags["headwater.run"] == record.run
        assert tags["headwater.streams"] == "doing@8, motion@8"
        assert tags["headwater.dataset"] == lines[0]["outputs"]["sha256"]
        params = {one["key"]: one["value"] for one in run["data"]["params"]}
        assert params == {"family": "logistic_regression", "share": "1.0", "seed": "1"}
        found = {one["key"]: one["value"] for one in run["data"]["metrics"]}
        wanted = {one["name"]: one["value"] for one in outputs["metrics"]}
        assert {name: found[name] for name in wanted} == pytest.approx(wanted)
        assert found["cross_validated_f1_macro"] == pytest.approx(lines[2]["outputs"]["score"])
        for name in ("evaluation.json", "report.html"):
            place = run["info"]["artifact_uri"].removeprefix("mlflow-artifacts:/")
            kept = server.ask(f"mlflow-artifacts/artifacts/{place}/{name}")
            assert kept == (train.work / "evaluate" / name).read_bytes()

        # Killed between the run's end at MLflow and the note of it: nothing is told twice.
        path = train.work / "evaluate.json"
        path.write_bytes(path.read_bytes().replace(b'"finished": true', b'"finished": false'))
        assert train()[0] == Exit.OK
        assert len(server.runs()) == 1
        assert read_record(train.work, "evaluate").finished

    status, lines, complaint = train("--force", "evaluate")
    assert status == Exit.UNAVAILABLE, complaint
    assert f"MLflow at {server.uri} does not take the run" in complaint
    assert [line["step"] for line in lines] == ["dataset", "checks", "search"]
    with server.running():
        status, lines, complaint = train()
        assert (status, lines[-1]["skipped"]) == (Exit.OK, True), complaint
        assert [run["info"]["status"] for run in server.runs()] == ["FINISHED"] * 2
