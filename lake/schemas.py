"""Wire schemas as immutable objects `control/schemas/<fingerprint>.arrow`: with them every batch can be rebuilt."""

from __future__ import annotations

from collections import OrderedDict

import pyarrow as pa

from lake.errors import CorruptLakeError
from lake.plan import fingerprint
from lake.store import Store

_KNOWN_MAX = 4_096


class SchemaObjects:
    """The schema objects of a lake, with a memory of those that are there. Not thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: OrderedDict[str, bytes] = OrderedDict()

    def keep(self, name: str, serialized: bytes) -> None:
        """See to it that a schema is in the lake, before the first commit that refers to it.

        Raises:
            StoreUnavailableError: the store did not answer.
            CorruptLakeError: another schema stands under this name.
        """
        if name in self._known:
            return
        path = schema_path(name)
        if not self._store.put_if_absent(path, serialized) and self._store.get(path) != serialized:
            raise CorruptLakeError(
                f"{path} in {self._store.url} holds another schema; compare it with the stream's rows"
            )
        self._remember(name, serialized)

    def get(self, name: str) -> pa.Schema:
        """Read a schema.

        Raises:
            ObjectMissingError: it is not in the lake.
            StoreUnavailableError: the store did not answer.
            CorruptLakeError: the object is not the schema it is named after.
        """
        serialized = self._known.get(name)
        if serialized is None:
            serialized = self._store.get(schema_path(name))
            if fingerprint(serialized) != name:
                raise CorruptLakeError(f"{schema_path(name)} in {self._store.url} is damaged; restore it from a backup")
            self._remember(name, serialized)
        return pa.ipc.read_schema(pa.py_buffer(serialized))

    def forget(self) -> None:
        """Look again whether they are there."""
        self._known.clear()

    def _remember(self, name: str, serialized: bytes) -> None:
        self._known[name] = serialized
        if len(self._known) > _KNOWN_MAX:
            self._known.popitem(last=False)


def schema_path(name: str) -> str:
    """Path of a schema object in the lake."""
    return f"control/schemas/{name}.arrow"
