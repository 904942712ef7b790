"""Faults put into good windows, so that detectors of anomalies can be compared without a single label.

A detector that was trained on windows of the field should tell the validation windows from the same windows with a
fault in one channel. Each faulty window has one of five kinds, between half a standard deviation and eight (of the
channel, in training), so that no detector finds all:

`offset` the channel moves; `drift` it moves away steadily; `spikes` a tenth of the readings leap; `noise` is added;
`stuck` it stays at its first value.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]

KINDS = ("offset", "drift", "spikes", "noise", "stuck")
SEVERITY_MIN, SEVERITY_MAX = 0.5, 8.0
"""In standard deviations of the channel."""


def spread(windows: Float32s | Iterable[Float32s]) -> Float64s:
    """Standard deviation of each channel over its finite values, `float64[C]`; 1 where it never changes.

    Args:
        windows: `float32[N, W, C]`, or pieces of them, of which one at a time is held.
    """
    count = mean = squares = np.zeros(1)
    for piece in (windows,) if isinstance(windows, np.ndarray) else windows:
        values = piece.reshape(-1, piece.shape[2]).astype(np.float64)
        finite = np.isfinite(values)
        number = finite.sum(axis=0)
        own = np.sum(values, axis=0, where=finite) / np.maximum(1, number)
        away = np.sum(np.square(values - own, where=finite, out=np.zeros_like(values)), axis=0, where=finite)
        # Means and sums of squares of two parts put together (Chan, Golub and LeVeque, 1979).
        every = np.maximum(1, count + number)
        squares = squares + away + (own - mean) ** 2 * count * number / every
        mean = mean + (own - mean) * number / every
        count = count + number
    found = np.sqrt(squares / np.maximum(1, count))
    return np.where(np.isfinite(found) & (found > 0), found, 1.0)


def inject(windows: Float32s, scale: Float64s, seed: int) -> Float32s:
    """The windows, each with one fault.

    Args:
        windows: `float32[N, W, C]`; left as they are.
        scale: of each channel, `[C]`.
        seed: the same one gives the same faults.
    """
    random = np.random.default_rng(seed)
    found = np.array(windows, dtype=np.float32)
    count, rows, channels = found.shape
    kinds = random.choice(KINDS, size=(count,))
    where = random.choice(channels, size=(count,))
    power = np.exp(random.uniform(np.log(SEVERITY_MIN), np.log(SEVERITY_MAX), size=(count,)))
    size = power * scale[where] * random.choice([-1.0, 1.0], size=(count,))
    ramp = np.linspace(0.0, 1.0, rows)
    for number in range(count):
        signal = found[number, :, int(where[number])]
        match str(kinds[number]):
            case "offset":
                signal += np.float32(size[number])
            case "drift":
                signal += (size[number] * ramp).astype(np.float32)
            case "spikes":
                leaps = random.random((rows,)) < 0.1
                leaps[random.integers(rows)] = True
                signal[leaps] += np.float32(size[number])
            case "noise":
                signal += random.normal(0.0, abs(size[number]), rows).astype(np.float32)
            case "stuck":
                signal[:] = signal[0]
    return found
