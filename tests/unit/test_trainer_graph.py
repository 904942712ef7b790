"""The feature graph against plain numpy, and against itself: the same bits alone, in a batch and in another process.

Mutants tried, each seen to fail here: features in float32 (`in_float32`) and rows that are not padded, both as tests;
statistics over all rows instead of the finite ones; a band without its upper edge at the Nyquist frequency; Pearson's
kurtosis.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest

from contract.errors import ConfigurationError
from contract.models import ONNX_IR, ONNX_OPSET
from tests.onnx_mutants import in_float32
from tests.window_sets import watch_windows
from trainer import graph
from trainer.graph import FEATURE_MAX, FeatureSpec, build_graph
from trainer.runtime import open_session, run_features


def reference(signal: np.ndarray, spec: FeatureSpec) -> dict[str, float]:
    """The definitions once more, of one channel, in the plainest way: float64, nothing missing or NaN."""
    here = np.isfinite(signal)
    x = signal[here].astype(np.float64)
    if not len(x):
        return dict.fromkeys(spec.columns(), 0.0)
    mean = x.sum() / len(x)
    d = x - mean
    m2, m3, m4 = (np.sum(d**power) / len(x) for power in (2, 3, 4))
    whole = np.where(here, np.nan_to_num(signal.astype(np.float64), posinf=0, neginf=0) - mean, 0.0)
    time = np.arange(len(signal)) - (len(signal) - 1) / 2
    rms = np.sqrt(np.mean(x**2))
    found = {
        "mean": mean,
        "std": np.sqrt(m2),
        "min": x.min(),
        "max": x.max(),
        "rms": rms,
        "slope": np.sum(time * whole) / np.sum(time**2),
        "skew": m3 / m2**1.5 if m2 else 0.0,
        "kurtosis": m4 / m2**2 - 3 if m2 else 0.0,
        "crest": np.abs(x).max() / rms if rms else 0.0,
        "ptp": x.max() - x.min(),
        "zero_crossings": np.mean((whole >= 0)[1:] != (whole >= 0)[:-1]),
    }
    power = np.abs(np.fft.rfft(whole)) ** 2 / len(whole) ** 2
    power[1:] *= 2
    if len(whole) % 2 == 0:
        power[-1] /= 2
    frequency = np.arange(len(power)) * 2 * spec.nyquist() / len(whole)
    for name, (low, high) in zip(spec.columns()[-len(spec.edges()) :], spec.edges(), strict=True):
        inside = (frequency >= low) & ((frequency < high) | (high == spec.nyquist()))
        inside[0] = False
        found[name] = power[inside].sum()
    return found


def run(spec: FeatureSpec, windows: np.ndarray, selected: tuple[str, ...] | None = None):
    return run_features(open_session(build_graph(spec, selected)), windows.astype(np.float32))


def compare(spec: FeatureSpec, windows: np.ndarray) -> None:
    found, _ = run(spec, windows)
    for window, row in zip(windows.astype(np.float32), found, strict=True):
        wanted = [value for channel in window.T for value in reference(channel, spec).values()]
        # Bits of float32, but for what is the small difference of large sums.
        scale = max(1.0, float(np.abs(window[np.isfinite(window)]).max(initial=0.0)))
        np.testing.assert_allclose(row, wanted, rtol=3e-7, atol=1e-12 * scale**2)


@pytest.mark.parametrize(("rows", "channels"), [(2, 1), (3, 2), (5, 1), (16, 3), (127, 2), (128, 6)])
def test_each_feature_is_what_its_definition_says(rows: int, channels: int) -> None:
    windows = np.random.default_rng(1).normal(3.0, 2.0, size=(20, rows, channels))
    compare(FeatureSpec(rows, tuple(f"f{i}" for i in range(channels)), sample_rate_hz=50.0), windows)


def test_features_of_real_recordings_are_what_their_definitions_say() -> None:
    dataset = watch_windows(128, 64)
    compare(FeatureSpec(128, dataset.fields, sample_rate_hz=50.0), dataset.windows[::150])


def test_missing_values_are_left_out_and_counted() -> None:
    windows = np.random.default_rng(2).normal(size=(4, 16, 2)).astype(np.float32)
    windows[1, 3, 0] = np.nan
    windows[2, [0, 5], 1] = np.inf, -np.inf
    windows[3, :, 1] = np.nan
    spec = FeatureSpec(16, ("a", "b"))
    compare(spec, windows)
    features, missing = run(spec, windows)
    assert missing.tolist() == [0, 1, 2, 16]
    assert np.isfinite(features).all()
    assert not features[3, len(spec.columns()) :].any()


@pytest.mark.parametrize("value", [0.0, 3.3, -0.1, 1e-40, 1e30])
def test_a_constant_window_has_no_spread_and_no_garbage(value: float) -> None:
    spec = FeatureSpec(13, ("a",))
    row = dict(zip(spec.columns(), run(spec, np.full((1, 13, 1), value))[0][0], strict=True))
    constant = np.float32(value)
    assert row["mean"] == row["min"] == row["max"] == constant
    assert row["rms"] == pytest.approx(abs(constant), rel=1e-6)
    assert row["crest"] == (0.0 if value == 0 else 1.0)
    still = [name for name in row if name not in ("mean", "min", "max", "rms", "crest")]
    assert {name: row[name] for name in still} == dict.fromkeys(still, 0.0)


def test_the_largest_floats_give_finite_features() -> None:
    windows = np.zeros((2, 16, 1), dtype=np.float32)
    windows[0, ::2], windows[0, 1::2] = np.finfo(np.float32).max, np.finfo(np.float32).min
    windows[1, 4] = np.finfo(np.float32).smallest_subnormal
    features, missing = run(FeatureSpec(16, ("a",)), windows)
    assert np.isfinite(features).all()
    assert np.abs(features).max() == np.float32(FEATURE_MAX)
    assert not missing.any()


def test_bands_that_cover_everything_add_up_to_the_variance() -> None:
    windows = np.random.default_rng(3).normal(size=(50, 100, 1))
    spec = FeatureSpec(100, ("a",), kinds=("std", "bands"), sample_rate_hz=10.0)
    features, _ = run(spec, windows)
    np.testing.assert_allclose(features[:, 1:].sum(axis=1), features[:, 0] ** 2, rtol=1e-5)


def test_a_sine_is_in_the_band_of_its_frequency() -> None:
    time = np.arange(200) / 50.0
    window = (3.0 * np.sin(2 * np.pi * 5.0 * time))[np.newaxis, :, np.newaxis]
    spec = FeatureSpec(200, ("a",), kinds=("bands",), bands=((0, 4), (4, 6), (6, 25)), sample_rate_hz=50.0)
    assert spec.names() == ("a.band_0_4hz", "a.band_4_6hz", "a.band_6_25hz")
    features, _ = run(spec, window)
    np.testing.assert_allclose(features[0], [0.0, 4.5, 0.0], atol=1e-5)


def test_features_of_choice_are_the_same_numbers_in_the_order_asked_for() -> None:
    windows = np.random.default_rng(4).normal(size=(9, 24, 3))
    spec = FeatureSpec(24, ("a", "b.c", "d"))
    everything, missing = run(spec, windows)
    names = spec.names()
    for wanted in [("b.c.skew",), names[::-3], ("d.max", "a.band_0.5_1", "a.std")]:
        chosen, also_missing = run(spec, windows, wanted)
        assert chosen.tobytes() == everything[:, [names.index(name) for name in wanted]].tobytes()
        assert (missing == also_missing).all()


@pytest.mark.parametrize(("rows", "channels"), [(128, 6), (127, 5), (5, 1)])
def test_ten_thousand_windows_have_the_same_bits_alone_and_in_any_batch(rows: int, channels: int) -> None:
    random = np.random.default_rng(5)
    windows = random.normal(size=(10_000, rows, channels)).astype(np.float32)
    windows[::97, 0, 0] = np.nan
    session = open_session(build_graph(FeatureSpec(rows, tuple(f"f{i}" for i in range(channels)))))
    together, _ = run_features(session, windows)
    cuts = np.sort(random.choice(10_000, 40, replace=False))
    in_batches = np.concatenate([run_features(session, part)[0] for part in np.split(windows, cuts) if len(part)])
    assert together.tobytes() == in_batches.tobytes()
    alone = np.concatenate([session.run(["features"], {"window": windows[i : i + 1]})[0] for i in range(10_000)])
    assert together.tobytes() == alone.tobytes()


def test_float32_features_would_not_have_the_same_bits() -> None:
    windows = watch_windows(127, 127).windows
    spec = FeatureSpec(127, tuple("abcdef"))
    exact = run_features(open_session(build_graph(spec)), windows)[0]
    rounded = run_features(open_session(in_float32(build_graph(spec))), windows)[0]
    assert (exact != rounded).mean() > 0.1


def test_rows_that_are_not_padded_would_not_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = np.ascontiguousarray(watch_windows(127, 127).windows[:, :, :5])  # an odd number of cells
    spec = FeatureSpec(127, tuple("abcde"))
    assert (in_double(spec, windows, batch=True) == in_double(spec, windows, batch=False)).all()
    monkeypatch.setattr(graph, "_PACKET", 1)
    assert (in_double(spec, windows, batch=True) != in_double(spec, windows, batch=False)).mean() > 0.05


def in_double(spec: FeatureSpec, windows: np.ndarray, *, batch: bool) -> np.ndarray:
    """The features before they are rounded to float32."""
    model = build_graph(spec)
    before = next(node for node in model.graph.node if node.output[0] == "features").input[0]
    model.graph.output.append(onnx.helper.make_tensor_value_info(before, onnx.TensorProto.DOUBLE, None))
    session = open_session(model)
    if batch:
        return session.run([before], {"window": windows})[0]
    return np.concatenate([session.run([before], {"window": windows[i : i + 1]})[0] for i in range(len(windows))])


def test_a_fresh_process_gives_the_same_bits(tmp_path) -> None:
    dataset = watch_windows(128, 64)
    model = build_graph(FeatureSpec(128, dataset.fields, sample_rate_hz=50.0))
    here, _ = run_features(open_session(model), dataset.windows)
    onnx.save(model, tmp_path / "features.onnx")
    np.save(tmp_path / "windows.npy", dataset.windows)
    code = (
        "import sys, numpy, onnxruntime; folder = sys.argv[1]\n"
        "session = onnxruntime.InferenceSession(folder + '/features.onnx')\n"
        "windows = numpy.load(folder + '/windows.npy')\n"
        "numpy.save(folder + '/features.npy', session.run(['features'], {'window': windows})[0])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert np.load(tmp_path / "features.npy").tobytes() == here.tobytes()


def test_the_graph_is_valid_onnx_of_the_pinned_opset() -> None:
    model = build_graph(FeatureSpec(128, ("a", "b")))
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", ONNX_OPSET)]
    assert model.ir_version == ONNX_IR


@pytest.mark.parametrize("rows", [*range(2, 40), 100, 127, 1000])
def test_default_bands_hold_a_frequency_in_any_window(rows: int) -> None:
    build_graph(FeatureSpec(rows, ("a",), kinds=("bands",)))


@pytest.mark.parametrize(
    ("spec", "selected", "said"),
    [
        (FeatureSpec(1, ("a",)), None, "1 rows"),
        (FeatureSpec(8, ()), None, "fields"),
        (FeatureSpec(8, ("a", "a")), None, "repeat"),
        (FeatureSpec(8, ("a",), kinds=("mean", "median")), None, "median"),
        (FeatureSpec(8, ("a",), bands=((0.1, 0.2),)), None, "widen"),
        (FeatureSpec(8, ("a",), bands=((0.5, 1.5),)), None, "1.5"),
        (FeatureSpec(8, ("a",), sample_rate_hz=0.0), None, "0.0 Hz"),
        (FeatureSpec(65_536, tuple(str(i) for i in range(20))), None, "cells"),
        (FeatureSpec(8, tuple(str(i) for i in range(600)), kinds=graph.STATISTICS), None, "6600 features"),
        (FeatureSpec(8, ("a",)), ("b.mean",), "b.mean"),
        (FeatureSpec(8, ("a",)), (), "none"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(spec, selected, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        build_graph(spec, selected)
