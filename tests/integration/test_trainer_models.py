"""Models of real recordings: what they are worth before people, and before a time, that they have not seen.

The watch: one fifth of the wearers judge, whom neither the search nor the selection of features has seen. The machine:
the last quarter of the series judges; its labels are used for nothing but counting.

Mutant tried, seen to fail here: labels shuffled before training (accuracy 0.2).
"""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from contract.errors import ConfigurationError
from tests.window_sets import drawn_recipe, drawn_windows, machine_windows, watch_recipe, watch_windows
from trainer import evaluate, export, report, search, tracking, trials
from trainer.errors import StepNotReadyError
from trainer.pipeline import EVALUATE
from trainer.recipe import Report, Search, SplitRule
from trainer.recipe_file import load_recipe
from trainer.split import save_split, split_windows
from trainer.steps import StepContext

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS, STRIDE = 256, 128


class Folders(StepContext):
    """A context whose steps have no records: each step's folder is simply there."""

    def folder(self, step: str) -> Path:
        if not (self.work / step).is_dir():
            raise StepNotReadyError(step)
        return self.work / step

    def outputs(self, step: str) -> dict:
        return json.loads((self.work / step / "outputs.json").read_text())

    def record(self, step: str):
        return SimpleNamespace(outputs=self.outputs(step), run=f"run of {step}", code="1+g0")


def run(tmp_path: Path, dataset, recipe) -> dict[str, dict]:
    """The three steps, one after the other, over the folders that real steps have."""
    for name in ("dataset", "checks"):
        (tmp_path / name).mkdir()
        finding = {"check": "order", "verdict": "warn", "detail": "ts goes back 1 times", "remedy": "a clock was set"}
        (tmp_path / name / "outputs.json").write_text(json.dumps({"windows": len(dataset), "findings": [finding]}))
    dataset.save(tmp_path / "dataset")
    save_split(split_windows(dataset, recipe, 1), tmp_path / "checks")
    found = {}
    for name, step in (("search", search.step), ("evaluate", evaluate.step), ("export", export.step)):
        (tmp_path / name).mkdir()
        context = Folders(
            recipe=recipe, work=tmp_path, lake=None, store=None, seed=1, into=tmp_path / name, recipe_text="<recipe>"
        )
        found[name] = json.loads(json.dumps(step(context)))
        (tmp_path / name / "outputs.json").write_text(json.dumps(found[name]))
    return found


def value(metrics: list[dict], name: str) -> float:
    return next(metric["value"] for metric in metrics if metric["name"] == name)


@pytest.mark.timeout(300)
def test_exercises_of_people_never_seen_are_told_apart(tmp_path: Path) -> None:
    dataset = watch_windows(ROWS, STRIDE)
    recipe = watch_recipe(
        ROWS,
        STRIDE,
        families={
            "extra_trees": {"n_estimators": 80, "max_features": ["sqrt", 0.2]},
            "logistic_regression": {"C": 0.03},
        },
        split=SplitRule(by="group", group="s..", folds=3),
        search=Search(metric="f1_macro", trials=4),
        report=Report(html=True, learning_curve=True),
    )
    found = run(tmp_path, dataset, recipe)
    metrics = found["evaluate"]["metrics"]
    baseline = {one["name"]: one for one in found["evaluate"]["baselines"]}
    print(metrics, baseline)
    assert value(metrics, "accuracy") >= 0.85
    assert value(metrics, "f1_macro") >= 0.85
    assert baseline["most frequent class"]["accuracy"] < 0.4
    assert any(name.endswith("as it comes") for name in baseline)
    assert found["export"]["parity"]["score_difference_max"] == 0.0
    assert found["export"]["classes"] == ["ABD", "ER", "FEL", "IR", "PEN", "ROW", "TRAP"]
    assert {path.name for path in (tmp_path / "export").iterdir()} - {"outputs.json"} == {
        *("model.onnx", "probe.arrow", "reference.json")
    }
    assert len(list(tmp_path.glob(f"{trials.JOURNAL_FILE}.*"))) == 1  # until the search is published
    figures = json.loads((tmp_path / "evaluate" / "evaluation.json").read_text())
    judged = {device["device"].split("-")[1] for device in figures["devices"]}
    learned = set(dataset.groups.tolist()) - judged
    assert judged
    assert len(learned) >= 7
    assert [point["groups"] for point in figures["curve"]][-1] == len(learned)
    assert np.sum(figures["classification"]["confusion"]) == figures["test_windows"]
    check_page(tmp_path / "evaluate" / "report.html", svgs=8)


def check_page(path: Path, svgs: int) -> None:
    """One page that is whole and asks nobody for anything."""
    page = path.read_text()
    assert page.count("<svg") == svgs
    assert "&lt;recipe&gt;" in page
    assert "ts goes back 1 times a clock was set" in page
    parser = References()
    parser.feed(page)
    assert not parser.outside
    assert len(page) < 3_000_000


class References(HTMLParser):
    """What a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag in ("script", "link", "img", "iframe"):
            self.outside.append(tag)
        self.outside += [text for name, text in attributes if name in ("src", "href") and text.startswith("http")]


@pytest.mark.timeout(300)
def test_failures_of_a_machine_are_found_with_fewer_false_alarms_than_a_rolling_z_score(tmp_path: Path) -> None:
    """By the recipe of the example, with a shorter search."""
    asked = load_recipe(EXAMPLES / "machine-temperature" / "recipe.toml")
    dataset = machine_windows(asked.window.rows, asked.window.stride)
    recipe = msgspec.structs.replace(asked, search=msgspec.structs.replace(asked.search, trials=6))
    found = run(tmp_path, dataset, recipe)
    judged, unseen, everything = (found["evaluate"][name] for name in ("alarms", "alarms_unseen", "alarms_all"))
    figures = json.loads((tmp_path / "evaluate" / "evaluation.json").read_text())
    rolling = next(one for one in figures["baselines"] if one["name"] == "rolling z-score")
    print(found["search"]["family"], judged, unseen, everything, rolling, sep="\n")
    assert (judged["labelled"], judged["found"]) == (1, 1)
    # The first of the four lies in what every fold learned from.
    assert (unseen["labelled"], unseen["found"], rolling["alarms_unseen"]["found"]) == (3, 3, 2)
    assert unseen["false_alarms"] <= 2 < rolling["alarms_unseen"]["false_alarms"]
    low, high = judged["false_alarms_per_month_95"]
    assert low < judged["false_alarms_per_month"] < high
    assert [point["groups"] for point in figures["curve"]] == [1] * 4
    assert [point["windows"] for point in figures["curve"]] == [346, 692, 1038, 1384]
    by_name = {one["name"]: one["split"] for one in found["evaluate"]["metrics"]}
    assert by_name["average_precision"].endswith("against the same with faults put in")
    assert by_name["labelled_average_precision"] == figures["split"]
    assert (everything["labelled"], rolling["alarms_all"]["labelled"]) == (4, 4)
    assert everything["found"] >= rolling["alarms_all"]["found"]
    assert everything["false_alarms_per_month"] < rolling["alarms_all"]["false_alarms_per_month"]
    assert judged["roc_auc"] > 0.9 > rolling["alarms"]["roc_auc"]
    assert found["export"]["classes"] == []
    assert found["export"]["threshold"] == found["search"]["threshold"]
    check_page(tmp_path / "evaluate" / "report.html", svgs=7)


def test_the_report_shows_the_devices_that_have_something_to_show() -> None:
    devices = np.array(["a", "b", "c", "d", "e"] * 4)
    labelled, flagged = devices == "d", np.isin(devices, ["b", "e"])
    flagged[1] = False
    assert report._telling(devices, labelled, flagged) == ["d", "e", "b"]


MLFLOW = {tracking.URI_VARIABLE: "http://mlflow:5000"}
TAGS = {tracking.RUN_TAG: "ab" * 16, "headwater.code": "c" * 9_000}


def told_of() -> trials.SearchResult:
    candidate = search.Candidate(family="extra_trees", params={"n_estimators": 10})
    trial = trials.TrialResult(candidate=candidate, state="scored", tuned=True, score=0.9)
    return trials.SearchResult(metric="f1_macro", best=trial, baseline=None, stopped="trials", trials=[trial])


def test_runs_go_to_mlflow_only_where_its_uri_is_set_and_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, metrics = watch_recipe(16, 16), [{"name": "accuracy", "value": 0.9, "split": "test"}]
    result = told_of()
    assert tracking.log_run(recipe, result, metrics, [], TAGS, {}) is None
    tracking.check_installed({})

    def missing(name: str):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(tracking, "import_module", missing)
    for refused in (
        lambda: tracking.check_installed(MLFLOW),
        lambda: tracking.log_run(recipe, result, metrics, [], TAGS, MLFLOW),
    ):
        with pytest.raises(tracking.ConfigurationError, match="pip install mlflow-skinny"):
            refused()
    server = FakeMlflow()
    monkeypatch.setattr(tracking, "import_module", lambda name: server)
    assert tracking.log_run(recipe, result, metrics, [Path("report.html")], TAGS, MLFLOW) == "run-1"
    assert server.experiments == ["watch-activity"]
    assert server.runs["run-1"].data == {
        "family": "extra_trees",
        "share": 1.0,
        "seed": 1,
        "n_estimators": 10,
        "accuracy": 0.9,
        "cross_validated_f1_macro": 0.9,
        "files": ["report.html"],
    }
    assert {len(text) for text in server.runs["run-1"].tags.values()} == {32, tracking.TAG_CHARACTERS_MAX}


@pytest.mark.parametrize(
    ("status", "error"), [(503, tracking.TemporaryError), (429, tracking.TemporaryError), (400, ConfigurationError)]
)
def test_a_run_is_told_once_and_what_a_kill_or_an_absent_server_left_is_made_whole(
    status: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, metrics = watch_recipe(16, 16), [{"name": "accuracy", "value": 0.9, "split": "test"}]
    server = FakeMlflow()
    monkeypatch.setattr(tracking, "import_module", lambda name: server)
    server.broken = status
    with pytest.raises(error, match="mlflow:5000"):
        tracking.log_run(recipe, told_of(), metrics, [], TAGS, MLFLOW)
    assert [run.info.status for run in server.runs.values()] == ["RUNNING"]
    server.broken = 0
    for _ in range(3):
        assert tracking.log_run(recipe, told_of(), metrics, [], TAGS, MLFLOW) == "run-1"
    assert [run.info.status for run in server.runs.values()] == ["FINISHED"]
    assert server.ended == 1
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "View run\n")  # stdout is for JSON alone


def test_an_evaluation_goes_to_mlflow_after_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeMlflow()
    monkeypatch.setattr(tracking, "import_module", lambda name: server)
    monkeypatch.setenv(tracking.URI_VARIABLE, "http://mlflow:5000")
    recipe = drawn_recipe(
        families={"extra_trees": {"n_estimators": 5}},
        search=Search(metric="f1_macro", trials=1),
        report=Report(html=False, learning_curve=False),
    )
    run(tmp_path, drawn_windows(), recipe)
    assert server.runs == {}
    assert EVALUATE.after == "trainer.evaluate:tell"
    evaluate.tell(Folders(recipe=recipe, work=tmp_path, lake=None, store=None, seed=1))
    (told,) = server.runs.values()
    assert told.data["files"] == [str(tmp_path / "evaluate" / "evaluation.json")]
    assert told.tags[tracking.RUN_TAG] == "run of evaluate"
    assert told.tags["headwater.streams"] == "watch@3"
    assert told.tags["headwater.split"].startswith("test: device in (")


class FakeMlflow:
    """The functions of MLflow that are called; `tests/integration/test_mlflow.py` has the real one."""

    class MlflowException(Exception):
        """Its own."""

        def __init__(self, status: int) -> None:
            super().__init__(f"status {status}")
            self._status = status

        def get_http_status_code(self) -> int:
            return self._status

    def __init__(self) -> None:
        self.experiments: list[str] = []
        self.runs: dict[str, SimpleNamespace] = {}
        self.broken = self.ended = 0
        """Status that metrics are answered with."""

    def MlflowClient(self, uri: str):  # noqa: N802 (MLflow's name)
        return self

    def get_experiment_by_name(self, name: str):
        return SimpleNamespace(experiment_id=name) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        self.experiments.append(name)
        return name

    def search_runs(self, experiments: list[str], filter_string: str):
        found = filter_string.split("'")[1]
        return [run for run in self.runs.values() if run.tags[tracking.RUN_TAG] == found]

    def create_run(self, experiment: str, tags: dict, run_name: str):
        name = f"run-{len(self.runs) + 1}"
        info = SimpleNamespace(run_id=name, status="RUNNING")
        self.runs[name] = SimpleNamespace(info=info, tags=tags, data={"files": []})
        return self.runs[name]

    def log_param(self, run: str, name: str, value: object) -> None:
        self.runs[run].data[name] = value

    def log_metric(self, run: str, name: str, value: float) -> None:
        if self.broken:
            raise self.MlflowException(self.broken)
        self.runs[run].data[name] = value

    def log_artifact(self, run: str, path: str) -> None:
        self.runs[run].data["files"].append(path)

    def set_terminated(self, run: str) -> None:
        self.ended += 1
        self.runs[run].info.status = "FINISHED"
        print("View run")
