from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from contract.broker import BrokerAddress
from contract.errors import ConfigurationError
from edge_agent.buffer.files import locked
from edge_agent.buffer.port import WhenFull
from edge_agent.sampling.settings import Burst, Interval, OnChange, Stream
from edge_agent.sensors.registry import create_sensor
from edge_agent.settings import BrokerSettings, load_settings, secret_from

MINIMAL = 'device = "pi-1"\n[broker]\nurl = "mqtt://broker"\n'
EXAMPLES = Path(__file__).parents[2] / "examples" / "agent"


def load(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return load_settings(path)


def test_a_device_and_a_broker_are_enough(tmp_path: Path) -> None:
    settings = load(tmp_path, MINIMAL)
    assert settings.device == "pi-1"
    assert settings.buffer.path == str(tmp_path / "buffer.db")
    assert settings.status.socket == str(tmp_path / "agent.sock")
    assert settings.remote_config_path == tmp_path / "buffer.desired.json"
    assert settings.broker.mqtt5
    assert settings.uplink.window_batches_max == 64


def test_paths_in_options_count_from_the_folder_of_the_file_not_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutants tried: options left as written; every text of the options taken for a path."""
    folder, elsewhere = tmp_path / "etc", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "run.csv").write_text("ts,x\n2024-01-01T00:00:00Z,1.5\n")
    (folder / "agent.toml").write_text(
        MINIMAL
        + """
[streams.run]
driver = "replay"
options = { path = "run.csv", format = "csv" }
sampling = { mode = "stream" }

[streams.door]
driver = "callable"
options = { function = "door:read", search_path = "/opt/sensors" }

[streams.mine]
driver = "of-a-package"
options = { path = "as-written" }
"""
    )
    monkeypatch.chdir(elsewhere)
    streams = load_settings(Path("../etc/agent.toml")).streams
    assert streams["run"].options == {"path": str(folder / "run.csv"), "format": "csv"}
    assert streams["door"].options == {"function": "door:read", "search_path": "/opt/sensors"}
    assert streams["mine"].options == {"path": "as-written"}
    assert create_sensor("replay", streams["run"].options) is not None


@pytest.mark.parametrize(
    ("table", "range_"),
    [
        ("[buffer]\nbytes_max = 5", "bytes_max = 5 is outside 1048576 .. 1125899906842624 bytes"),
        ("[uplink]\nack_timeout_s = 0.01", "ack_timeout_s = 0.01 is outside 0.1 .. 3600 s"),
        (
            "[streams.s]\ndriver = 'host'\nsampling = {rate_hz = 1e6}",
            "1000000 is outside 0.0000116 (once a day) .. 10000 Hz",
        ),
    ],
)
def test_ranges_are_told_in_plain_numbers_with_their_unit(tmp_path: Path, table: str, range_: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, MINIMAL + table)
    assert range_ in str(caught.value)
    assert "e+" not in str(caught.value)
    assert "e-" not in str(caught.value).partition("outside")[2]


def test_streams_are_read_with_their_mode_batching_and_caps(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        MINIMAL
        + """
[streams.host]
driver = "host"

[streams.vibration]
driver = "iio"
options = { device = "adxl345" }
sampling = { mode = "burst", rate_hz = 100, pre_rows = 10, post_rows = 5, trigger = [{ field = "x", above = 2 }] }
max_batch_rows = 1000
max_batch_age_s = 2
enabled = false
caps = { bytes_max = 1_000_000, age_max_s = 3600, when_full = "thin", thin_keep_every = 5 }

[streams.door]
driver = "callable"
options = { function = "door:read" }
sampling = { mode = "on_change", watch = ["open"], max_silence_s = 60 }

[streams.audio]
driver = "replay"
sampling = { mode = "stream" }
""",
    )
    host, vibration, door, audio = (settings.streams[name] for name in ("host", "vibration", "door", "audio"))
    assert (host.sampling, host.rate_hz, host.max_batch_rows, host.max_batch_age_s) == (Interval(), 1.0, 500, 5.0)
    assert host.enabled
    assert isinstance(vibration.sampling, Burst)
    assert (vibration.rate_hz, vibration.max_batch_rows, vibration.enabled) == (100, 1000, False)
    assert vibration.caps.caps().when_full is WhenFull.THIN
    assert vibration.options == {"device": "adxl345"}
    assert isinstance(door.sampling, OnChange)
    assert isinstance(audio.sampling, Stream)
    assert audio.rate_hz is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("device = 1\n[broker]\nurl = 'mqtt://b'", "device = 1: Expected `str`, got `int`; write a text, in quotes"),
        ("[broker]\nurl = 'mqtt://b'", 'device is missing; add it, for example: device = "pump-7"'),
        ("device = 'Pi'\n[broker]\nurl = 'mqtt://b'", "device = 'Pi' is not a device name"),
        ("device = 'pi'", "broker is missing"),
        ("device = 'pi'\n[broker]", '[broker] url is missing; add it, for example: url = "mqtt://'),
        (MINIMAL + "keepalive_s = 0", "[broker] keepalive_s = 0 is outside 5 .. 3600"),
        (MINIMAL + "tls = true", "[broker] tls = True is an unknown key; remove it, or use one of: url, username"),
        (MINIMAL + "protocol = '4'", "use one of: '5', '3.1.1', 5"),
        (MINIMAL + "ca_file = 'ca.pem'", "url = 'mqtt://broker' is without TLS"),
        (MINIMAL + "cert_file = 'c.pem'", "give both, or neither"),
        (MINIMAL + "password_file = 'p'", "stands without a username"),
        (MINIMAL + "[buffers]", "buffers = {} is an unknown key"),
        (MINIMAL + "[uplink]\nack_timeout_s = nan", "ack_timeout_s = nan is outside"),
        (MINIMAL + "[metrics]\nlisten = '9464'", "listen = '9464' is not host:port"),
        (MINIMAL + "[streams.s]", "[streams.s] driver is missing"),
        (MINIMAL + "[streams.S]\ndriver = 'host'", "[streams.S] is not a stream name"),
        (MINIMAL + "[streams.'headwater.x']\ndriver = 'host'", "is reserved"),
        (MINIMAL + "[streams.s]\ndriver = 'host'\nrate_hz = 5", "[streams.s] rate_hz = 5 is an unknown key"),
        (MINIMAL + "[streams.s]\ndriver = 'host'\nsampling = {rate_hz = 0}", "[sampling] rate_hz = 0 is outside"),
        (
            MINIMAL + "[streams.s]\ndriver = 'host'\nsampling = {mode = 'x'}",
            "x'; use one of: interval, on_change, burst, stream",
        ),
        (
            MINIMAL + "[streams.s]\ndriver = 'host'\nmax_batch_rows = 70000",
            "max_batch_rows = 70000 is outside 1 .. 65536",
        ),
        (MINIMAL + "[streams.s]\ndriver = 'host'\ncaps = {when_full = 'stop'}", "use one of: 'drop_oldest'"),
        (MINIMAL + "[streams]\ns = 1", "streams is not a table of tables"),
        (MINIMAL + "x", "is not TOML"),
    ],
)
def test_what_is_wrong_is_told_with_file_key_value_and_remedy(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, text)
    assert str(tmp_path / "agent.toml") in str(caught.value)
    assert says in str(caught.value)


def test_a_missing_or_binary_file_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"agent\.toml cannot be read"):
        load_settings(tmp_path / "agent.toml")
    (tmp_path / "agent.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="is not UTF-8"):
        load_settings(tmp_path / "agent.toml")


def test_no_secret_is_shown_even_when_it_stands_in_the_wrong_place(tmp_path: Path) -> None:
    """Mutants tried: the value of an unknown key `password` shown like any other."""
    for line in ("password = 'hunter2'", "secret_token = 'hunter2'"):
        with pytest.raises(ConfigurationError) as caught:
            load(tmp_path, MINIMAL + line)
        assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, 'device = "pi-1"\n[broker]\nurl = "mqtt://pi:hunter2@broker"\n')
    assert "hunter2" not in str(caught.value)


def test_the_password_comes_from_a_file_that_may_change_or_from_a_variable_that_may_not(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("first\n")
    broker = BrokerSettings(url="mqtt://b", username="pi", password_file=str(file))
    secret = secret_from(broker, {})
    assert secret() == "first"
    file.write_text("second")
    assert secret() == "second"
    file.unlink()
    with pytest.raises(ConfigurationError, match="password_file"):
        secret()
    with pytest.raises(ConfigurationError, match="password_file"):
        secret_from(broker, {})
    named = BrokerSettings(url="mqtt://b", username="pi", password_env="PW")
    assert secret_from(named, {"PW": "x"})() == "x"
    with pytest.raises(ConfigurationError, match="PW"):
        secret_from(named, {})
    assert secret_from(BrokerSettings(url="mqtt://b"), {})() is None


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("mqtt://b", ("b", 1883, False)),
        ("mqtts://b.example", ("b.example", 8883, True)),
        ("mqtts://[::1]:99", ("::1", 99, True)),
        ("mqtt://127.0.0.1:1884/", ("127.0.0.1", 1884, False)),
    ],
)
def test_broker_addresses_are_taken_apart(url: str, address: tuple[str, int, bool]) -> None:
    assert tuple(BrokerAddress.parse(url)) == address
    assert BrokerAddress.parse(str(BrokerAddress.parse(url))) == BrokerAddress.parse(url)


@pytest.mark.parametrize(
    "url", ["b", "http://b", "mqtt://", "mqtt://b:x", "mqtt://b:70000", "mqtt://b/path", "mqtt://b..c"]
)
def test_what_is_no_address_is_refused_with_the_form(url: str) -> None:
    with pytest.raises(ValueError, match="write mqtt://"):
        BrokerAddress.parse(url)


def test_the_examples_are_what_the_agent_accepts() -> None:
    files = sorted(EXAMPLES.glob("*.toml"))
    assert len(files) >= 2
    for file in files:
        settings = load_settings(file)
        assert settings.streams
        for stream in settings.streams.values():
            create_sensor(stream.driver, stream.options)


def test_only_the_last_folder_of_the_buffer_is_made(tmp_path: Path) -> None:
    """A path that begins with a disk that is not mounted must not fill the card below it."""
    os.close(locked(tmp_path / "made" / "buffer.db"))
    with pytest.raises(ConfigurationError, match=r"\[buffer\] path = .* mount the disk, make the folder"):
        locked(tmp_path / "ssd" / "headwater" / "buffer.db")
    assert not (tmp_path / "ssd").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="is no folder"):
        locked(tmp_path / "file" / "buffer.db")


def test_an_agent_says_the_file_of_a_wrong_driver_option_and_that_it_measures_nothing(tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(MINIMAL + "[streams.s]\ndriver = 'hwmon'\noptions = { chip = 'x' }\n")
    command = [sys.executable, "-m", "headwater.agent_process", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {config}: [streams.s] driver 'hwmon' has no option 'chip'")
    config.write_text(MINIMAL + "[buffer]\npath = 'no/such/buffer.db'\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "no_streams" in done.stderr
