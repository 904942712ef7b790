"""The latest windows of one release on one device, in little memory: for each, what figures need and no more."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from lake.monitoring.detector import Detector

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Array = npt.NDArray[Any]
ROW = np.dtype([("end_us", "i8"), ("latency_us", "i8"), ("score", "f8"), ("nan", "?")])


class Ring:
    """The latest values, in the order in which they came. Pages that were never written take no memory.

    Args:
        most: that are kept.
        kind: of each.
        width: numbers of each; 0 for one that is no array.
    """

    def __init__(self, most: int, kind: npt.DTypeLike, width: int = 0) -> None:
        self._kept: Array = np.empty((most, width) if width else most, kind)
        self._came = 0

    def __len__(self) -> int:
        """How many are kept."""
        return min(self._came, len(self._kept))

    @property
    def width(self) -> int:
        """Numbers of each."""
        return int(self._kept.shape[1]) if self._kept.ndim == 2 else 0

    def add(self, value: Any) -> None:
        """One more; the oldest goes where there is no room."""
        self._kept[self._came % len(self._kept)] = value
        self._came += 1

    def values(self) -> Array:
        """All that are kept, the oldest first. Not to be written to."""
        if self._came <= len(self._kept):
            return self._kept[: self._came]
        oldest = self._came % len(self._kept)
        return np.concatenate((self._kept[oldest:], self._kept[:oldest]))


class Recent:
    """One release on one device.

    Args:
        windows_max: that are kept.
        baseline_windows: with features, that a baseline is made of.
    """

    def __init__(self, windows_max: int, baseline_windows: int) -> None:
        self._windows_max, self._baseline_windows = windows_max, baseline_windows
        self.rows = Ring(windows_max, ROW)
        self.labels: deque[str] = deque(maxlen=windows_max)
        """Of `rows`."""
        self.sampled: Ring | None = None
        """Features and, as the last, the score of windows that carry them; as float32, which is what came, because
        these are most of the memory."""
        self.sampled_labels: deque[str] = deque(maxlen=windows_max)
        self.first: list[tuple[Float32s, str]] = []
        """The first of them, until there is a baseline."""
        self.detector: Detector | None = None
        self.fresh = False

    @property
    def width(self) -> int | None:
        """Features of a window; None before one came."""
        return None if self.sampled is None else self.sampled.width - 1

    def add(self, row: tuple[int, int, float, bool], label: str) -> None:
        """One window, as `ROW` has it."""
        self.rows.add(row)
        self.labels.append(label)
        self.fresh = True

    def sample(self, value: Float32s, label: str) -> None:
        """Features and score of a window: `[F + 1]`."""
        if self.sampled is None:
            self.sampled = Ring(self._windows_max, np.float32, len(value))
        self.sampled.add(value)
        self.sampled_labels.append(label)
        if self.detector is not None:
            self.detector.add(value.astype(np.float64), label)
        elif len(self.first) < self._baseline_windows:
            self.first.append((value, label))

    def detect(self, detector: Detector) -> None:
        """Begin to detect, with what is remembered."""
        self.detector, self.first = detector, []
        for value, label in zip(self.values(), self.sampled_labels, strict=True):
            detector.add(value, label)

    def values(self) -> Float64s:
        """Features and score of the windows that carry them, `[N, F + 1]`; `[0, 0]` where none does."""
        return np.zeros((0, 0)) if self.sampled is None else self.sampled.values().astype(np.float64)
