"""What became of the candidates of a search, and the journal that keeps it through a kill.

Each trial is written into a journal in the work folder as it ends. The journal goes when its search is published, or
when another search begins.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Literal

import msgspec
import optuna
import structlog
from optuna.exceptions import OptunaError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from trainer.candidates import Candidate
from trainer.provenance import packages, source_sha256
from trainer.recipe import Recipe
from trainer.steps import StepContext
from trainer.windowset import WindowSet

_log = structlog.get_logger()

JOURNAL_FILE = ".search.journal"


class TrialResult(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate and what became of it."""

    candidate: Candidate
    state: Literal["scored", "pruned", "failed"]
    tuned: bool
    score: float | None = None
    """Mean of the metric over all folds; higher is better."""
    folds: list[float] = []
    error: str = ""


class SearchResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a search ended: `search.json`."""

    metric: str
    best: TrialResult
    baseline: TrialResult | None
    """The best family as it comes."""
    stopped: Literal["target", "trials", "seconds"]
    trials: list[TrialResult]
    features: tuple[str, ...] = ()
    """Names of the features of the chosen model, in the order of the graph."""
    threshold: float | None = None


def results_of(study: optuna.Study) -> list[TrialResult]:
    """What has ended so far, the untuned families first."""
    found = [
        msgspec.convert(value, TrialResult) for key, value in study.user_attrs.items() if key.startswith("untuned:")
    ]
    states: dict[TrialState, Literal["scored", "pruned", "failed"]] = {
        TrialState.COMPLETE: "scored",
        TrialState.PRUNED: "pruned",
        TrialState.FAIL: "failed",
    }
    for trial in study.get_trials(deepcopy=False):
        if trial.state not in states or "candidate" not in trial.user_attrs:
            continue
        found.append(
            TrialResult(
                candidate=msgspec.convert(trial.user_attrs["candidate"], Candidate),
                state=states[trial.state],
                tuned=True,
                score=trial.value if trial.state is TrialState.COMPLETE else None,
                folds=trial.user_attrs.get("folds", []),
                error=trial.user_attrs.get("error", ""),
            )
        )
    return found


def open_study(journal: Path | None, seed: int) -> optuna.Study:
    """A study that goes on where its journal stands.

    Args:
        journal: where trials are kept; None: in memory.
        seed: of what is drawn.

    Raises:
        OSError: the disk refused.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _study(None) if journal is None else _resumed(journal)
    # A search that goes on must not draw again what it drew before.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.get_trials(deepcopy=False)))
    return study


def _study(storage: JournalStorage | None) -> optuna.Study:
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=0)
    return optuna.create_study(
        storage=storage, study_name="search", direction="maximize", load_if_exists=True, pruner=pruner
    )


def _resumed(journal: Path) -> optuna.Study:
    """The study of a journal. What a power cut or a full disk left of a last line is cut off; a journal that is
    damaged otherwise is dropped, and with it the trials it held."""
    # One process works in the folder at a time (`trainer.files.locked`): a lock that is there was left by a kill.
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if journal.exists():
        content = journal.read_bytes()
        os.truncate(journal, content.rfind(b"\n") + 1)
    try:
        study = _study(JournalStorage(JournalFileBackend(str(journal))))
        results_of(study)
    except (ValueError, LookupError, TypeError, AssertionError, msgspec.DecodeError, OptunaError) as error:
        _log.warning("search_journal_dropped", journal=str(journal), error=f"{type(error).__name__}: {error}"[:300])
        journal.unlink()
        study = _study(JournalStorage(JournalFileBackend(str(journal))))
    return study


def journal_for(work: Path, dataset: WindowSet, recipe: Recipe, seed: int) -> Path:
    """The journal of just these inputs, this code and these packages; those of any others are removed.

    Raises:
        OSError: the disk refused.
    """
    parts = [getattr(recipe, name) for name in ("task", "features", "families", "search", "split", "window")]
    inputs = [dataset.sha256(), seed, msgspec.to_builtins(parts), source_sha256(), packages()]
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    wanted = work / f"{JOURNAL_FILE}.{digest[:16]}"
    for path in work.glob(f"{JOURNAL_FILE}.*"):
        if not path.name.startswith(wanted.name):
            path.unlink(missing_ok=True)
    return wanted


def forget(context: StepContext) -> None:
    """Remove the journal of a search that is published.

    Raises:
        OSError: the disk refused.
    """
    for path in context.work.glob(f"{JOURNAL_FILE}.*"):
        path.unlink(missing_ok=True)
