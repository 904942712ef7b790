"""Configuration from afar: the `Desired` document judged, kept across restarts, and what is in force as a result.

A document is applied whole or refused whole, with a reason. What it leaves out stays as the device's own file says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec

from contract.desired import check_desired_stream, check_members
from contract.errors import ConfigurationError, Rejected, TemporaryError
from contract.limits import SEQ_MAX
from contract.messages import Desired, DesiredStream, Refusal, decode, encode
from edge_agent.sampling.settings import with_rate
from edge_agent.settings import StreamSettings

REASON_CHARS_MAX = 500


class InForce(NamedTuple):
    """The settings of one stream that a desired document can change, as they are in force."""

    enabled: bool
    rate_hz: float | None
    """None where the driver sets the pace."""
    max_batch_rows: int
    max_batch_age_s: float


class Applied(NamedTuple):
    """The document is good and newer: make it the one in force."""

    desired: Desired


class Ignored(NamedTuple):
    """The document is not newer than the one in force, or empty."""


Verdict: TypeAlias = Applied | Ignored | Refusal


class RemoteConfigUnavailableError(TemporaryError):
    """The document in force cannot be read or written: the disk is full, read-only or failing."""


def apply(revision: int, payload: bytes, streams: Mapping[str, StreamSettings]) -> Verdict:
    """Judge a desired document. Pure.

    Args:
        revision: of the document in force; 0 for none.
        payload: the document as it arrived.
        streams: the streams of the device's own file.

    Returns:
        `Applied`, `Ignored`, or the `Refusal` to report, whose reason names stream, member, value and remedy.
    """
    if not payload:
        return Ignored()  # somebody cleared the retained document; what is in force stays
    try:
        desired = decode(payload, Desired)
        check_members(payload)
    except (Rejected, ValueError) as error:
        found = _revision_of(payload)
        if found is not None and found <= revision:
            return Ignored()
        return Refusal(revision=found, reason=str(error)[:REASON_CHARS_MAX])
    if not 1 <= desired.revision <= SEQ_MAX:
        return Refusal(
            revision=desired.revision,
            reason=f"revision = {desired.revision} is outside 1 .. {SEQ_MAX}; count documents from 1",
        )
    if desired.revision <= revision:
        return Ignored()
    reason = refusal_of(desired, streams)
    return Applied(desired) if reason is None else Refusal(revision=desired.revision, reason=reason)


def refusal_of(desired: Desired, streams: Mapping[str, StreamSettings]) -> str | None:
    """Why a document cannot be in force over these streams; None when it can."""
    for name, wanted in desired.streams.items():
        settings = streams.get(name)
        if settings is None:
            known = ", ".join(sorted(streams)[:20]) or "none"
            return f"there is no stream {name[:80]!r} on this device; its streams are: {known}"[:REASON_CHARS_MAX]
        try:
            with_rate(settings.sampling, wanted.rate_hz)
            check_desired_stream(wanted)
        except (ConfigurationError, ValueError) as error:
            return f"stream {name!r}: {error}"[:REASON_CHARS_MAX]
    return None


def in_force(settings: StreamSettings, wanted: DesiredStream | None) -> InForce:
    """What holds for a stream: the document where it says something, the device's own file elsewhere."""
    if wanted is None:
        wanted = DesiredStream()
    return InForce(
        enabled=settings.enabled if wanted.enabled is None else wanted.enabled,
        rate_hz=settings.rate_hz if wanted.rate_hz is None else wanted.rate_hz,
        max_batch_rows=settings.max_batch_rows if wanted.max_batch_rows is None else wanted.max_batch_rows,
        max_batch_age_s=settings.max_batch_age_s if wanted.max_batch_age_s is None else wanted.max_batch_age_s,
    )


class RemoteConfigFile:
    """The document in force on disk: one JSON file, replaced as a whole, so that a power cut leaves the old or the new.

    Args:
        path: the file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> Desired | None:
        """The document that was saved last; None when there is none.

        Raises:
            RemoteConfigUnavailableError: it cannot be read, or is damaged; the caller begins without one.
        """
        try:
            payload = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RemoteConfigUnavailableError(f"{self._path} cannot be read ({error}); check the disk") from error
        try:
            return decode(payload, Desired)
        except Rejected as error:
            raise RemoteConfigUnavailableError(
                f"{self._path} is damaged ({error}); the next desired document replaces it"
            ) from error

    def save(self, desired: Desired) -> None:
        """Keep a document; when this returned, power loss cannot take it.

        Raises:
            RemoteConfigUnavailableError: the disk refuses; what was saved before still stands.
        """
        temporary = self._path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                file.write(encode(desired))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise RemoteConfigUnavailableError(f"{self._path} cannot be written ({error}); check the disk") from error


class _Revision(msgspec.Struct):
    revision: int


def _revision_of(payload: bytes) -> int | None:
    """The revision of a document that is otherwise not understood."""
    try:
        return msgspec.json.decode(payload, type=_Revision).revision
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
