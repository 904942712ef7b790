"""A bounded mailbox between the threads of the uplink: network callbacks post, one thread takes."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Inbox(Generic[Item]):
    """First in, first out, at most `items_max`; posting waits for room, so a flood of messages stays in the broker.

    Besides items there is one bell: `wake` ends the present or the next `take`, however often it is rung before.
    """

    def __init__(self, items_max: int) -> None:
        self._items_max = items_max
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._bell = False
        self._closed = False

    def post(self, item: Item) -> bool:
        """Add an item, waiting for room; False when the inbox was closed meanwhile and nobody will read it."""
        with self._changed:
            while len(self._items) >= self._items_max and not self._closed:
                self._changed.wait()
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def wake(self) -> None:
        """Ring the bell; never waits."""
        with self._changed:
            self._bell = True
            self._changed.notify_all()

    def take(self, timeout_s: float) -> Item | None:
        """The oldest item, or None after `timeout_s` or when the bell rang."""
        with self._changed:
            if not self._items and not self._bell and not self._closed:
                self._changed.wait(max(0.0, timeout_s))
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            self._bell = False
            return None

    def close(self) -> None:
        """Let go of everybody who waits. Items not taken are dropped."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()
