"""What a batch may hold: its schema rules and its envelope. Pure values, no bytes; the encoding is `contract.codec`."""

from __future__ import annotations

import functools

import msgspec
import pyarrow as pa

from contract.errors import Reason, Rejected
from contract.limits import SCHEMA_DEPTH_MAX, SEQ_MAX, Limits
from contract.names import ROW, TS, check_field_name, check_name, is_epoch

TS_TYPE = pa.timestamp("us", tz="UTC")
ROW_TYPE = pa.int32()


class Clock(msgspec.Struct, frozen=True):
    """The device's clocks at the moment a batch was closed.

    With them rows stamped by a clock that was not yet synchronised can be placed in time later: the same boot's
    monotonic clock, read again when the wall clock is right, gives the offset.
    """

    synced: bool
    """Whether the wall clock was synchronised (NTP or the like) when the batch was closed."""
    wall_us: int
    """Wall clock, microseconds since 1970-01-01 UTC."""
    monotonic_us: int
    """Monotonic clock of this boot, microseconds."""
    boot: str
    """Random id of this boot, 32 hexadecimal digits (Linux: /proc/sys/kernel/random/boot_id)."""


class Envelope(msgspec.Struct, frozen=True):
    """What travels in front of a body. All but `floor` and `sent_at_us` are fixed when the batch is closed."""

    device: str
    stream: str
    epoch: str
    seq: int
    floor: int
    """Lowest seq of (stream, epoch) that the device still holds at the moment of sending; at most `seq`."""
    rows: int
    """Rows in the body."""
    sent_at_us: int
    """Device wall clock at sending, microseconds since 1970-01-01 UTC."""
    clock: Clock
    crc32: int
    """CRC-32 (ISO 3309, as in zlib) of the body's bytes."""


class SchemaNumbers:
    """Numbers the distinct schemas among many batches: 0, 1, 2, … in the order first seen.

    Metadata counts. Bodies written alike share one schema inside (see `contract.codec`), which makes the usual answer a
    comparison of two pointers; hashing a schema costs fifty times as much.
    """

    def __init__(self) -> None:
        self.schemas: list[pa.Schema] = []
        self._numbers: dict[bytes, int] = {}
        self._last = 0

    def number(self, schema: pa.Schema) -> int:
        """The number of `schema`, a new one if it was not seen yet."""
        if self.schemas and self.schemas[self._last].equals(schema, check_metadata=True):
            return self._last
        key = schema.serialize().to_pybytes()
        if key not in self._numbers:
            self._numbers[key] = len(self.schemas)
            self.schemas.append(schema)
        self._last = self._numbers[key]
        return self._last


def check_envelope(envelope: Envelope) -> None:
    """Accept an envelope that names a batch: who sent it and which one it is. What the batch holds is checked later.

    Raises:
        Rejected: naming the value and its rule.
    """
    check_name("device", envelope.device)
    check_name("stream", envelope.stream)
    for what, text in (("epoch", envelope.epoch), ("clock.boot", envelope.clock.boot)):
        if not is_epoch(text):
            raise Rejected(Reason.BAD_ENVELOPE, f"{what} {text[:40]!r} is not 32 lower-case hexadecimal digits")
    if not 1 <= envelope.seq <= SEQ_MAX:
        raise Rejected(
            Reason.BAD_SEQ, f"seq {envelope.seq} is outside 1..{SEQ_MAX}; count batches from 1 in each epoch"
        )
    if not 1 <= envelope.floor <= envelope.seq:
        raise Rejected(
            Reason.BAD_SEQ,
            f"floor {envelope.floor} is outside 1..seq = {envelope.seq}; send the lowest seq still held",
        )


def check_batch(batch: pa.RecordBatch, limits: Limits) -> None:
    """Accept a record batch that keeps the rules of a stream's schema and of `ts` and `_row`.

    Args:
        batch: the rows, `ts` and, in a thinned batch, `_row` among the fields.
        limits: what one batch may be.

    Raises:
        Rejected: naming the field, the value and the rule it breaks.
    """
    check_schema(batch.schema, limits)
    check_rows(batch, limits)


def check_rows(batch: pa.RecordBatch, limits: Limits) -> None:
    """Accept the rows of a batch whose schema is accepted already.

    Raises:
        Rejected: naming the field, the value and the rule it breaks.
    """
    if batch.num_rows == 0:
        raise Rejected(Reason.EMPTY_BATCH, "a batch of 0 rows; a batch has at least one row")
    if batch.num_rows > limits.rows_max:
        raise Rejected(
            Reason.TOO_MANY_ROWS,
            f"{batch.num_rows} rows in a batch, more than {limits.rows_max}; send smaller batches",
        )
    nulls = batch.column(TS).null_count
    if nulls:
        raise Rejected(
            Reason.BAD_TS,
            f"field 'ts' is null in {nulls} rows; give every reading a ts",
        )
    if batch.schema.get_field_index(ROW) >= 0:
        _check_row_numbers(batch.column(ROW))
    _check_expanded_size(batch, limits)


def check_schema(schema: pa.Schema, limits: Limits) -> None:
    """Accept the schema of a batch: `ts`, at least one field, allowed names and types, no two names alike.

    Raises:
        Rejected: naming the field and the rule it breaks.
    """
    leaves = 0
    for field in schema:
        _check_field(field, depth=1)
        leaves += _leaves(field.type)
        if leaves > limits.fields_max:
            raise Rejected(
                Reason.TOO_MANY_FIELDS,
                f"the batch has more than {limits.fields_max} fields ({len(schema)} at the top level); "
                "split it into several streams or send a list field",
            )
    _check_distinct(schema.names, "the batch")
    if TS not in schema.names:
        raise Rejected(Reason.BAD_TS, "the batch has no field 'ts'; every reading has a ts: timestamp[us, tz=UTC]")
    if schema.field(TS).type != TS_TYPE:
        raise Rejected(Reason.BAD_TS, f"field 'ts' is {schema.field(TS).type}, not timestamp[us, tz=UTC]; convert it")
    if ROW in schema.names and schema.field(ROW).type != ROW_TYPE:
        raise Rejected(
            Reason.BAD_ROW_NUMBERS,
            f"field '_row' is {schema.field(ROW).type}; the name is reserved for int32 row numbers of thinned batches",
        )
    if set(schema.names) <= {TS, ROW}:
        raise Rejected(Reason.EMPTY_BATCH, "the batch has no field beside 'ts'; send at least one measured field")


def _check_field(field: pa.Field, depth: int) -> None:
    check_field_name(field.name)
    if depth > SCHEMA_DEPTH_MAX:
        raise Rejected(
            Reason.UNSUPPORTED_TYPE,
            f"field {field.name!r} is nested deeper than {SCHEMA_DEPTH_MAX} levels; flatten it",
        )
    _check_type(field.type, field.name, depth)


def _check_type(kind: pa.DataType, name: str, depth: int) -> None:
    types = pa.types
    if types.is_dictionary(kind):
        value = kind.value_type
        if types.is_nested(value) or types.is_dictionary(value) or not _is_plain(value):
            raise _unsupported(name, kind, "send the values without a dictionary")
        if types.is_null(value):  # pyarrow crashes when one that came over the wire is asked which values are valid
            raise _unsupported(name, kind, "a dictionary of nothing but nulls; send type null, or the values' type")
        _check_zone(value, name)
    elif types.is_struct(kind):
        if kind.num_fields == 0:
            raise _unsupported(name, kind, "a struct needs at least one field")
        _check_distinct([child.name for child in kind], f"struct field {name!r}")
        for child in kind:
            _check_field(child, depth + 1)
    elif types.is_map(kind):
        _check_field(kind.key_field, depth + 1)
        _check_field(kind.item_field, depth + 1)
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        _check_field(kind.value_field, depth + 1)
    elif not _is_plain(kind):
        raise _unsupported(name, kind, "send it as a plain number, string or binary")
    else:
        _check_zone(kind, name)


def _check_zone(kind: pa.DataType, name: str) -> None:
    """A zone's name is read only when somebody asks for it: it must be text by then."""
    if not pa.types.is_timestamp(kind):
        return
    try:
        _ = kind.tz
    except UnicodeDecodeError:
        raise Rejected(
            Reason.UNSUPPORTED_TYPE, f"field {name!r} is a timestamp whose zone is no UTF-8; name the zone, such as UTC"
        ) from None


def _is_plain(kind: pa.DataType) -> bool:
    types = pa.types
    return (
        types.is_null(kind)
        or types.is_boolean(kind)
        or types.is_integer(kind)
        or types.is_floating(kind)
        or types.is_decimal(kind)
        or (types.is_temporal(kind) and kind != pa.month_day_nano_interval())
        or kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
        or types.is_fixed_size_binary(kind)
    )


def _unsupported(name: str, kind: pa.DataType, remedy: str) -> Rejected:
    return Rejected(
        Reason.UNSUPPORTED_TYPE, f"field {name!r} has type {str(kind)[:200]}, which is not carried: {remedy}"
    )


def _check_distinct(names: list[str], where: str) -> None:
    seen: dict[str, str] = {}
    for name in names:
        folded = name.casefold()
        if folded in seen:
            raise Rejected(
                Reason.DUPLICATE_FIELD,
                f"{where} has fields {seen[folded]!r} and {name!r}, alike or different only by case; rename one",
            )
        seen[folded] = name


def _leaves(kind: pa.DataType) -> int:
    return sum(_leaves(kind.field(i).type) for i in range(kind.num_fields)) or 1


def _check_row_numbers(rows: pa.Int32Array) -> None:
    import pyarrow.compute as pc  # 9 MB, which a device that thins nothing never needs

    good = rows.null_count == 0 and rows[0].as_py() == 0
    if good and len(rows) > 1:
        good = bool(pc.all(pc.less(rows[:-1], rows[1:])).as_py())
    if not good:
        raise Rejected(
            Reason.BAD_ROW_NUMBERS,
            "field '_row' of a thinned batch must begin at 0 and rise, without nulls; number rows so",
        )


def _check_expanded_size(batch: pa.RecordBatch, limits: Limits) -> None:
    """A dictionary of one long string with many indices, or a long list of nulls, is small here and huge in rows."""
    width = _row_bytes(batch.schema)
    if width is not None and batch.num_rows * width <= limits.body_bytes_max:
        return  # counting what the buffers hold costs as much as reading the batch
    size = expanded_bytes(batch)
    if size > limits.body_bytes_max:
        raise Rejected(
            Reason.BODY_TOO_LARGE,
            f"the batch takes {size} bytes with its dictionaries expanded, more than {limits.body_bytes_max}; "
            "send smaller batches",
        )


def expanded_bytes(batch: pa.RecordBatch) -> int:
    """Bytes that the values of a batch take when dictionaries and null lists are written out."""
    nested = (
        column for column in batch.columns if pa.types.is_nested(column.type) or pa.types.is_dictionary(column.type)
    )
    return int(batch.nbytes) + sum(_expanded_bytes(column) for column in nested)


@functools.lru_cache(maxsize=4096)
def _row_bytes(schema: pa.Schema) -> int | None:
    """Most that a row takes, its bits of validity with it; None where that depends on the values."""
    kinds = [field.type for field in schema]
    if any(pa.types.is_nested(kind) or pa.types.is_dictionary(kind) or not _is_fixed(kind) for kind in kinds):
        return None
    return sum(0 if pa.types.is_null(kind) else kind.bit_width + 1 for kind in kinds) // 8 + 1


def _is_fixed(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_null(kind) or types.is_primitive(kind) or types.is_decimal(kind) or types.is_fixed_size_binary(kind)
    )


def _expanded_bytes(array: pa.Array) -> int:
    """Bytes beyond `nbytes` that the values take when dictionaries and null lists are written out."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return _dictionary_bytes(array)
    if pa.types.is_struct(kind):
        return sum(_expanded_bytes(array.field(i)) for i in range(kind.num_fields))
    if pa.types.is_map(kind):
        return len(array.keys) + _expanded_bytes(array.keys) + _expanded_bytes(array.items)
    if pa.types.is_nested(kind):
        return len(array.values) + _expanded_bytes(array.values)
    return 0


def _dictionary_bytes(array: pa.DictionaryArray) -> int:
    import pyarrow.compute as pc  # see above

    value = array.type.value_type
    if pa.types.is_string(value) or pa.types.is_large_string(value):
        lengths = pc.binary_length(array.dictionary.cast(pa.large_binary()))
    elif pa.types.is_binary(value) or pa.types.is_large_binary(value):
        lengths = pc.binary_length(array.dictionary)
    else:
        return len(array) * max(1, int(value.bit_width) // 8)
    return int(pc.sum(lengths.take(array.indices)).as_py() or 0)
