"""Third-party drivers: a distribution that pip installed is found by its entry point, and sampled like any other.

The agent's side runs in a process of its own, so that the installed packages are seen as after a fresh start.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

DRIVER = '''
"""A sensor of somebody else, written from docs/sensors.md."""
import itertools
import pyarrow as pa
from edge_agent.sensors.port import Reading, SensorConfigError


class Counter:
    schema = pa.schema([("count", pa.int32())])

    def __init__(self, step):
        self.step = step

    def open(self):
        self.numbers = itertools.count(0, self.step)

    def read(self, stop):
        return Reading({"count": next(self.numbers)})

    def close(self):
        self.numbers = iter(())


def create(options):
    if options.get("step", 1) == 0:
        raise SensorConfigError("driver 'counter': option 'step' = 0; choose another number")
    return Counter(options.get("step", 1))


def broken(options):
    raise KeyError("wiring")


def wrong(options):
    return object()
'''

SAMPLE = """
import json, random, sys, threading
from contract.backoff import Backoff
from edge_agent.sampling.loop import SensorLoop
from edge_agent.sampling.queue import RowQueue
from edge_agent.sampling.runner import SensorRunner
from edge_agent.sampling.settings import Interval
from edge_agent.sensors.clock import SystemClock
from edge_agent.sensors.registry import create_sensor

arrived = threading.Semaphore(0)
queue = RowQueue(100, 100_000, on_put=arrived.release)
sensor = create_sensor("counter", {"step": 5})
loop = SensorLoop("s", sensor, Interval(rate_hz=200), queue, SystemClock(), Backoff(0.1, 1, random.Random(1)))
runner = SensorRunner(loop, queue)
runner.start()
taken = all(arrived.acquire(timeout=30) for _ in range(4))
stopped = runner.stop(30)
values = [queue.get().sample.values["count"] for _ in range(4)]
print(json.dumps({"taken": taken, "stopped": stopped, "values": values}))
"""

ASK = """
import json, sys
from contract.errors import HeadwaterError
from edge_agent.sensors.registry import create_sensor, drivers
answers = {}
for name in sys.argv[1:]:
    try:
        answers[name] = type(create_sensor(name, {})).__name__
    except HeadwaterError as error:
        answers[name] = f"{type(error).__name__}: {error}"
print(json.dumps({"drivers": drivers(), "answers": answers}))
"""


def wheel(folder: Path, name: str, files: dict[str, str], entry_points: str) -> Path:
    """The smallest wheel there is."""
    path = folder / f"{name}-1.2.3-py3-none-any.whl"
    info = f"{name}-1.2.3.dist-info"
    content = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2.3\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[headwater.sensors]\n{entry_points}\n",
    }
    content[f"{info}/RECORD"] = "".join(f"{each},,\n" for each in [*content, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for each, text in content.items():
            archive.writestr(each, text)
    return path


def install(site: Path, *wheels: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    subprocess.run([*command, *map(str, wheels)], check=True, timeout=120)


def run(site: Path, code: str, *arguments: str) -> dict[str, object]:
    program = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(site)!r}]\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(answer, dict)
    return answer


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    points = "\n".join(
        [
            "counter = hw_counter:create",
            "broken = hw_counter:broken",
            "wrong = hw_counter:wrong",
            "absent = hw_counter_absent:create",
            "nothing = hw_counter:__doc__",
            "host = hw_counter:create",
            "contested = hw_counter:create",
        ]
    )
    first = wheel(folder, "hw_counter", {"hw_counter.py": DRIVER}, points)
    second = wheel(folder, "hw_rival", {"hw_rival.py": DRIVER}, "contested = hw_rival:create")
    install(folder / "lib", first, second)
    return folder / "lib"


def test_an_installed_driver_is_found_and_sampled(site: Path) -> None:
    assert run(site, SAMPLE) == {"taken": True, "stopped": True, "values": [0, 5, 10, 15]}


def test_what_is_wrong_with_an_installed_driver_is_said_with_its_origin(site: Path) -> None:
    names = ("counter", "broken", "wrong", "absent", "nothing", "host", "contested", "nobody")
    answer = run(site, ASK, *names)
    found, answers = answer["drivers"], answer["answers"]
    assert isinstance(found, dict) and isinstance(answers, dict)
    assert found["counter"] == "hw_counter 1.2.3" and found["host"] == "built in"
    assert answers["counter"] == "Counter"
    assert answers["host"] == "HostSensor", "a built-in driver cannot be taken over"
    assert "KeyError: 'wiring'" in answers["broken"]
    assert "made a object without open, read, close" in answers["wrong"]
    assert "hw_counter 1.2.3 cannot be imported from 'hw_counter_absent:create'" in answers["absent"]
    assert "is not callable" in answers["nothing"]
    assert "offered by hw_counter 1.2.3 and hw_rival 1.2.3; uninstall one" in answers["contested"]
    assert "no sensor driver 'nobody'; known drivers: absent, broken, callable" in answers["nobody"]
    assert all(
        text.startswith("SensorConfigError") for name, text in answers.items() if name not in ("counter", "host")
    )
