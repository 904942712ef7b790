"""A bounded pool of memory: who cannot take from it sheds, and the device keeps the batch.

This is the whole of the gateway's backpressure. While the lake is slow, what was taken is not given back; at the limit
arriving batches are dropped without a word, no acknowledgement comes, and devices buffer, resend and back off by
themselves.
"""

from __future__ import annotations

import threading

import zstandard

from contract.limits import Limits

OVERHEAD_BYTES = 1_024
"""What a batch takes beside its bytes: envelope, topic, Arrow's own objects, a place in queues."""
SHEDDING_S = 2.0
"""So long after a batch was shed nothing is asked for again: it would come only to be shed."""


class MemoryBudget:
    """Bytes that may be held between broker and lake. Safe to use from several threads.

    Args:
        bytes_max: the limit.
    """

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._taken = 0
        self._highest = 0
        self._shed_at_s = float("-inf")
        self._lock = threading.Lock()

    @property
    def taken_bytes(self) -> int:
        """Bytes taken now."""
        return self._taken

    @property
    def highest_bytes(self) -> int:
        """Most bytes that were ever taken at once."""
        return self._highest

    def take(self, size_bytes: int) -> bool:
        """Take bytes; False where they are not there, and nothing is taken."""
        with self._lock:
            taken = self._taken + size_bytes
            if taken > self.bytes_max:
                return False
            self._taken = taken
            self._highest = max(self._highest, taken)
            return True

    def give_back(self, size_bytes: int) -> None:
        """Give bytes back.

        Raises:
            ValueError: more than was taken; a fault of ours that would make the limit meaningless.
        """
        with self._lock:
            if size_bytes > self._taken:
                raise ValueError(f"{size_bytes} bytes given back, {self._taken} were taken")
            self._taken -= size_bytes

    def shed(self, now_s: float) -> None:
        """Note that a batch had to be dropped, at monotonic time `now_s`."""
        self._shed_at_s = now_s

    def shedding(self, now_s: float) -> bool:
        """Whether a batch was dropped a moment ago."""
        return now_s - self._shed_at_s < SHEDDING_S


def unpacked_bytes(body: bytes, limits: Limits) -> int:
    """What a body says that it takes once unpacked.

    0 for what is refused before anything is unpacked: no zstd frame, a frame without its size, or one above the limit.
    """
    try:
        size = int(zstandard.frame_content_size(body))
    except zstandard.ZstdError:
        return 0
    return size if 0 <= size <= limits.body_bytes_max else 0
