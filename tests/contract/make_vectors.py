"""Writes the protocol's test vectors: `python -m tests.contract.make_vectors` (from the project's root).

Each valid vector is `<name>.payload`, the exact bytes on the wire, beside `<name>.json`: the envelope, the fields, and
Each valid vector is `<name>.payload`, the bytes on the wire, beside `<name>.json`: the envelope, the fields, and
reason each is refused for. `names.json` has shards, names and topics.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import zstandard

from contract.batches import Clock, Envelope
from contract.codec import checksum, encode_body, seal
from contract.names import shard_of
from contract.topics import up

VECTORS = Path(__file__).parent / "vectors"
EPOCH = "000102030405060708090a0b0c0d0e0f"
CLOCK = Clock(synced=True, wall_us=1_790_000_000_000_000, monotonic_us=123_456_789, boot="f0" * 16)
UNSYNCED = Clock(synced=False, wall_us=12_000_000, monotonic_us=12_000_000, boot="0f" * 16)
T0 = 1_790_000_000_000_000


def plain(array: pa.Array) -> list[Any]:
    """An array's values as JSON, exact in every language.

    Floats are hex of their IEEE 754 bits, 64-bit integers and decimals strings, times their integer in the type's own
    unit, binary hex, structs and maps lists of pairs, null null.
    """
    kind = array.type
    if pa.types.is_dictionary(kind):
        return plain(array.dictionary_decode())
    if pa.types.is_floating(kind):
        size = kind.bit_width // 8
        bits = memoryview(array.buffers()[1])[array.offset * size : (array.offset + len(array)) * size]
        values = [int.from_bytes(bits[i * size : (i + 1) * size], "little") for i in range(len(array))]
        return [f"{value:0{size * 2}x}" if array[i].is_valid else None for i, value in enumerate(values)]
    if pa.types.is_struct(kind):
        columns = [[child.name, plain(array.field(i))] for i, child in enumerate(kind)]
        return [
            [[name, column[i]] for name, column in columns] if array[i].is_valid else None for i in range(len(array))
        ]
    if pa.types.is_map(kind):
        return [
            [[k, v] for k, v in zip(plain(s.values.field(0)), plain(s.values.field(1)), strict=True)]
            if s.is_valid
            else None
            for s in array
        ]
    if pa.types.is_nested(kind):
        return [plain(s.values) if s.is_valid else None for s in array]
    if pa.types.is_temporal(kind):
        width = pa.int32() if kind.bit_width == 32 else pa.int64()
        return [None if v is None else str(v) for v in array.view(width).to_pylist()]
    if pa.types.is_decimal(kind) or pa.types.is_int64(kind) or pa.types.is_uint64(kind):
        return [None if v is None else str(v) for v in array.to_pylist()]
    return [v.hex() if isinstance(v, bytes) else v for v in array.to_pylist()]


def rows(ts: list[int], **columns: pa.Array) -> pa.RecordBatch:
    """A record batch with `ts` in microseconds."""
    stamps = pa.array(ts, type=pa.timestamp("us", tz="UTC"))
    return pa.RecordBatch.from_arrays([stamps, *columns.values()], names=["ts", *columns])


def every_type() -> pa.RecordBatch:
    """Three rows of every type that is carried: an ordinary value, an extreme one, null."""
    nan32 = struct.unpack("<f", bytes.fromhex("010080ff"))[0]
    columns: dict[str, pa.Array] = {
        "null": pa.nulls(3),
        "bool": pa.array([True, False, None]),
        "float32": pa.array([1.5, -0.0, None], pa.float32()),
        "float32_inf": pa.array([nan32, float("-inf"), None], pa.float32()),
        "float64": pa.array([0.1, -0.0, None], pa.float64()),
        "float16": pa.array([1.5, 65504.0, None], pa.float32()).cast(pa.float16()),
        "string": pa.array(["grün", "", None]),
        "large_string": pa.array(["a", "", None], pa.large_string()),
        "binary": pa.array([b"\x00\xff", b"", None]),
        "fixed": pa.array([b"\x00\xff", b"\x01\x02", None], pa.binary(2)),
        "date32": pa.array([0, 2**31 - 1, None], pa.int32()).view(pa.date32()),
        "decimal": pa.array(["1.25", "-99999.99", None]).cast(pa.decimal128(7, 2)),
        "duration_ns": pa.array([1, -(2**63), None], pa.int64()).view(pa.duration("ns")),
        "time64_us": pa.array([1, 86_399_999_999, None], pa.int64()).view(pa.time64("us")),
        "dictionary": pa.array(["on", "off", None]).dictionary_encode(),
        "list": pa.array([[1, None], [], None], pa.list_(pa.int16())),
        "fixed_list": pa.array([[1, 2], [3, None], None], pa.list_(pa.int8(), 2)),
        "struct": pa.array([{"a": 1, "b": "x"}, {"a": None, "b": ""}, None]),
        "map": pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int32())),
    }
    for bits in (8, 16, 32, 64):
        signed, unsigned = getattr(pa, f"int{bits}")(), getattr(pa, f"uint{bits}")()
        columns[f"int{bits}"] = pa.array([1, -(2 ** (bits - 1)), None], signed)
        columns[f"uint{bits}"] = pa.array([1, 2**bits - 1, None], unsigned)
    for unit in ("s", "ms", "us", "ns"):
        columns[f"timestamp_{unit}"] = pa.array([T0, -(2**63), None], pa.int64()).view(pa.timestamp(unit))
    columns["timestamp_zone"] = pa.array([T0, 0, None], pa.int64()).view(pa.timestamp("us", tz="Europe/Berlin"))
    return rows([T0, T0 + 1, T0 + 2], **columns)


def valid() -> dict[str, tuple[Envelope, bytes, pa.RecordBatch]]:
    """Name → envelope, body, rows."""
    floats = [pa.array([0.5 * i, -1.25 * i], pa.float32()) for i in (1, 2, 3)]
    batches = {
        "smallest": (rows([T0], x=pa.array([1], pa.int8())), 1, 1, CLOCK),
        "acceleration": (rows([T0, T0 + 20_000], ax=floats[0], ay=floats[1], az=floats[2]), 5, 3, CLOCK),
        "every_type": (every_type(), 2, 1, CLOCK),
        "thinned": (
            rows([T0, T0 + 10, T0 + 13], _row=pa.array([0, 10, 13], pa.int32()), x=pa.array([1.0, 2.0, 3.0])),
            7,
            7,
            CLOCK,
        ),
        "clock_not_synchronised": (rows([12_000_000], x=pa.array([1], pa.int8())), 1, 1, UNSYNCED),
        "highest_seq": (rows([T0], x=pa.array([1], pa.int8())), 2**53 - 1, 2**53 - 1, CLOCK),
    }
    made = {}
    for name, (batch, seq, floor, clock) in batches.items():
        body = encode_body(batch)
        envelope = Envelope(
            "pi-1", "vibration", EPOCH, seq, floor, batch.num_rows, T0 + 5_000_000, clock, checksum(body)
        )
        made[name] = (envelope, body, batch)
    return made


def _members(envelope: Envelope, version: int, crc: int) -> list[Any]:
    clock = envelope.clock
    clocks = [clock.synced, clock.wall_us, clock.monotonic_us, bytes.fromhex(clock.boot)]
    names = [envelope.device, envelope.stream, bytes.fromhex(envelope.epoch)]
    return [version, *names, envelope.seq, envelope.floor, envelope.rows, envelope.sent_at_us, clocks, crc]


def _framed(members: list[Any], body: bytes) -> bytes:
    head = msgspec.msgpack.encode(members)
    return struct.pack("<II", 0x184D2A50, len(head)) + head + body


def _with_small_checksum(envelope: Envelope, body: bytes) -> bytes:
    """A checksum below 2^16, in the three bytes that MessagePack has for it."""
    for sent_at_us in range(envelope.sent_at_us, envelope.sent_at_us + 1_000_000):
        members = _members(msgspec.structs.replace(envelope, sent_at_us=sent_at_us), 1, 0)
        crc = zlib.crc32(msgspec.msgpack.encode(members)[:-1], envelope.crc32)
        if crc < 2**16:
            return _framed([*members[:-1], crc], body)
    raise AssertionError("no checksum is small")


def invalid() -> dict[str, tuple[str, bytes]]:
    """Name → reason, payload."""
    envelope, body, _ = valid()["acceleration"]
    good = seal(envelope, body)

    def with_envelope(**changes: Any) -> bytes:
        return seal(msgspec.structs.replace(envelope, **changes), body)

    def with_body(other: bytes, **changes: Any) -> bytes:
        return seal(msgspec.structs.replace(envelope, crc32=zlib.crc32(other), **changes), other)

    def with_rows(batch: pa.RecordBatch) -> bytes:
        return with_body(encode_body(batch), rows=max(1, batch.num_rows))

    one = pa.array([1], pa.int8())
    head_start = 8
    version_2 = bytearray(good)
    version_2[head_start + 1] = 2

    def flipped(name: bytes, bit: int) -> bytes:
        """A bit flipped in a member of the envelope that contains `name`."""
        data = bytearray(good)
        data[good.index(name)] ^= bit
        return bytes(data)

    zeros = zstandard.ZstdCompressor(level=19).compress(bytes(65 * 1024 * 1024))
    return {
        "empty": ("not_a_payload", b""),
        "json": ("not_a_payload", b'{"ts": 1, "x": 2}'),
        "envelope_cut": ("not_a_payload", good[:40]),
        "body_cut": ("checksum_mismatch", good[:-1]),
        "bit_flipped": ("checksum_mismatch", good[:-3] + bytes([good[-3] ^ 0x10]) + good[-2:]),
        "bit_flipped_in_epoch": ("checksum_mismatch", flipped(bytes.fromhex(EPOCH), 1)),
        "bit_flipped_in_device": ("checksum_mismatch", flipped(b"pi-1", 1)),
        "checksum_of_the_body_alone": ("checksum_mismatch", _framed(_members(envelope, 1, envelope.crc32), body)),
        "checksum_not_uint_32": ("bad_envelope", _with_small_checksum(envelope, body)),
        "version_2": ("unknown_version", bytes(version_2)),
        "envelope_not_an_array": ("bad_envelope", struct.pack("<II", 0x184D2A50, 1) + b"\x01" + body),
        "seq_0": ("bad_seq", with_envelope(seq=0)),
        "seq_negative": ("bad_seq", with_envelope(seq=-1)),
        "seq_too_high": ("bad_seq", with_envelope(seq=2**53, floor=1)),
        "floor_above_seq": ("bad_seq", with_envelope(floor=6)),
        "device_upper_case": ("bad_envelope", with_envelope(device="Pi-1")),
        "rows_differ": ("row_count_mismatch", with_envelope(rows=3)),
        "body_not_zstd": ("bad_body", with_body(b"not zstd at all")),
        "body_not_arrow": ("bad_body", with_body(zstandard.ZstdCompressor().compress(b"not arrow at all"))),
        "bomb": ("body_too_large", with_body(zeros)),
        "no_rows": ("empty_batch", with_rows(rows([], x=pa.array([], pa.int8())))),
        "no_ts": ("bad_ts", with_rows(pa.RecordBatch.from_arrays([one], names=["x"]))),
        "ts_null": ("bad_ts", with_rows(rows([None], x=one))),  # type: ignore[list-item]
        "ts_in_seconds": (
            "bad_ts",
            with_rows(pa.RecordBatch.from_arrays([pa.array([1], pa.timestamp("s", tz="UTC")), one], names=["ts", "x"])),
        ),
        "no_fields": ("empty_batch", with_rows(rows([T0]))),
        "field_name_empty": ("bad_field_name", with_rows(rows([T0], **{"": one}))),
        "field_name_long": ("bad_field_name", with_rows(rows([T0], **{"x" * 300: one}))),
        "fields_differ_by_case": ("duplicate_field", with_rows(rows([T0], Temp=one, temp=one))),
        "row_numbers_reserved": ("bad_row_numbers", with_rows(rows([T0], _row=pa.array(["a"]), x=one))),
        "too_many_fields": ("too_many_fields", with_rows(rows([T0], **{f"f{i}": one for i in range(2000)}))),
    }


def main() -> None:
    """Write every vector anew."""
    VECTORS.mkdir(exist_ok=True)
    for name, (envelope, body, batch) in valid().items():
        (VECTORS / f"{name}.payload").write_bytes(seal(envelope, body))
        described = {
            "envelope": msgspec.to_builtins(envelope),
            "fields": [[field.name, str(field.type)] for field in batch.schema],
            "columns": {field.name: plain(batch.column(field.name)) for field in batch.schema},
        }
        (VECTORS / f"{name}.json").write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n")
    refused = {name: {"reason": reason, "payload": data.hex()} for name, (reason, data) in invalid().items()}
    (VECTORS / "invalid.json").write_text(json.dumps(refused, indent=1) + "\n")
    devices = ["pi-1", "a", "watch-s01-l", "0.0_0-0", "z" * 63]
    names = {
        "shards": {device: shard_of(device) for device in devices},
        "topics": {device: up(device, "vibration") for device in devices},
        "good_names": [*devices, "headwater.events"],
        "bad_names": ["", "-a", ".a", "A", "a/b", "a+b", "a#", "a b", "ä", "z" * 64, "a\n"],
    }
    (VECTORS / "names.json").write_text(json.dumps(names, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
