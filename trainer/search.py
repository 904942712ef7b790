"""The search: all families together, by cross-validation, until the target is met or the budget is spent.

First every family is tried as it comes, with the library's defaults: these are the baselines that tuning has to beat,
and one of them may win. Then Optuna draws (TPE: Bergstra and others, 2011), fold by fold, and gives up what falls
behind the median of the trials before (`MedianPruner`). A trial that cannot be fitted is a failed trial with its
reason; when every trial failed, the step fails with theirs.

Each trial is kept as it ends (`trainer.trials`), so a search that was killed goes on where it stood.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import joblib
import msgspec
import numpy as np
import numpy.typing as npt
import optuna
from optuna.trial import TrialState

from trainer.candidates import Candidate, Scorer, Trained, find_scorer, judge, train
from trainer.errors import DataError, TrainingError
from trainer.families import spaces_of
from trainer.material import Material, make_material
from trainer.recipe import Range, Recipe, Scalar, Space
from trainer.selection import rank
from trainer.split import Split
from trainer.steps import Outputs, StepContext
from trainer.tracking import check_installed
from trainer.trials import SearchResult, TrialResult, journal_for, open_study, results_of

Int64s = npt.NDArray[np.int64]
Clock = Callable[[], float]

MODEL_FILE = "estimator.joblib"
RESULT_FILE = "search.json"
SHARE_MIN = 0.15
"""Of the features that are left, the fewest that a trial is given."""
ERRORS_TOLD_MAX = 3


class _Pruned(Exception):
    """The trial falls behind."""


class _Folds:
    """Cross-validation of candidates; features are ranked once in each fold."""

    def __init__(
        self, material: Material, split: Split, recipe: Recipe, scorer: Scorer, seed: int, clock: Clock
    ) -> None:
        self._material = material
        self._split = split
        self._recipe = recipe
        self._scorer = scorer
        self._seed = seed
        self._clock = clock
        self._rankings: dict[int, Int64s] = {}

    def ranking(self, number: int) -> Int64s:
        """Of the training windows of a fold."""
        if number not in self._rankings:
            rows = self._split.folds[number].train
            labels = None if self._material.labels is None else self._material.labels[rows]
            method = self._recipe.features.select
            self._rankings[number] = rank(self._material.features[rows], labels, method, self._seed)
        return self._rankings[number]

    def scores(self, candidate: Candidate) -> Iterator[float]:
        """The metric, fold by fold.

        Raises:
            TrainingError: it cannot be fitted or judged, or takes longer than a trial may.
        """
        limit = self._recipe.search.trial_seconds
        for number, fold in enumerate(self._split.folds):
            began = self._clock()
            trained = train(self._material, candidate, fold.train, self.ranking(number), self._recipe, self._seed)
            yield judge(self._material, trained, fold.valid, self._scorer, self._recipe.search.metric)
            if (took := self._clock() - began) > limit:
                raise TrainingError(
                    f"{candidate.family} took {took:.1f} s for one fold, more than [search] trial_seconds = {limit:g}"
                )

    def final(self, candidate: Candidate) -> Trained:
        """Fitted on all training windows."""
        return fit_candidate(self._material, self._split.train, self._recipe, self._seed, candidate)


def fit_candidate(material: Material, rows: Int64s, recipe: Recipe, seed: int, candidate: Candidate) -> Trained:
    """Choose features in some windows, and fit a candidate on them.

    Raises:
        TrainingError: it cannot be fitted.
    """
    labels = None if material.labels is None else material.labels[rows]
    ranking = rank(material.features[rows], labels, recipe.features.select, seed)
    return train(material, candidate, rows, ranking, recipe, seed)


def check_folds(material: Material, split: Split) -> None:
    """Whether every class can be learned in every fold, and in the whole.

    Raises:
        DataError: naming fold, class and remedy.
    """
    if material.labels is None:
        return
    parts = [(f"fold {number} of the cross-validation", fold.train) for number, fold in enumerate(split.folds, 1)]
    for what, rows in [("the training side of the split", split.train), *parts]:
        present = np.unique(material.labels[rows])
        missing = [name for number, name in enumerate(material.classes) if number not in present]
        if missing:
            raise DataError(
                f"{what} has no window of {', '.join(missing)}, which some other group alone has: it could never be "
                "learned; take more groups with these classes, leave them out of the labels, or change [split]"
            )


def search(
    material: Material,
    split: Split,
    recipe: Recipe,
    seed: int,
    *,
    journal: Path | None = None,
    done: Callable[[int], None] = lambda units: None,
    clock: Clock = time.monotonic,
) -> tuple[SearchResult, Trained]:
    """Find the best model.

    Args:
        material: features and labels.
        split: only its training side is looked at.
        recipe: families, features, metric, target and budget.
        seed: the same one, without a budget of seconds, finds the same model.
        journal: where trials are kept; one that holds trials of the same inputs is continued. None: in memory.
        done: called with 1 as each trial ends.
        clock: seconds, monotonic.

    Returns:
        How it ended, and the best candidate fitted on all training windows.

    Raises:
        ConfigurationError: families or metric cannot be used.
        DataError: a class is missing in a fold.
        TrainingError: no candidate could be trained.
    """
    spaces = spaces_of(recipe.task, recipe.families)
    folds = _Folds(material, split, recipe, find_scorer(recipe.search.metric), seed, clock)
    check_folds(material, split)
    study = open_study(journal, seed)
    began, spent = clock(), float(study.user_attrs.get("spent_s", 0.0))
    stopped: Literal["target", "trials", "seconds"] = "trials"
    results = results_of(study)
    done(len(results))
    waiting = [name for name in spaces if f"untuned:{name}" not in study.user_attrs]
    while len(results) < max(recipe.search.trials, len(spaces)):
        scored = [result for result in results if result.score is not None]
        if recipe.search.target is not None and any(
            result.score >= recipe.search.target for result in scored if result.score is not None
        ):
            stopped = "target"
            break
        if scored and spent + clock() - began > recipe.search.seconds:
            stopped = "seconds"
            break
        if waiting:
            _try_untuned(study, folds, Candidate(family=waiting.pop(0)))
        else:
            _try_tuned(study, folds, spaces, recipe)
        study.set_user_attr("spent_s", spent + clock() - began)
        results = results_of(study)
        done(1)
    best, trained = _first_that_fits(results, folds)
    untuned = [result for result in results if not result.tuned and result.score is not None]
    found = SearchResult(
        metric=recipe.search.metric,
        best=best,
        baseline=max(untuned, key=_score, default=None),
        stopped=stopped,
        trials=results,
        features=tuple(material.names[column] for column in trained.columns),
        threshold=trained.threshold,
    )
    return found, trained


def _score(result: TrialResult) -> float:
    return -np.inf if result.score is None else result.score


def _first_that_fits(results: list[TrialResult], folds: _Folds) -> tuple[TrialResult, Trained]:
    """The best result whose candidate can be fitted on all training windows, too."""
    scored = sorted((result for result in results if result.score is not None), key=_score, reverse=True)
    errors = [result.error for result in results if result.error]
    for result in scored:
        try:
            return result, folds.final(result.candidate)
        except TrainingError as error:
            errors.insert(0, str(error))
    told = "; ".join(dict.fromkeys(errors[: ERRORS_TOLD_MAX * 5]))
    raise TrainingError(f"none of {len(results)} trials gave a model: {told[:2_000]}")


def _try_untuned(study: optuna.Study, folds: _Folds, candidate: Candidate) -> None:
    try:
        values = list(folds.scores(candidate))
        result = TrialResult(
            candidate=candidate, state="scored", tuned=False, score=float(np.mean(values)), folds=values
        )
    except TrainingError as error:
        result = TrialResult(candidate=candidate, state="failed", tuned=False, error=str(error))
    study.set_user_attr(f"untuned:{candidate.family}", msgspec.to_builtins(result))


def _try_tuned(study: optuna.Study, folds: _Folds, spaces: Mapping[str, Mapping[str, Space]], recipe: Recipe) -> None:
    trial = study.ask()
    candidate = _suggest(trial, spaces, recipe)
    trial.set_user_attr("candidate", msgspec.to_builtins(candidate))
    values: list[float] = []
    try:
        for number, value in enumerate(folds.scores(candidate)):
            values.append(value)
            trial.report(float(np.mean(values)), number)
            if trial.should_prune():
                raise _Pruned
    except _Pruned:
        trial.set_user_attr("folds", values)
        study.tell(trial, state=TrialState.PRUNED)
        return
    except TrainingError as error:
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=TrialState.FAIL)
        return
    trial.set_user_attr("folds", values)
    study.tell(trial, float(np.mean(values)))


def _suggest(trial: optuna.Trial, spaces: Mapping[str, Mapping[str, Space]], recipe: Recipe) -> Candidate:
    family = trial.suggest_categorical("family", list(spaces))
    params: dict[str, Scalar] = {}
    for name, space in spaces[family].items():
        key = f"{family}.{name}"
        if isinstance(space, Range):
            params[name] = _number(trial, key, space)
        elif isinstance(space, list):
            chosen = trial.suggest_categorical(key, space)
            assert chosen is not None  # TOML has no null
            params[name] = chosen
        else:
            params[name] = space
    share = trial.suggest_float("share", SHARE_MIN, 1.0) if recipe.features.select == "importance" else 1.0
    return Candidate(family=family, params=params, share=share)


def _number(trial: optuna.Trial, key: str, space: Range) -> float | int:
    if space.is_whole:
        return trial.suggest_int(key, int(space.low), int(space.high), step=int(space.step or 1), log=space.log)
    return trial.suggest_float(key, float(space.low), float(space.high), step=space.step, log=space.log)


def step(context: StepContext) -> Outputs:
    """Search, and leave the chosen model: `search.json`, `estimator.joblib`, `features.npy`."""
    recipe, dataset, split = context.recipe, context.windows(), context.split()
    spaces_of(recipe.task, recipe.families)  # refuse before anything is computed
    find_scorer(recipe.search.metric)
    check_installed()
    with context.progress.track("features", len(dataset)) as done:
        material = make_material(dataset, recipe, split, context.seed, done)
    journal = journal_for(context.work, dataset, recipe, context.seed)
    with context.progress.track("search", recipe.search.trials) as done:
        result, trained = search(material, split, recipe, context.seed, journal=journal, done=done)
    material.save(context.into)
    joblib.dump(trained, context.into / MODEL_FILE, compress=1)
    (context.into / RESULT_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    return {
        "family": result.best.candidate.family,
        "params": result.best.candidate.params,
        "features": list(result.features),
        "threshold": result.threshold,
        "metric": result.metric,
        "score": result.best.score,
        "baseline": None if result.baseline is None else msgspec.to_builtins(result.baseline),
        "trials": len(result.trials),
        "stopped": result.stopped,
    }


def load_result(context: StepContext) -> tuple[SearchResult, Trained]:
    """What the search left in the work folder. The model is a pickle: it is only ever read where this user wrote it.

    Raises:
        StepNotReadyError: it has not run.
        DataError: it is damaged.
    """
    folder = context.folder("search")
    try:
        result = msgspec.json.decode((folder / RESULT_FILE).read_bytes(), type=SearchResult)
        trained = joblib.load(folder / MODEL_FILE)
    except (OSError, ValueError, EOFError, msgspec.DecodeError) as error:
        raise DataError(f"{folder} is damaged ({error}); run: headwater train search RECIPE") from error
    assert isinstance(trained, Trained)
    return result, trained
