"""How long to wait before trying again: exponential backoff with full jitter, so that a fleet does not return at once.

Devices and gateways lose the same broker at the same moment; both come back by this rule.

Source: "Exponential Backoff And Jitter", M. Brooker, AWS Architecture Blog, 2015 (full jitter).
"""

from __future__ import annotations

import random


class Backoff:
    """Delays drawn evenly from 0 to a ceiling that doubles with each failure, up to a cap.

    Args:
        base_s: the first ceiling, seconds, above 0.
        cap_s: the highest ceiling, seconds, at least `base_s`.
        rng: where the jitter comes from; seeded in tests.

    Attributes:
        failures: delays given since the last reset.
    """

    def __init__(self, base_s: float, cap_s: float, rng: random.Random) -> None:
        if not 0 < base_s <= cap_s:
            raise ValueError(f"backoff of base {base_s} s and cap {cap_s} s; choose 0 < base <= cap")
        self._base_s, self._cap_s, self._rng = base_s, cap_s, rng
        self.failures = 0

    @property
    def ceiling_s(self) -> float:
        """The longest that the next delay can be, seconds."""
        # Beyond 2**60 the power would only lose itself in the cap, and much later overflow a float.
        return min(self._cap_s, self._base_s * 2.0 ** min(self.failures, 60))

    def next_delay_s(self) -> float:
        """Count one more failure and draw the wait after it, seconds."""
        delay_s = self._rng.uniform(0.0, self.ceiling_s)
        self.failures += 1
        return delay_s

    def reset(self) -> None:
        """Begin again at the base: what failed has worked for a while."""
        self.failures = 0
