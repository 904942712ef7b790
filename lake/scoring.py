"""Scoring windows with a release's ONNX model, the same way for the gateway and for batch scoring: one thread, no
spinning, a deadline.

A model of ours is signed, and may still be slow or hang: a run that outlives its deadline is ended by
`RunOptions.terminate`, which onnxruntime looks at between operators, inside loops too.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from contract.errors import HeadwaterError
from contract.models import (
    INPUT,
    OUTPUT_FEATURES,
    OUTPUT_LABEL,
    OUTPUT_NAN_COUNT,
    OUTPUT_SCORE,
    Manifest,
)

Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]

_ERRORS_ONLY = 3
_SAID_MAX = 300
_TYPES = {
    OUTPUT_SCORE: "tensor(float)",
    OUTPUT_LABEL: "tensor(int64)",
    OUTPUT_NAN_COUNT: "tensor(int64)",
    OUTPUT_FEATURES: "tensor(float)",
}


class ModelError(HeadwaterError):
    """A model is not what its manifest says, or failed. Give up on this release: the message names it."""


class ModelTimeoutError(ModelError):
    """A model did not answer in time and was ended."""


class Scores(NamedTuple):
    """What a model says of windows."""

    score: Float32s
    """`[batch]` of an anomaly model, `[batch, K]` of a classifier."""
    label: Int64s | None
    """`[batch]`: index of the class; None where the model gives none."""
    nan_count: Int64s
    """`[batch]`: missing values in each window."""
    features: Float32s | None
    """`[batch, F]`; None where the model gives none."""

    @property
    def chosen(self) -> Float32s:
        """`[batch]`: the score of the label, or the anomaly score."""
        if self.score.ndim == 1 or self.label is None:
            return self.score if self.score.ndim == 1 else self.score.max(axis=1)
        found: Float32s = np.take_along_axis(self.score, self.label[:, None], axis=1)[:, 0]
        return found


class Scorer:
    """A model in memory. May be run by several threads at once.

    Args:
        data: the ONNX file.
        manifest: what it should be.

    Raises:
        ModelError: the bytes are others than the manifest says, cannot be loaded, or do not eat and give what the
            manifest and `contract.models` demand.
    """

    def __init__(self, data: bytes, manifest: Manifest) -> None:
        import onnxruntime  # 30 MB that only who scores shall pay

        self.manifest = manifest
        self._what = f"model {manifest.model} version {manifest.version}"
        if hashlib.sha256(data).hexdigest() != manifest.artifact.sha256:
            raise ModelError(
                f"{self._what}: the artifact's sha256 is not {manifest.artifact.sha256}, as the manifest says; it was "
                "damaged or replaced, release the model anew"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ModelError(f"{self._what} cannot be loaded: {_said(error)}; release it anew") from error
        self._run_options = onnxruntime.RunOptions
        self._check_input()
        self._outputs = self._checked_outputs()

    def score(self, windows: Float32s, deadline_s: float) -> Scores:
        """Score windows.

        Args:
            windows: `[batch, W, C]`, at least one.
            deadline_s: longest time that it may take, seconds.

        Raises:
            ModelTimeoutError: it took longer, and was ended.
            ModelError: it failed, or gave what it had not promised.
        """
        options = self._run_options()
        late = threading.Event()

        def end() -> None:
            late.set()
            options.terminate = True

        timer = threading.Timer(deadline_s, end)
        timer.daemon = True
        timer.start()
        try:
            found = self._session.run(self._outputs, {INPUT: windows}, options)
        except Exception as error:
            if late.is_set():
                raise ModelTimeoutError(
                    f"{self._what} did not answer for {len(windows)} windows within {deadline_s:.3g} s; send fewer, or "
                    "release a faster model"
                ) from error
            raise ModelError(f"{self._what} failed: {_said(error)}; release it anew") from error
        finally:
            timer.cancel()
        return self._checked(dict(zip(self._outputs, found, strict=True)), len(windows))

    def _checked(self, found: dict[str, Any], batch: int) -> Scores:
        """A wrong shape would give each window the answer of another."""
        manifest = self.manifest
        shapes = {
            OUTPUT_SCORE: (batch, len(manifest.classes)) if manifest.classes else (batch,),
            OUTPUT_LABEL: (batch,),
            OUTPUT_NAN_COUNT: (batch,),
            OUTPUT_FEATURES: (batch, len(manifest.features)),
        }
        for name, values in found.items():
            if values.shape != shapes[name]:
                raise ModelError(f"{self._what}: output {name} is {values.shape}, not {shapes[name]}; release it anew")
        label = found.get(OUTPUT_LABEL)
        classes = len(manifest.classes) or 2
        if label is not None and not bool(np.all((label >= 0) & (label < classes))):
            raise ModelError(f"{self._what}: a label is outside 0 .. {classes - 1}; release it anew")
        return Scores(found[OUTPUT_SCORE], label, found[OUTPUT_NAN_COUNT], found.get(OUTPUT_FEATURES))

    def _check_input(self) -> None:
        inputs, manifest = self._session.get_inputs(), self.manifest
        wanted = [manifest.window.rows, len(manifest.fields)]
        if [(each.name, each.type) for each in inputs] != [(INPUT, "tensor(float)")] or inputs[0].shape[1:] != wanted:
            shown = ", ".join(f"{each.name}: {each.type} {each.shape}" for each in inputs)
            raise ModelError(
                f"{self._what}: the model eats {shown or 'nothing'}, not {INPUT}: tensor(float) [batch, {wanted[0]}, "
                f"{wanted[1]}]; release it anew"
            )

    def _checked_outputs(self) -> list[str]:
        kinds = {each.name: each.type for each in self._session.get_outputs()}
        needed = [OUTPUT_SCORE, OUTPUT_NAN_COUNT, *([OUTPUT_LABEL] if self.manifest.classes else [])]
        for name, kind in _TYPES.items():
            if (name in kinds or name in needed) and kinds.get(name) != kind:
                raise ModelError(
                    f"{self._what}: output {name} is {kinds.get(name, 'missing')}, not {kind}; release it anew"
                )
        return [name for name in _TYPES if name in kinds]


def _said(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _SAID_MAX else text[: _SAID_MAX - 1] + "…"
