"""Training as Dagster assets: one asset for each step, and a rollout that begins when somebody has approved.

    dataset ─▶ checks ─▶ search ─▶ evaluate ─▶ export ─▶ release      weekly, or when somebody materializes them
    (sensor: an approved release) ─▶ rollout

Each asset is a command of Headwater: idempotent, JSON on stdout (the asset's metadata), and an exit status that says
whether trying again can help. Only 3 (something did not answer) is retried; 1 (not good enough) and 2 (wrong recipe)
fail at once. What is approved is decided by who has the offline key, and Dagster does not:

    headwater release approve MODEL@VERSION --keys DIR --why "…"

    HEADWATER_LAKE=s3://… HEADWATER_RECIPE=recipe.toml dagster dev -f examples/dagster/definitions.py

The environment: HEADWATER_LAKE (and the AWS_… keys of its store), HEADWATER_RECIPE, HEADWATER_WORK (a folder that all
steps see), and HEADWATER_COMMAND where `headwater` is not on the path.
"""

# Without `from __future__ import annotations`: Dagster reads the types of a context when it makes an op.
import json
import os
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

STEPS = ("dataset", "checks", "search", "evaluate", "export", "release")
RECIPE = Path(os.environ.get("HEADWATER_RECIPE", "recipe.toml"))
WORK = os.environ.get("HEADWATER_WORK", "headwater-work")
STAGES = os.environ.get("HEADWATER_STAGES", "10%,50%,100%")
TRY_AGAIN = 3
"""The only exit status that waiting mends (`headwater/exits.py`)."""
RETRIES_MAX = 5
RETRY_S = float(os.environ.get("HEADWATER_RETRY_S", "120"))


def headwater(*arguments: str) -> list[Any]:
    """Run a command; returns its lines of JSON.

    Raises:
        dg.RetryRequested: status 3: it is tried again.
        dg.Failure: any other: it is not.
    """
    command = [os.environ.get("HEADWATER_COMMAND", "headwater"), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return [json.loads(line) for line in done.stdout.splitlines()]
    message = f"headwater {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}"
    failure = dg.Failure(message, metadata={"stdout": done.stdout[-10_000:]}, allow_retries=False)
    if done.returncode == TRY_AGAIN:
        raise dg.RetryRequested(max_retries=RETRIES_MAX, seconds_to_wait=RETRY_S) from failure
    raise failure


def step_asset(name: str, before: str | None) -> dg.AssetsDefinition:
    """The asset that one step of training is."""

    @dg.asset(name=name, deps=[before] if before else [], group_name="headwater", kinds={"headwater"})
    def step() -> dg.MaterializeResult:
        said = headwater("train", name, str(RECIPE), "--work", WORK)[-1]
        metadata = {"skipped": said["skipped"], "seconds": said["seconds"], "outputs": dg.MetadataValue.json(said)}
        return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion(said["run"]))

    return step


class Release(dg.Config):
    """What is rolled out."""

    model: str
    version: int


@dg.op(out=dg.Out(dict))
def start_rollout(context: dg.OpExecutionContext, config: Release) -> dict[str, Any]:
    """Start it, unless it was started before; gateways do the rest (`headwater rollout status`)."""
    for rollout in headwater("rollout", "status"):
        if (rollout["model"], rollout["version"]) == (config.model, config.version):
            return rollout
    release, why = f"{config.model}@{config.version}", f"Dagster run {context.run_id}"
    started = headwater("rollout", "start", release, "--stages", STAGES, "--by", "dagster", "--why", why)[-1]
    context.log.info("rollout %s is %s", started["rollout"], started["state"])
    return started


@dg.job
def rollout() -> None:
    """Start the rollout of one approved release."""
    start_rollout()


@dg.sensor(job=rollout, minimum_interval_seconds=60)
def approved_release(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """The newest release of this recipe's model, once somebody has approved it; each is asked for once."""
    model = tomllib.loads(RECIPE.read_text())["name"]
    try:
        found = headwater("release", "list", model)
    except dg.RetryRequested:
        yield dg.SkipReason("the lake does not answer; the next look comes in a minute")
        return
    approved = [release["version"] for release in found if release["state"] == "approved"]
    if not approved:
        yield dg.SkipReason(f"no release of {model} is approved")
        return
    release = {"model": model, "version": max(approved)}
    yield dg.RunRequest(
        run_key=f"{model}@{release['version']}", run_config={"ops": {"start_rollout": {"config": release}}}
    )


steps = [step_asset(name, before) for name, before in zip(STEPS, (None, *STEPS), strict=False)]
training = dg.define_asset_job("training", selection=dg.AssetSelection.groups("headwater"))
weekly = dg.ScheduleDefinition(job=training, cron_schedule="0 3 * * 1")
defs = dg.Definitions(assets=steps, jobs=[training, rollout], schedules=[weekly], sensors=[approved_release])
