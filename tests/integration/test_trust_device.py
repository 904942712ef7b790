"""A device follows what is signed and nothing else, served by a plain file server over the lake's folder.

Mutants tried, each made a test here fail: the payload type not compared; any key of the root accepted for orders; the
device's name not compared; a repeated order taken for a replay; sequences of keys that were taken back still counted;
no second look at the order after the refresh; `not_after` not compared; expired metadata rejected by a clock that is
not synchronised; no lower bound for the clock; the time handed in not used; the manifest's name not compared with the
target's, or its hash with the order's; a page of a captive portal taken for a wrong signature; no deadline for a
download as a whole.
"""

from __future__ import annotations

import base64
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from securesystemslib.dsse import Envelope

from contract.errors import ConfigurationError
from contract.models import ASSIGNMENT_TYPE
from edge_agent.models.orders import Distrusted, NotYetTrusted, TrustReason
from edge_agent.models.trust import open_assignment
from lake.trust import rotation
from lake.trust.keys import generate_key
from lake.trust.metadata import dated, signed, snapshot_of, timestamp_of, with_targets
from tests.trust_world import DEVICE, MODEL, Device, World, manifest, static_host

DAY_S = 86_400.0


class Site:
    """The file server, whose behaviour a test may change."""

    def __init__(self) -> None:
        self.answer = lambda request: False


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.approve()
    return world


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.fixture
def device(world: World, site: Site) -> Iterator[Device]:
    with static_host(world.folder / "lake" / "models", lambda request: site.answer(request)) as url:
        yield Device(world, url)


def refused(device: Device, envelope: object) -> tuple[TrustReason, str]:
    with pytest.raises(Distrusted) as caught:
        device.follow(envelope)
    return caught.value.reason, str(caught.value)


def waits(device: Device, envelope: object) -> tuple[TrustReason, str]:
    with pytest.raises(NotYetTrusted) as caught:
        device.follow(envelope)
    return caught.value.reason, str(caught.value)


def test_a_static_host_of_the_lake_is_enough_to_follow_an_order(world: World, device: Device) -> None:
    order, found = device.follow(world.order(sequence=4))
    assert found == manifest()
    assert order.assignment.rollout == "r1"
    assert (order.seen.sequence, order.seen.key) == (4, world.online.public_key.keyid)


def test_an_order_to_run_none_of_a_model_needs_no_manifest(world: World, device: Device) -> None:
    order, found = device.follow(world.order(version=0))
    assert (order.assignment.version, found) == (0, None)


def test_an_order_is_opened_without_a_network_where_its_key_is_known(world: World, device: Device) -> None:
    device.fetch()
    place = msgspec.structs.replace(device.place, url="http://127.0.0.1:1/")
    order = open_assignment(world.order(), place, device=DEVICE, seen={}, now=world.now, synchronised=True)
    assert order.assignment.model == MODEL


def test_a_wrong_signature_is_refused(world: World, device: Device) -> None:
    assert refused(device, world.order(key=generate_key()))[0] is TrustReason.BAD_SIGNATURE
    # Keys of the same root that may sign other things.
    assert refused(device, world.order(key=world.targets))[0] is TrustReason.BAD_SIGNATURE
    assert refused(device, world.order(key=world.root))[0] is TrustReason.BAD_SIGNATURE
    changed = copy.deepcopy(world.order())
    payload = json.loads(base64.b64decode(changed["payload"])) | {"version": 2}
    changed["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    assert refused(device, changed)[0] is TrustReason.BAD_SIGNATURE
    # Another key's signature under the right key's name.
    borrowed = world.order(key=generate_key())
    borrowed["signatures"][0]["keyid"] = world.online.public_key.keyid
    assert refused(device, borrowed)[0] is TrustReason.BAD_SIGNATURE


def test_another_document_of_the_same_key_is_no_order(world: World, device: Device) -> None:
    payload = base64.b64decode(world.order()["payload"])
    envelope = Envelope(payload, "application/json", {})
    envelope.sign(world.online)
    reason, message = refused(device, envelope.to_dict())
    assert reason is TrustReason.BAD_ORDER
    assert ASSIGNMENT_TYPE in message
    relabelled = envelope.to_dict() | {"payloadType": ASSIGNMENT_TYPE}
    assert refused(device, relabelled)[0] is TrustReason.BAD_SIGNATURE


@pytest.mark.parametrize(
    "envelope",
    [
        {},
        {"payload": 1, "payloadType": ASSIGNMENT_TYPE, "signatures": []},
        {"payload": "AA==", "payloadType": ASSIGNMENT_TYPE, "signatures": []},
        {"payload": "AA==", "payloadType": ASSIGNMENT_TYPE, "signatures": [{"keyid": "a", "sig": "b"}] * 9},
        {"payload": "?", "payloadType": ASSIGNMENT_TYPE, "signatures": [{"keyid": "a", "sig": "AA=="}]},
        {"payload": "A" * 1_000_000, "payloadType": ASSIGNMENT_TYPE, "signatures": [{"keyid": "a", "sig": "AA=="}]},
    ],
)
def test_what_is_no_envelope_is_refused(device: Device, envelope: dict[str, object]) -> None:
    assert refused(device, envelope)[0] is TrustReason.BAD_ORDER


def test_a_signed_document_that_is_no_assignment_is_refused(world: World, device: Device) -> None:
    envelope = Envelope(b'{"device": "watch-1"}', ASSIGNMENT_TYPE, {})
    envelope.sign(world.online)
    assert refused(device, envelope.to_dict())[0] is TrustReason.BAD_ORDER
    assert "protocol version 9" in refused(device, world.order(v=9))[1]


def test_an_order_for_another_device_is_refused(world: World, device: Device) -> None:
    reason, message = refused(device, world.order(device="watch-2"))
    assert reason is TrustReason.WRONG_DEVICE
    assert "watch-2" in message and DEVICE in message


def test_a_replayed_order_is_refused_and_the_latest_one_once_more_is_no_news(world: World, device: Device) -> None:
    old, new = world.order(sequence=4), world.order(sequence=9, version=0)
    device.follow(old)
    device.follow(new)
    assert refused(device, old)[0] is TrustReason.REPLAYED
    assert refused(device, new)[0] is TrustReason.REPEATED
    # Going back is a new order that names the old release.
    assert device.follow(world.order(sequence=10))[0].assignment.version == 1


def test_an_order_is_not_begun_after_its_time(world: World, device: Device) -> None:
    late = world.order(not_after_us=int((world.at - 60) * 1e6))
    assert refused(device, late)[0] is TrustReason.ORDER_EXPIRED
    order = world.order()
    device.fetch()
    device.ahead_s, device.synchronised = 2 * 3_600.0, False
    assert waits(device, order)[0] is TrustReason.CLOCK


def test_metadata_that_expired_is_refused_by_a_clock_that_is_right(world: World, device: Device) -> None:
    world.at += 8 * DAY_S
    reason, message = refused(device, world.order())
    assert reason is TrustReason.EXPIRED_METADATA
    assert "timestamp" in message
    world.repository().publish([world.online])
    assert device.follow(world.order())[1] == manifest()


def test_a_clock_years_ahead_waits_and_rejects_nothing(world: World, device: Device) -> None:
    order = world.order(not_after_us=int((world.at + 3_000 * DAY_S) * 1e6))
    device.ahead_s, device.synchronised = 2_000 * DAY_S, False
    reason, message = waits(device, order)
    assert reason is TrustReason.CLOCK
    assert "time server" in message
    device.ahead_s, device.synchronised = 0.0, True
    assert device.follow(order)[1] == manifest()


@pytest.mark.parametrize("synchronised", [True, False])
def test_a_clock_years_behind_waits_whatever_it_says_of_itself(
    world: World, device: Device, *, synchronised: bool
) -> None:
    device.ahead_s, device.synchronised = -20_000 * DAY_S, synchronised
    assert waits(device, world.order())[0] is TrustReason.CLOCK
    device.ahead_s = -3_600.0
    assert device.follow(world.order())[1] == manifest()


def test_a_clock_set_back_cannot_make_old_metadata_fresh(world: World, device: Device) -> None:
    old = world.store.get("models/metadata/timestamp.json")
    world.at += 30 * DAY_S
    world.repository().publish([world.online])
    device.fetch()
    world.store.put("models/metadata/timestamp.json", old)
    device.ahead_s = -30 * DAY_S
    assert waits(device, world.order())[0] is TrustReason.CLOCK


def test_other_bytes_than_the_signed_ones_are_refused(world: World, device: Device) -> None:
    folder = world.folder / "lake" / "models" / "targets" / MODEL
    [file] = folder.iterdir()
    good = file.read_bytes()
    file.write_bytes(good.replace(b"gestures", b"gesturez"))
    assert refused(device, world.order())[0] is TrustReason.BAD_HASH
    file.write_bytes(good + b" " * 100)
    assert refused(device, world.order())[0] is TrustReason.BAD_HASH
    file.write_bytes(good)
    assert refused(device, world.order(sha256="c" * 64))[0] is TrustReason.BAD_HASH
    assert device.follow(world.order())[1] == manifest()


def test_older_metadata_than_was_seen_is_refused(world: World, device: Device) -> None:
    old = world.store.get("models/metadata/timestamp.json")
    world.approve(2)
    assert device.fetch(2).version == 2
    world.store.put("models/metadata/timestamp.json", old)
    assert refused(device, world.order())[0] is TrustReason.ROLLBACK


def test_drafts_and_retired_releases_are_refused(world: World, device: Device) -> None:
    draft = msgspec.json.encode(manifest(2))
    world.repository().put_target(f"{MODEL}/2.json", draft)
    reason, message = refused(device, world.order(version=2))
    assert reason is TrustReason.UNAPPROVED
    assert f"{MODEL}@2" in message
    device.follow(world.order(sequence=2))
    world.repository().sign_targets([world.targets], remove=[f"{MODEL}/1.json"])
    world.repository().publish([world.online])
    assert refused(device, world.order(sequence=3))[0] is TrustReason.UNAPPROVED


def test_a_signed_manifest_that_cannot_be_used_is_refused(world: World, device: Device) -> None:
    world.approve(2, b"{}")
    world.approve(3, msgspec.json.encode(manifest(3, model="another")))
    world.approve(4, msgspec.json.encode(manifest(4, fields=("ax",))))
    world.approve(5, msgspec.json.encode(manifest(5, v=2)))
    world.approve(6, b" " * 300_000)
    for version, said in ((2, "missing"), (3, "another"), (4, "dtypes"), (5, "protocol version 2"), (6, "300000")):
        reason, message = refused(device, world.order(sequence=version, version=version))
        assert reason is TrustReason.BAD_MANIFEST
        assert said in message


def test_a_host_that_does_not_answer_is_waited_for(world: World, device: Device, site: Site) -> None:
    def cut(request) -> bool:
        request.send_response(200)
        request.send_header("Content-Length", "5000")
        request.end_headers()
        request.wfile.write(b"half")
        return True

    def portal(request) -> bool:
        page = b"<html>Please log in</html>"
        request.send_response(200)
        request.send_header("Content-Length", str(len(page)))
        request.end_headers()
        request.wfile.write(page)
        return True

    def endless(request) -> bool:
        request.send_response(200)
        request.end_headers()
        try:
            for _ in range(10_000):
                request.wfile.write(b"x" * 65_536)
        except OSError:
            pass  # the device has seen enough
        return True

    def error(request) -> bool:
        request.send_error(500)
        return True

    def nothing(request) -> bool:
        request.send_error(404)
        return True

    for answer in (cut, portal, endless, error, nothing):
        site.answer = answer
        reason, message = waits(device, world.order())
        assert reason is TrustReason.UNAVAILABLE, answer
        assert "[models] url" in message
    site.answer = lambda request: False
    away = msgspec.structs.replace(device.place, url="http://127.0.0.1:1/")
    device.place, here = away, device.place
    assert waits(device, world.order())[0] is TrustReason.UNAVAILABLE
    device.place = here
    assert device.follow(world.order())[1] == manifest()


def test_a_host_that_drips_is_given_up(world: World, device: Device, site: Site) -> None:
    def drip(request) -> bool:
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        try:
            for _ in range(60):
                request.wfile.write(b"x")
                request.wfile.flush()
                time.sleep(0.1)
        except OSError:
            pass  # the device has gone
        return True

    site.answer = drip
    began_s = time.monotonic()
    assert waits(device, world.order())[0] is TrustReason.UNAVAILABLE
    assert time.monotonic() - began_s < 5


def test_a_manifest_that_was_cut_off_is_asked_for_again(world: World, device: Device, site: Site) -> None:
    def cut(request) -> bool:
        if "/targets/" not in request.path:
            return False
        request.send_response(200)
        request.send_header("Content-Length", "5000")
        request.end_headers()
        request.wfile.write(b"half")
        return True

    site.answer = cut
    assert waits(device, world.order())[0] is TrustReason.UNAVAILABLE
    site.answer = lambda request: False
    assert device.follow(world.order())[1] == manifest()


@pytest.mark.parametrize("version", [0, 1])
def test_a_key_that_was_taken_back_is_useless_at_once(world: World, device: Device, version: int) -> None:
    device.follow(world.order(sequence=4))
    stolen, world.online = world.online, generate_key()
    rotation.rotate_online(world.repository(), [world.root], None, world.online)
    # The device has not heard of it: the old key's order opens, and the refresh shows that it must not.
    assert refused(device, world.order(sequence=5, key=stolen, version=version))[0] is TrustReason.BAD_SIGNATURE
    assert device.follow(world.order(sequence=6))[1] == manifest()


def test_a_thief_with_an_enormous_sequence_is_forgotten_with_the_key(world: World, device: Device) -> None:
    device.follow(world.order(sequence=2**62))
    assert refused(device, world.order(sequence=5))[0] is TrustReason.REPLAYED
    world.online = generate_key()
    rotation.rotate_online(world.repository(), [world.root], None, world.online)
    assert device.follow(world.order(sequence=5))[0].seen.sequence == 5


def test_who_stole_the_online_key_cannot_ship_a_draft(world: World, device: Device) -> None:
    device.fetch()
    forged = msgspec.json.encode(manifest(2, family="malware"))
    target = world.repository().put_target(f"{MODEL}/2.json", forged)
    published = world.repository().published()
    now_us = int(world.at * 1e6)
    content = with_targets(published.targets, 50, {target.path: target}, ())
    targets = signed(dated(content, now_us, 30), [world.online])
    snapshot = signed(dated(snapshot_of(targets, 50), now_us, 30), [world.online])
    stamp = signed(dated(timestamp_of(snapshot, 50), now_us, 30), [world.online])
    for name, document in (("50.targets", targets), ("50.snapshot", snapshot), ("timestamp", stamp)):
        world.store.put(f"models/metadata/{name}.json", document.data)
    assert refused(device, world.order(version=2))[0] is TrustReason.BAD_SIGNATURE


def test_a_device_whose_memory_is_damaged_starts_again_from_its_anchor(world: World, device: Device) -> None:
    rotation.rotate_root(world.repository(), [world.root], world.root, generate_key())
    device.follow(world.order(sequence=1))
    for file in device.metadata.rglob("*.json"):
        file.write_bytes(b"")
    assert device.follow(world.order(sequence=2))[1] == manifest()


def test_an_anchor_that_is_none_is_a_wrong_setting(world: World, device: Device) -> None:
    Path(device.place.root).write_bytes(b"{}")
    with pytest.raises(ConfigurationError, match="keys init"):
        device.follow(world.order())
    Path(device.place.root).unlink()
    with pytest.raises(ConfigurationError, match="cannot be read"):
        device.follow(world.order())


def test_a_device_of_another_fleet_believes_nothing(tmp_path: Path, device: Device) -> None:
    other = World(tmp_path / "other")
    Path(device.place.root).write_bytes(other.store.get("models/metadata/1.root.json"))
    with pytest.raises(Distrusted) as caught:
        device.follow(other.order())
    assert caught.value.reason is TrustReason.BAD_SIGNATURE
