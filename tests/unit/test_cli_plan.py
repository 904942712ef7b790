"""The plan of a one-machine stack: names, configurations that their readers accept, and where commands find things."""

from __future__ import annotations

import gzip
import shlex
import threading
import tomllib
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from contract.errors import ConfigurationError
from contract.names import is_name
from edge_agent.sensors.registry import create_sensor
from edge_agent.settings import AgentSettings
from edge_agent.settings import parse_settings as parse_agent
from gateway.settings import parse_settings as parse_gateway
from headwater import place, plan, running, toml
from headwater.plan import UpOptions
from headwater.turn import TurnNotCome, turn


def agent_settings(device: plan.DevicePlan, folder: Path) -> AgentSettings:
    text = toml.dumps(plan.agent_config(device, "mqtt://127.0.0.1:1883", None))
    return parse_agent(tomllib.loads(text), source="agent.toml", folder=folder)


@pytest.mark.parametrize("recordings", ["watch", "synthetic"])
def test_every_planned_device_is_one_that_the_agent_accepts(recordings: str, tmp_path: Path) -> None:
    options = UpOptions(data=tmp_path, devices=45, recordings=recordings, speed=20.0)
    devices = plan.plan_devices(options, tmp_path / "recordings")
    names = [device.name for device in devices]
    assert len(set(names)) == 45
    assert all(is_name(name) for name in names)
    for device in devices:
        settings = agent_settings(device, tmp_path)
        assert settings.device == device.name
        assert settings.streams.keys() == device.streams.keys()


def test_the_first_devices_are_both_wrists_of_different_people_and_copies_have_their_own_names(
    tmp_path: Path,
) -> None:
    names = [device.name for device in plan.plan_devices(UpOptions(data=tmp_path, devices=42), tmp_path)]
    assert names[:4] == ["watch-s01-l", "watch-s01-r", "watch-s02-l", "watch-s02-r"]
    assert names[20:22] == ["watch-s01-l-2", "watch-s01-r-2"]
    assert names[40] == "watch-s01-l-3"


def test_recordings_are_written_once_as_the_driver_reads_them(tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    devices = plan.plan_devices(UpOptions(data=tmp_path, devices=2), folder)
    plan.write_recordings(devices, folder)
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(written) == [
        "watch-s01-l.labels.parquet",
        "watch-s01-l.parquet",
        "watch-s01-r.labels.parquet",
        "watch-s01-r.parquet",
    ]
    plan.write_recordings(devices, folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    for stream in devices[0].streams.values():
        sensor = create_sensor(stream["driver"], stream["options"])
        sensor.open()
        assert sensor.schema is not None
        sensor.close()


def test_a_gateway_accepts_its_planned_configuration(tmp_path: Path) -> None:
    lake = {
        "url": "s3://headwater/lake",
        "endpoint": "http://127.0.0.1:8333",
        "region": "us-east-1",
        "allow_http": True,
        "credentials_file": "credentials.toml",
    }
    text = toml.dumps(plan.gateway_config("mqtt://127.0.0.1:1883", lake, 8080, None))
    settings = parse_gateway(tomllib.loads(text), source="gateway.toml", folder=tmp_path)
    assert settings.http.port == 8080
    assert settings.lake.credentials_file == str(tmp_path / "credentials.toml")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("column", ["ts", "Timestamp", "when"])
def test_a_file_of_yours_is_replayed_by_the_column_that_tells_the_time(kind: str, column: str, tmp_path: Path) -> None:
    path = tmp_path / f"My Pump.{kind}"
    times = pa.array([1, 2, 3], pa.timestamp("s", tz="UTC"))
    table = pa.table({"pressure": [1.0, 2.0, 3.0], column: times})
    if kind == "csv":
        pacsv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    options = UpOptions(data=tmp_path, devices=1, recordings=str(path))
    (device,) = plan.plan_devices(options, tmp_path)
    assert list(device.streams) == ["my-pump"]
    assert device.streams["my-pump"]["options"]["time_column"] == column
    agent_settings(device, tmp_path)


def test_a_file_without_a_time_names_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigurationError, match=r"among a, b.*simulate replay"):
        plan.plan_devices(UpOptions(data=tmp_path, recordings=str(path)), tmp_path)
    broken = tmp_path / "x.parquet"
    broken.write_bytes(b"nothing")
    with pytest.raises(ConfigurationError, match="neither CSV"):
        plan.find_time_column(broken)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", b"ts;a\n2026-01-01;1\n", ("among ts;a", "--delimiter")),
        ("x.csv", b"ts,a\n1700000000,1\n", ("row 1", "'1700000000'", "--time-format", "simulate replay")),
        ("x.csv", b"ts,a\n2026-01-01,1\nsoon,2\n", ("row 2", "'soon'")),
        ("x.csv", b"ts,a\n2026-01-01,1\n,2\n", ("row 2 has no time",)),
        ("x.csv", b"ts,a\n", ("holds no rows",)),
        ("x.csv", b"", ("Empty CSV file",)),
        ("x.csv", b"ts\n2026-01-01\n", ("no column beside the time",)),
        ("x.csv", b"ts,a,a\n2026-01-01,1,2\n", ("'a' and 'a'",)),
        ("x.csv", b"ts,gr\xf6\xdfe\n2026-01-01,1\n", ("not UTF-8", "iconv")),
        ("x.csv", b"ts,a\n2026-01-01T00:00:00Z,1\n2026-01-01T00:00:00,1\n", ("row 2", "no zone")),
        ("x.parquet", b"PAR1", ("neither CSV",)),
    ],
)
def test_a_file_that_devices_could_not_replay_is_refused_before_anything_starts(
    name: str, content: bytes, words: tuple[str, ...], tmp_path: Path
) -> None:
    """Mutants tried: the file not looked at by `plan_devices` (each device would fail by itself, seen by nobody)."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigurationError) as error:
        plan.plan_devices(UpOptions(data=tmp_path, recordings=str(path)), tmp_path)
    assert all(word in str(error.value) for word in words), error.value
    assert "driver" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", b"\xef\xbb\xbfts,a\n2026-01-01,1\n"),
        ("X.TSV", b"ts\ta\n2026-01-01\t1\n"),
        ("x.csv.gz", gzip.compress(b"ts,a\n2026-01-01,1\n", mtime=0)),
        ("x.csv", b"ts,a\r\n2026-01-01,NaN\r\n2026-01-01,\r\n"),
    ],
)
def test_a_file_is_taken_as_the_driver_takes_it(name: str, content: bytes, tmp_path: Path) -> None:
    """Mutants tried: a comma for every file."""
    path = tmp_path / name
    path.write_bytes(content)
    (device,) = plan.plan_devices(UpOptions(data=tmp_path, recordings=str(path), devices=1), tmp_path)
    assert device.streams["x"]["options"]["time_column"] == "ts"


@pytest.mark.parametrize(
    ("name", "stream"),
    [("Pump 7.csv.gz", "pump-7"), ("Übung.csv", "bung"), ("___.csv", "replay"), ("headwater.events.csv", "headwater")],
)
def test_streams_of_files_have_allowed_names(name: str, stream: str) -> None:
    assert plan.stream_name(Path(name)) == stream


def test_what_up_tells_to_type_can_be_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutants tried: names in quotes inside quotes; a folder with a space as it is."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "My-Pump.csv"
    file.write_text("ts,a\n2026-01-01,1\n")
    folder = tmp_path / "a b" / "headwater-data"
    options = UpOptions(data=folder, recordings=str(file))
    device = place.DevicePlace(name="replay-001", config="", socket="", buffer="")
    found = msgspec.structs.replace(record(tmp_path), devices=(device,))
    running.introduce(options, found, [])
    typed = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  headwater ")]
    data = ["--data", str(folder)]
    assert typed == [
        ["headwater", "lake", "streams", *data],
        ["headwater", "lake", "head", "my-pump", *data],
        ["headwater", "lake", "sql", 'SELECT _device, count(*) FROM "my-pump" GROUP BY ALL', *data],
        ["headwater", "agent", "status", "--device", "replay-001", *data],
    ]
    assert place.data_option(tmp_path / "headwater-data") == ""


def test_the_data_folder_is_the_option_or_the_variable_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place.data_folder("a", {"HEADWATER_DATA": "/b"}) == tmp_path / "a"
    assert place.data_folder(None, {"HEADWATER_DATA": "/b"}) == Path("/b")
    assert place.data_folder(None, {}) == tmp_path / "headwater-data"


def record(folder: Path) -> place.StackRecord:
    return place.StackRecord(
        pid=1,
        broker="mqtt://127.0.0.1:2000",
        broker_kind="iotcore",
        lake=place.LakePlace(url="file:///x"),
        http="http://127.0.0.1:8080",
        devices=(),
        logs=str(folder),
    )


def test_a_broker_is_the_option_or_the_variable_or_that_of_the_stack(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"holds no stack.*headwater up"):
        place.find_broker(None, str(tmp_path), {})
    place.record_path(tmp_path).write_bytes(msgspec.json.encode(record(tmp_path)))
    assert place.find_broker(None, str(tmp_path), {}) == "mqtt://127.0.0.1:2000"
    assert place.find_broker(None, None, {"HEADWATER_DATA": str(tmp_path)}) == "mqtt://127.0.0.1:2000"
    assert place.find_broker(None, str(tmp_path), {"HEADWATER_BROKER": "mqtt://b"}) == "mqtt://b"
    assert place.find_broker("mqtt://a", str(tmp_path), {"HEADWATER_BROKER": "mqtt://b"}) == "mqtt://a"


def test_a_damaged_record_is_said_and_not_believed(tmp_path: Path) -> None:
    place.record_path(tmp_path).write_text("{")
    with pytest.raises(ConfigurationError, match=r"stack\.json cannot be read"):
        place.find_broker(None, str(tmp_path), {})


def test_a_lake_is_the_option_or_the_variable_or_that_of_the_stack(tmp_path: Path) -> None:
    from headwater.lake_access import find_store

    place.record_path(tmp_path).write_bytes(msgspec.json.encode(record(tmp_path)))
    assert find_store(None, str(tmp_path), {}).settings.url == "file:///x"
    assert find_store(None, str(tmp_path), {"HEADWATER_LAKE": "file:///y"}).settings.url == "file:///y"
    found = find_store("s3://b/p", None, {"AWS_ENDPOINT_URL": "https://s", "AWS_ACCESS_KEY_ID": "k"}).settings
    assert (found.url, found.endpoint, found.access_key) == ("s3://b/p", "https://s", "k")
    with pytest.raises(ConfigurationError, match="not embedded"):
        find_store("embedded", str(tmp_path), {})


def test_stacks_take_turns_and_say_when_their_turn_does_not_come(tmp_path: Path) -> None:
    """Mutants tried: no lock at all (the second gets its turn at once)."""
    lock = tmp_path / "lock"
    with turn(lock):
        with pytest.raises(TurnNotCome, match="another stack"), turn(lock, timeout_s=0.2):
            pytest.fail("two had their turn at once")
        came = threading.Event()

        def wait() -> None:
            with turn(lock, timeout_s=30.0):
                came.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not came.wait(0.2)
    waiting.join()
    assert came.is_set()
