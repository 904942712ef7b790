"""python-tuf's client for this device: bounded downloads, durable metadata, and answers in our own words."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import urllib3
from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    SlowRetrievalError,
    UnsignedMetadataError,
)

# The package hands these names on without declaring it.
from tuf.api.metadata import Metadata, Root, TargetFile, Timestamp
from tuf.api.serialization import DeserializationError
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.updater import Updater
from tuf.ngclient.urllib3_fetcher import Urllib3Fetcher

from contract.errors import ConfigurationError
from contract.models import METADATA_BYTES_MAX
from edge_agent.buffer.files import sync_folder
from edge_agent.models.orders import Distrusted, NotYetTrusted, TrustPlace, TrustReason

ROOT_BYTES_MAX = 64 * 1024
TIMESTAMP_BYTES_MAX = 16 * 1024
SNAPSHOT_BYTES_MAX = 64 * 1024
ROTATIONS_MAX = 256
"""Root versions that one refresh may step over."""
CHUNK_BYTES = 64 * 1024

SignedKind = TypeVar("SignedKind", Root, Timestamp)


class Client:
    """One refresh of what this device trusts. Not to be used twice, and by one process at a time.

    Args:
        place: where trust begins, is kept, and is told anew.
        anchor: bytes of the trust anchor.
        now: what expiry is judged by, UTC.

    Raises:
        ConfigurationError: the anchor is not a root metadata file.
        NotYetTrusted: UNAVAILABLE: the metadata folder cannot be written.
    """

    def __init__(self, place: TrustPlace, anchor: bytes, now: datetime) -> None:
        self._place = place
        config = UpdaterConfig(
            max_root_rotations=ROTATIONS_MAX,
            max_delegations=0,
            root_max_length=ROOT_BYTES_MAX,
            timestamp_max_length=TIMESTAMP_BYTES_MAX,
            snapshot_max_length=SNAPSHOT_BYTES_MAX,
            targets_max_length=METADATA_BYTES_MAX,
            app_user_agent="headwater-agent",
        )
        base = place.url.rstrip("/")
        try:
            Path(place.metadata_dir).mkdir(parents=True, exist_ok=True)
            self._updater = _DurableUpdater(
                place.metadata_dir,
                f"{base}/metadata/",
                target_base_url=f"{base}/targets/",
                fetcher=_BoundedFetcher(place.timeout_s, place.deadline_s),
                config=config,
                bootstrap=anchor,
            )
        except OSError as error:
            raise _unwritable(place, error) from error
        except RepositoryError as error:
            raise _bad_anchor(place, error) from error
        self._updater._trusted_set.reference_time = now

    @property
    def root(self) -> Root:
        """The root that is trusted by now."""
        return self._updater._trusted_set.root

    @property
    def timestamp(self) -> Timestamp:
        """The timestamp that is trusted by now; only after `refresh`."""
        return self._updater._trusted_set.timestamp

    def update_root(self) -> Root:
        """Only the keys.

        Raises:
            Distrusted: BAD_SIGNATURE, ROLLBACK.
            NotYetTrusted: UNAVAILABLE.
        """
        with _translated(self._place):
            self._updater._load_root()
        return self.root

    def refresh(self) -> None:
        """All metadata.

        Raises:
            Distrusted: BAD_SIGNATURE, EXPIRED_METADATA, ROLLBACK, BAD_METADATA, BAD_HASH.
            NotYetTrusted: UNAVAILABLE.
        """
        with _translated(self._place):
            self._updater.refresh()

    def target(self, path: str) -> TargetFile | None:
        """What is signed about a target; None where nothing is."""
        with _translated(self._place):
            return self._updater.get_targetinfo(path)

    def download(self, target: TargetFile, to: Path) -> bytes:
        """A target's bytes, as signed.

        Args:
            target: what is signed about it.
            to: a file to use for it.

        Raises:
            Distrusted: BAD_HASH.
            NotYetTrusted: UNAVAILABLE.
        """
        with _translated(self._place):
            try:
                self._updater.download_target(target, str(to))
            except DownloadLengthMismatchError as error:
                raise LengthOrHashMismatchError(f"{target.path}: {error}") from error
            return to.read_bytes()


def newest_root(anchor: bytes, place: TrustPlace) -> Root:
    """The newest root that can be trusted by what is on this disk (TUF specification, 5.3.4 and 5.3.5).

    Raises:
        ConfigurationError: the anchor is not a root metadata file.
    """
    try:
        root = _signed(Root, anchor)
        _vouched(root, anchor, by=root)
    except RepositoryError as error:
        raise _bad_anchor(place, error) from error
    history = Path(place.metadata_dir) / "root_history"
    for version in range(root.version + 1, root.version + 1 + ROTATIONS_MAX):
        try:
            data = (history / f"{version}.root.json").read_bytes()
            newer = _signed(Root, data)
            _vouched(newer, data, by=root)
            _vouched(newer, data, by=newer)
        except (OSError, RepositoryError):
            break
        if newer.version != version:
            break
        root = newer
    return root


def saved_timestamp(root: Root, place: TrustPlace) -> Timestamp | None:
    """The timestamp that this device saw last; None where there is none that the root's keys signed."""
    try:
        data = (Path(place.metadata_dir) / "timestamp.json").read_bytes()
        timestamp = _signed(Timestamp, data)
        _vouched(timestamp, data, by=root)
    except (OSError, RepositoryError):
        return None
    return timestamp


class _DurableUpdater(Updater):
    """Keeps what it trusts so that no power cut takes it back: rollback protection is only as good as its memory."""

    def _persist_file(self, filename: str, data: bytes) -> None:
        path = Path(filename)
        try:
            if path.read_bytes() == data:
                return
        except OSError:
            pass  # it is not there, or not readable, and is written anew
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        for folder in (path.parent, Path(self._dir)):
            sync_folder(folder)

    def _update_root_symlink(self) -> None:
        """Nobody reads that link: the anchor is always handed in, and not every file system has links."""


class _BoundedFetcher(Urllib3Fetcher):
    """Ends a download that is slow as a whole, not only one that stands still."""

    def __init__(self, timeout_s: float, deadline_s: float) -> None:
        super().__init__(chunk_size=CHUNK_BYTES, app_user_agent="headwater-agent")
        # Annotated as whole seconds, but handed to urllib3 as it is.
        self.socket_timeout = timeout_s  # type: ignore[assignment]
        self._deadline_s = deadline_s

    def _chunks(self, response: urllib3.response.BaseHTTPResponse) -> Iterator[bytes]:
        ends_s = time.monotonic() + self._deadline_s
        try:
            while chunk := response.read1(self.chunk_size):
                yield chunk
                if time.monotonic() > ends_s:
                    raise SlowRetrievalError(f"it was not complete after {self._deadline_s:g} s")
        finally:
            response.close()


@contextmanager
def _translated(place: TrustPlace) -> Iterator[None]:
    """What python-tuf and urllib3 raise, in our own words."""
    where = place.url
    try:
        yield
    except ExpiredMetadataError as error:
        raise Distrusted(
            TrustReason.EXPIRED_METADATA,
            f"{error} (at {where}); let a gateway with the online key run, or renew with: headwater keys renew",
        ) from error
    except BadVersionNumberError as error:
        raise Distrusted(
            TrustReason.ROLLBACK,
            f"{where} offers older metadata than this device has seen ({error}); restore the newest of models/metadata",
        ) from error
    except UnsignedMetadataError as error:
        raise Distrusted(
            TrustReason.BAD_SIGNATURE,
            f"metadata at {where} is not signed by the keys this device trusts ({error}); is it the lake that the "
            "trust anchor root.json belongs to?",
        ) from error
    except LengthOrHashMismatchError as error:
        raise Distrusted(
            TrustReason.BAD_HASH, f"{where} served other bytes than were signed ({error}); look who changes them"
        ) from error
    except DeserializationError as error:
        # A captive portal answers everything with a page of its own: that proves nothing about the release.
        raise NotYetTrusted(
            TrustReason.UNAVAILABLE, f"what {where} serves is not TUF metadata ({error}); check [models] url"
        ) from error
    except RepositoryError as error:
        raise Distrusted(
            TrustReason.BAD_METADATA, f"metadata at {where} contradicts itself ({error}); publish it again"
        ) from error
    except DownloadHTTPError as error:
        raise NotYetTrusted(
            TrustReason.UNAVAILABLE, f"{where} answered with status {error.status_code}; check [models] url"
        ) from error
    except (DownloadError, urllib3.exceptions.HTTPError) as error:
        cause = error.__cause__ or error
        raise NotYetTrusted(
            TrustReason.UNAVAILABLE,
            f"{where} cannot be read ({error}: {cause}); check the network and [models] url",
        ) from error
    except OSError as error:
        raise _unwritable(place, error) from error


def _signed(kind: type[SignedKind], data: bytes) -> SignedKind:
    found = Metadata[SignedKind].from_bytes(data).signed
    if not isinstance(found, kind):
        raise RepositoryError(f"it is of type {found.type!r}, not {kind.type!r}")
    return found


def _vouched(signed: Root | Timestamp, data: bytes, *, by: Root) -> None:
    envelope = Metadata[Root].from_bytes(data)
    by.verify_delegate(signed.type, envelope.signed_bytes, envelope.signatures)


def _bad_anchor(place: TrustPlace, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"[models] root = {place.root!r} is not a TUF root that signs itself ({error}); copy the root.json there that "
        "`headwater keys init` wrote"
    )


def _unwritable(place: TrustPlace, error: OSError) -> NotYetTrusted:
    return NotYetTrusted(
        TrustReason.UNAVAILABLE,
        f"metadata cannot be kept in {place.metadata_dir} ({error}); free space, or mount the disk for writing",
    )
