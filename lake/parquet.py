"""Parquet files as the lake writes them: zstd, no Arrow-only types, and an encoding per column after a look at its
values.

BYTE_STREAM_SPLIT suits measured floats, DELTA_BINARY_PACKED suits times and counters, a dictionary suits whatever
repeats, such as floats rounded to few digits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

_SAMPLE_MAX = 1_024
_ROW_GROUP_ROWS = 1 << 20


def encode(table: pa.Table, repeating: frozenset[str], counting: frozenset[str]) -> pa.Buffer:
    """Write a table as one Parquet file in memory.

    Args:
        table: columns of storage types, each in one chunk.
        repeating: names of columns to write with a dictionary, without a look.
        counting: names of integer columns to write as differences, without a look.

    Returns:
        The file's bytes.
    """
    choices: dict[str, str | None] = {}
    ambiguous: set[str] = set()
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name in repeating:
            choices[name] = None
        elif name in counting:
            choices[name] = "DELTA_BINARY_PACKED"
        else:
            for path, leaf in _leaves(name, column.chunk(0)):
                if path in choices:
                    ambiguous.add(path)
                choices[path] = _choose(leaf)
    # A field `a.b` beside a struct `a` with a field `b`: pyarrow knows both by one path, so both are written plainly.
    for path in ambiguous:
        del choices[path]
    dictionaries = [path for path, choice in choices.items() if choice is None]
    encodings = {path: choice for path, choice in choices.items() if choice is not None}
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=_ROW_GROUP_ROWS,
        compression="zstd",
        compression_level=1,
        use_dictionary=dictionaries,
        column_encoding=encodings,
        store_schema=False,
    )
    return sink.getvalue()


def _choose(leaf: pa.Array) -> str | None:
    """Encoding of a column of plain values; None for a dictionary.

    Rule, from a sample of 1,024 values spread over the column: where at least a tenth of them repeat (about 5,000
    different values or fewer), a dictionary. Else integers as differences and floats split by bytes, but float64
    that people rounded to six digits or fewer as they are, because zstd finds more in them than in their bytes.
    """
    kind = leaf.type
    if pa.types.is_boolean(kind):
        return "PLAIN"
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_temporal(kind)):
        return None
    data = leaf.buffers()[1]
    if data is None or len(leaf) == 0:
        return "PLAIN"
    width = kind.bit_width // 8
    bits = np.frombuffer(data, f"u{width}")[leaf.offset : leaf.offset + len(leaf)]
    sample = bits[:: max(1, len(bits) // _SAMPLE_MAX)]
    if 10 * len(np.unique(sample)) <= 9 * len(sample):
        return None
    if pa.types.is_floating(kind):
        return "PLAIN" if width == 8 and _is_rounded(sample.view(np.float64)) else "BYTE_STREAM_SPLIT"
    return "DELTA_BINARY_PACKED" if width >= 4 else "PLAIN"


def _is_rounded(sample: npt.NDArray[np.float64]) -> bool:
    with np.errstate(all="ignore"):
        return bool(np.mean(np.rint(sample * 1e6) / 1e6 == sample) > 0.5)


def _leaves(path: str, array: pa.Array) -> Iterator[tuple[str, pa.Array]]:
    """The plain columns of which Parquet makes up a nested one, with their Parquet paths."""
    kind = array.type
    if pa.types.is_struct(kind):
        for index, child in enumerate(kind):
            yield from _leaves(f"{path}.{child.name}", array.field(index))
    elif pa.types.is_list(kind):
        yield from _leaves(f"{path}.list.element", array.values)
    else:
        yield path, array
