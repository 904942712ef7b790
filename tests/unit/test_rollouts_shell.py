"""The rollout table over its real format, what is published, and when nothing is decided.

Mutants tried, each found here: an append without check-and-set; a row of a newer release that ends the fold; orders
published to who has read them; nothing published after the broker took no more; decisions without a connection,
before the settling, before the register is loaded, without a key; an order that waits and is never signed anew.
"""

from __future__ import annotations

import shutil

import msgspec
import pytest
from structlog.testing import capture_logs

from contract import topics
from contract.errors import ConfigurationError
from contract.limits import SHARDS
from contract.messages import Assignments, decode
from contract.models import Assignment, DeviceState
from gateway.devices import Device
from gateway.rollouts.actions import Action, Person, act, create
from gateway.rollouts.controller import RolloutController
from gateway.rollouts.publisher import SLICE, Publisher
from gateway.rollouts.sealing import KeyFile
from gateway.rollouts.targets import Targets
from gateway.settings import RolloutSettings
from gateway.watch import LakeHealth
from lake.errors import CommitConflictError, StoreUnavailableError
from lake.ledger import table_of
from lake.rollout_spec import Stage
from lake.rollouts import (
    PATH,
    SCHEMA,
    EventKind,
    RolloutEvent,
    RolloutRefused,
    RolloutState,
    RolloutTable,
    fold,
    rows_of,
)
from lake.store import Store, StoreSettings
from lake.tables import ControlTable
from lake.trust.keys import generate_key, write_key
from tests.rollout_devices import MODEL, SimulatedDevice, numbered, spec
from tests.unit.gateway_parts import Clocks, fresh_metrics, value

ADA = Person("ada", "a test", 1_000)
EVERYBODY = (Stage(percent=100, bake_s=0, max_wait_s=60),)


@pytest.fixture(autouse=True)
def logs():
    with capture_logs() as found:
        yield found


def store_in(folder) -> Store:
    return Store(StoreSettings(url=f"file://{folder}/lake", fsync=False))


def table_in(folder, conflicts=None) -> RolloutTable:
    handle = ControlTable(store_in(folder), PATH, SCHEMA)
    return RolloutTable(lambda: handle, lambda: None if conflicts is None else conflicts.append(1))


class PlainSealer:
    """Signs nothing; its key can be changed."""

    key_id = "first"

    def seal(self, assignment):
        return msgspec.to_builtins(assignment)


# The table.


def test_what_is_appended_is_read_back_by_everybody_in_order(tmp_path):
    one, two = table_in(tmp_path), table_in(tmp_path)
    one.act(create("r", spec(), ADA))
    book = two.act(act(Action.PAUSE, "r", Person("bob", "lunch", 2_000)))
    assert book == one.look()
    rollout = book.get("r")
    assert (rollout.state, rollout.changed_by, rollout.reason) == (RolloutState.PAUSED, "bob", "lunch")
    assert rollout.spec == spec()
    found = [(row.sequence, row.place, row.event, row.who) for row in two.history()]
    assert found == [(1, 0, "created", "ada"), (1, 1, "started", "ada"), (2, 0, "paused", "bob")]
    assert table_in(tmp_path).look() == book


def test_a_table_that_was_restored_and_went_on_to_the_same_number_is_read_anew(tmp_path):
    table, folder = table_in(tmp_path), tmp_path / "lake" / PATH
    table.act(create("r", spec(), ADA))
    shutil.copytree(folder, tmp_path / "copy")
    assert table.act(act(Action.PAUSE, "r", ADA)).get("r").state is RolloutState.PAUSED
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)
    table_in(tmp_path).act(act(Action.ABORT, "r", ADA))
    assert table.look().get("r").state is RolloutState.ABORTED


def test_of_two_that_decide_on_the_same_state_one_decides_again(tmp_path):
    conflicts: list[int] = []
    one, two = table_in(tmp_path, conflicts), table_in(tmp_path)
    one.act(create("r", spec(), ADA))
    seen = []

    def slow(book):
        seen.append(book.get("r").state)
        if len(seen) == 1:
            two.act(act(Action.ABORT, "r", ADA))
        return act(Action.PAUSE, "r", ADA)(book)

    with pytest.raises(RolloutRefused, match="'r' is aborted"):
        one.act(slow)
    assert seen == [RolloutState.RUNNING, RolloutState.ABORTED]
    assert conflicts == [1]


def test_an_append_whose_answer_was_lost_is_found_and_not_repeated(tmp_path):
    class Lossy(ControlTable):
        lose = True

        def append(self, rows, *, expected=None):
            super().append(rows, expected=expected)
            if self.lose:
                self.lose = False
                raise StoreUnavailableError("the answer was lost")

    handle = Lossy(store_in(tmp_path), PATH, SCHEMA)
    table = RolloutTable(lambda: handle)
    order = create("r", spec(), ADA)
    with pytest.raises(StoreUnavailableError):
        table.act(order)
    assert table.act(order).get("r").state is RolloutState.RUNNING
    assert len(table.history()) == 2


def test_whoever_is_always_late_gives_up_and_says_so(tmp_path):
    class Busy(ControlTable):
        def append(self, rows, *, expected=None):
            raise CommitConflictError("somebody else was first")

    handle = Busy(store_in(tmp_path), PATH, SCHEMA)
    conflicts: list[int] = []
    with pytest.raises(CommitConflictError):
        RolloutTable(lambda: handle, lambda: conflicts.append(1)).act(create("r", spec(), ADA))
    assert len(conflicts) == 8


def test_rows_that_fit_nothing_change_nothing(tmp_path):
    events = create("r", spec(), ADA)(fold([]))
    strange = [
        events[0]._replace(rollout="s", detail='{"model":"wear"}'),
        events[1]._replace(rollout="nobody"),
        events[1]._replace(event=EventKind.STAGE_STARTED, rollout="r"),
        events[1]._replace(event=EventKind.ROLLED_BACK),
    ]
    book = fold(numbered(strange[:3], 0) + numbered(events, 1) + numbered(strange[3:], 2))
    assert [rollout.state for rollout in book.rollouts.values()] == [RolloutState.RUNNING]
    handle = ControlTable(store_in(tmp_path), PATH, SCHEMA)
    handle.refresh()
    unknown = [{**row, "sequence": 1} for row in rows_of(events)]
    unknown[1]["event"] = "danced"
    handle.append(table_of(unknown, SCHEMA), expected=0)
    assert table_in(tmp_path).look().get("r").state is RolloutState.DRAFT


# What is published.


class Desk:
    """A publisher with devices, a broker that can be full, and a clock."""

    def __init__(self) -> None:
        self.devices: dict[str, Device] = {}
        self.sent: list[tuple[str, list[Assignment]]] = []
        self.room = 1_000_000
        self.clock = Clocks()
        self.sealer = PlainSealer()
        self.publisher = Publisher(
            self.publish,
            self.devices.get,
            lambda name: not name.startswith("foreign"),
            republish_s=30.0,
            clock_us=lambda: round(self.clock() * 1e6),
            clock_s=self.clock,
        )

    def publish(self, topic, payload, *, qos=1, retain=False) -> bool:
        if len(self.sent) >= self.room:
            return False
        assert (qos, retain) == (1, True)
        envelopes = decode(payload, Assignments).envelopes
        self.sent.append((topic, [msgspec.convert(each, Assignment) for each in envelopes]))
        return True

    def aim(self, *commits) -> None:
        events, version = [], 0
        for commit in commits:
            events += numbered(commit, version)
            version += 1
        self.publisher.aim(Targets(fold(events, version)))

    def look(self, *names) -> list[str]:
        before = len(self.sent)
        self.publisher.look_at(names or self.devices)
        self.publisher.publish_slice(self.sealer)
        return [topic.rpartition("/")[2] for topic, _ in self.sent[before:]]


def begun(order=None):
    order = order or spec(stages=EVERYBODY)
    stage = RolloutEvent(1, "r", order.model, "gateway", EventKind.STAGE_STARTED, "")
    return [create("r", order, ADA)(fold([])), [stage]]


def test_an_order_goes_to_who_has_not_read_it_and_again_only_when_there_is_a_reason():
    desk = Desk()
    simulated = SimulatedDevice("pi-1")
    desk.devices |= {name: Device(name=name, online=True) for name in ("pi-1", "foreign-1")}
    assert desk.look() == [], "nothing was rolled out"
    desk.aim(*begun())
    assert desk.look() == ["pi-1"]
    assert desk.look() == []
    desk.clock.pass_s(29)
    assert desk.look() == []
    desk.clock.pass_s(1)
    assert desk.look() == ["pi-1"], "it is online and should have said something by now"
    desk.publisher.reconnected()
    assert desk.look() == ["pi-1"]
    desk.sealer.key_id = "second"
    assert desk.look() == ["pi-1"], "the key was changed"
    [order] = desk.sent[-1][1]
    assert (order.device, order.version, order.sequence, order.rollout) == ("pi-1", 2, 2, "r")
    assert order.not_after_us == round(desk.clock() * 1e6) + 7 * 86_400 * 1_000_000
    simulated.receive(order)
    desk.devices["pi-1"].models = simulated.reported().models
    desk.publisher.reconnected()
    desk.clock.pass_s(1_000)
    assert desk.look() == []
    assert desk.publisher.told == 0


def test_an_order_back_that_is_refused_at_once_each_time_comes_again_at_the_usual_pace():
    """Mutant tried: what was told is forgotten as soon as the device has read it."""
    desk = Desk()
    simulated = SimulatedDevice("pi-1", refuses=lambda order: order.version == 0)
    commits = begun()
    book = fold([*numbered(commits[0], 0), *numbered(commits[1], 1)], 2)
    back = act(Action.ROLLBACK, "r", ADA)(book)
    desk.devices["pi-1"] = Device(name="pi-1", online=True)

    def answers() -> int:
        """Orders that the device got while it answered at once, again and again."""
        before = len(desk.sent)
        for _ in range(10):
            desk.look()
            for order in desk.sent[-1][1]:
                if len(desk.sent) > before:
                    simulated.receive(order)
            desk.devices["pi-1"].models = simulated.reported().models
            desk.look()
            simulated.step()
            desk.devices["pi-1"].models = simulated.reported().models
        return len(desk.sent) - before

    desk.aim(*commits)
    assert answers() == 1
    assert simulated.state() is DeviceState.COMMITTED
    desk.aim(*commits, back)
    assert answers() == 1
    assert simulated.state() is DeviceState.REJECTED
    desk.clock.pass_s(29)
    assert answers() == 0
    desk.clock.pass_s(1)
    assert answers() == 1
    simulated.refuses = lambda order: False
    desk.clock.pass_s(30)
    assert answers() == 1
    assert (simulated.state(), simulated.active[MODEL]) == (DeviceState.COMMITTED, 0)
    desk.clock.pass_s(1_000)
    assert answers() == 0
    assert desk.publisher.told == 0


def test_an_order_that_waits_for_an_absent_device_is_signed_anew_before_it_expires():
    desk = Desk()
    desk.devices["pi-1"] = Device(name="pi-1", online=False)
    desk.aim(*begun(order=spec(stages=EVERYBODY, validity_s=1_000)))
    assert desk.look() == ["pi-1"]
    desk.clock.pass_s(499)
    assert desk.look() == []
    desk.clock.pass_s(1)
    assert desk.look() == ["pi-1"]


def test_what_the_broker_does_not_take_waits_and_a_slice_is_bounded():
    desk = Desk()
    desk.devices |= {f"pi-{number}": Device(name=f"pi-{number}", online=True) for number in range(SLICE + 5)}
    desk.aim(*begun())
    desk.room = 3
    assert desk.look() == ["pi-0", "pi-1", "pi-2"]
    assert desk.publisher.waiting == SLICE + 2
    desk.room = 1_000_000
    assert desk.publisher.publish_slice(desk.sealer)
    assert len(desk.sent) == 3 + SLICE
    assert desk.publisher.publish_slice(desk.sealer)
    assert {topic for topic, _ in desk.sent} == {topics.assign(name) for name in desk.devices}


def test_an_order_that_shall_not_be_read_any_more_is_withdrawn():
    desk = Desk()
    desk.devices["pi-1"] = Device(name="pi-1", online=False)
    commits = begun()
    desk.aim(*commits)
    desk.look()
    desk.aim(*commits, act(Action.PAUSE, "r", ADA)(fold([*numbered(commits[0], 0), *numbered(commits[1], 1)], 2)))
    assert desk.look() == ["pi-1"]
    assert desk.sent[-1][1] == []
    assert desk.look() == []


def test_the_online_key_is_read_again_when_its_file_changes(tmp_path):
    path = tmp_path / "online.pem"
    write_key(path, generate_key())
    sealer = KeyFile(path)
    first = sealer.key_id
    assert sealer.key_id == first
    path.write_text("half written")
    assert sealer.key_id == first, "the old one serves until the new one can be read"
    path.unlink()
    write_key(path, generate_key())
    assert sealer.key_id != first
    with pytest.raises(ConfigurationError, match="cannot be read"):
        KeyFile(tmp_path / "none.pem")


# When nothing is decided.


class Desktop:
    """A controller over a real table, whose thread is this one."""

    def __init__(self, tmp_path, *, sealer=True) -> None:
        self.loaded = self.link = True
        self.trusted: bool | None = True
        self.devices = {"pi-1": SimulatedDevice("pi-1")}
        self.clock = Clocks()
        self.sent: list[str] = []
        self.metrics = fresh_metrics()
        self.controller = RolloutController(
            RolloutSettings(settle_s=10.0),
            shards=range(SHARDS),
            gateway="gateway",
            fleet=self,
            table=table_in(tmp_path),
            sealer=PlainSealer() if sealer else None,
            may_sign=lambda key: self.trusted,
            publish=self.publish,
            connected=lambda: self.link,
            metrics=self.metrics,
            health=LakeHealth(),
            clock_us=lambda: round(self.clock() * 1e6),
            clock_s=self.clock,
        )
        self.controller.act(create("r", spec(stages=EVERYBODY), ADA))

    def device(self, name):
        device = self.devices.get(name)
        return None if device is None else Device(name=name, online=True, models=device.reported().models)

    def everyone(self):
        return [self.device(name) for name in self.devices]

    def publish(self, topic, payload, *, qos=1, retain=False) -> bool:
        self.sent.append(topic)
        for envelope in decode(payload, Assignments).envelopes:
            self.devices["pi-1"].receive(msgspec.convert(envelope, Assignment))
        return True

    @property
    def stage(self) -> int:
        assert self.controller.drive()
        return self.controller.book.get("r").stage


def test_nothing_is_decided_by_who_cannot_know(tmp_path):
    desk = Desktop(tmp_path)
    desk.clock.pass_s(100)
    assert desk.stage == -1, "it was never connected"
    desk.controller.is_connected()
    desk.clock.pass_s(9.9)
    assert desk.stage == -1, "what devices had reported may not be here yet"
    desk.clock.pass_s(0.2)
    desk.link = False
    assert desk.stage == -1, "nobody is heard"
    desk.link, desk.loaded = True, False
    assert desk.stage == -1, "the devices of old are not known"
    desk.loaded = True
    assert desk.stage == 0
    blind = Desktop(tmp_path / "other", sealer=False)
    blind.controller.is_connected()
    blind.clock.pass_s(100)
    assert blind.stage == -1, "it cannot sign"
    assert blind.controller.hand_out(everybody=True) > 0
    assert blind.sent == []


def test_with_a_key_that_devices_do_not_trust_nothing_is_decided_or_signed_until_it_is_replaced(tmp_path, logs):
    """Mutants tried: only deciding asks for the key; only handing out does."""
    desk = Desktop(tmp_path)
    desk.controller.is_connected()
    desk.clock.pass_s(100)
    desk.trusted = None
    assert desk.stage == -1, "nobody knows the root yet"
    assert logs == []
    desk.trusted = False
    assert [desk.stage, desk.stage] == [-1, -1]
    told = [log["error"] for log in logs if log["event"] == "rollouts_not_driven"]
    assert len(told) == 1
    assert "bring the new online.pem" in told[0]
    assert value(desk.metrics, "rollout_key_refused") == 1
    desk.trusted = True
    assert desk.stage == 0
    assert value(desk.metrics, "rollout_key_refused") == 0
    desk.trusted = False
    desk.controller.hand_out(everybody=True)
    assert desk.sent == []
    desk.trusted = True
    desk.controller.hand_out(everybody=True)
    assert desk.sent == [topics.assign("pi-1")]


def test_after_the_table_was_restored_devices_are_told_what_holds_now(tmp_path):
    """Mutant tried: handed out by the number of the table that the targets were made from."""
    desk, folder = Desktop(tmp_path), tmp_path / "lake" / PATH
    desk.controller.is_connected()
    desk.clock.pass_s(100)
    assert desk.stage == 0
    desk.controller.hand_out(everybody=False)
    assert len(desk.sent) == 1
    shutil.copytree(folder, tmp_path / "copy")
    number = desk.controller.act(act(Action.PAUSE, "r", ADA)).version
    assert desk.controller.drive()
    desk.controller.hand_out(everybody=False)
    assert len(desk.sent) == 1
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)
    restored = table_in(tmp_path).act(act(Action.ABORT, "r", ADA, rollback=True))
    assert desk.controller.drive()
    assert desk.controller.book.version == restored.version == number
    desk.controller.hand_out(everybody=False)
    assert len(desk.sent) == 2


def test_a_bug_in_handing_out_costs_only_time(tmp_path, monkeypatch):
    desk = Desktop(tmp_path)
    desk.controller.is_connected()
    desk.clock.pass_s(11)
    assert desk.stage == 0
    with monkeypatch.context() as broken:
        broken.setattr(desk.controller._publisher, "publish_slice", lambda sealer: 1 / 0)
        assert desk.controller.hand_out(everybody=False) == RolloutSettings().interval_s
    assert value(desk.metrics, "faults_total", where="rollouts") == 1
    desk.controller.hand_out(everybody=True)
    assert desk.sent == [topics.assign("pi-1")]


def test_a_whole_rollout_and_its_figures(tmp_path):
    desk = Desktop(tmp_path)
    desk.controller.is_connected()
    desk.clock.pass_s(11)
    assert desk.stage == 0
    assert value(desk.metrics, "rollout_devices", standing="waiting") == 1
    desk.controller.hand_out(everybody=False)
    assert desk.sent == [topics.assign("pi-1")]
    assert value(desk.metrics, "rollout_devices_told") == 1
    while desk.devices["pi-1"].step():
        pass
    assert desk.devices["pi-1"].state() is DeviceState.COMMITTED
    desk.controller.heard("pi-1")
    desk.controller.hand_out(everybody=False)
    assert value(desk.metrics, "rollout_devices_told") == 0
    desk.controller.drive()
    assert desk.controller.book.get("r").state is RolloutState.SUCCEEDED
    assert value(desk.metrics, "rollouts", state="succeeded") == 1
    assert value(desk.metrics, "assignments_total") == 1
    assert value(desk.metrics, "faults_total", where="rollouts") == 0


def test_a_lake_that_does_not_answer_and_a_bug_cost_only_time(tmp_path, monkeypatch):
    desk = Desktop(tmp_path)

    def away():
        raise StoreUnavailableError("it burns")

    with monkeypatch.context() as broken:
        broken.setattr(desk.controller._table, "look", away)
        assert not desk.controller.drive()
    assert value(desk.metrics, "store_errors_total") == 1
    with monkeypatch.context() as broken:
        broken.setattr(desk.controller._table, "look", lambda: 1 / 0)
        assert not desk.controller.drive()
    assert value(desk.metrics, "faults_total", where="rollouts") == 1
    assert desk.controller.drive()
