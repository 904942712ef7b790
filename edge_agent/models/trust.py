"""Whether an order may be followed and a release be trusted: TUF and DSSE on the device's side.

For a short-lived child process: python-tuf and its network take 28 MB. Releases are TUF targets
(https://theupdateframework.github.io/specification/v1.0.34/, section 5: client workflow), orders are DSSE envelopes
(https://github.com/secure-systems-lab/dsse) by a key of the root's `timestamp` role.

Time: signatures say when they expire, and ours also when they were made (`contract.models.SIGNED_AT`). A clock before
the time at which something it trusts was signed is wrong, and so is an unsynchronised clock to which something has
expired: then the device waits (`CLOCK`). To a synchronised clock, expired is expired.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import msgspec
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import Key, Signature
from tuf.api.metadata import Root, TargetFile, Timestamp

from contract.errors import ConfigurationError
from contract.limits import PROTOCOL_VERSION
from contract.models import (
    ASSIGNMENT_TYPE,
    MANIFEST_BYTES_MAX,
    SIGNED_AT,
    Assignment,
    Manifest,
    check_manifest,
    target_path,
)
from edge_agent.models.metadata import ROOT_BYTES_MAX, Client, newest_root, saved_timestamp
from edge_agent.models.orders import Distrusted, NotYetTrusted, Order, Seen, TrustPlace, TrustReason

CLOCK_TOLERANCE = timedelta(hours=24)
"""Clocks of signers and devices may differ by this much before one of them counts as wrong."""
ORDER_BYTES_MAX = 64 * 1024
SIGNATURES_MAX = 8


class _Signature(msgspec.Struct, frozen=True):
    keyid: Annotated[str, msgspec.Meta(max_length=128)]
    sig: Annotated[str, msgspec.Meta(max_length=1024)]


class _Envelope(msgspec.Struct, frozen=True, rename="camel"):
    payload: Annotated[str, msgspec.Meta(max_length=2 * ORDER_BYTES_MAX)]
    payload_type: Annotated[str, msgspec.Meta(max_length=256)]
    signatures: Annotated[tuple[_Signature, ...], msgspec.Meta(min_length=1, max_length=SIGNATURES_MAX)]


def open_assignment(
    envelope: Mapping[str, Any],
    place: TrustPlace,
    *,
    device: str,
    seen: Mapping[str, Seen],
    now: datetime,
    synchronised: bool,
) -> Order:
    """Open an order that came over MQTT. Asks the network only where the keys known here do not fit.

    Args:
        envelope: one of `contract.models.Assignments.envelopes`.
        place: where trust begins.
        device: this device's name.
        seen: the latest order of each model, by model.
        now: wall clock, UTC.
        synchronised: whether the wall clock is known to be right.

    Raises:
        Distrusted: BAD_ORDER, BAD_SIGNATURE, WRONG_DEVICE, REPLAYED, REPEATED, ORDER_EXPIRED.
        NotYetTrusted: CLOCK; UNAVAILABLE where the signature may be by a newer key and newer keys could not be read.
        ConfigurationError: the trust anchor cannot be read.
    """
    sealed = _parse(envelope)
    anchor = _anchor(place)
    root = newest_root(anchor, place)
    key = _signer(sealed, root)
    if key is None:
        # Perhaps by a key that came into force after this device last looked.
        try:
            root = Client(place, anchor, now).update_root()
        except NotYetTrusted as trouble:
            raise NotYetTrusted(
                trouble.reason,
                f"the order is signed by no key known here, and newer keys cannot be read: {trouble}",
            ) from trouble
        key = _signer(sealed, root)
    if key is None:
        raise Distrusted(
            TrustReason.BAD_SIGNATURE,
            f"the order is signed by no key that may sign one ({', '.join(s.keyid[:12] for s in sealed.signatures)}; "
            f"root version {root.version} names {', '.join(k[:12] for k in _order_keys(root))}); "
            "start the rollout again at a gateway that has the online key of now",
        )
    return _judged(_decode(sealed), key, root, place, device, seen, now, synchronised)


def fetch_manifest(model: str, version: int, place: TrustPlace, *, now: datetime, synchronised: bool) -> Manifest:
    """Refresh what is trusted, then read a release's manifest.

    Args:
        model: its name.
        version: its version, 1 or more.
        place: where trust begins; new metadata is kept there.
        now: wall clock, UTC.
        synchronised: whether the wall clock is known to be right.

    Raises:
        Distrusted: BAD_SIGNATURE, EXPIRED_METADATA, ROLLBACK, BAD_METADATA, UNAPPROVED, BAD_HASH, BAD_MANIFEST.
        NotYetTrusted: CLOCK, UNAVAILABLE.
        ConfigurationError: the trust anchor cannot be read.
    """
    client = _refreshed(place, now, synchronised)
    path = target_path(model, version)
    target = client.target(path)
    if target is None:
        raise Distrusted(
            TrustReason.UNAPPROVED,
            f"{model} version {version} is not among the approved releases at {place.url}; approve it with: "
            f"headwater release approve {model}@{version}",
        )
    return _manifest(_read(client, target, place), model, version)


def verify_order(
    envelope: Mapping[str, Any],
    place: TrustPlace,
    *,
    device: str,
    seen: Mapping[str, Seen],
    now: datetime,
    synchronised: bool,
) -> tuple[Order, Manifest | None]:
    """Everything in the order that is safe: open the order, refresh the keys, open it again, read its manifest.

    The second look is what makes a key that was taken back useless against a device that had not heard of it.

    Returns:
        The order and the manifest of its release; None for an order to run none of the model.

    Raises:
        Distrusted: as `open_assignment` and `fetch_manifest`; BAD_HASH where order and manifest name different files.
        NotYetTrusted: as there.
        ConfigurationError: the trust anchor cannot be read.
    """

    def opened() -> Order:
        return open_assignment(envelope, place, device=device, seen=seen, now=now, synchronised=synchronised)

    assignment = opened().assignment
    if not assignment.version:
        _refreshed(place, now, synchronised)
        return opened(), None
    manifest = fetch_manifest(assignment.model, assignment.version, place, now=now, synchronised=synchronised)
    order = opened()
    if manifest.artifact.sha256 != assignment.sha256:
        raise Distrusted(
            TrustReason.BAD_HASH,
            f"the order names the file {assignment.sha256[:12] or 'none'} for {assignment.model} version "
            f"{assignment.version}, the signed manifest {manifest.artifact.sha256[:12]}; start the rollout again",
        )
    return order, manifest


def _parse(envelope: Mapping[str, Any]) -> _Envelope:
    try:
        sealed = msgspec.convert(envelope, _Envelope)
    except msgspec.ValidationError as error:
        raise Distrusted(
            TrustReason.BAD_ORDER, f"the order is not a DSSE envelope ({error}); start the rollout again"
        ) from error
    if sealed.payload_type != ASSIGNMENT_TYPE:
        raise Distrusted(
            TrustReason.BAD_ORDER,
            f"the order is a {sealed.payload_type!r}, not a {ASSIGNMENT_TYPE!r}; update the agent or the gateway",
        )
    return sealed


def _payload(sealed: _Envelope) -> bytes:
    try:
        return base64.b64decode(sealed.payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Distrusted(
            TrustReason.BAD_ORDER, f"the order's payload is not base64 ({error}); start the rollout again"
        ) from error


def _signer(sealed: _Envelope, root: Root) -> str | None:
    """Id of the key that signed, where it is one that may; else None."""
    signatures = {}
    for signature in sealed.signatures:
        try:
            raw = base64.b64decode(signature.sig, validate=True)
        except (binascii.Error, ValueError):
            continue
        signatures[signature.keyid] = Signature(signature.keyid, raw.hex())
    keys = list(_order_keys(root).values())
    try:
        accepted = Envelope(_payload(sealed), sealed.payload_type, signatures).verify(keys, 1)
    except (VerificationError, ValueError):
        return None
    return next(iter(accepted))


def _order_keys(root: Root) -> dict[str, Key]:
    return {keyid: root.get_key(keyid) for keyid in root.roles[Timestamp.type].keyids}


def _decode(sealed: _Envelope) -> Assignment:
    try:
        assignment = msgspec.json.decode(_payload(sealed), type=Assignment)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Distrusted(
            TrustReason.BAD_ORDER, f"the signed order is not an assignment ({error}); update the agent or the gateway"
        ) from error
    if assignment.v != PROTOCOL_VERSION:
        raise Distrusted(
            TrustReason.BAD_ORDER,
            f"the order is of protocol version {assignment.v}, this agent knows {PROTOCOL_VERSION}; update the agent",
        )
    return assignment


def _judged(
    assignment: Assignment,
    key: str,
    root: Root,
    place: TrustPlace,
    device: str,
    seen: Mapping[str, Seen],
    now: datetime,
    synchronised: bool,
) -> Order:
    """What a right signature does not say."""
    what = f"order {assignment.sequence} to run {assignment.model} version {assignment.version}"
    if assignment.device != device:
        raise Distrusted(
            TrustReason.WRONG_DEVICE,
            f"{what} is for {assignment.device!r}, this is {device!r}; give each device a name of its own",
        )
    last = seen.get(assignment.model)
    if last is not None and last.key in _order_keys(root) and assignment.sequence <= last.sequence:
        if assignment.sequence == last.sequence:
            raise Distrusted(TrustReason.REPEATED, f"{what} is the latest one already")
        raise Distrusted(
            TrustReason.REPLAYED,
            f"{what} is older than order {last.sequence}, which was seen before; to go back, start a rollout of the "
            "old version",
        )
    floor = _floor(root, saved_timestamp(root, place))
    _check_clock(floor, now)
    not_after = _EPOCH + timedelta(microseconds=max(0, min(assignment.not_after_us, _US_MAX)))
    if max(now, floor) > not_after:
        if not synchronised and floor <= not_after:
            raise NotYetTrusted(
                TrustReason.CLOCK,
                f"{what} ended at {_shown(not_after)}, and this clock, which is not synchronised, says {_shown(now)}; "
                "let the device reach a time server",
            )
        raise Distrusted(
            TrustReason.ORDER_EXPIRED,
            f"{what} was not to be begun after {_shown(not_after)}, and it is {_shown(now)}; start the rollout again",
        )
    return Order(assignment, key)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_US_MAX = 250_000_000_000_000_000
"""The year 9892: datetime ends with 9999."""


def _floor(*trusted: Root | Timestamp | None) -> datetime:
    """A time that has certainly passed: the latest signing date of what is trusted."""
    dates = [signed.unrecognized_fields.get(SIGNED_AT, 0) for signed in trusted if signed is not None]
    latest = max((date for date in dates if isinstance(date, int) and 0 <= date <= _US_MAX), default=0)
    return _EPOCH + timedelta(microseconds=latest)


def _check_clock(floor: datetime, now: datetime) -> None:
    if now < floor - CLOCK_TOLERANCE:
        raise NotYetTrusted(
            TrustReason.CLOCK,
            f"this clock says {_shown(now)}, but what is trusted here was signed at {_shown(floor)}; let the device "
            "reach a time server, or set the clock of the signing machine",
        )


@contextmanager
def _judging_expiry(now: datetime, synchronised: bool) -> Iterator[None]:
    """To a clock that is not synchronised, nothing expires: it waits instead."""
    try:
        yield
    except Distrusted as error:
        if error.reason is TrustReason.EXPIRED_METADATA and not synchronised:
            raise NotYetTrusted(
                TrustReason.CLOCK,
                f"{error}; but this clock, which says {_shown(now)}, is not synchronised: let the device reach a time "
                "server",
            ) from error
        raise


def _refreshed(place: TrustPlace, now: datetime, synchronised: bool) -> Client:
    """A client whose metadata is the repository's of now, and fits the clock."""
    anchor = _anchor(place)
    root = newest_root(anchor, place)
    _check_clock(_floor(root, saved_timestamp(root, place)), now)
    with _judging_expiry(now, synchronised):
        client = Client(place, anchor, now)
        try:
            client.refresh()
        except Distrusted as error:
            if error.reason is not TrustReason.BAD_SIGNATURE:
                raise
            # Keys may have changed between reading the root and what the old keys no longer sign: look once more.
            client = Client(place, anchor, now)
            client.refresh()
    _check_clock(_floor(client.root, client.timestamp), now)
    return client


def _read(client: Client, target: TargetFile, place: TrustPlace) -> bytes:
    if target.length > MANIFEST_BYTES_MAX:
        raise Distrusted(
            TrustReason.BAD_MANIFEST,
            f"the manifest {target.path} has {target.length} bytes, more than {MANIFEST_BYTES_MAX}; make it smaller",
        )
    with TemporaryDirectory(dir=place.metadata_dir, prefix="target-") as folder:
        return client.download(target, Path(folder) / "manifest.json")


def _manifest(data: bytes, model: str, version: int) -> Manifest:
    remedy = "update the agent, or train a release for this one"
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
        check_manifest(manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ConfigurationError) as error:
        raise Distrusted(
            TrustReason.BAD_MANIFEST, f"the manifest of {model} version {version} cannot be used: {error}; {remedy}"
        ) from error
    if manifest.v != PROTOCOL_VERSION:
        raise Distrusted(
            TrustReason.BAD_MANIFEST,
            f"the manifest of {model} version {version} is of protocol version {manifest.v}, this agent knows "
            f"{PROTOCOL_VERSION}; {remedy}",
        )
    if (manifest.model, manifest.version) != (model, version):
        raise Distrusted(
            TrustReason.BAD_MANIFEST,
            f"the manifest of {model} version {version} says that it is of {manifest.model!r} version "
            f"{manifest.version}; publish the release again",
        )
    return manifest


def _anchor(place: TrustPlace) -> bytes:
    try:
        with Path(place.root).open("rb") as file:
            data = file.read(ROOT_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigurationError(
            f"[models] root = {place.root!r} cannot be read ({error}); copy root.json there, as written by: headwater "
            "keys init"
        ) from error
    return data


def _shown(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")
