"""Runs in MLflow, for those who keep theirs there. The lake's `control/evaluations` has them in any case.

A run carries the tag `headwater.run`, the name of the step's run: one that was told already, or in part before a kill,
is found by it and not told twice. MLflow writes to stdout, where the command line has its JSON: that goes to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

from contract.errors import ConfigurationError, TemporaryError
from trainer.recipe import Recipe
from trainer.trials import SearchResult

URI_VARIABLE = "MLFLOW_TRACKING_URI"
RUN_TAG = "headwater.run"
TAG_CHARACTERS_MAX = 5_000
"""What MLflow keeps of a tag."""
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""MLflow's own is to ask an absent server again for four minutes. Who has set these, means it."""


def is_asked_for(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether runs go to MLflow."""
    return bool(environment.get(URI_VARIABLE))


def check_installed(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse, before anything is trained, what could not be told afterwards.

    Raises:
        ConfigurationError: runs shall go to MLflow, but it is not installed.
    """
    if is_asked_for(environment):
        _mlflow(environment[URI_VARIABLE])


def log_run(
    recipe: Recipe,
    result: SearchResult,
    metrics: list[dict[str, Any]],
    files: Iterable[Path],
    tags: Mapping[str, str],
    environment: Mapping[str, str] = os.environ,
) -> str | None:
    """Log a run, if MLFLOW_TRACKING_URI is set.

    Args:
        recipe: its name is that of the experiment.
        result: family, parameters and the cross-validated figures.
        metrics: `{name, value, split}` each.
        files: kept with the run.
        tags: where it comes from; RUN_TAG among them.
        environment: where the variable is looked for; MLflow itself reads the process's own.

    Returns:
        The run's id; None where the variable is not set.

    Raises:
        ConfigurationError: it is set, but MLflow is not installed, or refuses such a run.
        TemporaryError: the server does not answer.
    """
    if not is_asked_for(environment):
        return None
    uri = environment[URI_VARIABLE]
    mlflow = _mlflow(uri)
    try:
        with redirect_stdout(sys.stderr):
            return _told(mlflow.MlflowClient(uri), recipe, result, metrics, files, tags)
    except (mlflow.MlflowException, OSError) as error:
        status = error.get_http_status_code() if isinstance(error, mlflow.MlflowException) else 503
        said = str(error)[:300]
        if 400 <= status < 500 and status != 429:
            raise ConfigurationError(
                f"MLflow at {uri[:200]} refuses the run ({said}); mend that there, or unset {URI_VARIABLE}"
            ) from error
        raise TemporaryError(
            f"MLflow at {uri[:200]} does not take the run ({said}); try again, or unset {URI_VARIABLE}"
        ) from error


def _mlflow(uri: str) -> Any:
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    try:
        return import_module("mlflow")
    except ImportError as error:
        raise ConfigurationError(
            f"{URI_VARIABLE} is set to {uri[:200]!r}, but MLflow is not installed; run: pip install mlflow-skinny, or "
            f"unset {URI_VARIABLE}"
        ) from error


def _told(
    client: Any,
    recipe: Recipe,
    result: SearchResult,
    metrics: list[dict[str, Any]],
    files: Iterable[Path],
    tags: Mapping[str, str],
) -> str:
    found = client.get_experiment_by_name(recipe.name)
    experiment = client.create_experiment(recipe.name) if found is None else found.experiment_id
    begun = client.search_runs([experiment], filter_string=f"tags.`{RUN_TAG}` = '{tags[RUN_TAG]}'")
    if begun and begun[0].info.status == "FINISHED":
        return str(begun[0].info.run_id)
    kept = {name: text[:TAG_CHARACTERS_MAX] for name, text in tags.items()}
    run = begun[0] if begun else client.create_run(experiment, tags=kept, run_name=f"{recipe.name} {tags[RUN_TAG][:8]}")
    number = run.info.run_id
    chosen = result.best.candidate
    params = {"family": chosen.family, "share": chosen.share, "seed": recipe.seed, **chosen.params}
    for name, value in params.items():
        client.log_param(number, name, value)
    for metric in metrics:
        client.log_metric(number, metric["name"], metric["value"])
    for name, trial in (("cross_validated", result.best), ("cross_validated_untuned", result.baseline)):
        if trial is not None and trial.score is not None:
            client.log_metric(number, f"{name}_{result.metric}", trial.score)
    for path in files:
        client.log_artifact(number, str(path))
    client.set_terminated(number)
    return str(number)
