"""What a gateway knows of releases at work: the latest windows of each release on each device, and figures of them.

Pure: rows and references are handed in. Everything kept is bounded: devices, windows per device, features.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from lake.monitoring.detector import LIMIT, Baseline, Change, Detector, make_baseline
from lake.monitoring.drift import Distance, Mixture, compare, ks_noise, psi_noise
from lake.monitoring.feed import Predictions
from lake.monitoring.reference import SCORE, SPREAD_MARGIN, Reference, mixed, shares_of

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
TOP = 5
"""Features that are named."""
SHARE_MARGIN = 1.25
SHARE_MIN = 0.05
"""So much of the features must have drifted, whatever training groups do."""


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """How much is looked at, and how little is too little."""

    windows_min: int = 30
    """Fewer windows are not judged. Of features: those that carry them."""
    windows_max: int = 300
    """The latest windows that figures are of."""
    baseline_windows: int = 60
    """The first windows with features of a release on a device, which the detector measures from."""
    devices_max: int = 1_000
    """Releases on devices in memory; beyond, the one heard of longest ago is forgotten."""


class FeatureDrift(msgspec.Struct, frozen=True):
    """One feature's distance from training."""

    name: str
    psi: float
    ks: float
    threshold: float
    """Of the PSI: the policy's, or more where chance or the differences between training groups demand it."""
    drifted: bool
    """PSI above the threshold, and KS above what chance gives."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One release on one device, over its latest windows."""

    release: int
    device: str
    windows: int
    last_us: int
    """`ts` of the latest window."""
    rate_per_s: float
    """Windows per second of the device's clock."""
    latency_ms_p50: float
    latency_ms_p99: float
    nan_share: float
    """Windows with a missing value, or a score that is NaN."""
    score_mean: float
    labels: dict[str, float]
    sampled: int
    """Windows among them that carry features."""
    features: tuple[FeatureDrift, ...] = ()
    """The `TOP` furthest, the furthest first; none where there are too few windows."""
    drifted_share: float | None = None
    """Part of the features that has drifted; None where it cannot be judged."""
    drifted_share_max: float = 1.0
    score: FeatureDrift | None = None
    change: float | None = None
    """The detector's sum (see `lake.monitoring.detector`); None before there is a baseline."""
    change_max: float = LIMIT
    change_feature: str = ""


class _Row(NamedTuple):
    end_us: int
    latency_us: int
    nan: bool
    score: float
    label: str


class _Recent:
    """One release on one device."""

    def __init__(self, bounds: Bounds) -> None:
        self.rows: deque[_Row] = deque(maxlen=bounds.windows_max)
        # As float32, which is what came, because these are most of the memory.
        self.sampled: deque[tuple[Float32s, str]] = deque(maxlen=bounds.windows_max)
        self.first: list[tuple[Float32s, str]] = []
        self.detector: Detector | None = None
        self.fresh = False


class Observer:
    """The releases of one model on the devices of one gateway. Not thread-safe.

    Args:
        bounds: how much is kept.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._recent: OrderedDict[tuple[int, str], _Recent] = OrderedDict()
        """In the order in which they were heard of last."""
        self.forgotten = 0

    def __len__(self) -> int:
        """Releases on devices in memory."""
        return len(self._recent)

    @property
    def releases(self) -> set[int]:
        """That were heard of."""
        return {release for release, _ in self._recent}

    def newest(self) -> dict[str, int]:
        """By device: the release whose windows came last. Clocks of devices have no say: one that was years ahead for a
        moment would hide every later release."""
        return {device: release for release, device in self._recent}

    def add(self, rows: Predictions, mine: Callable[[str], bool] = lambda device: True) -> None:
        """See new rows.

        Args:
            rows: in the order in which they came.
            mine: whose devices count.
        """
        for number, device in enumerate(rows.device):
            if not mine(device):
                continue
            key = int(rows.release[number]), device
            recent = self._recent.get(key)
            if recent is None:
                recent = self._recent[key] = _Recent(self._bounds)
                while len(self._recent) > self._bounds.devices_max:
                    self._recent.popitem(last=False)
                    self.forgotten += 1
            self._recent.move_to_end(key)
            recent.fresh = True
            score, label = float(rows.score[number]), rows.label[number]
            nan = bool(rows.nan_count[number] > 0 or np.isnan(score))
            recent.rows.append(_Row(int(rows.end_us[number]), int(rows.latency_us[number]), nan, score, label))
            features = rows.features[number]
            if features is not None:
                self._sample(recent, np.append(features, score).astype(np.float32), label)

    def _sample(self, recent: _Recent, value: Float32s, label: str) -> None:
        recent.sampled.append((value, label))
        if recent.detector is not None:
            recent.detector.add(value.astype(np.float64), label)
        elif len(recent.first) < self._bounds.baseline_windows:
            recent.first.append((value, label))

    def fresh(self) -> list[tuple[int, str]]:
        """Releases on devices with rows since they were measured last, those heard of longest ago first."""
        return [key for key, recent in self._recent.items() if recent.fresh]

    def candidate(self, key: tuple[int, str], reference: Reference) -> Baseline | None:
        """The baseline that is to be, once there are windows enough; None while not, or where there is one."""
        recent = self._recent[key]
        if recent.detector is not None or len(recent.first) < self._bounds.baseline_windows:
            return None
        values = self._fitting(recent.first, reference)
        return None if values is None else make_baseline(values, [label for _, label in recent.first], reference)

    def needs_baseline(self, key: tuple[int, str]) -> bool:
        """Whether the detector does not run yet."""
        return self._recent[key].detector is None

    def set_baseline(self, key: tuple[int, str], baseline: Baseline) -> None:
        """Begin to detect, with what is remembered."""
        recent = self._recent[key]
        recent.detector, recent.first = Detector(baseline), []
        for value, label in recent.sampled:
            recent.detector.add(value.astype(np.float64), label)

    def measure(self, key: tuple[int, str], reference: Reference | None, psi_max: float, overlap: float) -> Figures:
        """Figures of a release on a device.

        Args:
            key: release and device.
            reference: of the release; None where it has none, and drift is not measured.
            psi_max: of the policy.
            overlap: `rows / stride` of the window, at least 1: so many neighbours share their readings.
        """
        recent = self._recent[key]
        recent.fresh = False
        rows = list(recent.rows)
        latency_ms = np.array([row.latency_us for row in rows]) / 1000
        scores = np.array([row.score for row in rows])
        span_us = rows[-1].end_us - rows[0].end_us
        labels = Counter(row.label for row in rows)
        figures = Figures(
            release=key[0],
            device=key[1],
            windows=len(rows),
            last_us=rows[-1].end_us,
            rate_per_s=(len(rows) - 1) / (span_us / 1e6) if span_us > 0 else 0.0,
            latency_ms_p50=float(np.quantile(latency_ms, 0.5)),
            latency_ms_p99=float(np.quantile(latency_ms, 0.99)),
            nan_share=sum(row.nan for row in rows) / len(rows),
            score_mean=float(np.nanmean(scores)) if np.isfinite(scores).any() else float("nan"),
            labels={label: count / len(rows) for label, count in sorted(labels.items())},
            sampled=len(recent.sampled),
        )
        if reference is None:
            return figures
        return self._with_drift(figures, recent, reference, psi_max, max(1.0, overlap))

    def _with_drift(
        self, figures: Figures, recent: _Recent, reference: Reference, psi_max: float, overlap: float
    ) -> Figures:
        changes: dict[str, object] = {}
        rows = recent.rows
        # Neighbours are alike: the first minute of a device is no sample of what it does.
        if len(rows) >= max(self._bounds.windows_min, self._bounds.windows_max // 2):
            mixture = _part(mixed(reference, figures.labels), slice(-1, None))
            scores = np.array([[row.score] for row in rows])
            distance = compare(mixture, scores)
            changes["score"] = _judged([SCORE], distance, reference, reference.spreads[-1:], psi_max, overlap)[0]
        values = self._fitting(list(recent.sampled), reference)
        if values is not None and len(values) >= self._bounds.windows_min:
            shares = shares_of([label for _, label in recent.sampled])
            distance = compare(_part(mixed(reference, shares), slice(0, -1)), values[:, :-1])
            # Sampled windows overlap less than neighbours do.
            apart = max(1.0, overlap * len(values) / max(1, len(rows)))
            found = _judged(reference.names[:-1], distance, reference, reference.spreads[:-1], psi_max, apart)
            changes["features"] = tuple(sorted(found, key=lambda one: one.threshold - one.psi)[:TOP])
            changes["drifted_share"] = sum(one.drifted for one in found) / max(1, len(found))
            changes["drifted_share_max"] = min(0.99, max(SHARE_MIN, SHARE_MARGIN * reference.drifted_share))
        if recent.detector is not None:
            change: Change = recent.detector.change()
            names = reference.names
            changes |= {"change": change.value, "change_feature": names[change.feature] if names else ""}
        return msgspec.structs.replace(figures, **changes)

    def _fitting(self, sampled: list[tuple[Float32s, str]], reference: Reference) -> Float64s | None:
        """`[N, F + 1]`; None where there are none, or rows have other features than the release was trained on."""
        if not sampled or any(len(value) != len(reference.features) + 1 for value, _ in sampled):
            return None
        return np.array([value for value, _ in sampled], dtype=np.float64)


def _part(mixture: Mixture, features: slice) -> Mixture:
    return Mixture(mixture.points[features], mixture.above[features])


def _judged(
    names: tuple[str, ...] | list[str],
    distance: Distance,
    reference: Reference,
    spreads: Float64s,
    psi_max: float,
    overlap: float,
) -> list[FeatureDrift]:
    found = []
    for number, name in enumerate(names):
        sample, training = distance.counted[number] / overlap, reference.windows / overlap
        threshold = max(psi_max, psi_noise(sample, training), SPREAD_MARGIN * float(spreads[number]))
        psi, ks = float(distance.psi[number]), float(distance.ks[number])
        drifted = psi > threshold and ks > ks_noise(sample, training)
        found.append(FeatureDrift(name, psi, ks, threshold, drifted))
    return found
