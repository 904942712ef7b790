"""Releases as answers: a line, all of one, the difference between two."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from contract.errors import ConfigurationError
from contract.models import Manifest
from lake.lineage import Lineage
from lake.releases import Release

_RELEASE = re.compile(r"([a-z0-9][a-z0-9._-]{0,62})(?:@([1-9][0-9]{0,9}))?", re.ASCII)
_BULKY = ("recipe", "packages", "metrics", "dataset", "features")
_DIFFERENT_ALWAYS = ("version", "created_at_us", "parent", "artifact", "probe", "reference")


def parse_release(text: str) -> tuple[str, int | None]:
    """`MODEL` or `MODEL@VERSION`.

    Raises:
        ConfigurationError: it is neither.
    """
    found = _RELEASE.fullmatch(text)
    if found is None:
        raise ConfigurationError(f"{text[:80]!r} is not a release; write MODEL@VERSION, such as gestures@3")
    return found[1], int(found[2]) if found[2] else None


def line(release: Release) -> dict[str, Any]:
    """What matters of a release among others."""
    manifest = release.manifest
    last = release.events[-1]
    return {
        "model": release.model,
        "version": release.version,
        "state": str(release.state),
        "family": manifest.family,
        "metrics": {metric.name: metric.value for metric in manifest.metrics},
        "streams": manifest.dataset.streams,
        "bytes": manifest.artifact.size,
        "sha256": manifest.artifact.sha256,
        "created": _time(release.events[0].at_us),
        "by": last.who,
        "why": last.why,
    }


def whole(release: Release, lineage: Lineage, *, signed: bool) -> dict[str, Any]:
    """Everything about a release."""
    return line(release) | {
        "signed": signed,
        "manifest_sha256": release.manifest_sha256,
        "manifest": msgspec.to_builtins(release.manifest),
        "parents": list(lineage.parents),
        "history": [
            {"at": _time(event.at_us), "event": str(event.event), "by": event.who, "why": event.why}
            for event in release.events
        ],
    }


def difference(old: Manifest, new: Manifest) -> dict[str, Any]:
    """What changed from one release to another: members, metrics, data, packages, and the recipe line by line."""
    plain = {name: value for name, value in _plain(old).items() if name not in (*_BULKY, *_DIFFERENT_ALWAYS)}
    now = _plain(new)
    return {
        "model": [old.model, new.model],
        "version": [old.version, new.version],
        "changed": {name: [value, now[name]] for name, value in plain.items() if now[name] != value},
        "metrics": _between(
            {f"{metric.name} ({metric.split})": metric.value for metric in old.metrics},
            {f"{metric.name} ({metric.split})": metric.value for metric in new.metrics},
            keep_equal=True,
        ),
        "features": {
            "added": [name for name in new.features if name not in old.features],
            "removed": [name for name in old.features if name not in new.features],
        },
        "data": _between(dict(old.dataset.streams), dict(new.dataset.streams), keep_equal=True)
        | {"windows": [old.dataset.windows, new.dataset.windows]},
        "packages": _between(old.packages, new.packages),
        "recipe": list(
            difflib.unified_diff(
                old.recipe.splitlines(),
                new.recipe.splitlines(),
                f"{old.model}@{old.version}",
                f"{new.model}@{new.version}",
                lineterm="",
                n=2,
            )
        ),
    }


def _plain(manifest: Manifest) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(manifest)
    return found


def _between(old: Mapping[str, Any], new: Mapping[str, Any], *, keep_equal: bool = False) -> dict[str, Any]:
    """Name → [value then, value now]; None where there is none."""
    names = [*old, *(name for name in new if name not in old)]
    return {name: [old.get(name), new.get(name)] for name in names if keep_equal or old.get(name) != new.get(name)}


def _time(at_us: int) -> str:
    return datetime.fromtimestamp(at_us / 1_000_000, UTC).isoformat().replace("+00:00", "Z")
