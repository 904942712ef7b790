"""What a data check found, and how a report of all of them reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

Verdict = Literal["ok", "warn", "fail"]
NAMED_MAX = 5
"""Things that a sentence names."""
_WORSE: dict[Verdict, int] = {"ok": 0, "warn": 1, "fail": 2}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One check's answer."""

    check: str
    verdict: Verdict
    detail: str
    """One sentence with the figures that decided."""
    figures: dict[str, Any] = {}
    """The same and more for programs."""
    remedy: str = ""
    """What to do; empty where all is well."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All answers of one run: `report.json`."""

    recipe: str
    verdict: Verdict
    split: str
    findings: list[Finding]


def worst(findings: Sequence[Finding]) -> Verdict:
    """The worst verdict; `ok` of none."""
    return max((one.verdict for one in findings), key=_WORSE.__getitem__, default="ok")


def ok(check: str, detail: str, **figures: Any) -> Finding:
    """All is well."""
    return Finding(check=check, verdict="ok", detail=detail, figures=figures)


def counted(counts: dict[str, int]) -> str:
    """The first few of some counts, in words."""
    shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:NAMED_MAX])
    return shown if len(counts) <= NAMED_MAX else f"{shown} and {len(counts) - NAMED_MAX} more"


def readable(report: Report) -> str:
    """The report as text: `report.txt`."""
    lines = [f"Data checks of {report.recipe}: {report.verdict}", f"Split: {report.split}", ""]
    width = max((len(one.check) for one in report.findings), default=0)
    for one in report.findings:
        lines.append(f"{one.verdict:<4}  {one.check:<{width}}  {one.detail}")
        if one.remedy:
            lines.append(f"{'':<{width + 8}}→ {one.remedy}")
    return "\n".join(lines) + "\n"
