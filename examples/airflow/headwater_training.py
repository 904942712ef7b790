"""Training as an Airflow DAG (Airflow 3.3): one task for each step, somebody's approval, then a rollout in stages.

    dataset ─▶ checks ─▶ search ─▶ evaluate ─▶ export ─▶ release ─▶ approved ─▶ rollout

Each task is a command of Headwater: idempotent, JSON on stdout (the task's XCom), and an exit status that says whether
trying again can help. Only 3 (something did not answer) is retried; 1 (not good enough) and 2 (wrong recipe) fail at
once. `approved` waits until somebody signs the release with the offline key, which Airflow does not have:

    headwater release approve MODEL@VERSION --keys DIR --why "…"

Of Airflow's own packages it needs the task SDK alone. Workers need, in their environment: HEADWATER_LAKE (and the AWS_…
keys of its store), HEADWATER_RECIPE, HEADWATER_WORK (a folder that all steps see: one worker, or a shared disk), and
HEADWATER_COMMAND where `headwater` is not on their path. The recipe is the one file that decides the model.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from datetime import datetime, timedelta
from typing import Any

from airflow.sdk import DAG, BaseOperator, BaseSensorOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

STEPS = ("dataset", "checks", "search", "evaluate", "export", "release")
RECIPE = os.environ.get("HEADWATER_RECIPE", "recipe.toml")
WORK = os.environ.get("HEADWATER_WORK", "headwater-work")
STAGES = os.environ.get("HEADWATER_STAGES", "10%,50%,100%")
TRY_AGAIN = 3
"""The only exit status that waiting mends (`headwater/exits.py`)."""


class Headwater:
    """One command, as a process that Airflow can end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, *arguments: str) -> list[Any]:
        """Run it; returns its lines of JSON.

        Raises:
            AirflowException: status 3: the task is tried again.
            AirflowFailException: any other: it is not.
        """
        command = [os.environ.get("HEADWATER_COMMAND", "headwater"), *arguments, "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as self._process:
            said, complaint = self._process.communicate()
        status = self._process.returncode
        if status == 0:
            return [json.loads(line) for line in said.splitlines()]
        message = f"headwater {' '.join(arguments)} ended with {status}: {complaint.strip() or said.strip()}"
        raise (AirflowException if status == TRY_AGAIN else AirflowFailException)(message)

    def stop(self) -> None:
        """End it as Ctrl-C would: a step that is ended leaves its old result."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)


class TrainStep(BaseOperator):
    """One step of training; its XCom is what the step said."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._headwater = Headwater()

    def execute(self, context: Any) -> Any:
        """Run the step, or find that it has run."""
        # The dataset is taken at the latest versions; the later steps go on with the one that is there.
        return self._headwater.run("train", self.task_id, RECIPE, "--work", WORK)[-1]

    def on_kill(self) -> None:
        """The task was cleared or ran too long."""
        self._headwater.stop()


class ReleaseApproved(BaseSensorOperator):
    """Waits until the release is approved, without a worker in between. A release that is retired fails it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._headwater = Headwater()

    def poke(self, context: Any) -> bool:
        """Look once."""
        state = self._headwater.run("release", "show", release_of(context))[-1]["state"]
        if state == "retired":
            raise AirflowFailException(f"{release_of(context)} was retired instead of approved")
        return state == "approved"


class Rollout(BaseOperator):
    """Starts the rollout of the release, once; gateways do the rest (`headwater rollout status`)."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._headwater = Headwater()

    def execute(self, context: Any) -> Any:
        """Start it, unless it was started by an earlier run or try."""
        release = release_of(context)
        for rollout in self._headwater.run("rollout", "status"):
            if f"{rollout['model']}@{rollout['version']}" == release:
                return rollout
        why = f"Airflow run {context['run_id']}"
        arguments = ("rollout", "start", release, "--stages", STAGES, "--by", "airflow", "--why", why)
        return self._headwater.run(*arguments)[-1]


def release_of(context: Any) -> str:
    """`MODEL@VERSION` that this run made, or found to be made."""
    outputs = context["ti"].xcom_pull(task_ids="release")["outputs"]
    return f"{outputs['model']}@{outputs['version']}"


with DAG(
    "headwater_training",
    description="From the lake to a release that rolls out",
    schedule="@weekly",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,  # one process at a time works in a recipe's folder
    default_args={"retries": 5, "retry_delay": timedelta(minutes=2), "retry_exponential_backoff": True},
    tags=["headwater"],
) as dag:
    before: BaseOperator | None = None
    for name in STEPS:
        step = TrainStep(task_id=name)
        if before is not None:
            before >> step
        before = step
    approved = ReleaseApproved(
        task_id="approved", mode="reschedule", poke_interval=60.0, timeout=timedelta(days=7).total_seconds()
    )
    step >> approved >> Rollout(task_id="rollout")
