"""Whether a release is for this device at all, before anything is downloaded. Pure."""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

from contract.models import MODELS_MAX, ONNX_IR, ONNX_OPSET, Manifest
from edge_agent.models.predictions import stream_of

SHOWN_MAX = 12


class Surroundings(NamedTuple):
    """What the device has."""

    streams: frozenset[str]
    """Of its own configuration."""
    schema: pa.Schema | None
    """Of the manifest's stream; None while it has given no reading."""
    memory_bytes: int
    """Of the whole device; 0 where unknown."""
    memory_free_bytes: int
    """Available now; 0 where unknown."""
    models: int
    """Other models on it."""


class Finding(NamedTuple):
    """Why not."""

    why: str
    final: bool
    """False where it may be otherwise later."""


def precheck(manifest: Manifest, device: Surroundings) -> Finding | None:
    """What speaks against a release on this device; None where nothing does."""
    if manifest.stream not in device.streams:
        return _no(f"there is no stream {manifest.stream!r} here, only {_some(sorted(device.streams))}")
    if manifest.opset > ONNX_OPSET or manifest.ir > ONNX_IR:
        return _no(
            f"opset {manifest.opset} and IR {manifest.ir} are newer than this agent's {ONNX_OPSET} and {ONNX_IR}; "
            "update the agent"
        )
    if stream_of(manifest.model) is None:
        return _no(f"predictions.{manifest.model} is too long for a stream's name; give the model a shorter one")
    if device.models >= MODELS_MAX:
        return _no(f"{device.models} models are on this device, at most {MODELS_MAX} may; remove one")
    if device.memory_bytes and manifest.limits.memory_bytes_max > device.memory_bytes:
        return _no(
            f"memory_bytes_max = {manifest.limits.memory_bytes_max} is more than the {device.memory_bytes} bytes of "
            "this device; train a smaller model"
        )
    if device.schema is None:
        return Finding(f"stream {manifest.stream!r} has given no reading yet; is its sensor there?", final=False)
    wrong = _wrong_fields(manifest, device.schema)
    if wrong:
        return _no(f"stream {manifest.stream!r} does not fit: {'; '.join(wrong[:SHOWN_MAX])}; train for its fields")
    if device.memory_free_bytes and manifest.limits.memory_bytes_max > device.memory_free_bytes:
        return Finding(
            f"memory_bytes_max = {manifest.limits.memory_bytes_max} is more than the {device.memory_free_bytes} bytes "
            "of memory that are free now; end something else",
            final=False,
        )
    return None


def _wrong_fields(manifest: Manifest, schema: pa.Schema) -> list[str]:
    found = []
    for name, wanted in zip(manifest.fields, manifest.dtypes, strict=True):
        at = schema.get_field_index(name)
        if at < 0:
            found.append(f"field {name!r} is missing")
        elif not _fits(schema.field(at).type, wanted):
            found.append(f"field {name!r} is {schema.field(at).type}, the model was trained on {wanted}")
    return found


def _fits(kind: pa.DataType, wanted: str) -> bool:
    """Whether a device's type may be what the lake, which has widened the types of all devices, calls `wanted`."""
    types = pa.types
    if str(kind) == wanted:
        return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))
    if wanted in ("float", "double", "halffloat", "float32", "float64", "float16"):
        return bool(types.is_integer(kind) or types.is_floating(kind))
    if wanted.startswith(("int", "uint")):
        return bool(types.is_integer(kind))
    return False


def _no(why: str) -> Finding:
    return Finding(why, final=True)


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN_MAX]) or "none"
