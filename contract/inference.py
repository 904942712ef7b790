"""The Open Inference Protocol, version 2, as gateway and device speak it: JSON in, JSON out. Pure; no numpy.

Source: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol (REST). Served are health,
server and model metadata, and `infer`; not served is the binary tensor extension.

A model has one input, `window: FP32 [batch, rows, fields]`, and the outputs that its manifest tells (`metadata_of`).
Data may be flat in row-major order or nested as the shape says; on the way out it is flat. JSON has no NaN: `null` in
an input is NaN, that is "no value", and NaN or an infinity in an output is `null`. A number is read as float64 and
rounded to float32, so a client that writes its float32 values as exact decimals (`float(x)` in Python) is understood to
the bit.

Every refusal is an `Unanswered`: its message names the thing, the value and the remedy, `status` is that of HTTP, and
the body of the answer is `{"error": message}`.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Protocol

import msgspec

from contract.errors import HeadwaterError
from contract.models import (
    INPUT,
    OUTPUT_FEATURES,
    OUTPUT_LABEL,
    OUTPUT_NAN_COUNT,
    OUTPUT_SCORE,
    WINDOW_CELLS_MAX,
    Manifest,
)

OUTPUT_LABEL_NAME = "label_name"
"""The label in words, beside the model's own outputs."""
ANOMALY_LABELS = ("normal", "anomaly")
"""What `label` 0 and 1 of an anomaly model mean."""
PLATFORM = "onnx"
BODY_BYTES_MAX = 32 * 1024 * 1024
ID_LENGTH_MAX = 256
PARAMETERS_BYTES_MAX = 4_096
INPUTS_MAX, OUTPUTS_MAX = 16, 64
RANK_MAX = 8
FP32, INT64, BYTES = "FP32", "INT64", "BYTES"
DATATYPES = frozenset(
    {
        *("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
        *("FP16", "FP32", "FP64", "BYTES"),
    }
)
"""Those of the protocol."""
BINARY_HEADER = "Inference-Header-Content-Length"
"""A request with this header carries binary tensors."""

_SHOWN_MAX = 80
_DATATYPE_OF = {"float32": FP32, "int64": INT64}
_ABSENT = msgspec.Raw()
_NULL = b"null"
_Size = Annotated[int, msgspec.Meta(ge=0, le=2**40)]


class Unanswered(HeadwaterError):
    """A request cannot be answered.

    Attributes:
        status: of HTTP. 4xx: send something else; 503: busy, send it again in a moment; 504: it took too long.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class InferenceLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one request may be. All inclusive."""

    body_bytes_max: int = BODY_BYTES_MAX
    """JSON, before it is read."""
    cells_max: int = WINDOW_CELLS_MAX
    """Values of all inputs; and of all outputs."""
    batch_max: int = 4_096
    """Windows."""


class InputTensor(msgspec.Struct, frozen=True):
    """A tensor that came in."""

    name: str
    shape: tuple[int, ...]
    values: array[float]
    """Typecode `f` (float32), row-major; as many as the shape says. `null` is NaN. Give it to
    `numpy.frombuffer(values, numpy.float32)`, which copies nothing."""


class InferRequest(msgspec.Struct, frozen=True):
    """A request whose form is right; whether it fits a model is not known yet (see `window_of`)."""

    id: str
    inputs: tuple[InputTensor, ...]
    outputs: tuple[str, ...]
    """Names of the outputs asked for; empty for all."""


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor that goes out."""

    name: str
    shape: tuple[int, ...]
    datatype: str
    data: list[Any]
    """Flat, row-major."""


class InferResponse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer to `infer`."""

    model_name: str
    model_version: str
    id: str = ""
    outputs: tuple[Tensor, ...] = ()


class TensorMetadata(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an input or output looks like. -1 in a shape is any number."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, Any] = {}
    """Beyond the protocol: names of fields, classes or features, in their order."""


class ModelMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `GET /v2/models/NAME`."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


class ServerMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to `GET /v2`."""

    name: str
    version: str
    extensions: tuple[str, ...] = ()


class ArrayLike(Protocol):
    """What is needed of a numpy array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of its axes."""

    @property
    def dtype(self) -> Any:
        """With a `name`."""

    def ravel(self) -> Any:
        """Flat, row-major, with `tolist`."""


class _Input(msgspec.Struct):
    name: str
    shape: list[_Size]
    datatype: str
    data: msgspec.Raw = _ABSENT
    parameters: msgspec.Raw = _ABSENT


class _Output(msgspec.Struct):
    name: str
    parameters: msgspec.Raw = _ABSENT


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str = ""
    parameters: msgspec.Raw = _ABSENT
    outputs: list[_Output] | None = None


class _Answer(msgspec.Struct):
    model_name: str
    outputs: list[Tensor]
    model_version: str = ""
    id: str = ""


_decode_request = msgspec.json.Decoder(_Request).decode
_decode_parameters = msgspec.json.Decoder(dict[str, Any]).decode
_decode_flat = msgspec.json.Decoder(list[float | None]).decode
_decode_answer = msgspec.json.Decoder(_Answer).decode
encode = msgspec.json.Encoder().encode
"""Any of the answers above, as JSON. NaN and infinities become `null`."""


def decode_request(body: bytes | bytearray, limits: InferenceLimits) -> InferRequest:
    """Read the body of an `infer` request.

    Raises:
        Unanswered: 400 or 413; what is wrong and what to send instead.
    """
    if len(body) > limits.body_bytes_max:
        raise too_large(limits)
    request = _read(body)
    _check_id(request.id)
    _check_parameters("parameters of the request", request.parameters)
    _check_names("inputs", [tensor.name for tensor in request.inputs], INPUTS_MAX)
    if not request.inputs:
        raise Unanswered(400, f"inputs is empty; give one tensor named {INPUT!r}")
    outputs = request.outputs or []
    _check_names("outputs", [output.name for output in outputs], OUTPUTS_MAX)
    for output in outputs:
        _check_parameters(f"parameters of output {_shown(output.name)}", output.parameters)
    inputs: list[InputTensor] = []
    left = limits.cells_max
    for tensor in request.inputs:
        read = _read_input(tensor, left, limits)
        left -= len(read.values)
        inputs.append(read)
    return InferRequest(request.id, tuple(inputs), tuple(output.name for output in outputs))


def window_of(request: InferRequest, manifest: Manifest, limits: InferenceLimits) -> InputTensor:
    """The windows of a request, if they are what a model eats.

    Returns:
        The tensor `window`, of shape (batch, rows, fields).

    Raises:
        Unanswered: 400 or 413, naming what does not fit and what would.
    """
    rows, fields = manifest.window.rows, len(manifest.fields)
    wanted = f"{INPUT!r}, {FP32}, shape [batch, {rows}, {fields}]"
    if [tensor.name for tensor in request.inputs] != [INPUT]:
        names = _listed(tensor.name for tensor in request.inputs)
        raise Unanswered(400, f"model {manifest.model} has no inputs {names}; send one input {wanted}")
    window = request.inputs[0]
    if len(window.shape) != 3 or window.shape[1:] != (rows, fields):
        raise Unanswered(
            400,
            f"input {INPUT!r} has shape {list(window.shape)}, and model {manifest.model} version {manifest.version} "
            f"takes [batch, {rows}, {fields}]: {rows} readings of {_listed(manifest.fields)}; send that",
        )
    batch = window.shape[0]
    if batch < 1:
        raise Unanswered(400, f"input {INPUT!r} holds no window; send at least one")
    outputs = batch * (len(manifest.features) + len(manifest.classes) + 4)
    if batch > limits.batch_max or outputs > limits.cells_max:
        most = min(limits.batch_max, limits.cells_max * batch // outputs)
        raise Unanswered(413, f"{batch} windows are more than {most} in one request; send them in several")
    known = [output.name for output in _outputs(manifest)]
    unknown = [name for name in request.outputs if name not in known]
    if unknown:
        raise Unanswered(
            400, f"model {manifest.model} has no outputs {_listed(unknown)}; choose of {_listed(known)}, or name none"
        )
    return window


def response_of(manifest: Manifest, request: InferRequest, tensors: Sequence[Tensor]) -> InferResponse:
    """The answer, of what a model gave: the outputs that were asked for, and the label in words.

    Args:
        manifest: of the model that answered.
        request: what was asked.
        tensors: all outputs of the model.
    """
    found = {tensor.name: tensor for tensor in tensors}
    label = found.get(OUTPUT_LABEL)
    if label is not None:
        names = label_names(manifest, label.data)
        found[OUTPUT_LABEL_NAME] = Tensor(name=OUTPUT_LABEL_NAME, shape=label.shape, datatype=BYTES, data=names)
    wanted = request.outputs or [metadata.name for metadata in _outputs(manifest) if metadata.name in found]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise Unanswered(
            400,
            f"model {manifest.model} version {manifest.version} gives no {_listed(missing)}; leave it out of outputs",
        )
    return InferResponse(
        model_name=manifest.model,
        model_version=str(manifest.version),
        id=request.id,
        outputs=tuple(found[name] for name in wanted),
    )


def label_names(manifest: Manifest, labels: Iterable[int]) -> list[str]:
    """Labels in words; an index that has no class is its number."""
    classes = manifest.classes or ANOMALY_LABELS
    return [classes[label] if 0 <= label < len(classes) else str(label) for label in labels]


def tensor_of(name: str, values: ArrayLike) -> Tensor:
    """An output of a model.

    Args:
        name: of the output.
        values: an array of float32 or int64.

    Raises:
        Unanswered: 500, it is of another type: the model is not one of ours.
    """
    datatype = _DATATYPE_OF.get(values.dtype.name)
    if datatype is None:
        raise Unanswered(500, f"output {name} is {values.dtype.name}, neither float32 nor int64; release it anew")
    return Tensor(name=name, shape=tuple(values.shape), datatype=datatype, data=values.ravel().tolist())


def metadata_of(manifest: Manifest, versions: Sequence[int]) -> ModelMetadata:
    """What a model eats and gives.

    Args:
        manifest: of the version that is asked about.
        versions: all that can be asked.
    """
    return ModelMetadata(
        name=manifest.model,
        versions=tuple(str(version) for version in versions),
        platform=PLATFORM,
        inputs=(
            TensorMetadata(
                name=INPUT,
                datatype=FP32,
                shape=(-1, manifest.window.rows, len(manifest.fields)),
                parameters={"fields": manifest.fields},
            ),
        ),
        outputs=_outputs(manifest),
    )


def decode_response(body: bytes) -> InferResponse:
    """Read an answer: what a client of ours needs. `null` among floats becomes NaN.

    Raises:
        Unanswered: 502, it is not an answer to `infer`.
    """
    try:
        answer = _decode_answer(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as mistake:
        raise Unanswered(502, f"the answer is not one to infer ({str(mistake)[:200]}); ask a server of v2") from mistake
    outputs = tuple(_with_nans(tensor) if tensor.datatype == FP32 else tensor for tensor in answer.outputs)
    return InferResponse(
        model_name=answer.model_name, model_version=answer.model_version, id=answer.id, outputs=outputs
    )


def too_large(limits: InferenceLimits) -> Unanswered:
    """The refusal of a body that is too long; also for a server that stops reading it."""
    return Unanswered(
        413, f"the body has more than {limits.body_bytes_max} bytes; send fewer windows in one request, or fewer digits"
    )


def encode_error(refusal: Unanswered) -> bytes:
    """The body of a refusal."""
    return encode({"error": str(refusal)})


def _with_nans(tensor: Tensor) -> Tensor:
    return Tensor(
        name=tensor.name,
        shape=tensor.shape,
        datatype=tensor.datatype,
        data=[math.nan if value is None else value for value in tensor.data],
    )


def _outputs(manifest: Manifest) -> tuple[TensorMetadata, ...]:
    classes = len(manifest.classes)
    names = manifest.classes or ANOMALY_LABELS
    return (
        TensorMetadata(
            name=OUTPUT_SCORE,
            datatype=FP32,
            shape=(-1, classes) if classes else (-1,),
            parameters={"classes": manifest.classes} if classes else {"threshold": manifest.threshold},
        ),
        TensorMetadata(name=OUTPUT_LABEL, datatype=INT64, shape=(-1,), parameters={"classes": names}),
        TensorMetadata(name=OUTPUT_LABEL_NAME, datatype=BYTES, shape=(-1,)),
        TensorMetadata(name=OUTPUT_NAN_COUNT, datatype=INT64, shape=(-1,)),
        TensorMetadata(
            name=OUTPUT_FEATURES,
            datatype=FP32,
            shape=(-1, len(manifest.features)),
            parameters={"features": manifest.features},
        ),
    )


def _read(body: bytes | bytearray) -> _Request:
    try:
        return _decode_request(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as mistake:
        raise Unanswered(
            400,
            f"the body is not an inference request: {str(mistake)[:200]}; send "
            f'{{"inputs": [{{"name": "{INPUT}", "shape": [1, ROWS, FIELDS], "datatype": "{FP32}", "data": […]}}]}}',
        ) from mistake


def _read_input(tensor: _Input, cells_max: int, limits: InferenceLimits) -> InputTensor:
    name = f"input {_shown(tensor.name)}"
    _check_parameters(f"parameters of {name}", tensor.parameters)
    if tensor.datatype not in DATATYPES:
        raise Unanswered(400, f"{name}: datatype {_shown(tensor.datatype)} is none of the protocol; send {FP32}")
    if tensor.datatype != FP32:
        raise Unanswered(400, f"{name}: datatype {tensor.datatype} is not what models here eat; send {FP32}")
    if not 1 <= len(tensor.shape) <= RANK_MAX:
        raise Unanswered(400, f"{name}: the shape has {len(tensor.shape)} axes; send 3: batch, readings, fields")
    cells = math.prod(tensor.shape)
    if cells > cells_max:
        raise Unanswered(
            413, f"{name}: shape {tensor.shape} brings more than {limits.cells_max} values; send fewer windows"
        )
    if bytes(tensor.data) in (b"", _NULL):
        raise Unanswered(400, f"{name} has no data; send it as JSON numbers, binary tensors are not served")
    return InputTensor(tensor.name, tuple(tensor.shape), _values(name, memoryview(tensor.data), tensor.shape))


def _values(name: str, data: memoryview, shape: Sequence[int]) -> array[float]:
    """The numbers of a tensor, flat."""
    cells = math.prod(shape)
    # Before anything is built of it: a Python list of numbers takes ten times their JSON.
    commas = bytes(data).count(b",")
    if commas != max(0, cells - 1):
        raise Unanswered(
            400, f"{name}: shape {list(shape)} is {cells} values, and data has {commas + 1}; make them agree"
        )
    nested = _is_nested(data)
    try:
        found = _nested_decoder(len(shape)).decode(data) if nested else _decode_flat(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as mistake:
        raise Unanswered(
            400,
            f"{name}: data is not a list of numbers and nulls, flat or nested as {list(shape)} says "
            f"({str(mistake)[:200]}); send one of the two",
        ) from mistake
    if nested:
        found = _flattened(name, found, shape)
    if len(found) != cells:
        raise Unanswered(
            400, f"{name}: shape {list(shape)} is {cells} values, and data has {len(found)}; make them agree"
        )
    values = array("f", [math.nan if value is None else value for value in found])
    if any(map(math.isinf, values)):
        raise Unanswered(400, f"{name}: data has a number beyond ±3.4e38, which {FP32} cannot hold; send null there")
    return values


def _is_nested(data: memoryview) -> bool:
    """Whether the first element is a list."""
    return bytes(data[:64]).lstrip()[1:].lstrip()[:1] == b"["


@functools.cache
def _nested_decoder(rank: int) -> msgspec.json.Decoder[Any]:
    kind: Any = float | None
    for _ in range(rank):
        kind = list[kind]
    return msgspec.json.Decoder(kind)


def _flattened(name: str, found: list[Any], shape: Sequence[int]) -> list[float | None]:
    """Take the nesting away, having seen that it is what the shape says."""
    level: list[Any] = [found]
    for axis, length in enumerate(shape):
        wrong = next((len(item) for item in level if len(item) != length), None)
        if wrong is not None:
            raise Unanswered(
                400,
                f"{name}: a list of {wrong} stands on axis {axis} of data, and shape {list(shape)} says {length}; "
                "make them agree",
            )
        level = [inner for item in level for inner in item]
    return level


def _check_id(text: str) -> None:
    if len(text) > ID_LENGTH_MAX:
        raise Unanswered(400, f"id has {len(text)} characters; use at most {ID_LENGTH_MAX}")


def _check_parameters(what: str, raw: msgspec.Raw) -> None:
    """Parameters mean nothing here; they only must be some."""
    size = memoryview(raw).nbytes
    if size > PARAMETERS_BYTES_MAX:
        raise Unanswered(400, f"{what} take {size} bytes; send at most {PARAMETERS_BYTES_MAX}")
    if bytes(raw) in (b"", _NULL):
        return
    try:
        given = _decode_parameters(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as mistake:
        raise Unanswered(400, f"{what} are no object ({str(mistake)[:80]}); send one, or none") from mistake
    if "binary_data_size" in given:
        raise Unanswered(400, f"{what} announce binary data, which is not served; send data as JSON numbers")


def _check_names(what: str, names: Sequence[str], most: int) -> None:
    if len(names) > most:
        raise Unanswered(400, f"{what} has {len(names)} tensors; send at most {most}")
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise Unanswered(400, f"{what} names {_shown(repeated)} more than once; name it once")


def _listed(names: Iterable[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= 4 * _SHOWN_MAX else text[: 4 * _SHOWN_MAX - 1] + "…"


def _shown(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= _SHOWN_MAX else shown[: _SHOWN_MAX - 1] + "…"
