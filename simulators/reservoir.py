"""A bounded sample of a stream of numbers, from which quantiles are read."""

from __future__ import annotations

import random


class Reservoir:
    """Keeps every value up to `size_max`, then an even sample of all that came.

    Source: J. Vitter, "Random sampling with a reservoir", ACM TOMS 11 (1985), algorithm R.

    Args:
        size_max: values held, at least 1.
        rng: chooses which.

    Attributes:
        count: values that were added.
    """

    def __init__(self, size_max: int, rng: random.Random) -> None:
        if size_max < 1:
            raise ValueError(f"a reservoir of size_max = {size_max} holds nothing; choose 1 or more")
        self._size_max, self._rng = size_max, rng
        self._values: list[float] = []
        self.count = 0

    def add(self, value: float) -> None:
        """Take one more value into account."""
        self.count += 1
        if len(self._values) < self._size_max:
            self._values.append(value)
        elif (place := int(self._rng.random() * self.count)) < self._size_max:
            self._values[place] = value

    def quantile(self, q: float) -> float | None:
        """The smallest held value that at least the part `q` (0 to 1) of them does not exceed; None of nothing."""
        if not self._values:
            return None
        ordered = sorted(self._values)
        return ordered[min(len(ordered) - 1, max(0, -int(-q * len(ordered) // 1) - 1))]
