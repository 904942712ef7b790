"""What `examples/` says of orchestrators is run: the CI script as it is, Dagster and Airflow installed into a folder of
their own (slow). A small lake, a tiny recipe, real commands; `headwater` is called through a script that counts calls
and can be told to end with a status.

Where an orchestrator cannot be downloaded its test is skipped, with the reason.

Mutants tried, of the CI script: another status tried again; no bound on tries; no look for a rollout that was started;
a dataset made anew for the release.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from headwater.key_folder import make_keys
from lake.approval import Approver, approve
from lake.releases import Releases, ReleaseState
from lake.rollouts import PATH as ROLLOUTS
from lake.rollouts import SCHEMA as ROLLOUTS_SCHEMA
from lake.rollouts import RolloutTable
from lake.tables import ControlTable
from lake.trust.keys import KeyFolder
from tests.integration import trainer_lake
from tests.integration.environments import installed
from tests.integration.trainer_lake import bring_in_walkers, open_lake
from trainer.steps import read_record

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RECIPE = (
    trainer_lake.RECIPE.replace("trials = 3", "trials = 1")
    + """
[families.logistic_regression]
[report]
html = false
learning_curve = false
"""
)
STEPS = ["dataset", "checks", "search", "evaluate", "export", "release"]
COUNTING = """#!/bin/bash
# headwater, with its calls written down; ends with the status in the file fail-COMMAND, once if that is 3
cd "$(dirname "$0")"
echo "$*" >> calls
status=$(cat "fail-$2" 2>/dev/null || echo 0)
if [[ $status -eq 3 ]]; then rm "fail-$2"; fi
if [[ $status -ne 0 ]]; then echo "as the test wants it" >&2; exit "$status"; fi
exec REAL "$@"
"""


class World:
    """A lake with keys, a recipe, and a `headwater` that is watched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = open_lake(folder / "lake")
        bring_in_walkers(self.store)
        self.keys = KeyFolder(folder / "keys", None)
        self.trust = make_keys(self.keys, self.store)
        self.releases = Releases(self.store)
        (folder / "recipe.toml").write_text(RECIPE)
        self.command = folder / "headwater"
        self.command.write_text(COUNTING.replace("REAL", shlex.quote(str(Path(sys.executable).parent / "headwater"))))
        self.command.chmod(0o755)
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("HEADWATER_", "PYTHON"))}
        self.environment = kept | {
            "HEADWATER_LAKE": self.store.url,
            "HEADWATER_COMMAND": str(self.command),
            "HEADWATER_RECIPE": str(folder / "recipe.toml"),
            "HEADWATER_WORK": str(folder / "work"),
            "HEADWATER_STAGES": "50%,100%",
            "HEADWATER_RETRY_S": "0.1",
        }

    def calls(self, *words: str) -> int:
        """How often a command was called."""
        lines = (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []
        return sum(line.split()[: len(words)] == list(words) for line in lines)

    def fail(self, command: str, status: int) -> None:
        """Let `headwater … COMMAND` end with a status: 3 once, others always."""
        (self.folder / f"fail-{command}").write_text(str(status))

    def mend(self, command: str) -> None:
        (self.folder / f"fail-{command}").unlink()

    def state(self) -> dict[int, ReleaseState]:
        return {release.version: release.state for release in self.releases.look().releases.values()}

    def approve(self, version: int) -> None:
        """What somebody with the key does."""
        approver = Approver(
            trust=self.trust,
            targets=self.keys.read_if_any("targets"),
            online=self.keys.read_if_any("online"),
            who="ann",
        )
        approve(self.releases, "walking", version, approver, "looked at the report")

    def rollouts(self) -> list[tuple[int, str, str]]:
        table = ControlTable(self.store, ROLLOUTS, ROLLOUTS_SCHEMA)
        found = RolloutTable(lambda: table).look().rollouts.values()
        return [(each.spec.version, str(each.state), each.who) for each in found]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# A CI pipeline.


class Pipeline:
    """`examples/ci/pipeline.sh` as the workflow calls it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.output = world.folder / "github-output"

    def __call__(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        given = {
            **self.world.environment,
            "RECIPE": str(self.world.folder / "recipe.toml"),
            "WORK": str(self.world.folder / "work"),
            "STAGES": "50%,100%",
            "ACTOR": "ci-ann",
            "RETRY_S": "0.1",
            "GITHUB_OUTPUT": str(self.output),
            **environment,
        }
        command = [EXAMPLES / "ci/pipeline.sh", *words]
        return subprocess.run(command, env=given, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.timeout(300)
def test_the_ci_pipeline_trains_releases_and_rolls_out_only_what_is_approved(world: World) -> None:
    run = Pipeline(world)
    world.fail("run", 3)  # the lake does not answer at first
    trained = run("train")
    assert trained.returncode == 0, trained.stderr
    assert world.calls("train", "run") == 2
    assert "try 1 of 5" in trained.stderr
    assert [json.loads(line)["step"] for line in trained.stdout.splitlines()] == STEPS[:-1]
    assert world.state() == {}
    # On a tag: what the merge trained is released, and nothing is trained again.
    bring_in_walkers(world.store, count=1, since_us=trainer_lake.START_US + 86_400_000_000)
    released = run("release")
    assert released.returncode == 0, released.stderr
    assert [json.loads(line)["skipped"] for line in released.stdout.splitlines()] == [True] * 5 + [False]
    assert run.output.read_text() == "release=walking@1\n"
    assert world.state() == {1: ReleaseState.DRAFT}
    early = run("rollout", "walking@1")
    assert (early.returncode, world.rollouts()) == (1, [])
    assert "walking@1 is draft" in early.stderr
    unsigned = run("approve", "walking@1", HEADWATER_KEYS=str(world.folder / "no-keys"))
    assert unsigned.returncode == 2
    assert world.state() == {1: ReleaseState.DRAFT}
    approved = run("approve", "walking@1", HEADWATER_KEYS=str(world.folder / "keys"))
    assert approved.returncode == 0, approved.stderr
    for _ in range(2):  # a job that is run again starts nothing twice
        rolled_out = run("rollout", "walking@1")
        assert rolled_out.returncode == 0, rolled_out.stderr
        assert world.rollouts() == [(1, "running", "ci-ann")]


@pytest.mark.parametrize("status", [1, 2])
def test_the_ci_pipeline_tries_nothing_again_that_waiting_does_not_mend(tmp_path: Path, status: int) -> None:
    command = tmp_path / "headwater"
    command.write_text(f'#!/bin/bash\necho x >> "{tmp_path}/calls"\nexit {status}\n')
    command.chmod(0o755)
    environment = {**os.environ, "HEADWATER_COMMAND": str(command), "GITHUB_OUTPUT": str(tmp_path / "output")}
    for words in (["train"], ["release"], ["rollout", "m@1"]):
        (tmp_path / "calls").unlink(missing_ok=True)
        script = [EXAMPLES / "ci/pipeline.sh", *words]
        done = subprocess.run(script, env=environment, capture_output=True, timeout=60, check=False)
        assert done.returncode == status
        assert (tmp_path / "calls").read_text() == "x\n"
    assert not (tmp_path / "output").exists()


def test_the_ci_pipeline_gives_up_in_the_end(tmp_path: Path) -> None:
    command = tmp_path / "headwater"
    command.write_text(f'#!/bin/bash\necho x >> "{tmp_path}/calls"\nexit 3\n')
    command.chmod(0o755)
    environment = {**os.environ, "HEADWATER_COMMAND": str(command), "TRIES_MAX": "3", "RETRY_S": "0.1"}
    script = [EXAMPLES / "ci/pipeline.sh", "train"]
    done = subprocess.run(script, env=environment, capture_output=True, timeout=60, check=False)
    assert (done.returncode, (tmp_path / "calls").read_text()) == (3, "x\n" * 3)


def test_the_workflow_runs_the_script_and_nothing_else_and_waits_before_the_rollout() -> None:
    workflow = yaml.safe_load((EXAMPLES / "ci/headwater.yml").read_text())
    # YAML 1.1 reads the key `on` as true.
    assert workflow[True] == {"push": {"branches": ["main"], "tags": ["v*"]}}
    jobs = workflow["jobs"]
    lines = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert lines == {
        "train": ["examples/ci/pipeline.sh train"],
        "release": ["examples/ci/pipeline.sh release"],
        "rollout": ['examples/ci/pipeline.sh approve "$RELEASE"', 'examples/ci/pipeline.sh rollout "$RELEASE"'],
    }
    assert (jobs["train"]["if"], jobs["release"]["if"]) == ("github.ref_type == 'branch'", "github.ref_type == 'tag'")
    assert (jobs["rollout"]["needs"], jobs["rollout"]["environment"]) == ("release", "production")
    # The key's passphrase is seen where a reviewer has said yes, and nowhere else.
    secret = "HEADWATER_KEY_PASSPHRASE"
    assert secret not in json.dumps([workflow["env"], jobs["train"], jobs["release"]])
    assert secret in json.dumps(jobs["rollout"])
    script = (EXAMPLES / "ci/pipeline.sh").read_text()
    assert all(name in script for name in workflow["env"] if not name.startswith("AWS_"))


# Dagster and Airflow, each in an environment of its own.


class Driven:
    """A driver program, run by an orchestrator's Python; its last line of output is JSON."""

    def __init__(self, python: Path, environment: dict[str, str]) -> None:
        self._python, self._environment = python, environment

    def __call__(self, program: str, *arguments: str) -> Any:
        command = [self._python, "-c", program, *arguments]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-8_000:]
        return json.loads(done.stdout.splitlines()[-1])


DAGSTER = """
import json, sys
import dagster as dg
sys.path.insert(0, sys.argv[1])
import definitions as example

instance = dg.DagsterInstance.ephemeral()
found = {}
if sys.argv[2] == "training":
    job = example.defs.get_job_def("training")
    done = job.execute_in_process(instance=instance, raise_on_error=False)
    found["success"] = done.success
    found["steps"] = [e.step_key for e in done.all_events if e.event_type_value == "STEP_SUCCESS"]
    found["restarted"] = [e.step_key for e in done.all_events if e.event_type_value == "STEP_RESTARTED"]
    found["skipped"] = [
        m.metadata["skipped"].value for m in (e.step_materialization_data.materialization for e in done.all_events
        if e.event_type_value == "ASSET_MATERIALIZATION")
    ]
    found["errors"] = [e.event_specific_data.error.to_string()[:2000] for e in done.all_events
                       if e.event_type_value == "STEP_FAILURE"]
else:
    with dg.build_sensor_context(instance=instance) as context:
        said = example.approved_release.evaluate_tick(context)
    found["skip"], found["keys"] = said.skip_message, [r.run_key for r in said.run_requests]
    for request in said.run_requests:
        for _ in range(2):
            done = example.rollout.execute_in_process(run_config=request.run_config, instance=instance)
            found["success"] = done.success
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(2_400)
def test_dagster_trains_and_rolls_out_what_somebody_has_approved(world: World) -> None:
    run = Driven(installed(world.folder, "dagster~=1.13"), world.environment | {"DAGSTER_HOME": ""})
    example = str(EXAMPLES / "dagster")
    world.fail("search", 3)
    first = run(DAGSTER, example, "training")
    assert (first["steps"], first["restarted"]) == (STEPS, ["search"]), first["errors"]
    assert first["skipped"] == [False] * 6
    again = run(DAGSTER, example, "training")
    assert (again["success"], again["skipped"]) == (True, [True] * 6)
    world.fail("export", 1)
    refused = run(DAGSTER, example, "training")
    assert (refused["success"], refused["steps"], refused["restarted"]) == (False, STEPS[:4], [])
    assert "ended with 1: as the test wants it" in refused["errors"][0]
    assert world.calls("train", "export") == 3
    waiting = run(DAGSTER, example, "rollout")
    assert (waiting["skip"], waiting["keys"]) == ("no release of walking is approved", [])
    world.approve(1)
    assert run(DAGSTER, example, "rollout") == {"skip": None, "keys": ["walking@1"], "success": True}
    assert world.rollouts() == [(1, "running", "dagster")]


AIRFLOW = """
import datetime, json, sys
sys.path.insert(0, sys.argv[1])
from headwater_training import dag

for task in dag.tasks:
    task.retry_delay, task.retry_exponential_backoff = datetime.timedelta(seconds=1), 0
dag.get_task("approved").poke_interval = 1.0
run = dag.test()
print()
print(json.dumps({"state": str(run.state), "tasks": {t.task_id: [str(t.state), t.try_number] for t in
                  run.get_task_instances()}}))
"""


@pytest.fixture
def in_the_background() -> Iterator[Callable[[Callable[[threading.Event], None]], None]]:
    """Starts threads, which end with the test."""
    stop, threads = threading.Event(), []

    def start(work: Callable[[threading.Event], None]) -> None:
        threads.append(threading.Thread(target=work, args=(stop,), daemon=True))
        threads[-1].start()

    yield start
    stop.set()
    for thread in threads:
        thread.join(30)


@pytest.mark.slow
@pytest.mark.timeout(2_400)
def test_airflow_trains_waits_for_somebody_and_rolls_out(world: World, in_the_background) -> None:
    dags = world.folder / "dags"
    dags.mkdir()
    shutil.copy(EXAMPLES / "airflow/headwater_training.py", dags)
    python = installed(world.folder, "apache-airflow-core~=3.3", "apache-airflow-task-sdk~=1.3")
    environment = world.environment | {
        "AIRFLOW_HOME": str(world.folder / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }
    migrate = [python.parent / "airflow", "db", "migrate"]
    subprocess.run(migrate, env=environment, capture_output=True, timeout=600, check=True)
    run = Driven(python, environment)
    approved_at: list[float] = []

    def somebody(stop: threading.Event) -> None:
        """Has a look once Airflow waits, and signs."""
        while not stop.wait(0.2):
            if world.calls("release", "show") >= 2:
                approved_at.append(time.time())
                world.approve(1)
                return

    in_the_background(somebody)
    world.fail("search", 3)
    done = run(AIRFLOW, str(dags))
    assert done["state"] == "success", done
    assert set(done["tasks"]) == {*STEPS, "approved", "rollout"}
    assert all(state == "success" for state, _ in done["tasks"].values())
    assert world.calls("train", "search") == 2
    assert approved_at
    assert world.rollouts() == [(1, "running", "airflow")]
    # Again: nothing is trained or started twice. And what is not good enough is not tried again.
    again = run(AIRFLOW, str(dags))
    assert again["state"] == "success"
    assert read_record(world.folder / "work/walking", "release").outputs["version"] == 1
    assert world.rollouts() == [(1, "running", "airflow")]
    world.fail("export", 1)
    refused = run(AIRFLOW, str(dags))
    assert refused["state"] == "failed"
    assert (refused["tasks"]["export"][0], refused["tasks"]["release"][0]) == ("failed", "upstream_failed")
    assert world.calls("train", "export") == 3
