"""How features and scores were distributed in training: the artifact that drift is measured against.

A distribution is kept as 101 quantiles, 0 to 100 %: once over all windows and once for each label, because what one
device sees is rarely mixed as the training set was: who only walks has not drifted. `mixed` puts a reference together
for the labels as a device has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from contract.errors import ConfigurationError
from lake.monitoring.drift import PSI_MAX, Mixture, compare

REFERENCE_BYTES_MAX = 64 * 1024 * 1024
QUANTILES = 101
"""At 0, 1, … 100 %."""
LABEL_WINDOWS_MIN = 30
"""A label with fewer training windows has no distribution of its own."""
LABELS_MAX = 64
"""Labels with a distribution of their own, the most frequent ones."""
GROUPS_MAX = 32
"""Groups whose distance from the others is measured."""
SPREAD_MARGIN = 1.25
"""Times its spread a feature may be away."""
SCORE = "score"
"""Name of the score where features and score stand together."""

Floats = npt.NDArray[np.floating[Any]]
Quantiles = npt.NDArray[np.float64]


class FeatureReference(msgspec.Struct, frozen=True, kw_only=True):
    """One feature, or the score, over all training windows."""

    name: str
    quantiles: tuple[float, ...]
    """`QUANTILES` values, rising."""
    nan_share: float = 0.0
    """Part of the windows in which it was not a number; they are in no quantile."""
    spread: float = 0.0
    """Usual distance, as PSI, of one training group (device, person) from the others: such a distance is no drift."""


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """The score of the chosen label, or the anomaly score."""

    quantiles: tuple[float, ...]
    nan_share: float = 0.0
    spread: float = 0.0
    """Largest distance, as PSI, of one training group from the others."""


class LabelReference(msgspec.Struct, frozen=True, kw_only=True):
    """The same of the windows with one label."""

    features: tuple[tuple[float, ...], ...]
    """Quantiles of each feature, in the order of `Reference.features`."""
    scores: tuple[float, ...]


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """What `reference.json` holds."""

    v: int = 1
    windows: int = 1_000
    """Training windows it was made of."""
    nan_windows: float = 0.0
    """Part of them with a value missing."""
    features: tuple[FeatureReference, ...]
    scores: Scores
    labels: dict[str, float] = {}
    """Share of each label."""
    by_label: dict[str, LabelReference] = {}
    drifted_share: float = 0.0
    """Largest part of the features in which one training group is further from the others than PSI_MAX and
    SPREAD_MARGIN times the feature's spread."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the features, and `SCORE` as the last."""
        return (*(feature.name for feature in self.features), SCORE)

    @property
    def spreads(self) -> Quantiles:
        """`[F + 1]`: of the features and the score."""
        return np.array([*(feature.spread for feature in self.features), self.scores.spread], np.float64)


def make_reference(
    features: Floats,
    scores: Floats,
    labels: Sequence[str] | npt.NDArray[np.str_] | None = None,
    *,
    names: Sequence[str] | None = None,
    groups: Sequence[str] | npt.NDArray[np.str_] | None = None,
    nan_windows: float = 0.0,
) -> Reference:
    """Measure the training windows.

    Args:
        features: `float32[N, F]`, as the graph gives them.
        scores: `float32[N]`, or `[N, K]` of which the largest of each window counts.
        labels: `[N]` as the model says them ("" for none); None or empty where it has no labels.
        names: of the features; None: `f0`, `f1`, …
        groups: `[N]`: device or person; None where it is not known, and no spread is measured.
        nan_windows: part of the windows with a value missing.

    Raises:
        ConfigurationError: there is no window, or the shapes do not fit each other.
    """
    values = _together(features, scores)
    names = tuple(names) if names is not None else tuple(f"f{number}" for number in range(features.shape[1]))
    if len(names) != features.shape[1]:
        raise ConfigurationError(f"there are {features.shape[1]} features but {len(names)} names; give one for each")
    said = np.array([""] * len(values) if labels is None or not len(labels) else labels, dtype=np.str_)
    if len(said) != len(values):
        raise ConfigurationError(f"there are {len(values)} windows but {len(said)} labels; give one for each")
    whole = msgspec.structs.replace(_measured(names, values, said), nan_windows=nan_windows)
    if groups is None:
        return whole
    if len(groups) != len(values):
        raise ConfigurationError(f"there are {len(values)} windows but {len(groups)} groups; give one for each")
    distances = _distances(names, values, said, np.asarray(groups, dtype=np.str_))
    if len(distances) < 2:
        return whole
    spread = np.median(distances, axis=0).tolist()
    beyond = distances[:, :-1] > np.maximum(PSI_MAX, SPREAD_MARGIN * np.array(spread[:-1]))
    return msgspec.structs.replace(
        whole,
        drifted_share=float(beyond.mean(axis=1).max()),
        features=tuple(
            msgspec.structs.replace(feature, spread=value)
            for feature, value in zip(whole.features, spread[:-1], strict=True)
        ),
        # One figure of a device, not one of many: here the furthest group is the measure.
        scores=msgspec.structs.replace(whole.scores, spread=float(distances[:, -1].max())),
    )


def encode_reference(reference: Reference) -> bytes:
    """The bytes of `reference.json`; the same reference gives the same bytes."""
    return msgspec.json.encode(reference, order="deterministic")


def decode_reference(data: bytes) -> Reference:
    """Read `reference.json`.

    Raises:
        ConfigurationError: it is none, or of another version.
    """
    try:
        found = msgspec.json.decode(data, type=Reference)
    except msgspec.MsgspecError as error:
        raise ConfigurationError(f"the drift reference cannot be read ({error}); export the model again") from error
    parts = [feature.quantiles for feature in found.features] + [found.scores.quantiles]
    for label in found.by_label.values():
        parts += [*label.features, label.scores]
    fits = all(len(label.features) == len(found.features) for label in found.by_label.values())
    if found.v != 1 or not fits or any(len(part) != QUANTILES for part in parts):
        raise ConfigurationError(
            f"the drift reference is version {found.v} with other parts than version 1 has; export the model again"
        )
    return found


def mixed(reference: Reference, shares: Mapping[str, float] | None = None) -> Mixture:
    """The distributions that are to be expected where labels are mixed in these shares.

    Args:
        reference: of the release.
        shares: of each label; labels without a distribution of their own count as the whole training set. None: as
            they were in training.
    """
    parts: list[tuple[float, Quantiles]] = []
    known = {label: share for label, share in (shares or {}).items() if share > 0 and label in reference.by_label}
    rest = sum((shares or {}).values()) - sum(known.values()) if shares else 1.0
    if rest > 1e-9 or not known:
        quantiles = [*(feature.quantiles for feature in reference.features), reference.scores.quantiles]
        parts.append((rest if known else 1.0, np.array(quantiles, np.float64)))
    for label, share in known.items():
        own = reference.by_label[label]
        parts.append((share, np.array([*own.features, own.scores], np.float64)))
    # A quantile stands for the values around it: the outermost for half as many.
    weight = np.full(QUANTILES, 1.0)
    weight[0] = weight[-1] = 0.5
    points = np.concatenate([quantiles for _, quantiles in parts], axis=1)
    weights = np.concatenate([share * weight for share, _ in parts])
    order = np.argsort(points, axis=1, kind="stable")
    sorted_weights = (weights / weights.sum())[order]
    above = np.cumsum(sorted_weights[:, ::-1], axis=1)[:, ::-1]
    return Mixture(np.take_along_axis(points, order, axis=1), above)


def shares_of(labels: Sequence[str] | npt.NDArray[np.str_]) -> dict[str, float]:
    """The share of each label among windows; "" stands for none and counts as one."""
    found, counts = np.unique(np.asarray(labels, dtype=np.str_), return_counts=True)
    return {str(label): float(count) / len(labels) for label, count in zip(found, counts, strict=True)}


def _together(features: Floats, scores: Floats) -> Quantiles:
    """`float64[N, F + 1]`, the score as the last column."""
    if features.ndim != 2 or not len(features) or len(scores) != len(features):
        raise ConfigurationError(
            f"features {features.shape} and scores {scores.shape} make no reference; give [N, F] and [N], N above 0"
        )
    chosen = scores.max(axis=1) if scores.ndim == 2 else scores
    return np.column_stack([features.astype(np.float64), chosen.astype(np.float64)])


def _measured(names: Sequence[str], values: Quantiles, labels: npt.NDArray[np.str_]) -> Reference:
    quantiles = _quantiles(values)
    nan_share = np.isnan(values).mean(axis=0)
    shares = {label: share for label, share in shares_of(labels).items() if label}
    by_label = {}
    for label in sorted(shares, key=lambda label: (-shares[label], label))[:LABELS_MAX]:
        own = labels == label
        if own.sum() >= LABEL_WINDOWS_MIN:
            *inner, scores = _quantiles(values[own])
            by_label[label] = LabelReference(features=tuple(inner), scores=scores)
    return Reference(
        windows=len(values),
        features=tuple(
            FeatureReference(name=name, quantiles=quantiles[number], nan_share=float(nan_share[number]))
            for number, name in enumerate(names)
        ),
        scores=Scores(quantiles=quantiles[-1], nan_share=float(nan_share[-1])),
        labels=shares,
        by_label=by_label,
    )


def _quantiles(values: Quantiles) -> list[tuple[float, ...]]:
    """Of each column, NaN left out; 0 where there is nothing else."""
    at = np.linspace(0, 1, QUANTILES)
    finite = np.isfinite(values)
    if finite.all():
        return [tuple(points) for points in np.quantile(values, at, axis=0).T.tolist()]
    found = []
    for column, good in zip(values.T, finite.T, strict=True):
        found.append(tuple(np.quantile(column[good], at).tolist() if good.any() else [0.0] * QUANTILES))
    return found


def _distances(
    names: Sequence[str], values: Quantiles, labels: npt.NDArray[np.str_], groups: npt.NDArray[np.str_]
) -> Quantiles:
    """`[groups, F + 1]`: PSI of each group against all others, the labels mixed as it has them."""
    distances = []
    for group in np.unique(groups)[:GROUPS_MAX]:
        own = groups == group
        if own.sum() < LABEL_WINDOWS_MIN or (~own).sum() < LABEL_WINDOWS_MIN:
            continue
        others = _measured(names, values[~own], labels[~own])
        distances.append(compare(mixed(others, shares_of(labels[own])), values[own]).psi)
    return np.array(distances).reshape(len(distances), values.shape[1])
