"""A release exists whole or not at all, has a number of its own, and is approved only when a device could believe it.

Mutants tried, each made a test here fail: artifacts not looked for before the row; the version taken without
check-and-set; an artifact approved by its size alone; a second release for the same content; an approval left signed
where the release was retired meanwhile.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest

from contract.errors import ConfigurationError, TemporaryError
from contract.models import Artifact, Dataset, Manifest, Probe, target_path
from headwater.release_view import difference, line, parse_release, whole
from lake import rollouts
from lake.approval import Approver, approve, retire
from lake.errors import CorruptLakeError, ObjectMissingError
from lake.lineage import lineage_of, releases_from
from lake.query import Lake
from lake.raw import RawTable
from lake.releases import PATH, Release, ReleaseRefused, Releases, ReleaseState
from lake.rollout_spec import Spec
from lake.rollouts import RolloutTable
from lake.store import Store
from lake.tables import ControlTable
from tests.contract.lake_suite import commit, raw
from tests.trust_world import MODEL, World, manifest

WHO = {"who": "ann", "why": "because"}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def releases(world: World) -> Releases:
    return Releases(world.store, lambda: 1_700_000_000_000_000)


def draft(releases: Releases, seed: int = 1, **changes: Any) -> Manifest:
    """A manifest whose artifacts are in the lake."""
    model, probe, reference = (releases.put_artifact(f"{name} {seed}".encode()) for name in ("model", "probe", "ref"))
    return manifest(
        artifact=model, probe=Probe(artifact=probe, score_tolerance=0.0), reference=reference, seed=seed, **changes
    )


def published(releases: Releases, seed: int = 1, **changes: Any) -> Release:
    return releases.publish(draft(releases, seed, **changes), **WHO)


def approver(world: World, **changes: Any) -> Approver:
    return Approver(world.repository(), world.targets, world.online, "bob")._replace(**changes)


def signed(world: World) -> set[str]:
    return set(world.repository().published().targets.targets)


def test_a_release_is_published_as_a_draft_with_the_next_number(releases: Releases, world: World) -> None:
    first, second = published(releases), published(releases, seed=2)
    assert (first.version, second.version) == (1, 2)
    assert first.state is ReleaseState.DRAFT
    again = Releases(world.store).look().get(MODEL, 2)
    assert again == second
    assert again.manifest.version == 2
    data = world.store.get(f"models/targets/{MODEL}/{second.manifest_sha256}.2.json")
    assert hashlib.sha256(data).hexdigest() == second.manifest_sha256
    assert msgspec.json.decode(data, type=Manifest) == second.manifest
    assert signed(world) == set()


def test_two_trainers_at_once_get_two_versions(world: World) -> None:
    found: list[Release] = []

    def train(seed: int) -> None:
        found.append(published(Releases(world.store), seed))

    trainers = [threading.Thread(target=train, args=(seed,)) for seed in range(6)]
    for trainer in trainers:
        trainer.start()
    for trainer in trainers:
        trainer.join(60)
    assert sorted(release.version for release in found) == [1, 2, 3, 4, 5, 6]
    assert Releases(world.store).look().releases.keys() == {(MODEL, version) for version in range(1, 7)}


def test_releases_that_were_restored_and_went_on_to_the_same_number_are_read_anew(
    releases: Releases, world: World, tmp_path: Path
) -> None:
    """Mutant tried: only the numbers compared."""
    folder = Path(world.store.url.removeprefix("file://")) / PATH
    published(releases)
    shutil.copytree(folder, tmp_path / "copy")
    gone = published(releases, seed=2)
    assert releases.look().get(MODEL, 2) == gone
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)
    other = published(Releases(world.store), seed=3)
    assert other.version == gone.version == 2
    assert releases.look().get(MODEL, 2) == other


def test_the_same_content_is_one_release(releases: Releases, world: World) -> None:
    first = published(releases)
    later = draft(releases, created_at_us=1_800_000_000_000_000, parent=1)
    assert Releases(world.store).publish(later, **WHO).version == first.version
    retire(releases, MODEL, 1, approver(world), "no")
    assert Releases(world.store).publish(later, **WHO).version == 2


class PowerCut(Exception):
    """The process died here."""


@pytest.mark.parametrize("writes", range(6))
def test_a_kill_while_it_is_published_leaves_no_half_release(
    world: World, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    left = [writes]

    def mortal(method: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any, **named: Any) -> Any:
            if not left[0]:
                raise PowerCut
            left[0] -= 1
            return method(*arguments, **named)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put_if_absent", mortal(Store.put_if_absent))
        patch.setattr(Store, "put", mortal(Store.put))
        try:
            published(Releases(world.store))
        except PowerCut:
            pass
    for release in Releases(world.store).look().releases.values():
        assert writes >= 5
        for artifact in release.artifacts:
            Releases(world.store).artifact(artifact.sha256)
    assert published(Releases(world.store)).version == 1
    assert len(Releases(world.store).look().releases) == 1


def test_a_release_whose_artifacts_were_not_put_is_not_published(releases: Releases) -> None:
    with pytest.raises(ObjectMissingError):
        releases.publish(manifest(), **WHO)
    with pytest.raises(CorruptLakeError):
        good = draft(releases)
        wrong = msgspec.structs.replace(good.artifact, size=99)
        releases.publish(msgspec.structs.replace(good, artifact=wrong), **WHO)
    with pytest.raises(ConfigurationError, match="dtypes"):
        releases.publish(draft(releases, dtypes=("float",)), **WHO)
    with pytest.raises(ConfigurationError, match="shorten the recipe"):
        releases.publish(draft(releases, recipe="#" * 300_000), **WHO)
    with pytest.raises(ConfigurationError, match="0 bytes"):
        releases.put_artifact(b"")
    assert releases.look().releases == {}


def test_approving_signs_and_records_who_and_why(releases: Releases, world: World) -> None:
    published(releases)
    decision = approve(releases, MODEL, 1, approver(world), "it is better")
    assert decision.published
    assert decision.release.state is ReleaseState.APPROVED
    last = Releases(world.store).look().get(MODEL).events[-1]
    assert (str(last.event), last.who, last.why) == ("approved", "bob", "it is better")
    assert signed(world) == {target_path(MODEL, 1)}
    assert releases.approved(MODEL) == [1]
    # Again: nothing new.
    version = world.repository().published().targets.version
    approve(releases, MODEL, 1, approver(world), "again")
    assert world.repository().published().targets.version == version
    assert len(releases.look().get(MODEL, 1).events) == 2


def test_a_kill_between_signature_and_row_is_made_good_by_approving_again(
    releases: Releases, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(releases)

    def die(*arguments: Any, **named: Any) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(Releases, "record", die)
        with pytest.raises(PowerCut):
            approve(releases, MODEL, 1, approver(world), "a test")
    assert signed(world) == {target_path(MODEL, 1)}
    assert Releases(world.store).look().get(MODEL, 1).state is ReleaseState.DRAFT
    assert approve(releases, MODEL, 1, approver(world), "a test").release.state is ReleaseState.APPROVED
    assert not world.repository().is_behind()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_a_release_names_has_to_be_there_and_right(releases: Releases, world: World, which: int) -> None:
    release = published(releases)
    artifact = release.artifacts[which]
    path = f"models/artifacts/{artifact.sha256}"
    good = world.store.get(path)
    world.store.put(path, b"x" * len(good))
    with pytest.raises(ReleaseRefused, match="not what its name says"):
        approve(releases, MODEL, 1, approver(world), "a test")
    world.store.delete(path)
    with pytest.raises(ReleaseRefused, match="no such object"):
        approve(releases, MODEL, 1, approver(world), "a test")
    assert signed(world) == set()
    world.store.put(path, good)
    assert approve(releases, MODEL, 1, approver(world), "a test").release.state is ReleaseState.APPROVED


def test_retiring_takes_it_out_of_what_devices_believe(releases: Releases, world: World) -> None:
    published(releases)
    approve(releases, MODEL, 1, approver(world), "a test")
    decision = retire(releases, MODEL, 1, approver(world), "it drifts")
    assert decision.release.state is ReleaseState.RETIRED
    assert signed(world) == set()
    with pytest.raises(ReleaseRefused, match="retired, and cannot become approved"):
        approve(releases, MODEL, 1, approver(world), "a test")
    with pytest.raises(ReleaseRefused, match="no approved release"):
        releases.look().get(MODEL)
    retire(releases, MODEL, 1, approver(world), "again")


def test_what_a_rollout_under_way_brings_or_goes_back_to_is_not_retired(releases: Releases, world: World) -> None:
    """Mutants tried: only `version` is looked at; rollouts that have ended count."""
    for version in (1, 2):
        published(releases, seed=version)
        approve(releases, MODEL, version, approver(world), "a test")
    table = RolloutTable(lambda: ControlTable(world.store, rollouts.PATH, rollouts.SCHEMA))
    order = Spec(model=MODEL, version=2, sha256="2" * 64, previous=1, previous_sha256="1" * 64, stages=())
    detail = msgspec.json.encode(order).decode()
    row = rollouts.RolloutEvent(1, "r", MODEL, "ada", rollouts.EventKind.CREATED, "", detail)
    table.act(lambda book: [row, row._replace(event=rollouts.EventKind.STARTED)])
    for version, use in ((2, "brings it to devices"), (1, "may take devices back to it")):
        with pytest.raises(
            ReleaseRefused, match=f"@{version} cannot be retired: rollout 'r' is running, and {use}; wait"
        ):
            retire(releases, MODEL, version, approver(world), "a test")
        assert releases.look().get(MODEL, version).state is ReleaseState.APPROVED
    assert len(signed(world)) == 2
    table.act(lambda book: [row._replace(event=rollouts.EventKind.ABORTED)])
    assert retire(releases, MODEL, 1, approver(world), "a test").release.state is ReleaseState.RETIRED


def test_a_draft_is_retired_without_a_key(releases: Releases, world: World) -> None:
    published(releases)
    assert retire(releases, MODEL, 1, approver(world, targets=None), "a test").release.state is ReleaseState.RETIRED


def test_who_approves_and_who_retires_at_once_leave_it_retired(
    releases: Releases, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(releases)
    record = Releases.record

    def late(self: Releases, *arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(Releases, "record", record)
        retire(Releases(world.store), MODEL, 1, approver(world, targets=world.targets), "no")
        # The retirement's removal came before the approval's signature.
        data = self.look().get(MODEL, 1).manifest_json.encode()
        world.repository().sign_targets([world.targets], add={target_path(MODEL, 1): data})
        return self.record(*arguments, **named)

    monkeypatch.setattr(Releases, "record", late)
    with pytest.raises(ReleaseRefused, match="retired"):
        approve(releases, MODEL, 1, approver(world), "a test")
    assert signed(world) == set()


def test_keys_are_asked_for_by_name(releases: Releases, world: World) -> None:
    published(releases)
    with pytest.raises(ConfigurationError, match=r"targets\.pem"):
        approve(releases, MODEL, 1, approver(world, targets=None), "a test")
    with pytest.raises(ConfigurationError, match="targets metadata needs"):
        approve(releases, MODEL, 1, approver(world, targets=world.online), "a test")


def test_a_release_counts_as_approved_when_devices_can_see_it(releases: Releases, world: World) -> None:
    published(releases)
    people = approver(world, online=None)
    with pytest.raises(TemporaryError, match="no gateway published it"):
        approve(releases, MODEL, 1, people, "a test", wait_s=0.1)
    assert releases.look().get(MODEL, 1).state is ReleaseState.DRAFT
    gateway = threading.Timer(0.3, lambda: world.repository().publish([world.online]))
    gateway.start()
    assert approve(releases, MODEL, 1, people, "a test", wait_s=20).release.state is ReleaseState.APPROVED
    gateway.join(10)
    assert not retire(releases, MODEL, 1, people, "a test").published


def test_an_artifact_is_given_back_only_as_it_was_put(releases: Releases, world: World) -> None:
    artifact = releases.put_artifact(b"bytes")
    assert artifact == Artifact(sha256=hashlib.sha256(b"bytes").hexdigest(), size=5)
    assert releases.artifact(artifact.sha256) == b"bytes"
    world.store.put(f"models/artifacts/{artifact.sha256}", b"other")
    with pytest.raises(CorruptLakeError):
        releases.artifact(artifact.sha256)
    with pytest.raises(ObjectMissingError):
        releases.artifact("0" * 64)
    with pytest.raises(ObjectMissingError):
        releases.manifest(MODEL, 1)


def test_lineage_leads_from_a_release_to_its_rows_and_back(releases: Releases, world: World) -> None:
    table = RawTable(world.store, "watch")
    versions = []
    for device in ("watch-1", "watch-2"):
        commit(table, raw(device, 1))
        table.refresh()
        versions.append(table.version)
    first, second = versions
    dataset = Dataset(streams={"watch": first}, sha256="b" * 64, windows=10)
    published(releases, 1, dataset=dataset)
    published(releases, 2, dataset=msgspec.structs.replace(dataset, streams={"watch": second, "exercise": 4}), parent=1)
    published(releases, 3, dataset=msgspec.structs.replace(dataset, streams={"other": 1}), parent=2)
    book = releases.look()
    lineage = lineage_of(book, book.get(MODEL, 3))
    assert (lineage.streams, lineage.parents) == ({"other": 1}, (2, 1))
    assert lineage_of(book, book.get(MODEL, 2)).recipe == manifest().recipe
    lake = Lake(world.store)

    def used(stream: str, **narrowed: Any) -> list[int]:
        return [release.version for release in releases_from(book, stream, lake=lake, **narrowed)]

    assert used("watch") == [1, 2]
    assert used("watch", committed=second) == [2]
    assert used("watch", device="watch-2") == [2]
    assert used("watch", device="watch-1") == [1, 2]
    assert used("watch", device="watch-9") == []
    assert used("nothing") == []
    with pytest.raises(ConfigurationError, match="not a name"):
        used("watch", device="x' OR 1=1")
    lake.close()


def test_the_difference_of_two_releases_shows_what_changed(releases: Releases) -> None:
    old = published(releases, 1)
    new = published(
        releases,
        2,
        recipe='name = "gestures"\nseed = 2\n',
        family="forest",
        features=("ax_mean", "ay_std"),
        packages={"python": "3.12", "onnx": "1.19"},
    )
    found = difference(old.manifest, new.manifest)
    assert found["version"] == [1, 2]
    assert found["changed"] == {"family": ["zscore", "forest"], "seed": [1, 2]}
    assert found["features"] == {"added": ["ay_std"], "removed": ["ay_mean"]}
    assert found["packages"] == {"python": ["3.11", "3.12"], "onnx": [None, "1.19"]}
    assert found["metrics"] == {"f1 (test)": [0.9, 0.9]}
    assert "-seed = 1" in found["recipe"] and "+seed = 2" in found["recipe"]
    book = releases.look()
    answer = whole(new, lineage_of(book, new), signed=False)
    assert answer["signed"] is False and answer["manifest"]["seed"] == 2
    assert line(new)["state"] == "draft"
    assert parse_release("gestures@3") == ("gestures", 3)
    assert parse_release("gestures") == ("gestures", None)
    with pytest.raises(ConfigurationError, match="MODEL@VERSION"):
        parse_release("gestures@0")


def test_rows_of_a_newer_headwater_are_stepped_over(releases: Releases, world: World) -> None:
    published(releases)
    releases.look()
    row = releases._table.read().to_pylist()[0]
    strange = [row | {"event": "blessed", "sequence": 2}, row | {"manifest": "{}", "version": 7, "sequence": 3}]
    releases._table.append(pa.Table.from_pylist(strange, schema=releases._table.schema), expected=1)
    assert list(Releases(world.store).look().releases) == [(MODEL, 1)]
