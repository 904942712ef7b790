"""The codec is total over hostile input: any bytes give a batch that keeps every rule, or `Rejected`.

Mutants tried, each made a test here or in `tests/contract/test_vectors.py` fail: no checksum comparison; a checksum of
the body alone; no limit on
the content size; no check for buffers compressed one by one; no `validate(full=True)`; no check of the row count.
"""

from __future__ import annotations

import struct

import msgspec
import pyarrow as pa
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from contract import batches
from contract.batches import check_batch
from contract.codec import checksum, decode_body, seal, unseal
from contract.errors import Reason, Rejected
from contract.limits import DEFAULT_LIMITS, Limits
from tests.contract.make_vectors import rows, valid
from tests.property import arrow_values

VALID = valid()
BODIES = {name: zstandard.ZstdDecompressor().decompress(body) for name, (_, body, _) in VALID.items()}


def decode(payload: bytes, limits: Limits = DEFAULT_LIMITS) -> pa.RecordBatch:
    sealed = unseal(payload)
    return decode_body(sealed.body, sealed.envelope, limits)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(Rejected):
        decode(data)


@given(st.sampled_from(sorted(VALID)), st.data())
def test_a_payload_changed_in_any_bit_of_its_body_is_refused(name: str, data: st.DataObject) -> None:
    envelope, body, _ = VALID[name]
    payload = bytearray(seal(envelope, body))
    at = data.draw(st.integers(len(payload) - len(body), len(payload) - 1))
    payload[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(Rejected) as refusal:
        decode(bytes(payload))
    assert refusal.value.reason == Reason.CHECKSUM_MISMATCH


@pytest.mark.parametrize("name", sorted(VALID))
def test_a_bit_that_flips_in_the_envelope_is_noticed_before_the_batch_is_named(name: str) -> None:
    """Else its rows would stand under another epoch too, or a good batch be stepped over for its count of rows."""
    envelope, body, _ = VALID[name]
    payload = seal(envelope, body)
    for bit in range(8 * (len(payload) - len(body))):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(Rejected):
            unseal(bytes(flipped))


@given(st.sampled_from(sorted(VALID)), st.data())
def test_a_payload_cut_anywhere_is_refused(name: str, data: st.DataObject) -> None:
    payload = seal(*VALID[name][:2])
    with pytest.raises(Rejected):
        decode(payload[: data.draw(st.integers(0, len(payload) - 1))])


@given(
    st.sampled_from(sorted(VALID)),
    st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_a_hostile_arrow_stream_gives_valid_rows_or_is_refused(name: str, changes: list[tuple[int, int]]) -> None:
    stream = bytearray(BODIES[name])
    for at, value in changes:
        stream[at % len(stream)] = value
    body = zstandard.ZstdCompressor().compress(bytes(stream))
    envelope = msgspec.structs.replace(VALID[name][0], crc32=checksum(body))
    try:
        batch = decode(seal(envelope, body))
    except Rejected:
        return
    check_batch(batch, DEFAULT_LIMITS)
    assert batch.num_rows == envelope.rows
    str(batch)


def _with_body(stream: bytes) -> bytes:
    body = zstandard.ZstdCompressor().compress(stream)
    return seal(msgspec.structs.replace(VALID["smallest"][0], crc32=checksum(body)), body)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("column", [pa.array([1] * 99), pa.array(["a" * 50] * 99).dictionary_encode()])
def test_buffers_compressed_one_by_one_are_refused_before_they_are_unpacked(codec: str, column: pa.Array) -> None:
    batch = rows(list(range(99)), x=column)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_batch(batch)
    with pytest.raises(Rejected, match="compressed one by one"):
        decode(_with_body(sink.getvalue().to_pybytes()))


def test_a_dictionary_that_would_unpack_to_gigabytes_is_refused() -> None:
    indices = pa.array([0] * 1000, pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * 1_000_000]))
    with pytest.raises(Rejected) as refusal:
        check_batch(rows(list(range(1000)), x=column), DEFAULT_LIMITS)
    assert refusal.value.reason == Reason.BODY_TOO_LARGE


def test_columns_that_share_their_bytes_are_counted_each() -> None:
    """A hostile message may let 1,000 columns point to the same half megabyte: the lake writes each of them out."""
    shared = pa.array(range(65_536), pa.int64())
    columns = {f"x{number}": shared for number in range(900)}
    with pytest.raises(Rejected) as refusal:
        check_batch(rows(list(range(65_536)), **columns), DEFAULT_LIMITS)
    assert refusal.value.reason == Reason.BODY_TOO_LARGE


@given(arrow_values.batches())
def test_rows_of_plain_numbers_take_no_more_than_is_counted_for_them(batch: pa.RecordBatch) -> None:
    """What is counted by the schema alone must never be less than what the buffers hold. Mutants tried: without `+ 1`;
    nested types as 0."""
    kept = [
        field.name
        for field in batch.schema
        if not (pa.types.is_nested(field.type) or pa.types.is_dictionary(field.type))
        and field.type not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
    ]
    plain = batch.select(kept)
    width = batches._row_bytes(plain.schema)
    assert width is not None
    assert plain.nbytes <= plain.num_rows * width + len(kept)  # a bitmap ends with a whole byte
    assert (batches._row_bytes(batch.schema) is None) == (len(kept) < batch.num_columns)


def test_a_frame_that_hides_its_content_size_is_refused() -> None:
    compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    body = compressor.compress(bytes(100)) + compressor.flush()
    envelope = msgspec.structs.replace(VALID["smallest"][0], crc32=checksum(body))
    with pytest.raises(Rejected, match="content size"):
        decode(seal(envelope, body))


def test_a_second_record_batch_is_refused() -> None:
    batch = VALID["smallest"][2]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
        writer.write_batch(batch)
    with pytest.raises(Rejected, match="exactly one record batch"):
        decode(_with_body(sink.getvalue().to_pybytes()))


@given(st.integers(1, 64), st.integers(1, 64))
@example(10, 9)
def test_row_and_payload_limits_hold_to_the_number(row_count: int, rows_max: int) -> None:
    batch = rows(list(range(row_count)), x=pa.array([1] * row_count, pa.int8()))
    limits = Limits(rows_max=rows_max)
    if row_count <= rows_max:
        check_batch(batch, limits)
    else:
        with pytest.raises(Rejected) as refusal:
            check_batch(batch, limits)
        assert refusal.value.reason == Reason.TOO_MANY_ROWS


@pytest.mark.parametrize("name", ["payload_bytes_max", "body_bytes_max", "rows_max", "fields_max"])
@pytest.mark.parametrize("value", [0, 2**40])
def test_a_limit_outside_the_protocol_is_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=name):
        Limits(**{name: value})


def _binary_with_offsets(*offsets: int) -> pa.Array:
    packed = struct.pack(f"<{len(offsets)}i", *offsets)
    return pa.Array.from_buffers(pa.binary(), len(offsets) - 1, [None, pa.py_buffer(packed), pa.py_buffer(b"abc")])


@pytest.mark.parametrize(
    ("case", "column"),
    [
        ("utf-8", pa.array([b"\xff\xff", b"ok"]).view(pa.string())),
        ("offsets", _binary_with_offsets(0, 99, 3)),
        ("index", pa.DictionaryArray.from_arrays(pa.array([7, 0], pa.int8()), pa.array(["a"]), safe=False)),
    ],
)
def test_values_that_would_crash_a_later_reader_are_refused(case: str, column: pa.Array) -> None:
    batch = rows([1, 2], x=column)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    body = zstandard.ZstdCompressor().compress(sink.getvalue())
    envelope = msgspec.structs.replace(VALID["smallest"][0], crc32=checksum(body), rows=2)
    with pytest.raises(Rejected) as refusal:
        decode(seal(envelope, body))
    assert refusal.value.reason == Reason.BAD_BODY, case


@pytest.mark.parametrize(
    "kind",
    [
        pa.timestamp("ns", "ZONE"),
        pa.dictionary(pa.int8(), pa.timestamp("ms", "ZONE")),
        pa.list_(pa.timestamp("us", "ZONE")),
        pa.struct([("at", pa.timestamp("s", "ZONE"))]),
    ],
    ids=str,
)
def test_a_zone_that_is_no_text_is_refused(kind: pa.DataType) -> None:
    """pyarrow reads it only when asked, which the lake does: the batch would stop its stream's commits."""
    batch = rows([1], x=pa.nulls(1, kind))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    stream = sink.getvalue().to_pybytes()
    assert stream.count(b"ZONE") == 1
    with pytest.raises(Rejected, match="zone is no UTF-8") as refusal:
        decode(_with_body(stream.replace(b"ZONE", b"\xff\xfe\xfd\xfc")))
    assert refusal.value.reason == Reason.UNSUPPORTED_TYPE
