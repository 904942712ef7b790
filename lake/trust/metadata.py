"""TUF metadata as bytes and values: verify what was read, sign what will be written. No I/O.

Roles (https://theupdateframework.github.io/specification/v1.0.34/): `root` and `targets` have offline keys, `snapshot`
and `timestamp` share the online key.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from securesystemslib.signer import CryptoSigner, Key
from tuf.api.exceptions import RepositoryError

# The package hands these names on without declaring it.
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from contract.errors import ConfigurationError
from contract.models import METADATA_BYTES_MAX, SIGNED_AT

Kind = TypeVar("Kind", Root, Targets, Snapshot, Timestamp)
Days = Annotated[float, msgspec.Meta(gt=0, le=36_500)]
TARGETS_FILE = "targets.json"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Expiries(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long signatures hold, in days. What the online key signs is signed again at half of it."""

    root_days: Days = 365.0
    targets_days: Days = 365.0
    snapshot_days: Days = 30.0
    timestamp_days: Days = 7.0
    """Also the longest time for which whoever stands between lake and device can hide what is new."""


class Document(NamedTuple):
    """One metadata file."""

    signed: Any
    """Root, Targets, Snapshot or Timestamp, as its name says."""
    data: bytes
    """As it stands in the lake: hashes are over these."""


class UnverifiedError(RepositoryError):
    """Metadata in the lake that its keys did not sign, or that is of another kind."""


def parsed(kind: type[Kind], data: bytes, vouchers: Iterable[Root]) -> Document:
    """Metadata that the keys of one of `vouchers` signed.

    Raises:
        UnverifiedError: it is not.
    """
    try:
        found = Metadata[Kind].from_bytes(data)
        if found.signed.type != kind.type:
            raise UnverifiedError(f"it is of type {found.signed.type!r}, not {kind.type!r}")
    except RepositoryError as error:
        raise UnverifiedError(str(error)) from error
    for root in vouchers:
        if is_vouched(data, root):
            return Document(found.signed, data)
    raise UnverifiedError(f"its signatures are not those of {kind.type} keys")


def self_signed(data: bytes) -> Document:
    """A root that vouches for itself: where trust begins.

    Raises:
        UnverifiedError: it does not.
    """
    try:
        root: Any = Metadata[Root].from_bytes(data).signed
    except RepositoryError as error:
        raise UnverifiedError(str(error)) from error
    return parsed(Root, data, [root] if isinstance(root, Root) else [])


def is_vouched(data: bytes, root: Root) -> bool:
    """Whether metadata is signed by enough of the keys that a root names for it."""
    found = Metadata[Root].from_bytes(data)
    try:
        root.verify_delegate(found.signed.type, found.signed_bytes, found.signatures)
    except RepositoryError:
        return False
    return True


def follows(old: Root, data: bytes) -> Document | None:
    """The next root, where it is signed as TUF demands: by the old keys and by its own; None where it is not."""
    try:
        newer = parsed(Root, data, [old])
    except UnverifiedError:
        return None
    return newer if is_vouched(data, newer.signed) and newer.signed.version == old.version + 1 else None


def signed(content: Root | Targets | Snapshot | Timestamp, keys: Collection[CryptoSigner]) -> Document:
    """Sign; the same key twice counts once.

    Raises:
        ConfigurationError: it became larger than a device reads.
    """
    metadata: Metadata[Any] = Metadata(content)
    for key in {key.public_key.keyid: key for key in keys}.values():
        metadata.sign(key, append=True)
    data: bytes = metadata.to_bytes(JSONSerializer(compact=True))
    if len(data) > METADATA_BYTES_MAX:
        raise ConfigurationError(
            f"{content.type} metadata has {len(data)} bytes, more than the {METADATA_BYTES_MAX} that devices read; "
            "retire old releases"
        )
    return Document(content, data)


def dated(content: Kind, now_us: int, days: float) -> Kind:
    """Set when it is signed and when it expires (whole seconds, as TUF has them)."""
    content.unrecognized_fields[SIGNED_AT] = now_us
    content.expires = (_EPOCH + timedelta(microseconds=now_us, days=days)).replace(microsecond=0)
    return content


def left_s(content: Root | Targets | Snapshot | Timestamp, now_us: int) -> float:
    """Seconds until it expires; negative afterwards."""
    moment = _EPOCH + timedelta(microseconds=now_us)
    seconds: float = (content.expires - moment).total_seconds()
    return seconds


def is_due(content: Snapshot | Timestamp | Targets | Root, now_us: int, days: float) -> bool:
    """Whether half of its time is over."""
    return left_s(content, now_us) < days * 86_400 / 2


def first_root(roots: Collection[CryptoSigner], targets: CryptoSigner, online: CryptoSigner, threshold: int) -> Root:
    """Root version 1."""
    root = Root(version=1, consistent_snapshot=True)
    for key in roots:
        root.add_key(key.public_key, Root.type)
    root.roles[Root.type].threshold = threshold
    root.add_key(targets.public_key, Targets.type)
    for role in (Snapshot.type, Timestamp.type):
        root.add_key(online.public_key, role)
    return root


def with_keys(root: Root, roles: Mapping[str, Collection[Key]]) -> Root:
    """The next root, with other keys for some roles. Thresholds stay.

    Args:
        root: the present one.
        roles: TUF role → all of its keys.
    """
    newer = copy.deepcopy(root)
    newer.version += 1
    for role, keys in roles.items():
        for keyid in list(newer.roles[role].keyids):
            newer.revoke_key(keyid, role)
        for key in keys:
            newer.add_key(key, role)
    return newer


def with_targets(old: Targets, version: int, add: Mapping[str, TargetFile], remove: Collection[str]) -> Targets:
    """The next targets."""
    kept = {path: target for path, target in old.targets.items() if path not in remove}
    return Targets(version=version, targets=kept | dict(add))


def snapshot_of(targets: Document, version: int) -> Snapshot:
    """A snapshot of one targets file."""
    return Snapshot(version=version, meta={TARGETS_FILE: _meta(targets)})


def timestamp_of(snapshot: Document, version: int) -> Timestamp:
    """A timestamp of one snapshot."""
    return Timestamp(version=version, snapshot_meta=_meta(snapshot))


def _meta(document: Document) -> MetaFile:
    meta: MetaFile = MetaFile.from_data(document.signed.version, document.data, ["sha256"])
    return meta
