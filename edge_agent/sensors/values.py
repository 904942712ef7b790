"""Whether one Python value fits one Arrow type: the scalar half of "nothing is silently cast".

`pyarrow.array([1.5], pa.int32())` yields 1, `pa.array([True], pa.float64())` yields 1.0 and
`pa.array([1e300], pa.float32())` yields infinity. A sensor's value must not be changed like that on its way in, so
every value is checked here before Arrow sees it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import pyarrow as pa

ScalarCheck: TypeAlias = Callable[[Any], Any]
"""Takes a value that is not None; returns the Python value as it will be stored, or raises ValueError (a remedy)."""

_FLOAT64_EXACT_INT_MAX = 2**53


def scalar_check(kind: pa.DataType) -> ScalarCheck:
    """The check for values of one Arrow type.

    * bool takes bool only; integers take int in range, never bool or float;
    * float64 takes float, and int where exact; float32 and float16 take float rounded to nearest (a Python float has no
      narrower form) unless it would overflow to infinity, and int where exact;
    * string takes str that is valid UTF-8; binary takes bytes, bytearray, memoryview;
    * lists take list or tuple and check each item; every other type takes what comes back equal from Arrow.

    Numpy scalars count as the Python value they hold.
    """
    types = pa.types
    if types.is_boolean(kind):
        return _plain(_bool)
    if types.is_integer(kind):
        return _plain(_integer(kind))
    if types.is_floating(kind):
        return _plain({64: _float64, 32: _narrow("<f"), 16: _narrow("<e")}[kind.bit_width])
    if types.is_string(kind) or types.is_large_string(kind):
        return _plain(_string)
    if types.is_binary(kind) or types.is_large_binary(kind):
        return _plain(_bytes)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _list(kind)
    return _plain(_round_trip(kind))


def infer_type(value: Any) -> pa.DataType:
    """The Arrow type of a Python or numpy scalar: bool, int64, float64, string, binary, or what Arrow makes of it.

    Raises:
        ValueError: with the reason, when no type follows from the value (None, for one).
    """
    if value is None:
        raise ValueError("None has no type")
    for python_type, kind in _INFERRED:
        if isinstance(value, python_type):
            return kind
    try:
        return pa.scalar(value).type
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ValueError(str(error).splitlines()[0][:200]) from error


_INFERRED: tuple[tuple[type, pa.DataType], ...] = (
    (bool, pa.bool_()),
    (int, pa.int64()),
    (float, pa.float64()),
    (str, pa.string()),
    (bytes, pa.binary()),
)


def _plain(check: ScalarCheck) -> ScalarCheck:
    """Accept numpy scalars (and zero-dimensional arrays) by their Python value."""

    def checked(value: Any) -> Any:
        if hasattr(value, "dtype") and getattr(value, "shape", None) == ():
            value = value.item()
        return check(value)

    return checked


def _bool(value: Any) -> Any:
    if type(value) is not bool:
        raise ValueError("give True or False")
    return value


def _integer(kind: pa.DataType) -> ScalarCheck:
    bits = kind.bit_width
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if pa.types.is_signed_integer(kind) else (0, 2**bits - 1)

    def check(value: Any) -> Any:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("declare a float, bool or string type for it, or convert it to int in the driver")
        if not low <= value <= high:
            raise ValueError(f"{kind} holds {low}..{high}; declare a wider type")
        return int(value)

    return check


def _float64(value: Any) -> Any:
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) <= _FLOAT64_EXACT_INT_MAX or _exact_in_float64(value):
            return float(value)
        raise ValueError("this integer is not exact in float64; declare int64")
    raise ValueError("declare a matching type, or convert it to float in the driver")


def _exact_in_float64(value: int) -> bool:
    try:
        return int(float(value)) == value
    except OverflowError:
        return False


def _narrow(layout: str) -> ScalarCheck:
    packed = struct.Struct(layout)

    def check(value: Any) -> Any:
        number = _float64(value)
        try:
            (rounded,) = packed.unpack(packed.pack(number))
        except OverflowError as error:
            raise ValueError("it would become infinite; declare float64") from error
        if isinstance(value, int) and rounded != value:
            raise ValueError("this integer is not exact in it; declare float64 or an integer type")
        return rounded

    return check


def _string(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("declare a matching type, or convert it to str in the driver")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError("it has lone surrogates, which UTF-8 does not; send it as binary") from error
    return str(value)


def _bytes(value: Any) -> Any:
    if not isinstance(value, bytes | bytearray | memoryview):
        raise ValueError("declare a matching type, or convert it to bytes in the driver")
    return bytes(value)


def _list(kind: pa.DataType) -> ScalarCheck:
    item = scalar_check(kind.value_type)
    size = kind.list_size if pa.types.is_fixed_size_list(kind) else None

    def check(value: Any) -> Any:
        if hasattr(value, "dtype") and hasattr(value, "tolist"):
            value = value.tolist()
        if not isinstance(value, list | tuple):
            raise ValueError("give a list")
        if size is not None and len(value) != size:
            raise ValueError(f"give exactly {size} items")
        return [None if each is None else item(each) for each in value]

    return check


def _round_trip(kind: pa.DataType) -> ScalarCheck:
    def check(value: Any) -> Any:
        try:
            back = pa.scalar(value, type=kind).as_py()
            same = _same(back, value)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise ValueError(str(error).splitlines()[0][:200]) from error
        if not same:
            raise ValueError(f"it would be stored as {back!r:.80}; convert it in the driver or declare another type")
        return value

    return check


def _same(back: Any, value: Any) -> bool:
    if isinstance(value, Mapping):
        return dict(back) == dict(value) if isinstance(back, dict | list) else False
    return bool(back == value)
