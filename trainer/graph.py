"""The feature graph: from a window of readings to numbers that a model can learn from, as ONNX operators.

There is no second implementation. Training, batch scoring, the gateway and the device all run these nodes with
onnxruntime, so what a model was trained on is what it gets, to the bit. One window gives the same bits alone, in a
batch of any size and in another process on the same kind of CPU; that rests on three rules:

- every sum runs over the last axis of a float64 `[B * C, W]` matrix, one row after the other;
- rows are padded to a multiple of 8 values. onnxruntime adds up a row in packets that begin at an aligned address, so
  with an odd `W` the second row is added in another order than the first: a third of all sums differed in the last bit;
- the DFT is a matrix product per window, never one over the whole batch, whose blocking could depend on its size.

Only the result is rounded to float32. Another kind of CPU (Arm, or x86 without FMA) may differ in the last bit of
float64, which the rounding hides but for about one value in 10^8.

**Definitions.** Of one channel, `x` are its finite values in the window, `n` their number, `d = x - mean`; everything
is population statistics (divided by `n`).

| name | value | constant window |
|---|---|---|
| `mean`, `min`, `max` | | the value |
| `std` | `sqrt(mean(d^2))` | 0 |
| `rms` | `sqrt(mean(x^2))` | its magnitude |
| `skew` | `mean(d^3) / std^3` | 0 |
| `kurtosis` | `mean(d^4) / std^4 - 3` (Fisher: 0 for a normal distribution) | 0 |
| `crest` | `max(abs(x)) / rms` | 1; 0 where all values are 0 |
| `ptp` | `max - min` | 0 |
| `slope` | least-squares slope per reading | 0 |
| `zero_crossings` | share of neighbouring pairs in which `d >= 0` changes | 0 |
| `band_<low>_<high>` | power of `d` in the DFT bins with `low <= f < high` | 0 |

The bands of a window are one-sided and add up to the variance where they cover everything up to the Nyquist frequency
(Parseval); a band that ends there includes it. Their edges are in Hz, or fractions of the Nyquist frequency where
the stream has no sample rate.

**Not finite.** NaN (a null in the lake) and infinities are left out of the statistics; for `slope`, `zero_crossings`
and the bands, which need their place in time, the mean stands in. A channel without one finite value has features of
0. So features are always finite, and no estimator has to guess; that they are worth less is said by `nan_count`, the
number of cells of the window that are not finite. Features are clipped to `FEATURE_MAX` in magnitude.

A window has at least 2 rows. Features of very short windows are defined all the same (with 2 rows `kurtosis` is -2);
a band without a DFT bin is refused when the graph is built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from contract.errors import ConfigurationError
from contract.models import (
    INPUT,
    ONNX_IR,
    ONNX_OPSET,
    OUTPUT_FEATURES,
    OUTPUT_NAN_COUNT,
    WINDOW_CELLS_MAX,
    WINDOW_ROWS_MAX,
)
from trainer.recipe import BANDS, FEATURES, STATISTICS

BANDS_MAX: Final = 64
FEATURES_MAX: Final = 4_096
FEATURE_MAX: Final = 1e30
"""Magnitude. Far inside float32, so that a scaler or a linear model after it does not overflow."""
OCTAVES_MAX: Final = 8
"""Bands where none are asked for: octaves down from the Nyquist frequency, and what lies below them."""
_PACKET = 8
"""Values that rows are padded to: 64 bytes of float64, the widest vector register."""


@dataclass(frozen=True)
class FeatureSpec:
    """Which features of which windows."""

    rows: int
    fields: tuple[str, ...]
    """Channels in their order."""
    kinds: tuple[str, ...] = FEATURES
    """Of `FEATURES`."""
    bands: tuple[tuple[float, float], ...] = ()
    """Edges in Hz, or fractions of the Nyquist frequency without `sample_rate_hz`; none means octaves."""
    sample_rate_hz: float | None = None

    def names(self) -> tuple[str, ...]:
        """All features in the order of the graph: `<field>.<kind>`, channel by channel."""
        columns = self.columns()
        return tuple(f"{field}.{column}" for field in self.fields for column in columns)

    def columns(self) -> tuple[str, ...]:
        """The features of one channel."""
        unit = "" if self.sample_rate_hz is None else "hz"
        found: list[str] = [kind for kind in STATISTICS if kind in self.kinds]
        if BANDS in self.kinds:
            found += [f"band_{low:g}_{high:g}{unit}" for low, high in self.edges()]
        return tuple(found)

    def nyquist(self) -> float:
        """Highest frequency of the window, in the unit of the bands."""
        return 1.0 if self.sample_rate_hz is None else self.sample_rate_hz / 2

    def edges(self) -> tuple[tuple[float, float], ...]:
        """The bands in their unit."""
        if self.bands:
            return self.bands
        # Of a short window, the lowest octaves would hold no bin; the first is `2 / rows`.
        octaves = min(OCTAVES_MAX, max(1, math.ceil(math.log2(self.rows / 2))))
        tops = [2.0**-octave * self.nyquist() for octave in reversed(range(octaves))]
        return tuple(zip([0.0, *tops[:-1]], tops, strict=True))


def check_spec(spec: FeatureSpec) -> None:
    """Whether the features can be computed.

    Raises:
        ConfigurationError: naming what is wrong, its value and the remedy.
    """
    if not 2 <= spec.rows <= WINDOW_ROWS_MAX:
        raise ConfigurationError(f"a window of {spec.rows} rows cannot be used; choose 2 to {WINDOW_ROWS_MAX}")
    if not spec.fields or len(set(spec.fields)) != len(spec.fields):
        raise ConfigurationError(f"fields {list(spec.fields)} are none or repeat; name every channel once")
    if spec.rows * len(spec.fields) > WINDOW_CELLS_MAX:
        raise ConfigurationError(
            f"a window of {spec.rows} x {len(spec.fields)} has more than {WINDOW_CELLS_MAX} cells; "
            "take fewer rows or fields"
        )
    unknown = [kind for kind in spec.kinds if kind not in FEATURES]
    if unknown or not spec.kinds:
        raise ConfigurationError(f"features {unknown or 'none'} are not known; choose from {', '.join(FEATURES)}")
    if BANDS in spec.kinds:
        _check_bands(spec)
    if len(spec.columns()) * len(spec.fields) > FEATURES_MAX:
        count = len(spec.columns()) * len(spec.fields)
        raise ConfigurationError(f"{count} features are more than {FEATURES_MAX}; take fewer bands or fields")


def _check_bands(spec: FeatureSpec) -> None:
    nyquist = spec.nyquist()
    unit = "of the Nyquist frequency" if spec.sample_rate_hz is None else "Hz"
    if spec.sample_rate_hz is not None and not 0 < spec.sample_rate_hz < math.inf:
        raise ConfigurationError(f"a sample rate of {spec.sample_rate_hz} Hz cannot be used; give one above 0")
    if len(spec.bands) > BANDS_MAX:
        raise ConfigurationError(f"{len(spec.bands)} bands are more than {BANDS_MAX}; take fewer and wider ones")
    if len(set(spec.columns())) != len(spec.columns()):
        raise ConfigurationError(f"bands {spec.bands} repeat; give every band once")
    for low, high in spec.edges():
        if not 0 <= low < high <= nyquist:
            raise ConfigurationError(
                f"band [{low:g}, {high:g}] is not within 0 to {nyquist:g} ({unit}); give edges that rise within it"
            )
        if not len(_bins(spec, low, high)):
            raise ConfigurationError(
                f"band [{low:g}, {high:g}] ({unit}) holds no frequency of a window of {spec.rows} rows, whose "
                f"frequencies are {2 * nyquist / spec.rows:g} apart; widen the band or the window"
            )


def _bins(spec: FeatureSpec, low: float, high: float) -> npt.NDArray[np.int64]:
    """DFT bins from 1 (0 is the mean, which is taken off) to the Nyquist frequency that fall into a band."""
    number = np.arange(1, spec.rows // 2 + 1)
    frequency = number * (2 * spec.nyquist() / spec.rows)
    inside = (frequency >= low) & ((frequency < high) | (high >= spec.nyquist()))
    return number[inside]


class _Nodes:
    """Collects operators and constants; values are known by name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: npt.ArrayLike, dtype: type[Any]) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], name=f"node_{name}", **attributes))
        return name


def build_graph(spec: FeatureSpec, selected: Sequence[str] | None = None) -> onnx.ModelProto:
    """The feature graph of one kind of window.

    Args:
        spec: what the windows are and which features there are.
        selected: names out of `spec.names()`, in the order wanted; None takes all.

    Returns:
        A model with the input `window: float32[batch, rows, fields]`, batch at least 1, and the outputs
        `features: float32[batch, F]` and `nan_count: int64[batch]`.

    Raises:
        ConfigurationError: when the spec cannot be computed, or a selected name is not one of its features.
    """
    check_spec(spec)
    names = spec.names()
    wanted = names if selected is None else tuple(selected)
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        raise ConfigurationError(f"features {unknown or 'none'} are not among {', '.join(names)}; name some of these")
    graph = _Nodes()
    channels = _Channels(graph, spec)
    # Only kinds that are wanted of some channel are computed; the rest of the choice is a Gather of columns.
    columns = spec.columns()
    kept = [column for column in columns if any(name.endswith(f".{column}") for name in wanted)]
    table = graph.add("Concat", *channels.values_of(kept), axis=1)
    flat = graph.add("Reshape", table, graph.constant([-1, len(spec.fields) * len(kept)], np.int64))
    available = [f"{field}.{column}" for field in spec.fields for column in kept]
    if list(wanted) != available:
        indices = graph.constant([available.index(name) for name in wanted], np.int64)
        flat = graph.add("Gather", flat, indices, axis=1)
    bounds = graph.constant(-FEATURE_MAX, np.float64), graph.constant(FEATURE_MAX, np.float64)
    clipped = graph.add("Clip", flat, *bounds)
    graph.add("Cast", clipped, output=OUTPUT_FEATURES, to=TensorProto.FLOAT)
    channels.count_missing()
    return _model(graph, spec, len(wanted))


def _model(graph: _Nodes, spec: FeatureSpec, features: int) -> onnx.ModelProto:
    proto = helper.make_graph(
        graph.nodes,
        "features",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", spec.rows, len(spec.fields)])],
        [
            helper.make_tensor_value_info(OUTPUT_FEATURES, TensorProto.FLOAT, ["batch", features]),
            helper.make_tensor_value_info(OUTPUT_NAN_COUNT, TensorProto.INT64, ["batch"]),
        ],
        graph.constants,
    )
    opset = helper.make_opsetid("", ONNX_OPSET)
    return helper.make_model(proto, opset_imports=[opset], ir_version=ONNX_IR, producer_name="headwater")


class _Channels:
    """The values of `[B * C, 1]` from which the features of one channel are made; each is computed once, when asked."""

    def __init__(self, graph: _Nodes, spec: FeatureSpec) -> None:
        self._graph = graph
        self._spec = spec
        self._known: dict[str, str] = {}
        self._last = graph.constant([1], np.int64)
        self._zero = graph.constant(0.0, np.float64)
        self._one = graph.constant(1.0, np.float64)
        self._padded = -(-spec.rows // _PACKET) * _PACKET
        self._cut()

    def _cut(self) -> None:
        """From the window to float64 rows, with the cells that are not finite marked."""
        graph, spec = self._graph, self._spec
        rows = graph.add("Transpose", INPUT, perm=[0, 2, 1])
        if self._padded > spec.rows:
            # Padding is NaN, hence missing: nothing below has to know of it.
            pads = graph.constant([0, 0, 0, 0, 0, self._padded - spec.rows], np.int64)
            rows = graph.add("Pad", rows, pads, graph.constant(np.nan, np.float32))
        rows = graph.add("Reshape", rows, graph.constant([-1, self._padded], np.int64))
        self._x = graph.add("Cast", rows, to=TensorProto.DOUBLE)
        self._missing = graph.add("IsNaN", graph.add("Sub", self._x, self._x))  # inf - inf is NaN, too
        self._missing_count = self._sum(graph.add("Cast", self._missing, to=TensorProto.DOUBLE))
        count = graph.add("Sub", graph.constant(float(self._padded), np.float64), self._missing_count)
        self._count = graph.add("Max", count, self._one)
        self._mean = self._average(graph.add("Where", self._missing, self._zero, self._x))
        self._deviation = graph.add("Where", self._missing, self._zero, graph.add("Sub", self._x, self._mean))

    def _sum(self, rows: str) -> str:
        return self._graph.add("ReduceSum", rows, self._last, keepdims=1)

    def _average(self, rows: str) -> str:
        return self._graph.add("Div", self._sum(rows), self._count)

    def _where_positive(self, value: str) -> str:
        """The value, or 1 where it is 0: a divisor for what is then 0 itself."""
        positive = self._graph.add("Greater", value, self._zero)
        return self._graph.add("Where", positive, value, self._one)

    def count_missing(self) -> None:
        """The output `nan_count`."""
        graph, channels = self._graph, len(self._spec.fields)
        per_window = graph.add("Reshape", self._missing_count, graph.constant([-1, channels], np.int64))
        total = graph.add("ReduceSum", per_window, self._last, keepdims=0)
        padding = graph.constant(float(channels * (self._padded - self._spec.rows)), np.float64)
        graph.add("Cast", graph.add("Sub", total, padding), output=OUTPUT_NAN_COUNT, to=TensorProto.INT64)

    def values_of(self, columns: Sequence[str]) -> list[str]:
        """The columns of a channel, each `[B * C, 1]`, the bands together `[B * C, number of bands]`."""
        found = [self._get(column) for column in columns if column in STATISTICS]
        bands = [edges for edges, name in self._named_bands() if name in columns]
        if bands:
            found.append(self._band_powers(bands))
        return found

    def _named_bands(self) -> list[tuple[tuple[float, float], str]]:
        if BANDS not in self._spec.kinds:
            return []
        edges = self._spec.edges()
        return list(zip(edges, self._spec.columns()[-len(edges) :], strict=True))

    def _get(self, what: str) -> str:
        if what not in self._known:
            self._known[what] = getattr(self, f"_{what}_value")()
        return self._known[what]

    def _mean_value(self) -> str:
        return self._mean

    def _squares_value(self) -> str:
        return self._graph.add("Mul", self._deviation, self._deviation)

    def _variance_value(self) -> str:
        return self._average(self._get("squares"))

    def _safe_variance_value(self) -> str:
        return self._where_positive(self._get("variance"))

    def _std_value(self) -> str:
        return self._graph.add("Sqrt", self._get("variance"))

    def _rms_value(self) -> str:
        graph = self._graph
        squared_mean = graph.add("Mul", self._mean, self._mean)
        return graph.add("Sqrt", graph.add("Add", self._get("variance"), squared_mean))

    def _filled_value(self) -> str:
        return self._graph.add("Where", self._missing, self._mean, self._x)

    def _min_value(self) -> str:
        return self._graph.add("ReduceMin", self._get("filled"), self._last, keepdims=1)

    def _max_value(self) -> str:
        return self._graph.add("ReduceMax", self._get("filled"), self._last, keepdims=1)

    def _ptp_value(self) -> str:
        return self._graph.add("Sub", self._get("max"), self._get("min"))

    def _skew_value(self) -> str:
        graph, variance = self._graph, self._get("safe_variance")
        third = self._average(graph.add("Mul", self._get("squares"), self._deviation))
        return graph.add("Div", third, graph.add("Mul", variance, graph.add("Sqrt", variance)))

    def _kurtosis_value(self) -> str:
        graph, squares, variance = self._graph, self._get("squares"), self._get("variance")
        fourth = self._average(graph.add("Mul", squares, squares))
        squared = graph.add("Mul", variance, variance)
        excess = graph.add("Sub", fourth, graph.add("Mul", graph.constant(3.0, np.float64), squared))
        return graph.add("Div", excess, self._where_positive(squared))

    def _crest_value(self) -> str:
        graph = self._graph
        peak = graph.add("Max", self._get("max"), graph.add("Neg", self._get("min")))
        return graph.add("Div", peak, self._where_positive(self._get("rms")))

    def _slope_value(self) -> str:
        time = np.arange(self._spec.rows) - (self._spec.rows - 1) / 2
        weights = np.zeros(self._padded)
        weights[: self._spec.rows] = time / np.sum(time * time)
        return self._sum(self._graph.add("Mul", self._deviation, self._graph.constant(weights, np.float64)))

    def _zero_crossings_value(self) -> str:
        graph, rows = self._graph, self._spec.rows
        sign = graph.add("GreaterOrEqual", self._deviation, self._zero)
        neighbours = [
            graph.add("Slice", sign, graph.constant([start], np.int64), graph.constant([stop], np.int64), self._last)
            for start, stop in ((0, rows - 1), (1, rows))
        ]
        changes = graph.add("Cast", graph.add("Xor", *neighbours), to=TensorProto.DOUBLE)
        # A sum of ones is exact in any order, so the odd length does no harm here.
        return graph.add("Div", self._sum(changes), graph.constant(float(rows - 1), np.float64))

    def _band_powers(self, bands: Sequence[tuple[float, float]]) -> str:
        graph, rows = self._graph, self._spec.rows
        bins = [_bins(self._spec, low, high) for low, high in bands]
        used = np.unique(np.concatenate(bins))
        angle = 2 * np.pi * (np.outer(np.arange(rows), used) % rows) / rows
        basis = np.zeros((1, self._padded, 2 * len(used)))
        basis[0, :rows] = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
        # One-sided: a bin and its mirror image above the Nyquist frequency; the Nyquist bin has none.
        weight = np.where(2 * used == rows, 1.0, 2.0) / rows**2
        choice = np.zeros((1, 2 * len(used), len(bands)))
        for column, members in enumerate(bins):
            inside = np.isin(used, members)
            choice[0, :, column] = np.tile(np.where(inside, weight, 0.0), 2)
        # Both factors have three axes, so that each window is a product of its own, the same whatever the batch.
        per_window = graph.constant([-1, len(self._spec.fields), self._padded], np.int64)
        signal = graph.add("Reshape", self._deviation, per_window)
        spectrum = graph.add("MatMul", signal, graph.constant(basis, np.float64))
        power = graph.add("MatMul", graph.add("Mul", spectrum, spectrum), graph.constant(choice, np.float64))
        return graph.add("Reshape", power, graph.constant([-1, len(bands)], np.int64))
