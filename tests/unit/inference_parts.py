"""What the tests of prediction are made of: a manifest, and bodies of requests."""

from __future__ import annotations

import hashlib
import json

from contract.models import Artifact, Dataset, Manifest, Window


def manifest(
    model: str = "shaker",
    version: int = 1,
    *,
    stream: str = "vibration",
    rows: int = 4,
    stride: int = 2,
    fields: tuple[str, ...] = ("x", "y"),
    classes: tuple[str, ...] = ("low", "high"),
    features: tuple[str, ...] = ("x_mean", "y_mean"),
    gap_s: float = 10.0,
    onnx: bytes = b"onnx",
) -> Manifest:
    """A manifest that is complete."""
    return Manifest(
        model=model,
        version=version,
        artifact=Artifact(sha256=hashlib.sha256(onnx).hexdigest(), size=len(onnx)),
        task="classification" if classes else "anomaly",
        stream=stream,
        fields=fields,
        dtypes=("float",) * len(fields),
        window=Window(rows=rows, stride=stride, gap_s=gap_s),
        sample_rate_hz=1.0,
        classes=classes,
        threshold=None if classes else 0.5,
        features=features,
        family="test",
        metrics=(),
        dataset=Dataset(streams={stream: 0}, sha256="0" * 64, windows=1),
        recipe="",
        code="test",
        seed=0,
        packages={},
        created_at_us=0,
    )


def body(data, shape, *, name="window", datatype="FP32", **members) -> bytes:
    """The JSON of a request with one input."""
    tensor = {"name": name, "shape": list(shape), "datatype": datatype, "data": data}
    return json.dumps({"inputs": [tensor], **members}).encode()
