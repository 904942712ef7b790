"""A rollout's specification as people write it: completed from the registry, or refused with what to write instead.

Mutant tried, found here: a draft release started.
"""

from __future__ import annotations

import pytest

from contract.errors import ConfigurationError
from gateway.rollouts.actions import Action, Person, act, create
from gateway.rollouts.ordering import specified
from lake.releases import ReleaseRefused, Releases
from lake.rollouts import EventKind, RolloutEvent, RolloutRefused, fold
from lake.store import Store, StoreSettings
from tests.integration.release_parts import release, retire
from tests.rollout_devices import MODEL, manifest_of, numbered

ADA = Person("ada", "a test", 1_000)


@pytest.fixture
def store(tmp_path):
    return Store(StoreSettings(url=f"file://{tmp_path}/lake", fsync=False))


def test_a_specification_is_completed_from_the_registry_and_the_defaults(store):
    made = [release(store, manifest_of(MODEL), bytes([number])) for number in range(3)]
    release(store, manifest_of(MODEL), b"draft", approved=False)
    releases = Releases(store)
    found = specified({"model": MODEL}, releases.look(), "")
    assert (found.version, found.sha256) == (3, made[2].artifact.sha256)
    assert [stage.percent for stage in found.stages] == [10, 50, 100]
    raw = {
        "model": MODEL,
        "version": 2,
        "previous": 1,
        "target": ["tag:north", "device:pi-9", "tag:south"],
        "stage": {"bake_s": 7, "guard": {"error_share_max": 0.1}},
        "stages": ["tag:canary", {"percent": 50, "bake_s": 9}, "100%"],
    }
    found = specified(raw, releases.look(), "")
    assert (found.previous, found.previous_sha256) == (1, made[0].artifact.sha256)
    assert (found.target.tags, found.target.devices) == (("north", "south"), ("pi-9",))
    assert [stage.bake_s for stage in found.stages] == [7, 9, 7]
    assert found.stages[0].tags == ("canary",)
    assert found.stages[2].guard.error_share_max == 0.1


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"version": 4}, RolloutRefused, "release wear@4 is draft, .*; approve it first"),
        ({"version": 1}, RolloutRefused, "release wear@1 is retired"),
        ({"version": 9}, ReleaseRefused, "there is no release wear@9"),
        ({"previous": 1}, RolloutRefused, "wear@1 is retired"),
        ({"model": "other"}, ReleaseRefused, "there is no release other@3"),
        ({"model": 3}, ConfigurationError, "model, version or previous"),
        ({"sha256": "0" * 64}, ConfigurationError, "file: sha256 is looked up"),
        ({"stages": "10%"}, ConfigurationError, "stages is no list"),
        ({"stages": ["x%"]}, ConfigurationError, "'x%' is no percentage"),
        ({"stages": ["half"]}, ConfigurationError, "'half' names no devices"),
        ({"stages": ["101%"]}, ConfigurationError, "percent"),
        ({"target": ["pi-1"]}, ConfigurationError, "'pi-1' names no devices; write 10%, tag:NAME or device:NAME"),
        ({"speed": 1}, ConfigurationError, "file: speed = 1 is an unknown key"),
    ],
)
def test_a_specification_that_cannot_be_says_what_to_write_instead(store, changes, error, told):
    retired = release(store, manifest_of(MODEL), b"1")
    for content in (b"2", b"3"):
        release(store, manifest_of(MODEL), content)
    release(store, manifest_of(MODEL), b"4", approved=False)
    retire(store, retired)
    with pytest.raises(error, match=told):
        specified({"model": MODEL, "version": 3} | changes, Releases(store).look(), "file: ")


def test_a_rollback_to_a_release_that_was_retired_is_refused_in_words(store):
    made = [release(store, manifest_of(MODEL), bytes([number])) for number in range(2)]
    releases = Releases(store)
    order = specified({"model": MODEL, "version": 2, "previous": 1}, releases.look(), "")
    began = RolloutEvent(1, "r", MODEL, "gateway", EventKind.STAGE_STARTED, "")
    book = fold([*numbered(create("r", order, ADA)(fold([])), 0), *numbered([began], 1)], 2)
    draft = fold(numbered(create("r", order, ADA, draft=True)(fold([])), 0), 1)
    allowed = act(Action.ROLLBACK, "r", ADA, releases=releases.look())(book)
    assert [event.event for event in allowed] == [EventKind.ABORTED, EventKind.ROLLED_BACK]
    retire(store, made[0])
    now = releases.look()
    for action, rollouts, options in (
        (Action.ROLLBACK, book, {}),
        (Action.ABORT, book, {"rollback": True}),
        (Action.START, draft, {}),
    ):
        with pytest.raises(RolloutRefused, match=r"wear@1, which is retired, .*; start a rollout of one that is"):
            act(action, "r", ADA, releases=now, **options)(rollouts)
    assert [event.event for event in act(Action.ABORT, "r", ADA, releases=now)(book)] == [EventKind.ABORTED]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"stages": [{"percent": 10, "committed_share_min": 7.0}]}, r"\[stages\[0\]\] committed_share_min = 7\.0: "),
        (
            {"stages": ["10%", {"percent": 50, "guard": {"bogus": 1}}]},
            r"bogus = 1 is an unknown key; .*latency_ms_p99_max",
        ),
    ],
)
def test_a_mistake_in_a_stage_is_named_with_its_value(store, raw, said):
    release(store, manifest_of(MODEL), b"one")
    with pytest.raises(ConfigurationError, match=said):
        specified({"model": MODEL, **raw}, Releases(store).look(), "")
