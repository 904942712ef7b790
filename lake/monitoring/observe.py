"""What a gateway knows of releases at work: the latest windows of each release on each device, and figures of them.

Pure: rows and references are handed in. Everything kept is bounded: devices, windows per device, features.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt

from lake.monitoring.detector import LIMIT, Baseline, Change, Detector, make_baseline
from lake.monitoring.drift import Distance, Mixture, compare, ks_noise, psi_noise
from lake.monitoring.feed import Predictions
from lake.monitoring.persistence import persistence
from lake.monitoring.recent import Recent
from lake.monitoring.reference import SCORE, SPREAD_MARGIN, Reference, mixed, shares_of

Key = tuple[int, str]
"""A release on a device."""
Float64s = npt.NDArray[np.float64]
TOP = 5
"""Features that are named."""
WORDS_MAX = 10_000
LABEL_CHARACTERS_MAX = 200
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
    releases_max: int = 4
    """Of one device in memory: one that invents releases must not push the others out."""


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


class Observer:
    """The releases of one model on the devices of one gateway. Not thread-safe.

    Args:
        bounds: how much is kept.
    """

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._recent: OrderedDict[Key, Recent] = OrderedDict()
        """In the order in which they were heard of last."""
        self._releases: dict[str, list[int]] = {}
        """By device: those of `_recent`, the one heard of last at the end."""
        self._words: dict[str, str] = {}
        self.forgotten = 0

    def __len__(self) -> int:
        """Releases on devices in memory."""
        return len(self._recent)

    def __contains__(self, key: Key) -> bool:
        """Whether a release on a device is in memory."""
        return key in self._recent

    def held(self) -> list[Key]:
        """Releases on devices in memory, those heard of longest ago first."""
        return list(self._recent)

    def newest(self) -> dict[str, int]:
        """By device: the release whose windows came last. Clocks of devices have no say: one that was years ahead for a
        moment would hide every later release."""
        return {device: releases[-1] for device, releases in self._releases.items()}

    def add(
        self,
        rows: Predictions,
        mine: Callable[[str], bool] = lambda device: True,
        width: Callable[[int], int | None] = lambda release: None,
    ) -> None:
        """See new rows.

        Args:
            rows: in the order in which they came.
            mine: whose devices count.
            width: how many features a release has; windows with another number are kept without them. None: as many
                as the first one has.
        """
        for number, device in enumerate(rows.device):
            if not mine(device):
                continue
            key = int(rows.release[number]), device
            recent = self._heard(key)
            score, label = float(rows.score[number]), self._word(rows.label[number])
            nan = bool(rows.nan_count[number] > 0 or np.isnan(score))
            recent.add((int(rows.end_us[number]), int(rows.latency_us[number]), score, nan), label)
            features = rows.features[number]
            wanted = width(key[0]) if recent.width is None else recent.width
            if features is not None and wanted in (None, len(features)):
                recent.sample(np.append(features, score).astype(np.float32), label)

    def _heard(self, key: Key) -> Recent:
        release, device = key
        recent = self._recent.get(key)
        if recent is None:
            recent = self._recent[key] = Recent(self._bounds.windows_max, self._bounds.baseline_windows)
        self._recent.move_to_end(key)
        releases = self._releases.setdefault(device, [])
        if not releases or releases[-1] != release:
            if release in releases:
                releases.remove(release)
            releases.append(release)
            if len(releases) > self._bounds.releases_max:
                self._forget_for_others((releases[0], device))
        while len(self._recent) > self._bounds.devices_max:
            self.forget_oldest()
        return recent

    def forget_oldest(self) -> None:
        """Forget the release on a device that was heard of longest ago, for want of room."""
        self._forget_for_others(next(iter(self._recent)))

    def _forget_for_others(self, key: Key) -> None:
        self.forget(key)
        self.forgotten += 1

    def forget(self, key: Key) -> None:
        """Forget a release on a device."""
        release, device = key
        del self._recent[key]
        self._releases[device].remove(release)
        if not self._releases[device]:
            del self._releases[device]

    def _word(self, text: str) -> str:
        """The same text as one object: labels are few, and each row brings its own."""
        if len(self._words) >= WORDS_MAX:
            self._words.clear()
        return self._words.setdefault(text[:LABEL_CHARACTERS_MAX], text[:LABEL_CHARACTERS_MAX])

    def fresh(self) -> list[Key]:
        """Releases on devices with rows since they were measured last, those heard of longest ago first."""
        return [key for key, recent in self._recent.items() if recent.fresh]

    def candidate(self, key: Key, reference: Reference) -> Baseline | None:
        """The baseline that is to be, once there are windows enough; None while not, or where there is one."""
        recent = self._recent[key]
        if recent.detector is not None or len(recent.first) < self._bounds.baseline_windows:
            return None
        values = np.array([value for value, _ in recent.first], dtype=np.float64)
        if not _fits(values, reference):
            return None
        return make_baseline(values, [label for _, label in recent.first], reference)

    def needs_baseline(self, key: Key) -> bool:
        """Whether the detector does not run yet."""
        return self._recent[key].detector is None

    def set_baseline(self, key: Key, baseline: Baseline) -> None:
        """Begin to detect, with what is remembered."""
        self._recent[key].detect(Detector(baseline))

    def measure(self, key: Key, reference: Reference | None, psi_max: float, overlap: float) -> Figures:
        """Figures of a release on a device.

        Args:
            key: release and device.
            reference: of the release; None where it has none, and drift is not measured.
            psi_max: of the policy.
            overlap: `rows / stride` of the window, at least 1: so many neighbours share their readings.
        """
        recent = self._recent[key]
        recent.fresh = False
        rows = recent.rows.values()
        latency_ms, scores, ends_us = rows["latency_us"] / 1000, rows["score"], rows["end_us"]
        span_us = int(ends_us[-1]) - int(ends_us[0])
        figures = Figures(
            release=key[0],
            device=key[1],
            windows=len(rows),
            last_us=int(ends_us[-1]),
            rate_per_s=(len(rows) - 1) / (span_us / 1e6) if span_us > 0 else 0.0,
            latency_ms_p50=float(np.quantile(latency_ms, 0.5)),
            latency_ms_p99=float(np.quantile(latency_ms, 0.99)),
            nan_share=float(rows["nan"].mean()),
            score_mean=float(np.nanmean(scores)) if np.isfinite(scores).any() else float("nan"),
            labels=shares_of(list(recent.labels)),
            sampled=len(recent.sampled_labels),
        )
        if reference is None:
            return figures
        return self._with_drift(figures, recent, reference, psi_max, max(1.0, overlap))

    def _with_drift(
        self, figures: Figures, recent: Recent, reference: Reference, psi_max: float, overlap: float
    ) -> Figures:
        changes: dict[str, object] = {}
        count = len(recent.rows)
        # Neighbours are alike: the first minute of a device is no sample of what it does.
        if count >= max(self._bounds.windows_min, self._bounds.windows_max // 2):
            mixture = _part(mixed(reference, figures.labels), slice(-1, None))
            scores = recent.rows.values()["score"][:, None]
            alike = np.maximum(overlap, persistence(scores, list(recent.labels)))
            distance = compare(mixture, scores)
            changes["score"] = _judged([SCORE], distance, reference, reference.spreads[-1:], psi_max, alike)[0]
        values = recent.values()
        if len(values) >= self._bounds.windows_min and _fits(values, reference):
            shares = shares_of(list(recent.sampled_labels))
            distance = compare(_part(mixed(reference, shares), slice(0, -1)), values[:, :-1])
            # Sampled windows overlap less than neighbours do.
            alike = persistence(values[:, :-1], list(recent.sampled_labels))
            alike = np.maximum(max(1.0, overlap * len(values) / max(1, count)), alike)
            found = _judged(reference.names[:-1], distance, reference, reference.spreads[:-1], psi_max, alike)
            changes["features"] = tuple(sorted(found, key=lambda one: one.threshold - one.psi)[:TOP])
            changes["drifted_share"] = sum(one.drifted for one in found) / max(1, len(found))
            changes["drifted_share_max"] = min(0.99, max(SHARE_MIN, SHARE_MARGIN * reference.drifted_share))
        if recent.detector is not None:
            change: Change = recent.detector.change()
            names = reference.names
            changes |= {"change": change.value, "change_feature": names[change.feature] if names else ""}
        return msgspec.structs.replace(figures, **changes)


def _fits(values: Float64s, reference: Reference) -> bool:
    """Whether windows have the features that the release was trained on."""
    return bool(values.shape[1] == len(reference.features) + 1)


def _part(mixture: Mixture, features: slice) -> Mixture:
    return Mixture(mixture.points[features], mixture.above[features])


def _judged(
    names: tuple[str, ...] | list[str],
    distance: Distance,
    reference: Reference,
    spreads: Float64s,
    psi_max: float,
    alike: Float64s,
) -> list[FeatureDrift]:
    """Judge features.

    Args:
        names, distance, spreads: of each feature.
        reference: of the release.
        psi_max: of the policy.
        alike: windows that count as one, by feature.
    """
    found = []
    for number, name in enumerate(names):
        sample, training = distance.counted[number] / alike[number], reference.windows / alike[number]
        psi, ks = float(distance.psi[number]), float(distance.ks[number])
        # However few windows count: where training has seen nothing so far out, chance has no say.
        psi_chance, ks_chance = (0.0, 0.0) if ks >= 1.0 else (psi_noise(sample, training), ks_noise(sample, training))
        threshold = max(psi_max, psi_chance, SPREAD_MARGIN * float(spreads[number]))
        found.append(FeatureDrift(name, psi, ks, threshold, psi > threshold and ks > ks_chance))
    return found
