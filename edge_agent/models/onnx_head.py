"""IR version and operator sets of an ONNX file, read without the onnx package, which is not for small devices.

Source: `ModelProto` of https://github.com/onnx/onnx/blob/v1.19.0/onnx/onnx.proto (fields 1 and 8) and the Protocol
Buffers encoding, https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterator

_IR_VERSION, _OPSET_IMPORT = 1, 8
_DOMAIN, _VERSION = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_BYTES_MAX = 10
FIELDS_MAX = 1_000
OPSETS_MAX = 64


def opsets_of(data: bytes) -> tuple[int, dict[str, int]]:
    """IR version, and the version of each operator domain (`""` is ai.onnx).

    Raises:
        ValueError: these bytes are not a model.
    """
    ir, opsets = 0, dict[str, int]()
    for number, value in _fields(memoryview(data)):
        if number == _IR_VERSION and isinstance(value, int):
            ir = value
        elif number == _OPSET_IMPORT and isinstance(value, memoryview):
            domain, version = "", 0
            for inner, part in _fields(value):
                if inner == _DOMAIN and isinstance(part, memoryview):
                    domain = bytes(part).decode(errors="replace")
                elif inner == _VERSION and isinstance(part, int):
                    version = part
            opsets[domain] = max(version, opsets.get(domain, 0))
            if len(opsets) > OPSETS_MAX:
                raise ValueError(f"more than {OPSETS_MAX} operator sets")
    if not ir or not opsets:
        raise ValueError("it names no IR version or no operator set")
    return ir, opsets


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    at = 0
    for _ in range(FIELDS_MAX):
        if at >= len(data):
            return
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"field {number} has wire type {kind}")
        if at + size > len(data):
            raise ValueError(f"field {number} ends behind the file")
        yield number, data[at : at + size]
        at += size
    raise ValueError(f"more than {FIELDS_MAX} fields")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for count in range(_VARINT_BYTES_MAX):
        if at + count >= len(data):
            raise ValueError("it is cut")
        byte = data[at + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, at + count + 1
    raise ValueError("a number is longer than 64 bits")
