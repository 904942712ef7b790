"""Which windows train, which judge, and the folds in between. Pure; the same seed draws the same split."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


class Fold(NamedTuple):
    """One turn of the cross-validation: indices into the whole window set."""

    train: Int64s
    valid: Int64s


class Split(NamedTuple):
    """Indices into a window set; no index is on two sides."""

    train: Int64s
    test: Int64s
    folds: list[Fold]
    """Within `train`."""
    description: str
    """Of the test side, for people and for `contract.models.Metric.split`: `test: group in (s03, s07)`."""
