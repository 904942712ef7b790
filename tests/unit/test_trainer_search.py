"""The search: families compared, budget and target kept, nothing lost by a kill, every failure said with its remedy.

Mutants tried, each seen to fail here: the journal not read, or its torn line not cut; folds that are not checked for
classes; features ranked by the windows that judge.
"""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
import structlog
from sklearn.metrics import get_scorer_names

from contract.errors import ConfigurationError
from tests.window_sets import drawn_recipe, drawn_windows
from trainer import families, search, trials, windowset
from trainer.candidates import Candidate, find_scorer, judge
from trainer.errors import DataError, RecipeError, TrainingError
from trainer.families import FAMILIES, Family, spaces_of
from trainer.faults import inject, spread
from trainer.material import Material, class_indices, make_material
from trainer.recipe import Features, Range, Search
from trainer.selection import rank
from trainer.split import Fold, Split, split_windows
from trainer.trials import JOURNAL_FILE, journal_for

QUICK = {"logistic_regression": {"C": Range(low=0.01, high=10.0, log=True)}, "extra_trees": {"n_estimators": 10}}


def recipe_with(**changed):
    given = {"families": QUICK, "search": Search(metric="f1_macro", trials=5)}
    return drawn_recipe(**{**given, **changed})


def prepared(recipe, dataset=None):
    dataset = dataset or drawn_windows()
    split = split_windows(dataset, recipe, 1)
    return make_material(dataset, recipe, split, 1), split


def test_the_best_of_all_families_is_found_beside_the_best_as_it_comes() -> None:
    recipe = recipe_with()
    material, split = prepared(recipe)
    result, trained = search.search(material, split, recipe, 1)
    assert [trial.tuned for trial in result.trials] == [False, False, True, True, True]
    assert {trial.candidate.family for trial in result.trials[:2]} == set(QUICK)
    scores = [trial.score for trial in result.trials if trial.score is not None]
    assert result.best.score == max(scores) > 0.9
    assert result.baseline.score == max(scores[:2])
    assert result.stopped == "trials"
    assert result.features == tuple(material.names[column] for column in trained.columns)


def test_what_falls_behind_the_median_is_given_up_after_its_first_folds() -> None:
    hopeless = Range(low=1e-9, high=1e-6, log=True)
    families = {"extra_trees": {"n_estimators": 10}, "logistic_regression": {"C": hopeless}}
    recipe = recipe_with(families=families, search=Search(metric="neg_log_loss", trials=14, class_weights=False))
    material, split = prepared(recipe)
    result, _ = search.search(material, split, recipe, 1)
    pruned = [trial for trial in result.trials if trial.state == "pruned"]
    assert pruned
    assert all(trial.tuned and trial.score is None and len(trial.folds) < len(split.folds) for trial in pruned)
    assert all(len(trial.folds) == len(split.folds) for trial in result.trials if trial.state == "scored")
    assert result.best.candidate.family == "extra_trees" or not result.best.tuned


def test_the_same_seed_finds_the_same_model() -> None:
    recipe = recipe_with()
    material, split = prepared(recipe)
    first, second = (search.search(material, split, recipe, 7) for _ in range(2))
    assert first[0] == second[0]
    assert (first[1].scores(material.features) == second[1].scores(material.features)).all()


def test_the_search_stops_at_the_target() -> None:
    recipe = recipe_with(search=Search(metric="f1_macro", trials=50, target=0.6))
    material, split = prepared(recipe)
    result, _ = search.search(material, split, recipe, 1)
    assert (result.stopped, len(result.trials)) == ("target", 1)


def test_the_search_stops_when_the_seconds_are_spent_but_not_without_a_model() -> None:
    recipe = recipe_with(search=Search(metric="f1_macro", trials=50, seconds=1.0, trial_seconds=1_000.0))
    material, split = prepared(recipe)
    ticks = count()
    result, _ = search.search(material, split, recipe, 1, clock=lambda: 10.0 * next(ticks))
    assert (result.stopped, len(result.trials)) == ("seconds", 1)


def test_a_search_that_was_killed_goes_on_where_it_stood(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_with(search=Search(metric="f1_macro", trials=6))
    material, split = prepared(recipe)
    journal = tmp_path / "journal"
    whole, calls = search.train, count()

    def killed(*arguments):
        if next(calls) == 13:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(search, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        search.search(material, split, recipe, 1, journal=journal)
    fitted = count()
    monkeypatch.setattr(search, "train", lambda *arguments: (next(fitted), whole(*arguments))[1])
    result, _ = search.search(material, split, recipe, 1, journal=journal)
    assert len(result.trials) == 6
    assert next(fitted) <= 2 * 3 + 1  # two trials of three folds, and the final fit; four had ended before


def test_a_journal_of_other_inputs_is_not_continued(tmp_path) -> None:
    dataset, recipe = drawn_windows(), recipe_with()
    first = journal_for(tmp_path, dataset, recipe, 1)
    first.write_text("{}")
    assert journal_for(tmp_path, dataset, recipe, 1) == first
    assert first.exists()
    other = journal_for(tmp_path, dataset, recipe, 2)
    assert other != first
    assert list(tmp_path.glob(f"{JOURNAL_FILE}.*")) == []


def test_a_search_goes_on_after_a_kill_in_the_middle_of_a_line(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_with(search=Search(metric="f1_macro", trials=4))
    material, split = prepared(recipe)
    journal = tmp_path / "journal"
    search.search(material, split, recipe, 1, journal=journal)
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    lock, backend = tmp_path / "journal.lock", trials.JournalFileBackend
    lock.symlink_to(journal)

    def free_at_once(path: str) -> Any:
        assert not lock.is_symlink(), "Optuna would wait for it"
        return backend(path)

    monkeypatch.setattr(trials, "JournalFileBackend", free_at_once)
    fitted, whole = count(), search.train
    monkeypatch.setattr(search, "train", lambda *arguments: (next(fitted), whole(*arguments))[1])
    result, _ = search.search(material, split, recipe, 1, journal=journal)
    assert len(result.trials) == 4
    assert next(fitted) == 1  # the final fit: no trial was lost
    json.loads(journal.read_bytes().splitlines()[-1])


@pytest.mark.parametrize("damage", ["middle", "meaning"])
def test_a_damaged_journal_is_dropped_and_said(damage: str, tmp_path) -> None:
    recipe = recipe_with(search=Search(metric="f1_macro", trials=3))
    material, split = prepared(recipe)
    journal = tmp_path / "journal"
    first, _ = search.search(material, split, recipe, 1, journal=journal)
    content = journal.read_bytes()
    if damage == "middle":
        journal.write_bytes(content[:200] + bytes(40) + content[240:])
    else:
        journal.write_bytes(content.replace(b'"candidate"', b'"kandidate"'))
    with structlog.testing.capture_logs() as logs:
        again, _ = search.search(material, split, recipe, 1, journal=journal)
    assert again == first
    assert [line["event"] for line in logs] == ["search_journal_dropped"]


def test_a_search_is_not_continued_by_other_code_or_other_packages(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, recipe = drawn_windows(), recipe_with()
    found = [journal_for(tmp_path, dataset, recipe, 1)]
    monkeypatch.setattr(trials, "source_sha256", lambda: "0" * 64)
    found.append(journal_for(tmp_path, dataset, recipe, 1))
    monkeypatch.setattr(trials, "packages", lambda: {"scikit-learn": "0"})
    found.append(journal_for(tmp_path, dataset, recipe, 1))
    assert len(set(found)) == 3


def test_a_trial_that_fails_says_why_and_the_others_go_on() -> None:
    bad = {"logistic_regression": {"C": -1.0}, "extra_trees": {"n_estimators": 10}}
    recipe = recipe_with(families=bad, search=Search(metric="f1_macro", trials=6))
    material, split = prepared(recipe)
    result, _ = search.search(material, split, recipe, 1)
    failed = [trial for trial in result.trials if trial.state == "failed"]
    tuned = [trial for trial in result.trials if trial.tuned]
    assert [trial.state for trial in tuned] == [
        "failed" if trial.candidate.family == "logistic_regression" else "scored" for trial in tuned
    ]
    assert {trial.candidate.family for trial in tuned} == set(bad)
    # It may win as it comes, with the library's own C.
    assert result.best.candidate.params.get("C") is None
    assert result.best.score == max(trial.score for trial in result.trials if trial.score is not None)
    for trial in failed:
        assert "'C' parameter" in trial.error
        assert trial.score is None


@pytest.mark.parametrize(("family", "params"), [("lightgbm", {"num_leaves": 1}), ("xgboost", {"max_depth": -5})])
def test_what_a_boosting_library_refuses_is_a_failed_trial(family: str, params: dict) -> None:
    pytest.importorskip(family, reason=f"{family} is not installed (headwater[boosting])")
    recipe = recipe_with(families={family: {"n_estimators": 4, **params}}, search=Search(metric="f1_macro", trials=2))
    material, split = prepared(recipe)
    result, _ = search.search(material, split, recipe, 1)
    assert [trial.state for trial in result.trials] == ["scored", "failed"]
    assert result.trials[1].error.startswith(f"{family} cannot be fitted")
    assert next(iter(params)) in result.trials[1].error


def test_when_every_trial_fails_the_error_says_why() -> None:
    recipe = recipe_with(families={"logistic_regression": {"max_iter": 1}}, search=Search(metric="f1_macro", trials=2))
    material, split = prepared(recipe)
    # The family as it comes would do: only what the recipe asks for is tried then.
    stubborn = replace(FAMILIES["logistic_regression"], build=lambda params, seed: build_stubborn(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", {**FAMILIES, "logistic_regression": stubborn})
        patch.setattr("trainer.candidates.FAMILIES", {**FAMILIES, "logistic_regression": stubborn})
        with pytest.raises(TrainingError, match=r"none of 2 trials gave a model: logistic_regression did not converge"):
            search.search(material, split, recipe, 1)


def build_stubborn(seed: int):
    return FAMILIES["logistic_regression"].build({"max_iter": 1, "C": 1e4}, seed)


def test_labels_of_one_class_are_refused() -> None:
    dataset = drawn_windows()
    alone = replace(
        dataset,
        labels=np.full(len(dataset), "calm"),
        meta=type(dataset.meta)(
            fields=dataset.fields, dtypes=dataset.meta.dtypes, classes=("calm",), sample_rate_hz=1.0, streams={}
        ),
    )
    with pytest.raises(DataError, match=r"1 class\(es\) \(calm\), and a classification needs two"):
        class_indices(alone)


def test_a_fold_without_a_class_is_refused_by_name() -> None:
    recipe = recipe_with()
    material, split = prepared(recipe)
    wild = np.flatnonzero(material.labels == 1)
    calm = np.setdiff1d(split.train, wild)
    lame = split._replace(folds=[Fold(calm, np.intersect1d(split.train, wild))])
    with pytest.raises(DataError, match="fold 1 of the cross-validation has no window of wild"):
        search.search(material, lame, recipe, 1)


@pytest.mark.parametrize(
    ("task", "metric", "said"),
    [
        ("classification", "f1_makro", "'f1_makro' is no scorer of scikit-learn"),
        ("anomaly", "neg_log_loss", "'neg_log_loss' cannot be computed"),
    ],
)
def test_a_metric_that_does_not_exist_or_fit_is_refused(task: str, metric: str, said: str) -> None:
    only = {"robust_z_score": {}} if task == "anomaly" else QUICK
    recipe = recipe_with(task=task, families=only, search=Search(metric=metric, trials=2))
    material, split = prepared(recipe)
    with pytest.raises((RecipeError, TrainingError), match=said):
        search.search(material, split, recipe, 1)


def test_scorers_of_regression_are_refused_and_all_of_classes_are_found() -> None:
    """Over class numbers they would depend on the order of the names."""
    of_numbers = {"r2", "explained_variance", "d2_absolute_error_score"}
    of_numbers |= {name for name in get_scorer_names() if name.endswith(("_error", "_deviance"))}
    assert len(of_numbers) > 10
    refused = set()
    for name in get_scorer_names():
        try:
            find_scorer(name)
        except RecipeError:
            refused.add(name)
    assert refused == of_numbers


def test_a_metric_that_is_not_a_number_is_an_error() -> None:
    recipe = recipe_with()
    material, split = prepared(recipe)
    trained = search.fit_candidate(material, split.train, recipe, 1, Candidate(family="extra_trees"))
    with pytest.raises(TrainingError, match="is nan for extra_trees"):
        judge(material, trained, split.test, lambda *_: float("nan"), "f1_macro")


@pytest.mark.parametrize(
    "metric", ["accuracy", "balanced_accuracy", "f1", "roc_auc", "neg_log_loss", "matthews_corrcoef"]
)
def test_any_scorer_of_scikit_learn_will_do(metric: str) -> None:
    recipe = recipe_with(search=Search(metric=metric, trials=2))
    material, split = prepared(recipe)
    result, _ = search.search(material, split, recipe, 1)
    assert result.metric == metric
    assert np.isfinite(result.best.score)


def test_a_trial_that_takes_too_long_is_given_up() -> None:
    recipe = recipe_with(search=Search(metric="f1_macro", trials=2, trial_seconds=0.5))
    material, split = prepared(recipe)
    ticks = count()
    with pytest.raises(TrainingError, match=r"took .* s for one fold, more than \[search\] trial_seconds = 0.5"):
        search.search(material, split, recipe, 1, clock=lambda: float(next(ticks)))


def test_families_of_another_task_or_not_installed_are_refused_before_training(monkeypatch) -> None:
    with pytest.raises(RecipeError, match="isolation_forest"):
        spaces_of("classification", {"isolation_forest": {}})
    with pytest.raises(RecipeError, match="cannot be built with"):
        spaces_of("classification", {"extra_trees": {"number_of_trees": 3}})
    real = families.import_module

    def without(name: str):
        if name == "lightgbm":
            raise ImportError("No module named 'lightgbm'")
        return real(name)

    monkeypatch.setattr(families, "import_module", without)
    with pytest.raises(ConfigurationError, match=r"pip install 'headwater\[boosting\]'"):
        spaces_of("classification", {"lightgbm": {}})
    assert "lightgbm" not in spaces_of("classification", {})


def test_every_family_has_a_space_that_it_can_be_built_from() -> None:
    for task in ("classification", "anomaly"):
        named = {family.name: {} for family in FAMILIES.values() if family.task == task and not family.extra}
        assert spaces_of(task, named) == {name: dict(FAMILIES[name].space) for name in named}
        assert all(isinstance(FAMILIES[name], Family) and FAMILIES[name].space for name in named)


def test_detectors_are_compared_without_a_label() -> None:
    recipe = recipe_with(
        task="anomaly",
        families={"robust_z_score": {}, "isolation_forest": {"n_estimators": 20}},
        search=Search(metric="roc_auc", trials=4, contamination=0.05),
    )
    material, split = prepared(recipe)
    assert material.labels is None
    result, trained = search.search(material, split, recipe, 1)
    assert 0.6 < result.best.score < 1.0
    above = trained.scores(material.features[split.train]) > np.float32(trained.threshold)
    assert 0 < above.mean() <= 0.05


def test_faults_change_every_window_but_not_the_good_ones() -> None:
    windows = drawn_windows().windows
    before = windows.copy()
    found = inject(windows, spread(windows), 5)
    assert (windows == before).all()
    assert (found != windows).any(axis=(1, 2)).all()
    assert (inject(windows, spread(windows), 5) == found).all()


def test_the_spread_of_pieces_is_that_of_the_whole_and_holds_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = drawn_windows(count=6_000, rows=32, channels=4)
    windows = dataset.windows
    windows[:, :, 1] += 1e4  # far from zero: sums of squares alone would lose the digits
    windows[::7, 3, 0] = np.nan
    windows[5, 3, 0] = np.inf
    windows[:, :, 2] = 3.0
    windows[:, :, 3] = np.nan
    values = np.where(np.isfinite(windows), windows, np.nan).reshape(-1, 4).astype(np.float64)
    wanted = [*np.nanstd(values[:, :2], axis=0), 1.0, 1.0]
    rows = np.arange(len(dataset))
    assert spread(windows) == pytest.approx(wanted, rel=1e-12)
    monkeypatch.setattr(windowset, "CHUNK_BYTES", 100_000)
    tracemalloc.start()
    try:
        assert spread(dataset.pieces(rows)) == pytest.approx(wanted, rel=1e-12)
        assert tracemalloc.get_traced_memory()[1] < windows.nbytes / 2
    finally:
        tracemalloc.stop()


def test_selection_leaves_out_what_is_constant_or_a_copy_and_puts_the_best_first() -> None:
    random = np.random.default_rng(1)
    features = random.normal(size=(400, 6)).astype(np.float32)
    features[:, 1] = 3.0
    features[:, 4] = features[:, 0] * 2 + 1e-4
    labels = (features[:, 3] > 0).astype(np.int64)
    assert rank(features, labels, "none", 1).tolist() == [0, 1, 2, 3, 4, 5]
    assert rank(features, labels, "variance", 1).tolist() == [0, 2, 3, 5]
    chosen = rank(features, labels, "importance", 1)
    assert chosen[0] == 3
    assert sorted(chosen.tolist()) == [0, 2, 3, 5]
    assert sorted(rank(features, None, "importance", 1).tolist()) == [0, 2, 3, 5]
    assert rank(np.ones((5, 2), np.float32), None, "variance", 1).tolist() == [0]


def test_without_labels_the_first_features_are_of_all_channels() -> None:
    """Three channels of four features that say nearly the same of their channel: a share must not take the first two
    channels and forget the third."""
    random = np.random.default_rng(3)
    channels = random.normal(size=(500, 3))
    features = (np.repeat(channels, 4, axis=1) + 0.2 * random.normal(size=(500, 12))).astype(np.float32)
    order = rank(features, None, "importance", 1)
    assert sorted(order.tolist()) == list(range(12))
    assert sorted(column // 4 for column in order[:3]) == [0, 1, 2]
    assert [column // 4 for column in rank(features, None, "variance", 1)[:3]] == [0, 0, 0]
    assert (rank(features, None, "importance", 2) == order).all()


def test_selection_never_sees_the_windows_that_judge() -> None:
    recipe = recipe_with(features=Features(select="importance", count_max=3))
    material, split = prepared(recipe)
    result, _ = search.search(material, split, recipe, 1)
    assert len(result.features) <= 3
    spoiled = Material(material.spec, material.features.copy(), material.labels.copy(), material.classes)
    spoiled.features[split.test] = 0.0
    spoiled.labels[split.test] = 0
    assert search.search(spoiled, split, recipe, 1)[0] == result


def test_an_empty_dataset_is_refused() -> None:
    dataset = drawn_windows()
    empty = replace(dataset, windows=dataset.windows[:0])
    nothing = np.zeros(0, np.int64)
    with pytest.raises(DataError, match="no windows"):
        make_material(empty, recipe_with(), Split(nothing, nothing, [], ""), 1)
