"""Releases in a lake, as the trainer would leave them."""

from __future__ import annotations

import msgspec

from contract.models import Manifest
from lake.releases import ReleaseEventKind, Releases
from lake.store import Store


def release(store: Store, manifest: Manifest, data: bytes, *, approved: bool = True) -> Manifest:
    """Put a model into the register; returns its manifest with the version it got."""
    releases = Releases(store)
    draft = msgspec.structs.replace(manifest, artifact=releases.put_artifact(data))
    made = releases.publish(draft, who="test", why="test").manifest
    if approved:
        releases.record(ReleaseEventKind.APPROVED, made.model, made.version, who="test", why="test")
    return made


def retire(store: Store, manifest: Manifest) -> None:
    """Take a release back."""
    Releases(store).record(ReleaseEventKind.RETIRED, manifest.model, manifest.version, who="test", why="test")
