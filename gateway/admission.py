"""Admission: may this batch go to the lake now? Pure functions over sequence numbers, the heart of exactly-once.

The rules are those of "What a gateway does" in `contract`. They are applied twice: when a batch arrives, against what
this gateway believes, which saves work; and right before each commit, against what the table says, which makes it safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple


class Verdict(Enum):
    """What becomes of a batch."""

    ADMIT = "admit"
    DUPLICATE = "duplicate"
    """It is committed or pending already: drop it, acknowledge again what is committed."""
    REWIND = "rewind"
    """Batches before it are missing: drop it, ask for them."""


class Offer(NamedTuple):
    """The numbers of one batch that decide."""

    seq: int
    floor: int


class Continuation(NamedTuple):
    """What of a lane's pending batches continues the table without a hole."""

    kept: tuple[int, ...]
    """Indices of the offers to commit, in order."""
    watermark: int
    """Watermark after committing them."""
    missing: int | None
    """First seq to ask the device for again, where some offers lie beyond a hole."""


def judge(expected: int, offer: Offer) -> Verdict:
    """Judge a batch against the next seq that is expected.

    A batch beyond `expected` is admitted only if it is the lowest that the device still holds: what lies between does
    not exist any more, and waiting for it would block the device for ever.
    """
    if offer.seq < expected:
        return Verdict.DUPLICATE
    if offer.seq == expected or offer.seq == offer.floor:
        return Verdict.ADMIT
    return Verdict.REWIND


def continuation(committed: int, offers: Sequence[Offer]) -> Continuation:
    """Fold a lane's pending batches, in the order they were admitted, over the watermark the table has now."""
    watermark = committed
    kept: list[int] = []
    beyond = 0
    for index, offer in enumerate(offers):
        verdict = judge(watermark + 1, offer)
        if verdict is Verdict.ADMIT:
            kept.append(index)
            watermark = offer.seq
        elif verdict is Verdict.REWIND:
            beyond = max(beyond, offer.seq)
    return Continuation(tuple(kept), watermark, watermark + 1 if beyond > watermark else None)
