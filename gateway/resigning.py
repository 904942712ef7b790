"""Keeps the trust repository fresh: publishes what people approved, signs snapshot and timestamp before they expire.

Any number of gateways may do it (see `lake.trust.repository`). Without the online key it only watches: devices then
refuse what is new once the timestamp has expired, and go on with what they run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog
from tuf.api.metadata import Timestamp

from contract.errors import ConfigurationError, HeadwaterError, TemporaryError
from gateway.ingress import wall_us
from gateway.metrics import GatewayMetrics
from gateway.rollouts.sealing import KeyFile
from gateway.settings import ModelsSettings
from gateway.watch import WatchedThread
from lake.store import Store
from lake.trust.files import NotInitialisedError
from lake.trust.metadata import Expiries
from lake.trust.repository import TrustRepository

_log = structlog.get_logger()

RETRY_MAX_S = 60.0
ROLES = ("root", "targets", "snapshot", "timestamp")


class Resigner:
    """A thread that publishes.

    Args:
        settings: the key and how often to look.
        store: gives the lake, with the credentials of now.
        metrics: seconds to expiry, by role.

    Raises:
        ConfigurationError: the online key cannot be read.
    """

    def __init__(self, settings: ModelsSettings, store: Callable[[], Store], metrics: GatewayMetrics) -> None:
        self._settings, self._store, self._metrics = settings, store, metrics
        self._expiries = Expiries(snapshot_days=settings.snapshot_days, timestamp_days=settings.timestamp_days)
        self._key = KeyFile(Path(settings.online_key)) if settings.online_key else None
        self._stopping = threading.Event()
        self._expires_s: dict[str, float] = {}
        self._told = ""
        self._signers: frozenset[str] | None = None
        self.thread = WatchedThread("resigning", self._run)
        for role in ROLES:
            metrics.watch(
                f"trust_{role}_expires_seconds",
                f"Until the {role} metadata of models expires; NaN before there is any",
                lambda role=role: self.left_s(role),  # type: ignore[misc]
            )

    def start(self) -> None:
        """Begin."""
        self.thread.start()

    def close(self, timeout_s: float) -> bool:
        """End; False when that took too long."""
        self._stopping.set()
        return self.thread.join(timeout_s)

    def left_s(self, role: str) -> float:
        """Seconds until a role's metadata expires, as last seen; NaN where there is none."""
        ends_s = self._expires_s.get(role)
        return float("nan") if ends_s is None else ends_s - time.time()

    def may_sign(self, key_id: str) -> bool | None:
        """Whether devices follow what a key signs: the root, as last seen, names it for the role `timestamp`.

        None before the root was seen. May be called from any thread.
        """
        return None if self._signers is None else key_id in self._signers

    def look(self) -> bool:
        """Publish what has to be, once; False where the lake did not answer."""
        try:
            repository = TrustRepository(self._store(), anchor=self._anchor(), expiries=self._expiries)
            trouble = self._publish(repository)
            published = repository.published()
            self._signers = frozenset(published.root.roles[Timestamp.type].keyids)
            self._expires_s = {role: time.time() + left for role, left in published.left_s(wall_us()).items()}
            self._tell(trouble)
        except NotInitialisedError:
            self._signers = frozenset()
            self._tell("")  # nobody uses models here
        except TemporaryError as error:
            self._metrics.store_errors.inc()
            self._tell(str(error))
            return False
        except HeadwaterError as error:
            # Batches are committed all the same.
            self._tell(str(error))
        except Exception as error:  # noqa: BLE001 - a bug must not end the gateway; it is counted and told
            self._metrics.faults.labels("resigning").inc()
            _log.error("resigning_fault", exc_info=error)
        return True

    def _publish(self, repository: TrustRepository) -> str:
        """Sign what has to be; the trouble with the key, such as that it was rotated away, where there is some."""
        try:
            if self._key is not None and repository.publish([self._key.signer()]):
                self._metrics.trust_publications.inc()
        except ConfigurationError as error:
            return str(error)
        return ""

    def _tell(self, trouble: str) -> None:
        """Log what is new only: the same trouble comes back every few seconds."""
        if trouble and trouble != self._told:
            _log.warning("models_not_signed", error=trouble)
        self._told = trouble

    def _anchor(self) -> bytes | None:
        if not self._settings.online_key:
            return None
        path = Path(self._settings.online_key).with_name("root.json")
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read ({error}); let the gateway's user read it") from error

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            self.thread.beat()
            failures = 0 if self.look() else failures + 1
            pause_s = min(RETRY_MAX_S, 0.5 * 2.0 ** min(failures, 10)) if failures else self._settings.resign_interval_s
            self._stopping.wait(pause_s)
