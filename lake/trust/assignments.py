"""Orders to devices, signed: DSSE envelopes of `contract.models.Assignment` by the online key.

The envelope's payload type is part of what is signed, so no other document of the same key can be taken for an order.
"""

from __future__ import annotations

from typing import Any

import msgspec
from securesystemslib.dsse import Envelope
from securesystemslib.signer import Signer

from contract.models import ASSIGNMENT_TYPE, Assignment


def seal(assignment: Assignment, online_key: Signer) -> dict[str, Any]:
    """Sign an order.

    Args:
        assignment: the order.
        online_key: the key of the `timestamp` role (see `lake.trust.keys.read_key`).

    Returns:
        The envelope as JSON-able data, for `contract.models.Assignments.envelopes`. Ed25519 signs the same bytes
        alike: sealing an order again gives the same envelope.
    """
    envelope = Envelope(msgspec.json.encode(assignment), ASSIGNMENT_TYPE, {})
    envelope.sign(online_key)
    sealed: dict[str, Any] = envelope.to_dict()
    return sealed
