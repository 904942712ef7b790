"""What several people and gateways write at once, and die over, stays one repository that devices can follow.

Readers are python-tuf's client over HTTP against a plain file server.

Mutants tried, each made a test here fail: the timestamp put instead of replaced; targets numbered from what is
published instead of from the newest; an older file under a newer number believed; the root changed before both online
keys had signed; keys that were taken back believed beyond what is published; no anchor demanded of who approves; after
a theft, targets kept by their names; numbers that go on from those of a thief.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from contract.errors import ConfigurationError, TemporaryError
from contract.models import Artifact, target_path
from gateway.models_http import _METADATA
from lake.errors import CorruptLakeError, ObjectMissingError
from lake.store import Store
from lake.trust import rotation
from lake.trust.files import NotInitialisedError, read_state
from lake.trust.keys import KeyFolder, generate_key
from lake.trust.metadata import Expiries, dated, signed, snapshot_of, timestamp_of, with_targets
from lake.trust.repository import AFTER_FAR, FAR, TrustRepository
from tests.integration.servers import StoreServer
from tests.integration.test_lake_s3 import s3_settings
from tests.trust_world import MODEL, US, Device, World, manifest, static_host

DAY_S = 86_400.0


class PowerCut(Exception):
    """The process died here."""


class DyingStore:
    """A store whose user dies at its n-th write.

    Args:
        store: the real one.
        writes: that many writes succeed.
        done: whether the last one still reached the store.
    """

    def __init__(self, store: Store, writes: int, *, done: bool = False) -> None:
        self._store, self._left, self._done = store, writes, done

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        return self._mortal(method) if name in ("put", "put_if_absent", "replace") else method

    def _mortal(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any) -> Any:
            if method.__name__ == "put_if_absent" and self._is_there(arguments[0]):
                return False
            if not self._left:
                if self._done:
                    method(*arguments)
                raise PowerCut
            self._left -= 1
            return method(*arguments)

        return write

    def _is_there(self, path: str) -> bool:
        try:
            return self._store.size(path) >= 0
        except ObjectMissingError:
            return False


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.approve()
    return world


@pytest.fixture
def url(world: World) -> Iterator[str]:
    with static_host(world.folder / "lake" / "models") as url:
        yield url


def until_it_lives(
    world: World, act: Callable[[TrustRepository], object], check: Callable[[], object], *, done: bool
) -> int:
    """Let the actor die at its first write, then at its second…, and look after each death; answers how many."""
    for writes in range(100):
        try:
            act(world.repository(DyingStore(world.store, writes, done=done)))
        except PowerCut:
            check()
            continue
        check()
        return writes
    raise AssertionError("it never came to an end")


@pytest.mark.parametrize("done", [False, True])
def test_a_kill_between_any_two_writes_leaves_readers_a_whole_repository(world: World, url: str, *, done: bool) -> None:
    old = Device(world, url)
    versions = iter(range(2, 100))

    def approve(repository: TrustRepository) -> None:
        version = next(versions)
        data = msgspec.json.encode(manifest(version))
        path = target_path(MODEL, version)
        repository.put_target(path, data)
        repository.sign_targets([world.targets], add={path: data})
        repository.publish([world.online])

    names = iter(range(100))

    def check() -> None:
        assert old.fetch(1) == manifest(1)
        assert Device(world, url, f"new-{next(names)}").fetch(1) == manifest(1)

    deaths = until_it_lives(world, approve, check, done=done)
    assert deaths >= 3
    # What was signed before a death is not lost, and is published with the next.
    assert old.fetch(deaths + 1).version == deaths + 1


@pytest.mark.parametrize("done", [False, True])
def test_a_kill_while_it_is_made_is_made_good_by_making_it_again(tmp_path: Path, *, done: bool) -> None:
    world = World(tmp_path)
    for writes in range(100):
        store = Store(msgspec.structs.replace(world.store.settings, url=f"file://{tmp_path}/other-{writes}"))
        for attempt in (DyingStore(store, writes, done=done), store):
            repository = world.repository(attempt, anchored=False)
            try:
                repository.initialise([world.root], world.targets, world.online)
            except PowerCut:
                continue
        published = world.repository(store, anchored=False).published()
        assert published.root.version == published.timestamp.version == 1
        if writes > 6:
            break


@pytest.mark.parametrize("role", ["online", "targets", "root"])
@pytest.mark.parametrize("done", [False, True])
def test_a_kill_while_keys_change_leaves_readers_valid_signatures(
    world: World, url: str, role: str, *, done: bool
) -> None:
    old = Device(world, url)
    new = generate_key()

    def rotate(repository: TrustRepository) -> None:
        if role == "online":
            rotation.rotate_online(repository, [world.root], world.online, new)
        elif role == "targets":
            rotation.rotate_targets(repository, [world.root], world.targets, new, world.online, None)
        else:
            rotation.rotate_root(repository, [world.root], world.root, new)

    names = iter(range(100))

    def check() -> None:
        assert old.fetch() == manifest()
        assert Device(world, url, f"new-{next(names)}").fetch() == manifest()

    assert until_it_lives(world, rotate, check, done=done) >= 1
    setattr(world, role, new)
    assert world.repository().published().root.version == 2
    world.approve(2)
    assert old.fetch(2).version == 2
    rotation.renew_root(world.repository(), [world.root])
    assert old.fetch(2).version == 2
    assert world.repository().published().root.version == 3


def test_people_who_approve_at_once_all_have_their_release_in_it(world: World, url: str) -> None:
    people = [threading.Thread(target=world.approve, args=(version,)) for version in range(2, 10)]
    for person in people:
        person.start()
    for person in people:
        person.join(60)
    device = Device(world, url)
    assert [device.fetch(version).version for version in range(1, 10)] == list(range(1, 10))
    published = world.repository().published()
    assert published.targets.version == 10
    assert not published.behind


def test_of_two_signers_none_takes_back_what_the_other_published(world: World, url: str) -> None:
    """A gateway that was frozen between its look and its write."""
    device = Device(world, url)
    gateway = world.repository(FrozenStore(world.store, lambda: (world.approve(2), device.fetch(2))))
    gateway.publish([world.online], force=True)
    assert device.fetch(2).version == 2
    assert world.repository().published().timestamp.version == 4


class FrozenStore:
    """Something happens between the first look at the timestamp and what follows."""

    def __init__(self, store: Store, meanwhile: Callable[[], object]) -> None:
        self._store, self._meanwhile = store, [meanwhile]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get_tagged(self, path: str) -> Any:
        found = self._store.get_tagged(path)
        if self._meanwhile:
            self._meanwhile.pop()()
        return found


def test_every_number_has_one_content_and_numbers_only_rise(world: World) -> None:
    seen: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(json.loads(world.store.get("models/metadata/timestamp.json"))["signed"]["version"])

    def sign() -> None:
        for _ in range(5):
            world.repository().publish([world.online], force=True)

    watcher = threading.Thread(target=watch)
    watcher.start()
    signers = [threading.Thread(target=sign) for _ in range(4)]
    for signer in signers:
        signer.start()
    for signer in signers:
        signer.join(60)
    stop.set()
    watcher.join(10)
    assert seen == sorted(seen)
    assert world.repository().published().timestamp.version == 2 + 20


def test_signatures_are_renewed_at_half_of_their_time_and_not_before(world: World) -> None:
    repository = world.repository()
    assert not repository.publish([world.online])
    world.at += 3.4 * DAY_S
    assert not repository.publish([world.online])
    world.at += 0.2 * DAY_S
    before = repository.published()
    assert repository.publish([world.online])
    after = repository.published()
    assert (after.timestamp.version, after.snapshot.version) == (before.timestamp.version + 1, before.snapshot.version)
    world.at += 12 * DAY_S
    assert repository.publish([world.online])
    assert repository.published().snapshot.version == before.snapshot.version + 1
    left = repository.published().left_s(int(world.at * US))
    assert left["timestamp"] == pytest.approx(7 * DAY_S, abs=2)
    assert left["snapshot"] == pytest.approx(30 * DAY_S, abs=2)


def test_expiries_are_settings(world: World) -> None:
    expiries = Expiries(timestamp_days=1, snapshot_days=2)
    repository = TrustRepository(world.store, expiries=expiries, now_us=lambda: int(world.at * US))
    repository.publish([world.online], force=True)
    assert repository.published().left_s(int(world.at * US))["timestamp"] == pytest.approx(DAY_S, abs=2)


def test_without_the_online_key_an_approval_waits_for_a_gateway(world: World, url: str) -> None:
    data = msgspec.json.encode(manifest(2))
    people = world.repository()
    people.put_target(f"{MODEL}/2.json", data)
    people.sign_targets([world.targets], add={f"{MODEL}/2.json": data})
    assert people.is_behind()
    gateway = world.repository(anchored=False)
    assert gateway.publish([world.online])
    assert not people.is_behind()
    assert Device(world, url).fetch(2).version == 2


def test_who_approves_needs_the_trust_anchor_and_signs_no_strangers_repository(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"root\.json"):
        world.repository(anchored=False).sign_targets([world.targets], add={"x/1.json": b"x"})
    # Who can write to the bucket puts a repository there that names our targets key beside his own.
    thief = generate_key()
    for info in list(world.store.objects("models/metadata")):
        world.store.delete(info.path)
    forged = TrustRepository(world.store, now_us=lambda: int(world.at * US))
    forged.initialise([thief], thief, thief)
    with pytest.raises((CorruptLakeError, ConfigurationError)):
        world.repository().sign_targets([world.targets], add={"x/1.json": b"x"})


def test_a_key_that_was_taken_back_adds_nothing(world: World, url: str) -> None:
    stolen, world.targets = world.targets, generate_key()
    rotation.rotate_targets(world.repository(), [world.root], None, world.targets, world.online, approved(1))
    published = world.repository().published()
    forged = world.repository().put_target(f"{MODEL}/9.json", msgspec.json.encode(manifest(9)))
    number = published.targets.version + 1
    content = with_targets(published.targets, number, {forged.path: forged}, ())
    world.store.put(
        f"models/metadata/{number}.targets.json", signed(dated(content, int(world.at * US), 30), [stolen]).data
    )
    assert not world.repository().publish([world.online])
    world.approve(2)
    assert set(world.repository().published().targets.targets) == {f"{MODEL}/1.json", f"{MODEL}/2.json"}
    assert Device(world, url).fetch(2).version == 2
    with pytest.raises(ConfigurationError, match="keys rotate"):
        world.repository().sign_targets([stolen], add={"x/1.json": b"x"})


def test_an_older_file_under_a_newer_number_takes_nothing_back(world: World) -> None:
    old = world.store.get("models/metadata/2.targets.json")
    world.approve(2)
    world.store.put("models/metadata/4.targets.json", old)
    world.approve(3)
    assert len(world.repository().published().targets.targets) == 3


def approved(*versions: int) -> dict[str, str]:
    """What people approved: target → SHA-256."""
    data = {version: msgspec.json.encode(manifest(version)) for version in versions}
    return {f"{MODEL}/{version}.json": hashlib.sha256(data[version]).hexdigest() for version in versions}


def test_after_a_theft_only_what_people_approved_stays(world: World) -> None:
    world.approve(2)
    world.approve(3)
    # The thief has other bytes signed under a name that people approved: `release list` does not show it.
    world.approve(3, msgspec.json.encode(manifest(3, artifact=Artifact(sha256="f" * 64, size=3))))
    new = generate_key()
    rotation.rotate_targets(world.repository(), [world.root], None, new, world.online, approved(2, 3))
    assert set(world.repository().published().targets.targets) == {f"{MODEL}/2.json"}
    assert world.repository().is_signed(f"{MODEL}/2.json", approved(2)[f"{MODEL}/2.json"])
    assert not world.repository().is_signed(f"{MODEL}/2.json", "f" * 64)
    assert not world.repository().is_signed(f"{MODEL}/3.json")


@pytest.mark.parametrize("far", [FAR - 1, FAR, 10**12])
def test_a_thief_who_counted_far_is_forgotten_with_the_online_key(world: World, url: str, far: int) -> None:
    """TUF specification, 5.3.11: what the thief signed last must not be the last that devices can fetch."""
    device = Device(world, url)
    state, now_us = read_state(world.store, world.keys.anchor()), int(world.at * US)
    snapshot = signed(dated(snapshot_of(state.targets, far), now_us, 30), [world.online])
    stamp = signed(dated(timestamp_of(snapshot, far), now_us, 7), [world.online])
    world.store.put(f"models/metadata/{far}.snapshot.json", snapshot.data)
    world.store.put("models/metadata/timestamp.json", stamp.data)
    assert device.fetch() == manifest(), "it believes the stolen key, and has seen its numbers"
    new = generate_key()
    rotation.rotate_online(world.repository(), [world.root], None, new)
    world.online = new
    world.approve(2)
    published = world.repository().published()
    first = FAR if far < FAR else AFTER_FAR
    assert (published.snapshot.version, published.timestamp.version) == (first + 1, first + 1)
    assert _METADATA.fullmatch(f"metadata/{published.snapshot.version}.snapshot.json"), "gateways serve it"
    assert device.fetch(2) == manifest(2)


def test_a_targets_key_changes_only_after_a_gateway_published_both_signatures(world: World, url: str) -> None:
    new = generate_key()

    def rotate() -> None:
        rotation.rotate_targets(world.repository(), [world.root], world.targets, new, None, None)

    with pytest.raises(TemporaryError, match="gateway"):
        rotate()
    assert world.repository().published().root.version == 1
    assert Device(world, url, "during").fetch() == manifest()
    world.repository().publish([world.online])
    with pytest.raises(TemporaryError):
        rotate()  # it signed once more, to be sure that both keys did
    world.repository().publish([world.online])


def test_a_gateway_with_a_key_that_was_rotated_away_signs_nothing(world: World, url: str) -> None:
    old, new = world.online, generate_key()
    rotation.rotate_online(world.repository(), [world.root], old, new)
    with pytest.raises(ConfigurationError, match="keys rotate"):
        world.repository().publish([old], force=True)
    assert Device(world, url).fetch() == manifest()


def test_several_root_keys_have_to_sign_where_the_threshold_says_so(tmp_path: Path) -> None:
    world = World(tmp_path)
    store = Store(msgspec.structs.replace(world.store.settings, url=f"file://{tmp_path}/other"))
    roots = [generate_key() for _ in range(3)]
    repository = TrustRepository(store)
    anchor = repository.initialise(roots, world.targets, world.online, threshold=2)
    repository = TrustRepository(store, anchor=anchor)
    new = generate_key()
    with pytest.raises(ConfigurationError, match="needs 2 of the keys"):
        rotation.rotate_online(repository, roots[:1], None, new)
    rotation.rotate_online(repository, roots[1:], None, new)
    assert repository.published().root.version == 2
    with pytest.raises(ConfigurationError, match="threshold 4"):
        repository.initialise(roots, world.targets, world.online, threshold=4)


def test_a_lake_has_one_repository(world: World) -> None:
    stranger = generate_key()
    with pytest.raises(ConfigurationError, match="other keys"):
        world.repository().initialise([stranger], stranger, stranger)
    assert world.repository().initialise([world.root], world.targets, world.online) == world.keys.anchor()


def test_a_lake_without_one_says_how_to_make_it(tmp_path: Path, world: World) -> None:
    empty = Store(msgspec.structs.replace(world.store.settings, url=f"file://{tmp_path}/empty"))
    with pytest.raises(NotInitialisedError, match="keys init"):
        TrustRepository(empty).published()


def test_metadata_of_nobody_is_corruption(world: World) -> None:
    text = world.store.get("models/metadata/timestamp.json").replace(b'"version":2', b'"version":3')
    world.store.put("models/metadata/timestamp.json", text)
    with pytest.raises(CorruptLakeError, match="restore"):
        world.repository().published()


def test_an_object_store_keeps_the_same_promises(tmp_path: Path, object_store: StoreServer) -> None:
    world = World(tmp_path, s3_settings(object_store))
    people = [threading.Thread(target=world.approve, args=(version,)) for version in range(1, 4)]
    for person in people:
        person.start()
    for person in people:
        person.join(60)
    assert len(world.repository().published().targets.targets) == 3
    assert not world.repository().is_behind()


def test_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    folder = KeyFolder(tmp_path / "keys", b"secret")
    key = folder.make("targets")
    file = folder.file("targets")
    assert file.stat().st_mode & 0o777 == 0o600
    assert b"ENCRYPTED" in file.read_bytes()
    assert folder.make("targets").public_key == key.public_key
    with pytest.raises(ConfigurationError, match="HEADWATER_KEY_PASSPHRASE"):
        KeyFolder(folder.path).read("targets")
    with pytest.raises(ConfigurationError, match="wrong passphrase"):
        KeyFolder(folder.path, b"other").read("targets")
    # Gateways start unattended.
    online = folder.make("online")
    assert b"ENCRYPTED" not in folder.file("online").read_bytes()
    assert online.public_key == KeyFolder(folder.path).read("online").public_key
    file.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        folder.read("targets")
    with pytest.raises(ConfigurationError, match="keys init"):
        folder.read("root")
