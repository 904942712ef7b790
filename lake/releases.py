"""The register of releases: rows in `control/releases`, artifacts by hash and manifests below `models/`.

    DRAFT ─▶ APPROVED ─▶ RETIRED        DRAFT ─▶ RETIRED

A release comes into being with its CREATED row, which is committed last: artifacts, then manifest, then row. A process
killed in between leaves files that are named by their hashes and that nobody refers to. Its version is the next number
of its model, taken by check-and-set, so of two trainers at once each gets one of its own.

A row is the record of a decision, not what gives it force: devices believe the signed targets alone (`lake.approval`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow as pa

from contract.errors import ConfigurationError, HeadwaterError
from contract.models import (
    MANIFEST_BYTES_MAX,
    MODEL_BYTES_MAX,
    Artifact,
    Manifest,
    artifact_path,
    check_manifest,
    manifest_object,
)
from lake.errors import CommitConflictError, CorruptLakeError, ObjectMissingError, UnknownNameError
from lake.ledger import TIMESTAMP, Row, rows_of, table_of
from lake.store import Store
from lake.tables import ControlTable

PATH = "control/releases"
FOLDER = "models"
SCHEMA = pa.schema(
    [
        pa.field("at", TIMESTAMP),
        pa.field("sequence", pa.int64()),
        pa.field("event", pa.string()),
        pa.field("model", pa.string()),
        pa.field("version", pa.int64()),
        pa.field("who", pa.string()),
        pa.field("why", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("manifest", pa.string()),
    ]
)
ATTEMPTS_MAX = 20
TEXT_MAX = 2_000
"""Characters of `who` and `why`."""


class ReleaseState(StrEnum):
    """Where a release is. The values are a contract."""

    DRAFT = "draft"
    APPROVED = "approved"
    RETIRED = "retired"


class ReleaseEventKind(StrEnum):
    """What a row says. The values are a contract: they stand in the table."""

    CREATED = "created"
    APPROVED = "approved"
    RETIRED = "retired"


_AFTER = {
    ReleaseEventKind.CREATED: ReleaseState.DRAFT,
    ReleaseEventKind.APPROVED: ReleaseState.APPROVED,
    ReleaseEventKind.RETIRED: ReleaseState.RETIRED,
}
_ALLOWED = {
    ReleaseEventKind.APPROVED: frozenset({ReleaseState.DRAFT}),
    ReleaseEventKind.RETIRED: frozenset({ReleaseState.DRAFT, ReleaseState.APPROVED}),
}


class ReleaseRefused(HeadwaterError):
    """What was asked for does not fit the release as it is; the message says why, and what to do."""


class UnknownReleaseError(ReleaseRefused, UnknownNameError):
    """There is no such release."""


class ReleaseEvent(NamedTuple):
    """One row."""

    at_us: int
    """Wall clock of who wrote it, microseconds since 1970-01-01 UTC."""
    event: ReleaseEventKind
    model: str
    version: int
    who: str
    why: str
    sha256: str
    """Of the manifest's bytes."""
    manifest: str | None = None
    """CREATED only: the manifest, JSON, as signed to the byte."""
    sequence: int = 0


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """A release as of its latest row."""

    model: str
    version: int
    state: ReleaseState
    manifest: Manifest
    manifest_json: str
    manifest_sha256: str
    events: tuple[ReleaseEvent, ...]
    """Oldest first."""

    @property
    def name(self) -> str:
        """As it is typed."""
        return f"{self.model}@{self.version}"

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """Everything that a device or a monitor reads beside the manifest."""
        manifest = self.manifest
        found = [manifest.artifact]
        if manifest.probe is not None:
            found.append(manifest.probe.artifact)
        if manifest.reference is not None:
            found.append(manifest.reference)
        return tuple(found)


class ReleaseBook(msgspec.Struct, frozen=True):
    """All releases as of one `version` of the table."""

    version: int = 0
    releases: dict[tuple[str, int], Release] = {}

    def of_model(self, model: str) -> list[Release]:
        """The releases of a model, newest first."""
        found = [release for release in self.releases.values() if release.model == model]
        return sorted(found, key=lambda release: -release.version)

    def get(self, model: str, version: int | None = None) -> Release:
        """A release.

        Args:
            model: its model.
            version: its number; None for the newest that is approved.

        Raises:
            UnknownReleaseError: there is none.
        """
        if version is not None:
            found = self.releases.get((model, version))
            if found is not None:
                return found
            raise UnknownReleaseError(
                f"there is no release {model}@{version}; `headwater release list` shows what there is"
            )
        for release in self.of_model(model):
            if release.state is ReleaseState.APPROVED:
                return release
        raise UnknownReleaseError(
            f"model {model[:80]!r} has no approved release; `headwater release list` shows what there is"
        )


class Releases:
    """Looks at the releases, and adds to them. Not thread-safe.

    Args:
        store: where the lake is.
        now_us: wall clock, microseconds since 1970-01-01 UTC.
    """

    def __init__(self, store: Store, now_us: Callable[[], int] = lambda: time.time_ns() // 1000) -> None:
        self.store = store
        self._now_us = now_us
        self._table = ControlTable(store, PATH, SCHEMA)
        self._life = self._table.life
        self._book = ReleaseBook()

    def look(self) -> ReleaseBook:
        """The releases as of now.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        self._table.refresh()
        if (self._table.life, self._table.version) != (self._life, self._book.version):
            self._life = self._table.life
            self._book = fold(_events(rows_of(self._table.read())), self._table.version)
        return self._book

    def put_artifact(self, data: bytes) -> Artifact:
        """Keep bytes under their hash. What is there already is not written again.

        Raises:
            ConfigurationError: there are too many.
            StoreUnavailableError: the store did not answer; call again.
        """
        if not 0 < len(data) <= MODEL_BYTES_MAX:
            raise ConfigurationError(f"an artifact of {len(data)} bytes is not one of 1 to {MODEL_BYTES_MAX} bytes")
        artifact = Artifact(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
        self.store.put_if_absent(_artifact_object(artifact.sha256), data)
        return artifact

    def artifact(self, sha256: str) -> bytes:
        """The bytes of an artifact, checked against its hash.

        Raises:
            ObjectMissingError: they are not in the lake.
            CorruptLakeError: they are other bytes.
            StoreUnavailableError: the store did not answer.
        """
        path = _artifact_object(sha256)
        size = self.store.size(path)
        data = self.store.get(path) if size <= MODEL_BYTES_MAX else b""
        if hashlib.sha256(data).hexdigest() != sha256:
            raise CorruptLakeError(
                f"{path} in {self.store.url} ({size} bytes) is not what its name says; restore it from a backup"
            )
        return data

    def approved(self, model: str) -> list[int]:
        """Versions of a model that are approved, rising.

        Raises:
            StoreUnavailableError: the store did not answer.
        """
        found = self.look().of_model(model)
        return sorted(release.version for release in found if release.state is ReleaseState.APPROVED)

    def manifest(self, model: str, version: int) -> Manifest:
        """The manifest of a release.

        Raises:
            ObjectMissingError: there is no such release.
            StoreUnavailableError: the store did not answer.
        """
        found = self.look().releases.get((model, version))
        if found is None:
            raise ObjectMissingError(f"there is no release {model}@{version} in {PATH} of {self.store.url}")
        return found.manifest

    def publish(self, draft: Manifest, *, who: str, why: str) -> Release:
        """Make a release of artifacts that were put before, in state DRAFT.

        Its version becomes the next of its model. A release of the same content, but for version, parent and date, is
        not made twice: a trainer that was killed after it published finds its own.

        Args:
            draft: the manifest; its `version` counts for nothing.
            who: for the row.
            why: for the row.

        Raises:
            ConfigurationError: the manifest cannot be (see `check_manifest`), or is too large.
            ObjectMissingError: an artifact was not put.
            CommitConflictError: others were first `ATTEMPTS_MAX` times.
            StoreUnavailableError: the store did not answer; call again.
        """
        check_manifest(draft)
        for _ in range(ATTEMPTS_MAX):
            book = self.look()
            mine = book.of_model(draft.model)
            for release in mine:
                if release.state is not ReleaseState.RETIRED and _content(release.manifest) == _content(draft):
                    return release
            manifest = msgspec.structs.replace(draft, version=mine[0].version + 1 if mine else 1)
            data = msgspec.json.encode(manifest)
            if len(data) > MANIFEST_BYTES_MAX:
                raise ConfigurationError(
                    f"the manifest of {draft.model} has {len(data)} bytes, more than {MANIFEST_BYTES_MAX}; shorten the "
                    "recipe"
                )
            sha256 = hashlib.sha256(data).hexdigest()
            event = self._event(ReleaseEventKind.CREATED, manifest.model, manifest.version, who, why, sha256)
            event = event._replace(manifest=data.decode(), sequence=book.version + 1)
            release = fold([event]).releases[manifest.model, manifest.version]
            self._require(release.artifacts)
            self.store.put_if_absent(f"{FOLDER}/{manifest_object(manifest.model, manifest.version, sha256)}", data)
            if self._commit(event, book):
                return release
        raise CommitConflictError(f"others published {ATTEMPTS_MAX} times while {draft.model} was; try again")

    def record(self, event: ReleaseEventKind, model: str, version: int, *, who: str, why: str) -> Release:
        """Add a row about a decision, unless the release is in that state already.

        Raises:
            ReleaseRefused: there is no such release, or its state does not allow it.
            CommitConflictError: others were first `ATTEMPTS_MAX` times.
            StoreUnavailableError: the store did not answer; call again.
        """
        for _ in range(ATTEMPTS_MAX):
            book = self.look()
            release = book.get(model, version)
            if release.state is _AFTER[event]:
                return release
            require_state(release, event)
            self._commit(self._event(event, model, version, who, why, release.manifest_sha256), book)
        raise CommitConflictError(f"others changed the releases {ATTEMPTS_MAX} times; try again")

    def _event(self, kind: ReleaseEventKind, model: str, version: int, who: str, why: str, sha256: str) -> ReleaseEvent:
        return ReleaseEvent(self._now_us(), kind, model, version, who[:TEXT_MAX], why[:TEXT_MAX], sha256)

    def _commit(self, event: ReleaseEvent, book: ReleaseBook) -> bool:
        try:
            self._table.append(_rows([event._replace(sequence=book.version + 1)]), expected=book.version)
        except CommitConflictError:
            return False
        return True

    def _require(self, artifacts: Iterable[Artifact]) -> None:
        for artifact in artifacts:
            path = _artifact_object(artifact.sha256)
            if self.store.size(path) != artifact.size:
                raise CorruptLakeError(f"{path} in {self.store.url} has not {artifact.size} bytes; restore it")


def require_state(release: Release, event: ReleaseEventKind) -> None:
    """Refuse what a state does not allow.

    Raises:
        ReleaseRefused: naming the release and what to do.
    """
    if release.state not in _ALLOWED[event]:
        raise ReleaseRefused(
            f"release {release.name} is {release.state}, and cannot become {_AFTER[event]}; train and release once more"
        )


def put_files(releases: Releases, files: Mapping[str, Path]) -> dict[str, Artifact]:
    """Put files as artifacts.

    Args:
        releases: where.
        files: by whatever name.

    Raises:
        ConfigurationError: a file cannot be read, or is too large.
        StoreUnavailableError: the store did not answer; call again.
    """
    found = {}
    for name, path in files.items():
        try:
            with path.open("rb") as file:
                data = file.read(MODEL_BYTES_MAX + 1)
        except OSError as error:
            raise ConfigurationError(f"{name} {path} cannot be read ({error}); run the step that makes it") from error
        found[name] = releases.put_artifact(data)
    return found


def fold(events: Iterable[ReleaseEvent], version: int = 0) -> ReleaseBook:
    """What rows, in any order, add up to. A row that does not fit the state before it changes nothing."""
    releases: dict[tuple[str, int], Release] = {}
    for event in sorted(events, key=lambda event: event.sequence):
        key = event.model, event.version
        before = releases.get(key)
        if before is None:
            created = _created(event)
            if created is not None:
                releases[key] = created
        elif event.event is not ReleaseEventKind.CREATED and before.state in _ALLOWED[event.event]:
            releases[key] = msgspec.structs.replace(before, state=_AFTER[event.event], events=(*before.events, event))
    return ReleaseBook(version, releases)


def _created(event: ReleaseEvent) -> Release | None:
    if event.event is not ReleaseEventKind.CREATED or event.manifest is None:
        return None
    try:
        manifest = msgspec.json.decode(event.manifest, type=Manifest)
    except msgspec.MsgspecError:
        return None  # of a newer release of Headwater, which alone knows what to do with it
    return Release(
        model=event.model,
        version=event.version,
        state=ReleaseState.DRAFT,
        manifest=manifest,
        manifest_json=event.manifest,
        manifest_sha256=event.sha256,
        events=(event._replace(manifest=None),),
    )


def _content(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(manifest, version=1, created_at_us=0, parent=None)


def _artifact_object(sha256: str) -> str:
    return f"{FOLDER}/{artifact_path(sha256)}"


def _rows(events: Sequence[ReleaseEvent]) -> pa.Table:
    rows = [{"at": event.at_us, **event._asdict(), "event": str(event.event)} for event in events]
    return table_of(rows, SCHEMA)


def _events(rows: Iterable[Row]) -> list[ReleaseEvent]:
    """Rows of the table; those that a newer release wrote and this one does not know are left out."""
    known = {kind.value: kind for kind in ReleaseEventKind}
    return [
        ReleaseEvent(
            at_us=row["at"] or 0,
            event=known[row["event"]],
            model=row["model"],
            version=row["version"],
            who=row["who"] or "",
            why=row["why"] or "",
            sha256=row["sha256"] or "",
            manifest=row["manifest"],
            sequence=row["sequence"],
        )
        for row in rows
        if row["event"] in known and row["model"] and row["version"] and row["sequence"]
    ]
