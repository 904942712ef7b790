"""Trying a model before it is trusted, on windows with known answers.

Runs in the child: what the model does to memory and time is the child's own end.

The probe artifact is an Arrow IPC file, one row a window: `window` (list<float32>, W*C values, row-major), `score`
(float32, or list<float32> of all classes), `nan_count` (int64), and where the model has them `label` (int64: the class)
and `features` (list<float32>).
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from contract.models import OUTPUT_FEATURES, OUTPUT_LABEL, OUTPUT_NAN_COUNT, OUTPUT_SCORE, Manifest
from edge_agent.models.runtime import Floats, Model, ModelError

PROBE_WINDOWS_MAX = 256
RUNS_MIN, RUNS_MAX = 20, 200
FEATURES_RELATIVE = 1e-6
"""By how much features may differ where scores may: another CPU may add up float64 otherwise. Where the release allows
a score no tolerance, features are compared to the bit as well."""
BUDGET_S = 5.0
"""CPU time after which `RUNS_MIN` runs are enough."""


class Probed(msgspec.Struct, frozen=True, kw_only=True):
    """What a probe measured."""

    windows: int
    """Compared with known answers."""
    latency_ms_p99: float
    """CPU time of one window, so that a busy moment of the device fails no model."""
    memory_bytes: int
    """Most that the child had in memory."""


def probe(data: bytes, manifest: Manifest, known: bytes | None) -> Probed:
    """Load a model, compare its answers, measure what it costs.

    Args:
        data: the ONNX file.
        manifest: what it should be.
        known: the probe artifact; None where the release has none: then zeros are scored, and nothing compared.

    Raises:
        ModelError: it is not what it should be; says how.
    """
    expected = _read(known) if known is not None else None
    model = Model(data, manifest)
    windows = _windows(expected, manifest)
    times_ms: list[float] = []
    model.run(windows[:1])  # the first run also allocates
    for number in range(len(windows)):
        outputs = _timed(model, windows[number : number + 1], times_ms, manifest)
        if expected is not None:
            _compare(dict(zip(model.outputs, outputs, strict=True)), expected, number, manifest)
        _refuse_nan(model, outputs, number)
    while len(times_ms) < RUNS_MAX and not (len(times_ms) >= RUNS_MIN and sum(times_ms) > BUDGET_S * 1000):
        at = len(times_ms) % len(windows)
        _timed(model, windows[at : at + 1], times_ms, manifest)
    p99_ms = sorted(times_ms)[math.ceil(0.99 * len(times_ms)) - 1]
    _judge_latency(p99_ms, manifest)
    peak = _peak_bytes()
    if peak > manifest.limits.memory_bytes_max:
        raise ModelError(
            f"it took {peak} bytes of memory, more than memory_bytes_max = {manifest.limits.memory_bytes_max}; "
            "train a smaller model"
        )
    return Probed(windows=0 if expected is None else len(windows), latency_ms_p99=p99_ms, memory_bytes=peak)


def _peak_bytes() -> int:
    """Most memory in RAM since this program began: `ru_maxrss` would also count what its parent had (getrusage(2))."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _timed(model: Model, window: Floats, times_ms: list[float], manifest: Manifest) -> list[Any]:
    began_ns = time.thread_time_ns()
    outputs = model.run(window)
    times_ms.append((time.thread_time_ns() - began_ns) / 1e6)
    if len(times_ms) >= 5 and len(times_ms) % 5 == 0:
        # A model that is much too slow is not to take the whole deadline.
        _judge_latency(sorted(times_ms)[len(times_ms) // 2], manifest)
    return outputs


def _judge_latency(latency_ms: float, manifest: Manifest) -> None:
    limit_ms = manifest.limits.latency_ms_p99_max
    if latency_ms > limit_ms:
        raise ModelError(
            f"it is too slow: a window took {latency_ms:.3g} ms of CPU, more than latency_ms_p99_max = {limit_ms:g}; "
            "train a smaller model"
        )


def _windows(expected: pa.Table | None, manifest: Manifest) -> Floats:
    rows, channels = manifest.window.rows, len(manifest.fields)
    if expected is None:
        return np.zeros((1, rows, channels), np.float32)
    values = expected["window"].combine_chunks()
    flat = values.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    if flat.size != expected.num_rows * rows * channels:
        raise ModelError(
            f"the probe has {flat.size} values in {expected.num_rows} windows, not {rows} x {channels} each; "
            "release it again"
        )
    return np.ascontiguousarray(flat.reshape(-1, rows, channels))


def _read(known: bytes) -> pa.Table:
    try:
        table = pa.ipc.open_file(pa.BufferReader(known)).read_all()
        missing = {"window", OUTPUT_SCORE, OUTPUT_NAN_COUNT} - set(table.column_names)
    except (pa.ArrowException, OSError) as error:
        raise ModelError(f"the probe cannot be read ({str(error)[:200]}); release it again") from error
    if missing or not 1 <= table.num_rows <= PROBE_WINDOWS_MAX:
        raise ModelError(
            f"the probe has {table.num_rows} rows and lacks {sorted(missing)}; release it with 1 to "
            f"{PROBE_WINDOWS_MAX} rows and all columns"
        )
    return table


def _compare(outputs: dict[str, Any], expected: pa.Table, number: int, manifest: Manifest) -> None:
    for name in (OUTPUT_SCORE, OUTPUT_LABEL, OUTPUT_NAN_COUNT, OUTPUT_FEATURES):
        if name not in outputs or name not in expected.column_names:
            continue
        wanted = expected[name][number].as_py()
        got = np.atleast_1d(outputs[name][0])
        if name == OUTPUT_LABEL and isinstance(wanted, str):
            wanted = list(manifest.classes).index(wanted) if wanted in manifest.classes else -1
        right = np.atleast_1d(np.asarray(wanted, got.dtype))
        tolerance = manifest.probe.score_tolerance if manifest.probe is not None else 0.0
        if name == OUTPUT_SCORE and right.size == 1 < got.size and OUTPUT_LABEL in outputs:
            got = got[int(outputs[OUTPUT_LABEL][0])].reshape(1)
        relative = FEATURES_RELATIVE if name == OUTPUT_FEATURES and tolerance else 0.0
        if got.shape != right.shape or not _alike(got, right, tolerance, relative):
            raise ModelError(
                f"window {number} of the probe: {name} is {_shown(got)}, and was {_shown(right)} in training"
                f"{f' (tolerance {tolerance:g})' if tolerance else ''}; release the model again"
            )


def _alike(got: Any, right: Any, tolerance: float, relative: float) -> bool:
    if tolerance and got.dtype.kind == "f":
        return bool(np.allclose(got, right, rtol=relative, atol=tolerance, equal_nan=True))
    return bool(np.array_equal(got, right, equal_nan=got.dtype.kind == "f"))


def _refuse_nan(model: Model, outputs: list[Any], number: int) -> None:
    answer = model.answers(outputs)[0]
    if math.isnan(answer.score) and not answer.nan_count:
        raise ModelError(f"window {number} of the probe has no NaN, and its score is NaN; train the model again")


def _shown(values: Any) -> str:
    text = np.array2string(values, threshold=8, precision=9)
    return text if len(text) <= 120 else text[:119] + "…"
