"""The proof that the exported model answers as the trained one did, or the reason why there is no release.

The judged windows are put to the exported file by a fresh process that has nothing but the file and onnxruntime, all
at once and one by one. What it says is compared with what scikit-learn says of the features with which it was trained:

- `features` with those of training, made by the feature graph alone, in batches, in the process of the search: equal to
  the bit;
- `nan_count` with the windows themselves: equal;
- `score` with scikit-learn's in float64 on these features, rounded once to float32: of trees equal to the bit, of
  other families within their tolerance (`families.CLOSE`: of the magnitude, absolute below 1);
- `label` with the first class of the highest such score, or 1 above the threshold: equal;
- each output for one window at a time with the same output in batches: equal to the bit, but for the scores of other
  families than trees, which have their tolerance here, too.

A difference is an error that names the output and how many windows differ; the model stays where it is.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.errors import TrainingError
from trainer.runtime import Answers, open_session, run_model

Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]

WINDOWS_MAX = 20_000
"""Judged windows that are compared, evenly chosen."""
SINGLES_MAX = 2_000
"""Of these, put to the model one by one, too."""
DEADLINE_S = 600.0
_ARRAYS = ("score", "label", "nan_count", "features")


class Expected(NamedTuple):
    """What training says of some windows."""

    windows: Float32s
    """`[N, W, C]`."""
    features: Float32s
    """`[N, F]`, the columns that the model has, as they were in training."""
    score: Float32s
    label: Int64s


class Parity(NamedTuple):
    """What was proved."""

    windows: int
    singles: int
    score_difference_max: float
    tolerance: float


def evenly(count: int, limit: int) -> Int64s:
    """At most `limit` of `count` indices, evenly chosen."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).astype(np.int64))


def prove(model: Path, expected: Expected, tolerance: float) -> Parity:
    """Compare the exported model with the trained one.

    Args:
        model: the ONNX file.
        expected: at least one window.
        tolerance: of scores; 0 for equal to the bit.

    Raises:
        TrainingError: they differ, or the fresh process failed.
    """
    singles = evenly(len(expected.windows), SINGLES_MAX)
    with TemporaryDirectory(prefix="headwater-parity-") as folder:
        batch, single = _ask(model, expected.windows, singles, Path(folder))
    missing = np.count_nonzero(~np.isfinite(expected.windows), axis=(1, 2))
    _same_bits("features", batch.features, expected.features)
    _same_bits("nan_count", batch.nan_count, missing.astype(np.int64))
    difference = _close("score", batch.score, expected.score, tolerance)
    _same_bits("label", batch.label, expected.label)
    _same_bits("features one by one", single.features, batch.features[singles])
    _same_bits("nan_count one by one", single.nan_count, batch.nan_count[singles])
    difference = max(difference, _close("score one by one", single.score, batch.score[singles], tolerance))
    _same_bits("label one by one", single.label, batch.label[singles])
    return Parity(len(expected.windows), len(singles), difference, tolerance)


def _same_bits(what: str, found: npt.NDArray[np.generic], wanted: npt.NDArray[np.generic]) -> None:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise TrainingError(
            f"{what} of the exported model is {found.dtype} {found.shape}, in training {wanted.dtype} {wanted.shape}: "
            "no release; this is a fault of the export"
        )
    rows = (len(found), -1)
    unequal = (found.view(np.uint8).reshape(rows) != wanted.view(np.uint8).reshape(rows)).any(axis=1)
    if count := int(np.count_nonzero(unequal)):
        raise TrainingError(
            f"{what} of the exported model is not that of training in {count} of {len(found)} windows, first in "
            f"{int(unequal.argmax())}: no release; train again with the installed versions, or leave the family out"
        )


def _close(what: str, found: Float32s, wanted: Float32s, tolerance: float) -> float:
    """The largest difference."""
    if tolerance == 0.0:
        _same_bits(what, found, wanted)
        return 0.0
    if found.shape != wanted.shape or not np.isfinite(found).all():
        raise TrainingError(f"{what} of the exported model is not finite, or not of shape {wanted.shape}: no release")
    away = np.abs(found.astype(np.float64) - wanted) / np.maximum(1.0, np.abs(wanted))
    if (most := float(away.max(initial=0.0))) > tolerance:
        raise TrainingError(
            f"{what} of the exported model is up to {most:.3g} from that of training, more than {tolerance:g}: no "
            "release; leave the family out of [families]"
        )
    return most


def _ask(model: Path, windows: Float32s, singles: Int64s, folder: Path) -> tuple[Answers, Answers]:
    """The answers of a fresh process, in batches and one by one."""
    try:
        np.save(folder / "windows.npy", windows)
        np.save(folder / "singles.npy", singles)
        # One thread, and a path of its own: nothing of this process's state may help the model.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-m", "trainer.parity", str(model.resolve()), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=environment, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise TrainingError(f"the exported model fails in a fresh process ({last[:500]}): no release")
        found = []
        for kind in ("batch", "single"):
            parts = [np.load(folder / f"{kind}-{name}.npy", allow_pickle=False) for name in _ARRAYS]
            found.append(Answers(*parts))
    except subprocess.TimeoutExpired as error:
        raise TrainingError(
            f"the exported model did not answer {len(windows)} windows within {DEADLINE_S:g} s: no release; take a "
            "smaller model"
        ) from error
    except OSError as error:
        raise TrainingError(f"the parity proof cannot write in {folder} ({error}); make room there") from error
    return found[0], found[1]


def main(model: str, folder: str) -> None:
    """The fresh process: `python -m trainer.parity MODEL FOLDER`."""
    place = Path(folder)
    session = open_session(Path(model).read_bytes())
    windows = np.load(place / "windows.npy", mmap_mode="r")
    single = np.load(place / "singles.npy")
    batch = run_model(session, windows)
    alone = run_model(session, windows[single], rows=1)
    for kind, answers in (("batch", batch), ("single", alone)):
        for name in _ARRAYS:
            np.save(place / f"{kind}-{name}.npy", getattr(answers, name))


def probe_tolerance(tolerance: float) -> float:
    """By how much a device may differ in a score: its CPU may round float64 otherwise (see `trainer.graph`)."""
    return tolerance if tolerance > 0 and math.isfinite(tolerance) else 1e-6


if __name__ == "__main__":
    main(*sys.argv[1:])
