"""Rollouts with real gateway processes, a real broker, a real lake, fifty simulated devices and the command line.

Mutants tried in the gateway, each found here: nothing republished after a new connection; orders handed out after an
abort; a rollback with the old sequence; stages forgotten between two looks; orders without a signature; all devices
taken for members of the first stage.
"""

from __future__ import annotations

import json

import pytest

from contract.models import DeviceState
from gateway.rollouts.selection import point
from tests.integration.rollout_fleet import Bench, Fleet
from tests.integration.servers import PATIENCE_S, wait_until
from tests.rollout_devices import SimulatedDevice

QUICK_STAGES = ("--bake", "0", "--max-wait", "60", "--share", "1.0")
DEVICES = 50


@pytest.fixture
def bench(tmp_path, capsys):
    return Bench(tmp_path, capsys)


def devices(prefix, count=DEVICES, **options):
    return [SimulatedDevice(f"{prefix}-{number}", tags=(prefix,), **options) for number in range(count)]


def all_online(gateway, prefix, count=DEVICES):
    def known():
        found = gateway.get("/v1/devices?limit=10000")[1]["devices"]
        return sum(each["device"].startswith(f"{prefix}-") and each["online"] is True for each in found) == count

    wait_until(known, PATIENCE_S, "every device is known")


def first_of(bench, rollout, names):
    """The devices of a rollout's first stage: of fifty as many as its percentage says, by its row."""

    def started():
        return next((row for row in bench.history(rollout) if row["event"] == "stage_started"), None)

    wait_until(started, PATIENCE_S, "the first stage begins")
    return {name for name in names if point(rollout, name) < started()["detail"]["below"]}


def test_fifty_devices_get_a_release_in_stages_and_the_table_says_who_did_what_and_why(any_broker, bench):
    prefix = f"staged-{any_broker.name}"
    bench.release(prefix)
    with bench.gateway(any_broker.url) as gateway, Fleet(any_broker.url, devices(prefix), bench.key) as fleet:
        all_online(gateway, prefix)
        fleet.hold.set()
        rollout = bench.start(f"{prefix}@1", "--to", f"tag:{prefix}", *QUICK_STAGES)
        first = first_of(bench, rollout, fleet.devices)
        assert len(first) == DEVICES // 10
        wait_until(lambda: {n for n, read in fleet.read().items() if read} == first, PATIENCE_S, "the first stage")
        status, shown = gateway.request("GET", f"/v1/rollouts/{rollout}")[:2]
        assert status == 200
        assert json.loads(shown)["devices"]["members"] == len(first)
        fleet.hold.clear()
        bench.wait(rollout, "succeeded")
        assert set(fleet.active(prefix).values()) == {1}
        assert all(len(read) == 1 for read in fleet.read().values())
        assert gateway.metric('rollouts{state="succeeded"}') >= 1
        history = bench.history(rollout)
    events = [row["event"] for row in history]
    assert events == ["created", "started", *["stage_started", "stage_passed"] * 2, "stage_started", "succeeded"]
    assert [(row["who"], row["why"]) for row in history[:2]] == [("ada", "a better model")] * 2
    orders = {read[0].sequence: name for name, read in fleet.read().items()}
    assert sorted(orders) == [row["sequence"] for row in history if row["event"] == "stage_started"]


def test_a_gateway_that_is_killed_in_mid_rollout_and_its_successor_finish_it(mosquitto, bench):
    prefix = "killed-rollout"
    bench.release(prefix)
    with bench.gateway(mosquitto.url) as gateway, Fleet(mosquitto.url, devices(prefix), bench.key) as fleet:
        all_online(gateway, prefix)
        rollout = bench.start(f"{prefix}@1", "--to", f"tag:{prefix}", *QUICK_STAGES)
        for stage in (1, 2, 3):
            wait_until(lambda stage=stage: bench.state(rollout)["stage"] >= stage, PATIENCE_S, f"stage {stage}")
            gateway.kill()
            gateway.start()
        bench.wait(rollout, "succeeded")
        wait_until(lambda: set(fleet.active(prefix).values()) == {1}, PATIENCE_S, "all run it")
        assert all(len(read) == 1 for read in fleet.read().values())
        started = [row for row in bench.history(rollout) if row["event"] == "stage_started"]
        assert len(started) == 3


def test_two_gateways_drive_the_same_rollout_and_every_step_is_made_once(mosquitto, bench):
    prefix = "twice-rollout"
    bench.release(prefix)
    with (
        bench.gateway(mosquitto.url, "one") as one,
        bench.gateway(mosquitto.url, "two") as two,
        Fleet(mosquitto.url, devices(prefix), bench.key) as fleet,
    ):
        for gateway in (one, two):
            all_online(gateway, prefix)
        rollout = bench.start(
            f"{prefix}@1", "--to", f"tag:{prefix}", "--stages", "5%,10%,25%,50%,75%,100%", *QUICK_STAGES
        )
        bench.wait(rollout, "succeeded")
        assert all(len(read) == 1 for read in fleet.read().values())
        history = bench.history(rollout)
        steps = [(row["event"], row["detail"]["stage"]) for row in history if row["event"].startswith("stage_")]
        assert len(steps) == len(set(steps)) == 11
        assert [row["event"] for row in history].count("succeeded") == 1
        sequences = [row["sequence"] for row in history]
        assert sequences == sorted(sequences)
        assert all(gateway.metric('faults_total{where="rollouts"}') == 0 for gateway in (one, two))


def test_an_abort_in_mid_stage_stops_new_orders_and_a_rollback_brings_the_old_release_back(mosquitto, bench):
    prefix = "aborted-rollout"
    bench.release(prefix)
    bench.release(prefix)
    with bench.gateway(mosquitto.url) as gateway, Fleet(mosquitto.url, devices(prefix), bench.key) as fleet:
        all_online(gateway, prefix)
        target = ("--to", f"tag:{prefix}")
        bench.wait(bench.start(f"{prefix}@1", *target, "--stages", "100%", *QUICK_STAGES), "succeeded")
        away = {f"{prefix}-{number}" for number in range(10)}
        for name in away:
            fleet.switch(name, False)
        fleet.hold.set()
        rollout = bench.start(f"{prefix}@2", *target, "--stages", "100%", *QUICK_STAGES)
        got = set(fleet.devices) - away
        wait_until(
            lambda: {n for n, read in fleet.read().items() if read[-1].version == 2} == got, PATIENCE_S, "40 have it"
        )
        [said] = bench.typed("rollout", "abort", rollout, "--why", "it looks wrong", "--by", "bob")
        assert (said["state"], said["by"], said["reason"]) == ("aborted", "bob", "it looks wrong")
        # An abort does not reach into what a device reads in the same moment; who comes later gets nothing of it.
        fleet.wait_retained(away, 1)
        for name in away:
            fleet.switch(name, True)
        fleet.hold.clear()
        wait_until(lambda: sum(v == 2 for v in fleet.active(prefix).values()) == 40, PATIENCE_S, "who has it keeps it")
        assert all(fleet.read()[name][-1].version == 1 for name in away)
        bench.typed("rollout", "rollback", rollout, "--why", "it was wrong")
        wait_until(lambda: set(fleet.active(prefix).values()) == {1}, PATIENCE_S, "all are back")
        final = bench.state(rollout)
        assert final["state"] == "rolled_back"
        read = fleet.read()
        assert {read[name][-1].sequence for name in got} == {final["rollback_sequence"]}
        for orders in read.values():
            assert [order.sequence for order in orders] == sorted({order.sequence for order in orders})


def test_a_release_that_fails_on_devices_is_aborted_taken_back_and_the_reason_is_told(mosquitto, bench):
    prefix = "bad-rollout"
    bench.release(prefix)
    bench.release(prefix)

    def fate(order):
        return DeviceState.FAILED if order.version == 2 else DeviceState.COMMITTED

    with bench.gateway(mosquitto.url) as gateway, Fleet(mosquitto.url, devices(prefix, fate=fate), bench.key) as fleet:
        all_online(gateway, prefix)
        target = ("--to", f"tag:{prefix}")
        bench.wait(bench.start(f"{prefix}@1", *target, "--stages", "100%", *QUICK_STAGES), "succeeded")
        rollout = bench.start(f"{prefix}@2", *target, "--stages", "20%,100%", *QUICK_STAGES)
        found = bench.wait(rollout, "rolled_back")
        assert found["stage"] == 1
        [aborted] = [row for row in bench.history(rollout) if row["event"] == "aborted"]
        assert "devices failed" in aborted["why"]
        assert "the probe differs" in aborted["why"]
        reached = first_of(bench, rollout, fleet.devices)
        assert len(reached) == DEVICES // 5
        wait_until(
            lambda: (
                {n for n, read in fleet.read().items() if read[-1].sequence == found["rollback_sequence"]} == reached
            ),
            PATIENCE_S,
            "the reached ones are ordered back",
        )
        assert set(fleet.active(prefix).values()) == {1}
        code, _, _ = bench.tried("rollout", "status", rollout, "--watch")
        assert code == 1


def test_a_device_offline_throughout_is_excused_and_gets_the_next_release_once_when_it_returns(mosquitto, bench):
    prefix = "away-rollout"
    bench.release(prefix)
    bench.release(prefix)
    with bench.gateway(mosquitto.url) as gateway, Fleet(mosquitto.url, devices(prefix, 6), bench.key) as fleet:
        all_online(gateway, prefix, 6)
        absent = f"{prefix}-0"
        fleet.switch(absent, False)
        options = ("--to", f"tag:{prefix}", "--stages", "100%", "--bake", "0", "--max-wait", "3", "--share", "1.0")
        bench.wait(bench.start(f"{prefix}@1", *options), "succeeded")
        second = bench.start(f"{prefix}@2", *options)
        found = bench.wait(second, "succeeded")
        assert "1 excused" in found["reason"]
        assert fleet.read()[absent] == []
        gateway.kill()
        gateway.start()
        fleet.switch(absent, True)
        wait_until(lambda: fleet.active(prefix)[absent] == 2, PATIENCE_S, "it catches up")
        assert [(order.version, order.rollout) for order in fleet.read()[absent]] == [(2, second)]


def test_a_broker_that_forgets_costs_nothing(servers, bench):
    broker = servers.iotcore()
    prefix = "forgotten-rollout"
    bench.release(prefix)
    bench.release(prefix)
    with bench.gateway(broker.url) as gateway:
        with Fleet(broker.url, devices(prefix, 5), bench.key) as fleet:
            all_online(gateway, prefix, 5)
            fleet.switch(f"{prefix}-0", False)
            options = ("--to", f"tag:{prefix}", "--stages", "100%", "--bake", "0", "--max-wait", "3", "--share", "0.8")
            bench.wait(bench.start(f"{prefix}@1", *options), "succeeded")
        broker.kill()
        wait_until(lambda: gateway.get("/readyz")[0] == 200, PATIENCE_S, "it is connected again")
        late = SimulatedDevice(f"{prefix}-0", tags=(prefix,))
        with Fleet(broker.url, [late], bench.key) as fleet:
            wait_until(lambda: fleet.active(prefix)[late.name] == 1, PATIENCE_S, "it gets its order")


def test_people_are_told_why_not(mosquitto, bench):
    prefix = "refused-rollout"
    bench.release(prefix)
    bench.release(prefix, approved=False)
    with bench.gateway(mosquitto.url, key=False) as gateway:
        tried = bench.tried
        why = ("--why", "because")
        assert tried("rollout", "start", f"{prefix}@1")[0] == 2
        code, _, err = tried("rollout", "start", f"{prefix}@2", *why)
        assert (code, "is draft" in err) == (1, True), err
        assert tried("rollout", "start", f"{prefix}@9", *why)[0] == 2
        assert "percentages" in tried("rollout", "start", f"{prefix}@1", "--stages", "50%,10%", *why)[2]
        assert "unknown key" in tried("rollout", "start", f"{prefix}@1", "--guard", "speed=1", *why)[2]
        with bench.spec(
            f'model = "{prefix}"\nversion = 1\nstages = ["tag:canary", "100%"]\n[stage]\nbake_s = 7\n'
        ) as file:
            [said] = bench.typed("rollout", "start", f"{prefix}@1", "--spec", file, "--approval", *why, "--by", "ada")
        rollout = said["rollout"]
        assert said["state"] == "approval"
        assert [stage["bake_s"] for stage in said["spec"]["stages"]] == [7.0, 7.0]
        code, _, err = tried("rollout", "start", f"{prefix}@1", *why)
        assert (code, rollout in err and "ada" in err) == (1, True), err
        assert tried("rollout", "pause", rollout, *why)[0] == 1
        [said] = bench.typed("rollout", "approve", rollout, *why, "--by", "eve")
        assert (said["state"], said["by"]) == ("running", "eve")

        def post(path, document):
            status, body, _ = gateway.request(
                "POST", path, json.dumps(document).encode(), Content_Type="application/json"
            )
            return status, json.loads(body)

        person = {"who": "ada", "why": "because"}
        order = {"spec": {"model": prefix, "version": 1}} | person
        status, said = post("/v1/rollouts", order)
        assert (status, said["error"]["code"]) == (409, "under_way")
        status, said = post("/v1/rollouts", order | {"supersede": True})
        assert (status, said["state"]) == (201, "running")
        assert bench.state(rollout)["state"] == "aborted"
        name = said["rollout"]
        assert post(f"/v1/rollouts/{name}/pause", person)[1]["state"] == "paused"
        assert post(f"/v1/rollouts/{name}/pause", person)[0] == 409
        assert post(f"/v1/rollouts/{name}/pause", {"who": "ada", "why": " "})[0] == 422
        assert post(f"/v1/rollouts/{name}/pause", {"who": "ada"})[0] == 400
        assert post(f"/v1/rollouts/{name}/dance", person)[0] == 404
        assert post("/v1/rollouts/nobody/pause", person)[0] == 404
        assert gateway.request("POST", f"/v1/rollouts/{name}/resume", b"why=1")[0] == 415
        assert post("/v1/rollouts", {"spec": {"model": "unheard-of"}} | person)[0] == 404
        assert (
            post("/v1/rollouts", {"spec": {"model": prefix, "version": 2}} | person)[1]["error"]["code"]
            == "not_approved"
        )
        listed = gateway.get("/v1/rollouts")[1]["rollouts"]
        assert [each["rollout"] for each in listed] == [name, rollout]
        rows = gateway.get(f"/v1/rollouts/{name}/history")[1]["events"]
        assert [row["event"] for row in rows] == ["created", "started", "paused"]
        assert [each["rollout"] for each in bench.typed("rollout", "status")] == [name, rollout]


def test_a_draft_starts_as_it_was_drafted_or_not_at_all(bench):
    bench.release("drafted")
    [made] = bench.typed("rollout", "start", "drafted@1", "--draft", "--why", "a plan", "--by", "ada")
    code, _, err = bench.tried("rollout", "start", made["rollout"], "--stages", "5%", "--why", "more carefully")
    assert (code, "leave the options out" in err) == (2, True), err
    assert bench.state(made["rollout"])["state"] == "draft"
    [begun] = bench.typed("rollout", "start", made["rollout"], "--why", "now", "--by", "ada")
    assert begun["state"] == "running"
