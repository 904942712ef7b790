"""Sensors and sampling work without numpy, arrays included: an agent that needs none keeps it out of its memory.

Mutant tried and found: `import numpy` in a module of the sampling path.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
sys.modules["numpy"] = None  # importing it fails from here on
import array, pathlib, random, struct, tempfile, threading
import pyarrow as pa
from contract.backoff import Backoff
from edge_agent.sampling.loop import SensorLoop
from edge_agent.sampling.metrics import SamplingCollector
from edge_agent.sampling.queue import RowQueue
from edge_agent.sampling.runner import SensorRunner
from edge_agent.sampling.settings import Burst, OnChange, Stream, Trigger
from edge_agent.sensors.clock import SystemClock
from edge_agent.sensors.iio_buffer import ScanLayout, parse_element
from edge_agent.sensors.port import Block
from edge_agent.sensors.registry import BUILT_IN, create_sensor


def sampled(sensor, mode):
    queue = RowQueue(100_000, 100_000_000)
    loop = SensorLoop("s", sensor, mode, queue, SystemClock(), Backoff(1, 2, random.Random(1)))
    loop.step(threading.Event(), threading.Event())
    loop.close()
    status = loop.status()
    assert not status.errors, status.last_error
    return status.rows_out


class Ramp:
    schema = pa.schema([("x", pa.float32()), ("n", pa.int16())])

    def open(self):
        pass

    def read(self, stop):
        numbers = range(10_000)
        x = array.array("f", [n / 100 if n % 1000 > 500 else 1.0 for n in numbers])
        return Block({"x": x, "n": array.array("h", [0] * 10_000)}, interval_ns=312_500)

    def close(self):
        pass


assert sampled(Ramp(), Stream()) == 10_000
assert 0 < sampled(Ramp(), OnChange(rate_hz=0, deadband={"x": 0.5})) < 1_000
triggers = (Trigger(field="x", above=99.0), Trigger(field="x", rate_above=1e9))
assert sampled(Ramp(), Burst(rate_hz=0, trigger=triggers, pre_rows=5)) == 104
layout = ScanLayout([parse_element("a", "be:s12/16>>4", 0)])
assert layout.decode(struct.pack(">2h", -16, 32))["a"].to_pylist() == [-1, 2]
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "a.csv"
    path.write_text("ts,x\\n2024-05-06T07:08:09Z,1.5\\n2024-05-06T07:08:10Z,2.5\\n")
    import pyarrow.parquet as pq
    table = pa.table({"ts": pa.array([1, 2], pa.timestamp("us")), "x": [1.5, 2.5]})
    pq.write_table(table, path.with_suffix(".parquet"))
    for each in (path, path.with_suffix(".parquet")):
        assert sampled(create_sensor("replay", {"path": str(each), "speed": 0.0, "start_s": 0.0}), Stream()) == 2
assert sampled(create_sensor("host", {}), Stream()) == 1
assert not any(name.startswith("numpy.") for name in sys.modules)
print("fine")
"""


def test_sensors_and_sampling_work_without_numpy() -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "fine"
