"""Rollouts against trouble: real agents, gateways, broker and HTTP, and fifty devices in the long run.

The short test runs always. The others, marked slow, share one fleet that grows group by group to fifty agents; each
starts from a release that its group committed, and ends with that release answering, or its successor where the trouble
passed. Every device's last order is judged by state and reason in what it reported, in `headwater.events` of the lake
and in the history of the rollout. `DEVICES_FILE` (environment) names a file for the figures of the long run.

Case → test here → what is asserted. (The same at other levels, some sharper: test_models_agent.py, one device and every
bad release; tests/property/test_models_lifecycle.py and test_models_store.py, every order of events and power cuts at
every write; test_trust_device.py, metadata and clocks; test_rollouts.py and tests/simulation/test_rollouts.py, fleets.)

==============================  ==============================  ======================================================
Case                            Test (part of its name)         Asserted
==============================  ==============================  ======================================================
wrong signature of an order     forged_and_replayed_orders      REJECTED bad_signature; a later good order is followed
wrong signature of a release    not_to_be_trusted               REJECTED unapproved, rollout ABORTED
wrong hash                      not_to_be_trusted               REJECTED bad_hash, ABORTED
expired metadata                not_to_be_trusted               REJECTED expired_metadata, ABORTED
wrong stream schema             not_to_be_trusted               REJECTED field 'z' is missing, ABORTED
replayed old assignment         forged_and_replayed_orders      event refused/…/replayed, nothing changed
truncated, resumed download     cut_download                    COMMITTED, next to no byte fetched twice
power cut in every state        power_cut_in_every_state        a SIGKILL in each; COMMITTED, no row lost or doubled
model crashes the agent         crashes_its_agent               FAILED after two deaths, its hash is denied, ABORTED
model fails                     bad_model…[fails-…]             FAILED failed on a window, ABORTED
model hangs                     bad_model…[fails-hangs-eats]    FAILED hung, ABORTED
model eats memory               bad_model…[fails-hangs-eats]    FAILED memory, ABORTED
model 20x too slow              bad_model…[slow-nan-disagrees]  FAILED too slow, by 20x or more, ABORTED
model returns NaN               bad_model…[slow-nan-disagrees]  FAILED its score is NaN, ABORTED
model disagrees                 bad_model…[slow-nan-disagrees]  FAILED in shadow, ABORTED
offline, back after the next    device_that_was_away            the release of now once, the missed one never
clock years behind              clocks_years_off                ASSIGNED clock, waits; COMMITTED when it is right
clock years ahead               clocks_years_off                REJECTED order_expired, ABORTED
gateway killed in mid-rollout   fifty_devices                   SUCCEEDED, each stage once, one order per device
two gateways, one rollout       two_gateways                    each step once, one order per device
abort in mid-stage              abort_in_mid_stage              nobody else got it; who has it keeps it
rollback                        abort_in_mid_stage, forged_and_…  after an abort and after success: the old one answers
==============================  ==============================  ======================================================

The clock is moved under the whole agent process and its children: Python itself starts with another one (`SHIFTED`).

Mutants tried, each found here: a signature by any key accepted; the number of an order not compared with the latest;
an abort that failures do not lead to.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tuf.api.metadata import Metadata

from contract import topics
from contract.messages import Assignments, encode
from contract.models import Assignment, DeviceState, Manifest
from lake.trust.assignments import seal
from lake.trust.keys import generate_key
from tests.integration.models_bench import manifest_of, model
from tests.integration.servers import BrokerServer, wait_until
from tests.integration.trouble_parts import STATE_S, Fleet, TroubleLake, eventually, kill_at

IN_PARTS = ("10%", "30%", "50%", "75%", "100%")
"""Every device verifies and probes in processes of its own: forty at once would measure the cores of this machine."""
YEARS_S = 10 * 366 * 86_400
ABORTED, SUCCEEDED, ROLLED_BACK = "aborted", "succeeded", "rolled_back"
OLD, NEW = model(), model(threshold=1.0)
GENEROUS = msgspec.structs.replace(manifest_of(OLD).limits, latency_ms_p99_max=1_000.0)


def test_a_good_release_reaches_every_device_and_a_bad_one_is_aborted_with_the_old_one_answering(
    tmp_path: Path, mosquitto: BrokerServer
) -> None:
    with Fleet(tmp_path, mosquitto.url) as fleet:
        names = begin(fleet, "small", 4, stages=("50%", "100%"))
        fleet.answer("small", 1, names)
        bad = fleet.lake.release("small", model(threshold=2.0), wrong="score", limits=GENEROUS)
        rollout = fleet.roll_out(bad, "small", bad=True, rollback_on_abort=True)
        found = fleet.wait_rollout(rollout, ROLLED_BACK)
        assert_aborted(fleet, rollout, "4 of 4 devices failed", "probe")
        for name in names:
            told = fleet.wait(name, rollout, DeviceState.COMMITTED)
            assert (told.active, told.order.sequence) == (1, found["rollback_sequence"])
            failed = fleet.wait_event(name, found["sequences"][0], "failed")
            assert "probe" in failed.detail["reason"]
        fleet.answer("small", 1, names)
        assert not any(release == bad.version for _, release in fleet.predictions("small"))


# From here on: the long run.


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, mosquitto: BrokerServer) -> Iterator[Fleet]:
    began_s = time.monotonic()
    with Fleet(tmp_path_factory.mktemp("trouble"), mosquitto.url) as fleet:
        yield fleet
        if "DEVICES_FILE" in os.environ:
            Path(os.environ["DEVICES_FILE"]).write_text(json.dumps(figures(fleet, time.monotonic() - began_s)))


def figures(fleet: Fleet, wall_s: float) -> dict[str, Any]:
    """What became of every device."""
    ends = Counter(
        (group, order.state.value, order.reason)
        for group, names in fleet.groups.items()
        for order in map(fleet.order_of, names)
    )
    return {
        "wall_s": round(wall_s, 1),
        "devices": len(fleet.agents),
        "ends": [[count, *end] for end, count in ends.items()],
    }


def begin(
    fleet: Fleet, group: str, count: int, *more: str, stages: tuple[str, ...] = ("100%",), **options: Any
) -> list[str]:
    """A group of agents, and more groups of as many, that all run release 1 of their model; those of the first."""
    groups = (group, *more)
    for each in groups:
        fleet.start(each, count, OLD, **options)
    fleet.all_known(name for each in groups for name in fleet.groups[each])
    rollouts = {each: fleet.roll_out(fleet.first[each], each, stages=list(stages)) for each in groups}
    for each, rollout in rollouts.items():
        fleet.wait_rollout(rollout, SUCCEEDED)
        for name in fleet.groups[each]:
            assert fleet.wait(name, rollout).active == 1
    return fleet.groups[group]


def assert_aborted(fleet: Fleet, rollout: str, *words: str) -> None:
    """The history tells why."""
    [aborted] = [row for row in fleet.history(rollout) if row["event"] == "aborted"]
    assert all(word in aborted["why"] for word in words), aborted["why"]


def assert_refused(fleet: Fleet, group: str, rollout: str, state: DeviceState, *words: str) -> None:
    """Every device ended so, said why, in the lake too, and release 1 answers."""
    names = fleet.groups[group]
    for name in names:
        told = fleet.wait(name, rollout)
        assert told.order is not None
        assert told.order.state is state, told.order
        assert all(word in told.order.reason for word in words), told.order.reason
        assert told.active == 1
        assert fleet.wait_event(name, told.order.sequence, state.value).detail["reason"] == told.order.reason
    fleet.wait_rollout(rollout, ABORTED)
    assert_aborted(fleet, rollout, f"{len(names)} of {len(names)} devices failed", words[0])
    fleet.answer(group, 1, names)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_forged_and_replayed_orders_change_nothing_and_good_ones_are_followed_after_them(fleet: Fleet) -> None:
    names = begin(fleet, "forged", 4)
    first = {name: fleet.ordered[name][-1] for name in names}
    for name in names:
        forged = Assignment(
            device=name,
            model="forged",
            version=1,
            sha256=fleet.first["forged"].artifact.sha256,
            sequence=1_000_000,
            not_after_us=time.time_ns() // 1000 + 3_600_000_000,
            rollout="forgery",
        )
        document = Assignments(envelopes=(seal(forged, generate_key()),))
        fleet.client.publish(topics.assign(name), encode(document), retain=True)
    for name in names:
        assert fleet.wait_event(name, 1_000_000, "rejected").detail["reason"].startswith("bad_signature")
        # The order that is proven is shown again as soon as it was heard again.
        wait_until(lambda name=name: fleet.order_of(name).rollout != "forgery", STATE_S, f"{name} shows the good order")
        assert fleet.order_of(name).state is DeviceState.COMMITTED
    fleet.answer("forged", 1, names)
    rollout = fleet.roll_out(fleet.lake.release("forged", NEW, limits=GENEROUS), "forged")
    fleet.wait_rollout(rollout, SUCCEEDED)
    for name in names:
        assert fleet.wait(name, rollout).active == 2
        fleet.client.publish(topics.assign(name), first[name], retain=True)
    for name in names:
        eventually(
            lambda name=name: [e for e in fleet.events(name) if str(e.detail.get("cause")).endswith("replayed")],
            f"{name} refuses the replay",
        )
        assert fleet.order_of(name).state is DeviceState.COMMITTED
    fleet.answer("forged", 2, names)
    fleet.post(f"/v1/rollouts/{rollout}/rollback", {})
    back = fleet.wait_rollout(rollout, ROLLED_BACK)["rollback_sequence"]
    for name in names:
        wait_until(lambda name=name: fleet.order_of(name).sequence == back, STATE_S, f"{name} is ordered back")
        assert fleet.wait(name, rollout, DeviceState.COMMITTED).active == 1
    fleet.answer("forged", 1, names)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_releases_that_are_not_to_be_trusted_or_not_for_these_devices_are_rejected(fleet: Fleet) -> None:
    mirror, faults = fleet.mirror()
    begin(fleet, "unsigned", 2, "damaged", "schema")
    begin(fleet, "expired", 2, models=mirror)
    bad = {
        "unsigned": fleet.lake.release("unsigned", NEW, signed=False),
        # Content of its own: what is damaged by its hash is damaged in every release that has it.
        "damaged": fleet.lake.release("damaged", model(threshold=9.0)),
        "schema": fleet.lake.release("schema", NEW, fields=("x", "z")),
        "expired": fleet.lake.release("expired", NEW),
    }
    fleet.lake.damage(bad["damaged"].artifact.sha256)
    stale = expired_timestamp(fleet.lake)
    faults.change = lambda path, body: stale if path.endswith("/timestamp.json") else body
    rollouts = {group: fleet.roll_out(release, group, bad=True) for group, release in bad.items()}
    words = {
        "unsigned": "unapproved",
        "damaged": "bad_hash",
        "schema": "field 'z' is missing",
        "expired": "expired_metadata",
    }
    for group, said in words.items():
        assert_refused(fleet, group, rollouts[group], DeviceState.REJECTED, said)
    faults.change = lambda path, body: body


def expired_timestamp(lake: TroubleLake) -> bytes:
    """What the online key vouched for, until yesterday."""
    document = Metadata.from_bytes((lake.models / "metadata" / "timestamp.json").read_bytes())
    document.signed.expires = (datetime.now(UTC) - timedelta(days=1)).replace(microsecond=0)
    document.signed.version += 1
    document.sign(lake.online)
    return document.to_bytes()


SLOW_MS = 1.0
"""What `slow` may take: it takes more than 20 times that."""
BAD_MODELS = {
    "fails": ("failed on a window",),
    "hangs": ("hung",),
    "eats": ("memory",),
    "slow": ("too slow",),
    "nan": ("its score is NaN",),
    "disagrees": ("another one than the active",),
}


def bad_model(fleet: Fleet, group: str) -> Manifest:
    limits = msgspec.structs.replace(GENEROUS, latency_ms_p99_max=SLOW_MS) if group == "slow" else GENEROUS
    character = {"eats": "eats_memory", "disagrees": "inverted"}.get(group, group)
    return fleet.lake.release(group, model(character=character), probe=group == "disagrees", limits=limits)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("groups", [("fails", "hangs", "eats"), ("slow", "nan", "disagrees")], ids="-".join)
def test_a_bad_model_is_given_up_on_every_device_and_the_old_one_answers(fleet: Fleet, groups: tuple[str, ...]) -> None:
    begin(fleet, groups[0], 2, *groups[1:], probe_timeout_s=40.0)
    rollouts = {group: fleet.roll_out(bad_model(fleet, group), group, bad=True) for group in groups}
    for group in groups:
        assert_refused(fleet, group, rollouts[group], DeviceState.FAILED, *BAD_MODELS[group])
    for name in fleet.groups.get("slow", []) if "slow" in groups else []:
        took_ms = float(fleet.order_of(name).reason.partition("a window took ")[2].split()[0])
        assert took_ms >= 20 * SLOW_MS


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_model_that_crashes_its_agent_is_denied_after_two_deaths(fleet: Fleet) -> None:
    """SIGKILL stands for whatever a model may do to its process."""
    names = begin(fleet, "crashes", 2)
    trial = {"shadow_windows": 0, "trial_windows": 1_000_000}
    bad = fleet.lake.release("crashes", NEW, limits=GENEROUS)
    rollout = fleet.roll_out(bad, "crashes", bad=True, trial=trial)
    for _ in range(2):
        for name in names:
            agent = fleet.agents[name]
            eventually(lambda agent=agent: in_front(agent.status(), "crashes", 2), f"{name} has it in front")
            agent.kill()
            agent.start()
    assert_refused(fleet, "crashes", rollout, DeviceState.FAILED, "ended 2 times")
    for name in names:
        status = wait_until(fleet.agents[name].status, STATE_S, f"{name} answers")
        assert list(status["models"]["crashes"]["denied"]) == [bad.artifact.sha256]


def in_front(status: dict[str, Any], name: str, version: int) -> bool:
    return bool(status) and status["models"].get(name, {}).get("active") == version


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_cut_download_goes_on_where_it_ended(fleet: Fleet) -> None:
    url, line = fleet.line()
    names = begin(fleet, "cut", 2, models=url)
    size = 2_000_000
    big = fleet.lake.release("cut", model(threshold=1.0, size=size), limits=GENEROUS)
    before = line.counters().bytes_down_total
    line.slow(bytes_per_s_max=200_000)
    rollout = fleet.roll_out(big, "cut")
    partial = [fleet.agents[name].folder / "models" / "partial" / big.artifact.sha256 for name in names]

    def sizes() -> list[int]:
        return [path.stat().st_size if path.exists() else 0 for path in partial]

    kept = sizes()
    for share in (0.2, 0.4, 0.6):
        wait_until(lambda share=share: min(sizes()) >= share * size, STATE_S, f"{share:.0%} of it is here: {sizes()}")
        now = sizes()
        assert all(a <= b for a, b in zip(kept, now, strict=True))
        kept = now
        assert line.drop_connections() >= 1
    line.pass_through()
    fleet.wait_rollout(rollout, SUCCEEDED)
    assert all(fleet.wait(name, rollout).active == 2 for name in names)
    # A download from the start would have cost at least a fifth of it more, and all three more than the whole.
    came = (line.counters().bytes_down_total) - before
    assert 2 * size <= came < 2 * size * 1.2
    fleet.answer("cut", 2, names)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_power_cut_in_every_state_ends_in_a_commit_with_no_row_lost_or_doubled(fleet: Fleet) -> None:
    states = ("assigned", "precheck", "downloading", "verified", "probed", "shadow", "trial", "committed")
    url, line = fleet.line()
    names = begin(fleet, "killed", len(states), models=url)
    past = {name: fleet.order_of(name).sequence for name in names}
    second = fleet.lake.release("killed", model(threshold=1.0, size=400_000), limits=GENEROUS)
    line.slow(bytes_per_s_max=400_000)  # so that downloading takes a while
    rollout = fleet.roll_out(second, "killed")
    died = kill_at(fleet, dict(zip(names, states, strict=True)), past)
    line.pass_through()
    for name, state in zip(names, states, strict=True):
        # What takes no time may be over before the signal comes.
        assert died[name] in states[states.index(state) : states.index(state) + 2], died
        told = fleet.wait(name, rollout)
        assert (told.active, told.order.state) == (2, DeviceState.COMMITTED), told.order
    fleet.wait_rollout(rollout, SUCCEEDED)
    fleet.answer("killed", 2, names)
    rows = fleet.rows.read("raw/predictions.killed")
    keys = Counter(zip(*(rows[name].to_pylist() for name in ("_device", "_epoch", "_seq", "_row")), strict=True))
    assert max(keys.values()) == 1
    windows = Counter(zip(*(rows[name].to_pylist() for name in ("_device", "ts", "release")), strict=True))
    assert max(windows.values()) == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_device_that_was_away_gets_the_release_of_now_once(fleet: Fleet) -> None:
    names = begin(fleet, "away", 3)
    absent = fleet.agents[names[0]]
    assert absent.terminate() == 0, absent.tail()
    rollouts = []
    for threshold in (1.0, 1.25):
        release = fleet.lake.release("away", model(threshold=threshold), limits=GENEROUS)
        rollouts.append(fleet.roll_out(release, "away", stage={"max_wait_s": 60.0}))
        found = fleet.wait_rollout(rollouts[-1], SUCCEEDED)
        assert "1 excused" in found["reason"]
    absent.start()
    told = fleet.wait(names[0], rollouts[1], DeviceState.COMMITTED)
    assert told.active == 3
    fleet.answer("away", 3, names)
    assert told.order is not None
    fleet.wait_event(names[0], told.order.sequence, "committed")
    seen = Counter(e.detail["state"] for e in fleet.events(names[0]) if e.detail.get("rollout") == rollouts[1])
    assert (seen["assigned"], seen["committed"]) == (1, 1)
    assert not [e for e in fleet.events(names[0]) if e.detail.get("rollout") == rollouts[0]]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_clocks_years_off_make_a_device_wait_or_refuse_and_the_old_model_answers(fleet: Fleet) -> None:
    begin(fleet, "behind", 2, "ahead")
    for group, years_s in (("behind", -YEARS_S), ("ahead", YEARS_S)):
        for name in fleet.groups[group]:
            fleet.shift_clock(name, years_s)
    releases = {group: fleet.lake.release(group, NEW, limits=GENEROUS) for group in ("behind", "ahead")}
    waits = fleet.roll_out(releases["behind"], "behind")
    ends = fleet.roll_out(releases["ahead"], "ahead", bad=True)
    assert_refused(fleet, "ahead", ends, DeviceState.REJECTED, "order_expired")
    for name in fleet.groups["behind"]:
        told = fleet.wait(name, waits, DeviceState.ASSIGNED)
        assert told.order.reason.startswith("clock")
        assert "time server" in told.order.reason
        assert told.active == 1
    fleet.answer("behind", 1, fleet.groups["behind"])
    assert fleet.rollout(waits)["state"] == "running"
    for name in (*fleet.groups["behind"], *fleet.groups["ahead"]):
        fleet.shift_clock(name, 0)
    fleet.wait_rollout(waits, SUCCEEDED)
    fleet.answer("behind", 2, fleet.groups["behind"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_gateways_drive_one_rollout_and_every_step_is_made_once(fleet: Fleet) -> None:
    names = begin(fleet, "pair", 4)
    with fleet.another_gateway("two") as two:
        release = fleet.lake.release("pair", NEW, limits=GENEROUS)
        stages = [f"device:{name}" for name in names[:3]] + ["100%"]
        rollout = fleet.roll_out(release, "pair", stages=stages)
        fleet.wait_rollout(rollout, SUCCEEDED)
        assert all(each.metric('faults_total{where="rollouts"}') == 0 for each in (fleet.gateway, two))
    assert_made_once(fleet, rollout, names, stages=4)
    fleet.answer("pair", 2, names)


def assert_made_once(fleet: Fleet, rollout: str, names: list[str], *, stages: int, model: str = "") -> None:
    """Every stage once, and one order of the rollout for each device."""
    history = fleet.history(rollout)
    steps = Counter((row["event"], row["detail"].get("stage")) for row in history if row["event"].startswith("stage_"))
    assert max(steps.values()) == 1
    assert len(steps) == 2 * stages - 1
    assert [row["event"] for row in history].count("succeeded") == 1
    for name in names:
        told = fleet.wait(name, rollout, DeviceState.COMMITTED, model=model)
        assert told.order is not None
        fleet.wait_event(name, told.order.sequence, "committed")
        of_rollout = [e.detail for e in fleet.events(name) if e.detail.get("rollout") == rollout]
        assert {detail["sequence"] for detail in of_rollout} == {told.order.sequence}
        assert [detail["state"] for detail in of_rollout].count("committed") == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_abort_in_mid_stage_spares_the_others_and_a_rollback_brings_the_old_one_back(fleet: Fleet) -> None:
    names = begin(fleet, "aborted", 3)
    release = fleet.lake.release("aborted", NEW, limits=GENEROUS)
    stages = [f"device:{names[0]}", "100%"]
    rollout = fleet.roll_out(release, "aborted", stages=stages, stage={"bake_s": 3_600.0})
    assert fleet.wait(names[0], rollout).active == 2
    assert fleet.rollout(rollout)["state"] == "running"
    fleet.post(f"/v1/rollouts/{rollout}/abort", {"why": "it looks wrong"})
    assert_aborted(fleet, rollout, "it looks wrong")
    fleet.answer("aborted", 2, names[:1])
    fleet.answer("aborted", 1, names[1:])
    fleet.post(f"/v1/rollouts/{rollout}/rollback", {"why": "it was wrong"})
    back = fleet.wait_rollout(rollout, ROLLED_BACK)["rollback_sequence"]
    wait_until(lambda: fleet.order_of(names[0]).sequence == back, STATE_S, "it is ordered back")
    assert fleet.wait(names[0], rollout, DeviceState.COMMITTED).active == 1
    fleet.answer("aborted", 1, names)
    assert {release for name, release in fleet.predictions("aborted") if name != names[0]} == {1}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_devices_get_a_release_though_the_gateway_is_killed_in_every_stage(fleet: Fleet) -> None:
    """The last one: beside what the other tests left on them, every device commits a second model."""
    missing = 50 - len(fleet.agents)
    if missing > 0:
        begin(fleet, "others", missing, stages=IN_PARTS)
    names = list(fleet.agents)
    assert len(names) == 50
    fleet.all_known(names)
    common = fleet.lake.release("common", OLD, limits=GENEROUS)
    rollout = fleet.roll_out(common, "everybody", stages=list(IN_PARTS))
    for stage in range(1, len(IN_PARTS) + 1):
        eventually(lambda stage=stage: fleet.rollout(rollout).get("stage", 0) >= stage, f"stage {stage}")
        fleet.gateway.kill()
        fleet.gateway.start()
    fleet.wait_rollout(rollout, SUCCEEDED)
    assert_made_once(fleet, rollout, names, stages=len(IN_PARTS), model="common")
    fleet.answer("common", 1, names)
    for group, members in fleet.groups.items():
        # A report may be on its way yet.
        [active] = eventually(
            lambda group=group, members=members: (
                len(found := {fleet.reported[name].models[group].active for name in members}) == 1 and found
            ),
            f"all of {group} report one release",
        )
        fleet.answer(group, active, members)
