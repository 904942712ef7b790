"""Whether an order may be followed and a release be trusted: TUF and DSSE on the device's side.

For a short-lived child process: python-tuf and its network take 28 MB. Releases are TUF targets
(https://theupdateframework.github.io/specification/v1.0.34/, section 5: client workflow), orders are DSSE envelopes
(https://github.com/secure-systems-lab/dsse) by a key of the root's `timestamp` role.

Time: signatures say when they expire, and ours also when they were made (`SIGNED_AT`). A clock before the time at
which something it trusts was signed is wrong, and so is an unsynchronised clock to which something has expired: then
the device waits (`CLOCK`). To a synchronised clock, expired is expired.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from contract.models import Manifest
from edge_agent.models.orders import Order, Seen, TrustPlace


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
    raise NotImplementedError


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
    raise NotImplementedError


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
    raise NotImplementedError
