"""Releases on real agents over a real broker and HTTP: each trouble ends in its state, and the old model answers."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from contract import topics
from contract.messages import encode
from contract.models import Assignment, Assignments, DeviceState, Manifest, ReportedModel, Trial
from lake.trust.keys import generate_key
from tests.integration.agent_bench import AgentProcess, FakeGateway, agents
from tests.integration.models_bench import Faults, House, manifest_of, model, serving
from tests.integration.servers import PATIENCE_S, BrokerServer, wait_until
from tests.integration.test_models_endpoint import UnixConnection

STATE_S = 90.0
"""For a state to be reached: it takes up to two child processes, each of which imports for seconds where much runs."""
CONFIG = """
[streams.numbers]
driver = "callable"
options = { function = "models_sensor:read", search_path = "HERE" }
sampling = { mode = "interval", rate_hz = 50 }
max_batch_age_s = 0.2
[models]
url = "URL"
root = "ROOT"
retry_base_s = 0.1
retry_max_s = 0.5
read_timeout_s = 5.0
probe_timeout_s = 5.0
features_every = 2
FACTORY
[models.endpoint]
listen = "unix:SOCKET"
[clock]
assume_synced = true
[uplink]
reconnect_base_s = 0.1
reconnect_max_s = 0.5
"""
SENSOR = """
import itertools

_numbers = itertools.count()

def read():
    n = next(_numbers)
    return {"x": float(n % 7) + 0.5, "y": 0.25}
"""


class Device:
    """One agent with what is around it."""

    def __init__(self, gateway: FakeGateway, agent: AgentProcess, house: House, faults: Faults) -> None:
        self.gateway, self.agent, self.house, self.faults = gateway, agent, house, faults
        self.endpoint = agent.folder.parent / f"{gateway.device}.sock"
        self.envelopes: dict[str, dict[str, Any]] = {}

    def order(self, manifest: Manifest | None, *, key: Any = None, **changes: Any) -> Assignment:
        made = self.house.order(self.gateway.device, manifest, **changes)
        self.publish({made.model: self.house.sealed(made, key)})
        return made

    def publish(self, envelopes: dict[str, dict[str, Any]]) -> None:
        self.envelopes |= envelopes
        payload = encode(Assignments(envelopes=tuple(self.envelopes.values())))
        self.gateway._client.publish(topics.assign(self.gateway.device), payload, retain=True)

    def told(self, name: str = "gestures") -> ReportedModel | None:
        return self.gateway.reports[-1].models.get(name) if self.gateway.reports else None

    def wait(self, state: DeviceState, sequence: int, name: str = "gestures") -> ReportedModel:
        def reached() -> ReportedModel | None:
            told = self.told(name)
            right = told is not None and told.order is not None and told.order.sequence == sequence
            return told if right and told.order.state is state else None

        return wait_until(reached, STATE_S, f"{state}; see {self.agent.log}")

    def commit(self, manifest: Manifest, **changes: Any) -> ReportedModel:
        return self.wait(DeviceState.COMMITTED, self.order(manifest, **changes).sequence, manifest.model)

    def predictions(self, release: int, name: str = "gestures") -> list[dict[str, Any]]:
        return [row for row in self.gateway.rows(f"predictions.{name}") if row["release"] == release]

    def answers(self, release: int, name: str = "gestures") -> None:
        """Wait for two more predictions of a release."""
        before = len(self.predictions(release, name))
        wait_until(lambda: len(self.predictions(release, name)) >= before + 2, PATIENCE_S, f"release {release} answers")

    def ask(self, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
        """The device's own endpoint."""
        with closing(UnixConnection(str(self.endpoint))) as connection:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, json.loads(response.read() or "null")

    def listens(self) -> bool:
        with suppress(OSError), closing(UnixConnection(str(self.endpoint))) as connection:
            connection.connect()
            return True
        return False

    def states(self, sequence: int) -> list[str]:
        details = [each["detail"] for each in self.gateway.events("model_state")]
        return [each["state"] for each in details if each.get("sequence") == sequence]


@pytest.fixture
def device_of(tmp_path: Path, mosquitto: BrokerServer) -> Iterator[Callable[..., Device]]:
    (tmp_path / "models_sensor.py").write_text(SENSOR)
    with agents() as make, ExitStack() as stack:

        def device(name: str, *, factory: str = "", ahead_days: int = 0) -> Device:
            house = House(tmp_path / name / "house", ahead_days=ahead_days)
            url, faults = stack.enter_context(serving(house.folder))
            gateway = stack.enter_context(FakeGateway(mosquitto.url, name))
            config = CONFIG.replace("HERE", str(tmp_path)).replace("URL", url).replace("ROOT", str(house.anchor))
            config = config.replace("FACTORY", f'factory = "{factory}"' if factory else "")
            config = config.replace("SOCKET", str(tmp_path / f"{name}.sock"))
            agent = make(tmp_path / name, mosquitto.url, name, config)
            settings = agent.folder / "agent.toml"
            settings.write_text('tags = ["bench"]\n' + settings.read_text())
            agent.start()
            return Device(gateway, agent, house, faults)

        yield device


def test_a_release_is_tried_committed_and_its_successor_goes_through_the_shadow(
    device_of: Callable[..., Device],
) -> None:
    device = device_of("whole-life")
    wait_until(lambda: device.listens() and device.ask("GET", "/v2/health/ready")[0] == 503, PATIENCE_S, "not ready")
    first = device.house.release(model(), version=1)
    told = device.commit(first)
    assert (told.active, told.active_sha256) == (1, first.artifact.sha256)
    second = device.house.release(model(threshold=1.0), version=2)
    order = device.order(second)
    told = device.wait(DeviceState.COMMITTED, order.sequence)
    assert (told.active, told.previous, told.previous_sha256) == (2, 1, first.artifact.sha256)
    assert told.order.compared >= 3
    device.answers(2)
    wait_until(lambda: "committed" in device.states(order.sequence), PATIENCE_S, "the events")
    assert device.states(order.sequence) == [
        "assigned",
        "precheck",
        "downloading",
        "verified",
        "probed",
        "shadow",
        "trial",
        "committed",
    ]
    shadowed = [row for row in device.predictions(1) if row["shadow_release"] == 2]
    assert len(shadowed) >= 3
    row = device.predictions(2)[0]
    assert row["label"] == "high"
    assert row["nan_count"] == 0
    assert 0 < (row["ts"] - row["window_start"]).total_seconds() < 1
    assert any(each["features"] is not None for each in device.predictions(2))
    status = device.agent.status()["models"]["gestures"]
    assert (status["active"], status["previous"]) == (2, 1)
    # Another program on the device asks the release that answers.
    window = {"name": "window", "datatype": "FP32", "shape": [1, 8, 2], "data": [2.0] * 16}
    assert device.ask("GET", "/v2/health/ready")[0] == 200
    code, found = device.ask("POST", "/v2/models/gestures/infer", json.dumps({"inputs": [window]}))
    assert (code, found["model_version"]) == (200, "2")
    outputs = {each["name"]: each["data"] for each in found["outputs"]}
    assert (outputs["score"], outputs["label_name"], outputs["features"]) == ([2.0], ["high"], [2.0, 2.0])
    assert device.ask("GET", "/v2/models/gestures/versions/1")[0] == 404
    assert device.gateway.reports[-1].tags == ("bench",)
    # Back: a new sequence that names the old release.
    told = device.commit(first)
    assert told.active == 1
    # And away.
    gone = device.order(None)
    told = device.wait(DeviceState.COMMITTED, gone.sequence)
    assert told.active == 0
    assert device.agent.terminate() == 0, device.agent.tail()
    assert device.gateway.gaps == []


BAD = {
    "wrong_hash": ({}, DeviceState.REJECTED, "bad_hash"),
    "hangs": ({"character": "hangs"}, DeviceState.FAILED, "hung"),
    "eats_memory": ({"character": "eats_memory"}, DeviceState.FAILED, "memory"),
    "slow": ({"character": "slow"}, DeviceState.FAILED, "too slow"),
    "nan": ({"character": "nan"}, DeviceState.FAILED, "its score is NaN"),
    "fails": ({"character": "fails"}, DeviceState.FAILED, "failed on a window"),
    "disagrees": ({"character": "inverted"}, DeviceState.FAILED, "another one than the active"),
    "schema": ({}, DeviceState.REJECTED, "field 'z' is missing"),
    "dtype": ({}, DeviceState.REJECTED, "trained on int64"),
    "stream": ({}, DeviceState.REJECTED, "no stream 'elsewhere'"),
    "unapproved": ({}, DeviceState.REJECTED, "unapproved"),
}


def test_every_bad_release_ends_in_its_state_and_the_old_model_goes_on_answering(
    device_of: Callable[..., Device],
) -> None:
    device = device_of("bad-releases")
    house = device.house
    device.commit(house.release(model(), version=1))
    for number, (what, (character, state, words)) in enumerate(BAD.items(), 2):
        data = model(**{"threshold": number / 1000, **character})
        changes: dict[str, Any] = {"probe": what not in ("fails", "hangs", "eats_memory", "slow")}
        trial = Trial(shadow_windows=3, trial_windows=3, timeout_s=60.0, disagreement_share_max=0.5)
        if what == "schema":
            changes["fields"], changes["probe"] = ("x", "z"), False
        elif what == "dtype":
            changes["dtypes"] = ("int64", "double")
        elif what == "stream":
            changes["stream"] = "elsewhere"
        elif what == "slow":
            changes["limits"] = msgspec.structs.replace(manifest_of(data).limits, latency_ms_p99_max=1.0)
        if what == "unapproved":
            made = manifest_of(data, version=number)
        else:
            made = house.release(data, version=number, **changes)
        if what == "wrong_hash":
            other = b"x" * made.artifact.size
            device.faults.change = lambda path, body, made=made, other=other: (
                other if made.artifact.sha256 in path else body
            )
        order = device.order(made, trial=trial)
        told = device.wait(state, order.sequence)
        assert words in told.order.reason, (what, told.order.reason)
        assert told.active == 1, what
        device.faults.change = lambda path, body: body
    device.answers(1)
    assert device.agent.terminate() == 0
    reasons = [event["detail"] for event in device.gateway.events("model_state")]
    assert {each["state"] for each in reasons} >= {"rejected", "failed", "committed"}
    assert all(each["reason"] for each in reasons if each["state"] in ("rejected", "failed"))


def test_orders_that_are_forged_replayed_late_or_for_another_device_change_nothing(
    device_of: Callable[..., Device],
) -> None:
    device = device_of("bad-orders")
    house = device.house
    first, second = house.release(model(), version=1), house.release(model(threshold=1.0), version=2)
    old = house.order("bad-orders", first)
    device.publish({"gestures": house.sealed(old)})
    device.wait(DeviceState.COMMITTED, old.sequence)
    proven = device.commit(second)
    good = device.envelopes["gestures"]
    # Forged: shown as refused, with its reason, and forgotten when the good order comes again.
    forged = device.order(first, key=generate_key(), sequence=1_000)
    told = device.wait(DeviceState.REJECTED, forged.sequence)
    assert "bad_signature" in told.order.reason
    assert told.active == 2
    device.publish({"gestures": good})
    assert device.wait(DeviceState.COMMITTED, proven.order.sequence).order == proven.order
    # Too late.
    late = device.order(first, not_after_us=time.time_ns() // 1000 - 1_000_000)
    wait_until(lambda: refusals(device, "order_expired"), STATE_S, "the late order's refusal")
    assert late.sequence < forged.sequence
    # Replayed, and for another device.
    device.publish({"gestures": house.sealed(old)})
    wait_until(lambda: refusals(device, "replayed"), STATE_S, "the replay's refusal")
    other = house.order("somebody-else", first)
    device.publish({"gestures": house.sealed(other)})
    wait_until(lambda: refusals(device, "wrong_device"), STATE_S, "the refusal of another's order")
    device.answers(2)
    told = device.commit(first)
    assert told.active == 1
    # Rejected for what passes: the very same order is followed once it is right.
    data = model(threshold=3.0)
    early = device.order(manifest_of(data, version=3))
    assert "unapproved" in device.wait(DeviceState.REJECTED, early.sequence).order.reason
    house.release(data, version=3)
    device.publish({})
    assert device.wait(DeviceState.COMMITTED, early.sequence).active == 3


def refusals(device: Device, reason: str) -> list[dict[str, Any]]:
    details = [event["detail"] for event in device.gateway.events("model_state")]
    return [each for each in details if each["state"] == "refused" and each["cause"].endswith(reason)]


def test_a_download_goes_on_after_cuts_and_after_the_agents_death(device_of: Callable[..., Device]) -> None:
    device = device_of("resumed")
    made = device.house.release(model(size=300_000), version=1)
    device.faults.cut_after, device.faults.pause_s = 60_000, 0.005
    order = device.order(made)
    path = f"/artifacts/{made.artifact.sha256}"

    def ranges() -> list[str | None]:
        return [each for asked, each in device.faults.asked if asked == path]

    wait_until(lambda: len(ranges()) >= 3, STATE_S, "attempts")
    device.agent.kill()
    device.agent.start()
    told = device.wait(DeviceState.COMMITTED, order.sequence)
    assert told.active == 1
    starts = [0 if each is None else int(each.removeprefix("bytes=").rstrip("-")) for each in ranges()]
    assert starts == sorted(starts)
    assert starts[0] == 0 < starts[1]
    assert sum(each is None for each in ranges()) == 1


def test_a_model_commits_once_and_then_needs_neither_network_nor_server(
    device_of: Callable[..., Device], tmp_path: Path
) -> None:
    device = device_of("offline")
    device.commit(device.house.release(model(), version=1))
    assert device.agent.terminate() == 0
    settings = device.agent.folder / "agent.toml"
    before = settings.read_text()
    settings.write_text(re.sub(r'url = "mqtt://[^"]*"', 'url = "mqtt://127.0.0.1:1"', before))
    device.faults.status = 503
    device.agent.start()
    status = device.agent.wait_status(
        lambda answer: answer["models"].get("gestures", {}).get("windows", 0) >= 3, "windows without a network"
    )
    assert status["models"]["gestures"]["active"] == 1
    assert not status["uplink"]["connected"]


def test_the_factorys_model_answers_from_the_first_start_until_a_release_is_committed(
    device_of: Callable[..., Device], tmp_path: Path
) -> None:
    factory = tmp_path / "factory"
    factory.mkdir()
    data = model(threshold=9.0)
    made = manifest_of(data, version=7)
    (factory / f"{made.artifact.sha256}.onnx").write_bytes(data)
    (factory / "gestures.json").write_bytes(msgspec.json.encode(made))
    device = device_of("factory", factory=str(factory))
    wait_until(lambda: (device.told() or ReportedModel(active=0)).factory == 7, PATIENCE_S, "the factory's model")
    device.answers(7)
    order = device.order(device.house.release(model(), version=8))
    told = device.wait(DeviceState.COMMITTED, order.sequence)
    assert (told.active, told.order.compared >= 3) == (8, True)  # it was compared with the factory's
    assert (told.previous, told.previous_sha256) == (0, "")
    # Back to before any order: the factory's answers again, and is not silenced.
    told = device.wait(DeviceState.COMMITTED, device.order(None).sequence)
    assert (told.active, told.previous) == (0, 8)
    device.answers(7)


def test_a_clock_years_behind_waits_for_the_time_and_follows_nothing(device_of: Callable[..., Device]) -> None:
    """What is trusted was signed later than the clock says, so it is the clock that is wrong, and no order."""
    device = device_of("lost-in-time", ahead_days=900)
    order = device.order(device.house.release(model(), version=1))
    told = device.wait(DeviceState.ASSIGNED, order.sequence)
    assert "clock" in told.order.reason
    assert "time server" in told.order.reason
    assert told.active == 0


def test_a_new_order_takes_the_place_of_one_in_progress(device_of: Callable[..., Device]) -> None:
    device = device_of("superseded")
    slow = device.house.release(model(size=400_000), version=1)
    device.faults.pause_s = 0.5
    first = device.order(slow)
    device.wait(DeviceState.DOWNLOADING, first.sequence)
    second = device.order(device.house.release(model(), version=2))
    assert device.wait(DeviceState.COMMITTED, second.sequence).active == 2
    wait_until(lambda: "superseded" in device.states(first.sequence), PATIENCE_S, "the event of the first")


def test_two_models_of_one_device_live_apart(device_of: Callable[..., Device]) -> None:
    device = device_of("two-models")
    device.commit(device.house.release(model(), version=1))
    device.commit(device.house.release(model(threshold=2.0), version=1, name="wear"))
    device.answers(1)
    device.answers(1, "wear")
    bad = device.house.release(model(character="fails"), version=2, name="wear", probe=False)
    told = device.wait(DeviceState.FAILED, device.order(bad).sequence, "wear")
    assert told.active == 1
    assert device.told().active == 1
    device.answers(1)


def test_two_deaths_in_the_trial_deny_the_model_and_the_old_one_answers(device_of: Callable[..., Device]) -> None:
    """SIGKILL stands for whatever a model may do to its process."""
    device = device_of("dies")
    device.commit(device.house.release(model(), version=1))
    second = device.house.release(model(threshold=1.0), version=2)
    order = device.order(second, trial=Trial(shadow_windows=0, trial_windows=100_000, timeout_s=600.0))
    for _ in range(2):
        device.wait(DeviceState.TRIAL, order.sequence)
        device.agent.wait_status(lambda answer: answer["models"]["gestures"]["active"] == 2, "the candidate in front")
        device.agent.kill()
        device.gateway.reports.clear()
        device.agent.start()
    told = device.wait(DeviceState.FAILED, order.sequence)
    assert "ended 2 times" in told.order.reason
    assert told.active == 1
    device.answers(1)
    again = device.wait(DeviceState.REJECTED, device.order(second).sequence)
    assert "denies the model" in again.order.reason


def test_an_active_model_that_is_damaged_on_disk_gives_way_to_the_one_before(device_of: Callable[..., Device]) -> None:
    device = device_of("damaged")
    device.commit(device.house.release(model(), version=1))
    second = device.house.release(model(threshold=1.0), version=2)
    order = device.order(second)
    device.wait(DeviceState.COMMITTED, order.sequence)
    assert device.agent.terminate() == 0
    (device.agent.folder / "models" / "content" / second.artifact.sha256).write_bytes(b"bit rot")
    device.gateway.reports.clear()
    device.agent.start()
    told = device.wait(DeviceState.ROLLED_BACK, order.sequence)
    assert told.active == 1
    assert "not in the store" in told.order.reason
    wait_until(
        lambda: [e for e in device.gateway.events("model_state") if e["detail"]["state"] == "damaged"],
        PATIENCE_S,
        "the event of the damage",
    )


def test_kills_at_any_time_end_in_a_commit_with_no_row_lost_or_doubled(device_of: Callable[..., Device]) -> None:
    device = device_of("killed-often")
    device.commit(device.house.release(model(), version=1))
    second = device.house.release(model(threshold=1.0, size=50_000), version=2)
    device.faults.pause_s = 0.05
    order = device.order(second)
    for delay_s in (0.3, 0.6, 0.9, 1.2, 1.5):
        time.sleep(delay_s)
        told = device.told()
        state = told.order.state if told and told.order and told.order.sequence == order.sequence else None
        if state in (DeviceState.SHADOW, DeviceState.TRIAL):
            break  # two deaths from here on would deny it, as they should
        device.agent.kill()
        device.agent.start()
    assert device.wait(DeviceState.COMMITTED, order.sequence).active == 2
    device.answers(2)
    rows = device.gateway.rows("predictions.gestures")
    assert len({(row["ts"], row["release"]) for row in rows}) == len(rows)
    assert device.gateway.gaps == []
