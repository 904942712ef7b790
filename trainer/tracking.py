"""Runs in MLflow, for those who keep theirs there. The lake's `control/evaluations` has them in any case."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from contract.errors import ConfigurationError, TemporaryError
from trainer.recipe import Recipe
from trainer.trials import SearchResult

URI_VARIABLE = "MLFLOW_TRACKING_URI"


def is_asked_for(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether runs go to MLflow."""
    return bool(environment.get(URI_VARIABLE))


def log_run(
    recipe: Recipe,
    result: SearchResult,
    metrics: list[dict[str, Any]],
    files: Iterable[Path],
    environment: Mapping[str, str] = os.environ,
) -> str | None:
    """Log a run, if MLFLOW_TRACKING_URI is set.

    Args:
        recipe: its name is that of the experiment.
        result: family and parameters.
        metrics: `{name, value, split}` each.
        files: kept with the run.
        environment: where the variable is looked for; MLflow itself reads the process's own.

    Returns:
        The run's id; None where the variable is not set.

    Raises:
        ConfigurationError: it is set, but MLflow is not installed.
        TemporaryError: the server does not take the run.
    """
    if not is_asked_for(environment):
        return None
    uri = environment[URI_VARIABLE]
    try:
        mlflow = import_module("mlflow")
    except ImportError as error:
        raise ConfigurationError(
            f"{URI_VARIABLE} is set to {uri[:200]!r}, but MLflow is not installed; run: pip install mlflow-skinny, or "
            f"unset {URI_VARIABLE}"
        ) from error
    chosen = result.best.candidate
    try:
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(recipe.name)
        with mlflow.start_run() as run:
            mlflow.log_params({"family": chosen.family, "share": chosen.share, "seed": recipe.seed, **chosen.params})
            mlflow.log_metrics({metric["name"]: metric["value"] for metric in metrics})
            for path in files:
                mlflow.log_artifact(str(path))
            return str(run.info.run_id)
    except (mlflow.MlflowException, OSError) as error:
        raise TemporaryError(
            f"MLflow at {uri[:200]} does not take the run ({str(error)[:300]}); try again, or unset {URI_VARIABLE}"
        ) from error
