"""What a check found, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum

import msgspec

from contract.errors import HeadwaterError


class Verdict(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    """It works; somebody should know."""
    FAILED = "failed"
    """Headwater does not work with this, or not as promised."""
    SKIPPED = "skipped"
    """Not looked at; the detail says why."""


class Finding(msgspec.Struct, frozen=True):
    """One line of the doctor's report."""

    check: str
    """`broker.qos1`, `store.conditional_put`, …: stable names."""
    verdict: Verdict
    detail: str
    remedy: str = ""
    """What to do; empty where nothing is to be done."""


def ok(check: str, detail: str) -> Finding:
    """All is well."""
    return Finding(check, Verdict.OK, detail)


def warning(check: str, detail: str, remedy: str) -> Finding:
    """Works, but."""
    return Finding(check, Verdict.WARNING, detail, remedy)


def failed(check: str, detail: str, remedy: str) -> Finding:
    """Does not work."""
    return Finding(check, Verdict.FAILED, detail, remedy)


def skipped(check: str, detail: str) -> Finding:
    """Not looked at."""
    return Finding(check, Verdict.SKIPPED, detail)


def guarded(check: str, remedy: str, look: Callable[[], Finding | Sequence[Finding]]) -> list[Finding]:
    """What `look` finds; what it raises becomes a failure, so that one broken thing does not hide the others."""
    try:
        found = look()
    except (HeadwaterError, OSError, ValueError) as error:
        return [failed(check, str(error) or repr(error), remedy)]
    return [found] if isinstance(found, Finding) else list(found)
