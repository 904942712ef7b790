"""How long values stay as they were: neighbours that are alike tell less than as many independent ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float64s = npt.NDArray[np.float64]
_CORRELATION_MAX = 0.98
"""More cannot be told from a trend in a few hundred windows: 99 of them count as one."""


def persistence(values: Float64s, labels: Sequence[str] | npt.NDArray[np.str_]) -> Float64s:
    """How many neighbours count as one: `(1 + r) / (1 - r)`, r being the correlation of neighbours.

    That is the integrated autocorrelation time of a first-order process (G. V. Bayley, J. M. Hammersley: The
    "effective" number of independent observations in an autocorrelated time series, Supplement to the Journal of the
    Royal Statistical Society 8, 1946), with the bias of a short series corrected to first order (M. G. Kendall: Note on
    bias in the estimation of autocorrelation, Biometrika 41, 1954). Values are taken as distances from the mean of
    their label, so that who changes from walking to running does not count as a trend.

    Args:
        values: `[N, F]`, in the order in which they were measured; what is no number is left out.
        labels: `[N]`.

    Returns:
        `[F]`, at least 1.
    """
    said = np.asarray(labels, dtype=np.str_)
    known = np.isfinite(values)
    apart = np.where(known, values, 0.0)
    for label in np.unique(said):
        own = said == label
        counts = np.maximum(known[own].sum(axis=0), 1)
        apart[own] = np.where(known[own], apart[own] - apart[own].sum(axis=0) / counts, 0.0)
    if len(values) < 3:
        return np.ones(values.shape[1])
    pairs = (known[1:] & known[:-1] & (said[1:] == said[:-1])[:, None]).sum(axis=0)
    counts = known.sum(axis=0)
    together = (apart[1:] * apart[:-1] * (said[1:] == said[:-1])[:, None]).sum(axis=0) / np.maximum(pairs, 1)
    spread = (apart**2).sum(axis=0) / np.maximum(counts, 1)
    raw = np.where(spread > 0, together / np.where(spread > 0, spread, 1.0), 0.0)
    correlation = np.clip(raw + (1 + 3 * raw) / np.maximum(counts, 1), 0.0, _CORRELATION_MAX)
    # No more than what chance gives independent values is told from none.
    correlation = np.where(raw > 2 / np.sqrt(np.maximum(pairs, 1)), correlation, 0.0)
    found: Float64s = (1 + correlation) / (1 - correlation)
    return found
