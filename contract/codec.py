"""Payload ⇄ envelope and record batch, byte for byte as the protocol text in `contract` says.

Everything here is total over hostile input: any bytes give either a value or `Rejected`, in bounded memory.
"""

from __future__ import annotations

import functools
import itertools
import struct
import threading
import zlib
from typing import NamedTuple

import msgspec
import pyarrow as pa
import zstandard

from contract.batches import Clock, Envelope, check_envelope, check_rows, check_schema
from contract.errors import Reason, Rejected
from contract.limits import ENVELOPE_BYTES_MAX, PROTOCOL_VERSION, SCHEMA_BYTES_MAX, Limits

SKIPPABLE_MAGIC = 0x184D2A50
"""First of the sixteen magic numbers of zstd skippable frames (RFC 8878, section 3.1.2)."""
_HEADER = struct.Struct("<II")
_CRC = struct.Struct(">BI")
_UINT_32 = 0xCE
"""MessagePack: an unsigned integer of four bytes follows."""
_TEN_MEMBERS = b"\x9a"
"""MessagePack: an array of ten members follows."""


class Sealed(NamedTuple):
    """A payload taken apart: the envelope, checked, and the body, still encoded."""

    envelope: Envelope
    body: bytes


class _WireClock(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    synced: bool
    wall_us: int
    monotonic_us: int
    boot: bytes


class _WireHead(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An envelope but for its checksum."""

    version: int
    device: str
    stream: str
    epoch: bytes
    seq: int
    floor: int
    rows: int
    sent_at_us: int
    clock: _WireClock


class _WireEnvelope(_WireHead, frozen=True, array_like=True, forbid_unknown_fields=True):
    crc32: int


class _WireVersion(msgspec.Struct, frozen=True, array_like=True):
    version: int


_kept = threading.local()
_encode_envelope = msgspec.msgpack.Encoder().encode
_decode_envelope = msgspec.msgpack.Decoder(_WireEnvelope).decode
_decode_version = msgspec.msgpack.Decoder(_WireVersion).decode


def encode_body(batch: pa.RecordBatch, *, level: int = 1) -> bytes:
    """Encode a record batch as a body: one zstd frame around one Arrow IPC stream.

    Args:
        batch: rows with `ts: timestamp[us, tz=UTC]` and the stream's fields.
        level: zstd level, 1 to 19. Level 1 is within 1 % of level 9 on measured series.

    Returns:
        The bytes that a buffer stores and a broker carries.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    compressor = zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False)
    return compressor.compress(memoryview(sink.getvalue()))


def checksum(body: bytes) -> int:
    """CRC-32 of a body, as its envelope carries it."""
    return zlib.crc32(body)


def seal(envelope: Envelope, body: bytes) -> bytes:
    """Put an envelope in front of a body.

    Returns:
        The payload to publish: a zstd skippable frame holding the envelope in MessagePack, then the body.
    """
    clock = envelope.clock
    written = _encode_envelope(
        _WireHead(
            PROTOCOL_VERSION,
            envelope.device,
            envelope.stream,
            bytes.fromhex(envelope.epoch),
            envelope.seq,
            envelope.floor,
            envelope.rows,
            envelope.sent_at_us,
            _WireClock(clock.synced, clock.wall_us, clock.monotonic_us, bytes.fromhex(clock.boot)),
        )
    )
    head = _TEN_MEMBERS + written[1:]
    crc = _CRC.pack(_UINT_32, zlib.crc32(head, envelope.crc32))
    return b"".join((_HEADER.pack(SKIPPABLE_MAGIC, len(head) + len(crc)), head, crc, body))


def unseal(payload: bytes) -> Sealed:
    """Take a payload apart: read and check its envelope, verify the checksum; the body stays encoded.

    A payload that passes names its batch beyond doubt. So what `decode_body` then refuses was made wrong by the device:
    sending it again cannot help, and its seq may be stepped over. What is refused here must not be stepped over.

    Raises:
        Rejected: when the payload is not one of the protocol, its envelope breaks a rule, or envelope and body are not
            as they were sealed.
    """
    wire, start = _read_envelope(payload)
    body = payload[start:]
    head, kind = payload[_HEADER.size : start - _CRC.size], payload[start - _CRC.size]
    if kind != _UINT_32:
        raise Rejected(Reason.BAD_ENVELOPE, f"the checksum begins with {kind:02x}, not ce: write it as uint 32")
    crc = zlib.crc32(body)
    found = zlib.crc32(head, crc)
    if found != wire.crc32:
        raise Rejected(
            Reason.CHECKSUM_MISMATCH,
            f"envelope and body of {len(body)} bytes have CRC-32 {found:08x}, the envelope says {wire.crc32:08x}; "
            "they were damaged or cut on the way: send them again",
        )
    clock = wire.clock
    envelope = Envelope(
        wire.device,
        wire.stream,
        wire.epoch.hex(),
        wire.seq,
        wire.floor,
        wire.rows,
        wire.sent_at_us,
        Clock(clock.synced, clock.wall_us, clock.monotonic_us, clock.boot.hex()),
        crc,
    )
    check_envelope(envelope)
    return Sealed(envelope, body)


def decode_body(body: bytes, envelope: Envelope, limits: Limits) -> pa.RecordBatch:
    """Decode and check a body.

    Args:
        body: the second part of a payload.
        envelope: the first part, already checked.
        limits: what one batch may be.

    Returns:
        The rows exactly as the device encoded them.

    Raises:
        Rejected: when the bytes are not one Arrow stream of one record batch in one zstd frame, or the batch breaks
            a rule.

    Bodies whose schemas are written alike share one schema object.
    """
    if len(body) > limits.payload_bytes_max:
        raise Rejected(
            Reason.PAYLOAD_TOO_LARGE,
            f"body of {len(body)} bytes, more than {limits.payload_bytes_max}; send smaller batches",
        )
    stream = _decompress(body, limits)
    try:
        batch = _read_stream(stream, limits)
        batch.validate(full=True)
    except (
        pa.ArrowException,
        ValueError,
        TypeError,
        OSError,
        struct.error,
        OverflowError,
        UnicodeDecodeError,
    ) as error:
        raise Rejected(
            Reason.BAD_BODY,
            f"the body is not an Arrow IPC stream of one record batch ({str(error)[:200]}); encode it so",
        ) from error
    check_rows(batch, limits)
    if batch.num_rows != envelope.rows:
        raise Rejected(
            Reason.ROW_COUNT_MISMATCH,
            f"the body has {batch.num_rows} rows, its envelope says {envelope.rows}; count rows after encoding",
        )
    return batch


def _read_envelope(payload: bytes) -> tuple[_WireEnvelope, int]:
    """The envelope as it is written, and where the body begins."""
    if len(payload) < _HEADER.size:
        raise Rejected(Reason.NOT_A_PAYLOAD, f"payload of {len(payload)} bytes is too short for an envelope")
    magic, size = _HEADER.unpack_from(payload)
    if magic != SKIPPABLE_MAGIC:
        raise Rejected(
            Reason.NOT_A_PAYLOAD,
            f"payload begins with {payload[:4].hex()}, not with the zstd skippable frame 502a4d18 of the envelope",
        )
    start = _HEADER.size + size
    if size > ENVELOPE_BYTES_MAX or start > len(payload):
        raise Rejected(
            Reason.NOT_A_PAYLOAD,
            f"envelope of {size} bytes in a payload of {len(payload)}, limit {ENVELOPE_BYTES_MAX}; it is cut",
        )
    head = payload[_HEADER.size : start]
    try:
        version = _decode_version(head).version
        if version != PROTOCOL_VERSION:
            raise Rejected(
                Reason.UNKNOWN_VERSION,
                f"envelope of version {version}; this gateway reads version {PROTOCOL_VERSION}: update one side",
            )
        return _decode_envelope(head), start
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected(Reason.BAD_ENVELOPE, f"the envelope cannot be read ({str(error)[:200]})") from error


def _decompress(body: bytes, limits: Limits) -> bytes:
    try:
        frame = zstandard.get_frame_parameters(body)
        size = frame.content_size
        if size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
            raise Rejected(Reason.BAD_BODY, "the zstd frame does not state its content size; write it with the size")
        if size > limits.body_bytes_max:
            raise Rejected(
                Reason.BODY_TOO_LARGE,
                f"the body unpacks to {size} bytes, more than {limits.body_bytes_max}; send smaller batches",
            )
        if frame.window_size > max(size, 1024):
            raise Rejected(
                Reason.BAD_BODY,
                f"the zstd frame asks for a window of {frame.window_size} bytes for {size} bytes of content",
            )
        return _decompressor().decompress(body, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Rejected(
            Reason.BAD_BODY, f"the body is not one zstd frame ({error}); it is cut, damaged or foreign"
        ) from error


def _decompressor() -> zstandard.ZstdDecompressor:
    """One for each thread: it may not be shared, and making one costs a third of the unpacking of a small body."""
    found: zstandard.ZstdDecompressor | None = getattr(_kept, "decompressor", None)
    if found is None:
        found = _kept.decompressor = zstandard.ZstdDecompressor()
    return found


def _read_stream(stream: bytes, limits: Limits) -> pa.RecordBatch:
    """Read the one record batch, refusing what could unpack to more than the stream itself."""
    messages = iter(pa.ipc.MessageReader.open_stream(pa.BufferReader(stream)))
    first = next(messages, None)
    if first is None or first.type != "schema":
        raise ValueError("it does not begin with a schema")
    schema = _checked_schema(first.metadata.to_pybytes(), limits)
    rest = list(itertools.islice(messages, limits.fields_max + 2))
    if any(_has_compressed_buffers(message.metadata.to_pybytes()) for message in rest):
        raise ValueError("its buffers are compressed one by one; write the stream without buffer compression")
    if sum(message.type == "record batch" for message in rest) != 1:
        raise ValueError("it does not hold exactly one record batch")
    if len(rest) == 1:
        return pa.ipc.read_record_batch(rest[0], schema)
    with pa.ipc.open_stream(pa.BufferReader(stream)) as reader:  # dictionaries come before the rows
        return reader.read_next_batch()


@functools.lru_cache(maxsize=4096)
def _checked_schema(message: bytes, limits: Limits) -> pa.Schema:
    """Parse and check the schema message of a stream; a fleet sends few different ones, each many thousand times."""
    if len(message) > SCHEMA_BYTES_MAX:
        raise ValueError(f"its schema takes {len(message)} bytes, more than {SCHEMA_BYTES_MAX}")
    size = len(message).to_bytes(4, "little")
    schema = pa.ipc.read_schema(pa.py_buffer(b"\xff\xff\xff\xff" + size + message))
    check_schema(schema, limits)
    return schema


def _has_compressed_buffers(metadata: bytes) -> bool:
    """Whether an IPC message declares buffer compression (Arrow format, `Message.fbs`: RecordBatch.compression).

    pyarrow can only be told by reading, which allocates whatever sizes the message claims; so the two flatbuffer
    tables are followed by hand: Message{version, header_type, header, …}, RecordBatch{length, nodes, buffers,
    compression, …}, DictionaryBatch{id, data, …}.
    """
    message = _u32(metadata, 0)
    header_type_at = _slot(metadata, message, 1)
    header_at = _slot(metadata, message, 2)
    if header_type_at is None or header_at is None:
        return False
    header_type = metadata[header_type_at]
    table = header_at + _u32(metadata, header_at)
    if header_type == 2:
        data_at = _slot(metadata, table, 1)
        if data_at is None:
            return False
        table = data_at + _u32(metadata, data_at)
    elif header_type != 3:
        return False
    return _slot(metadata, table, 3) is not None


def _u32(data: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0])


def _slot(data: bytes, table: int, index: int) -> int | None:
    """Offset of field `index` of a flatbuffer table, or None where it is absent."""
    vtable = table - int(struct.unpack_from("<i", data, table)[0])
    if vtable < 0:
        raise ValueError("its message metadata is damaged")
    size = int(struct.unpack_from("<H", data, vtable)[0])
    at = 4 + 2 * index
    if at + 2 > size:
        return None
    offset = int(struct.unpack_from("<H", data, vtable + at)[0])
    return table + offset if offset else None
