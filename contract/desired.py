"""What a desired document may ask for. One check for both sides: the gateway refuses what every device would refuse.

The device judges more afterwards: whether it has the stream, and whether its driver lets anybody set the rate.
"""

from __future__ import annotations

import json
from typing import Any

from contract.limits import DEFAULT_LIMITS
from contract.messages import DesiredStream
from contract.settings import check_range, plain

RATE_HZ_MIN, RATE_HZ_MAX = 1 / 86_400, 10_000.0
BATCH_AGE_S_MIN, BATCH_AGE_S_MAX = 0.05, 3600.0


def check_desired_stream(wanted: DesiredStream) -> None:
    """Accept what is asked of one stream; members that are absent ask for nothing.

    Raises:
        ValueError: naming the member, its value and its range.
    """
    if wanted.rate_hz is not None:
        check_rate(wanted.rate_hz)
    if wanted.max_batch_rows is not None:
        check_batch_rows(wanted.max_batch_rows)
    if wanted.max_batch_age_s is not None:
        check_batch_age(wanted.max_batch_age_s)


def check_members(document: bytes) -> None:
    """Accept a JSON document in which no object has a member twice: which of the two is meant, nobody knows.

    Decoders keep the last without a word (RFC 8259, section 4). What is no JSON is left to the decoder.

    Raises:
        ValueError: naming the member.
    """

    def once(members: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for name, _ in members:
            if name in seen:
                raise _Repeated(f"member {name!r:.80} stands twice in one object; keep one")
            seen.add(name)

    try:
        json.loads(document, object_pairs_hook=once)
    except _Repeated:
        raise
    except (ValueError, RecursionError):
        return


class _Repeated(ValueError):
    """A member stands twice."""


def check_rate(rate_hz: float) -> None:
    """Accept a polling rate.

    Raises:
        ValueError: naming the rate and the range.
    """
    if not RATE_HZ_MIN <= rate_hz <= RATE_HZ_MAX:
        remedy = (
            "above that a driver should hand over blocks"
            if rate_hz > RATE_HZ_MAX
            else "choose one in that range; to switch the stream off, enabled = false"
        )
        raise ValueError(
            f"rate_hz = {plain(rate_hz)} is outside {RATE_HZ_MIN:.7f} (once a day) .. {plain(RATE_HZ_MAX)} Hz; {remedy}"
        )


def check_batch_rows(rows: int) -> None:
    """Accept a batch size.

    Raises:
        ValueError: naming the value and the range.
    """
    check_range("max_batch_rows", rows, 1, DEFAULT_LIMITS.rows_max)


def check_batch_age(age_s: float) -> None:
    """Accept a batch age.

    Raises:
        ValueError: naming the value and the range.
    """
    check_range("max_batch_age_s", age_s, BATCH_AGE_S_MIN, BATCH_AGE_S_MAX)
