"""The releases on a device: content by its hash, one record per model, and the factory's folder, which is only read.

    content/<sha256>     models, manifests, probe windows
    partial/<sha256>     half downloads
    records/<model>.json what `record.ModelRecord` says
    metadata/            trusted TUF metadata; written by the verifying child only

A file counts only when its content matches its name. What does not is reported, removed and taken as absent: a damaged
card costs a download, or brings the factory's model back, and never the agent.

The factory's folder holds `<name>.json`, a manifest, and beside it `<sha256>.onnx`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from contract.errors import ConfigurationError, HeadwaterError, Reason, Rejected, TemporaryError
from contract.models import MANIFEST_BYTES_MAX, MODEL_BYTES_MAX, MODELS_MAX, Artifact, Manifest, check_manifest
from contract.names import is_name
from edge_agent.models.disk import Disk, LocalDisk
from edge_agent.models.record import RECORD_BYTES_MAX, ModelRecord, decode_record, encode_record

_log = structlog.get_logger()

FREE_BYTES_MIN = 16 * 1024 * 1024
"""Of the disk, left to others whatever a release needs."""
CONTENT_FILES_MAX = 1_024
_CHUNK_BYTES = 1 << 20


class StoreUnavailableError(TemporaryError):
    """The disk refuses: full, read-only or failing. What was durable before still is."""


class NoRoomError(HeadwaterError):
    """What is needed does not fit under the configured cap beside what is in use; only a person can raise it."""


class FactoryRelease(NamedTuple):
    """A release that came with the device."""

    manifest: Manifest
    model: Path


class ReleaseStore:
    """Safe to use from several threads.

    Args:
        folder: where everything is kept; made if missing.
        factory: the factory's folder, or None.
        bytes_max: content and half downloads together.
        trouble: told of every file that is damaged or cannot be read: what it was and what became of it.
        disk: the file system.

    Raises:
        ConfigurationError: another agent uses the folder.
        StoreUnavailableError: the folder cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        *,
        factory: Path | None,
        bytes_max: int,
        trouble: Callable[[str], None],
        disk: Disk | None = None,
    ) -> None:
        self._disk = disk or LocalDisk()
        self._bytes_max, self._trouble = bytes_max, trouble
        self._content, self._partial = folder / "content", folder / "partial"
        self._records = folder / "records"
        self.metadata = folder / "metadata"
        """For the verifying child."""
        self._lock = threading.RLock()
        self._unreadable: set[Path] = set()
        try:
            for each in (self._content, self._partial, self._records, self.metadata):
                self._disk.make_folder(each)
            self._handle = _locked(folder)
        except OSError as error:
            raise StoreUnavailableError(
                f"[models] folder = {str(folder)!r}: {error}; let the agent write there"
            ) from error
        self._sweep()
        self._in_use: dict[str, ModelRecord] = self._load_records()
        self.factory: dict[str, FactoryRelease] = {} if factory is None else self._load_factory(factory)
        """By model."""

    def _sweep(self) -> None:
        """Remove what verifying children left that were killed."""
        try:
            for path in self.metadata.rglob(".*.part"):
                self._remove(path)
            for path in self.metadata.glob("target-*"):
                shutil.rmtree(path)
        except OSError as error:
            _log.warning("model_metadata_not_swept", error=str(error))

    def close(self) -> None:
        """Let another process use the folder."""
        os.close(self._handle)

    # Records.

    def records(self) -> dict[str, ModelRecord]:
        """All that is remembered, by model."""
        with self._lock:
            return dict(self._in_use)

    def save(self, record: ModelRecord) -> None:
        """Keep a record; when this returned, power loss cannot take it.

        Raises:
            StoreUnavailableError: the disk refuses; the record of before still stands.
        """
        path = self._records / f"{record.model}.json"
        temporary = path.with_suffix(".tmp")
        with self._lock:
            try:
                self._disk.write(temporary, encode_record(record))
                self._disk.rename(temporary, path)
                self._disk.sync_folder(self._records)
            except OSError as error:
                raise StoreUnavailableError(f"{path} cannot be written ({error}); check the disk") from error
            self._in_use[record.model] = record

    def _load_records(self) -> dict[str, ModelRecord]:
        found: dict[str, ModelRecord] = {}
        for path in sorted(self._records.glob("*.json"))[: 4 * MODELS_MAX]:
            try:
                record = decode_record(_read(path, RECORD_BYTES_MAX))
                if record.model != path.stem or not is_name(record.model):
                    raise Rejected(Reason.TOPIC_MISMATCH, f"it speaks of {record.model[:80]!r}")
            except (OSError, Rejected) as error:
                self._trouble(f"record {path.name} is damaged ({error}); it is set aside, the factory's model answers")
                self._set_aside(path)
                continue
            found[record.model] = record
        return found

    def _set_aside(self, path: Path) -> None:
        try:
            self._disk.rename(path, path.with_suffix(".damaged"))
        except OSError as error:
            _log.warning("model_record_not_set_aside", path=str(path), error=str(error))

    # Content.

    def read(self, sha256: str) -> bytes | None:
        """Content by hash, checked; None where it is absent, or was damaged and is removed now."""
        path = self._content / sha256
        try:
            data = _read(path, MODEL_BYTES_MAX)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._trouble(f"content {sha256} cannot be read ({error}); it counts as absent")
            return None
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        self._trouble(f"content {sha256} does not match its hash; it is removed")
        self._remove(path)
        return None

    def holds(self, sha256: str) -> bool:
        """Whether content is there and sound."""
        return self._sound(self._content / sha256, sha256)

    def path_of(self, sha256: str) -> Path:
        """Where content is, if it is there; for a child that checks the hash itself."""
        return self._content / sha256

    def put(self, data: bytes) -> str:
        """Keep content; its hash. When this returned, power loss cannot take it.

        Raises:
            StoreUnavailableError: the disk refuses.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        if self.holds(sha256):
            return sha256
        partial = self._partial / sha256
        try:
            self._disk.write(partial, data)
        except OSError as error:
            raise StoreUnavailableError(f"{partial} cannot be written ({error}); free space on the disk") from error
        self._enter(partial, sha256)
        return sha256

    def partial(self, sha256: str) -> Path:
        """Where a download collects content that is not complete yet."""
        return self._partial / sha256

    def adopt(self, sha256: str) -> bool:
        """Make a complete download content; False where its bytes are not what the hash says: it is removed.

        Raises:
            StoreUnavailableError: the disk refuses.
        """
        partial = self._partial / sha256
        if not self._sound(partial, sha256):
            return False
        try:
            self._disk.sync_file(partial)
        except OSError as error:
            raise StoreUnavailableError(f"{partial} cannot be flushed ({error}); check the disk") from error
        self._enter(partial, sha256)
        return True

    def make_room(self, bytes_needed: int, keep: Iterable[str]) -> None:
        """Remove what no record refers to, the oldest first, until so much more fits.

        Args:
            bytes_needed: of what is about to be downloaded.
            keep: hashes that stay, beside those of all slots.

        Raises:
            NoRoomError: it does not fit under the cap even so.
            StoreUnavailableError: the disk has too little free, or does not say.
        """
        with self._lock:
            kept = set(keep) | self._referred()
            files = sorted(self._files(), key=lambda each: each.modified_s)
            used, count = sum(each.size for each in files), len(files)
            for each in files:
                fits = used + bytes_needed <= self._bytes_max and self._free() >= bytes_needed + FREE_BYTES_MIN
                if fits and count < CONTENT_FILES_MAX:
                    return
                if each.path.name not in kept:
                    self._remove(each.path)
                    used, count = used - each.size, count - 1
            if used + bytes_needed > self._bytes_max:
                raise NoRoomError(
                    f"{bytes_needed} bytes do not fit: {used} of [models] bytes_max = {self._bytes_max} are in use; "
                    "raise it"
                )
            if self._free() < bytes_needed + FREE_BYTES_MIN:
                raise StoreUnavailableError(
                    f"{bytes_needed} bytes do not fit: the disk has {self._free()} free; free some space"
                )

    def used_bytes(self) -> int:
        """Of content and half downloads."""
        return sum(each.size for each in self._files())

    def _referred(self) -> set[str]:
        """Hashes of what records refer to, and of what their candidates still need beside the model."""
        found = set()
        for record in self._in_use.values():
            for release in record.releases():
                found |= {release.sha256, release.manifest}
            if record.candidate is not None and (data := self.read(record.candidate.manifest)) is not None:
                with contextlib.suppress(ConfigurationError):
                    found |= {artifact.sha256 for artifact in artifacts_of(decode_manifest(data))}
        return found

    def _files(self) -> list[_File]:
        """Of content and half downloads. A folder that cannot be read counts as empty, and is told once."""
        found: list[_File] = []
        for folder in (self._content, self._partial):
            try:
                found += _listed(folder)
            except OSError as error:
                if folder not in self._unreadable:
                    self._unreadable.add(folder)
                    self._trouble(f"the folder {folder.name} cannot be read ({error}); check the disk")
            else:
                self._unreadable.discard(folder)
        return found

    def _enter(self, partial: Path, sha256: str) -> None:
        try:
            self._disk.rename(partial, self._content / sha256)
            self._disk.sync_folder(self._content)
        except OSError as error:
            raise StoreUnavailableError(f"{partial} cannot be moved ({error}); check the disk") from error

    def _sound(self, path: Path, sha256: str) -> bool:
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError:
            return False
        if digest.hexdigest() == sha256:
            return True
        self._trouble(f"{path.parent.name} {sha256} does not match its hash; it is removed")
        self._remove(path)
        return False

    def _remove(self, path: Path) -> None:
        try:
            self._disk.unlink(path)
        except OSError as error:
            _log.warning("model_file_not_removed", path=str(path), error=str(error))

    def _free(self) -> int:
        try:
            return shutil.disk_usage(self._content).free
        except OSError as error:
            raise StoreUnavailableError(
                f"{self._content} does not say what is free ({error}); check the disk"
            ) from error

    # The factory.

    def _load_factory(self, folder: Path) -> dict[str, FactoryRelease]:
        found: dict[str, FactoryRelease] = {}
        for path in sorted(folder.glob("*.json"))[:MODELS_MAX]:
            try:
                manifest = decode_manifest(_read(path, MANIFEST_BYTES_MAX))
            except (OSError, HeadwaterError) as error:
                self._trouble(f"factory's manifest {path.name} cannot be used ({error}); mend the file")
                continue
            found[manifest.model] = FactoryRelease(manifest, folder / f"{manifest.artifact.sha256}.onnx")
        return found

    def read_factory(self, release: FactoryRelease) -> bytes | None:
        """The factory's model, checked; None where it is absent or damaged."""
        try:
            data = _read(release.model, MODEL_BYTES_MAX)
        except OSError as error:
            self._trouble(f"factory's model {release.model.name} cannot be read ({error}); restore the file")
            return None
        if hashlib.sha256(data).hexdigest() == release.manifest.artifact.sha256:
            return data
        self._trouble(f"factory's model {release.model.name} does not match its manifest; restore the file")
        return None


class _File(NamedTuple):
    path: Path
    size: int
    modified_s: float


def artifacts_of(manifest: Manifest) -> list[Artifact]:
    """What a device needs of a release."""
    return [manifest.artifact, *([manifest.probe.artifact] if manifest.probe is not None else [])]


def decode_manifest(data: bytes) -> Manifest:
    """A manifest, checked.

    Raises:
        ConfigurationError: it cannot be read, or says what cannot be.
    """
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError(f"the manifest cannot be read: {str(error)[:200]}; release it again") from error
    check_manifest(manifest)
    return manifest


def _read(path: Path, bytes_max: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(bytes_max + 1)
    if len(data) > bytes_max:
        raise OSError(f"more than {bytes_max} bytes")
    return data


def _listed(folder: Path) -> list[_File]:
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            found.append(_File(Path(entry.path), status.st_size, status.st_mtime))
    return found


def _locked(folder: Path) -> int:
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise ConfigurationError(
            f"[models] folder = {str(folder)!r} is in use by another agent; give each its own"
        ) from error
    return handle
