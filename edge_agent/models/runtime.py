"""onnxruntime, as a device uses it: one thread, no spinning, no arena; a model's inputs and outputs checked at loading.

The only module of the agent that imports onnxruntime; the probing child uses it as the agent does, so what it measures
holds.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime

from contract.errors import HeadwaterError
from contract.inference import ANOMALY_LABELS
from contract.models import (
    INPUT,
    ONNX_IR,
    ONNX_ML_OPSET,
    ONNX_OPSET,
    OUTPUT_FEATURES,
    OUTPUT_LABEL,
    OUTPUT_NAN_COUNT,
    OUTPUT_SCORE,
    Manifest,
)
from edge_agent.models.onnx_head import opsets_of

ERROR_CHARS_MAX = 300
_FATAL_ONLY = 4
"""Of the runtime's own log: its errors arrive as exceptions."""
_POLL_S = 0.25
"""Of the watchdog while models run: a quarter of the shortest deadline, as each look may cost a sampler its moment."""
_IDLE_POLLS = 8

Floats = npt.NDArray[np.float32]


class ModelError(HeadwaterError):
    """The model cannot be loaded, is not what its manifest says, or failed on a window."""


class Answer(NamedTuple):
    """What a model says of one window."""

    score: float
    """Of the chosen label, or the anomaly score."""
    label: str
    """Empty where the model gives none."""
    nan_count: int
    features: Floats | None
    """`[F]`; None where the model gives none."""


class Watchdog:
    """Ends runs that take too long, from a thread of its own that sleeps while nothing runs.

    One run at a time. Reading the clock and two locks are what it costs a window: less than a microsecond.
    """

    def __init__(self, clock_s: Any) -> None:
        self._clock_s = clock_s
        self.options = onnxruntime.RunOptions()
        self.options.log_severity_level = _FATAL_ONLY
        self._lock = threading.Lock()
        self._ends_s: float | None = None
        self._terminated = False
        self._idle, self._closed = True, False
        self._work = threading.Event()
        self._thread = threading.Thread(target=self._run, name="model-watchdog", daemon=True)
        self._thread.start()

    def begin(self, deadline_s: float) -> onnxruntime.RunOptions:
        """A run begins that may take so long, seconds; its options."""
        with self._lock:
            if self._terminated:
                self.options.terminate = False
                self._terminated = False
            self._ends_s = self._clock_s() + deadline_s
        if self._idle:
            self._idle = False
            self._work.set()
        return self.options

    def end(self) -> bool:
        """The run has ended; whether it was made to."""
        with self._lock:
            self._ends_s = None
            return self._terminated

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._work.set()

    def _run(self) -> None:
        idle_polls = 0
        pause = threading.Event()
        while not self._closed:
            if self._idle:
                self._work.wait()
                self._work.clear()
                idle_polls = 0
                continue
            pause.wait(_POLL_S)
            with self._lock:
                running = self._ends_s is not None
                if self._ends_s is not None and self._clock_s() > self._ends_s:
                    self.options.terminate = self._terminated = True
            idle_polls = 0 if running else idle_polls + 1
            if idle_polls > _IDLE_POLLS:
                # Set before looking again: a run that begins meanwhile either sees it, or is seen here.
                self._idle = True
                with self._lock:
                    if self._ends_s is not None:
                        self._idle = False


class Model:
    """A model in memory. `run` and `answer` belong to one thread at a time.

    Args:
        data: the ONNX file; its hash was checked.
        manifest: what it should be.

    Raises:
        ModelError: it cannot be loaded, or does not eat and say what the manifest and `contract.models` demand.
    """

    def __init__(self, data: bytes, manifest: Manifest) -> None:
        self.manifest = manifest
        check_head(data)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False
        options.log_severity_level = _FATAL_ONLY
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # whatever the runtime's bindings raise of it
            raise ModelError(f"the model cannot be loaded: {_said(error)}; export it again") from error
        self._check_input(session)
        self._outputs = self._checked_outputs(session)
        self._bare = session._sess  # the same call without its validation, which `_check_input` did once
        self._session = session
        self._label = _index(self._outputs, OUTPUT_LABEL)
        self._nan_count = self._outputs.index(OUTPUT_NAN_COUNT)
        self._features = _index(self._outputs, OUTPUT_FEATURES)
        self._classes = manifest.classes
        shapes = {each.name: each.shape for each in session.get_outputs()}
        self._per_class = len(shapes[OUTPUT_SCORE]) > 1

    def run(self, windows: Floats, options: onnxruntime.RunOptions | None = None) -> list[Any]:
        """All outputs, in the order of `outputs`.

        Args:
            windows: `[batch, W, C]`.
            options: of a watchdog.

        Raises:
            ModelError: it failed, or was made to end.
        """
        try:
            outputs: list[Any] = self._bare.run(self._outputs, {INPUT: windows}, options)
        except Exception as error:  # whatever the runtime's bindings raise of it
            raise ModelError(f"the model failed on a window: {_said(error)}") from error
        return outputs

    @property
    def outputs(self) -> Sequence[str]:
        """Names of what `run` gives."""
        return self._outputs

    def answer(self, window: Floats, options: onnxruntime.RunOptions | None = None) -> Answer:
        """What the model says of one window `[1, W, C]`.

        Raises:
            ModelError: it failed, or was made to end.
        """
        return self.answers(self.run(window, options))[0]

    def answers(self, outputs: Sequence[Any]) -> list[Answer]:
        """One answer for each window of a run."""
        try:
            return [self._answer(outputs, number) for number in range(len(outputs[0]))]
        except (IndexError, TypeError, ValueError) as error:
            raise ModelError(f"the model's outputs have shapes that were not promised: {_said(error)}") from error

    def _answer(self, outputs: Sequence[Any], number: int) -> Answer:
        score = outputs[0][number]
        label = ""
        if self._label is not None:
            code = int(outputs[self._label][number])
            if self._classes:
                if not 0 <= code < len(self._classes):
                    raise ValueError(f"label {code} is none of {len(self._classes)} classes")
                label = self._classes[code]
                score = score[code] if self._per_class else score
            else:
                label = ANOMALY_LABELS[bool(code)]
        features = None if self._features is None else outputs[self._features][number]
        return Answer(float(score), label, int(outputs[self._nan_count][number]), features)

    def _check_input(self, session: onnxruntime.InferenceSession) -> None:
        inputs, manifest = session.get_inputs(), self.manifest
        wanted = [manifest.window.rows, len(manifest.fields)]
        if len(inputs) != 1 or inputs[0].name != INPUT or inputs[0].type != "tensor(float)":
            shown = ", ".join(f"{each.name}: {each.type}" for each in inputs)
            raise ModelError(f"the model's input is {shown or 'none'}, not {INPUT}: tensor(float); export it again")
        shape = inputs[0].shape
        if len(shape) != 3 or shape[1:] != wanted:
            raise ModelError(
                f"the model's window is {shape}, the manifest's [batch, {wanted[0]}, {wanted[1]}]; export it again"
            )
        if isinstance(shape[0], int) and shape[0] != 1:
            raise ModelError(f"the model takes batches of {shape[0]} only; export it with a free first dimension")

    def _checked_outputs(self, session: onnxruntime.InferenceSession) -> list[str]:
        kinds = {each.name: each.type for each in session.get_outputs()}
        for name, kind in ((OUTPUT_SCORE, "tensor(float)"), (OUTPUT_NAN_COUNT, "tensor(int64)")):
            if kinds.get(name) != kind:
                raise ModelError(
                    f"the model's output {name} is {kinds.get(name, 'missing')}, not {kind}; export it again"
                )
        for name, kind in ((OUTPUT_LABEL, "tensor(int64)"), (OUTPUT_FEATURES, "tensor(float)")):
            if kinds.get(name, kind) != kind:
                raise ModelError(f"the model's output {name} is {kinds[name]}, not {kind}; export it again")
        if self.manifest.classes and OUTPUT_LABEL not in kinds:
            raise ModelError(f"the manifest names classes, but the model has no output {OUTPUT_LABEL}; export it again")
        known = (OUTPUT_SCORE, OUTPUT_LABEL, OUTPUT_NAN_COUNT, OUTPUT_FEATURES)
        return [name for name in known if name in kinds]


def check_head(data: bytes) -> None:
    """Accept a file whose format this device's runtime is known to run as the trainer's did.

    Raises:
        ModelError: it is no ONNX file, or of a newer format or operator set.
    """
    try:
        ir, opsets = opsets_of(data)
    except ValueError as error:
        raise ModelError(f"the file is not an ONNX model ({error}); export it again") from error
    if ir > ONNX_IR:
        raise ModelError(f"the model's IR is {ir}, this agent runs up to {ONNX_IR}; update the agent")
    allowed = {"": ONNX_OPSET, "ai.onnx": ONNX_OPSET, "ai.onnx.ml": ONNX_ML_OPSET}
    for domain, version in opsets.items():
        if domain not in allowed:
            raise ModelError(
                f"the model needs operators of {domain[:80]!r}, which no device has; export it without them"
            )
        if version > allowed[domain]:
            raise ModelError(
                f"the model's opset {domain or 'ai.onnx'} is {version}, this agent runs up to {allowed[domain]}; "
                "update the agent"
            )


def _index(names: Sequence[str], name: str) -> int | None:
    return names.index(name) if name in names else None


def _said(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= ERROR_CHARS_MAX else text[: ERROR_CHARS_MAX - 1] + "…"
