"""Arrow's compute functions, loaded when the first is called: 9 MB that a device with plain sensors never needs.

Use it as `pyarrow.compute`: `from edge_agent import compute as pc`.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """See https://peps.python.org/pep-0562/; importing is safe from several threads at once."""
    import pyarrow.compute

    return getattr(pyarrow.compute, name)
