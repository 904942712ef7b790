"""Do the rows in the lake say what the recording says, in its order? Bit for bit, and without trusting any counter.

A replayed device plays its recording again and again. Whatever the path did, its rows in the lake, in the order of
their batches, must be stretches of that endless loop; a new stretch begins only where the agent was started anew. A
changed bit shows as a row that is nowhere in the recording, a lost or doubled row as a stretch too many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

CANDIDATES_MAX = 64
"""A row that occurs more often in a recording (a sensor at rest) is tried at so many places."""
STRETCHES_MAX = 10_000


class Followed(NamedTuple):
    """How rows follow a recording."""

    rows: int
    stretches: int
    """Unbroken runs of the looped recording that the rows consist of."""
    strangers: int
    """Rows that are not in the recording, to the bit."""


def follow(recordings: Sequence[npt.NDArray[np.void]], sent: npt.NDArray[np.void]) -> Followed:
    """Cover `sent` with stretches of the looped recordings, each as long as can be.

    Args:
        recordings: of what the device may have played; one item per row (see `rows_as_items`), `[n]`, n ≥ 1.
        sent: the same of the rows in the lake, in their order, `[m]`.
    """
    places: dict[bytes, list[tuple[int, int]]] = {}
    for number, recording in enumerate(recordings):
        for place, item in enumerate(recording.tolist()):
            places.setdefault(item, []).append((number, place))
    at = stretches = strangers = 0
    while at < len(sent):
        candidates = places.get(sent[at].tobytes(), [])[:CANDIDATES_MAX]
        if not candidates:
            strangers += 1
            at += 1
        elif stretches >= STRETCHES_MAX:
            # Beyond help, and quadratic from here: the rest is counted as not following.
            return Followed(len(sent), stretches, strangers + len(sent) - at)
        else:
            at += max(_matching(recordings[number], sent, at, place) for number, place in candidates)
            stretches += 1
    return Followed(len(sent), stretches, strangers)


def rows_as_items(columns: list[npt.NDArray[np.generic]]) -> npt.NDArray[np.void]:
    """Columns side by side as one array of opaque rows, whose equality is equality of all bits.

    Args:
        columns: arrays of fixed-size types, each `[rows]`.
    """
    parts = [np.ascontiguousarray(column).view(np.uint8).reshape(len(column), column.itemsize) for column in columns]
    joined = np.ascontiguousarray(np.hstack(parts))
    return joined.view(np.dtype((np.void, joined.shape[1]))).reshape(-1)


def _matching(recording: npt.NDArray[np.void], sent: npt.NDArray[np.void], at: int, place: int) -> int:
    """How many rows from `at` on equal the loop from `place` on."""
    matched, step = 0, 1024
    while at + matched < len(sent):
        size = min(step, len(sent) - at - matched)
        wanted = recording[(place + matched + np.arange(size)) % len(recording)]
        differing = np.flatnonzero(wanted != sent[at + matched : at + matched + size])
        if len(differing):
            return matched + int(differing[0])
        matched += size
        step = min(step * 4, 65_536)
    return matched
