"""From a trigger to a release, by the real pipeline over a small lake on disk."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from contract.errors import ConfigurationError
from headwater.key_folder import make_keys
from headwater.retraining import make_retrainer
from lake.approval import Approver, approve
from lake.errors import StoreUnavailableError
from lake.monitoring.triggers import PATH, SCHEMA, Trigger, TriggerEvent, TriggerKind, TriggerTable
from lake.query import Lake
from lake.releases import Releases
from lake.rollouts import PATH as ROLLOUTS
from lake.rollouts import SCHEMA as ROLLOUTS_SCHEMA
from lake.rollouts import RolloutTable
from lake.tables import ControlTable
from lake.trust.keys import KeyFolder
from tests.integration import trainer_lake
from tests.integration.trainer_lake import START_US, bring_in, bring_in_walkers, open_lake
from trainer import retrain
from trainer.recipe_file import load_recipe
from trainer.retrain import Comparison, Retrainer
from trainer.steps import StepContext

RECIPE = trainer_lake.RECIPE.replace("trials = 3", "trials = 1\ntarget = 0.6")
QUICK = """
[families.logistic_regression]
[report]
html = false
learning_curve = false
"""
POLICY = """
[policy]
approve = true
rollout = true
[[rollout.stages]]
percent = 100
bake_s = 0
"""
DAY_US = 86_400_000_000


class Training:
    """One recipe over one lake, with keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = open_lake(folder / "lake")
        self.keys = KeyFolder(folder / "keys", None)
        self.trust = make_keys(self.keys, self.store)
        self.recipe(RECIPE + QUICK + POLICY)
        self.stop = threading.Event()

    def recipe(self, text: str) -> None:
        (self.folder / "recipe.toml").write_text(text)

    @contextmanager
    def context(self):
        path = self.folder / "recipe.toml"
        work = self.folder / "work" / "walking"
        work.mkdir(parents=True, exist_ok=True)
        recipe = load_recipe(path)
        lake = Lake(self.store)
        try:
            yield StepContext(
                recipe=recipe,
                work=work,
                lake=lake,
                store=self.store,
                seed=recipe.seed,
                recipe_text=path.read_text(),
                keys=self.folder / "keys",
            )
        finally:
            lake.close()

    def retrainer(self, lease_s: float = 60.0) -> Retrainer:
        return make_retrainer("walking", self.context, self.store, lease_s, self.stop)

    def triggers(self, who: str = "gateway") -> TriggerTable:
        table = ControlTable(self.store, PATH, SCHEMA)
        return TriggerTable(lambda: table, who, lambda: time.time_ns() // 1000)

    def ask(self) -> None:
        assert self.triggers().request("walking", 1, TriggerKind.MANUAL, "test", 0.0)

    def trigger(self) -> Trigger:
        return list(self.triggers().look().values())[-1]

    def rollouts(self) -> list[tuple[int, str]]:
        table = ControlTable(self.store, ROLLOUTS, ROLLOUTS_SCHEMA)
        book = RolloutTable(lambda: table).look()
        return [(rollout.spec.version, str(rollout.state)) for rollout in book.rollouts.values()]


@pytest.fixture
def training(tmp_path: Path) -> Training:
    found = Training(tmp_path)
    bring_in_walkers(found.store)
    return found


def test_a_trigger_ends_as_a_release_that_rolls_out_and_an_equal_one_is_not_made_again(training: Training) -> None:
    assert training.retrainer().take() is None
    training.ask()
    outcome = training.retrainer().take()
    assert (outcome.outcome, outcome.version, outcome.comparison) == ("rolling_out", 1, None)
    assert Releases(training.store).look().get("walking").version == 1
    assert training.rollouts() == [(1, "running")]
    assert (training.trigger().event, training.trigger().detail["rollout"]) == (TriggerEvent.DONE, outcome.rollout)
    # Nothing new in the lake: the training gives the same model.
    training.ask()
    assert training.retrainer().take().outcome == "unchanged"
    # New rows of a day later: another model, as good as the first on what both have not seen.
    bring_in_walkers(training.store, rows=1_500, since_us=START_US + DAY_US)
    training.ask()
    outcome = training.retrainer().take()
    assert (outcome.outcome, outcome.version) == ("rolling_out", 2)
    assert outcome.comparison.is_good and outcome.comparison.metric == "f1_macro"
    assert Releases(training.store).look().get("walking", 2).manifest.parent == 1
    assert training.rollouts() == [(1, "aborted"), (2, "running")]


def test_a_candidate_that_is_worse_is_told_and_not_released(training: Training, monkeypatch) -> None:
    training.ask()
    training.retrainer().take()
    bring_in_walkers(training.store, rows=1_500, since_us=START_US + DAY_US)
    worse = Comparison(metric="f1_macro", windows=10, candidate=0.8, current=0.9, tolerance=0.05)
    monkeypatch.setattr(retrain, "compare", lambda *_: worse)
    training.ask()
    outcome = training.retrainer().take()
    assert outcome.outcome == "worse"
    assert "0.8000" in outcome.why and "0.9000" in outcome.why
    assert [release.version for release in Releases(training.store).look().of_model("walking")] == [1]
    assert training.trigger().event is TriggerEvent.DONE
    # Within the tolerance it is good enough.
    monkeypatch.setattr(retrain, "compare", lambda *_: Comparison(**{**vars_of(worse), "tolerance": 0.2}))
    training.ask()
    assert training.retrainer().take().version == 2


def vars_of(comparison: Comparison) -> dict:
    return {name: getattr(comparison, name) for name in comparison.__struct_fields__}


def test_without_a_policy_it_stays_a_draft_until_a_person_approves(training: Training) -> None:
    training.recipe(RECIPE + QUICK)
    training.ask()
    outcome = training.retrainer().take()
    assert outcome.outcome == "released" and "approve" in outcome.why
    assert training.rollouts() == []
    approver = Approver(training.trust, training.keys.read("targets"), training.keys.read("online"), "test")
    assert approve(Releases(training.store), "walking", 1, approver, "test").release.version == 1


def test_data_that_cannot_be_trained_on_ends_the_trigger_with_its_reason(tmp_path: Path) -> None:
    training = Training(tmp_path)
    for number in range(4):
        bring_in(training.store, "motion", f"w-{number}", ts=[START_US], x=[1.0], y=[1.0])
        bring_in(training.store, "doing", f"w-{number}", ts=[START_US], what=["still"])
    training.ask()
    outcome = training.retrainer().take()
    assert outcome.outcome == "failed" and outcome.why
    assert (training.trigger().event, training.trigger().detail["outcome"]) == (TriggerEvent.FAILED, "failed")
    assert Releases(training.store).look().of_model("walking") == []


def test_keys_that_cannot_approve_end_the_trigger_before_anything_is_trained(training: Training) -> None:
    training.keys.file("targets").unlink()
    training.ask()
    outcome = training.retrainer().take()
    assert outcome is not None
    assert outcome.outcome == "failed"
    assert "[policy] approve = true, and the keys in" in outcome.why
    assert not list((training.folder / "work" / "walking").iterdir())
    assert training.trigger().event is TriggerEvent.FAILED


def test_a_trainer_that_lost_its_claim_releases_nothing(training: Training, monkeypatch) -> None:
    training.ask()
    retrainer = training.retrainer(lease_s=1.0)
    run_step = retrain.run_step

    def stolen(context, step):
        ran = run_step(context, step)
        # As after a pause of the whole machine: the claim has run out, and another took it.
        claimed = training.triggers("thief")
        while step.name == "dataset" and claimed.claim("walking", 600) is None:
            time.sleep(0.05)
        return ran

    monkeypatch.setattr(retrain, "run_step", stolen)
    monkeypatch.setattr(retrain, "RENEWALS", 0.2)
    outcome = retrainer.take()
    assert outcome.outcome == "lost"
    assert Releases(training.store).look().of_model("walking") == []
    assert training.trigger().who == "thief"


def test_a_rollout_that_could_not_begin_is_begun_by_the_next_attempt(training: Training, monkeypatch) -> None:
    def unreachable(*_):
        raise StoreUnavailableError("the store did not answer")

    retrainer = training.retrainer()
    started = retrainer._start_rollout
    monkeypatch.setattr(retrainer, "_start_rollout", unreachable)
    training.ask()
    for _ in range(retrain.CLAIMS_MAX + 1):
        with pytest.raises(StoreUnavailableError):
            retrainer.take()
        # Given back at once, and not counted as a training that never came to its end.
        assert (training.trigger().event, training.trigger().claims) == (TriggerEvent.REQUESTED, 0)
    assert Releases(training.store).look().get("walking").version == 1
    assert training.rollouts() == []
    monkeypatch.setattr(retrainer, "_start_rollout", started)
    outcome = retrainer.take()
    assert (outcome.outcome, outcome.version) == ("rolling_out", 1)
    assert training.rollouts() == [(1, "running")]
    assert [release.version for release in Releases(training.store).look().of_model("walking")] == [1]


def test_a_rollout_that_cannot_be_leaves_the_release_approved_and_says_so(training: Training, monkeypatch) -> None:
    def impossible(*_):
        raise ConfigurationError("no such guard; correct it")

    retrainer = training.retrainer()
    monkeypatch.setattr(retrainer, "_start_rollout", impossible)
    training.ask()
    outcome = retrainer.take()
    assert (outcome.outcome, outcome.version) == ("approved", 1)
    assert "its rollout could not be started: no such guard" in outcome.why
    assert training.trigger().event is TriggerEvent.DONE


def test_a_stop_begins_no_further_step_and_gives_the_trigger_back(training: Training, monkeypatch) -> None:
    run_step, ran = retrain.run_step, []

    def stopped_after_the_first(context, step):
        ran.append(step.name)
        training.stop.set()
        return run_step(context, step)

    monkeypatch.setattr(retrain, "run_step", stopped_after_the_first)
    training.ask()
    assert training.retrainer().take() is None
    assert ran == ["dataset"]
    assert (training.trigger().event, training.trigger().claims) == (TriggerEvent.REQUESTED, 0)
    assert training.retrainer().take() is None
    training.stop.clear()
    assert training.triggers("another").claim("walking", 60) is not None


def test_a_training_that_never_ends_is_given_up(training: Training) -> None:
    training.ask()
    for number in range(retrain.CLAIMS_MAX):
        assert training.triggers(f"killed-{number}").claim("walking", 0.001) is not None
        time.sleep(0.01)
    outcome = training.retrainer().take()
    assert outcome.outcome == "given_up"
    assert training.trigger().event is TriggerEvent.FAILED
