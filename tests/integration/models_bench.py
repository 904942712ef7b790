"""What the tests of models on devices share: models of every character, a signed repository, a server with faults."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pyarrow as pa
from onnx import TensorProto, helper, numpy_helper

from contract.models import (
    Artifact,
    Assignment,
    Cost,
    Dataset,
    Manifest,
    Probe,
    Trial,
    Window,
    target_path,
)
from edge_agent.models.runtime import Model
from lake.store import Store, StoreSettings
from lake.trust.assignments import seal
from lake.trust.keys import generate_key
from lake.trust.repository import TrustRepository

ROWS, FIELDS = 8, ("x", "y")
WINDOW = Window(rows=ROWS, stride=4, gap_s=10.0)
STREAM = "numbers"
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def _constant(name: str, value: Any, dtype: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def model(
    *,
    threshold: float = 0.0,
    character: str = "good",
    rows: int = ROWS,
    channels: int = 2,
    size: int = 0,
    opset: int = 22,
) -> bytes:
    """An ONNX model: score is the window's mean, label whether it is above the threshold, features are the two means.

    Args:
        threshold: of the label.
        character: `good`, `hangs`, `eats_memory`, `slow`, `nan`, `fails`, or `inverted` (the other label).
        rows, channels: of the window.
        size: bytes of ballast.
        opset: of ai.onnx.
    """
    nodes = [
        helper.make_node("ReduceMean", ["window", "rows_axis"], ["features"], keepdims=0),
        helper.make_node("ReduceMean", ["features", "last_axis"], ["mean"], keepdims=0),
        helper.make_node("IsNaN", ["window"], ["is_nan"]),
        helper.make_node("Cast", ["is_nan"], ["nan_int"], to=INT64),
        helper.make_node("ReduceSum", ["nan_int", "both_axes"], ["nan_count"], keepdims=0),
        helper.make_node("Less" if character == "inverted" else "Greater", ["mean", "threshold"], ["is_above"]),
        helper.make_node("Cast", ["is_above"], ["label"], to=INT64),
    ]
    initializers = [
        _constant("rows_axis", [1], np.int64),
        _constant("last_axis", [1], np.int64),
        _constant("both_axes", [1, 2], np.int64),
        _constant("threshold", threshold, np.float32),
    ]
    if size:
        ballast = np.frombuffer(np.random.default_rng(size).bytes(size), np.uint8)
        initializers.append(numpy_helper.from_array(ballast, "ballast"))
    extra, more = _character(character)
    graph = helper.make_graph(
        [*nodes, *extra],
        "test",
        [helper.make_tensor_value_info("window", FLOAT, ["batch", rows, channels])],
        [
            helper.make_tensor_value_info("score", FLOAT, ["batch"]),
            helper.make_tensor_value_info("label", INT64, ["batch"]),
            helper.make_tensor_value_info("nan_count", INT64, ["batch"]),
            helper.make_tensor_value_info("features", FLOAT, ["batch", channels]),
        ],
        [*initializers, *more],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return made.SerializeToString()


def _character(character: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """From `mean` to `score`."""
    if character in ("good", "inverted"):
        return [helper.make_node("Identity", ["mean"], ["score"])], []
    if character == "nan":
        # Not at once, so that it passes whoever only looks at zeros: 0/0 where the mean is not 0.
        nodes = [
            helper.make_node("Sub", ["mean", "mean"], ["nothing"]),
            helper.make_node("Div", ["nothing", "nothing"], ["score"]),
        ]
        return nodes, []
    if character == "fails":
        nodes = [
            helper.make_node("Cast", ["mean"], ["far"], to=INT64),
            helper.make_node("Add", ["far", "beyond"], ["index"]),
            helper.make_node("Gather", ["table", "index"], ["score"]),
        ]
        return nodes, [_constant("table", [1.0, 2.0], np.float32), _constant("beyond", 1_000_000, np.int64)]
    if character == "eats_memory":
        nodes = [
            helper.make_node("ConstantOfShape", ["huge"], ["much"]),
            helper.make_node("ReduceSum", ["much"], ["nothing"], keepdims=0),
            helper.make_node("Add", ["mean", "nothing"], ["score"]),
        ]
        return nodes, [_constant("huge", [1 << 30], np.int64)]
    times = {"hangs": 2**62, "slow": 100_000}[character]
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_in"], ["go_out"]),
            helper.make_node("Add", ["value_in", "zero"], ["value_out"]),
        ],
        "again",
        [
            helper.make_tensor_value_info("turn", INT64, []),
            helper.make_tensor_value_info("go_in", BOOL, []),
            helper.make_tensor_value_info("value_in", FLOAT, None),
        ],
        [helper.make_tensor_value_info("go_out", BOOL, []), helper.make_tensor_value_info("value_out", FLOAT, None)],
        [_constant("zero", 0.0, np.float32)],
    )
    nodes = [helper.make_node("Loop", ["times", "true", "mean"], ["score"], body=body)]
    return nodes, [_constant("times", times, np.int64), _constant("true", True, np.bool_)]


def known_answers(data: bytes, manifest: Manifest, *, wrong: str = "") -> bytes:
    """A probe artifact of what the model says, but for the column `wrong`."""
    windows = np.random.default_rng(7).normal(size=(8, ROWS, len(FIELDS))).astype(np.float32)
    running = Model(data, manifest)
    # One by one: this model, unlike the trainer's, may add up a batch in another order.
    single = [running.run(windows[at : at + 1]) for at in range(len(windows))]
    outputs = {name: np.concatenate([each[at] for each in single]) for at, name in enumerate(running.outputs)}
    columns: dict[str, Any] = {"window": pa.array(list(windows.reshape(8, -1)), pa.list_(pa.float32()))}
    for name, values in outputs.items():
        values = values + 1 if name == wrong else values
        columns[name] = pa.array(list(values), pa.list_(pa.float32())) if values.ndim > 1 else pa.array(values)
    sink = pa.BufferOutputStream()
    table = pa.table(columns)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def manifest_of(data: bytes, *, name: str = "gestures", version: int = 1, **changes: Any) -> Manifest:
    made = Manifest(
        model=name,
        version=version,
        artifact=Artifact(sha256=hashlib.sha256(data).hexdigest(), size=len(data)),
        task="classification",
        stream=STREAM,
        fields=FIELDS,
        dtypes=("double", "double"),
        window=WINDOW,
        sample_rate_hz=None,
        classes=("low", "high"),
        features=("mean_x", "mean_y"),
        family="test",
        metrics=(),
        dataset=Dataset(streams={STREAM: 1}, sha256="0" * 64, windows=1),
        recipe="",
        code="",
        seed=1,
        packages={},
        limits=Cost(memory_bytes_max=400 << 20, latency_ms_p99_max=20.0),
        created_at_us=1,
    )
    return msgspec.structs.replace(made, **changes)


class House:
    """Who trains, signs and orders: a lake in a folder, its keys, and the anchor for devices.

    Args:
        folder: of all this.
        ahead_days: by how much the signer's clock is ahead of this machine's.
    """

    def __init__(self, folder: Path, *, ahead_days: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder / "lake" / "models"
        self.store = Store(StoreSettings(url=f"file://{folder}/lake"))
        self.root, self.targets, self.online = generate_key(), generate_key(), generate_key()
        self.anchor = folder / "root.json"

        def now_us() -> int:
            return time.time_ns() // 1000 + ahead_days * 86_400_000_000

        anchor = TrustRepository(self.store, now_us=now_us).initialise([self.root], self.targets, self.online)
        self.anchor.write_bytes(anchor)
        self.now_us = now_us
        self.repository = TrustRepository(self.store, anchor=anchor, now_us=now_us)
        self.sequence = 0

    def put(self, data: bytes) -> Artifact:
        sha256 = hashlib.sha256(data).hexdigest()
        self.store.put_if_absent(f"models/artifacts/{sha256}", data)
        return Artifact(sha256=sha256, size=len(data))

    def release(self, data: bytes, *, version: int, probe: bool = True, wrong: str = "", **changes: Any) -> Manifest:
        """Approve a model."""
        made = manifest_of(data, version=version, **changes)
        if probe:
            known = self.put(known_answers(data, made, wrong=wrong))
            made = msgspec.structs.replace(made, probe=Probe(artifact=known, score_tolerance=0.0))
        self.put(data)
        path, body = target_path(made.model, version), msgspec.json.encode(made)
        self.repository.put_target(path, body)
        self.repository.sign_targets([self.targets], add={path: body})
        self.repository.publish([self.online])
        return made

    def order(self, device: str, manifest: Manifest | None, *, model: str = "gestures", **changes: Any) -> Assignment:
        self.sequence += 1
        made = Assignment(
            device=device,
            model=manifest.model if manifest is not None else model,
            version=manifest.version if manifest is not None else 0,
            sha256=manifest.artifact.sha256 if manifest is not None else "",
            sequence=self.sequence,
            not_after_us=self.now_us() + 3_600_000_000,
            rollout="test",
            trial=Trial(shadow_windows=3, trial_windows=3, timeout_s=60.0),
        )
        return msgspec.structs.replace(made, **changes)

    def sealed(self, assignment: Assignment, key: Any = None) -> dict[str, Any]:
        return seal(assignment, key or self.online)


class Faults:
    """What the server does wrong; set from the test."""

    def __init__(self) -> None:
        self.cut_after: int | None = None
        """Bytes of a body after which the connection ends, once for each request."""
        self.pause_s = 0.0
        """After each 4 kB."""
        self.change: Callable[[str, bytes], bytes] = lambda path, data: data
        self.status: int | None = None
        self.ignore_ranges = False
        self.etag: str | None = None
        self.asked: list[tuple[str, str | None]] = []
        """Path and range of every request."""


@contextmanager
def serving(folder: Path, faults: Faults | None = None) -> Iterator[tuple[str, Faults]]:
    """A file server with ranges over a folder; its address with a final slash."""
    faults = faults or Faults()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            faults.asked.append((self.path, self.headers.get("Range")))
            path = folder / self.path.removeprefix("/")
            if faults.status is not None or not path.is_file():
                self.send_response(faults.status or 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = faults.change(self.path, path.read_bytes())
            etag = faults.etag or f'"{hashlib.sha256(data).hexdigest()[:16]}"'
            asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
            start = 0
            if asked and not faults.ignore_ranges and condition in (None, etag):
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if start >= len(data):
                    self.send_response(416)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
            self.send_response(206 if start else 200)
            self.send_header("ETag", etag)
            self.send_header("Content-Length", str(len(data) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            self._send(data[start:])

        def _send(self, body: bytes) -> None:
            is_artifact = "/artifacts/" in self.path
            limit = faults.cut_after if is_artifact and faults.cut_after is not None else len(body)
            try:
                for at in range(0, min(limit, len(body)), 4_096):
                    self.wfile.write(body[at : min(at + 4_096, limit)])
                    if is_artifact and faults.pause_s:
                        time.sleep(faults.pause_s)
            except OSError:
                self.close_connection = True
            if limit < len(body):
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/", faults
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
