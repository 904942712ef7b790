"""onnxruntime as training uses it: one thread, the same graph as everywhere, window after window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from contract.models import INPUT, OUTPUT_FEATURES, OUTPUT_LABEL, OUTPUT_NAN_COUNT, OUTPUT_SCORE
from trainer.errors import TrainingError

Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]
CHUNK_CELLS_MAX = 1 << 20
"""Of one call: float64 copies of so many cells are held at once, about a dozen of 8 MiB."""

# Every error of the runtime: they share no base class of their own.
RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


class Answers(NamedTuple):
    """What a model says of `N` windows."""

    score: Float32s
    """`[N, K]` or `[N]`."""
    label: Int64s
    nan_count: Int64s
    features: Float32s


def open_session(model: onnx.ModelProto | bytes) -> ort.InferenceSession:
    """A session with one thread that does not spin.

    Raises:
        TrainingError: the runtime refuses the graph.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    content = model if isinstance(model, bytes) else model.SerializeToString()
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except RUNTIME_ERRORS as error:
        raise TrainingError(
            f"onnxruntime refuses the graph ({str(error)[:300]}); this is a fault of the export, or a model too large"
        ) from error


def run_features(
    session: ort.InferenceSession, windows: Float32s, done: Callable[[int], None] | None = None
) -> tuple[Float32s, Int64s]:
    """Features of windows.

    Args:
        session: of a graph with the outputs `features` and `nan_count`.
        windows: `float32[N, W, C]`; may be a map of a file.
        done: called with the number of further windows that are done.

    Returns:
        `features: float32[N, F]` and `nan_count: int64[N]`.
    """
    parts = list(_run(session, windows, [OUTPUT_FEATURES, OUTPUT_NAN_COUNT], done))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def run_model(session: ort.InferenceSession, windows: Float32s, rows: int | None = None) -> Answers:
    """All outputs of a released model.

    Args:
        session: of a whole model.
        windows: `float32[N, W, C]`.
        rows: windows of one call; None for as many as fit CHUNK_CELLS_MAX.
    """
    names = [OUTPUT_SCORE, OUTPUT_LABEL, OUTPUT_NAN_COUNT, OUTPUT_FEATURES]
    parts = list(_run(session, windows, names, None, rows))
    return Answers(*(np.concatenate([part[number] for part in parts]) for number in range(len(names))))


def _run(
    session: ort.InferenceSession,
    windows: Float32s,
    outputs: list[str],
    done: Callable[[int], None] | None,
    rows: int | None = None,
) -> Iterator[list[Any]]:
    size = rows or max(1, CHUNK_CELLS_MAX // max(1, int(np.prod(windows.shape[1:]))))
    for start in range(0, len(windows), size):
        piece = np.ascontiguousarray(windows[start : start + size])
        try:
            yield session.run(outputs, {INPUT: piece})
        except RUNTIME_ERRORS as error:
            span = f"{start} to {start + len(piece)}"
            raise TrainingError(f"the graph fails on windows {span} ({str(error)[:300]})") from error
        if done is not None:
            done(len(piece))
