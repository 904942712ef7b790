"""Orders become signed documents for devices."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import structlog
from securesystemslib.signer import CryptoSigner

from contract.errors import ConfigurationError
from contract.messages import encode
from contract.models import Assignment, Assignments
from gateway.rollouts.targets import Order

_log = structlog.get_logger()
_US = 1_000_000


class Sealer(Protocol):
    """Signs. Not thread-safe."""

    @property
    def key_id(self) -> str:
        """Changes with the key; empty where there is none."""

    def seal(self, assignment: Assignment) -> dict[str, Any]:
        """An assignment as a DSSE envelope."""


class KeyFile:
    """Signs with the online key in a file, read again when the file changes.

    Args:
        path: PEM (see `lake.trust.keys`); read at once.

    Raises:
        ConfigurationError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        from lake.trust.keys import read_key

        self._path, self._read = path, read_key
        self._stamp = self._look()
        self._key = read_key(path)

    @property
    def key_id(self) -> str:
        """Id of the key; the file is looked at."""
        stamp = self._look()
        if stamp != self._stamp:
            try:
                self._key = self._read(self._path)
            except ConfigurationError as error:
                # Half replaced, perhaps: the old one serves until the new one can be read.
                _log.warning("online_key_unreadable", error=str(error))
            else:
                self._stamp = stamp
                _log.info("online_key_renewed", key=self._key.public_key.keyid)
        return str(self._key.public_key.keyid)

    def signer(self) -> CryptoSigner:
        """The key itself; the file is looked at."""
        _ = self.key_id
        return self._key

    def seal(self, assignment: Assignment) -> dict[str, Any]:
        """An assignment as a DSSE envelope."""
        from lake.trust.assignments import seal

        return seal(assignment, self._key)

    def _look(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino


def document(sealer: Sealer, device: str, orders: Iterable[Order], now_us: int) -> bytes:
    """What is published on `hw/v1/assign/<device>`.

    Args:
        sealer: signs.
        device: whom it is for.
        orders: one for each model; none says that there is nothing to follow.
        now_us: wall clock, microseconds: the orders are valid from now for their `validity_s`.
    """
    envelopes = tuple(
        sealer.seal(
            Assignment(
                device=device,
                model=order.model,
                version=order.version,
                sha256=order.sha256,
                sequence=order.sequence,
                not_after_us=now_us + round(order.validity_s * _US),
                rollout=order.rollout,
                trial=order.trial,
            )
        )
        for order in orders
    )
    return encode(Assignments(envelopes=envelopes))
