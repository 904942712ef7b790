"""Hands orders to devices: retained documents, for those that lack an order and for no others.

Nothing here is the truth. Which orders a device shall have follows from the rollouts (`targets`), whether it has read
them from its own report; what was published is remembered only so that it is not published again at every look.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from contract import topics
from gateway.devices import Device
from gateway.rollouts.sealing import Sealer, document
from gateway.rollouts.targets import Targets, Wanted
from lake.rollouts import RolloutBook

SLICE = 200
"""Devices looked at without a pause: other threads of the process must get their turn."""
VALIDITY_LEFT = 0.5
"""An order that waits for its device is signed anew when so much of its validity is over."""


class Publish(Protocol):
    """The way to the broker: False when it takes no more now."""

    def __call__(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        """Hand over a message."""


class _Told(NamedTuple):
    orders: tuple[tuple[str, int, int], ...]
    key: str
    connection: int
    at_s: float


class Publisher:
    """Devices to be looked at, and what they were last told. Not thread-safe.

    Args:
        publish: the way to the broker.
        device: what is known of a device.
        owns: whether this gateway serves the device.
        republish_s: a device that is online and still lacks an order is told again after so long.
        clock_us: wall clock, microseconds.
        clock_s: monotonic seconds.
        on_published: called for each document that was handed over.
    """

    def __init__(
        self,
        publish: Publish,
        device: Callable[[str], Device | None],
        owns: Callable[[str], bool],
        *,
        republish_s: float,
        clock_us: Callable[[], int],
        clock_s: Callable[[], float],
        on_published: Callable[[], None] = lambda: None,
    ) -> None:
        self._publish, self._device, self._owns = publish, device, owns
        self._republish_s, self._clock_us, self._clock_s = republish_s, clock_us, clock_s
        self._on_published = on_published
        self._targets = Targets(RolloutBook())
        self._waiting: OrderedDict[str, None] = OrderedDict()
        self._told: dict[str, _Told] = {}
        self._connection = 0

    @property
    def waiting(self) -> int:
        """Devices to be looked at."""
        return len(self._waiting)

    @property
    def told(self) -> int:
        """Devices that were told something that they have not read yet, or may still refuse and be told again."""
        return len(self._told)

    def aim(self, targets: Targets) -> None:
        """The rollouts changed; to be followed by `look_at` everybody."""
        self._targets = targets

    def reconnected(self) -> None:
        """The broker may have forgotten everything; to be followed by `look_at` everybody."""
        self._connection += 1

    def look_at(self, names: Iterable[str]) -> None:
        """Look at these devices soon; those whose turn it is already keep it."""
        for name in names:
            self._waiting[name] = None

    def publish_slice(self, sealer: Sealer) -> bool:
        """Look at up to `SLICE` devices; False when the broker takes no more now."""
        key = sealer.key_id
        for _ in range(min(SLICE, len(self._waiting))):
            name, _ = self._waiting.popitem(last=False)
            if not self._look(name, key, sealer):
                self._waiting[name] = None
                self._waiting.move_to_end(name, last=False)
                return False
        return True

    def _look(self, name: str, key: str, sealer: Sealer) -> bool:
        """False where the broker takes no more."""
        device = self._device(name)
        if device is None or not self._targets or not self._owns(name):
            self._told.pop(name, None)
            return True
        wanted = self._targets.of(name, device.tags, device.models)
        if not wanted.lacking and not wanted.withheld:
            if not wanted.unsettled:
                self._told.pop(name, None)
            return True
        now_s = self._clock_s()
        orders = tuple((order.model, order.sequence, order.version) for order in wanted.orders)
        telling = _Told(orders, key, self._connection, now_s)
        told = self._told.get(name)
        same = told is not None and told._replace(at_s=now_s) == telling
        if told is not None and same and not self._again(device, wanted, now_s - told.at_s):
            return True
        payload = document(sealer, name, wanted.orders, self._clock_us())
        if not self._publish(topics.assign(name), payload, qos=1, retain=True):
            return False
        self._told[name] = telling
        self._on_published()
        return True

    def _again(self, device: Device, wanted: Wanted, ago_s: float) -> bool:
        """Whether what was told is told once more."""
        if not wanted.lacking:
            return False
        if device.online and ago_s >= self._republish_s:
            return True
        return ago_s >= VALIDITY_LEFT * min(order.validity_s for order in wanted.orders)
