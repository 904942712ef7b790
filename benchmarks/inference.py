"""What a model costs its device: a window in the agent's worker against a bare run, jitter of sampling, memory."""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime
import pyarrow as pa
from scipy.stats import bootstrap
from sklearn.ensemble import RandomForestClassifier

from benchmarks.report import Result, result
from benchmarks.servers import BenchServers
from contract.models import INPUT, Artifact, Dataset, Manifest, Window
from edge_agent.models.inference import Engine, Loaded
from edge_agent.models.predictions import PredictionWriter
from edge_agent.models.window import WindowRing
from edge_agent.sampling.queue import RowQueue
from edge_agent.status import fetch_status
from trainer.candidates import Trained
from trainer.export import merge
from trainer.graph import FeatureSpec

ROWS, STRIDE, FIELDS = 128, 16, ("ax", "ay", "az", "gx", "gy", "gz")
RUNS, REPEATS = 2_000, 5
RATE_HZ = 100.0
WARM_UP_S, SECONDS, PAIRS = 8.0, 30.0, 9
SLICE_S = 5.0
RESAMPLES = 2_000
TARGET_RATIO, TARGET_RSS_MIB = 1.2, 120e6 / 2**20


class Figures(NamedTuple):
    """Of one agent."""

    jitter_us: npt.NDArray[np.float64]
    """0.99 quantile of each `SLICE_S`."""
    rss_mib: float
    windows: int
    skipped: int


def measure() -> list[Result]:
    """All of it; each ratio within one run."""
    data = _model()
    manifest = _manifest(data)
    results = _cost(data, manifest)
    quiet, busy = _in_turns(data, manifest)
    # A shared machine is late by milliseconds for seconds on end, whatever the agent does. That only adds, and only to
    # some slices, whereas a model is at work in each: hence the lower quartile.
    without, with_model = (np.concatenate([each.jitter_us for each in agents]) for agents in (quiet, busy))
    quiet_us, busy_us = _lower_quartile_us(quiet), _lower_quartile_us(busy)
    low_us, high_us = _difference_us(quiet, busy)
    text = (
        f"without one {quiet_us:.0f} µs; lower quartiles of {len(without)} times {SLICE_S:g} s each; "
        f"{busy_us - quiet_us:+.0f} µs, 95 % of resampled pairs {low_us:+.0f} to {high_us:+.0f}; "
        f"medians {np.median(with_model):.0f} with, {np.median(without):.0f} without"
    )
    results.append(result("sampling_jitter_p99_us_with_a_model", [busy_us], "µs", text, quiet_us))
    sizes_mib = [each.rss_mib for each in busy]
    results.append(
        result(
            "agent_with_model_rss_mib", sizes_mib, "MiB", f"target, 120 MB = {TARGET_RSS_MIB:.1f} MiB", TARGET_RSS_MIB
        )
    )
    skipped, windows = sum(each.skipped for each in busy), sum(each.windows for each in busy)
    results.append(result("agent_windows_skipped", [skipped], "", "windows scored", windows))
    return results


def _model() -> bytes:
    """A forest over all features, as the trainer exports it."""
    rng = np.random.default_rng(1)
    spec = FeatureSpec(rows=ROWS, fields=FIELDS, sample_rate_hz=RATE_HZ)
    names = spec.names()
    labels = rng.integers(0, 3, 600)
    features = rng.normal(size=(600, len(names))) + labels[:, None] / 4
    forest = RandomForestClassifier(n_estimators=50, max_depth=8, random_state=1).fit(features, labels)
    trained = Trained("forest", forest, np.arange(len(names)), None)
    return bytes(merge(spec, names, trained, "bench").SerializeToString())


def _manifest(data: bytes) -> Manifest:
    return Manifest(
        model="bench",
        version=1,
        artifact=Artifact(sha256=hashlib.sha256(data).hexdigest(), size=len(data)),
        task="classification",
        stream="motion",
        fields=FIELDS,
        dtypes=("float",) * len(FIELDS),
        window=Window(rows=ROWS, stride=STRIDE, gap_s=1.0),
        sample_rate_hz=RATE_HZ,
        classes=("a", "b", "c"),
        features=("unnamed",),
        family="forest",
        metrics=(),
        dataset=Dataset(streams={}, sha256="0" * 64, windows=1),
        recipe="",
        code="",
        seed=1,
        packages={},
        created_at_us=1,
    )


def _cost(data: bytes, manifest: Manifest) -> list[Result]:
    """One window: in the agent (watchdog, run, answer), there with its row of the stream, and bare."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    queue = RowQueue(1 << 20, 1 << 30)
    engine = Engine(PredictionWriter(lambda stream: queue, 10), time.monotonic)
    engine.configure("bench", Loaded(data, manifest), None, front=False)
    values = np.random.default_rng(1).normal(size=(64 * STRIDE, len(FIELDS))).astype(np.float32)
    ring = WindowRing(manifest.window, FIELDS)
    blocks = [_block(values, at) for at in range(0, len(values), STRIDE)]
    loaded = engine.answering()["bench"]
    bare, answered, whole = [], [], []
    for _ in range(REPEATS):
        bare_ns, whole_ns, latencies_us = [], [], []
        # In turns, and both right after a stride of readings, so that both meet the same machine and the same caches.
        for number in range(RUNS):
            for cut in ring.feed(blocks[number % 64]):
                began_ns = time.perf_counter_ns()
                session.run(None, {INPUT: cut.values})
                bare_ns.append(time.perf_counter_ns() - began_ns)
            engine.feed("motion", blocks[0].schema, blocks[number % 64])
            began_ns = time.perf_counter_ns()
            if engine.round():
                whole_ns.append(time.perf_counter_ns() - began_ns)
                latencies_us.append(loaded.counters.latencies_us[-1])
            queue.get()
        bare.append(float(np.median(bare_ns)) / 1000)
        answered.append(float(np.median(latencies_us)))
        whole.append(float(np.median(whole_ns)) / 1000)
    reference = sorted(bare)[REPEATS // 2]
    bare_text = f"a bare InferenceSession.run, {reference:.0f} µs"
    ratios = [ours / theirs for ours, theirs in zip(answered, bare, strict=True)]
    return [
        result("inference_us_in_the_agent", answered, "µs", bare_text, reference),
        result("inference_us_with_its_row_of_predictions", whole, "µs", bare_text, reference),
        result("inference_ratio_to_a_bare_run", ratios, "", f"target, at most {TARGET_RATIO:g}", TARGET_RATIO),
    ]


def _block(values: Any, at: int) -> pa.RecordBatch:
    """A stride of readings; `ts` is the same in all, so that no run ends."""
    ts = pa.array(np.zeros(STRIDE, np.int64)).cast(pa.timestamp("us", "UTC"))
    columns = [pa.array(np.ascontiguousarray(values[at : at + STRIDE, each])) for each in range(len(FIELDS))]
    return pa.RecordBatch.from_arrays([ts, *columns], ["ts", *FIELDS])


def _in_turns(data: bytes, manifest: Manifest) -> tuple[list[Figures], list[Figures]]:
    """Agents without and with the model, in turns that also turn: how evenly a shared machine wakes a thread changes
    by the minute, and by more than any model does."""
    quiet: list[Figures] = []
    busy: list[Figures] = []
    for number in range(PAIRS):
        for with_model in (number % 2 == 1, number % 2 == 0):
            (busy if with_model else quiet).append(_agent(data if with_model else None, manifest))
    return quiet, busy


def _agent(data: bytes | None, manifest: Manifest) -> Figures:
    """A real agent at 100 Hz, with or without a factory's model: how evenly it samples, what it takes."""
    with tempfile.TemporaryDirectory() as folder, BenchServers(Path(folder)) as servers:
        home = Path(folder) / "agent"
        home.mkdir()
        times, models = home / "times", ""
        if data is not None:
            factory = home / "factory"
            factory.mkdir()
            (factory / f"{manifest.artifact.sha256}.onnx").write_bytes(data)
            (factory / "bench.json").write_bytes(msgspec.json.encode(manifest))
            models = f'[models]\nfactory = "{factory}"\n'
        fields = ", ".join(f'{name} = "float32"' for name in FIELDS)
        (home / "agent.toml").write_text(
            f"""
            device = "bench-model"
            [broker]
            url = "{servers.broker_url}"
            [streams.motion]
            driver = "callable"
            [streams.motion.options]
            function = "benchmarks.motion_sensor:read"
            fields = {{ {fields} }}
            arguments = {{ times = "{times}" }}
            [streams.motion.sampling]
            mode = "interval"
            rate_hz = {RATE_HZ}
            {models}
            """
        )
        servers.start("agent", (sys.executable, "-m", "edge_agent", "--config", str(home / "agent.toml")))
        # Broker, gateway and store are on other machines than a device is; here they at least leave it a core. Without
        # that the gateway's commits of predictions are what delays the sampler. On two cores the model and the sampler
        # then share one, which is harder than any device of four.
        servers.divide_cores("agent")
        time.sleep(WARM_UP_S)
        begin = times.stat().st_size // 8
        time.sleep(SECONDS)
        rss_mib = servers.usage("agent").rss_mib
        told = fetch_status(home / "agent.sock")["models"].get("bench", {"windows": 0, "skipped": 0})
        read_ns = np.fromfile(times, np.int64)[begin:]
    return Figures(_jitter_us(read_ns), rss_mib, told["windows"], told["skipped"])


def _jitter_us(read_ns: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """How far readings are from a grid of the sampling period, laid through the median of all (the time interval error
    of ITU-T G.810: how late all of them are, by the same, is not jitter); the 0.99 quantile of each `SLICE_S`."""
    period_us = 1e6 / RATE_HZ
    phase_us = (read_ns - read_ns[0]) / 1000 % period_us
    # Around half a period, so that what is early of the first does not look like nearly a period late.
    phase_us = (phase_us + period_us / 2) % period_us
    away_us = np.abs(phase_us - np.median(phase_us))
    rows = int(SLICE_S * RATE_HZ)
    slices = away_us[: len(away_us) // rows * rows].reshape(-1, rows)
    jitter_us: npt.NDArray[np.float64] = np.quantile(slices, 0.99, axis=1)
    return jitter_us


def _lower_quartile_us(agents: list[Figures]) -> float:
    return float(np.quantile(np.concatenate([each.jitter_us for each in agents]), 0.25))


def _difference_us(quiet: list[Figures], busy: list[Figures]) -> tuple[float, float]:
    """Between which bounds the difference of the lower quartiles lies, with 95 % confidence: percentile bootstrap
    (Efron 1979) over whole pairs, because the slices of one pair share the machine's mood and are no independent
    trials."""

    def difference_us(pairs: npt.NDArray[np.int64]) -> float:
        return _lower_quartile_us([busy[each] for each in pairs]) - _lower_quartile_us([quiet[each] for each in pairs])

    bounds_us = bootstrap(
        (np.arange(len(quiet)),),
        difference_us,
        vectorized=False,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    return float(bounds_us.low), float(bounds_us.high)
