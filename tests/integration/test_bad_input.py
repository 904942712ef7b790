"""Everything a device can do wrong, through a real broker into a real gateway and lake, all at once.

Each case has a device and a stream of its own, and in each of these streams a good device sends at the same time. Then
for each case: the reason, the bytes in quarantine, whether the seq was stepped over, that the same device goes on
afterwards, and that the good device of its stream noticed nothing.

Mutants tried, each found here: an unknown column type that ends the flush for all; stepping over a damaged payload; a
payload cut to some length in quarantine; an exception in the network thread; rows of 1970 in a partition of their own.
"""

from __future__ import annotations

import random
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pytest
import zstandard

from contract import topics
from contract.batches import Clock, Envelope
from contract.codec import checksum, encode_body, seal
from contract.errors import Reason
from contract.messages import Ack, Rewind, decode
from tests.integration.gateway_parts import BOOT, Devices, GatewayProcess, Lake, body_of
from tests.integration.servers import PATIENCE_S, MqttClient, wait_until

PAYLOAD_BYTES_MAX = 2 * 1024 * 1024
CLOCK = Clock(synced=True, wall_us=0, monotonic_us=0, boot=BOOT)
TS_TYPE = pa.timestamp("us", tz="UTC")
_rng = random.Random(7)


class Fate(Enum):
    """What becomes of a payload."""

    ASIDE = "aside"
    """In quarantine, not stepped over: the same seq is still wanted."""
    STEPPED_OVER = "stepped_over"
    """In quarantine, acknowledged: the next seq is wanted."""
    TAKEN = "taken"
    """Rows in the lake."""
    UNHEARD = "unheard"
    """Neither: a duplicate, or something no gateway listens to."""


class Case(NamedTuple):
    """One mistake: what the device sends as its batch 1 (or 2), and what must come of it."""

    make: Callable[[str, str], bytes]
    """(device, stream) → payload"""
    fate: Fate
    reason: Reason | None = None
    topic: Callable[[str, str], str] = topics.up
    """(device, stream) → topic"""
    before: Callable[[str, str], bytes] | None = None
    """What the device sends first, well."""


def epoch_of(device: str) -> str:
    return f"{random.Random(device).getrandbits(128):032x}"


def good(device: str, stream: str, seq: int = 1, floor: int | None = None, values: Sequence[float] = (1.0,)) -> bytes:
    return sealed(device, stream, body_of(values), len(values), seq=seq, floor=floor)


def sealed(
    device: str,
    stream: str,
    body: bytes,
    rows: int = 1,
    *,
    seq: int = 1,
    floor: int | None = None,
    crc32: int | None = None,
) -> bytes:
    crc = checksum(body) if crc32 is None else crc32
    envelope = Envelope(
        device, stream, epoch_of(device), seq, min(seq, 1) if floor is None else floor, rows, 0, CLOCK, crc
    )
    return seal(envelope, body)


def of_columns(columns: dict[str, Any], rows: int = 1) -> Callable[[str, str], bytes]:
    return of_batch(pa.record_batch(columns), rows)


def of_batch(batch: pa.RecordBatch, rows: int = 1, seq: int = 1) -> Callable[[str, str], bytes]:
    return lambda device, stream: sealed(device, stream, encode_body(batch), rows, seq=seq)


def envelope_of(**changes: Any) -> Callable[[str, str], bytes]:
    """A good payload whose envelope says something else, whatever its type."""

    def make(device: str, stream: str) -> bytes:
        body = body_of([1.0])
        fields = {
            "version": 1,
            "device": device,
            "stream": stream,
            "epoch": bytes.fromhex(epoch_of(device)),
            "seq": 1,
            "floor": 1,
            "rows": 1,
            "sent_at_us": 0,
            "clock": [True, 0, 0, bytes.fromhex(BOOT)],
            "crc32": 0,
        } | changes
        head = msgspec.msgpack.encode(list(fields.values()))
        if list(fields)[-1] == "crc32" and "crc32" not in changes:
            crc = zlib.crc32(head[:-1], checksum(body))
            head = head[:-1] + b"\xce" + crc.to_bytes(4, "big")
        return b"\x50\x2a\x4d\x18" + len(head).to_bytes(4, "little") + head + body

    return make


def flipped(at: float) -> Callable[[str, str], bytes]:
    """One bit flipped, in the body, at a part of its length."""

    def make(device: str, stream: str) -> bytes:
        data = bytearray(good(device, stream))
        start = 8 + int.from_bytes(data[4:8], "little")
        data[start + int(at * (len(data) - start - 1))] ^= 0x10
        return bytes(data)

    return make


def flipped_envelope(behind_epoch: int) -> Callable[[str, str], bytes]:
    """One bit flipped in the envelope, so many bytes behind the beginning of the epoch."""

    def make(device: str, stream: str) -> bytes:
        data = bytearray(good(device, stream))
        data[data.index(bytes.fromhex(epoch_of(device))) + behind_epoch] ^= 0x02
        return bytes(data)

    return make


def zone_of_noise(device: str, stream: str) -> bytes:
    """A timestamp whose zone is no text."""
    column = pa.array([0], pa.timestamp("s", "ZONE"))
    data = zstandard.decompress(encode_body(pa.record_batch({**NOW, "at": column})))
    return sealed(device, stream, zstandard.compress(data.replace(b"ZONE", b"\xff\xfe\xfd\xfc")))


def named(*names: str) -> pa.RecordBatch:
    arrays = [pa.array([0], TS_TYPE), *(pa.array([1.0]) for _ in names)]
    return pa.RecordBatch.from_arrays(
        arrays, schema=pa.schema([("ts", TS_TYPE), *((name, pa.float64()) for name in names)])
    )


def timed(*at_us: int | None) -> dict[str, Any]:
    return {"ts": pa.array(at_us, TS_TYPE), "x": pa.array([1.0] * len(at_us))}


NOW = {"ts": pa.array([1_700_000_000_000_000], TS_TYPE)}
UNIONS = pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1.0])])
YEAR_2262_US = 9_223_286_400_000_000
BOMB = zstandard.ZstdCompressor(level=19).compress(bytes(60 * 1024 * 1024))
LYING_BOMB = zstandard.ZstdCompressor(level=19).compress(bytes(65 * 1024 * 1024))
RANDOM = _rng.randbytes(4_000)
LARGE = _rng.randbytes(PAYLOAD_BYTES_MAX + 1)

CASES = {
    "empty-payload": Case(lambda d, s: b"", Fate.ASIDE, Reason.NOT_A_PAYLOAD),
    "random-bytes": Case(lambda d, s: RANDOM, Fate.ASIDE, Reason.NOT_A_PAYLOAD),
    "json": Case(lambda d, s: b'{"ts": 1, "x": 2}', Fate.ASIDE, Reason.NOT_A_PAYLOAD),
    "cut-in-envelope": Case(lambda d, s: good(d, s)[:30], Fate.ASIDE, Reason.NOT_A_PAYLOAD),
    "cut-in-body": Case(lambda d, s: good(d, s)[:-20], Fate.ASIDE, Reason.CHECKSUM_MISMATCH),
    "no-body": Case(lambda d, s: sealed(d, s, b""), Fate.STEPPED_OVER, Reason.BAD_BODY),
    "more-behind": Case(lambda d, s: good(d, s) + b"more", Fate.ASIDE, Reason.CHECKSUM_MISMATCH),
    "flip-first": Case(flipped(0.0), Fate.ASIDE, Reason.CHECKSUM_MISMATCH),
    "flip-middle": Case(flipped(0.5), Fate.ASIDE, Reason.CHECKSUM_MISMATCH),
    "flip-last": Case(flipped(1.0), Fate.ASIDE, Reason.CHECKSUM_MISMATCH),
    "body-of-noise": Case(lambda d, s: sealed(d, s, RANDOM), Fate.STEPPED_OVER, Reason.BAD_BODY),
    "bomb": Case(lambda d, s: sealed(d, s, BOMB), Fate.STEPPED_OVER, Reason.BAD_BODY),
    "larger-bomb": Case(lambda d, s: sealed(d, s, LYING_BOMB), Fate.STEPPED_OVER, Reason.BODY_TOO_LARGE),
    "over-the-limit": Case(lambda d, s: sealed(d, s, LARGE), Fate.STEPPED_OVER, Reason.PAYLOAD_TOO_LARGE),
    "noise-over-the-limit": Case(lambda d, s: LARGE, Fate.ASIDE, Reason.NOT_A_PAYLOAD),
    "other-device": Case(lambda d, s: good("somebody-else", s), Fate.ASIDE, Reason.TOPIC_MISMATCH),
    "other-stream": Case(lambda d, s: good(d, "elsewhere"), Fate.ASIDE, Reason.TOPIC_MISMATCH),
    "flip-in-epoch": Case(flipped_envelope(0), Fate.ASIDE, Reason.CHECKSUM_MISMATCH),
    "flip-in-rows": Case(flipped_envelope(18), Fate.ASIDE, Reason.CHECKSUM_MISMATCH),
    "version-2": Case(envelope_of(version=2), Fate.ASIDE, Reason.UNKNOWN_VERSION),
    "checksum-of-body": Case(envelope_of(crc32=2**31), Fate.ASIDE, Reason.CHECKSUM_MISMATCH),
    "version-text": Case(envelope_of(version="1"), Fate.ASIDE, Reason.BAD_ENVELOPE),
    "envelope-one-more": Case(envelope_of(more=1), Fate.ASIDE, Reason.BAD_ENVELOPE),
    "epoch-short": Case(envelope_of(epoch=b"short"), Fate.ASIDE, Reason.BAD_ENVELOPE),
    "seq-negative": Case(envelope_of(seq=-1, floor=-1), Fate.ASIDE, Reason.BAD_SEQ),
    "seq-zero": Case(envelope_of(seq=0, floor=0), Fate.ASIDE, Reason.BAD_SEQ),
    "seq-too-large": Case(envelope_of(seq=2**53, floor=2**53), Fate.ASIDE, Reason.BAD_SEQ),
    "seq-huge": Case(envelope_of(seq=2**64 - 1), Fate.ASIDE, Reason.BAD_SEQ),
    "seq-no-number": Case(envelope_of(seq=1.5), Fate.ASIDE, Reason.BAD_ENVELOPE),
    "floor-above": Case(envelope_of(seq=1, floor=2), Fate.ASIDE, Reason.BAD_SEQ),
    "seq-repeated": Case(lambda d, s: good(d, s, values=[9.0]), Fate.UNHEARD, before=good),
    "seq-far-ahead": Case(lambda d, s: good(d, s, seq=2**53 - 1, floor=1), Fate.UNHEARD, before=good),
    "empty-batch": Case(
        of_batch(pa.RecordBatch.from_pylist([], named("x").schema), 0), Fate.STEPPED_OVER, Reason.EMPTY_BATCH
    ),
    "rows-differ": Case(of_columns(timed(0, 1), rows=1), Fate.STEPPED_OVER, Reason.ROW_COUNT_MISMATCH),
    "too-many-rows": Case(of_columns(timed(*range(65_537)), 65_537), Fate.STEPPED_OVER, Reason.TOO_MANY_ROWS),
    "columns-2000": Case(of_batch(named(*(f"c{n}" for n in range(2_000)))), Fate.STEPPED_OVER, Reason.TOO_MANY_FIELDS),
    "type-conflict": Case(of_columns({**NOW, "x": pa.array(["text"])}), Fate.STEPPED_OVER, Reason.TYPE_CONFLICT),
    "case-conflict": Case(of_columns({**NOW, "X": pa.array([1.0])}), Fate.STEPPED_OVER, Reason.NAME_CONFLICT),
    "dictionary-of-null": Case(
        of_columns({**NOW, "x": pa.DictionaryArray.from_arrays(pa.array([None], pa.int8()), pa.nulls(0))}),
        Fate.STEPPED_OVER,
        Reason.UNSUPPORTED_TYPE,
    ),
    "zone-of-noise": Case(zone_of_noise, Fate.STEPPED_OVER, Reason.UNSUPPORTED_TYPE),
    "union": Case(of_columns({**NOW, "x": UNIONS}), Fate.STEPPED_OVER, Reason.UNSUPPORTED_TYPE),
    "name-empty": Case(of_batch(named("")), Fate.STEPPED_OVER, Reason.BAD_FIELD_NAME),
    "name-300-bytes": Case(of_batch(named("n" * 300)), Fate.STEPPED_OVER, Reason.BAD_FIELD_NAME),
    "name-control": Case(of_batch(named("a\nb")), Fate.STEPPED_OVER, Reason.BAD_FIELD_NAME),
    "name-twice": Case(of_batch(named("y", "y")), Fate.STEPPED_OVER, Reason.DUPLICATE_FIELD),
    "name-by-case": Case(of_batch(named("speed", "Speed")), Fate.STEPPED_OVER, Reason.DUPLICATE_FIELD),
    "row-numbers-float": Case(of_batch(named("x", "_row")), Fate.STEPPED_OVER, Reason.BAD_ROW_NUMBERS),
    "names-like-paths": Case(
        of_columns({**NOW, "x": pa.array([1.0]), "a": pa.array([{"b": "x"}]), "a.b": pa.array([1])}), Fate.TAKEN
    ),
    "names-reserved": Case(of_batch(named("x", "date", "_device", "_seq")), Fate.TAKEN),
    "ts-missing": Case(of_columns({"x": pa.array([1.0])}), Fate.STEPPED_OVER, Reason.BAD_TS),
    "ts-null": Case(of_columns(timed(0, None), 2), Fate.STEPPED_OVER, Reason.BAD_TS),
    "ts-naive": Case(
        of_columns({"ts": pa.array([0], pa.timestamp("us")), "x": pa.array([1.0])}), Fate.STEPPED_OVER, Reason.BAD_TS
    ),
    "ts-1970": Case(of_columns(timed(0)), Fate.TAKEN),
    "ts-2262": Case(of_columns(timed(YEAR_2262_US)), Fate.TAKEN),
    "ts-ends-of-time": Case(of_columns(timed(-(2**63), 2**63 - 1), 2), Fate.TAKEN),
    "topic-shard": Case(good, Fate.ASIDE, Reason.BAD_TOPIC, lambda d, s: f"hw/v1/up/99/{d}/{s}"),
    "topic-other-shard": Case(
        good,
        Fate.ASIDE,
        Reason.BAD_TOPIC,
        lambda d, s: f"hw/v1/up/{(topics.parse_up(topics.up(d, s)).shard + 1) % 64}/{d}/{s}",
    ),
    "topic-umlaut": Case(good, Fate.ASIDE, Reason.BAD_TOPIC, lambda d, s: f"hw/v1/up/5/Größe-{d}/{s}"),
    "topic-space": Case(good, Fate.ASIDE, Reason.BAD_TOPIC, lambda d, s: f"hw/v1/up/5/a {d}/{s}"),
    "topic-empty-level": Case(good, Fate.ASIDE, Reason.BAD_TOPIC, lambda d, s: f"hw/v1/up/5//{s}-empty-level"),
    "topic-emoji": Case(good, Fate.ASIDE, Reason.BAD_TOPIC, lambda d, s: f"hw/v1/up/5/{d}/\U0001f525{s}"),
    "topic-quote": Case(good, Fate.ASIDE, Reason.BAD_TOPIC, lambda d, s: f"hw/v1/up/5/{d}/'; DROP TABLE {s}--"),
    "topic-long": Case(good, Fate.ASIDE, Reason.BAD_TOPIC, lambda d, s: f"hw/v1/up/5/{d}/{'l' * 5_000}"),
    "topic-deeper": Case(good, Fate.UNHEARD, None, lambda d, s: f"hw/v1/up/5/{d}/{s}/more"),
}


class Aftermath(NamedTuple):
    """What was found when everything had been sent."""

    gateway: GatewayProcess
    lake: Lake
    quarantine: list[dict[str, Any]]
    sent: dict[str, tuple[str, bytes]]
    """case → topic and payload"""
    acked: dict[str, int]
    """case → watermark the bad device was told, after its mistake and before what followed"""
    rewound: set[str]
    good: dict[str, Devices]
    metrics: dict[str, float]


class Ears:
    """What devices are told."""

    def __init__(self, broker: str) -> None:
        self.client = MqttClient(broker, "ears")
        self.client.subscribe("hw/v1/ack/+")
        self.client.subscribe("hw/v1/rewind/+", qos=0)
        self.acked: dict[str, int] = {}
        self.rewound: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._stop.is_set():
            if self.client.messages.empty():
                self._stop.wait(0.01)
                continue
            message = self.client.messages.get()
            device = message.topic.rpartition("/")[2]
            if message.topic.startswith("hw/v1/rewind/"):
                decode(message.payload, Rewind)
                self.rewound.add(device)
            else:
                marks = {mark.epoch: mark.seq for mark in decode(message.payload, Ack).committed}
                self.acked[device] = marks.get(epoch_of(device), 0)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)
        self.client.close()


def device_of(case: str) -> str:
    return f"bad-{case}"


def stream_of(case: str) -> str:
    return f"s-{case}"


@pytest.fixture(scope="module")
def aftermath(shared_servers, tmp_path_factory) -> Iterator[Aftermath]:
    folder = tmp_path_factory.mktemp("bad-input")
    broker = shared_servers.mosquitto("bad-input-broker")
    settings = {"limits": {"payload_bytes_max": PAYLOAD_BYTES_MAX}, "streams_max": 200}
    ears = Ears(broker.url)
    good_devices = {name: Devices(broker.url, [f"good-{name}"], rows=3, stream=stream_of(name)) for name in CASES}
    with GatewayProcess(folder, broker.url, {"url": f"file://{folder}/lake", "fsync": False}, **settings) as gateway:
        try:
            for devices in good_devices.values():
                devices.__enter__()
                devices.append_all(2)
            sent = {}
            with MqttClient(broker.url, "villain") as villain:
                # Everyone's table exists, so that what contradicts it does so.
                for devices in good_devices.values():
                    devices.wait_drained()
                for name, case in CASES.items():
                    if case.before is not None:
                        device, stream = device_of(name), stream_of(name)
                        villain.publish(topics.up(device, stream), case.before(device, stream))
                        wait_until(
                            lambda name=name: ears.acked.get(device_of(name)), PATIENCE_S, f"{name}: first batch"
                        )
                for name, case in CASES.items():
                    good_devices[name].append_all(2)
                    device, stream = device_of(name), stream_of(name)
                    sent[name] = case.topic(device, stream), case.make(device, stream)
                    villain.publish(*sent[name])
                    good_devices[name].append_all(2)
                for devices in good_devices.values():
                    devices.wait_drained()
                lake = Lake.local(folder / "lake")
                kept = sum(case.reason is not None for case in CASES.values())
                wait_until(lambda: len(lake.quarantine()) >= kept, PATIENCE_S, "everything refused is in quarantine")
                known = {name for name, case in CASES.items() if case.fate in (Fate.TAKEN, Fate.STEPPED_OVER)}
                wait_until(lambda: all(ears.acked.get(device_of(name)) for name in known), PATIENCE_S, "acknowledged")
                acked = {name: ears.acked.get(device_of(name), 0) for name in CASES}
                # A lesson learned: each bad device goes on with a good batch, in place of the bad one or behind it.
                for name in CASES:
                    device, stream = device_of(name), stream_of(name)
                    villain.publish(topics.up(device, stream), good(device, stream, seq=acked[name] + 1, values=[42.0]))
                for name in CASES:
                    wait_until(
                        lambda name=name: ears.acked.get(device_of(name), 0) == acked[name] + 1,
                        PATIENCE_S,
                        f"{name}: the device goes on",
                    )
            yield Aftermath(
                gateway, lake, lake.quarantine(), sent, acked, ears.rewound, good_devices, gateway.metrics()
            )
        finally:
            for devices in good_devices.values():
                devices.__exit__(None, None, None)
            ears.close()


@pytest.mark.parametrize("name", CASES)
def test_each_mistake_has_its_reason_and_the_bytes_are_kept_whole(aftermath, name):
    case = CASES[name]
    topic, data = aftermath.sent[name]
    records = [record for record in aftermath.quarantine if record["topic"] == topic]
    if case.reason is None:
        assert records == []
        return
    [record] = records
    assert record["reason"] == case.reason
    assert record["payload"] == data
    assert len(record["message"]) > 20
    if case.fate is Fate.STEPPED_OVER:
        assert (record["device"], record["stream"]) == (device_of(name), stream_of(name))
        assert (record["epoch"], record["seq"]) == (epoch_of(device_of(name)), 1)
    else:
        assert (record["epoch"], record["seq"]) == (None, None)


@pytest.mark.parametrize("name", CASES)
def test_only_what_names_its_batch_is_stepped_over(aftermath, name):
    case = CASES[name]
    expected = {Fate.ASIDE: 0, Fate.STEPPED_OVER: 1, Fate.TAKEN: 1, Fate.UNHEARD: 0 if case.before is None else 1}
    assert aftermath.acked[name] == expected[case.fate]


@pytest.mark.parametrize("name", CASES)
def test_of_a_mistake_no_row_is_in_the_lake_and_the_device_goes_on(aftermath, name):
    case = CASES[name]
    rows = aftermath.lake.read(f"raw/{stream_of(name)}").filter(pa.compute.field("_device") == device_of(name))
    stored = [1] if case.fate is Fate.TAKEN or case.before is not None else []
    assert sorted(set(rows["_seq"].to_pylist())) == [*stored, aftermath.acked[name] + 1]


@pytest.mark.parametrize("name", CASES)
def test_a_good_device_of_the_same_stream_notices_nothing(aftermath, name):
    aftermath.good[name].check(aftermath.lake)


def test_messages_name_the_thing_the_value_and_a_remedy(aftermath):
    by_reason: dict[str, str] = {}
    for record in aftermath.quarantine:
        by_reason[record["reason"]] = by_reason.get(record["reason"], "") + record["message"]
    for reason, words in {
        "type_conflict": ["'x'", "string", "double"],
        "too_many_fields": ["2001", "split"],
        "payload_too_large": [str(PAYLOAD_BYTES_MAX), "smaller"],
        "topic_mismatch": ["elsewhere", "own topic"],
        "unknown_version": ["version 2", "update"],
    }.items():
        for word in words:
            assert word in by_reason[reason], by_reason[reason]


def test_every_mistake_is_counted_by_its_reason(aftermath):
    for reason in {case.reason for case in CASES.values() if case.reason}:
        expected = sum(case.reason is reason for case in CASES.values())
        assert aftermath.metrics[f'quarantined_total{{reason="{reason}"}}'] == expected
        if reason not in (Reason.TYPE_CONFLICT, Reason.NAME_CONFLICT):  # those are found when committing
            assert aftermath.metrics[f'refused_total{{reason="{reason}"}}'] == expected
    stepped_over = sum(case.fate is Fate.STEPPED_OVER for case in CASES.values())
    assert aftermath.metrics["stepped_over_total"] == stepped_over
    assert aftermath.metrics["quarantine_dropped_total"] == 0
    # 1970 and 2262, and both ends of time.
    assert aftermath.metrics["skewed_rows_total"] >= 4


def test_no_mistake_is_a_bug_of_ours_and_nothing_is_left_behind(aftermath):
    assert not [name for name, count in aftermath.metrics.items() if name.startswith("faults_total") and count]
    assert aftermath.metrics["pending_bytes"] == 0
    assert aftermath.metrics["isolated_lanes"] == 0
    assert aftermath.gateway.get("/readyz")[0] == 200
    assert aftermath.gateway.get("/healthz")[0] == 200


def test_ts_far_from_now_keeps_its_value_and_stands_under_the_day_it_arrived(aftermath):
    for name, values in (("ts-1970", [0]), ("ts-2262", [YEAR_2262_US])):
        rows = aftermath.lake.read(f"raw/{stream_of(name)}").filter(pa.compute.field("_device") == device_of(name))
        first = rows.filter(pa.compute.field("_seq") == 1)
        assert first["ts"].cast(pa.int64()).to_pylist() == values
        assert first["date"].to_pylist() == [first["_received_at"][0].as_py().date()]


def test_a_batch_far_ahead_asks_for_a_rewind_and_a_repeat_does_not(aftermath):
    assert device_of("seq-far-ahead") in aftermath.rewound
    assert device_of("seq-repeated") not in aftermath.rewound
    rows = aftermath.lake.read(f"raw/{stream_of('seq-repeated')}")
    mine = rows.filter(pa.compute.field("_device") == device_of("seq-repeated"))
    assert mine.filter(pa.compute.field("_seq") == 1)["x"].to_pylist() == [1.0]
