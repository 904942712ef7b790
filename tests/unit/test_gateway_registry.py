"""The register over its real table in a folder: what is heard becomes rows, what is ordered becomes a revision, once.

Mutants tried, each found here: taking the revision from memory instead of the table; writing rows for devices of
another replica; forgetting what was heard before the table was read; dropping rows that could not be written;
publishing only once; a queue without a bound.
"""

from __future__ import annotations

import msgspec
import pytest
from structlog.testing import capture_logs

from contract import topics
from contract.errors import TemporaryError
from contract.limits import SHARDS
from contract.messages import Desired, DesiredStream, Presence, Reported, ReportedStream, decode, encode
from contract.models import MODELS_MAX, ReportedModel
from contract.names import shard_of
from gateway.devices import TAGS_MAX, DeviceBook
from gateway.registry import PATH, SCHEMA, Refused, Registry, events_of
from gateway.settings import RegistrySettings
from gateway.watch import LakeHealth
from lake.store import Store, StoreSettings
from lake.tables import ControlTable
from tests.unit.gateway_parts import fresh_metrics, value

BOOT = "ab" * 16


@pytest.fixture(autouse=True)
def logs():
    with capture_logs() as found:
        yield found


class Bench:
    """One gateway's registry over a lake in a folder; several over one folder are several gateways."""

    def __init__(self, folder, *, shards=range(SHARDS), **settings) -> None:
        store = Store(StoreSettings(url=f"file://{folder}/lake", fsync=False))
        self.table = ControlTable(store, PATH, SCHEMA)
        self.trouble: Exception | None = None
        self.published: list[tuple[str, bytes]] = []
        self.broker_up = True
        self.metrics = fresh_metrics()
        self.health = LakeHealth()
        self.now_us = 1_000
        self.registry = Registry(
            RegistrySettings(**settings),
            shards=shards,
            gateway="gateway",
            open_table=self.open_table,
            publish=self.publish,
            metrics=self.metrics,
            health=self.health,
            clock_us=lambda: self.now_us,
        )

    def open_table(self) -> ControlTable:
        if self.trouble is not None:
            raise self.trouble
        return self.table

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        if self.broker_up:
            assert (qos, retain) == (1, True)
            self.published.append((topic, payload))
        return self.broker_up

    def hears(self, device: str, online: bool = True) -> None:
        reason = "started" if online else "lost"
        presence = Presence(online=online, reason=reason, at_us=0, agent="agent/1", boot=BOOT)
        self.registry.receive(topics.status(device), encode(presence))

    def rows(self) -> list[tuple[str, str]]:
        self.table.refresh()
        return sorted((event.device, event.event) for event in events_of(self.table.read()))


def test_what_is_heard_becomes_rows_and_survives_a_restart(tmp_path):
    bench = Bench(tmp_path)
    assert bench.registry.refresh()
    bench.hears("pi-1")
    bench.hears("pi-1", online=False)
    assert bench.registry.write()
    assert bench.rows() == [("pi-1", "first_seen"), ("pi-1", "offline"), ("pi-1", "online")]
    again = Bench(tmp_path)
    assert again.registry.refresh()
    device = again.registry.device("pi-1")
    assert (device.online, device.reason, device.agent) == (False, "lost", "agent/1")
    again.hears("pi-1", online=False)
    assert again.registry.write()
    assert len(again.rows()) == 3


def test_what_is_heard_before_the_table_was_read_is_judged_afterwards(tmp_path):
    first = Bench(tmp_path)
    first.registry.refresh()
    first.hears("pi-1")
    first.registry.write()
    bench = Bench(tmp_path)
    bench.hears("pi-1")
    bench.hears("pi-2")
    bench.registry.heard(["pi-3"], 5)
    assert not bench.registry.loaded
    assert bench.registry.refresh()
    assert bench.registry.write()
    assert bench.rows() == [
        ("pi-1", "first_seen"),
        ("pi-1", "online"),
        ("pi-2", "first_seen"),
        ("pi-2", "online"),
        ("pi-3", "first_seen"),
    ]


def test_rows_are_written_by_the_owner_of_the_shard_and_seen_by_all(tmp_path):
    names = [f"pi-{number}" for number in range(8)]
    halves = [Bench(tmp_path, shards=range(remainder, SHARDS, 2)) for remainder in (0, 1)]
    for bench in halves:
        bench.registry.refresh()
        for name in names:
            bench.hears(name)
        bench.registry.write()
        assert [device.name for device in bench.registry.devices("", 100)] == names
    written = [value(bench.metrics, "registry_rows_total", event="online") for bench in halves]
    assert written == [sum(shard_of(name) % 2 == remainder for name in names) for remainder in (0, 1)]
    assert len(halves[0].rows()) == 16


def test_a_desired_document_is_committed_then_published_and_known_to_the_next(tmp_path):
    bench = Bench(tmp_path)
    bench.registry.refresh()
    wanted = {"vibration": DesiredStream(rate_hz=10.0)}
    assert bench.registry.set_desired("pi-1", wanted).revision == 1
    assert bench.registry.set_desired("pi-1", {}).revision == 2
    assert bench.registry.publish_waiting()
    [(topic, payload)] = bench.published
    assert topic == topics.desired("pi-1")
    assert decode(payload, Desired) == Desired(revision=2, streams={})
    again = Bench(tmp_path)
    again.registry.refresh()
    assert again.registry.publish_waiting()
    assert decode(again.published[0][1], Desired).revision == 2


def test_after_the_broker_lost_everything_documents_are_published_again(tmp_path):
    bench = Bench(tmp_path)
    bench.registry.refresh()
    bench.registry.set_desired("pi-1", {})
    bench.broker_up = False
    assert not bench.registry.publish_waiting()
    bench.broker_up = True
    assert bench.registry.publish_waiting()
    assert bench.registry.publish_waiting()
    assert len(bench.published) == 1
    bench.registry.connected()
    bench.registry.publish_waiting()
    assert len(bench.published) == 2


def test_what_another_gateway_ordered_is_published_here_too(tmp_path):
    one, two = Bench(tmp_path), Bench(tmp_path)
    one.registry.refresh()
    two.registry.refresh()
    one.registry.set_desired("pi-1", {})
    assert two.registry.refresh()
    assert two.registry.publish_waiting()
    assert [topic for topic, _ in two.published] == [topics.desired("pi-1")]
    assert two.registry.set_desired("pi-1", {}).revision == 2


def test_of_two_who_change_one_device_at_once_one_is_told(tmp_path):
    bench = Bench(tmp_path)
    bench.registry.set_desired("pi-1", {}, replaces=0)
    with pytest.raises(Refused, match="at revision 1, not at 0; read it again") as told:
        bench.registry.set_desired("pi-1", {}, replaces=0)
    assert told.value.code == "conflict"
    assert bench.registry.set_desired("pi-1", {}, replaces=1).revision == 2


def test_a_revision_is_never_given_twice_though_memory_forgot_the_device(tmp_path):
    bench = Bench(tmp_path, devices_max=1)
    bench.registry.refresh()
    bench.registry.set_desired("pi-1", {})
    bench.hears("pi-2")
    assert bench.registry.device("pi-1") is None
    assert bench.registry.set_desired("pi-1", {}).revision == 2


@pytest.mark.parametrize(
    ("name", "streams", "code", "words"),
    [
        ("Pi 1", {}, "bad_name", "use 1 to 63"),
        ("pi-1", {"UP": DesiredStream()}, "bad_name", "stream 'UP'"),
        ("pi-1", {"s": DesiredStream(rate_hz=0.0)}, "out_of_range", "rate_hz = 0 is outside"),
        ("pi-1", {"s": DesiredStream(rate_hz=10_001.0)}, "out_of_range", "0.0000116 (once a day) .. 10000 Hz"),
        ("pi-1", {"s": DesiredStream(rate_hz=float("nan"))}, "out_of_range", "rate_hz = nan"),
        ("pi-1", {"s": DesiredStream(max_batch_rows=65_537)}, "out_of_range", "1 .. 65536"),
        ("pi-1", {"s": DesiredStream(max_batch_age_s=0.01)}, "out_of_range", "max_batch_age_s = 0.01"),
        ("pi-1", {f"s{number}-{'x' * 50}": DesiredStream() for number in range(5_000)}, "too_large", "fewer streams"),
    ],
)
def test_a_document_that_no_device_could_follow_is_refused_with_a_remedy(tmp_path, name, streams, code, words):
    bench = Bench(tmp_path)
    with pytest.raises(Refused) as told:
        bench.registry.set_desired(name, streams)
    assert told.value.code == code
    assert words in str(told.value)
    assert bench.rows() == []


REPORT = Reported(
    revision=0,
    agent="agent/1",
    boot=BOOT,
    clock_synced=True,
    started_at_us=0,
    streams={
        name: ReportedStream(
            enabled=True,
            rate_hz=rate_hz,
            max_batch_rows=500,
            max_batch_age_s=5.0,
            readings=0,
            overruns=0,
            waiting_batches=0,
            waiting_rows=0,
            waiting_bytes=0,
            evicted_rows=0,
        )
        for name, rate_hz in (("climate", 1.0), ("audio", None))
    },
)


@pytest.mark.parametrize(
    ("streams", "code", "words"),
    [
        ({"climat": DesiredStream(enabled=False)}, "unknown_stream", "its streams: audio, climate"),
        ({"audio": DesiredStream(rate_hz=5.0)}, "rate_not_settable", "'audio': rate_hz = 5 does not apply"),
    ],
)
def test_what_a_device_has_reported_to_lack_is_refused_before_it_is_written(tmp_path, streams, code, words):
    """Mutants tried: judged after the commit; a device that has not reported judged like one without streams."""
    bench = Bench(tmp_path)
    bench.registry.refresh()
    assert bench.registry.set_desired("pi-1", streams).revision == 1
    bench.registry.receive(topics.reported("pi-1"), encode(REPORT))
    with pytest.raises(Refused) as told:
        bench.registry.set_desired("pi-1", streams)
    assert told.value.code == code
    assert words in str(told.value)
    assert bench.registry.set_desired("pi-1", {"climate": DesiredStream(rate_hz=5.0)}).revision == 2


def test_rows_wait_for_a_lake_that_does_not_answer_and_are_bounded(tmp_path):
    bench = Bench(tmp_path, queued_rows_max=3)
    bench.registry.refresh()
    bench.trouble = TemporaryError("no answer")
    bench.hears("pi-1")
    bench.hears("pi-2")
    assert not bench.registry.write()
    assert value(bench.metrics, "registry_waiting") == value(bench.metrics, "registry_waiting_max") == 3
    assert value(bench.metrics, "registry_dropped_total") == 1
    with pytest.raises(TemporaryError):
        bench.registry.set_desired("pi-1", {})
    bench.trouble = None
    assert bench.registry.write()
    assert bench.rows() == [("pi-1", "first_seen"), ("pi-1", "online"), ("pi-2", "first_seen")]


@pytest.mark.parametrize("payload", [b"junk", b"{}", b'{"v":2}', b"\xff", b"[" * 100_000])
def test_documents_that_are_none_are_counted_and_change_nothing(tmp_path, payload):
    bench = Bench(tmp_path)
    bench.registry.refresh()
    bench.registry.receive(topics.status("pi-1"), payload)
    bench.registry.receive(topics.reported("pi-1"), payload)
    bench.registry.receive("hw/v1/status/Not A Name", payload)
    bench.registry.receive(topics.status("pi-1"), b"")
    assert value(bench.metrics, "documents_refused_total", kind="status") == 2
    assert value(bench.metrics, "documents_refused_total", kind="reported") == 1
    assert bench.registry.devices("", 10) == []


def test_what_a_device_says_of_itself_is_bounded(tmp_path):
    bench = Bench(tmp_path)
    bench.registry.refresh()
    long = Presence(online=True, reason="started", at_us=0, agent="a" * 5_000, boot=BOOT)
    bench.registry.receive(topics.status("pi-1"), encode(long))
    assert bench.registry.device("pi-1") is None
    assert value(bench.metrics, "documents_refused_total", kind="status") == 1


def test_a_report_that_comes_before_the_table_was_read_is_kept_and_makes_no_row_of_a_known_device(tmp_path):
    """A device that is offline now will not say it again: rollouts need what the broker had retained of it."""
    first = Bench(tmp_path)
    first.registry.refresh()
    first.hears("pi-1", online=False)
    first.registry.write()
    bench = Bench(tmp_path)
    model = ReportedModel(active=3)
    report = Reported(
        revision=0,
        agent="a",
        boot=BOOT,
        clock_synced=True,
        started_at_us=0,
        streams={},
        models={"m": model},
        tags=("x",),
    )
    bench.registry.receive(topics.reported("pi-1"), encode(report))
    bench.registry.refresh()
    device = bench.registry.device("pi-1")
    assert (device.reported, device.tags, device.models) == (encode(report), ("x",), {"m": model})
    assert (device.online, device.last_seen_us) == (False, bench.now_us)
    bench.registry.write()
    assert bench.rows() == [("pi-1", "first_seen"), ("pi-1", "offline")]


def test_models_that_devices_report_are_bounded_over_all_devices():
    book = DeviceBook(10, reported_models_max=4)
    models = {name: ReportedModel(active=1) for name in "abc"}
    report = Reported(revision=0, agent="a", boot=BOOT, clock_synced=True, started_at_us=0, streams={}, models=models)
    for name in ("pi-1", "pi-2", "pi-2"):
        book.reports(name, report, 1)
    assert book.reported_models == 3
    assert (book.get("pi-1").models, book.get("pi-2").models) == ({}, models)
    crowd = {f"m{number}": ReportedModel(active=1) for number in range(MODELS_MAX + 5)}
    crowded = DeviceBook(10)
    crowded.reports("pi-1", msgspec.structs.replace(report, models=crowd, tags=tuple("abcdefgh" * 10)), 1)
    assert len(crowded.get("pi-1").models) == MODELS_MAX
    assert len(crowded.get("pi-1").tags) == TAGS_MAX


def test_the_thread_does_all_of_it_and_ends(tmp_path):
    bench = Bench(tmp_path, write_interval_s=0.1, refresh_interval_s=0.1)
    bench.registry.start()
    bench.hears("pi-1")
    bench.registry.set_desired("pi-2", {})
    assert bench.registry.close(30)
    assert ("pi-2", "desired") in bench.rows()
    assert [topic for topic, _ in bench.published][-1:] == [topics.desired("pi-2")]
