"""What models learn from: the features of all windows, as the graph gives them, and what is known of each window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.errors import DataError
from trainer.faults import inject, spread
from trainer.graph import FeatureSpec, build_graph
from trainer.recipe import Recipe
from trainer.runtime import open_session, run_features
from trainer.split import Split
from trainer.windowset import WindowMeta, WindowSet

Float32s = npt.NDArray[np.float32]
Int64s = npt.NDArray[np.int64]

FEATURES_FILE = "features.npy"
FAULTY_FILE = "faulty.npy"
WITHOUT_LABEL = -1


@dataclass(frozen=True, eq=False)
class Material:
    """Features and labels of a dataset, row for row with its windows."""

    spec: FeatureSpec
    features: Float32s
    """`[N, F]` in the order of `spec.names()`."""
    labels: Int64s | None
    """`[N]` indices of `classes`, WITHOUT_LABEL where there is none; None for anomalies, which learn without."""
    classes: tuple[str, ...]
    faulty: Float32s | None = None
    """Anomalies: the features of the same windows with a fault put in."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns of `features`."""
        return self.spec.names()

    def save(self, folder: Path) -> None:
        """Write the features, so that later steps need not compute them again.

        Raises:
            OSError: the disk refused.
        """
        np.save(folder / FEATURES_FILE, self.features)
        if self.faulty is not None:
            np.save(folder / FAULTY_FILE, self.faulty)


def feature_spec(recipe: Recipe, meta: WindowMeta) -> FeatureSpec:
    """The features that a recipe asks for."""
    kinds = recipe.features.include
    given = {"kinds": kinds} if kinds else {}
    # The measured rate of a stream is a little off its nominal one; bands are named by it, so it is rounded.
    rate = None if meta.sample_rate_hz is None else float(f"{meta.sample_rate_hz:.3g}")
    return FeatureSpec(recipe.window.rows, meta.fields, bands=recipe.features.bands, sample_rate_hz=rate, **given)


def class_indices(dataset: WindowSet) -> Int64s:
    """The labels as indices of the classes.

    Raises:
        DataError: there are none, or of one class only.
    """
    if dataset.labels is None or len(dataset.classes) < 2:
        found = ", ".join(dataset.classes) or "none"
        raise DataError(
            f"the windows have labels of {len(dataset.classes)} class(es) ({found}), and a classification needs two; "
            "check [labels], or take rows in which more happens"
        )
    position = {name: number for number, name in enumerate(dataset.classes)}
    return np.array([position.get(label, WITHOUT_LABEL) for label in dataset.labels.tolist()], dtype=np.int64)


def make_material(
    dataset: WindowSet, recipe: Recipe, split: Split, seed: int, done: Callable[[int], None] | None = None
) -> Material:
    """Compute the features of all windows.

    Args:
        dataset: the windows.
        recipe: which features.
        split: what faults are scaled by is learned from its training windows.
        seed: of the faults.
        done: called with the number of further windows that are done.

    Raises:
        ConfigurationError: the features cannot be computed of such windows.
        DataError: no windows, or labels of one class only.
    """
    if not len(dataset):
        raise DataError("the dataset has no windows; see headwater train checks RECIPE for what became of its rows")
    spec = feature_spec(recipe, dataset.meta)
    session = open_session(build_graph(spec))
    features, _ = run_features(session, dataset.windows, done)
    if recipe.task == "classification":
        return Material(spec, features, class_indices(dataset), dataset.classes)
    scale = spread(dataset.pieces(split.train))
    parts = [
        run_features(session, inject(dataset.windows[piece], scale, seed + number))[0]
        for number, piece in enumerate(dataset.chunks())
    ]
    return Material(spec, features, None, (), np.concatenate(parts))


def load_material(dataset: WindowSet, recipe: Recipe, folder: Path) -> Material:
    """What `Material.save` wrote, beside the same dataset.

    Raises:
        DataError: the files are damaged.
    """
    spec = feature_spec(recipe, dataset.meta)
    detector = recipe.task == "anomaly"
    try:
        features = np.load(folder / FEATURES_FILE, allow_pickle=False)
        faulty = np.load(folder / FAULTY_FILE, allow_pickle=False) if detector else None
    except (OSError, ValueError) as error:
        raise DataError(
            f"the features in {folder} cannot be read ({error}); run: headwater train search RECIPE"
        ) from error
    if detector:
        return Material(spec, features, None, (), faulty)
    return Material(spec, features, class_indices(dataset), dataset.classes)
